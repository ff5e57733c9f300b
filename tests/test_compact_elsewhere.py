"""Models in compact storage in the rest of the library: costs, groups of rates, masks for others, a second start."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dstlib
from dstlib.sparsifier import density_groups


def small() -> nn.Module:
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Tanh())
    return nn.Sequential(*image, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16))


def begin(model: nn.Module, storage: str) -> dstlib.Sparsifier:
    method = replace(dstlib.RIGL, interval=2, stop=1.0, granularity=dstlib.Kernel())
    return dstlib.sparsify(model, sparsity=0.5, method=method, total_steps=40, storage=storage, seed=1)


@pytest.fixture
def model():
    return small()


@pytest.fixture
def sparsifier(model):
    return begin(model, "compact")


def cost_of(storage: str) -> tuple[dstlib.TrainingCost, dstlib.History]:
    model = small()
    sparsifier = begin(model, storage)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = dstlib.History(sparsifier)
    cost = dstlib.TrainingCost(history, model, (3, 4, 6, 6))
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(3, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    return cost, history


def test_a_training_costs_what_it_does_under_masked_storage():
    (compact, history), (masked, other) = cost_of("compact"), cost_of("masked")
    # of three samples: products and sums of 8 maps of 6×6 twice and of the last layer, and a bias for each output
    assert compact.dense == masked.dense == 3 * (2 * (36 * 8 * 4 * 9 + 36 * 8 * 8 + 32 * 16) + 36 * 8 + 36 * 8 + 16)
    assert (compact.so_far, compact.forward_share) == (masked.so_far, masked.forward_share)
    assert 0 < compact.average_share < 1
    assert str(compact) == str(masked)
    assert str(history) == str(other)


def test_groups_of_rates_divide_by_the_density(model, sparsifier):
    groups = {group["lr"]: group["params"] for group in density_groups(model, sparsifier.masks, lr=1.0)}
    found = {id(p): rate for rate, parameters in groups.items() for p in parameters}
    for name, mask in sparsifier.masks.items():
        parameter = model.get_parameter(name)
        assert found[id(parameter)] == pytest.approx(mask.numel() / int(mask.sum()), rel=1e-6)  # a float32 mean
    assert found[id(model[0].bias)] == 1.0


@pytest.mark.parametrize("how", ["module", "state", "file", "ddp", "compiled"])
def test_a_plain_model_begins_from_its_masks(model, sparsifier, how, tmp_path):
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = model.state_dict()
    masks = {
        "module": model,
        "state": state,
        "file": tmp_path / "model.pt",
        "ddp": {f"module.{name}": x for name, x in state.items()},
        "compiled": {f"_orig_mod.{name}": x for name, x in state.items()},
    }[how]
    other = dstlib.sparsify(small(), masks=masks, method="static")
    assert sorted(other.masks) == ["0.weight", "2.weight", "6.weight"]
    assert all(torch.equal(other.masks[name], mask) for name, mask in sparsifier.masks.items())


def test_its_masks_are_refused_by_another_architecture(model, sparsifier):
    with pytest.raises(
        dstlib.errors.StateError, match=r"weight of 6\.weight: expected the name of a weight of the plain"
    ):
        dstlib.sparsify(small()[:4], masks=model, method="static")


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"masks": "from-zeros"}, {"sparsity": 0.5, "storage": "compact"}]
)
def test_a_second_start_is_told_how_to_begin(model, sparsifier, options):
    sparsifier.detach()
    with pytest.raises(
        dstlib.SelectionError, match=r"0\.weight: sparse already, in compact storage; to begin anew, load"
    ):
        dstlib.sparsify(model, method="static", **options)
    plain = small()
    plain.load_state_dict(sparsifier.dense_state_dict())
    again = dstlib.sparsify(plain, masks="from-zeros", method="static", storage=options.get("storage", "masked"))
    assert all(torch.equal(again.masks[name], mask) for name, mask in sparsifier.masks.items() if not mask.all())


def test_accelerate_leaves_it_as_it_is_with_masks_or_without(model, sparsifier):
    x = torch.randn(2, 4, 6, 6)
    for fast in (
        dstlib.accelerate(model, x, masks=sparsifier.masks),
        dstlib.accelerate(model, x, masks=dict(sparsifier.masks)),
        sparsifier.accelerate(model, x),
    ):
        assert torch.equal(fast(x), model(x))
        assert {row.name for row in fast.decisions.values() if row.is_fast} == set()

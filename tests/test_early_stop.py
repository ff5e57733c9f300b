"""A weight whose update grows what it has just dropped has had its last one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import generator, seeds
from torch import Tensor, nn

import dstlib
from dstlib import SettingError, Site, StateError
from dstlib.masking import MaskUpdate
from dstlib.schedules import Constant, Cosine
from dstlib.sparsifier import Sparsifier
from dstlib.sparsifier.saved import at_step_0

STEPS = 8


def back_again(site: Site) -> Tensor:
    """What has a weight, and so was active before the update, grows first."""
    return (site.weight != 0) + site.rand()


def back_or_by_chance(site: Site) -> Tensor:
    """By chance, but for the third update of the first layer."""
    return back_again(site) if (site.name, site.step) == ("0.weight", 3) else site.rand()


RANDOM = replace(
    dstlib.METHODS["set"], name="mine", drop_fraction=Constant(0.4), interval=1, stop=1.0, distribution=dstlib.uniform
)
ONCE = replace(RANDOM, grow=back_or_by_chance, early_stop=0.9)


def set_up(method: dstlib.Method) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, optimizer, dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=STEPS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(6, 12, generator=generator(step))).square().mean().backward()
        optimizer.step()


def test_a_layer_that_grows_what_it_dropped_stops_and_others_go_on() -> None:
    model, optimizer, sparsifier = set_up(ONCE)
    seen: list[tuple[str, int]] = []
    sparsifier.observers.append(lambda site, _: seen.append((site.name, site.step)))
    train(model, optimizer, range(3))
    before = sparsifier.masks["0.weight"].clone()
    train(model, optimizer, range(3, STEPS))
    assert torch.equal(sparsifier.masks["0.weight"], before)
    assert [step for name, step in seen if name == "0.weight"] == [1, 2, 3]
    assert [step for name, step in seen if name == "1.weight"] == list(range(1, STEPS + 1))


@pytest.mark.filterwarnings("ignore:method mine.*none of them has")  # as it is meant to be
@given(threshold=st.floats(0, 0.99), lean=st.floats(0, 1.5), seed=seeds)
@example(threshold=0.0, lean=0.75, seed=16434)
def test_the_share_that_ends_it(threshold: float, lean: float, seed: int) -> None:
    """Updates go on while no more than the threshold of what grew had been dropped in the same update."""
    overlaps: list[float] = []
    kept: list[Tensor] = []

    def grow(site: Site) -> Tensor:
        kept.append(site.mask.clone())
        return lean * (site.weight != 0) + site.rand()

    def observe(site: Site, update: MaskUpdate) -> None:
        came = update.mask & ~kept[-1]
        overlaps.append(float((came & ~update.grown).sum() / came.sum()))

    torch.manual_seed(seed)
    layer = nn.Linear(9, 7, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    method = replace(RANDOM, grow=grow, early_stop=threshold)
    sparsifier = dstlib.sparsify(
        layer, optimizer, sparsity=0.5, method=method, total_steps=STEPS, seed=seed, keep_neurons=()
    )
    sparsifier.observers.append(observe)
    for step in range(STEPS):
        layer(torch.randn(5, 9, generator=generator(step))).square().sum().backward()
        optimizer.step()
    sparsifier.detach()
    assert all(overlap <= threshold for overlap in overlaps[:-1])
    assert len(overlaps) == STEPS or overlaps[-1] > threshold


def test_parts_of_a_fused_projection_stop_by_themselves() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = replace(RANDOM, grow=lambda site: back_again(site) if site.name.endswith("k") else site.rand())
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=0.5, method=replace(method, early_stop=0.5), total_steps=STEPS
    )
    seen: list[str] = []
    sparsifier.observers.append(lambda site, _: seen.append(site.name))
    for step in range(4):
        x = torch.randn(2, 5, 8, generator=generator(step))
        model(x, x, x)[0].square().sum().backward()
        optimizer.step()
    counts = {name: seen.count(name) for name in seen}
    assert sorted(counts.values()) == [1, 4, 4, 4]
    assert next(name for name, num in counts.items() if num == 1).endswith("k")


@pytest.mark.filterwarnings("ignore:method mine.*none of them has")  # as it is meant to be
def test_what_has_no_reason_to_grow_has_not_stopped() -> None:
    """Its growth scores are all equal for now, as those of an expert that no token has reached."""
    method = replace(RANDOM, grow=lambda site: torch.zeros_like(site.weight), early_stop=0.1)
    model, optimizer, sparsifier = set_up(method)
    seen: list[int] = []
    sparsifier.observers.append(lambda site, update: seen.append(update.num_idle))
    train(model, optimizer, range(STEPS))
    assert seen == [1] * 2 * STEPS


def test_a_stop_is_saved() -> None:
    """A run that is resumed equals one that was not; the settings of another training begin anew."""
    whole_model, whole_optimizer, whole = set_up(ONCE)
    train(whole_model, whole_optimizer, range(STEPS))
    model, optimizer, sparsifier = set_up(ONCE)
    train(model, optimizer, range(5))
    state = sparsifier.state_dict()
    assert state["weights"]["0.weight"]["settled"] == (True,)
    assert state["weights"]["1.weight"]["settled"] == ()
    sparsifier.detach()
    resumed_model, resumed_optimizer, resumed = set_up(ONCE)
    resumed_model.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(state)
    train(resumed_model, resumed_optimizer, range(5, STEPS))
    for name, mask in whole.masks.items():
        assert torch.equal(resumed.masks[name], mask)
    assert at_step_0(state)["weights"]["0.weight"]["settled"] == ()


def test_states_of_before_say_nothing_of_it() -> None:
    model, optimizer, sparsifier = set_up(RANDOM)
    train(model, optimizer, range(3))
    state = sparsifier.state_dict()
    del state["checksum"]
    for weight in state["weights"].values():
        del weight["settled"]
    sparsifier.load_state_dict(state)


@pytest.mark.parametrize("settled", [True, (1,), (True, False), "yes"])
def test_a_stop_that_no_training_saved_is_refused(settled: object) -> None:
    model, optimizer, sparsifier = set_up(ONCE)
    train(model, optimizer, range(2))
    state = sparsifier.state_dict()
    del state["checksum"]
    state["weights"]["0.weight"]["settled"] = settled
    with pytest.raises(StateError, match=r"^settled of 0.weight: expected nothing, or 1 truth values"):
        sparsifier.load_state_dict(state)


def test_a_method_that_stops_nothing_refuses_a_stop() -> None:
    model, optimizer, sparsifier = set_up(RANDOM)
    train(model, optimizer, range(2))
    state = sparsifier.state_dict()
    del state["checksum"]
    state["weights"]["0.weight"]["settled"] = (True,)
    with pytest.raises(StateError, match=r"^settled of 0.weight: expected nothing"):
        sparsifier.load_state_dict(state)


@pytest.mark.parametrize("name", ["granet", "mest_soft", "chtss"])
def test_numbers_that_move_go_on_moving(name: str) -> None:
    with pytest.raises(SettingError, match=rf"^early_stop of method {name}: expected None, as the number"):
        replace(dstlib.METHODS[name], early_stop=0.9)


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0])
def test_no_share_is_refused(value: float) -> None:
    with pytest.raises(SettingError, match=r"^early_stop of method rigl: expected a share in \[0, 1\), or None"):
        replace(dstlib.RIGL, early_stop=value)


def test_options_of_cht() -> None:
    """As its authors' code has them, with fewer links exchanged from update to update."""
    method = replace(dstlib.METHODS["cht"], early_stop=0.9, drop_fraction=Cosine(0.3), interval=1)
    model, optimizer, sparsifier = set_up(method)
    before = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    train(model, optimizer, range(STEPS))
    assert {name: int(mask.sum()) for name, mask in sparsifier.masks.items()} == before

"""Masks are updated a few rows at a time, and are those of an update that sees all at once, as observers have it."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import nn

import dstlib
from dstlib import masking
from dstlib.schedules import Constant
from dstlib.sparsifier import by_tiles, update

LAYERS = {
    "linear": lambda: nn.Linear(24, 16, bias=False),
    "one row": lambda: nn.Linear(40, 1, bias=False),
    "convolution": lambda: nn.Conv2d(8, 12, 3, bias=False),
    "of 1x1": lambda: nn.Conv2d(12, 8, 1, bias=False),
    "channels last": lambda: nn.Conv2d(8, 12, 3, bias=False).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(8, 12, 2, bias=False),
    "packed": lambda: nn.MultiheadAttention(8, 2, bias=False),
}
GRAINS = [
    masking.Element(),
    masking.Kernel(),
    masking.Block(4, 4),
    masking.FanIn(),
    masking.SharedFanIn(4),
    masking.Channel(),
]
SCORES = [masking.magnitude, masking.gradient, masking.saliency, masking.random]


def whole(x: torch.Tensor, seed: int, top: int) -> torch.Tensor:
    """Small whole numbers, few enough for ties."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, x.shape, generator=rng).to(x)


def life(model: nn.Module, method: dstlib.Method, *, observed: bool, top: int, seed: int, optimizer=torch.optim.Adam):
    """Trains by made-up gradients, and returns what is left of each step."""
    model = copy.deepcopy(model)
    trained = optimizer(model.parameters(), lr=0.125)
    sparsifier = dstlib.sparsify(model, trained, sparsity=0.6, method=method, total_steps=40, seed=3, keep_neurons=())
    if observed:
        sparsifier.observers.append(lambda site, change: None)
    found = []
    for step in range(6):
        for parameter in model.parameters():
            parameter.grad = whole(parameter, 100 * seed + step, top)
            if step == 3 and method.grow in (masking.gradient, masking.random):  # which do not look at weights
                parameter.data[0] += 1  # by something else, outside the mask, too
        trained.step()
        state = [{k: x.clone() for k, x in s.items() if isinstance(x, torch.Tensor)} for s in trained.state.values()]
        weights = [p.detach().clone() for p in model.parameters()]
        found.append(({name: mask.clone() for name, mask in sparsifier.masks.items()}, weights, state))
    return found


@given(
    name=st.sampled_from(sorted(LAYERS)),
    grain=st.sampled_from(GRAINS),
    drop=st.sampled_from(SCORES[:3]),
    grow=st.sampled_from(SCORES),
    regrow=st.booleans(),
    top=st.sampled_from([1, 3, 1000]),
    tile=st.sampled_from([40, 2**18]),
    seed=st.integers(0, 100),
)
@examples(40, 600)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of small layers, in which no unit may move
def test_masks_weights_and_state_are_those_of_an_update_at_once(name, grain, drop, grow, regrow, top, tile, seed):
    torch.manual_seed(0)
    model = LAYERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(whole(parameter, seed, top) / 8 + 1 / 16)  # none is zero
    method = replace(dstlib.RIGL, interval=2, stop=1.0, granularity=grain, drop=drop, grow=grow, regrow=regrow)
    method = replace(method, drop_fraction=Constant(0.5), distribution=masking.uniform)
    try:
        before, by_tiles.TILE = by_tiles.TILE, tile
        lives = [life(model, method, observed=observed, top=top, seed=seed) for observed in (True, False)]
    except dstlib.SettingError:
        return  # the units do not divide the layer
    finally:
        by_tiles.TILE = before
    for (masks, weights, state), (its_masks, its_weights, its_state) in zip(*lives, strict=True):
        assert all(torch.equal(mask, its_masks[key]) for key, mask in masks.items())
        assert all(torch.equal(x, y) for x, y in zip(weights, its_weights, strict=True))
        for mine, its in zip(state, its_state, strict=True):
            assert all(torch.equal(x, its[key]) for key, x in mine.items())


@pytest.mark.parametrize("name", LAYERS)
def test_what_lies_as_rows_goes_by_tiles(name, monkeypatch):
    taken = []
    monkeypatch.setattr(update, "update_by_tiles", lambda *given: taken.append(1) or by_tiles.update_by_tiles(*given))
    torch.manual_seed(0)
    method = replace(dstlib.RIGL, interval=2, stop=1.0, drop_fraction=Constant(0.5), distribution=masking.uniform)
    life(LAYERS[name](), method, observed=False, top=1000, seed=1)
    assert bool(taken) == (name not in ("channels last", "transposed"))


def test_weights_whose_places_32_bits_cannot_number_are_updated_at_once(monkeypatch):
    monkeypatch.setattr(update, "MOST", 16 * 24 - 1)
    monkeypatch.setattr(update, "update_by_tiles", None)  # nobody calls it
    torch.manual_seed(0)
    method = replace(dstlib.RIGL, interval=2, stop=1.0, drop_fraction=Constant(0.5), distribution=masking.uniform)
    found = life(LAYERS["linear"](), method, observed=False, top=1000, seed=1)
    assert not torch.equal(found[0][0]["weight"], found[-1][0]["weight"])


@pytest.mark.parametrize("observed", [False, True])
def test_what_may_not_regrow_is_of_the_type_of_the_weight(observed):
    """In float64, where too few may grow for those that were dropped to stay away."""
    method = replace(dstlib.METHODS["set_itop"], interval=1, drop=masking.magnitude, regrow=False)
    torch.manual_seed(0)
    model = nn.Linear(16, 32).double()
    sparsifier = dstlib.sparsify(model, sparsity=0.2, method=method, total_steps=9)
    sparsifier.observers.extend([lambda site, update: None] * observed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.randn(4, 16).double()).square().mean().backward()
        optimizer.step()
    assert int(sparsifier.masks["weight"].sum()) == 512 - int(0.2 * 512)

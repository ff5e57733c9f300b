"""Compact storage: every mask, value and loss is that of masked storage, though nothing outside the masks exists.

Sums are of small integers, which floats hold, so that "the same" is ``torch.equal``, in whatever order they are taken.
"""

import copy
import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import nn
from torch.utils.checkpoint import checkpoint

import dstlib
from dstlib import METHODS, SelectionError, SettingError, StateError, masking
from dstlib.engine.layers import compact_linear as layers
from dstlib.engine.layers.compact_linear import CompactLinear
from dstlib.engine.ops import compact_linear as ops
from dstlib.sparsifier import by_tiles
from dstlib.sparsifier.compact import check_method

TAKEN = []  # presets that change masks by what compact storage has
for _name, _method in METHODS.items():
    try:
        check_method(_method)
    except SettingError:
        continue
    TAKEN.append(_name)
GRAINS = [
    masking.Element(),
    masking.Kernel(),
    masking.Block(4, 1),
    masking.Block(2, 3),
    masking.Block(4, 4),
    masking.FanIn(),
    masking.SharedFanIn(4),
    masking.Channel(),
    masking.NM(1, 4),
]
STEPS = 7


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes tiles of a few rows, so that small matrices have several."""
    monkeypatch.setattr(by_tiles, "TILE", 50)
    monkeypatch.setattr(ops, "_TILE", 50)


class Sides(nn.Module):
    """Layers side by side, whose gradients are sums of products of integers: (N, 12) → [(N, 16), (N, 12), (N, 24)]."""

    def __init__(self):
        super().__init__()
        self.wide, self.bare, self.qkv = nn.Linear(12, 16), nn.Linear(12, 12, bias=False), nn.Linear(12, 24)

    def forward(self, x):
        return torch.cat([self.wide(x), self.bare(x), self.qkv(x)], dim=-1)


def sides(seed=0):
    """Weights are eighths, few enough for ties."""
    torch.manual_seed(seed)
    model = Sides()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-16, 17, parameter.shape) / 8)
    return model


def integers(step, size=5, width=12, top=3):
    """Inputs and factors of the outputs of a step: small integers."""
    rng = torch.Generator().manual_seed(step)
    x = torch.randint(-top, top + 1, (size, width), generator=rng).float()
    return x, torch.randint(-top, top + 1, (size, 52), generator=rng).float()


def fresh_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.125, momentum=0.5)


def is_compact(model):
    return any(isinstance(module, CompactLinear) for module in model.modules())


def life(storage, method, make=sides, optimizer=fresh_sgd, batch=integers, steps=STEPS, **settings):
    """Trains, and returns what every step left: the loss, the weights with their zeros, and the masks."""
    settings = {"sparsity": 0.7, "total_steps": 12, "seed": 3} | settings
    model = make()
    sparsifier = dstlib.sparsify(model, method=method, storage=storage, **settings)
    trained, found = optimizer(model.parameters()), []
    for step in range(steps):
        trained.zero_grad()
        x, factors = batch(step)
        loss = (model(x) * factors).sum()
        loss.backward()
        trained.step()
        dense = sparsifier.dense_state_dict()
        found.append((loss.detach(), {n: x.clone() for n, x in dense.items()}, {**sparsifier.masks}))
    assert is_compact(model) == (storage == "compact")
    return found


def assert_same_lives(method, **settings):
    masked, compact = (life(storage, method, **settings) for storage in ("masked", "compact"))
    for step, ((loss, dense, masks), (its_loss, its_dense, its_masks)) in enumerate(zip(masked, compact, strict=True)):
        for name, mask in masks.items():
            assert torch.equal(mask, its_masks[name]), f"{name} at step {step}: {int((mask ^ its_masks[name]).sum())}"
        assert dense.keys() == its_dense.keys()
        for name, x in dense.items():
            assert torch.equal(x, its_dense[name]), f"{name} at step {step}"
        assert torch.equal(loss, its_loss), step
    return masked


def quick(method, **changes):
    changes = {"interval": 2} | changes if method.interval is not None else changes
    return replace(method, **changes)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.usefixtures("small_tiles")
def test_every_preset_has_the_masks_of_masked_storage(name):
    found = assert_same_lives(quick(METHODS[name]))
    first, last = found[0][2], found[-1][2]
    assert any(not torch.equal(first[key], last[key]) for key in first) or name in ("static", "srste"), "masks move"


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("name", ["rigl", "set"])
@pytest.mark.usefixtures("small_tiles")
def test_every_granularity_has_the_masks_of_masked_storage(name, grain):
    overrides = {"*": 0.75} if isinstance(grain, masking.NM) else None
    assert_same_lives(quick(METHODS[name], granularity=grain, distribution=masking.uniform), overrides=overrides)

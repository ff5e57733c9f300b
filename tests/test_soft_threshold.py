"""S-STE's soft threshold against its definition, and a training with it against one that is written out."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same
from torch import nn

import dstlib
from dstlib import NM, Block, Element, FanIn, Kernel, SettingError, StateError
from dstlib.masking import DenseStorage, best_scale, best_units, harden, soften
from dstlib.methods import SSTE
from dstlib.testing import check_method

GRAINS = [NM(2, 4), NM(1, 4), Element(), FanIn(), Kernel(), Block(2, 2)]


def soft_2_of_4(w):
    """Of each four in a row, the two largest less the third in size."""
    fours = w.reshape(len(w), -1, 4)
    third = np.sort(np.abs(fours), axis=2)[..., 1:2]
    return (np.sign(fours) * np.maximum(np.abs(fours) - third, 0)).reshape(w.shape)


@given(st.integers(0, 10**6))
def test_of_four_weights_two_are_shown_less_the_third(seed):
    w = np.random.default_rng(seed).normal(size=(5, 12))
    weight = torch.tensor(w)
    mask = best_units(weight.abs(), NM(2, 4), 2)
    soft = soften(weight, mask, NM(2, 4))
    assert np.allclose(soft.numpy(), soft_2_of_4(w), rtol=1e-12, atol=1e-15)  # a quotient and a product in double
    flat, shown = w.ravel(), soft_2_of_4(w).ravel()
    assert best_scale(weight, soft) == pytest.approx(flat @ shown / (shown @ shown), rel=1e-12)


@settings(max_examples=24)
@given(st.integers(0, 10**6), st.sampled_from(GRAINS))
def test_it_is_continuous_where_units_change_places(seed, grain):
    """A step of the weights, through any change of the mask, moves what is shown by little more than itself."""
    generator = torch.Generator().manual_seed(seed)
    weight, step = (torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def shown(w):
        num = max(grain.fold(w).shape[1] // 2, 1) if not isinstance(grain, NM) else grain.n
        size = grain.fold(w.abs()).mean(dim=-1, keepdim=True)
        score = grain.unfold(size.repeat(1, 1, grain.fold(w).shape[2]), w.shape)
        return soften(w, best_units(score, grain, num), grain)

    ways = [shown(weight + t * step) for t in torch.linspace(0, 1, 101, dtype=torch.float64)]
    jumps = torch.stack([(b - a).abs().max() for a, b in pairwise(ways)])
    # |w| · (1 - t/s) moves with w by once, with t and s by |w|/s each, which is at most the size of a unit
    num_elements = grain.fold(weight).shape[2]
    assert jumps.max() <= (1 + 2 * num_elements) * step.abs().max() / 100


@given(st.integers(0, 10**6), st.sampled_from(GRAINS))
def test_what_is_shown_tells_what_was_meant(seed, grain):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    num = grain.n if isinstance(grain, NM) else max(grain.fold(weight).shape[1] // 2, 1)
    mask = best_units(weight.abs(), grain, num)
    again = harden(soften(weight, mask, grain), mask, weight, grain)
    # a unit that is shown as nearly nothing tells little of what it was: 1e-16 over what it is shown as
    assert torch.allclose(again, weight * mask, rtol=0, atol=1e-6)


class Written:
    """S-STE written out: dense weights, shown softened in each forward, with the gradient of what is shown."""

    def __init__(self, model, make):
        self.dense = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        self.model, self.optimizer = model, make(self.dense.values())
        self.scales = {}
        self.show()

    def show(self):
        for name, p in self.model.named_parameters():
            value = self.dense[name].detach()
            if p.ndim == 2:
                shown = torch.tensor(soft_2_of_4(value.double().numpy()))
                scale = float((value.double() * shown).sum() / shown.square().sum())
                value = self.scales.setdefault(name, scale) * shown
            p.data.copy_(value)

    def step(self, x):
        self.model.zero_grad()
        self.model(x).square().mean().backward()
        for name, p in self.model.named_parameters():
            self.dense[name].grad = p.grad.clone()
        self.optimizer.step()
        self.show()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))


def steps(model, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-3),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_a_training_is_the_one_that_is_written_out(make):
    model, written, batches = net(), Written(net(), make), torch.randn(30, 10, 16)
    optimizer = make(model.parameters())
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=SSTE, total_steps=30)
    moved = {n: m.clone() for n, m in sparsifier.masks.items()}
    for x in batches:
        for (name, p), q in zip(model.named_parameters(), written.model.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-5), name  # single precision; Adam's root, over 30 steps
        steps(model, optimizer, [x])
        written.step(x)
    assert any(not torch.equal(moved[n], m) for n, m in sparsifier.masks.items()), "else little is shown"


def test_a_resumed_run_is_the_same_and_a_copy_too():
    batches = torch.randn(12, 10, 16)
    runs = []
    for _ in range(2):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        runs.append((model, optimizer, dstlib.sparsify(model, optimizer, sparsity=0.5, method=SSTE, total_steps=12)))
    (model, optimizer, sparsifier), other = runs
    steps(model, optimizer, batches[:6])
    for part, holder in zip((model, optimizer, sparsifier), other, strict=True):
        holder.load_state_dict(copy.deepcopy(part.state_dict()))
    copied = copy.deepcopy((model, optimizer, sparsifier))
    for run in ((model, optimizer), other, copied):
        steps(run[0], run[1], batches[6:])
    for run in (other, copied):
        assert_same(run[0].state_dict(), model.state_dict())
        assert_same(run[2].state_dict(), sparsifier.state_dict())


def test_shown_weights_that_something_else_writes_are_what_the_next_step_goes_on_from():
    """Half the size in a checkpoint: the step begins with the values that are shown so."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=replace(SSTE, interval=100), total_steps=1000)
    steps(model, optimizer, torch.randn(2, 4, 16))
    before = model[0].weight.detach().clone()
    steps(model, optimizer, torch.randn(1, 4, 16))
    assert torch.equal(model[0].weight, before), "nothing was written, and nothing moves"
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    steps(model, optimizer, torch.randn(1, 4, 16))
    assert torch.allclose(model[0].weight, 0.5 * before, rtol=0, atol=1e-6)  # there and back in single precision
    assert sparsifier.masks["0.weight"].sum() == 96


def test_it_keeps_the_laws_at_another_granularity():
    check_method(replace(SSTE, granularity=Block(2, 2)))


def test_with_a_pull_only_hidden_weights_are_pulled():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    storage = DenseStorage(soft=True, decay=dstlib.schedules.Constant(0.1))
    sparsifier = dstlib.sparsify(
        model,
        optimizer,
        sparsity=0.5,
        method=replace(SSTE, storage=storage, interval=100),
        total_steps=1000,
        include="0",
    )
    before, mask = sparsifier.state_dict()["weights"]["0.weight"]["hidden"], sparsifier.masks["0.weight"].clone()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    after = sparsifier.state_dict()["weights"]["0.weight"]["hidden"]
    assert torch.equal(after[mask], before[mask])
    assert torch.allclose(after[~mask], 0.9 * before[~mask], rtol=1e-6)  # one rounding


def test_what_does_not_fit_is_refused():
    with pytest.raises(SettingError, match="soft of DenseStorage: expected True or False, got 1"):
        DenseStorage(soft=1)
    model = net()
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method=SSTE, total_steps=100)
    state = sparsifier.state_dict()
    state["weights"]["0.weight"]["scales"] = ()
    with pytest.raises(StateError, match=r"scales of 0\.weight: expected 1 of them"):
        sparsifier.load_state_dict(state)

"""Guided exploration, fine-tuning of pruned models and cyclic density, against their definitions."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dstlib
from dstlib import METHODS, Site
from dstlib.at_init import wanda
from dstlib.masking import AmongSome, Times, gradient, num_units, site_generator
from dstlib.methods import CYCLIC, GSE, SEFT
from dstlib.schedules import Cycles


def layer(seed=0, num_in=20, num_out=12):
    torch.manual_seed(seed)
    return nn.Linear(num_in, num_out, bias=False)


def run(model, optimizer, grads):
    """Takes a step with each of these gradients."""
    for grad in grads:
        model.weight.grad = grad.clone()
        optimizer.step()


# Guided stochastic exploration


@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0.1, 3.0))
def test_as_many_inactive_weights_have_a_say_as_are_active(seed, density, per_active):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 7, generator=generator) < density
    grad = torch.rand(9, 7, generator=generator) + 0.5  # none is the lowest of all by itself
    site = Site(
        name="fc",
        weight=mask.float(),
        mask=mask,
        grad=grad,
        momentum=None,
        step=1,
        generator=site_generator(seed, 1, "fc"),
    )
    score = AmongSome(gradient, per_active)(site)
    num_active, num_inactive = int(mask.sum()), int((~mask).sum())
    assert torch.equal(score[mask], grad[mask])
    has_say = ~mask & (score == grad)
    num = min(int(per_active * num_active + 1e-9), num_inactive)
    assert num <= int(has_say.sum()) <= num + 1, "the lowest of all scores like those without a say"
    assert (score[~mask & ~has_say] == grad.min()).all()


def test_each_inactive_weight_is_as_likely_to_have_a_say():
    mask = torch.zeros(5, 8, dtype=torch.bool)
    mask[0] = True
    counts = torch.zeros(5, 8)
    for step in range(2000):
        site = Site(
            name="fc",
            weight=mask.float(),
            mask=mask,
            grad=torch.ones(5, 8) + torch.arange(40.0).view(5, 8),
            momentum=None,
            step=step,
            generator=site_generator(0, step, "fc"),
        )
        counts += AmongSome(gradient)(site) > 1
    # 8 of 32 each time: 500 of 2000, with a standard deviation of 19; five of them for 32 weights
    assert (counts[~mask] - 500).abs().max() < 100


def test_gse_grows_the_largest_gradients_of_what_was_drawn_and_nothing_that_was_just_dropped():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=replace(GSE, interval=1), total_steps=10)
    seen = []
    sparsifier.observers.append(lambda site, update: seen.append((site.step, update)))
    before, weight = sparsifier.masks["weight"].clone(), model.weight.detach().clone()
    grad = torch.randn(12, 20)
    run(model, optimizer, [grad])
    [(step, update)] = seen
    num_active = int(before.sum())
    num_dropped = int(0.2 * (1 + np.cos(np.pi / 6)) / 2 * num_active)  # progress: 1 of 6 steps, 60 % of 10
    weakest = weight[before].abs().sort().values[:num_dropped]
    assert torch.equal(weight[update.dropped].abs().sort().values, weakest)
    site = Site(
        name="weight",
        weight=weight,
        mask=before,
        grad=grad,
        momentum=None,
        step=step,
        generator=site_generator(0, step, "weight"),
    )
    score = AmongSome(gradient)(site).masked_fill(before, -1)
    assert torch.equal(score[update.grown].sort().values, score.flatten().topk(num_dropped).values.sort().values)
    assert not (update.grown & before).any()


# Fine-tuning from zeros


def test_seft_starts_from_the_zeros_of_a_pruned_model_and_moves_them_by_sensitivity_and_gathered_gradients():
    model, x = layer(), torch.randn(50, 20)
    pruned = dstlib.sparsify(model, sparsity=0.5, method=replace(dstlib.STATIC, init=wanda(model, [x])))
    zeros = model.weight.detach() == 0
    pruned.detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier = dstlib.sparsify(
            model, optimizer, masks="from-zeros", method=replace(SEFT, interval=8), total_steps=16
        )
    assert torch.equal(sparsifier.masks["weight"], ~zeros)
    weight = model.weight.detach().clone()
    grads = [torch.randn(12, 20) for _ in range(8)]
    run(model, optimizer, grads)
    mask = sparsifier.masks["weight"]
    num = int(0.1 * 120)  # half of 0.2, half-way
    dropped_or_back = (
        (weight * grads[-1]).abs().masked_fill(zeros, torch.inf).flatten().topk(num, largest=False).indices
    )
    kept = ~zeros.flatten()
    kept[dropped_or_back] = False
    gathered = sum(grads[-5:]).abs().flatten().masked_fill(kept, -1)
    kept[gathered.topk(num).indices] = True
    assert torch.equal(mask.flatten(), kept)


# Cyclic density


def test_the_density_swings_to_three_times_its_end_twice_and_stays_there():
    model = layer(num_in=50, num_out=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.9, method=replace(CYCLIC, interval=1), total_steps=100)
    counts = [int(sparsifier.masks["weight"].sum())]
    for _ in range(100):
        run(model, optimizer, [torch.randn(40, 50)])
        counts.append(int(sparsifier.masks["weight"].sum()))
    # 200 at the end; density = 0.1 · (1 + 2 · (1 - cos(2π t / 20)) / 2)
    wave = [num_units(2000, 0.1 * (2 - np.cos(2 * np.pi * t / 20))) for t in range(41)]
    assert counts[:41] == wave
    assert max(counts) == 600
    assert set(counts[41:]) == {200}


def test_overridden_weights_swing_about_their_own_density():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    plan = dstlib.sparsify(model, sparsity=0.9, method=CYCLIC, total_steps=1000, overrides={"1": 0.8}).plan
    assert plan.starts["1.weight"] == pytest.approx(0.6, rel=1e-12)
    assert plan.starts["0.weight"] == pytest.approx(0.3, rel=1e-12)
    assert plan.num_target("1.weight", 400, 100) == 240


def test_a_start_below_the_end_is_refused():
    with pytest.raises(
        dstlib.SettingError, match=r"start_density of method cyclic: expected at least .* 0\.5, got 0\.25"
    ):
        dstlib.sparsify(layer(), sparsity=0.5, method=replace(CYCLIC, start_density=Times(0.5)), total_steps=1000)
    with pytest.raises(dstlib.SettingError, match="num and length of Cycles"):
        Cycles(num=3, length=0.5)
    with pytest.raises(dstlib.SettingError, match="per_active of AmongSome"):
        AmongSome(gradient, 0.0)


def test_their_names_are_known():
    assert [METHODS[name] for name in ("gse", "seft", "cyclic")] == [GSE, SEFT, CYCLIC]

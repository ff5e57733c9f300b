"""Transposable N:M masks: the pattern both ways, and the best of all that have it."""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

import dstlib
from dstlib import NM, ScoreError, SettingError
from dstlib.masking import Transposable, magnitude, transposable_mask


@cache
def all_squares(n: int, m: int) -> np.ndarray:
    """Every square of n in each row and column, (P, M, M)."""
    rows = [row for row in product((0, 1), repeat=m) if sum(row) == n]
    return np.array([square for square in product(rows, repeat=m) if (np.sum(square, axis=0) == n).all()])


def counts(mask: torch.Tensor, m: int) -> set[int]:
    """How many are active in each m consecutive inputs of an output, and outputs of an input, at each tap."""
    by_tap = mask.flatten(2).movedim(2, 0) if mask.ndim > 2 else mask[None]
    along = (by_tap.unflatten(2, (-1, m)).sum(dim=3), by_tap.unflatten(1, (-1, m)).sum(dim=2))
    return {int(num) for nums in along for num in nums.flatten()}


@settings(max_examples=40)
@given(st.sampled_from([(1, 2), (2, 3), (1, 4), (2, 4), (3, 4), (1, 5), (2, 5), (3, 5), (4, 4)]), seeds, st.booleans())
def test_no_other_mask_of_the_pattern_has_a_higher_sum(pattern, seed, is_tied):
    """Both ways of finding it, by patterns and by paths, on scores of few values and of many."""
    n, m = pattern
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, (2 * m, 3 * m)) / 1.0 if is_tied else rng.random((2 * m, 3 * m))
    mask = transposable_mask(torch.from_numpy(score), n, m)
    assert counts(mask, m) == {n}
    squares = score.reshape(2, m, 3, m).swapaxes(1, 2)
    best = np.einsum("oirc,prc->oip", squares, all_squares(n, m)).max(axis=2)
    found = (score * mask.numpy()).reshape(2, m, 3, m).sum(axis=(1, 3))
    assert np.abs(found - best).max() < 1e-10  # scores count to a part in 2^40, 10^-12, of which 15 are summed


@pytest.mark.parametrize(("n", "m"), [(2, 8), (4, 8), (5, 16), (7, 7)])
def test_large_squares_have_the_pattern_and_no_exchange_of_four_improves_them(n, m):
    score = torch.rand(2 * m, m, generator=torch.Generator().manual_seed(0))
    mask = transposable_mask(score, n, m)
    assert counts(mask, m) == {n}
    for part, chosen in zip(score.split(m), mask.split(m), strict=True):
        for a, b in ((a, b) for a in range(m) for b in range(m) if a != b):
            gain = part[a] - part[b]  # of moving a column from row b to row a, and another one back
            from_b, from_a = chosen[b] & ~chosen[a], chosen[a] & ~chosen[b]
            if bool(from_b.any()):
                assert float(gain[from_b].max() - gain[from_a].min()) <= 1e-6  # single precision


def test_each_tap_is_masked_for_itself():
    score = torch.rand(4, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = transposable_mask(score, 2, 4)
    for i, j in product(range(3), range(2)):
        assert torch.equal(mask[..., i, j], transposable_mask(score[..., i, j], 2, 4))


def test_half_precision_and_scores_of_nothing():
    assert counts(transposable_mask(torch.zeros(8, 4, dtype=torch.bfloat16), 2, 4), 4) == {2}
    tiny = torch.eye(4, dtype=torch.float64) * 1e-300
    assert torch.equal(transposable_mask(tiny, 1, 4), torch.eye(4) > 0)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 16))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_a_first_mask_is_taken_as_it_is(n, m):
    net = model()
    best = {name: transposable_mask(net.get_parameter(name).detach().abs(), n, m) for name in ("0.weight", "3.weight")}
    one_shot = replace(
        dstlib.STATIC, granularity=NM(n, m), init=Transposable(magnitude, n, m), distribution=dstlib.uniform
    )
    masks = dstlib.sparsify(net, sparsity=1 - n / m, method=one_shot).masks
    for name, mask in best.items():
        assert torch.equal(masks[name], mask)


def test_masks_that_are_chosen_anew_each_time_stay_transposable_and_the_best():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    best = Transposable(magnitude, 2, 4)
    method = replace(dstlib.METHODS["srste"], init=best, grow=best, interval=3)
    sparsifier = dstlib.sparsify(net, optimizer, sparsity=0.5, method=method, total_steps=12)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    hidden = []
    sparsifier.observers.append(lambda site, update: hidden.append((site.weight.detach().abs().clone(), update.mask)))
    for _ in range(12):
        optimizer.zero_grad()
        net(torch.randn(16, 8, 4, 4)).square().mean().backward()
        optimizer.step()
    assert len(hidden) >= 6
    for size, mask in hidden:
        assert torch.equal(mask, transposable_mask(size, 2, 4))
    assert any(not torch.equal(sparsifier.masks[name], mask) for name, mask in first.items())


def test_a_weight_that_does_not_divide_is_named():
    method = replace(
        dstlib.STATIC, granularity=NM(2, 4), init=Transposable(magnitude, 2, 4), distribution=dstlib.uniform
    )
    message = r"outputs and inputs of weight: expected multiples of 4, .* got 10 × 8"
    with pytest.raises(SettingError, match=message):
        dstlib.sparsify(nn.Linear(8, 10), sparsity=0.5, method=method)
    with pytest.raises(SettingError, match=r"n and m of Transposable: expected 1 ≤ n ≤ m, got \(5, 4\)"):
        Transposable(magnitude, 5, 4)


@pytest.mark.parametrize("m", [4, 6])  # by patterns, and by paths
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scores_that_no_mask_is_best_for_are_refused_by_name(value, m):
    """NaN would end in some mask, or in paths without end, and the check of scores sees 0 and 1 alone."""
    score = torch.ones(m, m)
    score[1, 1] = value
    with pytest.raises(ScoreError, match="scores of head: expected finite numbers, 0 or more"):
        transposable_mask(score, 2, m, "head")

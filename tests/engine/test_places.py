"""Rising places and the best of scores: the same by every path and on any number of threads, equal to plain Python."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstlib.engine.ops import compact_linear, places
from dstlib.engine.ops import operator as calls
from dstlib.engine.ops.compact_linear import CompactPattern

PATHS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # a path is one for all examples


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _by_path(path: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (places, compact_linear):
        monkeypatch.setattr(module, "kernels", calls.kernels)


def _rising(seed: int, num: int, share: float) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(num, generator=rng) < share).nonzero().flatten().int()


seeds, shares = st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.5, 1.0])
sizes = st.sampled_from([1, 70, 200_000])  # the last is divided between threads


@PATHS
@given(seeds, sizes, shares)
def test_two_lists_are_merged(seed: int, num: int, share: float) -> None:
    everything = _rising(seed, num, 0.7)
    is_a = torch.rand(len(everything), generator=torch.Generator().manual_seed(seed)) < share
    assert torch.equal(places.merged(everything[is_a], everything[~is_a]), everything)


@PATHS
@given(seeds, st.sampled_from([(1, 1), (7, 12), (97, 3), (700, 300)]), shares)
def test_a_transpose_is_that_of_the_mask(seed: int, size: tuple[int, int], share: float) -> None:
    at = _rising(seed, size[0] * size[1], share)
    numbers = torch.zeros(size, dtype=torch.int32)
    numbers.view(-1)[at.long()] = torch.arange(1, len(at) + 1, dtype=torch.int32)
    expected = numbers.t().flatten()
    turned, their_numbers = places.turned(at, torch.arange(1, len(at) + 1, dtype=torch.int32), size)
    assert torch.equal(turned, expected.nonzero().flatten().int())
    assert torch.equal(their_numbers, expected[expected > 0])


@PATHS
@given(seeds, sizes, shares, shares)
def test_sources_are_where_a_dictionary_finds_them(seed: int, num: int, before: float, now: float) -> None:
    old, new = _rising(seed, num, before), _rising(seed + 1, num, now)
    rng = torch.Generator().manual_seed(seed)
    old_order, new_order = (torch.randperm(len(x), generator=rng).int() for x in (old, new))
    known = dict(zip(old.tolist(), old_order.tolist(), strict=True))
    found = places.sources((old, old_order), (new, new_order))
    assert found[new_order.long()].tolist() == [known.get(place, -1) for place in new.tolist()]


@st.composite
def scores(draw: st.DrawFn) -> torch.Tensor:
    """Any float32 numbers but NaN: all different or many alike, zeros of both signs, infinite ones."""
    rng = torch.Generator().manual_seed(draw(seeds))
    num = draw(st.sampled_from([1, 5, 64, 1000, 40_000]))
    kinds = {
        "any": lambda: torch.randint(-(2**31), 2**31 - 1, (num,), generator=rng).int().view(torch.float32).nan_to_num(),
        "normal": lambda: torch.randn(num, generator=rng),
        "few": lambda: torch.randint(-1, 3, (num,), generator=rng) / 8,
        "zeros": lambda: torch.tensor([0.0, -0.0])[torch.randint(0, 2, (num,), generator=rng)],
        "ends": lambda: torch.tensor([torch.inf, -torch.inf, 0.0])[torch.randint(0, 3, (num,), generator=rng)],
        "whole tiles alike": lambda: torch.arange(num).div(64, rounding_mode="floor").float(),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


def _best(score: torch.Tensor, num: int) -> list[int]:
    at = score.tolist()
    return sorted(sorted(range(len(at)), key=lambda i: (-at[i], i))[:num])


@PATHS
@given(scores(), st.floats(0, 1))
def test_the_best_are_those_of_a_sort(score: torch.Tensor, share: float) -> None:
    num = int(share * len(score))
    assert places.choose_best(score, num).nonzero().flatten().tolist() == _best(score, num)


@PATHS
@given(scores(), st.floats(0, 1), st.sampled_from([1, 63, 1000, 100_000]), shares)
def test_the_best_of_a_stream_are_those_of_all(score: torch.Tensor, share: float, tile: int, none: float) -> None:
    """Those that are marked as none are not among them, nor the lowest."""
    tile = max(tile, len(score) // 50)
    is_none = torch.rand(len(score), generator=torch.Generator().manual_seed(tile)) < none
    num = int(share * len(score))
    best = places.Best(num)
    for first in range(0, len(score), tile):
        here = slice(first, first + tile)
        best.see(score[here].masked_fill(is_none[here], torch.nan), first)
    units, found = best.take()
    there = (~is_none & (score > -torch.inf)).nonzero().flatten()  # as none may be known yet that is better
    assert units.tolist() == there[torch.tensor(_best(score[there], num), dtype=torch.long)].tolist()
    assert torch.equal(found, score[units.long()])
    rest = score[~is_none]
    if len(rest) and rest.min() < torch.inf:
        assert (best.lowest, best.num_lowest) == (float(rest.min()), int((rest == rest.min()).sum()))


@PATHS
@given(
    seed=seeds,
    rows=st.integers(1, 4),
    groups=st.sampled_from([1, 24, 25, 130]),
    inputs=st.sampled_from([1, 159, 161, 400]),
    share=shares,
)
def test_patterns_are_those_of_torch(seed: int, rows: int, groups: int, inputs: int, share: float) -> None:
    """Their order is in files: it is a function of the mask alone."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.rand(groups, inputs, generator=rng) < share).repeat_interleave(rows, 0)
    size = groups * rows, inputs
    at = mask.flatten().nonzero().flatten()
    pattern = CompactPattern.of(at, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact_linear, "_TILE", 96 * inputs)
        for module in (places, compact_linear):
            patch.setattr(module, "kernels", lambda: None)
        expected = CompactPattern.of(at, size)
        assert all(torch.equal(a, b) for a, b in zip(pattern.rising(), expected.rising(), strict=True))
    for own, other in ((pattern.own, expected.own), (pattern.transposed, expected.transposed)):
        assert own.rows_per_group == other.rows_per_group
        assert all(torch.equal(a, b) for a, b in zip(own.tensors, other.tensors, strict=True))
    rising, order = pattern.rising()
    assert torch.equal(rising.long(), at)
    assert torch.equal(pattern.places()[order.long()], rising)

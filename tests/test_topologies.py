"""First masks of receptive fields and small worlds: exact counts, degrees, and the odds of their papers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import dstlib
from dstlib import SettingError, Site
from dstlib.masking import Criterion, Element, Granularity, ReceptiveField, SmallWorld, site_generator, update_mask

GRAPHS = [ReceptiveField(0.0), ReceptiveField(0.25), ReceptiveField(1.0), ReceptiveField(0.3, equal=False)]
GRAPHS += [SmallWorld(0.0), SmallWorld(0.25), SmallWorld(1.0)]
EACH = pytest.mark.parametrize("graph", GRAPHS, ids=str)


def chosen(graph: Criterion, num_out: int, num_in: int, num: int, seed: int) -> Tensor:
    """The links of a first mask, as sparsify() chooses them."""
    every = torch.ones(num_out, num_in)
    site = Site(
        name="fc",
        weight=every,
        mask=every > 0,
        grad=None,
        momentum=None,
        step=0,
        generator=site_generator(seed, 0, "fc"),
        num_target=num,
    )
    score = graph(site)
    assert score.shape == every.shape
    found = update_mask(every > 0, score, score, granularity=Element(), num_target=num, drop_fraction=0.0).mask
    assert int(found.sum()) == num
    return found


def distances(num_out: int, num_in: int) -> Tensor:
    """On the ring of inputs, from the place of each output."""
    return torch.tensor(
        [[min((i - o * num_in // num_out) % num_in, (o * num_in // num_out - i) % num_in) for i in range(num_in)]
         for o in range(num_out)]
    )  # fmt: skip


sizes = st.tuples(st.integers(1, 9), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(st.just(shape), st.integers(1, shape[0] * shape[1]))
)


@EACH
@given(size=sizes, seed=seeds)
def test_counts_are_exact_and_degrees_as_even_as_asked_for(
    graph: Criterion, size: tuple[tuple[int, int], int], seed: int
) -> None:
    (num_out, num_in), num = size
    mask = chosen(graph, num_out, num_in, num, seed)
    assert torch.equal(mask, chosen(graph, num_out, num_in, num, seed))
    degrees = mask.sum(dim=1)
    if (isinstance(graph, ReceptiveField) and graph.equal) or graph == SmallWorld(0.0):
        assert int(degrees.max() - degrees.min()) <= 1
    if isinstance(graph, ReceptiveField) and num >= num_out:
        assert int(degrees.min()) >= 1


@given(size=sizes, seed=seeds)
def test_without_chance_the_nearest_are_linked(size: tuple[tuple[int, int], int], seed: int) -> None:
    """r = 0 and β = 0 are one and the same lattice, but for which outputs have one link more."""
    (num_out, num_in), num = size
    far = distances(num_out, num_in)
    for graph in (ReceptiveField(0.0), SmallWorld(0.0)):
        for o, linked in enumerate(chosen(graph, num_out, num_in, num, seed)):
            assert torch.equal(far[o][linked].sort().values, far[o].sort().values[: int(linked.sum())])
            assert int((linked & ~linked.roll(1)).sum()) <= 1, "a window on the ring"


@pytest.mark.parametrize("r", [0.25, 0.5, 1.0])
def test_a_first_link_falls_by_the_odds_of_its_distance(r: float) -> None:
    """Of one link per output; five standard deviations of a share of independent draws, whose seed is fixed."""
    num_out, num_in, num_draws = 2000, 20, 5
    far = distances(num_out, num_in)
    weight = (1.0 + far).double() ** (-(1 - r) / r)
    expected = weight[0] / weight[0].sum()  # at each place the same, by distance
    drawn = torch.cat([chosen(ReceptiveField(r), num_out, num_in, num_out, seed) for seed in range(num_draws)])
    far = far.repeat(num_draws, 1)[drawn]
    for d in range(num_in // 2 + 1):
        p = float(expected[distances(1, num_in)[0] == d].sum())
        assert abs(float((far == d).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / len(far))


def test_degrees_by_chance() -> None:
    """Beyond the first link of each they are multinomial: 180 of 200 among 20 outputs, each with 1/20."""
    graph = ReceptiveField(0.3, equal=False)
    more = torch.cat([chosen(graph, 20, 60, 200, seed).sum(dim=1) - 1 for seed in range(200)]).double()
    assert float(more.mean()) == 9.0
    variance = 180 / 20 * 19 / 20
    # the variance of a sample variance of n nearly normal numbers is 2 σ⁴ / n; five standard deviations, a fixed seed
    assert abs(float(more.var()) - variance) < 5 * variance * math.sqrt(2 / len(more))


@pytest.mark.parametrize("beta", [0.1, 0.25, 0.7])
def test_as_many_links_are_moved_as_beta_says(beta: float) -> None:
    """Of k links D = β·k go, and D come to any of the n - k + D missing ones, D of which were near."""
    num_out, num_in, k, num_draws = 30, 40, 300, 60
    n, gone = num_out * num_in, beta * k
    expected = (1 - beta) * k + gone * gone / (n - k + gone)
    near = chosen(SmallWorld(0.0), num_out, num_in, k, 0)
    counts = [int((chosen(SmallWorld(beta), num_out, num_in, k, s) & near).sum()) for s in range(num_draws)]
    # D is binomial, and a part of it comes back, which adds less than as much again; the seed is fixed
    assert abs(sum(counts) / num_draws - expected) < 5 * math.sqrt(2 * k * beta * (1 - beta) / num_draws)


@pytest.mark.parametrize("graph", [ReceptiveField(1.0), SmallWorld(1.0)], ids=str)
def test_chance_alone_is_uniform_over_inputs(graph: Criterion) -> None:
    counts = torch.stack([chosen(graph, 12, 30, 72, seed).sum(dim=0) for seed in range(150)]).sum(dim=0).double()
    expected = 150 * 72 / 30
    # of 29 degrees of freedom, 0.1 % lie above 58.3; draws without replacement vary less; the seed is fixed
    assert float(((counts - expected) ** 2 / expected).sum()) < 58.3


@EACH
@pytest.mark.parametrize("granularity", [dstlib.Element(), dstlib.Kernel(), dstlib.FanIn()], ids=str)
def test_first_masks_of_a_model(graph: Criterion, granularity: Granularity) -> None:
    """Kernel taps are inputs of their own; every granularity keeps its counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(1, 4, 5, 5))
    method = replace(dstlib.METHODS["static"], init=graph, granularity=granularity, distribution=dstlib.uniform)
    sparsifier = dstlib.sparsify(model, sparsity=0.75, method=method)
    for weight in sparsifier.weights:
        for view in weight.views:
            units = granularity.fold(view.of(sparsifier.masks[weight.name]))[..., 0]
            num_target = sparsifier.plan.num_target(view.name, units.shape[1], 0)
            assert units.sum(dim=1).tolist() == [num_target] * len(units)
    sparsifier.detach()


def test_the_paper_starts_chts_so() -> None:
    assert dstlib.METHODS["chts"].init == ReceptiveField(0.25)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_shares_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(SettingError, match=r"^r of ReceptiveField: expected a number in \[0, 1\]"):
        ReceptiveField(value)
    with pytest.raises(SettingError, match=r"^beta of SmallWorld: expected a number in \[0, 1\]"):
        SmallWorld(value)

"""Link prediction: a graph worked out by hand, then every path of small graphs enumerated in plain Python."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import drawn, generator, grid, seeds, shapes
from torch import Tensor, nn

import dstlib
from dstlib import Site
from dstlib.masking import (
    Criterion,
    Element,
    Sampled,
    TiesByChance,
    link_prediction,
    link_prediction_by_paths,
    link_prediction_l3,
    links,
    magnitude,
    site_generator,
    update_mask,
)

# Outputs A to D, inputs 1 to 4.
#   A 1 2 . .
#   B . 2 3 .
#   C 1 2 3 4
#   D 1 . . .
GRAPH = grid("xx.. .xx. xxxx x...")
A, B, C, D = range(4)

ALL = pytest.mark.parametrize("criterion", [link_prediction, link_prediction_by_paths, link_prediction_l3])


def site(mask: Tensor) -> Site:
    return Site(
        name="fc",
        weight=torch.full(mask.shape, torch.nan),  # no weight has a say
        mask=mask,
        grad=None,
        momentum=None,
        step=7,
        generator=site_generator(0, 7, "fc"),
    )


def random_graph(seed: int, num_out: int, num_in: int, percent: int) -> Tensor:
    return torch.rand(num_out, num_in, generator=generator(seed)) < percent / 100


graphs = st.builds(random_graph, seeds, st.integers(1, 6), st.integers(1, 7), st.integers(0, 100))


# By hand


@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        # A - 3: paths A-1-C-3, A-2-B-3, A-2-C-3; 1 (di 1, de 1: D), 2 (2, 0), B (1, 0), C (2, 1: input 4)
        (A, 3, 1 + 3 + 2 + 3 / 2),
        # A - 2 is there
        (A, 2, 0),
        # D - 2: D-1-A-2, D-1-C-2; 1 (di 2, de 0), A (1, 0), C (1, de 2: inputs 3 and 4)
        (D, 2, 3 + 2 + 2 / 3),
    ],
)
def test_cannistraci_hebb_by_hand(u: int, v: int, expected: float) -> None:
    assert float(link_prediction(site(GRAPH))[u, v - 1]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        (A, 3, 1 / math.sqrt(3 * 4) + 1 / math.sqrt(3 * 2) + 1 / math.sqrt(3 * 4)),
        (A, 2, 0),
        (D, 2, 1 / math.sqrt(3 * 2) + 1 / math.sqrt(3 * 4)),
    ],
)
def test_paths_of_three_by_hand(u: int, v: int, expected: float) -> None:
    assert float(link_prediction_l3(site(GRAPH))[u, v - 1]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        # the external links of each are those above: 1 has 1, 2 none, B none, C 1
        (A, 3, 1 / math.sqrt(2 * 2) + 1 / math.sqrt(1 * 1) + 1 / math.sqrt(1 * 2)),
        (A, 2, 0),
        # D-1-A-2, D-1-C-2; 1 and A have none, C has 2
        (D, 2, 1 / math.sqrt(1 * 1) + 1 / math.sqrt(1 * 3)),
    ],
)
def test_paths_by_external_links_by_hand(u: int, v: int, expected: float) -> None:
    assert float(link_prediction_by_paths(site(GRAPH))[u, v - 1]) == pytest.approx(expected, rel=1e-7)


# By enumeration

Node = tuple[str, int]


def neighbours(mask: Tensor) -> dict[Node, set[Node]]:
    found: dict[Node, set[Node]] = {("out", o): set() for o in range(mask.shape[0])}
    found |= {("in", i): set() for i in range(mask.shape[1])}
    for o, i in mask.nonzero().tolist():
        found["out", o].add(("in", i))
        found["in", i].add(("out", o))
    return found


def enumerated(mask: Tensor, o: int, i: int) -> tuple[float, float, float]:
    """CH2-L3n, CH3-L3p and L3 of one pair, as they are defined; nothing of a pair that is a link."""
    u, v = ("out", o), ("in", i)
    near = neighbours(mask)
    if v in near[u]:
        return 0.0, 0.0, 0.0
    paths = [(a, b) for a in near[u] for b in near[a] if b != u and v in near[b]]
    assert all(len({u, a, b, v}) == 4 for a, b in paths)
    community = {z for path in paths for z in path}
    internal = {z: len(near[z] & community) for z in community}
    external = {z: len(near[z] - community - {u, v}) for z in community}
    return (
        sum((1 + internal[z]) / (1 + external[z]) for z in community),
        sum(1 / math.sqrt((1 + external[a]) * (1 + external[b])) for a, b in paths),
        sum(1 / math.sqrt(len(near[a]) * len(near[b])) for a, b in paths),
    )


@given(graphs)
def test_all_paths_of_small_graphs(mask: Tensor) -> None:
    scores = [criterion(site(mask)) for criterion in (link_prediction, link_prediction_by_paths, link_prediction_l3)]
    for o in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            for score, expected in zip(scores, enumerated(mask, o, i), strict=True):
                # single precision rounds once, by 6e-8; nothing is nothing
                assert float(score[o, i]) == pytest.approx(expected, rel=1e-7, abs=0)


# Laws


@ALL
@given(graphs, seeds)
def test_neither_the_order_of_nodes_nor_the_side_matters(criterion: Criterion, mask: Tensor, seed: int) -> None:
    rows, columns = (torch.randperm(n, generator=generator(seed)) for n in mask.shape)
    score = criterion(site(mask))
    torch.testing.assert_close(criterion(site(mask[rows][:, columns])), score[rows][:, columns], rtol=1.2e-7, atol=0)
    torch.testing.assert_close(criterion(site(mask.T)), score.T, rtol=1.2e-7, atol=0)


@ALL
@given(graphs, st.integers(1, 40))
def test_chunks_do_not_show(criterion: Criterion, mask: Tensor, chunk: int) -> None:
    whole = criterion(site(mask))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_CHUNK", chunk)
        torch.testing.assert_close(criterion(site(mask)), whole, rtol=1.2e-7, atol=0)


@ALL
@given(shapes, seeds)
def test_kernel_taps_are_inputs_of_their_own(criterion: Criterion, shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(shape, generator=generator(seed)) < 0.5
    score = criterion(site(mask))
    assert score.shape == mask.shape
    assert score.dtype == torch.float32
    assert torch.equal(score.flatten(1), criterion(site(mask.flatten(1))))


@ALL
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (4, 6)])
def test_an_empty_graph_has_no_paths(criterion: Criterion, shape: tuple[int, int]) -> None:
    assert not bool(criterion(site(torch.zeros(shape, dtype=torch.bool))).any())


@ALL
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (4, 6)])
def test_a_full_graph_misses_no_link(criterion: Criterion, shape: tuple[int, int]) -> None:
    assert not bool(criterion(site(torch.ones(shape, dtype=torch.bool))).any())


@pytest.mark.parametrize(("o", "n"), [(2, 2), (2, 9), (9, 2), (4, 6)])
def test_a_graph_that_misses_one_link(o: int, n: int) -> None:
    """All other nodes are its community, and none has a link out of it."""
    mask = torch.ones(o, n, dtype=torch.bool)
    mask[0, 0] = False
    expected = (n - 1) * o + (o - 1) * n, (n - 1) * (o - 1), (n - 1) * (o - 1) / math.sqrt(o * n)
    for criterion, score in zip((link_prediction, link_prediction_by_paths, link_prediction_l3), expected, strict=True):
        assert float(criterion(site(mask))[0, 0]) == pytest.approx(score, rel=1e-7)


@ALL
@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_stars_and_isolated_nodes_score_nothing_at_all(criterion: Criterion, o: int, n: int, seed: int) -> None:
    """Each input has one output at most, so no path is longer than two; what cancels leaves no crumbs."""
    home = torch.randint(-1, o, (n,), generator=generator(seed))
    assert not bool(criterion(site(torch.arange(o)[:, None] == home)).any())


@ALL
def test_what_is_equal_in_theory_ties(criterion: Criterion) -> None:
    """A ring: each shift of it is the same graph, so each diagonal has one score, to the last bit."""
    n = 101
    shift = (torch.arange(n) - torch.arange(n)[:, None]) % n
    mask = torch.isin(shift, torch.tensor([0, 1, 5, 23]))
    score = criterion(site(mask))
    assert int((score > 0).sum()) > n
    for k in range(n):
        assert len(score[shift == k].unique()) == 1


@ALL
@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_finite_in_single_precision(criterion: Criterion, percent: int) -> None:
    score = criterion(site(random_graph(0, 60, 200, percent)))
    assert bool(score.isfinite().all())
    assert bool((score >= 0).all())
    assert bool((score > 0).any())


@ALL
def test_autocast_does_not_reach_it(criterion: Criterion) -> None:
    mask = random_graph(1, 60, 90, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = criterion(site(mask))
    assert torch.equal(inside, criterion(site(mask)))


def test_growth_by_link_prediction() -> None:
    """One link grows: of the missing ones the best, B - 1, with 3 + 2 + 2 + 3/2 by way of 2, 3, A and C."""
    score = link_prediction(site(GRAPH))
    keep = torch.ones(GRAPH.shape)
    num_target = int(GRAPH.sum()) + 1
    assert float(score[B, 0]) == 8.5
    new = update_mask(GRAPH, keep, score, granularity=Element(), num_target=num_target, drop_fraction=0.0)
    assert drawn(new.grown) == ".... x... .... ...."


# In training: what is removed is gone when links are predicted


def updated(method: dstlib.Method, shape: tuple[int, int], sparsity: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's weights and mask before an update, and its mask after it."""
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    method = replace(method, interval=10, stop=1.0)
    options = {"sparsity": sparsity, "method": method, "total_steps": 20, "seed": seed}
    sparsifier = dstlib.sparsify(layer, optimizer, **options, keep_neurons=())  # no head: an output may be left bare
    weight, before = layer.weight.detach().clone(), sparsifier.masks["weight"].clone()
    for _ in range(10):
        layer(torch.ones(1, shape[1])).sum().backward()
        optimizer.step()
    after = sparsifier.masks["weight"].clone()
    sparsifier.detach()
    return weight, before, after


@pytest.mark.parametrize(
    ("name", "place"), [("link_prediction", 0), ("link_prediction_by_paths", 1), ("link_prediction_l3", 2)]
)
@given(
    shape=st.tuples(st.integers(2, 7), st.integers(2, 8)), sparsity=st.sampled_from([0.3, 0.5, 0.7, 0.85]), seed=seeds
)
def test_links_grow_by_the_definition_on_what_is_left(
    name: str, place: int, shape: tuple[int, int], sparsity: float, seed: int
) -> None:
    """The largest weights are kept; what grows are missing links of the highest scores, whichever of equal ones."""
    method = replace(dstlib.METHODS["cht"], grow=TiesByChance(getattr(links, name)))
    weight, before, after = updated(method, shape, sparsity, seed)
    num_active = int(before.sum())
    num_kept = num_active - math.floor(0.3 * num_active + 1e-9)
    kept = torch.zeros_like(before).flatten()
    kept[(weight.abs() * before).flatten().argsort(descending=True)[:num_kept]] = True
    kept = kept.view(before.shape)
    assert int(after.sum()) == num_active
    assert bool(after[kept].all())
    score = torch.tensor([[enumerated(kept, o, i)[place] for i in range(shape[1])] for o in range(shape[0])])
    best = score[~kept].sort(descending=True).values[: num_active - num_kept]
    # the definition sums in another order, and the library rounds to single precision
    torch.testing.assert_close(score[after & ~kept].sort(descending=True).values, best, rtol=1e-6, atol=0)


def test_the_presets_predict_by_what_their_papers_have() -> None:
    """CHT the paths of CH3-L3p, CHTs the nodes of CH2-L3n."""
    assert dstlib.METHODS["cht"].grow == TiesByChance(link_prediction_by_paths)
    assert dstlib.METHODS["chts"].grow == Sampled(link_prediction)


STAR = torch.zeros(6, 8, dtype=torch.bool)
STAR[:, 2] = True  # one input feeds all outputs: no path of three links, so no pair has a score


@pytest.mark.parametrize("grow", [TiesByChance(link_prediction), Sampled(link_prediction)], ids=["cht", "chts"])
def test_links_without_a_score_grow_anywhere(grow: Criterion) -> None:
    """Of 42 missing links 6 grow in each of 420 draws, 60 each; the first outputs get no more than the others."""
    num_draws, num_grown = 420, 6
    counts = torch.zeros(STAR.shape)
    for step in range(num_draws):
        there = replace(site(STAR), generator=site_generator(0, step, "fc"))
        update = update_mask(
            STAR, torch.ones(STAR.shape), grow(there), granularity=Element(), num_target=12, drop_fraction=0.0
        )
        counts += update.grown
    counts = counts[~STAR]
    expected = num_draws * num_grown / len(counts)
    # of 41 degrees of freedom, 0.1 % lie above 74.7; draws without replacement vary less; the seed is fixed
    assert float(((counts - expected) ** 2 / expected).sum()) < 74.7


@given(seeds, st.sampled_from([1e-45, 1e-30, 1.0, 2.0 - 2**-23, 3e38]))
def test_chance_only_breaks_ties(seed: int, scale: float) -> None:
    """Neighbours in single precision keep their order, as do zeros and the smallest number, and signs."""
    near = torch.tensor([scale, 0.0]).nextafter(torch.tensor(torch.inf))
    score = torch.cat((near, torch.tensor([scale, 0.0]), -near))
    weight = score.repeat(50, 1)
    there = replace(site(torch.ones(50, len(score)) > 0), weight=weight, generator=site_generator(seed, 7, "fc"))
    keys = TiesByChance(lambda at: at.weight)(there)
    order = weight.flatten().unique()
    for low, high in pairwise(order):
        assert float(keys[weight == low].max()) < float(keys[weight == high].min())
    assert len(keys[weight == 0].unique()) == int((weight == 0).sum())
    assert TiesByChance(magnitude) == TiesByChance(magnitude)

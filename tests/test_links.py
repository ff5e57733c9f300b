"""Link prediction: a graph worked out by hand, then every path of small graphs enumerated in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import drawn, generator, grid, seeds, shapes
from torch import Tensor

from dstlib import Site
from dstlib.masking import (
    Criterion,
    Element,
    criteria,
    link_prediction,
    link_prediction_l3,
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

BOTH = pytest.mark.parametrize("criterion", [link_prediction, link_prediction_l3])


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
        # A - 2, which is a link, without it: A-1-C-2; 1 (di 1, de 1: D), C (1, de 2: inputs 3 and 4)
        (A, 2, 1 + 2 / 3),
        # D - 2: D-1-A-2, D-1-C-2; 1 (di 2, de 0), A (1, 0), C (1, de 2: inputs 3 and 4)
        (D, 2, 3 + 2 + 2 / 3),
        # D - 1, the only link of D: nothing is left
        (D, 1, 0),
    ],
)
def test_cannistraci_hebb_by_hand(u: int, v: int, expected: float) -> None:
    assert float(link_prediction(site(GRAPH))[u, v - 1]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        (A, 3, 1 / math.sqrt(3 * 4) + 1 / math.sqrt(3 * 2) + 1 / math.sqrt(3 * 4)),
        (A, 2, 1 / math.sqrt(3 * 4)),
        (D, 2, 1 / math.sqrt(3 * 2) + 1 / math.sqrt(3 * 4)),
        (D, 1, 0),
    ],
)
def test_paths_of_three_by_hand(u: int, v: int, expected: float) -> None:
    assert float(link_prediction_l3(site(GRAPH))[u, v - 1]) == pytest.approx(expected, rel=1e-7)


# By enumeration

Node = tuple[str, int]


def neighbours(mask: Tensor) -> dict[Node, set[Node]]:
    found: dict[Node, set[Node]] = {("out", o): set() for o in range(mask.shape[0])}
    found |= {("in", i): set() for i in range(mask.shape[1])}
    for o, i in mask.nonzero().tolist():
        found["out", o].add(("in", i))
        found["in", i].add(("out", o))
    return found


def enumerated(mask: Tensor, o: int, i: int) -> tuple[float, float]:
    """Both scores of one pair, as they are defined, of the graph without the link between the two."""
    u, v = ("out", o), ("in", i)
    near = neighbours(mask)
    near[u].discard(v)
    near[v].discard(u)
    paths = [(a, b) for a in near[u] for b in near[a] if b != u and v in near[b]]
    assert all(len({u, a, b, v}) == 4 for a, b in paths)
    community = {z for path in paths for z in path}
    cannistraci_hebb = 0.0
    for z in community:
        num_internal = len(near[z] & community)
        num_external = len(near[z] - community - {u, v})
        cannistraci_hebb += (1 + num_internal) / (1 + num_external)
    return cannistraci_hebb, sum(1 / math.sqrt(len(near[a]) * len(near[b])) for a, b in paths)


@given(graphs)
def test_all_paths_of_small_graphs(mask: Tensor) -> None:
    scores = link_prediction(site(mask)), link_prediction_l3(site(mask))
    for o in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            for score, expected in zip(scores, enumerated(mask, o, i), strict=True):
                # single precision rounds once, by 6e-8; nothing is nothing
                assert float(score[o, i]) == pytest.approx(expected, rel=1e-7, abs=0)


# Laws


@BOTH
@given(graphs, st.data())
def test_a_link_is_scored_as_if_it_were_missing(criterion: Criterion, mask: Tensor, data: st.DataObject) -> None:
    """So what an update drops competes on equal terms to grow back."""
    o, i = data.draw(st.integers(0, mask.shape[0] - 1)), data.draw(st.integers(0, mask.shape[1] - 1))
    other = mask.clone()
    other[o, i] = ~mask[o, i]
    torch.testing.assert_close(criterion(site(mask))[o, i], criterion(site(other))[o, i], rtol=1.2e-7, atol=0)


@BOTH
@given(graphs, seeds)
def test_neither_the_order_of_nodes_nor_the_side_matters(criterion: Criterion, mask: Tensor, seed: int) -> None:
    rows, columns = (torch.randperm(n, generator=generator(seed)) for n in mask.shape)
    score = criterion(site(mask))
    torch.testing.assert_close(criterion(site(mask[rows][:, columns])), score[rows][:, columns], rtol=1.2e-7, atol=0)
    torch.testing.assert_close(criterion(site(mask.T)), score.T, rtol=1.2e-7, atol=0)


@BOTH
@given(graphs, st.integers(1, 40))
def test_chunks_do_not_show(criterion: Criterion, mask: Tensor, chunk: int) -> None:
    whole = criterion(site(mask))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(criteria, "_CHUNK", chunk)
        torch.testing.assert_close(criterion(site(mask)), whole, rtol=1.2e-7, atol=0)


@BOTH
@given(shapes, seeds)
def test_kernel_taps_are_inputs_of_their_own(criterion: Criterion, shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(shape, generator=generator(seed)) < 0.5
    score = criterion(site(mask))
    assert score.shape == mask.shape
    assert score.dtype == torch.float32
    assert torch.equal(score.flatten(1), criterion(site(mask.flatten(1))))


@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (4, 6)])
def test_an_empty_graph_has_no_paths(criterion: Criterion, shape: tuple[int, int]) -> None:
    assert not bool(criterion(site(torch.zeros(shape, dtype=torch.bool))).any())


@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (1, 9), (9, 1), (2, 2), (4, 6)])
def test_a_full_graph(num_out: int, num_in: int) -> None:
    """Without the link u - v all other nodes are its community, and none has a link out of it."""
    o, n = num_out, num_in
    full = site(torch.ones(o, n, dtype=torch.bool))
    expected = (n - 1) * o + (o - 1) * n if min(o, n) > 1 else 0
    assert link_prediction(full).tolist() == [[expected] * n] * o
    l3 = torch.full((o, n), (o - 1) * (n - 1) / math.sqrt(o * n))
    torch.testing.assert_close(link_prediction_l3(full), l3, rtol=1.2e-7, atol=0)


@BOTH
@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_stars_and_isolated_nodes_score_nothing_at_all(criterion: Criterion, o: int, n: int, seed: int) -> None:
    """Each input has one output at most, so no path is longer than two; what cancels leaves no crumbs."""
    home = torch.randint(-1, o, (n,), generator=generator(seed))
    assert not bool(criterion(site(torch.arange(o)[:, None] == home)).any())


@BOTH
def test_what_is_equal_in_theory_ties(criterion: Criterion) -> None:
    """A ring: each shift of it is the same graph, so each diagonal has one score, to the last bit."""
    n = 101
    shift = (torch.arange(n) - torch.arange(n)[:, None]) % n
    mask = torch.isin(shift, torch.tensor([0, 1, 5, 23]))
    score = criterion(site(mask))
    assert int((score > 0).sum()) > n
    for k in range(n):
        assert len(score[shift == k].unique()) == 1


@BOTH
@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_finite_in_single_precision(criterion: Criterion, percent: int) -> None:
    score = criterion(site(random_graph(0, 200, 700, percent)))
    assert bool(score.isfinite().all())
    assert bool((score >= 0).all())
    assert bool((score > 0).any())


@BOTH
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

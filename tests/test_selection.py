"""Top-k per group: exact counts, ties to the lower index, equal to a sort in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import drawn, generator, grid, seeds
from torch import Tensor

from dstlib.masking import select_top


def reference(score_GU: Tensor, num_G: Tensor, among_GU: Tensor) -> Tensor:
    """Best score first, then lowest index; the first ``num`` of each group."""
    chosen = torch.zeros_like(among_GU)
    for g, (scores, num, among) in enumerate(zip(score_GU.tolist(), num_G.tolist(), among_GU.tolist(), strict=True)):
        candidates = sorted((u for u in range(len(scores)) if among[u]), key=lambda u: (-scores[u], u))
        chosen[g, candidates[:num]] = True
    return chosen


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (G, U) with anything from all tied to none, candidates, and a quota per group that they can fill."""
    num_groups, num_units = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    rng = generator(draw(seeds))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    num_values = draw(st.sampled_from([1, 2, 3, 1000]))
    score_GU = torch.randint(-num_values // 2, num_values, (num_groups, num_units), generator=rng).to(dtype)
    among_GU = torch.rand(num_groups, num_units, generator=rng) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    num_among_G = among_GU.sum(dim=1)
    share_G = torch.rand(num_groups, generator=rng)
    quota_G = {"none": 0 * num_among_G, "all": num_among_G, "some": (share_G * (num_among_G + 1)).long()}
    return score_GU, quota_G[draw(st.sampled_from(["some", "none", "all"]))].clamp(max=num_among_G), among_GU


@pytest.mark.parametrize(
    ("scores", "num", "among", "chosen"),
    [
        ([[1, 4, 2, 3]], [2], "xxxx", ".x.x"),
        ([[5, 5, 5, 5]], [3], "xxxx", "xxx."),  # all tied: the lower indices
        ([[0, 0, 0, 0]], [1], "xxxx", "x..."),
        ([[1, 5, 5, 5]], [2], "xxxx", ".xx."),
        ([[5, 1, 5, 5]], [2], ".xxx", "..xx"),  # the best one is no candidate
        ([[9, 9, 1, 1]], [2], "..xx", "..xx"),
        ([[1, 2, 3, 4]], [0], "xxxx", "...."),
        ([[1, 2, 3, 4]], [4], "xxxx", "xxxx"),
        ([[1, 2, 3, 4]], [0], "....", "...."),
        ([[-1, -2, -3, -4]], [2], "xxxx", "xx.."),
        ([[1, 2, 3], [3, 3, 3], [2, 9, 2]], [1, 2, 3], "xxx xxx xxx", "..x xx. xxx"),  # a quota for each group
        ([[1, 2, 3], [3, 2, 1], [7, 7, 7]], [0, 2, 1], "xxx .xx .xx", "... .xx .x."),
    ],
)
def test_small_tables(scores: list[list[float]], num: list[int], among: str, chosen: str) -> None:
    selected = select_top(torch.tensor(scores).float(), torch.tensor(num), among_GU=grid(among))
    assert drawn(selected) == chosen


@given(problems())
def test_equals_a_sort(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    score_GU, num_G, among_GU = problem
    selected = select_top(score_GU, num_G, among_GU=among_GU)
    assert torch.equal(selected.sum(dim=1), num_G)
    assert not bool((selected & ~among_GU).any())
    assert torch.equal(selected, reference(score_GU, num_G, among_GU))


@given(problems())
def test_one_group_and_many_take_the_same_decisions(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """A single group is selected by another algorithm."""
    score_GU, num_G, among_GU = problem
    one_by_one = [
        select_top(score_GU[g, None], num_G[g, None], among_GU=among_GU[g, None]) for g in range(len(score_GU))
    ]
    assert torch.equal(torch.cat(one_by_one), select_top(score_GU, num_G, among_GU=among_GU))


@st.composite
def long_problems(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """So many units that each 64th is looked at first, which may be unlike the others."""
    rng = generator(draw(seeds))
    num_units = draw(st.sampled_from([10_000, 20_011]))
    number = torch.arange(num_units)
    kinds = {
        "any": lambda: torch.randn(num_units, generator=rng),
        "few": lambda: torch.randint(0, 4, (num_units,), generator=rng).float(),
        "alike": lambda: torch.zeros(num_units),
        "rising": lambda: number.float(),
        "each 64th is high": lambda: torch.rand(num_units, generator=rng) + 2.0 * (number % 64 == 0),
        "each 64th is low": lambda: torch.rand(num_units, generator=rng) - 2.0 * (number % 64 == 0),
        "infinite": lambda: torch.tensor([torch.inf, -torch.inf, 0.0])[number * 7 % 3],
    }
    score_U = kinds[draw(st.sampled_from(sorted(kinds)))]().to(draw(st.sampled_from([torch.float32, torch.float64])))
    among_U = torch.rand(num_units, generator=rng) < draw(st.sampled_from([0.01, 0.3, 1.0]))
    share = draw(st.sampled_from([0.0, 0.001, 0.03, 0.5, 0.97, 0.999, 1.0]))
    return score_U, int(share * int(among_U.sum())), among_U


@given(long_problems())
def test_of_many_units_the_choice_is_that_of_a_sort(problem: tuple[Tensor, int, Tensor]) -> None:
    """Beside a second group, which is selected by sorting, and gets the same."""
    score_U, num, among_U = problem
    alone = select_top(score_U[None], torch.tensor([num]), among_GU=among_U[None])
    both = select_top(score_U.repeat(2, 1), torch.tensor([num, num]), among_GU=among_U.repeat(2, 1))
    assert int(alone.sum()) == num
    assert torch.equal(alone[0], both[0])


@given(problems(), seeds)
def test_renumbering_the_units_renumbers_the_choice(problem: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    """Without ties, that is."""
    tied_GU, num_G, among_GU = problem
    score_GU = torch.rand(tied_GU.shape, generator=generator(seed)).argsort(dim=1).float()
    order = torch.randperm(score_GU.shape[1], generator=generator(seed + 1))
    selected = select_top(score_GU, num_G, among_GU=among_GU)
    assert torch.equal(select_top(score_GU[:, order], num_G, among_GU=among_GU[:, order]), selected[:, order])


@pytest.mark.parametrize("num_groups", [1, 2])
def test_double_precision_is_not_thrown_away(num_groups: int) -> None:
    score_GU = (1 + torch.tensor([0.0, 2e-12, 1e-12], dtype=torch.float64)).expand(num_groups, -1)
    selected = select_top(score_GU, torch.ones(num_groups).long(), among_GU=torch.ones_like(score_GU).bool())
    assert selected.tolist() == [[False, True, False]] * num_groups


@pytest.mark.parametrize("num_groups", [1, 2])
def test_infinite_scores_are_numbers_too(num_groups: int) -> None:
    score_GU = torch.tensor([[torch.inf, -torch.inf, 0.0, torch.inf, -torch.inf]]).expand(num_groups, -1)
    for num, chosen in enumerate(["x....", "x..x.", "x.xx.", "xxxx.", "xxxxx"], start=1):
        selected = select_top(score_GU, torch.full((num_groups,), num), among_GU=torch.ones_like(score_GU).bool())
        assert drawn(selected) == " ".join([chosen] * num_groups)


def test_positive_and_negative_zero_tie() -> None:
    selected = select_top(torch.tensor([[-0.0, 0.0, -0.0]]), torch.tensor([1]), among_GU=grid("xxx"))
    assert drawn(selected) == "x.."


@pytest.mark.parametrize(("among", "num"), [("x..", [2]), ("xxx", [4]), ("... xxx", [1, 1])])
def test_more_than_there_are_is_our_own_bug(among: str, num: list[int]) -> None:
    with pytest.raises(AssertionError, match="more units asked for"):
        select_top(torch.zeros(grid(among).shape), torch.tensor(num), among_GU=grid(among))


def test_a_million_tied_units() -> None:
    """Trap: a threshold would select all of them or none."""
    num = 123_457
    selected = select_top(torch.zeros(1, 10**6), torch.tensor([num]), among_GU=torch.ones(1, 10**6).bool())
    assert int(selected.sum()) == num
    assert bool(selected[0, :num].all())

"""Selection: exact, deterministic top-k per group, the one place where scores become masks.

Shapes: G groups, U units.
"""

from math import ceil, floor, sqrt

import torch
from torch import Tensor

_STRIDE = 64
_FEW = 0.125  # of the candidates


def select_top(score_GU: Tensor, num_G: Tensor, *, among_GU: Tensor) -> Tensor:
    """Marks, in each group g, the ``num_G[g]`` highest-scoring units of ``among_GU``; exactly that many.

    Ties go to the lower index. Quotas may differ between groups; none may exceed the group's candidates.
    A threshold alone would select too many or too few under ties, so the units that tie with it are counted
    out one by one (tests/test_selection.py).

    >>> score = torch.tensor([[3.0, 1.0, 3.0, 3.0]])
    >>> select_top(score, torch.tensor([2]), among_GU=torch.tensor([[True, True, True, True]]))
    tensor([[ True, False,  True, False]])
    """
    if len(score_GU) == 1:
        return _select_of_one(score_GU[0], int(num_G), among_GU[0])[None]
    assert bool((num_G <= count(among_GU)).all()), "more units asked for than there are candidates"
    threshold_G1 = _threshold(score_GU, num_G, among_GU)[:, None]
    above_GU = among_GU & (score_GU > threshold_G1)
    tied_GU = among_GU & (score_GU == threshold_G1)
    num_missing_G = num_G - count(above_GU)
    if bool((count(tied_GU) == num_missing_G).all()):
        return above_GU | tied_GU
    return above_GU | (tied_GU & (tied_GU.cumsum(dim=1) <= num_missing_G[:, None]))


def count(units_GU: Tensor) -> Tensor:
    """Counts the marked units of each group, (G, U) → (G,).

    In 32 bits where they suffice, which takes a tenth of the time, and without any for a single group.

    >>> count(torch.tensor([[True, False, True], [False, False, False]]))
    tensor([2, 0])
    """
    if len(units_GU) == 1:
        return units_GU.count_nonzero()[None]
    dtype = torch.int32 if units_GU.shape[1] < 2**31 else torch.int64
    return units_GU.sum(dim=1, dtype=dtype).long()


def _threshold(score_GU: Tensor, num_G: Tensor, among_GU: Tensor) -> Tensor:
    """Returns the score of the last unit to select in each group."""
    best_first_GU = score_GU.masked_fill(~among_GU, -torch.inf).sort(dim=1, descending=True).values
    # where nothing is to be selected this is the best score: none lies above it, and no tie is counted in
    last_G1 = (num_G - 1).clamp(min=0)[:, None]
    return best_first_GU.gather(1, last_G1)[:, 0]


def _select_of_one(score_U: Tensor, num: int, among_U: Tensor) -> Tensor:
    """Marks the ``num`` highest-scoring units of a single group, (U,).

    Of millions few are looked at more than once: those between two bounds. What is found of these is exact, as long as
    the last of the best is one of them.
    """
    chosen_U, unsure_U, num_left = torch.zeros_like(among_U), among_U, num
    if num == 0:
        return chosen_U
    low, high = _bounds(score_U, num, among_U)
    if high is not None:
        chosen_U = among_U & (score_U > high)
        unsure_U, num_left = among_U & ~chosen_U, num - int(chosen_U.count_nonzero())
    if low is not None:
        unsure_U = unsure_U & (score_U >= low)
    index = unsure_U.nonzero()[:, 0]
    if not 0 <= num_left <= len(index):  # what was looked at is unlike the rest
        chosen_U, index, num_left = torch.zeros_like(among_U), among_U.nonzero()[:, 0], num
        assert num <= len(index), "more units asked for than there are candidates"
    if num_left:
        score = score_U[index]
        threshold = score.kthvalue(len(score) - num_left + 1).values
        above, tied = score > threshold, score == threshold
        first = tied.cumsum(dim=0) <= num_left - above.count_nonzero()
        chosen_U[index[above | (tied & first)]] = True
    return chosen_U


def _bounds(score_U: Tensor, num: int, among_U: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Returns two scores between which that of the last of the ``num`` best lies, by what each 64th unit shows.

    None where that bound would be beyond all scores, or would leave out so few that to look for them takes longer than
    to take them.
    """
    sample = score_U[::_STRIDE][among_U[::_STRIDE]]
    share = min(num / (_STRIDE * len(sample)), 1.0) if len(sample) else 1.0
    margin = 64 + 4 * sqrt(share * (1 - share) * len(sample))  # far beyond what chance leaves out
    last = (1 - share) * len(sample)  # where it would be if the sample were all, in rising order
    places = floor(last - margin), ceil(last + margin)
    is_worth = share < 1 - _FEW, share > _FEW
    low, high = (
        sample.kthvalue(i + 1).values if worth and 0 <= i < len(sample) else None
        for i, worth in zip(places, is_worth, strict=True)
    )
    return low, high

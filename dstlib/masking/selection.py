"""Selection: exact, deterministic top-k per group, the one place where scores become masks.

Shapes: G groups, U units.
"""

import torch
from torch import Tensor

_STRIDE = 64


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

    Of millions few are looked at more than once: those that score no less than a bound. What is found of these is
    exact, as long as they are enough.
    """
    chosen_U = torch.zeros_like(among_U)
    if num == 0:
        return chosen_U
    bound = _bound(score_U, num, among_U)
    index = (among_U if bound is None else among_U & (score_U >= bound)).nonzero()[:, 0]
    if len(index) < num:
        index = among_U.nonzero()[:, 0]
        assert num <= len(index), "more units asked for than there are candidates"
    score = score_U[index]
    threshold = score.kthvalue(len(score) - num + 1).values
    above, tied = score > threshold, score == threshold
    first = tied.cumsum(dim=0) <= num - above.count_nonzero()
    chosen_U[index[above | (tied & first)]] = True
    return chosen_U


def _bound(score_U: Tensor, num: int, among_U: Tensor) -> Tensor | None:
    """Returns a score that a little more than the ``num`` highest candidates have, by what each 64th unit shows.

    None where most candidates have it: to look for them would take longer than to take all.
    """
    sample = score_U[::_STRIDE][among_U[::_STRIDE]]
    num_above = int(1.05 * num / _STRIDE) + 64  # far beyond what chance leaves out
    if 2 * num_above > len(sample):
        return None
    return sample.kthvalue(len(sample) - num_above + 1).values

"""Selection: exact, deterministic top-k per group, the one place where scores become masks.

Shapes: G groups, U units.
"""

import torch
from torch import Tensor


def select_top(score_GU: Tensor, num_G: Tensor, *, among_GU: Tensor) -> Tensor:
    """Marks, in each group g, the ``num_G[g]`` highest-scoring units of ``among_GU``; exactly that many.

    Ties go to the lower index. Quotas may differ between groups; none may exceed the group's candidates.
    A threshold alone would select too many or too few under ties, so the units that tie with it are counted
    out one by one (tests/test_selection.py).

    >>> score = torch.tensor([[3.0, 1.0, 3.0, 3.0]])
    >>> select_top(score, torch.tensor([2]), among_GU=torch.tensor([[True, True, True, True]]))
    tensor([[ True, False,  True, False]])
    """
    assert bool((num_G <= among_GU.sum(dim=1)).all()), "more units asked for than there are candidates"
    threshold_G1 = _threshold(score_GU, num_G, among_GU)[:, None]
    above_GU = among_GU & (score_GU > threshold_G1)
    tied_GU = among_GU & (score_GU == threshold_G1)
    num_missing_G1 = (num_G - above_GU.sum(dim=1))[:, None]
    return above_GU | (tied_GU & (tied_GU.cumsum(dim=1) <= num_missing_G1))


def _threshold(score_GU: Tensor, num_G: Tensor, among_GU: Tensor) -> Tensor:
    """Returns the score of the last unit to select in each group."""
    if len(score_GU) == 1 and among_GU.any():
        candidates = score_GU[among_GU]  # a linear-time selection; sorting millions takes seconds
        return candidates.kthvalue(len(candidates) - max(int(num_G), 1) + 1).values[None]
    best_first_GU = score_GU.masked_fill(~among_GU, -torch.inf).sort(dim=1, descending=True).values
    # where nothing is to be selected this is the best score: none lies above it, and no tie is counted in
    last_G1 = (num_G - 1).clamp(min=0)[:, None]
    return best_first_GU.gather(1, last_G1)[:, 0]

"""Transposable N:M masks: ``n`` of every ``m`` consecutive inputs of an output, and of outputs of an input.

So a matrix and its transpose both have the pattern, and the backward pass meets it too. No fold says this, as each
weight is in two groups at once; within a square of m × m it is a matching, and the best one is found exactly.

Shapes: O outputs, I inputs, *K kernel taps; B squares of M × M entries, M rows and M columns.
"""

from dataclasses import dataclass
from itertools import combinations, product

import torch
from einops import rearrange
from torch import Tensor

from dstlib.errors import ScoreError, SettingError, require
from dstlib.masking.site import Criterion, Site

_LEVELS = 2**40  # scores are whole numbers up to this: sums along a path are exact, and equal on every device
_FAR = 2**60
_SQUARES = 2**20  # entries that are solved together


@dataclass(frozen=True)
class Transposable:
    """Scores 1 what the best transposable N:M mask by a criterion holds, and 0 all else.

    Best is the highest sum of scores, which are not negative. Under granularity ``NM(n, m)`` of the same numbers the
    mask is chosen as it is, as a first mask (``init``), or at each update where nothing is kept for its own sake
    (``grow``, with ``drop_fraction=Constant(1.0)``, as ``srste`` has it).

    Raises:
        SettingError: Not 1 ≤ n ≤ m; or outputs or inputs of a weight are no multiple of m.
        ScoreError: The criterion's scores are negative, or not finite.

    Reference: Hubara et al. 2021, Accelerated sparse neural training: a provable and efficient method to find N:M
    transposable masks, NeurIPS. Deviates: the exact solution at each update, where their program takes a greedy one
    each 40 steps.

    >>> from dstlib.masking import magnitude, site_generator
    >>> w = torch.tensor([[9.0, 8.0, 1.0], [7.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    >>> Transposable(magnitude, 1, 3)(Site(name="fc", weight=w, mask=w != 0, grad=None, momentum=None, step=0,
    ...                                    generator=site_generator(0, 0, "fc")))
    tensor([[0., 1., 0.],
            [1., 0., 0.],
            [0., 0., 1.]])
    """

    criterion: Criterion
    n: int
    m: int

    def __post_init__(self) -> None:
        where, given = "Transposable", (self.n, self.m)
        require(1 <= self.n <= self.m, "n and m", where, allowed="1 ≤ n ≤ m", given=given, remedy="Pass 2 and 4, say.")

    def __call__(self, site: Site) -> Tensor:
        return transposable_mask(self.criterion(site), self.n, self.m, site.name).to(torch.float32)


def transposable_mask(score: Tensor, n: int, m: int, name: str = "scores") -> Tensor:
    """Marks ``n`` entries in each row and column of each square of m × m outputs and inputs: the highest in sum.

    Scores (O, I, *K), 0 or more, have squares of their own at each tap. Sums are compared to a part in 2^40 of the
    highest score of a square.

    Raises:
        SettingError: Outputs or inputs are no multiple of m.
        ScoreError: Scores are negative, or not finite.

    Reference: minimum-cost flow by successive shortest paths, here of all squares at once; as a flow, Hubara et al.
    2021.

    >>> transposable_mask(torch.tensor([[9.0, 8.0], [7.0, 1.0]]), 1, 2)
    tensor([[False,  True],
            [ True, False]])
    """
    num_out, num_in = score.shape[:2]
    if num_out % m or num_in % m:
        given, allowed = f"{num_out} × {num_in}", f"multiples of {m}, as squares of {m} × {m} are masked"
        remedy = "Leave this weight out by exclude=."
        raise SettingError.of("outputs and inputs", name, allowed=allowed, given=given, remedy=remedy)
    if not bool(((score >= 0) & score.isfinite()).all()):  # among which no path is the shortest
        given, remedy = "others", "Look at the criterion, and at whether the loss has diverged."
        raise ScoreError.of("scores", name, allowed="finite numbers, 0 or more", given=given, remedy=remedy)
    squares = rearrange(score.reshape(num_out, num_in, -1), "(o p) (i q) k -> (o i k) p q", p=m, q=m)
    chosen = torch.cat([_best(part, n) for part in squares.split(max(_SQUARES // m**2, 1))])
    chosen = rearrange(chosen, "(o i k) p q -> (o p) (i q) k", o=num_out // m, i=num_in // m)
    return chosen.reshape(score.shape)


def _best(score_BMM: Tensor, n: int) -> Tensor:
    """Marks the best n of each row and column of squares."""
    worth_BMM = score_BMM.double()
    worth_BMM = worth_BMM / worth_BMM.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    worth_BMM = (worth_BMM * _LEVELS).round()
    m = score_BMM.shape[1]
    if m <= 4:  # 90 patterns at most, and sums of whole numbers are exact: a hundredth of the time
        patterns_PMM = _patterns(n, m).to(score_BMM.device)
        return patterns_PMM[(worth_BMM.flatten(1) @ patterns_PMM.flatten(1).double().T).argmax(dim=1)]
    chosen_BMM = torch.zeros_like(score_BMM, dtype=torch.bool)
    for _ in range(n * m):
        _add_one_(chosen_BMM, -worth_BMM.long(), n)
    return chosen_BMM


def _patterns(n: int, m: int) -> Tensor:
    """Returns all squares of n in each row and column, (P, M, M)."""
    rows = [[column in chosen for column in range(m)] for chosen in combinations(range(m), n)]
    squares_PMM = torch.tensor(list(product(rows, repeat=m)), device="cpu")
    return squares_PMM[(squares_PMM.sum(dim=1) == n).all(dim=1)]


def _add_one_(chosen_BMM: Tensor, cost_BMM: Tensor, n: int) -> None:
    """Adds one entry to each square along the cheapest path from a row to a column with room, which keeps it the best.

    A path takes an entry that is not chosen from a row to a column, and gives up one that is, from there to a row;
    Bellman & Ford find it.
    """
    num, m, _ = cost_BMM.shape
    here = torch.arange(num, device=cost_BMM.device)
    take_BMM, give_BMM = cost_BMM.masked_fill(chosen_BMM, _FAR), (-cost_BMM).masked_fill(~chosen_BMM, _FAR)
    of_row_BM = torch.where(chosen_BMM.sum(dim=2) < n, 0, _FAR)
    of_column_BM = torch.full_like(of_row_BM, _FAR)
    row_before_BM, column_before_BM = (torch.full_like(of_row_BM, -1) for _ in range(2))
    while True:  # only what is cheaper replaces a way: costs along a cycle may be zero, though never less
        there_BM, row_BM = (of_row_BM[:, :, None] + take_BMM).min(dim=1)
        is_cheaper_BM = there_BM < of_column_BM
        of_column_BM = torch.where(is_cheaper_BM, there_BM, of_column_BM)
        row_before_BM = torch.where(is_cheaper_BM, row_BM, row_before_BM)
        back_BM, column_BM = (of_column_BM[:, None] + give_BMM).min(dim=2)
        is_cheaper_BM = (back_BM < of_row_BM) & (back_BM < _FAR // 2)  # else there is no way, at whatever cost
        if not bool(is_cheaper_BM.any()):
            break
        of_row_BM = torch.where(is_cheaper_BM, back_BM, of_row_BM)
        column_before_BM = torch.where(is_cheaper_BM, column_BM, column_before_BM)
    has_room_BM = chosen_BMM.sum(dim=1) < n
    column_B = of_column_BM.masked_fill(~has_room_BM, 2 * _FAR).argmin(dim=1)
    for _ in range(m):
        row_B = row_before_BM[here, column_B]
        chosen_BMM[here, row_B, column_B] = True
        column_B = column_before_BM[here, row_B]
        goes_on = column_B >= 0
        if not bool(goes_on.any()):
            break
        here, row_B, column_B = here[goes_on], row_B[goes_on], column_B[goes_on]
        chosen_BMM[here, row_B, column_B] = False

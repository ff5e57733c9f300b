"""Methods compared: the PT score of accuracy against cost, and the critical distance of their average ranks.

Shapes: N cases, M methods.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import DataError, require


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a comparison.

    ``dice`` is mDice in per cent, ``params`` counts in millions, ``flops`` in units of 10⁹; None is unknown, or none:
    the mDice of cases without any class.
    ``scores`` holds further columns (in per cent too), ``source`` says where the numbers stand.
    """

    name: str
    dice: float | None
    params: float | None = None
    flops: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    source: str = ""


def pt_scores(rows: Sequence[Row], *, alpha: float = 0.5) -> tuple[float | None, ...]:
    """Computes mDice / mDice_max + alpha · (Params_min / Params + FLOPs_min / FLOPs), over the extremes of these rows.

    The extremes may come from different rows. A row without mDice or with a cost unknown has no score, and sets no
    extreme. Where the highest mDice is 0 there is no score at all.

    Raises:
        SettingError: ``alpha`` is no weight.
        DataError: A cost is not positive, or mDice negative.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), the performance trade-off score; there alpha = ½.

    >>> best, cheap = Row(name="a", dice=80, params=20, flops=100), Row(name="b", dice=60, params=10, flops=50)
    >>> pt_scores([best, cheap])
    (1.5, 1.75)
    """
    is_weight = math.isfinite(alpha) and alpha >= 0
    require(
        is_weight,
        "alpha",
        "the PT score",
        allowed="a number from 0 up",
        given=alpha,
        remedy="The paper's is 0.5 (--alpha 0.5).",
    )
    for row in rows:
        costs = [cost for cost in (row.params, row.flops) if cost is not None]
        is_score = row.dice is None or (math.isfinite(row.dice) and row.dice >= 0)
        if not (is_score and all(math.isfinite(cost) and cost > 0 for cost in costs)):
            given = f"mDice {row.dice}, params {row.params}, FLOPs {row.flops}"
            remedy = "Leave the row out, or pass None for a number that is unknown."
            allowed = "mDice from 0 up, positive costs"
            raise DataError.of("row", repr(row.name), allowed=allowed, given=given, remedy=remedy)
    numbers = [(row.dice, row.params, row.flops) for row in rows]
    known = [(dice, a, b) for dice, a, b in numbers if dice is not None and a is not None and b is not None]
    dice_max = max((dice for dice, _, _ in known), default=0)
    if not dice_max:
        return (None,) * len(rows)
    params_min, flops_min = min(params for _, params, _ in known), min(flops for _, _, flops in known)
    return tuple(
        None
        if dice is None or params is None or flops is None
        else dice / dice_max + alpha * (params_min / params + flops_min / flops)
        for dice, params, flops in numbers
    )


@dataclass(frozen=True, eq=False)
class NemenyiTest:
    """The ``average`` ranks (M,) of M methods, 1 the best, and the distance from which on two of them differ.

    ``groups`` are the longest runs of methods, best first, whose ranks lie within that distance: the bars of a
    critical-distance diagram. A method that differs from all others is in none.
    """

    average: NDArray[np.float64]
    critical_distance: float
    groups: tuple[tuple[int, ...], ...]


def nemenyi(scores_NM: NDArray[np.float64], *, alpha: float = 0.05) -> NemenyiTest:
    """Computes average ranks over the cases, highest score first, and Nemenyi's critical distance at level ``alpha``.

    Ties share their mean rank. The distance is q_alpha · sqrt(M (M + 1) / 6 N), q_alpha the studentized range over
    sqrt(2). It asks for cases scored by every method: choose how to rank a missing structure before (as 0, say).

    Raises:
        SettingError: ``alpha`` is no level.
        DataError: There are fewer than two methods, no case, or a score that is not finite.

    Reference: Demšar, *Statistical comparisons of classifiers over multiple data sets* (JMLR 2006), section 3.2.2.

    >>> test = nemenyi(np.array([[0.9, 0.8], [0.7, 0.6], [0.5, 0.5]]))
    >>> test.average.round(3).tolist(), round(test.critical_distance, 3), test.groups
    ([1.167, 1.833], 1.132, ((0, 1),))
    """
    from scipy.stats import rankdata, studentized_range  # the paper's rows are read without it

    is_level = 0 < alpha < 1
    require(
        is_level, "alpha", "the Nemenyi test", allowed="a level between 0 and 1", given=alpha, remedy="Pass 0.05, say."
    )
    if scores_NM.ndim != 2 or scores_NM.shape[0] < 1 or scores_NM.shape[1] < 2 or not np.isfinite(scores_NM).all():
        given = f"{scores_NM.shape} with {int((~np.isfinite(scores_NM)).sum())} that are not finite"
        allowed, remedy = "finite scores (cases, two methods or more)", "Leave out cases that a method has no score of."
        raise DataError.of("scores", "the Nemenyi test", allowed=allowed, given=given, remedy=remedy)
    num_cases, num_methods = scores_NM.shape
    average = rankdata(-scores_NM, axis=1).mean(axis=0)
    q_alpha = float(studentized_range.ppf(1 - alpha, num_methods, np.inf)) / math.sqrt(2)
    distance = q_alpha * math.sqrt(num_methods * (num_methods + 1) / (6 * num_cases))
    return NemenyiTest(average, distance, _groups(average, distance))


def _groups(average: NDArray[np.float64], distance: float) -> tuple[tuple[int, ...], ...]:
    order = np.argsort(average, kind="stable")
    ends = [int(np.searchsorted(average[order], average[i] + distance, side="right")) for i in order]
    longest = [(start, end) for start, end in enumerate(ends) if start == 0 or ends[start - 1] < end]
    return tuple(tuple(order[start:end].tolist()) for start, end in longest if end - start > 1)

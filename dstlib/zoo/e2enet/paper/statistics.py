"""How sure the means of a comparison are, and which of its systems differ: over cases, folds and seeds.

Shapes: N cases, M systems, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from dstlib.zoo.e2enet.evaluation.scores import Evaluation, mean_without_nan, pooled
from dstlib.zoo.e2enet.paper.runs import FinishedRun


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and its standard error over ``number`` values; None over a single one, or of what is no mean."""

    mean: float
    error: float | None = None
    number: int = 1


def estimate(values: Sequence[float] | NDArray[np.float64]) -> Estimate | None:
    """Returns the mean of the values that are there, and the standard error s / √n; None where none is there.

    >>> estimate([1.0, 3.0, math.nan])
    Estimate(mean=2.0, error=1.0, number=2)
    """
    found = np.asarray(values, np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Estimate(mean=float(found.mean()), error=error, number=len(found))


def over_folds(scored: Sequence[tuple[int, Evaluation]]) -> Mapping[int, Evaluation]:
    """Returns the scores of each seed over the held-out cases of all folds, from (seed, scores of a fold).

    Raises:
        DataError: The folds hold out the same case, or have other classes.
    """
    seeds = dict.fromkeys(seed for seed, _ in scored)
    return {seed: pooled([each for of, each in scored if of == seed]) for seed in seeds}


def over_seeds(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Averages the scores of each case and class over the seeds that have one: one evaluation of all cases.

    Left out are the cases that no seed could score.
    """
    first = evaluations[0]
    cases = tuple(dict.fromkeys(case for each in evaluations for case in each.cases))

    def average(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        full = np.full((len(arrays), len(cases), *arrays[0].shape[1:]), np.nan)
        for n, (each, array) in enumerate(zip(evaluations, arrays, strict=True)):
            full[n, [cases.index(case) for case in each.cases]] = array
        return mean_without_nan(full, axis=0)

    scores = {metric: average([each.scores[metric] for each in evaluations]) for metric in first.scores}
    volumes = average([each.volumes for each in evaluations])
    left_out = {name: why for each in evaluations for name, why in each.left_out.items() if name not in cases}
    return replace(first, cases=cases, scores=scores, volumes=volumes, left_out=left_out)


@dataclass(frozen=True, eq=False)
class CaseScores:
    """The mean Dice of N cases by M systems, ``scores`` (N, M): the cases that all of them have a score of."""

    cases: tuple[str, ...]
    systems: tuple[str, ...]
    scores: NDArray[np.float64]


def case_scores(runs: Sequence[FinishedRun]) -> CaseScores:
    """Collects what systems are compared by, case by case: the Dice averaged over the classes and the seeds.

    A class that is absent from label and prediction is left out of a case's mean; one that is in one of them alone
    counts 0.
    """
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(run.system.name for run in runs):
        mine = [(run.seed, run.evaluation) for run in runs if run.system.name == name]
        whole = over_seeds([*over_folds(mine).values()])
        means = whole.case_means("dice")
        found[name] = {case: float(mean) for case, mean in zip(whole.cases, means, strict=True) if np.isfinite(mean)}
    each = [*found.values()]
    common = [case for case in each[0] if all(case in others for others in each)] if each else []
    scores = np.array([[means[case] for means in each] for case in common], np.float64)
    return CaseScores(tuple(common), tuple(found), scores.reshape(len(common), len(each)))


@dataclass(frozen=True, kw_only=True)
class PairTest:
    """Two systems: how far the ``first`` is above the ``second`` over the cases, and how likely that is by chance.

    ``p`` is Wilcoxon's signed-rank test, two-sided, over the cases that differ, ``corrected`` the same by Holm over all
    pairs.
    """

    first: str
    second: str
    difference: Estimate
    p: float
    corrected: float


def pair_tests(found: CaseScores) -> tuple[PairTest, ...]:
    """Compares every two systems over their cases; nothing where there is no case or one system alone.

    Reference: Wilcoxon, *Individual comparisons by ranking methods* (1945), where cases without a difference are left
    out; exact for up to 50 cases, or up to 13 where some differences are 0 or alike, and else by the normal
    distribution. Holm, *A simple sequentially rejective multiple test procedure* (1979).
    """
    pairs = [*combinations(range(len(found.systems)), 2)] if found.cases else []
    differences = [found.scores[:, i] - found.scores[:, j] for i, j in pairs]
    values = [_signed_rank(difference) for difference in differences]
    tests = []
    for (i, j), difference, p, corrected in zip(pairs, differences, values, holm(values), strict=True):
        over_cases = estimate(difference)
        assert over_cases is not None
        first, second = found.systems[i], found.systems[j]
        tests.append(PairTest(first=first, second=second, difference=over_cases, p=p, corrected=corrected))
    return tuple(tests)


def holm(values: Sequence[float]) -> tuple[float, ...]:
    """Corrects p values for being several, in their order: the smallest × m, the next × (m - 1), never falling.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    order, corrected, highest = np.argsort(values, kind="stable"), [0.0] * len(values), 0.0
    for rank, i in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return tuple(corrected)


def _signed_rank(difference: NDArray[np.float64]) -> float:
    """Returns the p value of no difference; 1 where there is none in any case."""
    return float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0

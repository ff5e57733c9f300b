"""The scores of a set of cases: means, tables, and the same as CSV and JSON.

Shapes: N cases, K foreground classes.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import DataError
from dstlib.report import abridge, align, on_one_line
from dstlib.zoo.e2enet.data.layouts.names import refuse_repeated
from dstlib.zoo.e2enet.evaluation.metrics import METRICS

SIDES = ("label", "prediction")
MEANS = "Means are over the cases with a value, class by class, then over the classes with a mean."
LEFT_OUT = """\
A class absent from label and prediction has no value in that case and is left out; absent from one of them (missed:
from the prediction, false: from the label), its Dice and NSD are 0 and its distances are left out."""
PENALISED = """\
A class absent from label and prediction counts as found: Dice and NSD 1, distances 0; absent from one of them (missed:
from the prediction, false: from the label), its Dice and NSD are 0 and its distances {penalty:g} mm."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The ``scores`` of N cases and K foreground classes, (N, K) per metric; NaN where there is none.

    - ``volumes``: (N, K, 2) millilitres of the class in label and prediction; 0 where it is absent.
    - ``tolerances``: of surface Dice, in mm, per class.
    - ``penalty``: the distance, in mm, of what is absent from one of label and prediction; None where it has none.
    - ``left_out``: cases that could not be scored, and why; they are in no mean.

    Raises:
        DataError: Two classes share a name, by which scores are kept.

    >>> dice, volumes = np.array([[0.5, 1.0], [0.7, np.nan]]), np.zeros((2, 2, 2))
    >>> scores = Evaluation(("a", "b"), ("liver", "spleen"), {"dice": dice}, volumes, (1.0, 1.0))
    >>> scores.class_dice.tolist(), scores.num_cases.tolist(), scores.mean
    ([0.6, 1.0], [2, 1], 0.8)
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    scores: Mapping[str, NDArray[np.float64]]
    volumes: NDArray[np.float64]
    tolerances: tuple[float, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    penalty: float | None = None

    def __post_init__(self) -> None:
        allowed, remedy = "each name once", "Rename one: scores are kept by the names of classes."
        refuse_repeated(self.classes, "classes", "an evaluation", allowed=allowed, remedy=remedy)

    @property
    def dice(self) -> NDArray[np.float64]:
        """(N, K)."""
        return self.scores["dice"]

    @property
    def num_cases(self) -> NDArray[np.int64]:
        """(K,): how many cases have a Dice of each class."""
        return np.isfinite(self.dice).sum(axis=0)

    @property
    def num_missed(self) -> NDArray[np.int64]:
        """(K,): in how many cases the label has the class and the prediction has not."""
        return ((self.volumes[..., 0] > 0) & (self.volumes[..., 1] == 0)).sum(axis=0)

    @property
    def num_false(self) -> NDArray[np.int64]:
        """(K,): in how many cases the prediction has the class and the label has not."""
        return ((self.volumes[..., 0] == 0) & (self.volumes[..., 1] > 0)).sum(axis=0)

    @property
    def class_dice(self) -> NDArray[np.float64]:
        """(K,): the mean Dice over the cases; NaN for a class that no case has."""
        return self.class_means("dice")

    @property
    def mean(self) -> float:
        """mDice: the mean of ``class_dice``; NaN if no case has any class."""
        return self.mean_of("dice")

    def class_means(self, metric: str) -> NDArray[np.float64]:
        """Averages each class (K,) over the cases that have a value; NaN for a class without any."""
        return mean_without_nan(self.scores[metric], axis=0)

    def case_means(self, metric: str) -> NDArray[np.float64]:
        """Averages each case (N,) over the classes that have a value; NaN for a case without any."""
        return mean_without_nan(self.scores[metric], axis=1)

    def mean_of(self, metric: str) -> float:
        """Averages over the cases, class by class, and then over the classes; NaN if there is no value at all.

        Reference: the paper averages over the classes and then the cases. Where every class is in every case both
        orders agree; where some are missing, this one gives every class the same say, as nnU-Net's summary does.
        """
        return float(mean_without_nan(self.class_means(metric), axis=0))

    def penalised(self, penalty: float) -> "Evaluation":
        """Gives every class a value in every case: shares 1 and distances 0 where it is absent from both sides.

        Where it is absent from one, shares are 0, and distances are the penalty.

        Reference: how BraTS scores, until it went lesion by lesion (2023).
        """
        present = self.volumes > 0
        in_neither, in_one = ~present.any(axis=2), present[..., 0] != present[..., 1]
        scores = {}
        for name, values in self.scores.items():
            found, missed = (1.0, 0.0) if METRICS[name].is_share else (0.0, penalty)
            scores[name] = np.where(in_neither, found, np.where(in_one, missed, values))
        return replace(self, scores=scores, penalty=penalty)

    def typical_case(self) -> int:
        """Returns the case whose mean Dice is the median, of those with a class in the label; of all, if none has any.

        Neither the best nor the worst is shown for the rest.
        """
        with_classes = np.flatnonzero((self.volumes[..., 0] > 0).any(axis=1))
        cases = with_classes if len(with_classes) else np.arange(len(self.cases))
        return int(cases[np.argsort(self.case_means("dice")[cases], kind="stable")][len(cases) // 2])

    def table(self) -> str:
        """Returns a row per class and the means, with what was counted, left out and meant below."""
        columns = {name: self.class_means(name) for name in self.scores}
        rows = [("class", *(METRICS[name].name for name in columns), "cases", "missed", "false")]
        for k, label in enumerate(self.classes):
            counts = (str(x[k]) for x in (self.num_cases, self.num_missed, self.num_false))
            rows.append((label, *(_number(name, means[k]) for name, means in columns.items()), *counts))
        means = (_number(name, self.mean_of(name)) for name in columns)
        sums = (str(x.sum()) for x in (self.num_missed, self.num_false))
        lines = align([*rows, ("mean", *means, str(len(self.cases)), *sums)], left=(0,))
        lines.insert(-1, lines[1])  # a rule above the means
        return "\n".join([*lines, *self._notes()])

    def definition(self) -> str:
        """Says what the metrics of this evaluation are, and what becomes of missing structures."""
        tolerance = " / ".join(f"{value:g}" for value in dict.fromkeys(self.tolerances)) + " mm"
        if len(set(self.tolerances)) > 1:
            tolerance = "the tolerance of its class (" + ", ".join(f"{value:g}" for value in self.tolerances) + " mm)"
        policy = LEFT_OUT if self.penalty is None else PENALISED.format(penalty=self.penalty)
        metrics = (METRICS[name].definition.format(tolerance=tolerance) for name in self.scores)
        return "\n".join([*metrics, MEANS, policy])

    def _notes(self) -> list[str]:
        notes = []
        size, one_sided = self.dice.size, int(self.num_missed.sum() + self.num_false.sum())
        if absent := int(np.isnan(self.dice).sum()):
            notes.append(f"{absent} of {size} (class, case) pairs left out: absent from both.")
        if one_sided:
            distance = "without a distance" if self.penalty is None else f"a distance of {self.penalty:g} mm"
            notes.append(f"{one_sided} of {size} pairs with Dice 0 and {distance}: absent from one.")
        if self.left_out:
            notes.append(f"NOT SCORED, {len(self.left_out)} of {len(self.left_out) + len(self.cases)} cases:")
            lines = [on_one_line(f"{name}: {reason}") for name, reason in self.left_out.items()]
            whole = "scores.json of --output, or result.json of a run, lists them"
            notes += [f"  {line}" for line in abridge(lines, [*self.left_out], whole=whole)]
        return [*notes, self.definition()]

    def csv(self) -> str:
        """Returns a line per case and class: every metric (empty for none) and both volumes in ml."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(("case", "class", *self.scores, "label_ml", "prediction_ml"))
        for n, case in enumerate(self.cases):
            for k, label in enumerate(self.classes):
                values = ("" if np.isnan(x[n, k]) else f"{x[n, k]:.6g}" for x in self.scores.values())
                lines.writerow((case, label, *values, *(f"{x:.6g}" for x in self.volumes[n, k])))
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """Returns the evaluation as plain data, with the values of every case; None for NaN."""
        counts = {"num_cases": self.num_cases, "num_missed": self.num_missed, "num_false": self.num_false}
        return {
            **{f"mean_{m}": _or_none(self.mean_of(m)) for m in self.scores},
            **{f"class_{m}": _named(self.classes, self.class_means(m)) for m in self.scores},
            **{name: dict(zip(self.classes, count.tolist(), strict=True)) for name, count in counts.items()},
            "num_left_out": int(np.isnan(self.dice).sum()),
            "classes": list(self.classes),
            "tolerances_mm": list(self.tolerances),
            **({} if self.penalty is None else {"penalty_mm": self.penalty}),
            "cases": {
                case: {
                    **{m: _named(self.classes, x[n]) for m, x in self.scores.items()},
                    **{f"{side}_ml": _named(self.classes, self.volumes[n, :, i]) for i, side in enumerate(SIDES)},
                }
                for n, case in enumerate(self.cases)
            },
            "not_scored": dict(self.left_out),
            "definition": self.definition().replace("\n", " "),
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Evaluation":
        """Reads back what :meth:`to_json` gave.

        Raises:
            DataError: It is something else.
        """
        try:
            cases, classes = tuple(content["cases"]), tuple(content["classes"])
            metrics = [m for m in METRICS if f"mean_{m}" in content]
            scores = {m: _array(content["cases"], classes, m) for m in metrics}
            volumes = np.stack([_array(content["cases"], classes, f"{side}_ml") for side in SIDES], axis=-1)
            tolerances = tuple(float(value) for value in content["tolerances_mm"])
            penalty = content.get("penalty_mm")  # which evaluations of before do not have
            penalty = None if penalty is None else float(penalty)
            return Evaluation(cases, classes, scores, volumes, tolerances, dict(content["not_scored"]), penalty)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            allowed = "the JSON of an evaluation"
            given = f"{type(error).__name__}: {error}"
            remedy = "Pass the content of a result.json or scores.json that dstlib wrote."
            raise DataError.of("scores", "a file", allowed=allowed, given=given, remedy=remedy) from error


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Joins all cases into one evaluation: the held-out cases of the five folds, say.

    Raises:
        DataError: They have other classes, metrics, tolerances or penalties, or share a case.
    """
    first, names = evaluations[0], [case for e in evaluations for case in e.cases]
    for other in evaluations:
        kinds = (("classes", "classes"), ("tolerances", "tolerances"), ("metrics", "scores"), ("penalty", "penalty"))
        for what, attribute in kinds:
            expected, found = (getattr(e, attribute) for e in (first, other))
            if what == "metrics":
                expected, found = tuple(expected), tuple(found)
            if found != expected:
                allowed, remedy = (
                    f"{expected} in all",
                    "Pool the folds of one training, on one data set; without --pool, each has a row of its own.",
                )
                raise DataError.of(what, "the runs to pool", allowed=allowed, given=found, remedy=remedy)
    remedy = "Pool folds that hold out different cases; without --pool, each has a row of its own."
    refuse_repeated(names, "cases", "the runs to pool", allowed="each case once", remedy=remedy)
    scores = {m: np.concatenate([e.scores[m] for e in evaluations]) for m in first.scores}
    volumes = np.concatenate([e.volumes for e in evaluations])
    left_out = {name: why for e in evaluations for name, why in e.left_out.items()}
    return Evaluation(tuple(names), first.classes, scores, volumes, first.tolerances, left_out, first.penalty)


def mean_without_nan(values: NDArray[np.float64], *, axis: int) -> NDArray[np.float64]:
    """Averages what is not NaN; NaN where nothing is left.

    >>> mean_without_nan(np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan]]), axis=0).tolist()
    [2.0, 2.0, nan]
    """
    counts = np.isfinite(values).sum(axis=axis)
    empty = np.full(counts.shape, np.nan)
    return np.divide(np.nansum(values, axis=axis), counts, out=empty, where=counts > 0)


def _array(cases: Mapping[str, Any], classes: Sequence[str], metric: str) -> NDArray[np.float64]:
    rows = [[case[metric][label] for label in classes] for case in cases.values()]
    return np.array(rows, np.float64).reshape(len(cases), len(classes))


def _named(classes: Sequence[str], values: NDArray[np.float64]) -> dict[str, float | None]:
    return dict(zip(classes, map(_or_none, values), strict=True))


def _number(metric: str, value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}" if METRICS[metric].is_share else f"{value:.2f}"


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

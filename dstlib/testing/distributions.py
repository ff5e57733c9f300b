"""What every distribution keeps to: a density for each weight, that add up to what was asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from dstlib.masking import Distribution, num_units
from dstlib.testing.laws import Law, Rules, attempt, expect, hold, laws, world

Shapes = Mapping[str, Sequence[int]]

MODELS: Mapping[str, Shapes] = {
    "a convolutional network": {
        "stem": (16, 3, 3, 3),
        "body.0": (32, 16, 3, 3),
        "body.1": (32, 32, 1, 3, 3),
        "up": (16, 32, 2, 2),
        "head": (10, 16),
    },
    "a transformer": {
        **{f"{i}.{part}": (64, 64) for i in range(3) for part in ("q", "k", "v", "out")},
        "mlp": (256, 64),
        "logits": (1000, 64),
    },
    "a single weight": {"fc": (40, 30)},
}


@dataclass(frozen=True)
class Case:
    """A question to a distribution: these weights, at this density."""

    model: str
    density: float

    def __str__(self) -> str:
        return f"{self.model} at density {self.density}"

    @property
    def shapes(self) -> Shapes:
        """Name → shape of each weight."""
        return MODELS[self.model]

    @property
    def sizes(self) -> dict[str, int]:
        """Name → number of entries of each weight."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


CASES = tuple(Case(model, x) for model in MODELS for x in (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 0.95, 1.0))


def check_distribution(distribution: Distribution, *, keeps_total: bool = True) -> None:
    """Holds a distribution to its laws, on three models and densities from 0.02 to 1.

    ``keeps_total=False`` is for one that leaves the total to others on purpose, as ``uniform_dense_first`` does.

    - *every name*: a density for each name it was given, and for no other.
    - *in range*: plain numbers in [0, 1].
    - *repeatable*: the same answer each time, under any global seed; the shapes stay as they were.
    - *total*: the active weights, each weight's number rounded, are the density times all, to one per weight.
    - *monotone*: more density for all makes no weight sparser, but for one entry of rounding.
    - *dense is dense*: density 1 leaves every weight dense.

    Raises:
        LawError: The first law that is broken.

    >>> from dstlib.masking import erk, uniform_dense_first
    >>> check_distribution(erk)
    >>> check_distribution(uniform_dense_first, keeps_total=False)
    """
    hold(distribution_laws(distribution, keeps_total=keeps_total))


def distribution_laws(distribution: Distribution, *, keeps_total: bool = True) -> tuple[Law, ...]:
    """Returns the laws of :func:`check_distribution`, one by one."""
    kept = {law: inputs for law, inputs in LAWS.items() if keeps_total or law is not _total}
    return laws("distribution", distribution, kept, distribution)


def _every_name(distribution: Distribution, case: Case) -> None:
    _answer(distribution, case)


def _in_range(distribution: Distribution, case: Case) -> None:
    _densities(distribution, case)


def _repeatable(distribution: Distribution, case: Case) -> None:
    first, given = _answer(distribution, case), dict(case.shapes)
    with world(1):
        again = distribution(given, case.density)
    is_same = again == first and list(given.items()) == list(case.shapes.items())
    expected, got = "the same densities twice, and shapes as they were", "something else the second time"
    remedy = "Compute from shapes and density alone: a resumed run must find the same."
    expect(is_same, expected, got=got, remedy=remedy)


def _total(distribution: Distribution, case: Case) -> None:
    num_active = sum(num_units(case.sizes[name], x) for name, x in _densities(distribution, case).items())
    wanted, slack = case.density * sum(case.sizes.values()), len(case.sizes)
    expected = f"{wanted:,.0f} active entries in all, to {slack}"
    remedy = "Scale the densities until size · density adds up; pass keeps_total=False if it is not meant to."
    expect(abs(num_active - wanted) <= slack, expected, got=f"{num_active:,}", remedy=remedy)


def _monotone(distribution: Distribution, pair: tuple[Case, Case]) -> None:
    before, found = (_densities(distribution, case) for case in pair)
    for name, value in before.items():
        expected = f"{name} at {value:.4g} or denser, as for a lower density"
        remedy = "A ramp goes from one answer to another, and must not grow back what it prunes."
        is_kept = found[name] >= value - 1 / pair[0].sizes[name]
        expect(is_kept, expected, got=found[name], remedy=remedy, on=str(pair[1]))


def _dense_is_dense(distribution: Distribution, case: Case) -> None:
    remedy = "Bound each density by 1, and share the rest out again."
    for name, value in _densities(distribution, case).items():
        expect(value == 1, "density 1 for every weight", got=f"{value} for {name}", remedy=remedy)


LAWS: Rules[Distribution] = {
    **dict.fromkeys((_every_name, _in_range, _repeatable, _total), lambda _: CASES),
    _monotone: lambda _: (pair for pair in pairwise(CASES) if pair[0].model == pair[1].model),
    _dense_is_dense: lambda _: (case for case in CASES if case.density == 1),
}


def _answer(distribution: Distribution, case: Case) -> dict[str, float]:
    """What a distribution returns, once it is known to name the weights."""
    expected = f"densities of {', '.join(list(case.shapes)[:3])}, ..."
    law, remedy = "every name", "Return {name: density for name in shapes}."
    with world(0):
        found = attempt(lambda: distribution(dict(case.shapes), case.density), expected, remedy=remedy, law=law)
    got = f"a dict of {', '.join(map(str, found)) or 'nothing'}" if isinstance(found, Mapping) else repr(found)
    names_all = isinstance(found, Mapping) and set(found) == set(case.shapes)
    expect(names_all, expected, got=got, remedy=remedy, law=law)
    return dict(found)


def _densities(distribution: Distribution, case: Case) -> dict[str, float]:
    """What a distribution returns, once it is known to be densities."""
    found = _answer(distribution, case)
    for name, value in found.items():
        remedy = "Weights that would exceed 1 stay dense; what they leave goes to the others."
        is_density = isinstance(value, Real) and 0 <= value <= 1
        expect(is_density, "plain numbers in [0, 1]", got=f"{value!r} for {name}", remedy=remedy, law="in range")
    return found

"""What every distribution keeps to: a density for each weight, that add up to what was asked for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from numbers import Real

from dstlib.masking import Distribution, num_units
from dstlib.testing.laws import BreachError, Law, attempt, hold, laws, world

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
    kept = LAWS if keeps_total else tuple(law for law in LAWS if law is not _total)
    return laws("distribution", distribution, kept, distribution)


def _every_name(distribution: Distribution) -> None:
    for case in CASES:
        _answer(distribution, case)


def _in_range(distribution: Distribution) -> None:
    for case in CASES:
        _densities(distribution, case)


def _repeatable(distribution: Distribution) -> None:
    for case in CASES:
        first, given = _answer(distribution, case), dict(case.shapes)
        with world(1):
            again = distribution(given, case.density)
        if again != first or list(given.items()) != list(case.shapes.items()):
            expected, got = "the same densities twice, and shapes as they were", "something else the second time"
            remedy = "Compute from shapes and density alone: a resumed run must find the same."
            raise BreachError(on=case, expected=expected, got=got, remedy=remedy)


def _total(distribution: Distribution) -> None:
    for case in CASES:
        num_active = sum(num_units(case.sizes[name], x) for name, x in _densities(distribution, case).items())
        wanted, slack = case.density * sum(case.sizes.values()), len(case.sizes)
        if abs(num_active - wanted) > slack:
            expected = f"{wanted:,.0f} active entries in all, to {slack}"
            remedy = "Scale the densities until size · density adds up; pass keeps_total=False if it is not meant to."
            raise BreachError(on=case, expected=expected, got=f"{num_active:,}", remedy=remedy)


def _monotone(distribution: Distribution) -> None:
    for lower, case in pairwise(CASES):
        if lower.model != case.model:
            continue
        before, found = _densities(distribution, lower), _densities(distribution, case)
        for name, value in before.items():
            if found[name] < value - 1 / case.sizes[name]:
                expected = f"{name} at {value:.4g} or denser, as for a lower density"
                remedy = "A ramp goes from one answer to another, and must not grow back what it prunes."
                raise BreachError(on=case, expected=expected, got=found[name], remedy=remedy)


def _dense_is_dense(distribution: Distribution) -> None:
    for case in CASES:
        for name, value in _densities(distribution, case).items() if case.density == 1 else ():
            if value != 1:
                remedy = "Bound each density by 1, and share the rest out again."
                raise BreachError(
                    on=case, expected="density 1 for every weight", got=f"{value} for {name}", remedy=remedy
                )


LAWS = (_every_name, _in_range, _repeatable, _total, _monotone, _dense_is_dense)


def _answer(distribution: Distribution, case: Case) -> dict[str, float]:
    """What a distribution returns, once it is known to name the weights."""
    expected = f"densities of {', '.join(list(case.shapes)[:3])}, ..."
    law, remedy = "every name", "Return {name: density for name in shapes}."
    with world(0):
        call = partial(distribution, dict(case.shapes), case.density)
        found = attempt(call, on=case, expected=expected, remedy=remedy, law=law)
    if not isinstance(found, Mapping) or set(found) != set(case.shapes):
        got = f"a dict of {', '.join(map(str, found)) or 'nothing'}" if isinstance(found, Mapping) else repr(found)
        raise BreachError(on=case, expected=expected, got=got, remedy=remedy, law=law)
    return dict(found)


def _densities(distribution: Distribution, case: Case) -> dict[str, float]:
    """What a distribution returns, once it is known to be densities."""
    found = _answer(distribution, case)
    for name, value in found.items():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            remedy = "Weights that would exceed 1 stay dense; what they leave goes to the others."
            expected, got = "plain numbers in [0, 1]", f"{value!r} for {name}"
            raise BreachError(on=case, expected=expected, got=got, remedy=remedy, law="in range")
    return found

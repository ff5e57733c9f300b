"""What every distribution keeps to: a density for each weight, that add up to what was asked for."""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real

from dstlib.masking import Distribution, num_units
from dstlib.testing.laws import attempt, broken, named, world

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
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 0.95, 1.0)


def check_distribution(distribution: Distribution, *, keeps_total: bool = True) -> None:
    """Holds a distribution to its laws, on three models and densities from 0.02 to 1.

    ``keeps_total=False`` is for one that leaves the total to others on purpose, as ``uniform_dense_first`` does.

    - *every name*: a density for each name it was given, and for no other.
    - *in range*: plain numbers in [0, 1].
    - *repeatable*: the same answer each time, under any global seed; the shapes stay as they were.
    - *total*: the active weights, each weight's number rounded, are the density times all, to one per weight.
    - *monotone*: more density for all makes no weight sparser, but for one entry of rounding.
    - *dense is dense*: density 1 leaves every weight dense.

    Errors: LawError for the first law that is broken.

    >>> from dstlib.masking import erk, uniform_dense_first
    >>> check_distribution(erk)
    >>> check_distribution(uniform_dense_first, keeps_total=False)
    """
    subject = named("distribution", distribution)
    for model, shapes in MODELS.items():
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        before: dict[str, float] = {}
        for density in DENSITIES:
            on = f"{model} at density {density}"
            found = _spread(distribution, subject, shapes, density, on)
            if keeps_total:
                _check_total(found, subject, sizes, density, on)
            for name in before:
                if found[name] < before[name] - 1 / sizes[name]:
                    expected, got = f"{name} at {before[name]:.4g} or denser, as for a lower density", found[name]
                    remedy = "A ramp goes from one answer to another, and must not grow back what it prunes."
                    raise broken("monotone", subject, on=on, expected=expected, got=got, remedy=remedy)
            before = found
        if sparse := [name for name, value in before.items() if value != 1]:
            expected, remedy = "density 1 for every weight", "Bound each density by 1, and share the rest out again."
            on, given = f"{model} at density 1", f"{before[sparse[0]]} for {sparse[0]}"
            raise broken("dense is dense", subject, on=on, expected=expected, got=given, remedy=remedy)


def _spread(distribution: Distribution, subject: str, shapes: Shapes, density: float, on: str) -> dict[str, float]:
    """The densities, once they are known to be some."""
    expected, remedy = f"densities of {', '.join(list(shapes)[:3])}, ...", "Return {name: density for name in shapes}."
    given = dict(copy.deepcopy(shapes))
    with world(0):
        call = partial(distribution, given, density)
        found = attempt(call, "every name", subject, on=on, expected=expected, remedy=remedy)
    if not isinstance(found, Mapping) or set(found) != set(shapes):
        got = f"a dict of {', '.join(map(str, found)) or 'nothing'}" if isinstance(found, Mapping) else repr(call)
        raise broken("every name", subject, on=on, expected=expected, got=got, remedy=remedy)
    for name, value in found.items():
        if not isinstance(value, Real) or not 0 <= value <= 1:
            remedy = "Weights that would exceed 1 stay dense; what they leave goes to the others."
            expected, got = "plain numbers in [0, 1]", f"{value!r} for {name}"
            raise broken("in range", subject, on=on, expected=expected, got=got, remedy=remedy)
    with world(1):
        again = distribution(given, density)
    if again != found or list(given.items()) != list(shapes.items()):
        expected, got = "the same densities twice, and shapes as they were", "something else the second time"
        remedy = "Compute from shapes and density alone: a resumed run must find the same."
        raise broken("repeatable", subject, on=on, expected=expected, got=got, remedy=remedy)
    return dict(found)


def _check_total(found: Mapping[str, float], subject: str, sizes: Mapping[str, int], density: float, on: str) -> None:
    num_active = sum(num_units(sizes[name], value) for name, value in found.items())
    wanted = density * sum(sizes.values())
    if abs(num_active - wanted) > len(sizes):  # at least one active entry each, and half of one by rounding
        expected, got = f"{wanted:,.0f} active entries in all, to {len(sizes)}", f"{num_active:,}"
        remedy = "Scale the densities until size · density adds up; pass keeps_total=False if it is not meant to."
        raise broken("total", subject, on=on, expected=expected, got=got, remedy=remedy)

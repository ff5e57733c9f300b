"""Distributions: how a density over a whole model becomes a density per weight.

A distribution is any function (shapes, density) → densities, over names in the model's order. Those that
shift density between weights are solved in whole weights: the returned densities are k/n with integers k
that add up exactly, and rounding n·(k/n) gives k back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dstlib.masking.counts import apportion, round_down

Distribution = Callable[[Mapping[str, Sequence[int]], float], dict[str, float]]


@dataclass(frozen=True)
class Times:
    """A density ``factor`` times another one, 1 at most: where a ramp leads from, by where it leads.

    >>> Times(3)(0.25), Times(3)(0.5)
    (0.75, 1.0)
    """

    factor: float

    def __call__(self, density: float) -> float:
        return min(self.factor * density, 1.0)


def uniform(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Gives every weight the same density.

    >>> uniform({"a": (8, 4), "b": (2, 8)}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return dict.fromkeys(shapes, density)


def uniform_dense_first(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Gives every weight the same density but the first, which stays dense and is not made up for.

    Reference: Evci et al. 2020 (RigL), "Uniform".

    >>> uniform_dense_first({"stem": (8, 4), "body": (2, 8)}, 0.5)
    {'stem': 1.0, 'body': 0.5}
    """
    return {name: 1.0 if i == 0 else density for i, name in enumerate(shapes)}


def uniform_dense_ends(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Keeps the first and the last weight dense, and gives the others the same density, by which the total is met.

    Where the two ends hold more than half of what is to be active, they are weights like all others: every density is
    the same.

    Reference: Yuan et al. 2021 (MEST), whose profiles leave stem and head out. Deviates: they do not make up for them.

    >>> uniform_dense_ends({"stem": (2, 2), "body": (8, 8), "head": (2, 2)}, 0.25)
    {'stem': 1.0, 'body': 0.15625, 'head': 1.0}
    >>> uniform_dense_ends({"one": (8, 8), "other": (8, 2)}, 0.25)
    {'one': 0.25, 'other': 0.25}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ends = set(list(shapes)[:1] + list(shapes)[-1:])
    num_ends, num_active = sum(sizes[name] for name in ends), density * sum(sizes.values())
    if num_ends > num_active / 2:
        return dict.fromkeys(shapes, density)
    others = min((num_active - num_ends) / max(sum(sizes.values()) - num_ends, 1), 1.0)
    return {name: 1.0 if name in ends else others for name in shapes}


def er(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Spreads density by Erdős-Rényi: ∝ (out + in) / (out · in).

    Reference: Mocanu et al. 2018 (SET). Kernel taps do not count, unlike in :func:`erk`.

    >>> er({"square": (16, 16), "flat": (4, 64)}, 0.25)
    {'square': 0.16015625, 'flat': 0.33984375}
    """
    return _proportional(shapes, density, {n: sum(s[:2]) / math.prod(s[:2]) for n, s in shapes.items()})


def erk(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Spreads density by Erdős-Rényi-Kernel: ∝ sum of all extents / their product, so kernel taps count too.

    Weights that would exceed density 1 stay dense, and the rest is solved again. Over n weights the active
    ones number n - floor((1 - density)·n), and at least one in each.

    Reference: Evci et al. 2020 (RigL), section 3.

    >>> densities = erk({"wide": (512, 512, 3, 3), "first": (64, 3, 3, 3)}, 0.1)
    >>> {name: round(d, 4) for name, d in densities.items()}
    {'wide': 0.0993, 'first': 1.0}
    """
    return _proportional(shapes, density, {n: sum(s) / math.prod(s) for n, s in shapes.items()})


def in_proportion(densities: Mapping[str, float]) -> Distribution:
    """Makes a distribution in proportion to densities that weights have, such as those of masks that were pruned.

    >>> in_proportion({"a": 0.5, "b": 0.25})({"a": (8, 4), "b": (2, 8)}, 1 / 3)
    {'a': 0.40625, 'b': 0.1875}
    """

    def spread(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
        return _proportional(shapes, density, {name: densities[name] for name in shapes})

    return spread


def _proportional(
    shapes: Mapping[str, Sequence[int]], density: float, propensity: Mapping[str, float]
) -> dict[str, float]:
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    num_all = sum(sizes.values())
    num_active = max(num_all - round_down((1 - density) * num_all), len(sizes))
    shares = {name: size * propensity[name] for name, size in sizes.items()}
    nums = apportion(num_active, shares, sizes, floors=dict.fromkeys(sizes, 1))
    return {name: num / sizes[name] for name, num in nums.items()}

"""How much: curves from progress to a value.

A curve is any callable of one number, the progress of a run in [0, 1]; the ones here are frozen values, so
they print, compare, pickle and vary by :func:`dataclasses.replace`. Progress outside [0, 1] counts as the
nearer end, and the value at the end is reached exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Curve = Callable[[float], float]


def _clamp(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)


@dataclass(frozen=True)
class Constant:
    """The same value throughout.

    >>> Constant(0.3)(0.5)
    0.3
    """

    value: float

    def __call__(self, progress: float) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line.

    >>> Linear(0.4)(0.75)
    0.1
    """

    start: float
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        p = _clamp(progress)
        return self.start * (1 - p) + self.end * p


@dataclass(frozen=True)
class Cosine:
    """Half a cosine wave from ``start`` down to a floor ``end``.

    Reference: Evci et al. 2020 (RigL), eq. 1: α/2·(1 + cos(πt/T_end)). The floor is an addition that the
    published code of E2ENet makes (0.001).

    >>> Cosine(0.3)(0.0), Cosine(0.3)(0.5), Cosine(0.5, end=0.001)(1.0)
    (0.3, 0.15, 0.001)
    """

    start: float
    end: float = 0.0

    def __call__(self, progress: float) -> float:
        weight = (1 + math.cos(math.pi * _clamp(progress))) / 2
        return self.start * weight + self.end * (1 - weight)


@dataclass(frozen=True)
class Cubic:
    """Fast first, slow at the end.

    Reference: Zhu & Gupta 2017, eq. 1: s_f + (s_i - s_f)(1 - (t - t0)/(nΔt))³.

    >>> Cubic(0.0, 1.0)(0.5)
    0.875
    """

    start: float
    end: float

    def __call__(self, progress: float) -> float:
        weight = (1 - _clamp(progress)) ** 3
        return self.start * weight + self.end * (1 - weight)


@dataclass(frozen=True)
class InversePower:
    """``start`` · (1 - progress)^``power``.

    Reference: Evci et al. 2020 (RigL), appendix on alternative schedules.

    >>> InversePower(0.4, power=2)(0.5)
    0.1
    """

    start: float
    power: float = 1.0

    def __call__(self, progress: float) -> float:
        return float(self.start * (1 - _clamp(progress)) ** self.power)

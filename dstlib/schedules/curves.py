"""Curves: how much, by the progress of a run.

A curve is any callable of one number in [0, 1], the progress of a run: towards T_end for a share to drop, towards the
last update for a ramp (see :class:`dstlib.schedules.Every`). The ones here are frozen values, so they print, compare,
pickle and vary by :func:`dataclasses.replace`. Progress outside [0, 1] counts as the nearer end, and the value at the
end is reached exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dstlib.errors import require

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
    """A straight line from ``start`` to ``end``.

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
    """A cubic from ``start`` to ``end``: fast first, slow at the end, and there from ``until`` on, a share of the way.

    Raises:
        SettingError: ``until`` is no share in (0, 1].

    Reference: Zhu & Gupta 2017, eq. 1: s_f + (s_i - s_f)(1 - (t - t0)/(nΔt))³.

    >>> Cubic(0.0, 1.0)(0.5), Cubic(0.0, 1.0, until=0.5)(0.25), Cubic(0.0, 1.0, until=0.5)(0.5)
    (0.875, 0.875, 1.0)
    """

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        allowed, remedy = "a share of the way in (0, 1]", "Pass 0.5 to arrive halfway."
        require(0 < self.until <= 1, "until", "Cubic", allowed=allowed, given=self.until, remedy=remedy)

    def __call__(self, progress: float) -> float:
        weight = (1 - _clamp(progress / self.until)) ** 3
        return self.start * weight + self.end * (1 - weight)


@dataclass(frozen=True)
class Sigmoid:
    """An S from ``start`` to ``end``: slow at both ends, fast between, the more so the steeper.

    Raises:
        SettingError: The steepness is not above 0.

    Reference: Zhang et al. 2025 (CHTss, arXiv:2501.19107), section 3.3, k = 6: σ(k(2p - 1)), stretched as in the
    authors' code so that both ends are reached exactly.

    >>> [round(Sigmoid(0.0, 1.0)(progress), 3) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.045, 0.5, 0.955, 1.0]
    """

    start: float
    end: float
    steepness: float = 6.0

    def __post_init__(self) -> None:
        require(
            0 < self.steepness < math.inf,
            "steepness",
            "Sigmoid",
            allowed="a number above 0",
            given=self.steepness,
            remedy="6 is the paper's; towards 0 it becomes a straight line.",
        )

    def __call__(self, progress: float) -> float:
        # σ(2x) - 1/2 = tanh(x) / 2
        weight = (1 + math.tanh(self.steepness * (_clamp(progress) - 0.5)) / math.tanh(self.steepness / 2)) / 2
        return self.start * (1 - weight) + self.end * weight


@dataclass(frozen=True)
class Stages:
    """One value after the other: the first at first, each further one from its share of the way ``at`` on.

    Raises:
        SettingError: Not one share less than there are values, or not in order within [0, 1].

    Reference: Yuan et al. 2021 (MEST), whose programs exchange a fifth, then a tenth, then nothing.

    >>> [Stages((0.2, 0.1, 0.0), at=(0.75, 1.0))(progress) for progress in (0.0, 0.7, 0.75, 1.0)]
    [0.2, 0.2, 0.1, 0.0]
    """

    values: tuple[float, ...]
    at: tuple[float, ...]

    def __post_init__(self) -> None:
        in_order = list(self.at) == sorted(self.at) and all(0 <= share <= 1 for share in self.at)
        require(
            in_order and len(self.values) == len(self.at) + 1,
            "values, at",
            "Stages",
            allowed="for each value but the first the share of the way at which it begins, in order, in [0, 1]",
            given=(self.values, self.at),
            remedy="Stages((0.2, 0.1), at=(0.5,)) halves 0.2 halfway.",
        )

    def __call__(self, progress: float) -> float:
        p = _clamp(progress)
        return self.values[sum(share <= p for share in self.at)]


@dataclass(frozen=True)
class InversePower:
    """A power of what is left: ``start`` · (1 - progress)^``power``.

    Reference: Evci et al. 2020 (RigL), appendix on alternative schedules.

    >>> InversePower(0.4, power=2)(0.5)
    0.1
    """

    start: float
    power: float = 1.0

    def __call__(self, progress: float) -> float:
        return float(self.start * (1 - _clamp(progress)) ** self.power)


@dataclass(frozen=True)
class Cycles:
    """1 but for ``num`` valleys, each a whole cosine wave down to 0 and back that takes ``length`` of the way.

    As a ramp: from the final density to the one it starts from and back, so many times, and the rest of the run sparse.

    Raises:
        SettingError: There is no valley, or they take more than the whole way.

    Reference: Li et al. 2024 (EAST), cyclic sparsity: two cycles of a fifth of the run.

    >>> [round(Cycles()(progress), 9) for progress in (0.0, 0.05, 0.1, 0.2, 0.3, 0.9)]
    [1.0, 0.5, 0.0, 1.0, 0.0, 1.0]
    """

    num: int = 2
    length: float = 0.2

    def __post_init__(self) -> None:
        require(
            self.num >= 1 and self.length > 0 and self.num * self.length <= 1,
            "num and length",
            "Cycles",
            allowed="one valley or more, together no longer than 1",
            given=(self.num, self.length),
            remedy="The length is a share of the way of each.",
        )

    def __call__(self, progress: float) -> float:
        p = _clamp(progress)
        return (1 + math.cos(2 * math.pi * p / self.length)) / 2 if p < self.num * self.length else 1.0


@dataclass(frozen=True)
class Alternating:
    """0 and 1 in turn: 0 until ``warmup``, then 1, 0, 1, ... for ``phase`` each, and 1 from ``settle`` on.

    A dense phase that would reach past ``settle`` ends there, and before it the last one takes ``last_dense`` at least.

    Raises:
        SettingError: Not 0 ≤ warmup ≤ settle ≤ 1, no phase, or a last dense phase that begins before the warm-up ends.

    Reference: Peste et al. 2021 (AC/DC), section 3: a dense warm-up, alternating phases, a long sparse end.

    >>> [Alternating()(progress) for progress in (0.0, 0.1, 0.2, 0.3, 0.99)]
    [0.0, 1.0, 0.0, 1.0, 1.0]
    >>> imagenet = Alternating(warmup=0.1, phase=0.05, settle=0.85, last_dense=0.1)
    >>> [imagenet(progress) for progress in (0.65, 0.7, 0.75, 0.8, 0.85)]
    [0.0, 1.0, 0.0, 0.0, 1.0]
    """

    warmup: float = 0.1
    phase: float = 0.1
    settle: float = 0.75
    last_dense: float = 0.0

    def __post_init__(self) -> None:
        before = self.settle - self.last_dense
        require(
            0 <= self.warmup <= before <= self.settle <= 1 and self.phase > 0,
            "warmup, phase, settle, last_dense",
            "Alternating",
            allowed="0 ≤ warmup ≤ settle - last_dense ≤ settle ≤ 1 and a phase above 0",
            given=(self.warmup, self.phase, self.settle, self.last_dense),
            remedy="All are shares of the run.",
        )

    @property
    def num_phases(self) -> int:
        """How many phases a whole run has room for: with fewer updates than that, some phase has none."""
        return math.ceil(1 / self.phase - 1e-9)

    def __call__(self, progress: float) -> float:
        # 1e-9: (0.3 - 0.1) / 0.1 is a hair below 2, and so may be an end of the last dense phase
        p = _clamp(progress)
        if p < self.warmup or self.settle - self.last_dense <= p + 1e-9 < self.settle:
            return 0.0
        return 1.0 if p >= self.settle or int((p - self.warmup) / self.phase + 1e-9) % 2 == 0 else 0.0

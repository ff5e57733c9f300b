"""What every curve keeps to: a plain number for each progress, and a value that prints, compares and pickles."""

import copy
import math
import pickle
from dataclasses import dataclass
from numbers import Real

from dstlib.schedules import Curve
from dstlib.testing.laws import Law, Rules, attempt, expect, hold, laws, world

_POINTS = tuple(i / 100 for i in range(101))


def check_curve(curve: Curve, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Holds a curve to its laws, at 101 points of [0, 1] and beyond; ``low`` and ``high`` are yours to set.

    A drop fraction, a ramp and a surplus lie in [0, 1].

    - *finite*: a plain number, neither NaN nor infinite.
    - *repeatable*: the same number each time, whatever was asked in between, under any global seed.
    - *in range*: from ``low`` to ``high``, both included.
    - *clamped*: progress outside [0, 1] counts as the nearer end.
    - *a value*: it equals its copies, and survives pickling, as workers and saved settings need.

    Raises:
        LawError: The first law that is broken.

    >>> from dstlib.schedules import Cosine, Linear
    >>> check_curve(Cosine(0.3), low=0.0, high=1.0)
    >>> check_curve(Linear(2.0, 0.0), low=0.0, high=1.0)
    Traceback (most recent call last):
    dstlib.testing.laws.LawError: law 'in range' of curve Linear(start=2.0, end=0.0), on progress 0.0: expected a \
number in [0, 1], got 2.0. Drop fractions, ramps and surpluses are shares.
    """
    hold(curve_laws(curve, low=low, high=high))


def curve_laws(curve: Curve, *, low: float = -math.inf, high: float = math.inf) -> tuple[Law, ...]:
    """Returns the laws of :func:`check_curve`, one by one."""
    return laws("curve", curve, LAWS, _Bounded(curve, low, high), on=lambda progress: f"progress {progress}")


@dataclass(frozen=True)
class _Bounded:
    """A curve, and the bounds that its values are to keep."""

    curve: Curve
    low: float
    high: float

    def __call__(self, progress: float) -> float:
        """The value there, once it is known to be a finite number."""
        expected, remedy = "a finite number", "Return a float: a plain number, not a tensor."
        value = attempt(lambda: self.curve(progress), expected, remedy=remedy, law="finite")
        is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        expect(is_number, expected, got=repr(value), remedy=remedy, law="finite")
        return value


def _finite(value_at: _Bounded, progress: float) -> None:
    value_at(progress)


def _repeatable(value_at: _Bounded, points: tuple[float, ...]) -> None:
    with world(0):
        first = {progress: value_at(progress) for progress in points}
    with world(1):
        second = {progress: value_at(progress) for progress in reversed(points)}
    for progress, value in first.items():
        remedy = "Keep nothing between calls and draw nothing: a resumed run asks for fewer points."
        expected, got, on = f"{value}, as before", second[progress], f"progress {progress}"
        expect(got == value, expected, got=got, remedy=remedy, on=on)


def _in_range(value_at: _Bounded, progress: float) -> None:
    low, high, value = value_at.low, value_at.high, value_at(progress)
    remedy = "Drop fractions, ramps and surpluses are shares."
    expect(low <= value <= high, f"a number in [{low:g}, {high:g}]", got=value, remedy=remedy)


def _clamped(value_at: _Bounded, progress: float) -> None:
    end = min(max(progress, 0.0), 1.0)
    wanted, got = value_at(end), value_at(progress)
    remedy = "Begin with progress = min(max(progress, 0.0), 1.0)."
    expect(got == wanted, f"its value at {end:g}, {wanted}", got=got, remedy=remedy)


def _a_value(value_at: _Bounded, what: str) -> None:
    curve, expected = value_at.curve, f"a {what} that equals it"
    remedy = "Write a function, or a @dataclass(frozen=True) with __call__, at the top level of a module; no lambda."
    same = copy.deepcopy if what == "copy" else lambda c: pickle.loads(pickle.dumps(c))
    is_same = attempt(lambda: same(curve), expected, remedy=remedy, on="itself") == curve
    expect(is_same, expected, got="one that differs", remedy=remedy, on="itself")


LAWS: Rules[_Bounded] = {
    _finite: lambda _: (*_POINTS, -0.5, 1.5),
    _repeatable: lambda _: (_POINTS,),
    _in_range: lambda _: _POINTS,
    _clamped: lambda _: (-0.5, 1.5),
    _a_value: lambda _: ("copy", "pickled copy"),
}

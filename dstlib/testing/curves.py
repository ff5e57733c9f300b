"""What every curve keeps to: a plain number for each progress, and a value that prints, compares and pickles."""

import copy
import math
import pickle
from dataclasses import dataclass
from functools import partial
from numbers import Real

from dstlib.schedules import Curve
from dstlib.testing.laws import BreachError, Law, attempt, hold, laws, world

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
    return laws("curve", curve, LAWS, _Bounded(curve, low, high))


@dataclass(frozen=True)
class _Bounded:
    """A curve, and the bounds that its values are to keep."""

    curve: Curve
    low: float
    high: float

    def __call__(self, progress: float) -> float:
        """The value there, once it is known to be a finite number."""
        on, expected, remedy = (
            f"progress {progress}",
            "a finite number",
            "Return a float: a plain number, not a tensor.",
        )
        value = attempt(partial(self.curve, progress), on=on, expected=expected, remedy=remedy, law="finite")
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise BreachError(on=on, expected=expected, got=repr(value), remedy=remedy, law="finite")
        return value


def _finite(value_at: _Bounded) -> None:
    for progress in (*_POINTS, -0.5, 1.5):
        value_at(progress)


def _repeatable(value_at: _Bounded) -> None:
    found = []
    for seed, points in ((0, _POINTS), (1, tuple(reversed(_POINTS)))):
        with world(seed):
            found.append({progress: value_at(progress) for progress in points})
    for progress in _POINTS:
        if found[0][progress] != found[1][progress]:
            expected, got = f"{found[0][progress]}, as before", found[1][progress]
            remedy = "Keep nothing between calls and draw nothing: a resumed run asks for fewer points."
            raise BreachError(on=f"progress {progress}", expected=expected, got=got, remedy=remedy)


def _in_range(value_at: _Bounded) -> None:
    for progress in _POINTS:
        if not value_at.low <= (got := value_at(progress)) <= value_at.high:
            expected = f"a number in [{value_at.low:g}, {value_at.high:g}]"
            remedy = "Drop fractions, ramps and surpluses are shares."
            raise BreachError(on=f"progress {progress}", expected=expected, got=got, remedy=remedy)


def _clamped(value_at: _Bounded) -> None:
    for progress, end in ((-0.5, 0.0), (1.5, 1.0)):
        if (got := value_at(progress)) != value_at(end):
            expected, remedy = (
                f"its value at {end:g}, {value_at(end)}",
                "Begin with progress = min(max(progress, 0.0), 1.0).",
            )
            raise BreachError(on=f"progress {progress}", expected=expected, got=got, remedy=remedy)


def _a_value(value_at: _Bounded) -> None:
    curve = value_at.curve
    remedy = "Write a function, or a @dataclass(frozen=True) with __call__, at the top level of a module; no lambda."
    for what, same in (("copy", copy.deepcopy), ("pickled copy", lambda c: pickle.loads(pickle.dumps(c)))):
        expected = f"a {what} that equals it"
        if attempt(partial(same, curve), on="itself", expected=expected, remedy=remedy) != curve:
            raise BreachError(on="itself", expected=expected, got="one that differs", remedy=remedy)


LAWS = (_finite, _repeatable, _in_range, _clamped, _a_value)

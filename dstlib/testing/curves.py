"""What every curve keeps to: a plain number for each progress, and a value that prints, compares and pickles."""

import copy
import math
import pickle
from functools import partial
from numbers import Real

from dstlib.schedules import Curve
from dstlib.testing.laws import attempt, broken, named, world

_POINTS = tuple(i / 100 for i in range(101))


def check_curve(curve: Curve, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Holds a curve to its laws, at 101 points of [0, 1] and beyond; ``low`` and ``high`` are yours to set.

    A drop fraction, a ramp and a surplus lie in [0, 1].

    - *finite*: a plain number, neither NaN nor infinite.
    - *repeatable*: the same number each time, whatever was asked in between, under any global seed.
    - *in range*: from ``low`` to ``high``, both included.
    - *clamped*: progress outside [0, 1] counts as the nearer end.
    - *a value*: it equals its copies, and survives pickling, as workers and saved settings need.

    Errors: LawError for the first law that is broken.

    >>> from dstlib.schedules import Cosine, Linear
    >>> check_curve(Cosine(0.3), low=0.0, high=1.0)
    >>> check_curve(Linear(2.0, 0.0), low=0.0, high=1.0)
    Traceback (most recent call last):
    dstlib.testing.laws.LawError: law 'in range' of curve Linear(start=2.0, end=0.0), on progress 0.0: expected a \
number in [0, 1], got 2.0. Drop fractions, ramps and surpluses are shares.
    """
    subject = named("curve", curve)
    for progress in (*_POINTS, -0.5, 1.5):
        _check_number(curve, subject, progress)
    _check_repeatable(curve, subject)
    for progress in _POINTS:
        if not low <= curve(progress) <= high:
            expected, remedy = f"a number in [{low:g}, {high:g}]", "Drop fractions, ramps and surpluses are shares."
            on, got = f"progress {progress}", curve(progress)
            raise broken("in range", subject, on=on, expected=expected, got=got, remedy=remedy)
    for progress, end in ((-0.5, 0.0), (1.5, 1.0)):
        if curve(progress) != curve(end):
            expected, got = f"its value at {end:g}, {curve(end)}", curve(progress)
            remedy = "Begin with progress = min(max(progress, 0.0), 1.0)."
            raise broken("clamped", subject, on=f"progress {progress}", expected=expected, got=got, remedy=remedy)
    _check_value(curve, subject)


def _check_number(curve: Curve, subject: str, progress: float) -> None:
    on, remedy = f"progress {progress}", "Return a float: a plain number, not a tensor."
    expected = "a finite number"
    value = attempt(lambda: curve(progress), "finite", subject, on=on, expected=expected, remedy=remedy)
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise broken("finite", subject, on=on, expected=expected, got=repr(value), remedy=remedy)


def _check_repeatable(curve: Curve, subject: str) -> None:
    found = []
    for seed, points in ((0, _POINTS), (1, tuple(reversed(_POINTS)))):
        with world(seed):
            found.append({progress: curve(progress) for progress in points})
    for progress in _POINTS:
        if found[0][progress] != found[1][progress]:
            expected, got = f"{found[0][progress]}, as before", found[1][progress]
            remedy = "Keep nothing between calls and draw nothing: a resumed run asks for fewer points."
            raise broken("repeatable", subject, on=f"progress {progress}", expected=expected, got=got, remedy=remedy)


def _check_value(curve: Curve, subject: str) -> None:
    remedy = "Write a function, or a @dataclass(frozen=True) with __call__, at the top level of a module; no lambda."
    for what, same in (("copy", copy.deepcopy), ("pickled copy", _pickled)):
        expected = f"a {what} that equals it"
        call = partial(same, curve)
        found = attempt(call, "a value", subject, on="itself", expected=expected, remedy=remedy)
        if found != curve:
            raise broken("a value", subject, on="itself", expected=expected, got="one that differs", remedy=remedy)


def _pickled(curve: Curve) -> Curve:
    found: Curve = pickle.loads(pickle.dumps(curve))
    return found

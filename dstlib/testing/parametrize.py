"""Laws as test cases: one for each value and law, named after both."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from dstlib.errors import SettingError
from dstlib.masking import Granularity
from dstlib.methods.method import Method
from dstlib.testing.allocators import allocator_laws
from dstlib.testing.criteria import criterion_laws
from dstlib.testing.curves import curve_laws
from dstlib.testing.distributions import distribution_laws
from dstlib.testing.granularities import granularity_laws
from dstlib.testing.laws import Law
from dstlib.testing.methods import method_laws

BY_ARGUMENT: dict[str, Callable[[Any], tuple[Law, ...]]] = {
    "site": criterion_laws,
    "progress": curve_laws,
    "shapes": distribution_laws,
    "accounts": allocator_laws,
}  # what a function is, by the name of its first argument


def laws_of(value: Any) -> tuple[Law, ...]:
    """Returns all laws of a criterion, granularity, distribution, curve, allocator or method, to be called one by one.

    A function is told by its first argument: a criterion takes ``site``, a curve ``progress``, a distribution
    ``shapes``, an allocator ``accounts``. For one with other names, and for the options of a kind, there are
    ``criterion_laws``, ``curve_laws(curve, low=0, high=1)`` and so on, with the arguments of ``check_curve``.

    Raises:
        SettingError: The value is of no kind that can be told.

    >>> import dstlib
    >>> [law.name for law in laws_of(dstlib.erk)]
    ['every name', 'in range', 'repeatable', 'total', 'monotone', 'dense is dense']
    >>> print(laws_of(dstlib.RIGL)[0])
    method 'rigl': whole units
    """
    if isinstance(value, Method):
        return method_laws(value)
    if isinstance(value, Granularity):
        return granularity_laws(value)
    first = next(iter(inspect.signature(value).parameters), "") if callable(value) else ""
    if first not in BY_ARGUMENT:
        raise SettingError.of(
            "kind",
            f"laws_of({value!r})",
            allowed=f"a Method, a granularity, or a function whose first argument is {', '.join(BY_ARGUMENT)}",
            given=f"a function of {first or 'nothing'}" if callable(value) else type(value).__name__,
            remedy="Pass its laws instead: criterion_laws(f), curve_laws(f), ...",
        )
    return BY_ARGUMENT[first](value)


def parametrize_with_laws(values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test into one test for each law of each value, for pytest.

    Every law that is broken fails by its own name, where ``check_criterion`` and its kin stop at the first. Laws among
    the values stay as they are.

    >>> import dstlib
    >>> from dstlib.schedules import Linear
    >>> @parametrize_with_laws([dstlib.masking.magnitude, *curve_laws(Linear(0.3), low=0, high=1)])
    ... def test_laws(law):
    ...     law()
    """
    import pytest

    laws = [law for value in values for law in ([value] if isinstance(value, Law) else laws_of(value))]
    return pytest.mark.parametrize("law", laws, ids=str)

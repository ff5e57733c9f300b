"""Counts: shares become whole numbers here, and nowhere else is a density or a fraction rounded."""

import math
from collections.abc import Mapping

# A decimal such as 0.29 lies a hair below itself in binary, and 0.29 · 100 must still be 29: products are
# nudged up by this factor before rounding down. It is far above the rounding error of a float (1e-16) and
# moves no count unless the product comes within a millionth of a millionth of the next integer.
NUDGE = 1 + 1e-12


def round_down(product: float) -> int:
    """Returns the largest whole number up to a product of a count and a decimal share.

    >>> int(0.29 * 100), round_down(0.29 * 100)
    (28, 29)
    """
    return math.floor(product * NUDGE)


def round_up(product: float) -> int:
    """Returns the smallest whole number from a product of a count and a decimal share up.

    >>> import math
    >>> math.ceil(0.55 * 100), round_up(0.55 * 100)
    (56, 55)
    """
    return math.ceil(product / NUDGE)


def whole_if_near(product: float) -> float:
    """Returns a product of a count and a decimal share; a whole number where binary fractions alone keep it from one.

    >>> whole_if_near(0.57 * 100), whole_if_near(0.75 * 999)
    (57, 749.25)
    """
    nearest = round(product)
    return nearest if abs(product - nearest) <= nearest * (NUDGE - 1) else product


def num_units(num_total: int, density: float) -> int:
    """Counts the active units out of ``num_total``: the nearest integer, halves up, and at least one.

    >>> num_units(4608, 0.1), num_units(10, 0.25), num_units(10, 0.0)
    (461, 3, 1)
    """
    return min(max(math.floor(num_total * density * NUDGE + 0.5), 1), num_total)


def apportion(
    num: int, shares: Mapping[str, float], caps: Mapping[str, int], *, floors: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Splits ``num`` into whole numbers that add up to it, as near to proportional to ``shares`` as can be.

    None exceeds its cap: what a capped one leaves goes to the others, again by their shares. None falls below its
    floor, which is part of what its share gives it, not on top. Remainders go to the largest, ties to the earlier name.
    A negative share counts as zero; where all shares left are zero, the caps stand in for them. Whole numbers
    throughout, so shares may be as large or small as floats can be.

    >>> apportion(10, {"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 4, "b": 100, "c": 100})
    {'a': 4, 'b': 3, 'c': 3}
    >>> apportion(10, {"a": 8.0, "b": 2.0}, {"a": 9, "b": 9}, floors={"a": 0, "b": 1})
    {'a': 8, 'b': 2}
    """
    floors = dict.fromkeys(caps, 0) if floors is None else floors
    fits = all(floors[name] <= cap for name, cap in caps.items()) and sum(floors.values()) <= num <= sum(caps.values())
    assert fits, "no way to split"
    parts = _in_whole({name: max(shares[name], 0.0) for name in caps})
    fixed: dict[str, int] = {}
    while len(fixed) < len(caps):
        free = {name: parts[name] for name in caps if name not in fixed}
        if not any(free.values()):
            free = {name: max(caps[name], 1) for name in free}
        rest = num - sum(fixed.values())
        bounds = _beyond(rest, free, caps, floors)
        if not bounds:
            fixed |= _largest_remainders(rest, free)
        fixed |= bounds
    return {name: fixed[name] for name in caps}


def _in_whole(shares: Mapping[str, float]) -> dict[str, int]:
    """Returns the same ratios as whole numbers, exactly: the denominator of a float is a power of two."""
    ratios = {name: share.as_integer_ratio() for name, share in shares.items()}
    unit = max((denominator for _, denominator in ratios.values()), default=1)
    return {name: numerator * (unit // denominator) for name, (numerator, denominator) in ratios.items()}


def _beyond(rest: int, free: Mapping[str, int], caps: Mapping[str, int], floors: Mapping[str, int]) -> dict[str, int]:
    """Returns those that a proportional split takes to a bound or past it, at that bound; empty where there is none.

    If it takes too many units past the caps, the others get more, and those at their caps stay there for good;
    if too few to reach the floors, the others get less, and those stay for good.
    """
    total = sum(free.values())
    over = {name: rest * part - caps[name] * total for name, part in free.items()}
    under = {name: floors[name] * total - rest * part for name, part in free.items()}
    balance = sum(max(x, 0) for x in over.values()) - sum(max(x, 0) for x in under.values())
    full = {name: caps[name] for name, x in over.items() if x >= 0} if balance >= 0 else {}
    low = {name: floors[name] for name, x in under.items() if x > 0} if balance <= 0 else {}
    return low | full


def _largest_remainders(rest: int, free: Mapping[str, int]) -> dict[str, int]:
    total = sum(free.values())
    whole = {name: rest * part // total for name, part in free.items()}
    by_remainder = sorted(free, key=lambda name: -(rest * free[name] % total))
    for name in by_remainder[: rest - sum(whole.values())]:
        whole[name] += 1
    return whole

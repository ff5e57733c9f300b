"""From shares to whole numbers: the only place where a density or a fraction is rounded."""

import math

# A decimal such as 0.29 lies a hair below itself in binary, and 0.29 · 100 must still be 29: products are
# nudged up by this factor before rounding down. It is far above the rounding error of a float (1e-16) and
# moves no count unless the product comes within a millionth of a millionth of the next integer.
NUDGE = 1 + 1e-12


def round_down(product: float) -> int:
    """The largest whole number up to a product of a count and a decimal share.

    >>> int(0.29 * 100), round_down(0.29 * 100)
    (28, 29)
    """
    return math.floor(product * NUDGE)


def num_units(num_total: int, density: float) -> int:
    """The number of active units out of ``num_total``: the nearest integer, halves up, and at least one.

    >>> num_units(4608, 0.1), num_units(10, 0.25), num_units(10, 0.0)
    (461, 3, 1)
    """
    return min(max(math.floor(num_total * density * NUDGE + 0.5), 1), num_total)

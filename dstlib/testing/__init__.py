"""Checks for your own criteria, granularities, distributions, curves, allocators and methods.

Each raises a :class:`LawError` for the first law that is broken: which one, on which input, what was expected and
what to do. They depend on torch and NumPy alone and are deterministic, so that your tests may call them:

>>> from dstlib.testing import check_criterion
>>> check_criterion(lambda site: site.weight.abs() * site.grad.abs())
"""

from dstlib.testing.allocators import check_allocator
from dstlib.testing.criteria import check_criterion
from dstlib.testing.curves import check_curve
from dstlib.testing.distributions import check_distribution
from dstlib.testing.granularities import check_granularity
from dstlib.testing.laws import LawError
from dstlib.testing.methods import check_method

__all__ = [
    "LawError",
    "check_allocator",
    "check_criterion",
    "check_curve",
    "check_distribution",
    "check_granularity",
    "check_method",
]

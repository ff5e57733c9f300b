"""Checks for your own criteria, granularities, distributions, curves, allocators and methods.

Each holds a value to the laws of its kind and raises a :class:`LawError` for the first that is broken: which one, on
which input, what was expected and what to do. They depend on torch and NumPy alone and are deterministic, so that your
tests may call them:

>>> from dstlib.testing import check_criterion
>>> check_criterion(lambda site: site.weight.abs() * site.grad.abs())

Under pytest, :func:`parametrize_with_laws` makes each law a test of its own, so that all that are broken are seen.
"""

from dstlib.testing.allocators import allocator_laws, check_allocator
from dstlib.testing.criteria import check_criterion, criterion_laws
from dstlib.testing.curves import check_curve, curve_laws
from dstlib.testing.distributions import check_distribution, distribution_laws
from dstlib.testing.granularities import check_granularity, granularity_laws
from dstlib.testing.laws import Law, LawError
from dstlib.testing.methods import check_method, method_laws
from dstlib.testing.parametrize import laws_of, parametrize_with_laws

__all__ = [
    "Law",
    "LawError",
    "allocator_laws",
    "check_allocator",
    "check_criterion",
    "check_curve",
    "check_distribution",
    "check_granularity",
    "check_method",
    "criterion_laws",
    "curve_laws",
    "distribution_laws",
    "granularity_laws",
    "laws_of",
    "method_laws",
    "parametrize_with_laws",
]

"""Which parameters can be sparse, which are asked for, and the matrices that each one holds."""

from dstlib.targets.coverage import coverage, shortfall
from dstlib.targets.eligibility import Weight
from dstlib.targets.selection import Masked, check_matches, find_weights, plain_name, select, unwrap
from dstlib.targets.views import MatrixView

__all__ = [
    "Masked",
    "MatrixView",
    "Weight",
    "check_matches",
    "coverage",
    "find_weights",
    "plain_name",
    "select",
    "shortfall",
    "unwrap",
]

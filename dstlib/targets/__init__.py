"""Which parameters can be sparse, which are asked for, and the matrices that each one holds."""

from dstlib.targets.compact_state import mask_key
from dstlib.targets.coverage import coverage, example_axes, shortfall, unknown_axes
from dstlib.targets.eligibility import Weight
from dstlib.targets.held import Held, HoldsActive, held_weights, plain_kind, plain_state, without_data
from dstlib.targets.outputs import PassWatch, is_hooked
from dstlib.targets.outside import BELONGING, describe_outside, find_masked, find_outside, refuse_outside
from dstlib.targets.products import moments_in_turn
from dstlib.targets.selection import (
    EXCLUDED,
    NOT_INCLUDED,
    WITHOUT_MASK,
    Masked,
    check_matches,
    check_matches_sparse,
    find_weights,
    plain_name,
    select,
    unwrap,
)
from dstlib.targets.views import MatrixView

__all__ = [
    "BELONGING",
    "EXCLUDED",
    "NOT_INCLUDED",
    "WITHOUT_MASK",
    "Held",
    "HoldsActive",
    "Masked",
    "MatrixView",
    "PassWatch",
    "Weight",
    "check_matches",
    "check_matches_sparse",
    "coverage",
    "describe_outside",
    "example_axes",
    "find_masked",
    "find_outside",
    "find_weights",
    "held_weights",
    "is_hooked",
    "mask_key",
    "moments_in_turn",
    "plain_kind",
    "plain_name",
    "plain_state",
    "refuse_outside",
    "select",
    "shortfall",
    "unknown_axes",
    "unwrap",
    "without_data",
]

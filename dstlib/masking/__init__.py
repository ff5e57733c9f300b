"""Which units: pure functions of tensors. Knows no module, no optimizer, no process group."""

from dstlib.masking.counts import num_units, round_down
from dstlib.masking.criteria import gradient, magnitude, magnitude_l2, momentum, random, sign_balanced
from dstlib.masking.distribution import Distribution, er, erk, uniform, uniform_dense_first
from dstlib.masking.granularity import NM, Block, Channel, Element, FanIn, Granularity, Kernel
from dstlib.masking.grown import GrownInit, uniform_fan_out, zeros
from dstlib.masking.selection import select_top
from dstlib.masking.site import Criterion, Site, site_generator
from dstlib.masking.update import MaskUpdate, unit_mask, update_mask

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Criterion",
    "Distribution",
    "Element",
    "FanIn",
    "Granularity",
    "GrownInit",
    "Kernel",
    "MaskUpdate",
    "Site",
    "er",
    "erk",
    "gradient",
    "magnitude",
    "magnitude_l2",
    "momentum",
    "num_units",
    "random",
    "round_down",
    "select_top",
    "sign_balanced",
    "site_generator",
    "uniform",
    "uniform_dense_first",
    "uniform_fan_out",
    "unit_mask",
    "update_mask",
    "zeros",
]

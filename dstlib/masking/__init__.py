"""Which units: pure functions of tensors. Knows no module, no optimizer, no process group."""

from dstlib.masking.allocation import AdaptiveThreshold, GlobalRank, NeuronAblation, global_units, lamp, momentum_share
from dstlib.masking.budget import Account, Allocation, Allocator, Budget, Terms, spend
from dstlib.masking.counts import num_units, round_down
from dstlib.masking.criteria import (
    Drawn,
    WeightAndGradient,
    gradient,
    magnitude,
    magnitude_l2,
    momentum,
    moved,
    plain_gradient,
    random,
    relative_importance,
    saliency,
    sign_balanced,
    traced,
    traced_magnitude,
)
from dstlib.masking.distribution import Distribution, er, erk, uniform, uniform_dense_first
from dstlib.masking.first import AtInit, falling
from dstlib.masking.granularity import NM, Block, Channel, Element, FanIn, Granularity, Kernel
from dstlib.masking.grown import GrownInit, NormalFanIn, stored, uniform_fan_in, uniform_fan_out, zeros
from dstlib.masking.links import link_prediction, link_prediction_l3
from dstlib.masking.sampling import Sampled, SampledRemoval
from dstlib.masking.selection import select_top
from dstlib.masking.site import Criterion, Site, site_generator
from dstlib.masking.storage import DenseStorage, OverDensity
from dstlib.masking.trace import Trace
from dstlib.masking.update import MaskUpdate, exchange, unit_mask, unit_score, update_mask

__all__ = [
    "NM",
    "Account",
    "AdaptiveThreshold",
    "Allocation",
    "Allocator",
    "AtInit",
    "Block",
    "Budget",
    "Channel",
    "Criterion",
    "DenseStorage",
    "Distribution",
    "Drawn",
    "Element",
    "FanIn",
    "GlobalRank",
    "Granularity",
    "GrownInit",
    "Kernel",
    "MaskUpdate",
    "NeuronAblation",
    "NormalFanIn",
    "OverDensity",
    "Sampled",
    "SampledRemoval",
    "Site",
    "Terms",
    "Trace",
    "WeightAndGradient",
    "er",
    "erk",
    "exchange",
    "falling",
    "global_units",
    "gradient",
    "lamp",
    "link_prediction",
    "link_prediction_l3",
    "magnitude",
    "magnitude_l2",
    "momentum",
    "momentum_share",
    "moved",
    "num_units",
    "plain_gradient",
    "random",
    "relative_importance",
    "round_down",
    "saliency",
    "select_top",
    "sign_balanced",
    "site_generator",
    "spend",
    "stored",
    "traced",
    "traced_magnitude",
    "uniform",
    "uniform_dense_first",
    "uniform_fan_in",
    "uniform_fan_out",
    "unit_mask",
    "unit_score",
    "update_mask",
    "zeros",
]

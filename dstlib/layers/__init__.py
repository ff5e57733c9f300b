"""Plain modules that do not know they are sparse: shifts, fixed and learned, E2ENet's Unit and fusion node.

And :func:`add_depth_shift`, which gives the shift to other 3D networks.
"""

from dstlib.layers.blocks import FusionNode, Unit
from dstlib.layers.plugin import ShiftedConv3d, Shifting, add_depth_shift
from dstlib.layers.shift import LearnedShift, Shift, learned_shift, shift

__all__ = [
    "FusionNode",
    "LearnedShift",
    "Shift",
    "ShiftedConv3d",
    "Shifting",
    "Unit",
    "add_depth_shift",
    "learned_shift",
    "shift",
]

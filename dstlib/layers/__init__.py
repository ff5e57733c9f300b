"""Plain modules that do not know they are sparse: the depth shift, the Unit, the fusion node."""

from dstlib.layers.blocks import Unit
from dstlib.layers.fusion import FusionNode
from dstlib.layers.shift import Shift, shift

__all__ = ["FusionNode", "Shift", "Unit", "shift"]

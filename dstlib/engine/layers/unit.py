"""Units on the engine: shift, convolution, norm and activation as one operation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dstlib.engine.layers.conv import obstacle_to_conv
from dstlib.engine.layers.fast_layer import FastLayer, three
from dstlib.engine.layers.feature_map import Pending, feature_map
from dstlib.engine.layers.kernels import FollowsKernels
from dstlib.engine.ops.conv import Geometry, unit
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.layers.blocks import Unit
from dstlib.layers.shift import Shift, channel_moves


class FastUnit(FollowsKernels):
    """A :class:`~dstlib.layers.Unit` as one operation, whose norm and activation its readers apply."""

    def __init__(self, plain: Unit) -> None:
        super().__init__(plain.conv.weight)
        self.shift, self.conv, self.norm, self.activation = plain.shift, plain.conv, plain.norm, plain.activation
        sizes = plain.shift.sizes if isinstance(plain.shift, Shift) else (0,)
        self.geometry = Geometry(channel_moves(plain.conv.in_channels, sizes), three(plain.conv.stride))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # it is registered as the convolution's
        """The weight of the convolution."""
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, H / stride, W / stride)."""
        return Pending.of(self.fuse([feature_map(x)]))

    def fuse(self, sources: Sequence[FeatureMap]) -> FeatureMap:
        """Computes the unit on the concatenation of maps."""
        parts: dict[str, Any] = self._modules  # where attributes that are modules are found at once
        weights, norm = self.weights(parts["conv"]._parameters["bias"]), parts["norm"]
        affine = norm._parameters["weight"], norm._parameters["bias"], norm.eps
        return unit(sources, weights, self.geometry, affine, parts["activation"].negative_slope)


def obstacle_to_unit(unit: nn.Module) -> str | None:
    """Tells why the engine cannot compute a unit; None where it can."""
    return obstacle_around_conv(unit) or obstacle_to_conv(unit.get_submodule("conv"))


def obstacle_around_conv(unit: nn.Module) -> str | None:
    """Tells why all but the convolution of a unit cannot be computed with it; None where it can."""
    if not isinstance(unit, Unit):
        return f"it has a {type(unit).__name__} for a unit"
    norm, slope = unit.norm, getattr(unit.activation, "negative_slope", None)
    if not isinstance(unit.norm, nn.InstanceNorm3d) or not norm.affine or norm.track_running_stats:
        return "its norm is not an affine instance norm"
    if not isinstance(unit.activation, nn.LeakyReLU) or slope is None or not 0 <= slope <= 1:
        return "its activation is not a leaky ReLU with a slope from 0 to 1"
    if unit.shift is not None and not (isinstance(unit.shift, Shift) and unit.shift.axis in (2, -3)):
        return "its shift is learned, or not along depth"
    return None


UNIT = FastLayer(Unit, obstacle_to_unit, FastUnit)

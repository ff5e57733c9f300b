"""Units on the engine: shift, convolution, norm and activation as one operation."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dstlib.engine.layers.compact_conv import CompactConv3d
from dstlib.engine.layers.conv import geometry, obstacle_to_conv
from dstlib.engine.layers.fast_layer import (
    FastLayer,
    become,
    obstacle_of_parts,
    obstacle_to_weight,
    state_of_parameters,
)
from dstlib.engine.layers.feature_map import Pending, feature_map
from dstlib.engine.layers.kernels import FollowsKernels, state_of_conv, watch_kernels
from dstlib.engine.ops.conv import Affine, Geometry, unit
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.patterns import Weights
from dstlib.layers.blocks import Unit
from dstlib.layers.shift import Shift, channel_moves

_CONVS = (nn.Conv3d, CompactConv3d)
_OTHERS = (nn.InstanceNorm3d, nn.LeakyReLU)


class FastUnit(FollowsKernels, Unit):
    """A :class:`~dstlib.layers.Unit` as one operation, whose norm and activation its readers apply."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, H / stride, W / stride)."""
        y: Tensor = self.run(x)
        return y

    def compute(self, plan: Geometry, x: Tensor) -> Tensor:
        """Computes it on the engine."""
        return Pending.of(self.fuse(plan, [feature_map(x)]))

    def fuse(self, plan: Geometry, sources: Sequence[FeatureMap]) -> FeatureMap:
        """Computes the unit on the concatenation of maps."""
        return unit(sources, *self.settings(plan))

    def settings(self, plan: Geometry) -> tuple[Weights, Geometry, Affine, float]:
        """Returns what the unit computes with besides maps."""
        parts: dict[str, Any] = self._modules  # where attributes that are modules are found at once
        norm = parts["norm"]
        affine = norm._parameters["weight"], norm._parameters["bias"], norm.eps
        return self.weights(parts["conv"]), plan, affine, parts["activation"].negative_slope

    def followed(self) -> Any:
        """Returns the weight of the convolution."""
        return self.conv._parameters.get("weight")

    def state(self) -> tuple[object, ...]:
        """Returns what the plan depends on."""
        get: Any = self._modules.get
        shift, conv, norm, activation = get("shift"), get("conv"), get("norm"), get("activation")
        kinds = (norm.__class__, activation.__class__)
        if kinds != _OTHERS or conv.__class__ not in _CONVS:
            return conv.__class__, *kinds
        affine = norm._parameters
        return (
            shift,
            None if shift is None else (shift.__class__, getattr(shift, "sizes", None), getattr(shift, "axis", None)),
            obstacle_of_parts(shift, conv, norm, activation),
            norm.affine,
            norm.track_running_stats,
            *state_of_parameters(affine.get("weight"), affine.get("bias")),
            activation.negative_slope,
            *state_of_conv(conv),
        )

    def obstacle(self) -> str | None:
        """Tells why the engine cannot compute the unit as it is now; None where it can."""
        return obstacle_to_unit(self)

    def make_plan(self) -> Geometry:
        """Returns what the unit's convolution does besides its weight."""
        sizes = self.shift.sizes if isinstance(self.shift, Shift) else (0,)
        return geometry(self.conv, channel_moves(self.conv.in_channels, sizes))


def obstacle_to_unit(unit: nn.Module) -> str | None:
    """Tells why the engine cannot compute a unit; None where it can."""
    if reason := obstacle_around_conv(unit):
        return reason
    conv = unit.get_submodule("conv")
    of_conv = obstacle_to_weight(conv) if type(conv) is CompactConv3d else obstacle_to_conv(conv)
    return obstacle_to_weight(unit.get_submodule("norm")) or of_conv


def obstacle_around_conv(unit: nn.Module) -> str | None:
    """Tells why all but the convolution of a unit cannot be computed with it; None where it can."""
    if type(unit) not in (Unit, FastUnit):
        return f"it is, or has for a unit, a {type(unit).__name__}"
    assert isinstance(unit, Unit)
    norm, slope = unit.norm, getattr(unit.activation, "negative_slope", None)
    if type(norm) is not nn.InstanceNorm3d or not norm.affine or norm.track_running_stats:
        return "its norm is not an affine instance norm"
    if not all(type(norm._parameters.get(name)) in (nn.Parameter, Tensor) for name in ("weight", "bias")):
        return "its norm has no parameters of its own"
    if type(unit.activation) is not nn.LeakyReLU or slope is None or not 0 <= slope <= 1:
        return "its activation is not a leaky ReLU with a slope from 0 to 1"
    if unit.shift is not None and not (type(unit.shift) is Shift and unit.shift.axis in (2, -3)):
        return "its shift is learned, or not along depth"
    return obstacle_of_parts(unit.shift, unit.conv, norm, unit.activation)


def make_unit(unit: Unit) -> FastUnit:
    """Gives a unit its fast form."""
    return become(unit, FastUnit, watch_kernels())


UNIT = FastLayer(Unit, obstacle_to_unit, make_unit)

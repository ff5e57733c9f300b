"""Transposed convolutions on the engine."""

from torch import Tensor, nn

from dstlib.engine.layers.compact_conv_transpose import CompactConvTranspose3d
from dstlib.engine.layers.fast_layer import become, obstacle_to_weight, three
from dstlib.engine.layers.feature_map import feature_map
from dstlib.engine.layers.kernels import FollowsKernels, state_of_conv, watch_kernels
from dstlib.engine.ops.conv import Triple
from dstlib.engine.ops.conv_transpose import conv_transpose
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import to_channels_first


class FastConvTranspose(FollowsKernels, nn.ConvTranspose3d):
    """An ``nn.ConvTranspose3d`` whose kernel is its stride, without bias."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, D, H, W) → (N, O, D · stride, H · stride, W · stride); another ``output_size`` is torch's."""
        y: Tensor = self.run(input) if output_size is None else super().forward(input, output_size)
        return y

    def compute(self, plan: Triple, input: Tensor) -> Tensor:
        """Computes it on the engine."""
        return to_channels_first(self.refine(plan, feature_map(input)).raw)

    def refine(self, plan: Triple, x: FeatureMap) -> FeatureMap:
        """Computes the finer map."""
        return conv_transpose(x, self.weights(self), plan)

    def state(self) -> tuple[object, ...]:
        """Returns what the plan depends on."""
        return (*state_of_conv(self), self.output_padding)

    def obstacle(self) -> str | None:
        """Tells why the engine cannot compute the layer as it is now; None where it can."""
        return obstacle_to_upward(self)

    def make_plan(self) -> Triple:
        """Returns the stride."""
        return three(self.stride)


def obstacle_to_upward(layer: nn.ConvTranspose3d) -> str | None:
    """Tells why the engine cannot compute a transposed convolution as it is set; None where it can."""
    if reason := obstacle_to_weight(layer):
        return reason
    if isinstance(layer, CompactConvTranspose3d):
        return "it has a bias" if layer.bias is not None else None
    sizes = layer.kernel_size == layer.stride == tuple(layer._parameters["weight"].shape[2:])  # type: ignore[union-attr]
    plain = layer.groups == 1 and not any((*layer.padding, *layer.output_padding)) and set(layer.dilation) == {1}
    if layer._parameters["bias"] is not None or not sizes or not plain or layer.padding_mode != "zeros":
        return "it is not a transposed convolution by its stride"
    return None


class FastActiveUpward(FastConvTranspose, CompactConvTranspose3d):  # type: ignore[misc]  # output_size as a list
    """A transposed convolution on the engine that holds its active kernels alone."""


def make_upward(layer: nn.ConvTranspose3d) -> FastConvTranspose:
    """Gives a transposed convolution its fast form."""
    kind = FastActiveUpward if isinstance(layer, CompactConvTranspose3d) else FastConvTranspose
    return become(layer, kind, watch_kernels(transposed=True))

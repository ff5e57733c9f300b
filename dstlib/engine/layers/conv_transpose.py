"""Transposed convolutions on the engine."""

from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import three
from dstlib.engine.layers.feature_map import feature_map
from dstlib.engine.layers.kernels import FollowsKernels
from dstlib.engine.ops.conv_transpose import conv_transpose
from dstlib.engine.ops.feature_map import FeatureMap


class FastConvTranspose(FollowsKernels):
    """An ``nn.ConvTranspose3d`` whose kernel is its stride, without bias."""

    def __init__(self, plain: nn.ConvTranspose3d) -> None:
        super().__init__(plain.weight, transposed=True)
        self.weight, self.stride = plain.weight, three(plain.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D · stride, H · stride, W · stride)."""
        return self.refine(feature_map(x)).raw

    def refine(self, x: FeatureMap) -> FeatureMap:
        """Computes the finer map."""
        return conv_transpose(x, self.weights(None), self.stride)

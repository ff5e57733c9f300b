"""Convolutions of two axes on the engine."""

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import FastLayer, three
from dstlib.engine.layers.feature_map import feature_map
from dstlib.engine.layers.kernels import FollowsKernels
from dstlib.engine.ops.conv import Geometry, conv
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import to_channels_first


class FastConv(FollowsKernels):
    """A convolution of two axes: ``nn.Conv2d``, or ``nn.Conv3d`` with a kernel that is flat along depth."""

    def __init__(self, plain: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(plain.weight)
        self.weight, self.bias = plain.weight, plain.bias
        self.geometry = Geometry(torch.zeros(plain.in_channels, dtype=torch.int32), three(plain.stride))
        self.num_axes = len(plain.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, ...), or (N, C, H, W), whose samples then take the place of depths.

        Without N, one sample.
        """
        if input.ndim == self.num_axes + 1:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        flat = self.num_axes == 2
        source = FeatureMap(input.transpose(0, 1).unsqueeze(0)) if flat else feature_map(input)
        y = to_channels_first(conv([source], self.weights(self.bias), self.geometry).raw)
        return y.squeeze(0).transpose(0, 1) if flat else y


def obstacle_to_conv(conv: nn.Module) -> str | None:
    """Tells why the engine cannot compute a convolution; None where it can."""
    if type(conv) not in (nn.Conv2d, nn.Conv3d):
        return f"it is a {type(conv).__name__}"
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    *depth, height, width = conv.kernel_size
    half = tuple(n // 2 for n in conv.kernel_size)
    if any(n != 1 for n in depth) or (height, width) not in ((1, 1), (3, 3)):
        return f"its kernel is {conv.kernel_size}"
    if conv.groups != 1 or any(n != 1 for n in conv.dilation) or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding other than zeros"
    return None if conv.padding == half else "its padding is not half its kernel"


CONV = FastLayer(nn.Conv2d | nn.Conv3d, obstacle_to_conv, FastConv)

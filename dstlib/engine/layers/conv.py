"""Convolutions of two axes on the engine."""

from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import FastLayer, become, obstacle_to_weight, three
from dstlib.engine.layers.feature_map import Pending, feature_map
from dstlib.engine.layers.kernels import FollowsKernels, state_of_conv, watch_kernels
from dstlib.engine.ops.conv import Geometry, conv
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import to_channels_first, to_images
from dstlib.engine.ops.patterns import Weights


class FastConv(FollowsKernels):
    """A convolution of two axes: ``nn.Conv2d``, or ``nn.Conv3d`` with a kernel that is flat along depth."""

    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, ...), or (N, C, H, W), whose samples then take the place of depths.

        Without N, one sample.
        """
        y: Tensor = self.run(input)
        return y

    def takes(self, *inputs: Any) -> bool:
        """Tells whether the engine computes on an input with so many axes: on samples, or on one without N."""
        num_axes, (x,) = len(self.kernel_size), inputs
        return type(x) is Pending or x.ndim == num_axes + 1 or (x.ndim == num_axes + 2 and len(x) > 0)

    def compute(self, plan: Geometry, input: Tensor) -> Tensor:
        """Computes it on the engine."""
        return convolved(self.weights(self), plan, input, len(self.kernel_size))

    def state(self) -> tuple[object, ...]:
        """Returns what the plan depends on."""
        return state_of_conv(self)

    def obstacle(self) -> str | None:
        """Tells why the engine cannot compute the layer as it is now; None where it can."""
        return obstacle_to_settings(self)

    def make_plan(self) -> Geometry:
        """Returns what the convolution does besides its weight."""
        return geometry(self)


def convolved(weights: Weights, plan: Geometry, input: Tensor, num_axes: int) -> Tensor:
    """Computes a convolution of images (N, C, H, W) or volumes (N, C, D, H, W), or of one sample without N."""
    if input.ndim == num_axes + 1:
        return convolved(weights, plan, input.unsqueeze(0), num_axes).squeeze(0)
    y = conv([mapped(input, num_axes)], weights, plan).raw
    return to_images(y) if num_axes == 2 else to_channels_first(y)


def mapped(input: Tensor, num_axes: int) -> FeatureMap:
    """Returns the map of images, whose samples take the place of depths, or of volumes."""
    return FeatureMap(input.transpose(0, 1).unsqueeze(0)) if num_axes == 2 else feature_map(input)


class FastConv2d(FastConv, nn.Conv2d):
    """An ``nn.Conv2d`` on the engine."""


class FastConv3d(FastConv, nn.Conv3d):
    """An ``nn.Conv3d`` on the engine."""


def obstacle_to_conv(conv: nn.Module) -> str | None:
    """Tells why the engine cannot compute a convolution; None where it can."""
    return obstacle_to_settings(conv) if type(conv) in (nn.Conv2d, nn.Conv3d) else f"it is a {type(conv).__name__}"


def obstacle_to_settings(conv: Any) -> str | None:
    """Tells why the engine cannot compute a convolution with such parameters and settings; None where it can."""
    if reason := obstacle_to_weight(conv):
        return reason
    *depth, height, width = conv.kernel_size
    half = tuple(n // 2 for n in conv.kernel_size)
    if any(n != 1 for n in depth) or (height, width) not in ((1, 1), (3, 3)):
        return f"its kernel is {conv.kernel_size}"
    if conv.groups != 1 or any(n != 1 for n in conv.dilation) or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding other than zeros"
    if tuple(conv._parameters["weight"].shape[2:]) != tuple(conv.kernel_size):
        return "its weight has another kernel than it says"
    return None if conv.padding == half else "its padding is not half its kernel"


def geometry(conv: Any, shifts: Tensor | None = None) -> Geometry:
    """Returns what a convolution does besides its weight; no channel moves unless ``shifts`` (C) say so."""
    if shifts is None:
        shifts = torch.zeros(conv._parameters["weight"].shape[1], dtype=torch.int32)
    return Geometry(shifts, three(conv.stride))


def _make(conv: nn.Module) -> FastConv:
    return become(conv, FastConv2d if isinstance(conv, nn.Conv2d) else FastConv3d, watch_kernels())


CONV = FastLayer(nn.Conv2d | nn.Conv3d, obstacle_to_conv, _make)

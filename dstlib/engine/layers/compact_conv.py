"""Convolutions of two axes that hold their active kernels only.

Shapes: N batch, C input channels, O output channels, D, H, W depth, height, width, A active kernels.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight, conv3d_weight

from dstlib.engine.layers.active_kernels import ActiveKernels
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.layers.conv import convolved, geometry, mapped
from dstlib.engine.ops.conv import Geometry, active_gradient
from dstlib.engine.ops.patterns import Pattern, Weights


class ActiveConvKernels(ActiveKernels):
    """The active kernels (A, *taps), row by row, of a convolution that is not transposed."""

    is_spread = is_transposed = False
    pattern: Pattern
    layer: Any  # a CompactConv

    @property
    def kernels(self) -> Pattern:
        """Which kernels (O, C) are active."""
        return self.pattern

    def weights(self, bias: Tensor | None) -> Weights:
        """Returns what the engine computes by: the values themselves."""
        return Weights(self.values, bias, self.pattern, self.pattern, is_compact=True)

    def rows_of_passes(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, C, *taps) of all kernels of some outputs, active or not, over the passes."""
        size = (last - first, *self.dense_shape[1:])
        total = self.values.new_zeros(size, requires_grad=False)
        compute = conv2d_weight if len(self.layer.kernel_size) == 2 else conv3d_weight
        for x, grad in self._samples():
            rows = grad[:, first:last].to(total.dtype).contiguous()
            total += compute(x.to(total.dtype), size, rows, self.layer.stride, self.layer.padding)
        return total

    def active_of_passes(self) -> Tensor:
        """Computes the gradient (A, *taps) of the active kernels, summed over the passes."""
        weights = replace(self.weights(None), weight=torch.zeros_like(self.values, requires_grad=False))
        total, num_axes = torch.zeros_like(weights.weight), len(self.layer.kernel_size)
        for x, grad in self._samples():
            maps = [mapped(each.to(total.dtype), num_axes).raw for each in (x, grad)]
            total += active_gradient(maps[1], maps[0], weights, self.geometry())
        return total

    def pattern_of(self, places: Tensor) -> Pattern:
        """Returns the pattern of kernels at other places of the flattened (O, C) matrix, in rising order."""
        outputs, inputs = self.dense_shape[:2]
        return Pattern.of_compact(places.to(self.values.device), (outputs, inputs))

    def geometry(self) -> Geometry:
        """Returns what the convolution does besides its weight."""
        device = self.values.device
        return geometry(self.layer, torch.zeros(self.dense_shape[1], dtype=torch.int32, device=device))

    def _samples(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the passes of any sample, with an axis of samples."""
        num = len(self.layer.kernel_size) + 2
        found = [(x, y) if x.ndim == num else (x.unsqueeze(0), y.unsqueeze(0)) for x, y, _ in self.passes]
        return [(x, y) for x, y in found if len(x)]


class CompactConv(CompactLayer):
    """A convolution whose parameter ``weight`` (A, *taps) are its active kernels alone, row by row."""

    kind = ActiveConvKernels
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, ...), or (N, C, H, W), with the active values. Without N, one sample."""
        return self.alone(self._forward, input)

    def _forward(self, input: Tensor) -> Tensor:
        held: Any = self.held["weight"]
        plain: Any = self._conv_forward  # of torch's class
        return held.run(  # type: ignore[no-any-return]
            lambda: self._convolved(input, held), lambda: plain(input, held.spread(held.values), self.bias), input
        )

    def _convolved(self, input: Tensor, held: ActiveConvKernels) -> Tensor:
        if input.ndim == len(self.kernel_size) + 2 and not len(input):
            return self._nothing(input, held)
        return convolved(held.weights(self.bias), held.geometry(), input, len(self.kernel_size))

    def _nothing(self, input: Tensor, held: ActiveConvKernels) -> Tensor:
        """Returns the output of no sample; all gradients are zeros."""
        size = ((n - 1) // step + 1 for n, step in zip(input.shape[2:], self.stride, strict=True))
        y = input.new_empty(0, held.dense_shape[0], *size)
        return y + sum(x.sum() for x in (input, held.values, self.bias) if x is not None)


class CompactConv2d(CompactConv, nn.Conv2d):
    """An ``nn.Conv2d`` that holds its active kernels alone, made by ``make_compact()``."""


class CompactConv3d(CompactConv, nn.Conv3d):
    """An ``nn.Conv3d``, flat along depth, that holds its active kernels alone, made by ``make_compact()``."""

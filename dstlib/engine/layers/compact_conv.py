"""Convolutions of two axes that hold their active kernels only.

Shapes: N batch, C input channels, O output channels, D, H, W depth, height, width, A active kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight, conv3d_weight

from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.layers.conv import convolved, geometry, mapped
from dstlib.engine.ops.conv import Geometry, active_gradient
from dstlib.engine.ops.patterns import Pattern, Weights


class CompactConv(CompactLayer):
    """A convolution whose parameter ``weight`` (A, *taps) are its active kernels alone, row by row."""

    bias: Tensor | None
    pattern: Pattern
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]

    def compute(self, input: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, ...), or (N, C, H, W), with the active values. Without N, one sample."""
        if input.ndim == len(self.kernel_size) + 2 and not len(input):
            return self.noted(self._nothing(input), input)
        weights = Weights(self.weight, self.bias, self.pattern, self.pattern, is_compact=True)
        return convolved(weights, self._geometry(), input, len(self.kernel_size))

    def as_plain(self, input: Tensor) -> Tensor:
        """As ``compute``, as the plain layer does."""
        return self._conv_forward(input, self.spread(self.weight), self.bias)  # type: ignore[operator]

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, C, *taps) of all kernels of some outputs, active or not, over the passes."""
        size = (last - first, *self.dense_shape[1:])
        total, compute = self.weight.new_zeros(size, requires_grad=False), self._weight_gradient()
        for x, grad in self._samples():
            rows = grad[:, first:last].to(total.dtype).contiguous()
            total += compute(x.to(total.dtype), size, rows, self.stride, self.padding)
        return total

    def gradient_of_active(self) -> Tensor:
        """Computes the gradient (A, *taps) of the active kernels, summed over the passes."""
        weight = torch.zeros_like(self.weight, requires_grad=False)
        weights = Weights(weight, None, self.pattern, self.pattern, is_compact=True)
        total, num_axes = torch.zeros_like(weight), len(self.kernel_size)
        for x, grad in self._samples():
            maps = [mapped(each.to(total.dtype), num_axes).raw for each in (x, grad)]
            total += active_gradient(maps[1], maps[0], weights, self._geometry())
        return total

    def pattern_of(self, places: Tensor) -> Pattern:
        """Returns the pattern of kernels at other places of the flattened (O, C) matrix, in rising order."""
        outputs, inputs = self.dense_shape[:2]
        return Pattern.of_compact(places.to(self.weight.device), (outputs, inputs))

    def _nothing(self, input: Tensor) -> Tensor:
        """Returns the output of no sample; all gradients are zeros."""
        size = ((n - 1) // step + 1 for n, step in zip(input.shape[2:], self.stride, strict=True))
        y = input.new_empty(0, self.dense_shape[0], *size)
        return y + sum(x.sum() for x in (input, self.weight, self.bias) if x is not None)

    def _geometry(self) -> Geometry:
        device = self.weight.device
        return geometry(self, torch.zeros(self.dense_shape[1], dtype=torch.int32, device=device))

    def _weight_gradient(self) -> Any:
        return conv2d_weight if len(self.kernel_size) == 2 else conv3d_weight

    def _samples(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the passes of any sample, with an axis of samples."""
        num = len(self.kernel_size) + 2
        found = [(x, y) if x.ndim == num else (x.unsqueeze(0), y.unsqueeze(0)) for x, y in self.passes]
        return [(x, y) for x, y in found if len(x)]


class CompactConv2d(CompactConv, nn.Conv2d):
    """An ``nn.Conv2d`` that holds its active kernels alone, made by ``make_compact()``."""


class CompactConv3d(CompactConv, nn.Conv3d):
    """An ``nn.Conv3d``, flat along depth, that holds its active kernels alone, made by ``make_compact()``."""

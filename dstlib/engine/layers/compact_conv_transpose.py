"""Transposed convolutions by their stride that hold their active kernels only.

No two inputs meet in an output voxel, so at each input voxel they are a linear layer from its channels to the voxels of
all output channels: that of active weights computes them.

Shapes: N batch, C input channels, O output channels, S axes of space, A active kernels of T taps each, M voxels of all
inputs of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.layers.active_kernels import ActiveKernels
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.layers.fast_layer import obstacle_to_weight
from dstlib.engine.ops.compact_linear import CompactPattern, active_gradient, compact_linear
from dstlib.engine.ops.patterns import Pattern, Weights
from dstlib.engine.ops.places import turned


@dataclass(frozen=True, eq=False)
class UpwardPattern:
    """Which kernels of a weight (C, O, *taps) are active, and the linear layer (O · T, C) that computes with them.

    ``at`` (A) are their places in the flattened (C, O) matrix, rising, in int32; ``index`` (A · T) says which of the
    flattened values (A, T) each value of the linear layer is.

    >>> pattern = UpwardPattern.of(torch.tensor([1, 2]), (2, 2), 2)
    >>> pattern.linear.places().tolist(), pattern.index.tolist()  # of (4, 2): the second channel feeds the first, ...
    ([1, 3, 4, 6], [2, 3, 0, 1])
    """

    at: Tensor
    linear: CompactPattern
    index: Tensor
    size: tuple[int, int]

    @classmethod
    def of(cls, places: Tensor, size: tuple[int, int], num_taps: int) -> "UpwardPattern":
        """Returns the pattern of kernels of so many taps at rising places of the flattened (C, O) matrix."""
        inputs, outputs = size
        with torch.inference_mode(False):
            at = places.int()
            own, number = turned(at, torch.arange(len(at), dtype=torch.int32), size)
            tap = torch.arange(num_taps, dtype=torch.int32)
            row = own.div(inputs, rounding_mode="floor")[:, None] * num_taps + tap
            linear_at, order = (row * inputs + (own % inputs)[:, None]).flatten().sort()
            linear = CompactPattern.of(linear_at, (outputs * num_taps, inputs))
            _, position = linear.rising()
            index = torch.empty_like(order)
            index[position.long()] = (number[:, None] * num_taps + tap).flatten()[order].long()
            return cls(at, linear, index, size)

    @cached_property
    def kernels(self) -> Pattern:
        """The active kernels of the (O, C) matrix, as the engine's transposed convolutions read them."""
        mask_CO = torch.zeros(self.size, dtype=torch.bool, device=self.at.device)
        mask_CO.view(-1)[self.at.long()] = True
        return Pattern.of(mask_CO.T)

    def places(self) -> Tensor:
        """Returns where in the flattened (C, O) matrix each kernel lies, (A)."""
        return self.at

    def rising(self) -> tuple[Tensor, Tensor]:
        """Returns the places, which are in rising order, (A), and where the kernel of each lies, (A), in int32."""
        return self.at, torch.arange(len(self.at), dtype=torch.int32, device=self.at.device)

    def to(self, device: torch.device) -> "UpwardPattern":
        """Returns the pattern on a device."""
        return UpwardPattern(self.at.to(device), self.linear.to(device), self.index.to(device), self.size)

    @property
    def num_active(self) -> int:
        """A, the number of active kernels."""
        return self.at.numel()


class ActiveUpward(ActiveKernels):
    """The active kernels (A, *taps) of a transposed convolution, in the order of their places in (C, O)."""

    is_spread = is_transposed = True
    pattern: UpwardPattern
    layer: Any  # a CompactConvTranspose

    @property
    def kernels(self) -> Pattern:
        """Which kernels (O, C) are active."""
        return self.pattern.kernels

    def weights(self, bias: Tensor | None) -> Weights:
        """Returns what the engine computes by: a weight (C, O, *taps) with zeros, for as long as a layer computes."""
        with torch.inference_mode(False):
            return Weights(self.spread(self.values), bias, self.kernels, self.kernels)

    def rows_of_passes(self, first: int, last: int) -> Tensor:
        """Computes the gradient (outputs, C, *taps) of all kernels of some outputs, active or not, over the passes."""
        size = (last - first, -1, self.dense_shape[0])
        found = [self._at_voxels(grad, first, last).t() @ x for x, grad in self._samples()]
        return sum(found[1:], found[0]).view(size).transpose(1, 2).unflatten(2, self.layer.kernel_size)

    def active_of_passes(self) -> Tensor:
        """Computes the gradient (A, *taps) of the active kernels, summed over the passes."""
        total = torch.zeros_like(self.values, requires_grad=False)
        for x, grad in self._samples():
            found = active_gradient(self._at_voxels(grad, 0, self.dense_shape[1]), x, self.pattern.linear)
            total += torch.empty_like(found).index_copy_(0, self.pattern.index, found).view_as(total)
        return total

    def pattern_of(self, places: Tensor) -> UpwardPattern:
        """Returns the pattern of kernels at other places of the flattened (C, O) matrix, in rising order."""
        inputs, outputs, *taps = self.dense_shape
        return UpwardPattern.of(places.cpu(), (inputs, outputs), torch.Size(taps).numel()).to(self.values.device)

    def _at_voxels(self, grad: Tensor, first: int, last: int) -> Tensor:
        """Returns a gradient (N, O, *(S · stride)) of some outputs as (M, outputs · T)."""
        num_axes = len(self.layer.kernel_size)
        for i, taps in enumerate(self.layer.kernel_size):
            grad = grad.unflatten(2 + 2 * i, (-1, taps))
        order = (0, *range(2, 2 + 2 * num_axes, 2), 1, *range(3, 3 + 2 * num_axes, 2))
        return grad[:, first:last].permute(order).flatten(1 + num_axes).flatten(0, num_axes)

    def _samples(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the passes: inputs (M, C), and output gradients (N, O, *(S · stride)), in the type of the weight."""
        found, kernel, dtype = [], self.layer.kernel_size, self.values.dtype
        for x, grad, _ in self.passes:
            x, grad = (each if each.ndim == len(kernel) + 2 else each.unsqueeze(0) for each in (x, grad))
            ends = [slice(s * k) for s, k in zip(x.shape[2:], kernel, strict=True)]
            grad = grad[(slice(None), slice(None), *ends)]
            found.append((x.movedim(1, -1).flatten(0, -2).to(dtype), grad.to(dtype)))
        return found


class CompactConvTranspose(CompactLayer):
    """A transposed convolution by its stride whose parameter ``weight`` (A, *taps) are its active kernels alone."""

    kind = ActiveUpward
    bias: Tensor | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    out_channels: int

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(N, C, *S) → (N, O, *(S · stride)), or without N; ``output_size`` may ask for less than a stride more."""
        return self.alone(self._forward, input, output_size)

    def _forward(self, input: Tensor, output_size: Sequence[int] | None) -> Tensor:
        held: Any = self.held["weight"]
        more = self._more(input, output_size)
        plain = F.conv_transpose2d if len(self.kernel_size) == 2 else F.conv_transpose3d
        return held.run(  # type: ignore[no-any-return]
            lambda: self._upward(input, held, more),
            lambda: plain(input, held.spread(held.values), self.bias, self.stride, output_padding=more),
            input,
        )

    def _upward(self, input: Tensor, held: ActiveUpward, more: Sequence[int]) -> Tensor:
        x, pattern = input if input.ndim == len(self.kernel_size) + 2 else input.unsqueeze(0), held.pattern
        y = self._spaced(compact_linear(x.movedim(1, -1), held.values.flatten()[pattern.index], None, pattern.linear))
        y = F.pad(y, [n for each in reversed(more) for n in (0, each)])
        if self.bias is not None:
            y = y + self.bias.view(-1, *(1 for _ in self.kernel_size))
        return y if x is input else y.squeeze(0)

    def _more(self, input: Tensor, output_size: Sequence[int] | None) -> list[int]:
        """Returns how many voxels along each axis the output has beyond those of the inputs."""
        num_axes = len(self.kernel_size)
        if output_size is None:
            return [0] * num_axes
        ask: Any = self._output_padding  # of torch's class
        more: list[int] = ask(input, list(output_size), self.stride, [0] * num_axes, self.kernel_size, num_axes)
        return more

    def _spaced(self, y: Tensor) -> Tensor:
        """Returns what was computed at each voxel, (N, *S, O · T), where it belongs, (N, O, *(S · stride))."""
        num_axes = len(self.kernel_size)
        y = y.unflatten(-1, (self.out_channels, *self.kernel_size))
        pairs = (axis for i in range(num_axes) for axis in (1 + i, 2 + num_axes + i))
        y = y.permute(0, 1 + num_axes, *pairs)
        return y.reshape(*y.shape[:2], *(s * k for s, k in zip(y.shape[2::2], y.shape[3::2], strict=True)))


class CompactConvTranspose2d(CompactConvTranspose, nn.ConvTranspose2d):
    """An ``nn.ConvTranspose2d`` that holds its active kernels alone, made by ``make_compact()``."""


class CompactConvTranspose3d(CompactConvTranspose, nn.ConvTranspose3d):
    """An ``nn.ConvTranspose3d`` that holds its active kernels alone, made by ``make_compact()``."""


def obstacle_to_compact_upward(layer: Any) -> str | None:
    """Tells why a transposed convolution cannot hold its active kernels alone; None where it can."""
    if reason := obstacle_to_weight(layer):
        return reason
    is_plain = layer.groups == 1 and set(layer.dilation) == {1} and not any((*layer.padding, *layer.output_padding))
    return (
        None if is_plain and layer.kernel_size == layer.stride else "it is not a transposed convolution by its stride"
    )

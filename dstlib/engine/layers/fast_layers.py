"""Layers that run on the kernels, made from the plain ones, whose parameters and names they keep.

Shapes: N batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dstlib.engine.layers.pending import Pending, mapped
from dstlib.engine.ops.connections import Connections
from dstlib.engine.ops.conv_transpose import ReadyUpsample, upsample
from dstlib.engine.ops.convolution import Geometry, Weights, conv, unit
from dstlib.engine.ops.feature_maps import Mapped
from dstlib.engine.ops.layouts import to_channels_first
from dstlib.engine.ops.pooling import ReadyPool, max_pool
from dstlib.engine.ops.ready import Ready
from dstlib.layers.blocks import Unit
from dstlib.layers.fusion import FusionNode
from dstlib.layers.shift import Shift, channel_groups

Made = TypeVar("Made")


class _Kernels:
    """The connections of one weight, and its kernels as the engine reads them."""

    def __init__(self, weight: Tensor, mask: Tensor, *, transposed: bool = False) -> None:
        self.weight = weight
        self.transposed = transposed
        self.dense_gradient = False  # whether backward passes are to give the gradients of inactive kernels too
        self.all = self._connections(torch.ones_like(weight, dtype=torch.bool))
        self.set_mask(mask)

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask of the weight's shape: a connection is active where any of its taps is."""
        self.active = self._connections(mask)
        self._ready: tuple[tuple[object, ...], Any] | None = None

    def _connections(self, mask: Tensor) -> Connections:
        pairs = mask.flatten(2).any(dim=2)
        return Connections.of(pairs.T if self.transposed else pairs)

    @property
    def graded(self) -> Connections:
        """The connections whose gradient is wanted."""
        return self.all if self.dense_gradient else self.active

    def weights(self, bias: Tensor | None) -> Weights:
        """The weight and its connections, with a bias."""
        return Weights(self.weight, bias, self.active, self.graded)

    def ready(self, make: Callable[[], Made], *others: Tensor | None) -> Made | None:
        """What was made to run until the weight or another parameter changes; None where somebody may record it."""
        if _may_be_recorded():
            return None
        state = (self.weight._version, self.weight.data_ptr(), *[x.data_ptr() for x in others if x is not None])
        if self._ready is None or self._ready[0] != state:
            self._ready = state, make()
        return self._ready[1]


def _may_be_recorded() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


class FastConv(nn.Module):
    """A convolution of two axes: ``nn.Conv2d``, or ``nn.Conv3d`` with a kernel that is flat along depth."""

    def __init__(self, plain: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self.stride = three(plain.stride)
        self.kernels = _Kernels(plain.weight, plain.weight.detach() != 0)
        self.geometry = Geometry(torch.zeros(plain.in_channels, dtype=torch.int32), self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, ...), or (N, C, H, W), whose samples then take the place of depths."""
        flat = x.ndim == 4
        source = (x.transpose(0, 1).unsqueeze(0), None) if flat else mapped(x)
        ready = self.kernels.ready(self._ready, self.bias)
        found = ready and ready([source])
        y = to_channels_first(found[0] if found else conv([source], self.kernels.weights(self.bias), self.geometry))
        return y.squeeze(0).transpose(0, 1) if flat else y

    def _ready(self) -> Ready:
        return Ready(self.kernels.weights(self.bias), self.geometry)


class FastUnit(nn.Module):
    """A :class:`~dstlib.layers.Unit` as one operation, whose norm and activation its readers apply."""

    def __init__(self, plain: Unit) -> None:
        super().__init__()
        self.shift, self.conv, self.norm, self.activation = plain.shift, plain.conv, plain.norm, plain.activation
        self.kernels = _Kernels(plain.conv.weight, plain.conv.weight.detach() != 0)
        shifts = torch.zeros(plain.conv.in_channels, dtype=torch.int32)
        if isinstance(plain.shift, Shift):
            groups = channel_groups(shifts[None], len(plain.shift.sizes))
            for group, size in zip(groups, plain.shift.sizes, strict=False):
                group.fill_(size)
        self.geometry = Geometry(shifts, three(plain.conv.stride))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D / stride, H / stride, W / stride)."""
        return self.fuse([mapped(x)])

    def fuse(self, sources: Sequence[Mapped]) -> Tensor:
        """The unit on the concatenation of maps."""
        slope, bias, after = self.activation.negative_slope, self.conv.bias, self.norm
        ready = self.kernels.ready(self._ready, bias, after.weight, after.bias)
        found = ready and ready(sources)
        if found:
            y, normed = found
            scale, offset, *_ = normed.unbind()
            return Pending.of(y, (scale, offset, slope))
        y, norm = unit(sources, self.kernels.weights(bias), self.geometry, after, slope)
        assert norm is not None
        return Pending.of(y, norm)

    def _ready(self) -> Ready:
        affine = self.norm.weight, self.norm.bias, self.norm.eps
        return Ready(self.kernels.weights(self.conv.bias), self.geometry, affine)


class FastUpsample(nn.Module):
    """An ``nn.ConvTranspose3d`` whose kernel is its stride, without bias."""

    def __init__(self, plain: nn.ConvTranspose3d) -> None:
        super().__init__()
        self.weight, self.stride = plain.weight, three(plain.stride)
        self.kernels = _Kernels(plain.weight, plain.weight.detach() != 0, transposed=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) → (N, O, D · stride, H · stride, W · stride)."""
        source, ready = mapped(x), self.kernels.ready(self._ready)
        found = ready(*source) if ready else None
        if found is not None:
            return found
        # the weights of inactive connections are zero: to compute them too is what gives their gradients
        return upsample(*source, self.weight, self.kernels.graded, self.stride)

    def _ready(self) -> ReadyUpsample:
        return ReadyUpsample(self.weight, self.kernels.active, self.stride)


class FastFusionNode(nn.Module):
    """A :class:`~dstlib.layers.FusionNode` that neither concatenates nor shifts in memory."""

    def __init__(self, plain: FusionNode) -> None:
        super().__init__()
        self.upward = FastUpsample(plain.upward)
        self.downward = plain.downward
        self.pool = ReadyPool(three(plain.downward.kernel_size)) if plain.downward is not None else None
        units = [each for each in plain.units if isinstance(each, Unit)]
        self.units = nn.Sequential(*map(FastUnit, units))

    def forward(self, same: Tensor, coarser: Tensor, finer: Tensor | None = None) -> Tensor:
        """The maps of this level, the coarser and the finer one, as of the plain node."""
        first, *others = self.units
        assert isinstance(first, FastUnit)
        x = first.fuse(self._sources(same, coarser, finer))  # whose memory serves again from here on
        for each in others:
            x = each(x)
        return x

    def _sources(self, same: Tensor, coarser: Tensor, finer: Tensor | None) -> list[Mapped]:
        sources = [mapped(same), (self.upward(coarser), None)]
        if finer is not None and self.pool is not None:
            source = mapped(finer)
            pooled = None if _may_be_recorded() else self.pool(*source)
            sources.append((max_pool(*source, self.pool.window) if pooled is None else pooled, None))
        return sources


def three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    """Sizes along depth, height and width, of what has one size for all, or two, being flat along depth.

    >>> three(2), three((2, 2))
    ((2, 2, 2), (1, 2, 2))
    """
    depth, height, width = (sizes,) * 3 if isinstance(sizes, int) else ([1] * 3 + list(sizes))[-3:]
    return depth, height, width

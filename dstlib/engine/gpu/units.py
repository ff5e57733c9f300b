"""Units and fusion nodes of a network on a GPU, made from the plain ones, whose parameters and names they keep.

Maps lie channels last throughout, are concatenated and shifted in one pass, and normalised and activated in two.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d

import dstlib.engine.gpu.tiles as tiles
from dstlib.engine.gpu.conv import block_conv
from dstlib.engine.gpu.maps import gather, normalise
from dstlib.engine.gpu.module import BlockConv
from dstlib.layers.blocks import Unit
from dstlib.layers.fusion import FusionNode
from dstlib.layers.shift import Shift

BLOCK = (16, 16)
DENSE = 0.6  # share of active blocks from which on cuDNN computes them all, which was faster there on an H100


class GPUUnit(nn.Module):
    """A :class:`~dstlib.layers.Unit` that computes by blocks of 16 × 16 channels where few of them are active.

    The convolution's bias is not added: the norm takes it away again, and its gradient is zero.
    """

    def __init__(self, plain: Unit) -> None:
        super().__init__()
        sizes = plain.shift.sizes if isinstance(plain.shift, Shift) else (0,)
        self.conv = BlockConv.of(plain.conv, size=BLOCK, shifts=sizes)
        self.norm, self.activation = plain.norm, plain.activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) → (B, O, D / stride, H / stride, W / stride), channels last in memory."""
        return self.fuse([x])

    def fuse(self, sources: Sequence[Tensor]) -> Tensor:
        """The unit on the concatenation of maps."""
        conv, norm = self.conv, self.norm
        if torch.is_autocast_enabled(kind := sources[0].device.type):
            sources = [each.to(torch.get_autocast_dtype(kind)) for each in sources]
        by_blocks = not conv.dense_gradient and conv.blocks.density < DENSE
        if by_blocks and tiles.suit(sources, BLOCK, conv.weight.shape, conv.stride):
            y = block_conv(sources, conv.weight, conv.blocks, shifts=conv.shifts)
        else:
            y = _dense(gather(sources, conv.shifts), conv.weight, conv.stride)
        bias = norm.bias if conv.bias is None or not torch.is_grad_enabled() else norm.bias + 0 * conv.bias
        return normalise(y, norm.weight, bias, norm.eps, self.activation.negative_slope)


class GPUFusionNode(nn.Module):
    """A :class:`~dstlib.layers.FusionNode` of such units."""

    def __init__(self, plain: FusionNode) -> None:
        super().__init__()
        self.upward, self.downward = plain.upward, plain.downward
        self.units = nn.Sequential(*(GPUUnit(each) for each in plain.units if isinstance(each, Unit)))

    def forward(self, same: Tensor, coarser: Tensor, finer: Tensor | None = None) -> Tensor:
        """The maps of this level, the coarser and the finer one, as of the plain node."""
        flows = [same, self.upward(coarser)]
        if self.downward is not None:
            flows.append(self.downward(finer))
        first, *others = self.units
        assert isinstance(first, GPUUnit)
        x = first.fuse(flows)
        for each in others:
            x = each(x)
        return x


def _dense(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """The convolution by all channels, padded by half the kernel; flat kernels take depths for samples.

    That is the same to cuDNN but for its choice of algorithms: 0.50 ms where conv3d took 0.69 (96 → 48 at 128³, H100).
    """
    padding = tuple(extent // 2 for extent in weight.shape[2:])
    if weight.shape[2] > 1 or stride[0] > 1:
        return conv3d(x, weight, None, tuple(stride), padding)
    planes = conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], None, tuple(stride[1:]), padding[1:])
    return planes.unflatten(0, (x.shape[0], -1)).transpose(1, 2)

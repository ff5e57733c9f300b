"""Layers that run on a GPU's kernels, made from the plain ones, whose parameters and names they keep.

Maps lie channels last throughout, are concatenated and shifted in one pass, and normalised and activated in two.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d

import dstlib.engine.gpu.tiles as tiles
from dstlib.engine.gpu.blocks import Blocks, Pair
from dstlib.engine.gpu.conv import block_conv
from dstlib.engine.gpu.feature_map import gather, normalise
from dstlib.engine.layers.fast_layer import FastLayer, has_global_hooks, has_hooks
from dstlib.engine.layers.unit import obstacle_around_conv
from dstlib.errors import SettingError, StateError
from dstlib.layers.blocks import FusionNode, Unit
from dstlib.layers.plugin import ShiftedConv3d
from dstlib.layers.shift import Shift

BLOCK = (16, 16)
_LINEAR = "it is a linear layer, which a GPU computes dense: see to_semi_structured()"
DENSE = 0.6  # share of active blocks from which on cuDNN computes them all, which was faster there on an H100


class BlockConv(nn.Module):
    """:func:`block_conv` as a layer, with the very parameters of the Conv2d or Conv3d that it is made from.

    Optimizers, sparsifiers and state dicts go on as before: parameters and their names stay. After each change of the
    mask, and of loading a state, give the present one to :meth:`set_mask`: weights outside the blocks are not computed
    with, and blocks are not part of a state. With ``dense_gradient`` set, they are, and get their gradients.
    :func:`dstlib.accelerate` makes and follows such layers by itself.

    Shapes: (B, C, D, H, W) or (B, C, H, W), as for :func:`block_conv`.

    >>> import torch, dstlib
    >>> from dataclasses import replace
    >>> model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1))
    >>> method = replace(dstlib.DSFF, granularity=dstlib.Block(16, 16))
    >>> sparsifier = dstlib.sparsify(model, sparsity=0.75, method=method, total_steps=12_000)
    >>> model[0] = BlockConv.of(model[0], sparsifier.masks["0.weight"], size=(16, 16))
    >>> model
    Sequential(
      (0): BlockConv(32, 64, kernel_size=(3, 3), stride=(1, 1), shifts=(0,), blocks=(16, 16), density=0.25)
    )
    >>> model(torch.randn(1, 32, 8, 8)).shape
    torch.Size([1, 64, 8, 8])
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, blocks: Blocks, stride: Sequence[int], shifts: Sequence[int]
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.blocks = blocks
        self.stride = tuple(stride)
        self.shifts = tuple(shifts)
        self.dense_gradient = False
        self._all = Blocks.of(torch.ones(weight.shape[:2], dtype=torch.bool, device=weight.device), blocks.size)

    @classmethod
    def of(
        cls, conv: nn.Conv2d | nn.Conv3d, mask: Tensor | None = None, *, size: Pair, shifts: Sequence[int] | None = None
    ) -> "BlockConv":
        """Returns the layer in blocks of ``size`` = (outputs, inputs) that cover the mask, by default of weights ≠ 0.

        ``shifts`` is what a shift along depth before the layer did, which can then go; a ShiftedConv3d brings its own.

        Raises:
            SettingError: The convolution is grouped, dilated, or not padded with zeros by half its kernel.
        """
        where = "BlockConv.of()"
        if not isinstance(conv, nn.Conv2d | nn.Conv3d):
            allowed, remedy = "a Conv2d or Conv3d", "Transposed convolutions and others stay as they are."
            raise SettingError.of("layer", where, allowed=allowed, given=type(conv).__name__, remedy=remedy)
        for what, allowed, given in _differences(conv):
            raise SettingError.of(what, where, allowed=allowed, given=given, remedy="Leave this layer as it is.")
        own = conv.sizes if isinstance(conv, ShiftedConv3d) else (0,)
        blocks = Blocks.of(conv.weight.detach() != 0 if mask is None else mask, size)
        return cls(conv.weight, conv.bias, blocks, conv.stride, own if shifts is None else shifts)

    def set_mask(self, mask: Tensor) -> None:
        """Computes with the blocks of another mask (O, C, \\*kernel) from now on."""
        self.blocks = Blocks.of(mask, self.blocks.size)

    def forward(self, input: Tensor) -> Tensor:
        """Computes the convolution by the active blocks, or by all where inactive weights are to get gradients."""
        blocks = self._all if self.dense_gradient else self.blocks
        return block_conv(input, self.weight, blocks, self.bias, self.stride, self.shifts)

    def extra_repr(self) -> str:
        """Returns what the layer is, and how many of its blocks are active."""
        outputs, inputs = self.blocks.channels
        return (
            f"{inputs}, {outputs}, kernel_size={tuple(self.weight.shape[2:])}, stride={self.stride}, "
            f"shifts={self.shifts}, blocks={self.blocks.size}, density={self.blocks.density:.4g}"
        )


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
        """Computes (B, C, D, H, W) → (B, O, D / stride, H / stride, W / stride), channels last in memory."""
        return self.fuse([x])

    def fuse(self, sources: Sequence[Tensor]) -> Tensor:
        """Computes the unit on the concatenation of maps."""
        conv, norm = self.conv, self.norm
        _refuse_hooks(self, conv, norm, self.activation)
        if torch.is_autocast_enabled(kind := sources[0].device.type):
            sources = [each.to(torch.get_autocast_dtype(kind)) for each in sources]
        by_blocks = not conv.dense_gradient and conv.blocks.density < DENSE
        if by_blocks and tiles.accept(sources, BLOCK, conv.weight.shape, conv.stride):
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
        """Joins the maps of this level, the coarser and the finer one, as the plain node does."""
        maps = [same, self.upward(coarser)]
        if self.downward is not None:
            maps.append(self.downward(finer))
        _refuse_hooks(self, self.units, *self.units)
        for each in self.units:
            assert isinstance(each, GPUUnit)
            maps = [each.fuse(maps)]
        return maps[0]


def _dense(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """Computes the convolution by all channels, padded by half the kernel; flat kernels take depths for samples.

    That is the same to cuDNN but for its choice of algorithms: 0.50 ms where conv3d took 0.69 (96 → 48 at 128³, H100).
    """
    padding = tuple(extent // 2 for extent in weight.shape[2:])
    if weight.shape[2] > 1 or stride[0] > 1:
        return conv3d(x, weight, None, tuple(stride), padding)
    planes = conv2d(x.transpose(1, 2).flatten(0, 1), weight[:, :, 0], None, tuple(stride[1:]), padding[1:])
    return planes.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def obstacle_to_blocks(conv: nn.Module) -> str | None:
    """Says why a layer cannot be computed by blocks; None where it can."""
    if type(conv) not in (nn.Conv2d, nn.Conv3d, ShiftedConv3d):
        return f"it is a {type(conv).__name__}"
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    if type(conv._parameters.get("weight")) is not nn.Parameter:
        return "its weight is computed from others, as by weight_norm, spectral_norm or prune"
    return next((f"its {what} is {given}" for what, _, given in _differences(conv)), None)


def _differences(conv: nn.Conv2d | nn.Conv3d) -> Iterator[tuple[str, str, object]]:
    """Lists what of a convolution is not as the kernels have it: what, what they allow, and what it is."""
    half = tuple(extent // 2 for extent in conv.kernel_size)
    same = conv.padding == "same" and all(extent % 2 for extent in conv.kernel_size)
    along_depth = not isinstance(conv, ShiftedConv3d) or conv.axis == "depth"
    checks = (
        ("groups", conv.groups == 1, "1", conv.groups),
        ("dilation", max(conv.dilation) == 1, "1", conv.dilation),
        ("padding", same or conv.padding == half, f"{half}, half the kernel", conv.padding),
        ("padding_mode", conv.padding_mode == "zeros", "'zeros'", repr(conv.padding_mode)),
        ("axis of the shift", along_depth, "'depth'", repr(getattr(conv, "axis", None))),
    )
    return ((what, allowed, given) for what, holds, allowed, given in checks if not holds)


def obstacle_to_block_conv(conv: nn.Conv2d | nn.Conv3d) -> str | None:
    """Says why a convolution by itself has no form in blocks, or does not gain by it; None where it has one.

    >>> obstacle_to_block_conv(nn.Conv2d(16, 16, 3, padding=1)), obstacle_to_block_conv(nn.Conv2d(16, 16, 1))
    (None, 'its kernel is (1, 1), which cuDNN computes')
    """
    if reason := obstacle_to_blocks(conv):
        return reason
    if tuple(conv.kernel_size) not in (tiles.KERNEL, tiles.KERNEL[1:]) or max(conv.stride) > 1:
        strided = f" with a stride of {conv.stride}" if max(conv.stride) > 1 else ""
        return f"its kernel is {conv.kernel_size}{strided}, which cuDNN computes"
    return None


def _obstacle_to_unit(unit: nn.Module) -> str | None:
    return obstacle_around_conv(unit) or obstacle_to_blocks(unit.get_submodule("conv"))


def _obstacle_to_node(node: FusionNode) -> str | None:
    if type(node) is not FusionNode:
        return f"it is a {type(node).__name__}"
    return next(filter(None, map(_obstacle_to_unit, node.units)), None)


def _refuse_hooks(layer: nn.Module, *parts: nn.Module) -> None:
    """Refuses hooks on what is computed as one with other things, and not called."""
    if has_global_hooks() or has_hooks(*parts):
        allowed, given = "none on a part that is computed with the others", "a hook, or a forward of its own"
        remedy = "Put it on the plain model, and call accelerate() again."
        raise StateError.of("hooks", type(layer).__name__, allowed=allowed, given=given, remedy=remedy)


GPU_LAYERS = (
    FastLayer(FusionNode, _obstacle_to_node, GPUFusionNode),
    FastLayer(Unit, _obstacle_to_unit, GPUUnit),
    FastLayer(nn.Conv2d | nn.Conv3d, obstacle_to_block_conv, partial(BlockConv.of, size=BLOCK)),
    FastLayer(nn.Linear, lambda linear: _LINEAR, lambda linear: linear),
)

"""A convolution layer that computes only its active blocks, made from an ordinary one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dstlib.engine.gpu.blocks import Blocks
from dstlib.engine.gpu.conv import block_conv
from dstlib.errors import SettingError
from dstlib.layers.plugin import ShiftedConv3d

_WHERE = "BlockConv.of()"


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
        cls,
        conv: nn.Conv2d | nn.Conv3d,
        mask: Tensor | None = None,
        *,
        size: tuple[int, int],
        shifts: Sequence[int] | None = None,
    ) -> "BlockConv":
        """The layer in blocks of ``size`` = (outputs, inputs) that cover the mask; by default that of weights ≠ 0.

        ``shifts`` is what a shift along depth before the layer did, which can then go; a ShiftedConv3d brings its own.

        Raises:
            SettingError: the convolution is grouped, dilated, or not padded with zeros by half its kernel.
        """
        _check(conv)
        own = conv.sizes if isinstance(conv, ShiftedConv3d) else (0,)
        blocks = Blocks.of(conv.weight.detach() != 0 if mask is None else mask, size)
        return cls(conv.weight, conv.bias, blocks, conv.stride, own if shifts is None else shifts)

    def set_mask(self, mask: Tensor) -> None:
        """Computes with the blocks of another mask (O, C, \\*taps) from now on."""
        self.blocks = Blocks.of(mask, self.blocks.size)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self._all if self.dense_gradient else self.blocks
        return block_conv(x, self.weight, blocks, self.bias, self.stride, self.shifts)

    def extra_repr(self) -> str:
        outputs, inputs = self.blocks.channels
        return (
            f"{inputs}, {outputs}, kernel_size={tuple(self.weight.shape[2:])}, stride={self.stride}, "
            f"shifts={self.shifts}, blocks={self.blocks.size}, density={self.blocks.density:.4g}"
        )


def obstacle_to_blocks(conv: nn.Module) -> str | None:
    """Why a layer cannot be computed by blocks; None where it can."""
    if not isinstance(conv, nn.Conv2d | nn.Conv3d):
        return f"it is a {type(conv).__name__}"
    return next((f"its {what} is {given}" for what, holds, _, given in _checks(conv) if not holds), None)


def _check(conv: nn.Module) -> None:
    if not isinstance(conv, nn.Conv2d | nn.Conv3d):
        remedy = "Transposed convolutions and others stay as they are."
        given = type(conv).__name__
        raise SettingError.of("layer", _WHERE, allowed="a Conv2d or Conv3d", given=given, remedy=remedy)
    for what, holds, allowed, got in _checks(conv):
        if not holds:
            remedy = "Leave this layer as it is."
            raise SettingError.of(what, _WHERE, allowed=allowed, given=got, remedy=remedy)


def _checks(conv: nn.Conv2d | nn.Conv3d) -> tuple[tuple[str, bool, str, object], ...]:
    half = tuple(extent // 2 for extent in conv.kernel_size)
    same = conv.padding == "same" and all(extent % 2 for extent in conv.kernel_size)
    along_depth = not isinstance(conv, ShiftedConv3d) or conv.axis == "depth"
    return (
        ("groups", conv.groups == 1, "1", conv.groups),
        ("dilation", max(conv.dilation) == 1, "1", conv.dilation),
        ("padding", same or conv.padding == half, f"{half}, half the kernel", conv.padding),
        ("padding_mode", conv.padding_mode == "zeros", "'zeros'", repr(conv.padding_mode)),
        ("axis of the shift", along_depth, "'depth'", repr(getattr(conv, "axis", None))),
    )

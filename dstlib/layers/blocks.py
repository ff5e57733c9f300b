"""The Unit, the one step of which an encoder is made, and the fusion node, where three neighbouring levels meet.

Shapes: B batch, C channels, D, H, W depth, height, width in voxels.
"""

from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn

from dstlib.axes import Triple


class Unit(nn.Module):
    """Shift (optional) → convolution → instance norm → leaky ReLU.

    Shapes: (B, in_channels, D, H, W) → (B, out_channels, D / stride, H / stride, W / stride), rounded up. The
    padding is half the kernel, so ``kernel_size`` must be odd. ``shift`` is any module that keeps the shape of
    its input: a :class:`~dstlib.layers.shift.Shift`, or a learned one.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024): kernel (1, 3, 3) after a shift along depth; no dropout.

    >>> import torch
    >>> from dstlib.layers.shift import Shift
    >>> unit = Unit(2, 4, kernel_size=(1, 3, 3), stride=(1, 2, 2), shift=Shift((-1, 0, 1), axis=2))
    >>> unit(torch.rand(1, 2, 5, 8, 8)).shape
    torch.Size([1, 4, 5, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: Triple,
        stride: Triple = (1, 1, 1),
        shift: nn.Module | None = None,
    ) -> None:
        super().__init__()
        depth, height, width = kernel_size
        padding = (depth // 2, height // 2, width // 2)
        self.shift = shift
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding)
        self.norm = nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True)
        self.activation = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Computes (B, in_channels, D, H, W) → (B, out_channels, ...)."""
        if self.shift is not None:
            x = self.shift(x)
        y: Tensor = self.activation(self.norm(self.conv(x)))
        return y


class FusionNode(nn.Module):
    """Joins the same, the coarser and the finer level into one map: the flows forward, upward and downward.

    - *forward*: the map of the same level, as it is;
    - *upward*: the coarser map through a transposed convolution of its own, kernel = stride, no bias;
    - *downward*: the finer map through max-pooling, kernel = stride. The finest level has none.

    They are concatenated in this order and go through ``num_units`` Units, of which only the first sees the
    flows: ``units[0].conv.weight[:, flows["upward"]]`` reads the upward one. ``coarser`` and ``finer`` are
    (channels, stride between that level and this one). Each Unit has a copy of ``shift`` for itself, so that
    learned offsets are its own.

    Shapes: same (B, channels, D, H, W), and so is the result; coarser (B, C, D / s, H / s, W / s), finer
    (B, C, D · s, H · s, W · s), each with its own channels C and stride s.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), the feature fusion of DSFF; two Units on the last diagonal.

    >>> node = FusionNode(2, coarser=(4, (2, 2, 2)), kernel_size=(1, 3, 3))
    >>> node(torch.rand(1, 2, 4, 4, 4), torch.rand(1, 4, 2, 2, 2)).shape
    torch.Size([1, 2, 4, 4, 4])
    >>> node.flows
    {'forward': slice(0, 2, None), 'upward': slice(2, 4, None)}
    """

    def __init__(
        self,
        channels: int,
        *,
        coarser: tuple[int, Triple],
        finer: tuple[int, Triple] | None = None,
        kernel_size: Triple,
        shift: nn.Module | None = None,
        num_units: int = 1,
    ) -> None:
        super().__init__()
        coarser_channels, up = coarser
        finer_channels, down = finer or (0, (1, 1, 1))
        self.upward = nn.ConvTranspose3d(coarser_channels, channels, up, stride=up, bias=False)
        self.downward = nn.MaxPool3d(down) if finer else None
        total = 2 * channels + finer_channels
        self.flows = {"forward": slice(0, channels), "upward": slice(channels, 2 * channels)}
        if finer:
            self.flows["downward"] = slice(2 * channels, total)
        widths = [total] + [channels] * num_units
        self.units = nn.Sequential(
            *(Unit(i, o, kernel_size=kernel_size, shift=deepcopy(shift)) for i, o in pairwise(widths))
        )

    def forward(self, same: Tensor, coarser: Tensor, finer: Tensor | None = None) -> Tensor:
        """Joins the maps of this level, the coarser and the finer one."""
        flows = [same, self.upward(coarser)]
        if self.downward is not None:
            flows.append(self.downward(finer))
        x: Tensor = self.units(torch.cat(flows, dim=1))
        return x

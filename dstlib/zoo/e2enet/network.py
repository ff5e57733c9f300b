"""The E2ENet network.

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from dstlib.axes import AXES, Triple
from dstlib.errors import DataError
from dstlib.layers.blocks import FusionNode, Unit
from dstlib.layers.recompute import recomputed
from dstlib.layers.shift import LearnedShift, Shift
from dstlib.zoo.e2enet.config import E2ENetConfig

_TOGETHER = 2  # stages that are computed once more at a time: of one by one more is kept, three take more then


class E2ENet(nn.Module):
    """A pyramid of features that meet their neighbours again and again, and as many heads as asked for.

    The encoder makes x[0, 1..L]; fusion stage j makes x[j, 1..L-j] from the stage before; the heads read the
    last diagonal j + l = L. With L = 4 and 3 heads::

        level 1   x01 ── x11 ── x21 ── x31 ─ head     → forward: the same level
                   │  ╳      ╳      ╱                 ↗ upward: transposed convolution of the coarser level
        level 2   x02 ── x12 ── x22 ─ head            ↘ downward: max-pooling of the finer level
                   │  ╳      ╱
        level 3   x03 ── x13 ─ head
                   │  ╱
        level 4   x04

    Shapes: (B, in_channels, D, H, W) → with ``deep_supervision`` a tuple of logits, finest first: the head of
    level l has (B, K, D, H, W) over the strides down to l. Without, the first of them alone.

    With ``recompute`` on, gradients keep the maps of every second stage alone, and the others are computed once more
    from these: less memory for more time, and the same losses and gradients bit for bit.

    The weights that DSFF trains sparse are the (transposed) convolutions under the glob :attr:`FUSION`; the
    encoder and the heads stay dense. Node (j, l) is ``fusion.stage{j}_level{l}``, level l of the encoder
    ``encoder.{l - 1}``.

    Raises:
        DataError: The input has other channels than the config says, or a size the strides do not divide.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024, arXiv:2312.04727). Each convolution starts from Kaiming's
    normal distribution with a = 0.01 and zero bias, as in the published code.

    >>> import torch
    >>> config = E2ENetConfig(channels=(8, 16, 32), strides=((2, 2, 2),) * 2, heads=2, num_classes=3)
    >>> network = E2ENet(config)
    >>> [tuple(logits.shape) for logits in network(torch.rand(1, 1, 8, 8, 8))]
    [(1, 3, 8, 8, 8), (1, 3, 4, 4, 4)]
    >>> network.deep_supervision = False
    >>> network(torch.rand(1, 1, 8, 8, 8)).shape
    torch.Size([1, 3, 8, 8, 8])
    """

    FUSION: ClassVar[str] = "fusion.*"

    def __init__(self, config: E2ENetConfig) -> None:
        super().__init__()
        self.config = config
        self.deep_supervision = True
        self.recompute = False
        levels = len(config.channels)
        self.encoder = nn.ModuleList(_encoder_level(config, level) for level in range(1, levels + 1))
        nodes = [(stage, level) for stage in range(1, levels) for level in range(1, levels - stage + 1)]
        self.fusion = nn.ModuleDict({_key(*node): _fusion_node(config, *node) for node in nodes})
        widths = config.channels[: config.heads]
        self.heads = nn.ModuleList(nn.Conv3d(width, config.num_classes, 1, bias=False) for width in widths)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        self._check(x)
        maps, coarsest = [x], []  # of the latest stage; of each stage
        num = len(self.encoder)
        for first in range(1 - _TOGETHER, num, _TOGETHER):  # the encoder, which keeps twice as much, by itself
            stages = partial(self._run, range(max(first, 0), min(first + _TOGETHER, num)))
            maps, found = recomputed(stages, maps) if self.recompute else stages(maps)
            coarsest += found
        finest_first = coarsest[::-1]
        if not self.deep_supervision:
            prediction: Tensor = self.heads[0](finest_first[0])
            return prediction
        return tuple(head(x) for head, x in zip(self.heads, finest_first, strict=False))

    def _run(self, stages: range, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Computes stages from the maps of the one before, or the image; returns the last one's, the coarsest of each.

        Stage 0 is the encoder.
        """
        coarsest = []
        for stage in stages:
            maps = self._fuse(stage, maps) if stage else self._encode(*maps)
            coarsest.append(maps[-1])
        return maps, coarsest

    def _encode(self, x: Tensor) -> list[Tensor]:
        maps = []
        for units in self.encoder:
            x = units(x)
            maps.append(x)
        return maps

    def _fuse(self, stage: int, maps: list[Tensor]) -> list[Tensor]:
        """Coarsest first: gradients of the finest maps, the largest, then come before those that are added to them."""
        found: list[Tensor] = []
        for i in reversed(range(len(maps) - 1)):
            finer = maps[i - 1] if i else None
            found.insert(0, self.fusion[_key(stage, i + 1)](maps[i], maps[i + 1], finer))
        return found

    def _check(self, x: Tensor) -> None:
        where, channels, divisor = "input of E2ENet", self.config.in_channels, self.config.divisor
        shape, size = tuple(x.shape), tuple(x.shape[2:])
        if x.ndim != 5 or x.shape[1] != channels:
            remedy = "The config's in_channels says how many channels come in."
            raise DataError.of("shape", where, allowed=f"(B, {channels}, D, H, W)", given=shape, remedy=remedy)
        # a single voxel at the coarsest level would have no variance to normalise by
        if size == divisor or any(extent % step for extent, step in zip(size, divisor, strict=True)):
            allowed = f"D, H, W in multiples of {divisor}, and more than that"
            remedy = "Choose another size (--patch-size), or other strides."
            raise DataError.of("size", where, allowed=allowed, given=size, remedy=remedy)


def flow_counts(model: E2ENet, masks: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Counts, of each fusion node, the connections of the first convolution that each flow brings.

    A connection is a kernel with an active element; of a weight without a mask all are.

    >>> tiny = E2ENetConfig(channels=(2, 3, 4), strides=((2, 2, 2),) * 2, heads=1)
    >>> flow_counts(E2ENet(tiny), {})["stage1_level2"]
    {'forward': 9, 'upward': 9, 'downward': 6}
    """
    counts = {}
    for name, node in model.fusion.items():
        assert isinstance(node, FusionNode)
        weight = node.get_parameter("units.0.conv.weight")
        mask = masks.get(f"fusion.{name}.units.0.conv.weight", torch.ones_like(weight, dtype=torch.bool))
        is_active = mask.flatten(2).any(dim=2)
        counts[name] = {flow: int(is_active[:, at].sum()) for flow, at in node.flows.items()}
    return counts


def _key(stage: int, level: int) -> str:
    return f"stage{stage}_level{level}"


def _shift(config: E2ENetConfig, *, outer: bool) -> nn.Module | None:
    if config.shift is None or (outer and config.outer_kernel_size):
        return None
    axis = 2 + AXES.index(config.shift_axis)
    if config.shift_kind == "fixed":
        return Shift(config.shift, axis=axis)
    return LearnedShift(config.shift, axis=axis, rounded=config.shift_kind == "rounded")


def _kernel(config: E2ENetConfig, *, outer: bool) -> Triple:
    return (outer and config.outer_kernel_size) or config.kernel_size


def _encoder_level(config: E2ENetConfig, level: int) -> nn.Sequential:
    """Makes two Units, of which the first comes down from the level above with its stride."""
    width, kernel = config.channels[level - 1], _kernel(config, outer=True)
    above = config.in_channels if level == 1 else config.channels[level - 2]
    stride = (1, 1, 1) if level == 1 else config.strides[level - 2]
    return nn.Sequential(
        Unit(above, width, kernel_size=kernel, stride=stride, shift=_shift(config, outer=True)),
        Unit(width, width, kernel_size=kernel, shift=_shift(config, outer=True)),
    )


def _fusion_node(config: E2ENetConfig, stage: int, level: int) -> FusionNode:
    channels, strides = config.channels, config.strides
    last = stage + level == len(channels)
    return FusionNode(
        channels[level - 1],
        coarser=(channels[level], strides[level - 1]),
        finer=(channels[level - 2], strides[level - 2]) if level > 1 else None,
        kernel_size=_kernel(config, outer=last),
        shift=_shift(config, outer=last),
        num_units=2 if last else 1,
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

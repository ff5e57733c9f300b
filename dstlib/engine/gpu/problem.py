"""What a convolution by blocks is told: the problem beside its tensors, and how these lie one after the other.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dstlib.engine.gpu.blocks import Pair, Plan
from dstlib.engine.ops.operator import Problem

Triple = tuple[int, int, int]


class Launch(NamedTuple):
    """How Triton's kernels are cut into programs: positions of each, its warps, and steps in flight."""

    tile: int = 128
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class BlockConvProblem(Problem):
    """A convolution by blocks of channels, padded by half its kernel, of flat tensors.

    These are the sources, the weight, the bias where there is one, and the tables of the plan; in the backward
    directions the output's gradient follows.
    """

    num_sources: int
    has_bias: bool
    block: Pair
    stride: Triple
    shifted: bool  # whether any channel moves along depth
    tiled: bool  # whether the tables are those of tiles.cu
    launch: Triple  # as a Launch says it

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor | None, Plan]:
        """Returns the sources (B, C, D, H, W), the weight, the bias, and the plan."""
        sources, (weight, *rest) = list(tensors[: self.num_sources]), tensors[self.num_sources :]
        bias, tables = (rest[0], rest[1:]) if self.has_bias else (None, rest)
        return sources, weight, bias, Plan.of_tensors(tables, self.block)

    def size_of_output(self, size: Sequence[int], weight: Tensor) -> Triple:
        """Returns (D, H, W) of the output, from those of the input."""
        depth, height, width = (
            (extent + 2 * (taps // 2) - taps) // step + 1
            for extent, taps, step in zip(size, weight.shape[2:], self.stride, strict=True)
        )
        return depth, height, width


def new_map(like: Tensor, size: Sequence[int], channels: int) -> Tensor:
    """Returns room for as many samples (B, C, D, H, W) as ``like`` has, channels last in memory."""
    return channels_first(like.new_empty((len(like), *size, channels)))


def channels_last(x: Tensor) -> Tensor:
    """Returns a map (B, D, H, W, C), contiguous: itself, where its channels lie last."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """Returns a map (B, D, H, W, C) seen as (B, C, D, H, W)."""
    return x.permute(0, 4, 1, 2, 3)

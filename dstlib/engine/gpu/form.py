"""What a GPU kernel is told besides tensors: sizes, the form it is compiled for, and how work is cut into programs."""

from collections.abc import Sequence
from typing import NamedTuple

Triple = tuple[int, int, int]


class Launch(NamedTuple):
    """How the kernels are cut into programs: positions of each, its warps, and steps in flight."""

    tile: int = 128
    warps: int = 4
    stages: int = 3


class Shape(NamedTuple):
    """Kernel and stride of a convolution that pads by half its kernel."""

    kernel: Triple
    stride: Triple

    def of_output(self, size: Sequence[int]) -> Triple:
        """(D, H, W) of the output, from those of the input."""
        depth, height, width = (
            (extent + 2 * (taps // 2) - taps) // step + 1
            for extent, taps, step in zip(size, self.kernel, self.stride, strict=True)
        )
        return depth, height, width


class Size(NamedTuple):
    """How many voxels: of the map that is read, and of the positions that are computed."""

    depth: int
    height: int
    width: int
    out_depth: int
    out_height: int
    out_width: int
    positions: int


class Form(NamedTuple):
    """What a kernel is compiled for."""

    channels: int  # of the map that is read
    outputs: int  # channels of the map that is written, or of the output gradient
    columns: int  # N, of a row
    lanes: int  # N, or more: at least 16 and a power of two
    tile: int  # positions of a program, or of one step
    chunk: int  # entries of one step
    run: bool  # the entries of a step are neighbouring channels
    kernel: Triple
    stride: Triple
    back: bool  # reads at (position + padding - tap) / stride, not at position · stride + tap - padding
    shifted: bool
    ragged: bool  # the last run reaches beyond the channels
    precision: str  # of float32 products
    widen: bool  # multiplies in float32: Triton's interpreter takes bfloat16 for whole numbers


class Terms(NamedTuple):
    """What the sum of slots is compiled for."""

    channels: int
    slots: int
    most: int  # terms of a channel
    tile: int = 64  # positions of a program
    lanes: int = 32  # channels of a program

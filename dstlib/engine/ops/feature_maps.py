"""Feature maps as the kernels read and write them: depth last in memory, so that depths are the lanes of vectors.

Shapes: N batch, C channels, D, H, W depth, height, width. A map is a tensor (N, C, D, H, W) in any memory layout; the
kernels need the depths of a voxel column to lie side by side, as in ``x.permute(0, 1, 3, 4, 2).contiguous()``.
Torch's own operations give the same results on such a map as on any other.
"""

import torch
from torch import Tensor

from dstlib.engine.runtime.memory import buffer
from dstlib.engine.runtime.structs import Pattern, Source, Target

PAGE, PADDING = 1024, 32  # numbers
Norm = tuple[Tensor, Tensor, float]  # scale (N, C), offset (N, C), negative slope: what a reader applies to a map
Mapped = tuple[Tensor, Norm | None]  # a map, and the norm to apply while reading it


def empty_depth_last(size: tuple[int, int, int, int, int], like: Tensor) -> Tensor:
    """A new map (N, C, D, H, W), depth last, of the type and place of ``like``.

    Rows that would begin a multiple of ``PAGE`` apart are padded: all rows and channels would otherwise share the same
    few places of the caches.
    """
    num, strides = depth_last(size)
    reusable = like.dtype == torch.float32 and type(like) is Tensor and like.device.type == "cpu"
    memory = buffer(num) if reusable else like.new_empty(num)
    return memory.as_strided(size, strides)


def depth_last(size: tuple[int, int, int, int, int]) -> tuple[int, tuple[int, int, int, int, int]]:
    """How many numbers such a map takes, and its strides.

    >>> depth_last((1, 2, 3, 4, 5))
    (120, (120, 60, 1, 15, 3))
    """
    batch, channels, depth, height, width = size
    row = width * depth
    row += PADDING if row % PAGE == 0 else 0
    channel = height * row + (PADDING // 2 if row > width * depth else 0)
    return batch * channels * channel, (channels * channel, channel, 1, row, depth)


def source(x: Tensor, norm: Norm | None = None) -> Source:
    """Describes a depth-last map to the kernels, with the norm and activation to apply while it is read."""
    scale, offset, slope = norm or (None, None, 0.0)
    return Source(
        data=x.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        offset=None if offset is None else offset.data_ptr(),
        channels=x.shape[1],
        strides=_strides(x),
        slope=slope,
    )


def target(x: Tensor) -> Target:
    """Describes a depth-last map that the kernels are to fill."""
    return Target(data=x.data_ptr(), strides=_strides(x))


def pattern(rows: Tensor, cols: Tensor, num_cols: int) -> Pattern:
    """Describes connections in compressed rows to the kernels."""
    return Pattern(rows.data_ptr(), cols.data_ptr(), rows.numel() - 1, num_cols, cols.numel())


def activated(x: Tensor, norm: Norm | None) -> Tensor:
    """What a reader of ``x`` sees: ``y = scale · x + offset``, then max(y, slope · y)."""
    if norm is None:
        return x
    scale, offset, slope = norm
    y = torch.addcmul(offset[:, :, None, None, None], x, scale[:, :, None, None, None])
    return torch.maximum(y, y * slope)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    n, c, _, h, w = x.stride()
    return n, c, h, w

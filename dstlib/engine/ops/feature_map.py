"""Feature maps as the kernels read and write them: depth last in memory, so that depths are the lanes of vectors.

Shapes: N batch, C channels, D, H, W depth, height, width. A map is a tensor (N, C, D, H, W) in any memory layout; the
kernels need the depths of a voxel column to lie side by side, as in ``x.permute(0, 1, 3, 4, 2).contiguous()``.
Torch's own operations give the same results on such a map as on any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from dstlib.engine.ops.operator import Problem, Tensors, in_type, placed, stand_in
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.memory import buffer
from dstlib.errors import InputError

Norm = tuple[Tensor, Tensor, float]  # scale (N, C), offset (N, C), negative slope: what a reader applies to a map


@dataclass(frozen=True, eq=False)
class Layout:
    """What a prepared call depends on of a map that it reads; equal ones are the same object."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    slope: float | None  # None without a norm

    @cached_property
    def num_norms(self) -> int:
        """How many bytes the scales, or the offsets, of a norm take."""
        return 4 * self.size[0] * self.size[1]

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(size: tuple[int, ...], strides: tuple[int, ...], slope: float | None) -> "Layout":
        """Returns the one layout of these values."""
        return Layout(size, strides, slope)


class FeatureMap:
    """A map (N, C, D, H, W) with the norm that its readers apply, if any: raw values, and the norm.

    What a prepared call has written is known by its addresses alone; its tensors are made when they are asked for.

    >>> raw, norm = FeatureMap(torch.zeros(1, 2, 3, 4, 5))
    >>> norm is None
    True
    """

    memory: Tensor  # in which a map whose addresses are known lies
    shown: Tensor | None = None  # what is to have its values once they are written, if autograd knows of it
    _statistics: int  # numbers from there to its norm

    def __init__(self, raw: Tensor, norm: Norm | None = None) -> None:
        self.tensor: Tensor | None = raw  # None where nobody has asked for it yet
        self._norm = norm
        self.layout: Layout | None = None  # None where the addresses are not known
        self.address = self.scale = self.offset = 0

    @staticmethod
    def at(memory: Tensor, address: int, layout: Layout, statistics: int) -> "FeatureMap":
        """Returns the map that begins where ``memory`` does, at this address.

        With a norm after it, ``statistics`` numbers further its scale (N, C) begins, then its offset, both contiguous.
        """
        found = FeatureMap.__new__(FeatureMap)
        found.tensor, found._norm, found.layout = None, None, layout
        found.memory, found.address = memory, address
        found.scale = found.offset = 0
        if layout.slope is not None:
            found._statistics = statistics
            found.scale = address + 4 * statistics
            found.offset = found.scale + layout.num_norms
        return found

    @property
    def raw(self) -> Tensor:
        """The values before the norm."""
        if self.tensor is None:
            assert self.layout is not None
            self.tensor = placed(self.memory, self.layout.size, self.layout.strides)
        return self.tensor

    @property
    def norm(self) -> Norm | None:
        """The norm to apply while reading, or None."""
        if self._norm is None and self.layout is not None and self.layout.slope is not None:
            n, c, *_ = self.layout.size
            scale, offset = placed(self.memory, (2, n, c), (n * c, c, 1), self._statistics).unbind()
            self._norm = scale, offset, self.layout.slope
        return self._norm

    @property
    def is_normed(self) -> bool:
        """Whether there is a norm to apply."""
        return self._norm is not None or (self.layout is not None and self.layout.slope is not None)

    def stand_in(self) -> Tensor:
        """Returns a tensor of this size, and of no values yet."""
        if self.shown is not None:
            found, self.shown = self.shown, None
            return found
        return stand_in(self.layout.size) if self.layout is not None else stand_in(self.raw.shape, self.raw.dtype)

    def __iter__(self) -> Iterator[Tensor | Norm | None]:
        return iter((self.raw, self.norm))

    def locate(self) -> None:
        """Finds out the addresses of a map of float32 on a CPU that lies depth last."""
        x = self.raw
        self.memory, self.address = x, x.data_ptr()
        slope = None
        if self._norm is not None:
            scale, offset, slope = self._norm
            self._norm = scale, offset, slope = scale.contiguous(), offset.contiguous(), slope
            self.scale, self.offset = scale.data_ptr(), offset.data_ptr()
        self.layout = Layout.of(tuple(x.shape), x.stride(), slope)

    def activated(self) -> Tensor:
        """Computes with torch what readers see: ``y = scale · x + offset``, then max(y, slope · y)."""
        return activated(self.raw, self.norm)


def empty_depth_last(size: Sequence[int], like: Tensor) -> Tensor:
    """Returns a new map (N, C, D, H, W), depth last, of the type and place of ``like``.

    Rows that would begin a multiple of ``ROW_PAGE`` apart are padded: all rows and channels would otherwise share the
    same few places of the caches.
    """
    num, strides = depth_last(size)
    return empty(num, like).as_strided_(tuple(size), strides)  # itself, no view: see placed()


def empty_gradient(size: Sequence[int], like: Tensor) -> Tensor:
    """Returns a new map (N, C, D, H, W), depth last and without gaps: autograd adds such gradients up in place.

    >>> empty_gradient((1, 2, 3, 64, 64), torch.zeros(1)).permute(0, 1, 3, 4, 2).is_contiguous()
    True
    """
    _, channels, depth, height, width = size
    channel = height * width * depth
    return empty(prod(size), like).as_strided_(tuple(size), (channels * channel, channel, 1, width * depth, depth))


def empty(num: int, like: Tensor) -> Tensor:
    """Returns numbers of any value, of the type and place of ``like``, on memory that was used before if it can."""
    reusable = like.dtype == torch.float32 and type(like) in (Tensor, nn.Parameter) and like.device.type == "cpu"
    return buffer(num) if reusable else like.new_empty(num)


def depth_last(size: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Returns how many numbers such a map takes, and its strides.

    >>> depth_last((1, 2, 3, 4, 5))
    (120, (120, 60, 1, 15, 3))
    """
    batch, channels, depth, height, width = size
    row = width * depth
    row += structs.ROW_PADDING if row % structs.ROW_PAGE == 0 else 0
    channel = height * row + (structs.ROW_PADDING // 2 if row > width * depth else 0)
    return batch * channels * channel, (channels * channel, channel, 1, row, depth)


def source(x: Tensor, norm: Norm | None = None) -> structs.Source:
    """Describes a depth-last map to the kernels, with the norm and activation to apply while it is read."""
    scale, offset, slope = norm or (None, None, 0.0)
    return structs.Source(
        data=x.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        offset=None if offset is None else offset.data_ptr(),
        channels=x.shape[1],
        strides=plane_strides(x.stride()),
        slope=slope,
    )


def target(x: Tensor) -> structs.Target:
    """Describes a depth-last map that the kernels are to fill."""
    return structs.Target(data=x.data_ptr(), strides=plane_strides(x.stride()))


def plane_strides(strides: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns the strides that the kernels are told: all but the depth's, which is 1."""
    n, c, _, h, w = strides
    return n, c, h, w


def pattern_of(row_ptr: Tensor, col_idx: Tensor, num_cols: int) -> structs.Pattern:
    """Describes active kernels in compressed rows to the engine."""
    return structs.Pattern(row_ptr.data_ptr(), col_idx.data_ptr(), row_ptr.numel() - 1, num_cols, col_idx.numel())


def flat(maps: Sequence[FeatureMap]) -> tuple[list[Tensor], tuple[bool, ...], tuple[float, ...]]:
    """Returns maps as operators take them: tensors, which maps have a norm, and the slopes, see :class:`MapProblem`.

    Raises:
        InputError: A norm is not of its map's shape.
    """
    tensors, slopes = [each.raw for each in maps], []
    for each in maps:
        if each.norm is None:
            slopes.append(1.0)
            continue
        (scale, offset, slope), channels = each.norm, each.raw.shape[:2]
        if not scale.shape == offset.shape == channels:
            given = f"scale {tuple(scale.shape)}, offset {tuple(offset.shape)}"
            allowed, remedy = f"both (N, C) = {tuple(channels)}", "Each channel of each sample has its own."
            raise InputError.of("norm", "a map", allowed=allowed, given=given, remedy=remedy)
        tensors += [scale.contiguous(), offset.contiguous()]
        slopes.append(slope)
    return tensors, tuple(each.norm is not None for each in maps), tuple(slopes)


@dataclass(frozen=True)
class MapProblem(Problem):
    """A problem whose tensors begin with feature maps, then the scale and the offset of each that has a norm."""

    name: ClassVar[str]  # of the operation, for messages
    normed: tuple[bool, ...]  # which maps have a norm to apply
    slopes: tuple[float, ...]  # of each map

    def split(self, tensors: Tensors) -> tuple[list[FeatureMap], list[Tensor]]:
        """Returns the maps, and the tensors that follow: the reverse of :func:`flat`."""
        rest = iter(tensors[len(self.normed) :])
        flags = zip(self.normed, self.slopes, strict=True)
        norms = [(next(rest), next(rest), slope) if has else None for has, slope in flags]
        return list(map(FeatureMap, tensors, norms)), list(rest)

    def result(self, outputs: Tensors) -> FeatureMap:
        """Returns the map that the operator has computed."""
        return FeatureMap(outputs[0])

    def check(self, tensors: Tensors) -> None:
        """Refuses maps that do not have five axes, or differ in more than their channels.

        Raises:
            InputError: They do.
        """
        maps = tensors[: len(self.normed)]
        n, _, *extents = maps[0].shape if maps[0].ndim == 5 else (0, 0)
        if any(x.ndim != 5 or x.shape[0] != n or list(x.shape[2:]) != extents for x in maps):
            allowed = "(N, C, D, H, W)" if len(maps) == 1 else "(N, C, D, H, W) that agree but for C"
            raise self.refusal("maps", allowed, ", ".join(str(tuple(x.shape)) for x in maps))

    def refusal(self, what: str, allowed: str, given: str) -> InputError:
        """Returns the error of something that does not fit."""
        remedy = "Pass what the plain layer takes."
        return InputError.of(what, f"{self.name}()", allowed=allowed, given=given, remedy=remedy)

    def values(self, tensors: Tensors) -> list[Tensor]:
        """Computes with torch what readers of the maps see, whose gradients are those of the raw values."""
        maps, _ = self.split(tensors)
        return [x.raw if x.norm is None else activated(x.raw.detach(), x.norm) + (x.raw - x.raw.detach()) for x in maps]

    def in_type_of(self, weight: Tensor, tensors: Tensors) -> Tensors:
        """Returns the tensors with their maps, and the norms of these, in the type of a weight."""
        num = len(self.normed) + 2 * sum(self.normed)
        return [*(in_type(x, weight.dtype) for x in tensors[:num]), *tensors[num:]]


def activated(x: Tensor, norm: Norm | None) -> Tensor:
    """Computes with torch what a reader of ``x`` sees: ``y = scale · x + offset``, then max(y, slope · y)."""
    if norm is None:
        return x
    scale, offset, slope = norm
    y = torch.addcmul(offset[:, :, None, None, None], x, scale[:, :, None, None, None])
    return torch.maximum(y, y * slope)

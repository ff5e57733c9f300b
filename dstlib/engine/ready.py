"""Convolutions that nobody trains at the moment, ready to run: for each shape of their maps all but addresses is known.

Shapes: as in :mod:`dstlib.engine.convolution`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.engine.buffers import buffer
from dstlib.engine.calls import kernels_for
from dstlib.engine.conv_calls import SQUARES, Affine, describe, form_of, output_size, prepare
from dstlib.engine.convolution import Geometry, Mapped, Weights, call_of
from dstlib.engine.layouts import to_depth_last
from dstlib.engine.library import check
from dstlib.engine.maps import depth_last, empty_depth_last
from dstlib.engine.structs_conv import Conv

Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class _Job:
    """A call of a kernel, to be copied and completed by the addresses of its maps, and the output it is to fill."""

    conv: Conv
    kernel: Callable[[Conv, int], int]
    size: tuple[int, ...]
    num: int
    strides: tuple[int, ...]


class Ready:
    """A convolution, and the norm after it where there is one, for as long as its parameters stay as they are.

    Its kernels are transformed once, and calls are described once for each shape of maps: small maps are computed
    faster than they are described.
    """

    def __init__(self, weights: Weights, geometry: Geometry, affine: Affine | None = None) -> None:
        self.weights, self.geometry, self.affine = weights, geometry, affine
        self._prepared: dict[int, Tensor] = {}
        self._jobs: dict[Key, _Job | None] = {}

    def __call__(self, sources: Sequence[Mapped]) -> tuple[Tensor, Tensor] | None:
        """The output and what the norm finds, as of ``convolve``; None for maps that kernels cannot read."""
        key = tuple([(type(x), x.dtype, x.is_cpu, x.shape, x.stride(), norm is None) for x, norm in sources])
        if key not in self._jobs:
            self._jobs[key] = self._job(sources)
        job = self._jobs[key]
        if job is None:
            return None
        conv = Conv.from_buffer_copy(job.conv)
        maps = [to_depth_last(x) for x, _ in sources]
        for source, x, (_, norm) in zip(conv.sources, maps, sources, strict=False):
            source.data = x.data_ptr()
            if norm:
                source.scale, source.offset, source.slope = norm[0].data_ptr(), norm[1].data_ptr(), norm[2]
        y = buffer(job.num).as_strided(job.size, job.strides)
        conv.out.data = y.data_ptr()
        normed = torch.empty(4, *job.size[:2]) if self.affine else torch.empty(0)
        if self.affine:
            conv.norm.found = normed.data_ptr()
        check(job.kernel(conv, torch.get_num_threads()), "convolution")
        return y, normed

    def _job(self, sources: Sequence[Mapped]) -> _Job | None:
        call = call_of(sources, self.weights, self.geometry)
        found = kernels_for(*call.maps, *call.parameters)
        if not found or any(type(x) is not Tensor for x in call.maps):
            return None
        maps = [to_depth_last(x) for x in call.maps]
        size = output_size(maps[0], call.weight, call.stride)
        y = empty_depth_last(size, maps[0])
        norm = (*self.affine, y) if self.affine else None  # where it finds what is an address like those of the maps
        form = form_of(call.weight, call.stride, size[3:])
        if form not in self._prepared:
            self._prepared[form] = prepare(call.weight, call.pattern[2], form)
        kernel = found.conv_squares if form == SQUARES else found.conv_taps
        return _Job(describe(maps, call, self._prepared[form], y, norm), kernel, size, *depth_last(size))

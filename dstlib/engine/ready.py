"""Convolutions that nobody trains at the moment, ready to run.

Shapes: as in :mod:`dstlib.engine.convolution`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dstlib.engine.calls import kernels_for
from dstlib.engine.conv_calls import SQUARES, Affine, describe, form_of, output_size, prepare
from dstlib.engine.convolution import Geometry, Weights, call_of
from dstlib.engine.layouts import to_depth_last
from dstlib.engine.library import check
from dstlib.engine.maps import Mapped, empty_depth_last
from dstlib.engine.structs_conv import Conv
from dstlib.engine.templates import Template, Templates, point


class Ready:
    """A convolution, and the norm after it where there is one, for as long as its parameters stay as they are.

    Its kernels are transformed once, and its calls described once for each shape of maps.
    """

    def __init__(self, weights: Weights, geometry: Geometry, affine: Affine | None = None) -> None:
        self.weights, self.geometry, self.affine = weights, geometry, affine
        self._prepared: dict[int, Tensor] = {}
        self._templates: Templates[Conv] = Templates()

    def __call__(self, sources: Sequence[Mapped]) -> tuple[Tensor, Tensor] | None:
        """The output and what the norm finds, as of ``convolve``; None for maps that kernels cannot read."""
        template = self._templates.find(sources, self._describe)
        if template is None:
            return None
        conv, y = template.start()
        maps = [to_depth_last(x) for x, _ in sources]
        for source, x, (_, norm) in zip(conv.sources, maps, sources, strict=False):
            point(source, x, norm)
        normed = torch.empty(4, *template.size[:2]) if self.affine else torch.empty(0)
        if self.affine:
            conv.norm.found = normed.data_ptr()
        check(template.kernel(conv, torch.get_num_threads()), "convolution")
        return y, normed

    def _describe(self, sources: Sequence[Mapped]) -> Template[Conv] | None:
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
        return Template.of(describe(maps, call, self._prepared[form], y, norm), kernel, size)

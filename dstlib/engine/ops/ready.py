"""Convolutions that nobody trains at the moment, ready to run.

Shapes: as in :mod:`dstlib.engine.ops.convolution`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dstlib.engine.ops.conv_calls import Affine, describe, form_of, output_size, prepare
from dstlib.engine.ops.convolution import Geometry, Weights, call_of
from dstlib.engine.ops.feature_maps import Mapped, empty_depth_last
from dstlib.engine.ops.templates import Template, Templates
from dstlib.engine.runtime.library import Kernels
from dstlib.engine.runtime.structs import FORM_WINOGRAD, Conv


class Ready:
    """A convolution, and the norm after it where there is one, for as long as its parameters stay as they are.

    Its kernels are transformed once, and its calls described once for each shape of maps.
    """

    def __init__(self, weights: Weights, geometry: Geometry, affine: Affine | None = None) -> None:
        self.weights, self.geometry, self.affine = weights, geometry, affine
        self._prepared: dict[int, Tensor] = {}
        parameters = [x for x in (weights.weight, weights.bias) if x is not None]
        self._templates: Templates[Conv] = Templates("convolution", *parameters)

    def __call__(self, sources: Sequence[Mapped]) -> tuple[Tensor, Tensor] | None:
        """The output and what the norm finds, as of ``convolve``; None for maps that kernels cannot read."""
        size = (4, sources[0][0].shape[0], self.weights.weight.shape[0]) if self.affine else (0,)
        normed = torch.empty(size)

        def complete(conv: Conv) -> None:
            if self.affine:
                conv.norm.statistics = normed.data_ptr()

        y = self._templates.run(sources, self._describe, complete)
        return None if y is None else (y, normed)

    def _describe(self, found: Kernels, sources: Sequence[Mapped]) -> Template[Conv]:
        call = call_of(sources, self.weights, self.geometry)
        size = output_size(call.maps[0], call.weight, call.stride)
        y = empty_depth_last(size, call.maps[0])
        norm = (*self.affine, y) if self.affine else None  # where it finds what is an address like those of the maps
        form = form_of(call.weight, call.stride, size[3:])
        if form not in self._prepared:
            self._prepared[form] = prepare(call.weight, call.pattern[2], form)
        kernel = found.conv_winograd if form == FORM_WINOGRAD else found.conv_direct
        return Template.of(describe(call.maps, call, self._prepared[form], y, norm), kernel, y)

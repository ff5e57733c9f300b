"""Calls of kernels where nobody records them: for each shape of maps all but addresses is described once.

Small maps are computed faster than their calls are described.
"""

from collections.abc import Callable, Sequence
from ctypes import Structure
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dstlib.engine.ops.feature_maps import Mapped, depth_last
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import kernels_for
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.memory import buffer
from dstlib.engine.runtime.structs import Conv

Job = TypeVar("Job", bound=Structure)
Five = tuple[int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class Template(Generic[Job]):
    """A call to be copied and completed by the addresses of its maps, its kernel, and the output it is to fill."""

    call: Job
    kernel: Callable[[Job, int], int]
    size: Five
    num: int
    strides: Five

    @classmethod
    def of(cls, call: Job, kernel: Callable[[Job, int], int], out: Tensor) -> "Template[Job]":
        """The template of a call, from one whose output is this map."""
        n, c, d, h, w = out.shape
        return cls(call, kernel, (n, c, d, h, w), *depth_last((n, c, d, h, w)))


# Of kernels that can read these maps, which lie depth last.
Describe = Callable[[Kernels, Sequence[Mapped]], Template[Job]]


class Templates(Generic[Job]):
    """Templates of an operation with these parameters, described as shapes of maps come along."""

    def __init__(self, what: str, *parameters: Tensor) -> None:
        self._what, self._parameters = what, parameters
        self._known: dict[tuple[object, ...], Template[Job] | None] = {}

    def run(
        self, sources: Sequence[Mapped], describe: Describe[Job], complete: Callable[[Job], None] | None = None
    ) -> Tensor | None:
        """The output for these maps; None where kernels cannot read them. ``complete`` adds further addresses."""
        template = self._find(sources, describe)
        if template is None:
            return None
        call = type(template.call).from_buffer_copy(template.call)
        out = buffer(template.num).as_strided(template.size, template.strides)
        call.out.data = out.data_ptr()
        read = call.sources if isinstance(call, Conv) else [call.input]
        maps = [to_depth_last(x) for x, _ in sources]
        for source, x, (_, norm) in zip(read, maps, sources, strict=False):
            source.data = x.data_ptr()
            if norm:
                source.scale, source.offset, source.slope = norm[0].data_ptr(), norm[1].data_ptr(), norm[2]
        if complete:
            complete(call)
        check(template.kernel(call, torch.get_num_threads()), self._what)
        return out

    def _find(self, sources: Sequence[Mapped], describe: Describe[Job]) -> Template[Job] | None:
        key = tuple([(type(x), x.dtype, x.is_cpu, x.shape, x.stride(), norm is None) for x, norm in sources])
        if key not in self._known:
            found = kernels_for(*[x for x, _ in sources], *self._parameters)
            readable = found if all(type(x) is Tensor for x, _ in sources) else None
            maps = [(to_depth_last(x), norm) for x, norm in sources] if readable else []
            self._known[key] = describe(readable, maps) if readable else None
        return self._known[key]

    def __getstate__(self) -> dict[str, object]:
        """As of any object, but copies begin anew: what is known of shapes are addresses."""
        return {**self.__dict__, "_known": {}}

"""Calls of kernels where nobody records them: for each shape of maps all but addresses is described once.

Small maps are computed faster than their calls are described.
"""

from collections.abc import Callable, Sequence
from ctypes import Structure
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from dstlib.engine.buffers import buffer
from dstlib.engine.maps import Mapped, Norm, depth_last
from dstlib.engine.structs import Source

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
    def of(cls, call: Job, kernel: Callable[[Job, int], int], size: Five) -> "Template[Job]":
        """The template of a call whose output is a map of this size."""
        return cls(call, kernel, size, *depth_last(size))

    def start(self) -> tuple[Job, Tensor]:
        """The call, which still has the addresses of the maps it was described for, and a new map that it fills."""
        call = type(self.call).from_buffer_copy(self.call)
        out = buffer(self.num).as_strided(self.size, self.strides)
        call.out.data = out.data_ptr()
        return call, out


class Templates(Generic[Job]):
    """Templates of an operation, described as shapes come along; None for maps that no kernel can read."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Template[Job] | None] = {}

    def find(
        self, sources: Sequence[Mapped], describe: Callable[[Sequence[Mapped]], Template[Job] | None]
    ) -> Template[Job] | None:
        """The template for maps like these."""
        key = tuple([(type(x), x.dtype, x.is_cpu, x.shape, x.stride(), norm is None) for x, norm in sources])
        if key not in self._known:
            self._known[key] = describe(sources)
        return self._known[key]

    def __getstate__(self) -> dict[str, object]:
        """As of any object, but copies begin anew: what is known of shapes are addresses."""
        return {"_known": {}}


def point(source: Source, x: Tensor, norm: Norm | None) -> None:
    """Lets a source that has been described read this map, which lies depth last, with this norm."""
    source.data = x.data_ptr()
    if norm:
        source.scale, source.offset, source.slope = norm[0].data_ptr(), norm[1].data_ptr(), norm[2]

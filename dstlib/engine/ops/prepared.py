"""Prepared calls: a kernel's arguments, settled once for parameters and layouts of maps, and used where nobody records.

Small maps are computed faster than calls are described.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import Structure, c_int, c_int64, c_void_p
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from dstlib.engine.ops import operator
from dstlib.engine.ops.feature_map import FeatureMap, Layout, MapProblem, depth_last, plane_strides
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import (
    Implementation,
    Operator,
    Tensors,
    by_kernel,
    is_readable,
    is_recorded,
    placed,
    present_kernels,
)
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.memory import buffer
from dstlib.engine.runtime.structs import InstanceNorm, Source, Target

MOST_LAYOUTS = 16  # for which a layer keeps calls
_WORD = 8  # bytes: addresses are written as whole words
_Kernel = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)
State = tuple[object, ...]


@dataclass(frozen=True)
class Places:
    """The parts of a struct that change from call to call: maps to read, the map to fill, what its norm finds.

    ``size`` (N, C, D, H, W) is that of the map to fill, ``slope`` that behind its norm.
    """

    sources: Sequence[Source]
    out: Target
    size: tuple[int, ...]
    norm: InstanceNorm | None = None
    slope: float | None = None


class PreparedCall:
    """A kernel and its struct, complete but for its places; ``alive`` are the tensors that it points to."""

    def __init__(self, what: str, kernel: Callable[..., int], job: Structure, places: Places, alive: object) -> None:
        num, strides = depth_last(places.size)
        places.out.strides = plane_strides(strides)
        self._what, self._alive = what, alive
        self._out = Layout.of(places.size, strides, places.slope)
        self._kernel = ctypes.cast(kernel, _Kernel)  # type: ignore[arg-type]  # a pointer to a function
        start = ctypes.addressof(job)
        fields = (Source.data.offset, Source.scale.offset, Source.offset.offset)
        self._sources = [[(ctypes.addressof(x) - start + field) // _WORD for field in fields] for x in places.sources]
        self._target = (ctypes.addressof(places.out) - start + Target.data.offset) // _WORD
        self._found = 0
        self._map = self._room = num
        if places.norm is not None:
            self._found = (ctypes.addressof(places.norm) - start + InstanceNorm.statistics.offset) // _WORD
            self._room += 4 * places.size[0] * places.size[1]
        self._job = bytes(job)
        self._copy = (c_int64 * (len(self._job) // _WORD)).from_buffer_copy

    def __call__(self, maps: Sequence[FeatureMap]) -> FeatureMap:
        """Returns the map that the kernel makes of these, which lie as those that it was prepared for."""
        job, memory = self._copy(self._job), buffer(self._room)  # a copy: threads may call at the same time
        for (data, scale, offset), each in zip(self._sources, maps, strict=True):
            job[data], job[scale], job[offset] = each.address, each.scale, each.offset
        job[self._target] = address = memory.data_ptr()
        if self._found:
            job[self._found] = address + 4 * self._map
        if self._kernel(ctypes.addressof(job), torch.get_num_threads()):
            check(1, self._what)
        return FeatureMap.at(memory, address, self._out, self._map)

    def outputs(self, maps: Sequence[FeatureMap]) -> list[Tensor]:
        """Returns the map, and what the norm after it finds: scale, offset, mean, 1 / √(variance + eps), (4, N, O)."""
        out = self(maps)
        if not self._found:
            return [out.raw]
        n, c, *_ = self._out.size
        # on memory of its own, as operators return it
        return [out.raw, placed(out.memory, (4, n, c), (n * c, c, 1), self._map).clone()]


M = TypeVar("M", bound=MapProblem)


def by_prepared(
    name: str,
    prepare: Callable[[Kernels, M, list[FeatureMap], Tensors], PreparedCall],
    accepts: Callable[[M, Tensors], bool] = lambda problem, tensors: True,
    reads: Callable[[M, Tensors], Tensors] = lambda problem, tensors: tensors,
) -> Implementation[M]:
    """Returns an implementation as of :func:`by_kernel` whose calls can be prepared, of maps that are located."""

    def settle(found: Kernels, problem: M, tensors: Tensors) -> tuple[PreparedCall, list[FeatureMap]]:
        maps, _ = problem.split(tensors)
        assert all(map(locate, maps)), "the implementation accepts what kernels can read"
        return prepare(found, problem, maps, tensors), maps

    def run(found: Kernels, problem: M, tensors: Tensors) -> list[Tensor]:
        call, maps = settle(found, problem, tensors)
        return call.outputs(maps)

    return replace(
        by_kernel(name, run, accepts, reads),
        prepare=lambda problem, tensors: settle(present_kernels(), problem, tensors)[0],
    )


Call = TypeVar("Call")


class PreparedCalls(Generic[Call]):
    """The prepared calls of an operation with certain parameters, as layouts of what they read come along."""

    def __init__(self) -> None:
        self._known: tuple[State, dict[object, Call]] = ((), {})

    def of(self, state: State) -> dict[object, Call]:
        """Returns what is prepared for parameters in this state, by layout."""
        known, calls = self._known
        if known != state or len(calls) > MOST_LAYOUTS:
            calls = {}
            self._known = state, calls
        return calls

    def __getstate__(self) -> dict[str, object]:
        """Copies begin anew: what is known are addresses."""
        return {"_known": ((), {})}


def run(
    operation: Operator[M],
    calls: PreparedCalls[PreparedCall | None] | None,  # None where there is no kernel
    state: State | None,
    maps: Sequence[FeatureMap],
    stated: Callable[[], tuple[M, Tensors]],
) -> FeatureMap:
    """Computes a map by the call that is prepared for parameters in this state and these maps, if there can be one.

    Otherwise the operator computes it from what is ``stated``.
    """
    if calls is not None and state is not None:
        layouts = tuple([each.layout for each in maps])
        if None not in layouts or all(map(locate, maps)):
            known = calls.of(state)
            if None in layouts:
                layouts = tuple([each.layout for each in maps])
            if layouts not in known:
                known[layouts] = operation.prepare(*stated())
            if call := known[layouts]:
                return call(maps)
    problem, tensors = stated()
    return problem.result(operation(problem, tensors))


def state_of(
    given: Sequence[Tensor | None], copied: Sequence[Tensor] = (), pointed: Sequence[Tensor | None] = ()
) -> State | None:
    """Returns what a prepared call depends on besides layouts of what it is given; None where there can be none.

    That is where there are no kernels, somebody records, or changes of the parameters that are copied go unnoticed.
    Those that are pointed to may change.
    """
    if is_recorded(*given, *copied, *pointed):
        return None
    found = operator.kernels()
    if found is None:
        return None
    state: list[object] = [found]
    for x in copied:
        if x.is_inference():  # it has no version
            return None
        state += (x._version, x.data_ptr())
    for each in pointed:
        state.append(each is not None and each.data_ptr())
    return tuple(state)


def locate(x: FeatureMap) -> bool:
    """Finds out where a map lies, which is put depth last where it is not; False for one that kernels cannot read."""
    if x.layout is not None:
        return True
    raw = x.raw
    if type(raw) not in (Tensor, nn.Parameter) or not is_readable(raw) or raw.ndim != 5:
        return False
    x.tensor = to_depth_last(raw)
    x.locate()
    return True

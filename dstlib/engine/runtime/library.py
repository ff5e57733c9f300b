"""The compiled kernels: found, loaded and described. Without them the engine computes with torch alone.

The library is plain C++ without torch's headers, built while dstlib is installed where there is a compiler; it is
called through pointers to the structs of ``csrc/*.h``, which are mirrored in :mod:`dstlib.engine.runtime.structs`.
"""

import ctypes
import os
import platform
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dstlib.engine.runtime import structs
from dstlib.errors import SettingError

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
VARIABLE = "DSTLIB_ENGINE"  # the name of an instruction set, or "torch": what is used instead of the best there is


STRUCTS = tuple(x for x in vars(structs).values() if isinstance(x, type) and x.__module__ == structs.__name__)
IN_C = {"PackWeights": "Prepare", "ConvTranspose": "Upsample", "MaxPool": "Pool", "Reorder": "Relayout"}
IN_C["InstanceNormBackward"] = "NormBackward"  # until the sources follow


class Kernels(Structure):
    """The kernels of one instruction set: functions of a struct and a number of threads, 0 where all went well."""

    _fields_ = (
        ("name", c_char_p),
        ("lanes", c_int64),
        ("conv_winograd", ctypes.CFUNCTYPE(c_int, POINTER(structs.Conv), c_int)),
        ("conv_direct", ctypes.CFUNCTYPE(c_int, POINTER(structs.Conv), c_int)),
        ("conv_backward_weights", ctypes.CFUNCTYPE(c_int, POINTER(structs.Conv), c_int)),
        ("conv_pack_weights", ctypes.CFUNCTYPE(c_int, POINTER(structs.PackWeights), c_int)),
        ("linear_forward", ctypes.CFUNCTYPE(c_int, POINTER(structs.Linear), c_int)),
        ("linear_backward_weights", ctypes.CFUNCTYPE(c_int, POINTER(structs.Linear), c_int)),
        ("conv_transpose_forward", ctypes.CFUNCTYPE(c_int, POINTER(structs.ConvTranspose), c_int)),
        ("conv_transpose_backward_input", ctypes.CFUNCTYPE(c_int, POINTER(structs.ConvTranspose), c_int)),
        ("conv_transpose_backward_weights", ctypes.CFUNCTYPE(c_int, POINTER(structs.ConvTranspose), c_int)),
        ("max_pool_forward", ctypes.CFUNCTYPE(c_int, POINTER(structs.MaxPool), c_int)),
        ("max_pool_backward", ctypes.CFUNCTYPE(c_int, POINTER(structs.MaxPool), c_int)),
        ("instance_norm_backward", ctypes.CFUNCTYPE(c_int, POINTER(structs.InstanceNormBackward), c_int)),
        ("activation_forward", ctypes.CFUNCTYPE(c_int, POINTER(structs.Activation), c_int)),
        ("reorder_to_depth_last", ctypes.CFUNCTYPE(c_int, POINTER(structs.Reorder), c_int)),
        ("reorder_to_channels_first", ctypes.CFUNCTYPE(c_int, POINTER(structs.Reorder), c_int)),
    )


@dataclass(frozen=True)
class Info:
    """What the engine computes with on this machine, and why.

    >>> from dstlib.engine import info
    >>> info().path in ("avx512", "avx2", "generic", "torch")
    True
    """

    path: str  # an instruction set, or "torch"
    reason: str
    threads: int
    threads_from: str
    machine: str

    def __str__(self) -> str:
        return (
            f"dstlib engine: {self.path} ({self.reason}), {self.threads} threads ({self.threads_from}), {self.machine}"
        )


def info() -> Info:
    """Which kernels run here: those of an instruction set, or torch's own where none were built, and the reason."""
    path, reason = _choice()
    library = _library()
    threads_from = library.engine_threads().decode() if library and path != "torch" else "torch"
    return Info(path, reason, torch.get_num_threads(), threads_from, _machine())


@cache
def kernels() -> Kernels | None:
    """The kernels to call; None where torch has to do."""
    path, _ = _choice()
    library = _library()
    return None if library is None or path == "torch" else _kernels(library, path)


def check(status: int, what: str) -> None:
    """Raises MemoryError for a kernel that could not allocate what it needs."""
    if status:
        raise MemoryError(f"{what}: no memory for intermediate results. Use fewer threads or smaller inputs.")


@cache
def _choice() -> tuple[str, str]:
    asked = os.environ.get(VARIABLE)
    library = _library()
    if asked is not None and asked not in (*INSTRUCTION_SETS, "torch"):
        allowed = "one of " + ", ".join((*INSTRUCTION_SETS, "torch"))
        raise SettingError.of(VARIABLE, "the environment", allowed=allowed, given=asked, remedy="Or unset it.")
    if asked == "torch":
        return "torch", f"{VARIABLE}=torch"
    if library is None:
        return "torch", "the kernels were not built: install dstlib again where there is a C++ compiler"
    if asked is None:
        best = _kernels(library, None)
        assert best is not None, "generic kernels run everywhere"
        return best.name.decode(), "the best this processor has"
    if _kernels(library, asked) is None:
        remedy = "Unset it for the best there is."
        allowed = "an instruction set of this processor"
        raise SettingError.of(VARIABLE, "the environment", allowed=allowed, given=asked, remedy=remedy)
    return asked, f"{VARIABLE}={asked}"


@cache
def _library() -> ctypes.CDLL | None:
    files = sorted(Path(__file__).parents[1].glob("_kernels*.so")) + sorted(
        Path(__file__).parents[1].glob("_kernels*.pyd")
    )
    if not files:
        return None
    library = ctypes.CDLL(str(files[0]))
    library.engine_kernels.restype = POINTER(Kernels)
    library.engine_kernels.argtypes = [c_char_p]
    library.engine_threads.restype = c_char_p
    library.engine_size.restype = c_int64
    for struct in (*STRUCTS, Kernels):
        built = library.engine_size(IN_C.get(struct.__name__, struct.__name__).encode())
        here = ctypes.sizeof(struct)
        assert built == here, f"{files[0].name} is of another version ({struct.__name__}): install dstlib again"
    return library


def _kernels(library: ctypes.CDLL, name: str | None) -> Kernels | None:
    found = library.engine_kernels(name.encode() if name else None)
    return found.contents if found else None


def _machine() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

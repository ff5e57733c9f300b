"""The compiled kernels: found, loaded and described. Without them the engine computes with torch alone.

The library is plain C++ without torch's headers, built while dstlib is installed where there is a compiler; it is
called through pointers to the structs of ``csrc/include``, which :mod:`dstlib.engine.runtime.structs` reads.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Mapping
from ctypes import POINTER, Structure, c_char_p, c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dstlib.cores import usable_cores
from dstlib.engine.runtime import structs
from dstlib.errors import SettingError
from dstlib.runtime import VARIABLE, library_file

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
AGAIN = "install dstlib again"


class Kernels:
    """The kernels of one instruction set: functions of a problem and a number of threads, 0 where all went well.

    Which there are, and what they take, says the library itself, from ``csrc/kernels.def``.
    """

    def __init__(self, isa: Structure, problems: Mapping[str, Any]) -> None:
        self.name, self.lanes = isa.name.decode(), isa.lanes
        for kernel in (problems["Kernel"] * isa.num_kernels).from_address(isa.kernels):
            problem = problems[kernel.problem.decode()]
            here = ctypes.sizeof(problem)
            assert kernel.problem_size == here, f"the library is of another version ({problem.__name__}): {AGAIN}"
            setattr(self, kernel.name.decode(), ctypes.CFUNCTYPE(c_int, POINTER(problem), c_int)(kernel.run))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[[Structure, int], int]: ...


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
    cores: int  # how many threads can run at once: cores that this process may use, within its quota of time
    machine: str

    def __str__(self) -> str:
        are_too_many = f", of which {self.cores} can run at once: see torch.set_num_threads()"
        threads = f"{self.threads} threads ({self.threads_from}{are_too_many if self.threads > self.cores else ''})"
        return f"dstlib engine: {self.path} ({self.reason}), {threads}, {self.machine}"


def info() -> Info:
    """Says which kernels run here: those of an instruction set, or torch's own where none were built, and why."""
    path, reason = _choice()
    library = _library()
    threads_from = library.engine_threads().decode() if library and path != "torch" else "torch"
    return Info(path, reason, torch.get_num_threads(), threads_from, usable_cores(), _machine())


@cache
def kernels() -> Kernels | None:
    """Returns the kernels to call; None where torch has to do."""
    path, _ = _choice()
    library = _library()
    return None if library is None or path == "torch" else _kernels(library, path)


def fingerprint_function() -> int | None:
    """Returns the address of ``engine_fingerprint``; None where no kernels were built."""
    found = getattr(_library(), "engine_fingerprint", None)
    return None if found is None else ctypes.cast(found, c_void_p).value


def check(status: int, what: str) -> None:
    """Checks what a kernel returned.

    Raises:
        MemoryError: it could not allocate what it needs.
    """
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
        return best.name, "the best this processor has"
    if _kernels(library, asked) is None:
        remedy = "Unset it for the best there is."
        allowed = "an instruction set of this processor"
        raise SettingError.of(VARIABLE, "the environment", allowed=allowed, given=asked, remedy=remedy)
    return asked, f"{VARIABLE}={asked}"


@cache
def _library() -> ctypes.CDLL | None:
    file = library_file()
    return None if file is None else load(file)


def load(file: Path) -> ctypes.CDLL:
    """Loads a library of kernels."""
    library = ctypes.CDLL(str(file))
    assert hasattr(library, "engine_instruction_set"), f"{file.name} is of another version: {AGAIN}"
    library.engine_instruction_set.restype = c_void_p
    library.engine_instruction_set.argtypes = [c_char_p]
    library.engine_threads.restype = c_char_p
    return library


def _kernels(library: ctypes.CDLL, name: str | None, problems: Mapping[str, Any] = vars(structs)) -> Kernels | None:
    """Returns the kernels of an instruction set, by default the best there is; None where there is none."""
    found = library.engine_instruction_set(name.encode() if name else None)
    return Kernels(problems["InstructionSet"].from_address(found), problems) if found else None


def _machine() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        for line in names.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

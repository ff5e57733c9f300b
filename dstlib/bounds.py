"""How much memory is left: what a file asks for is compared with it before anything is allocated."""

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from dstlib.errors import DstlibError, StateError

_GROUPS = {  # where limits of the second version are, and of the first: of all, in use, and of that what can be dropped
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
# What torch's CPU allocator, C++, cuDNN and cuBLAS say within a RuntimeError, which torch raises for all of them.
_OUT = (
    *("DefaultCPUAllocator", "std::bad_alloc", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED"),
    "Storage size calculation overflowed",  # more bytes than there are numbers for
)


def require_memory(
    num_bytes: int, what: str, where: str, *, remedy: str, error: type[DstlibError] = StateError
) -> None:
    """Checks that so much memory can be had.

    Raises:
        StateError: It cannot; or an error of another class, ``error``.

    >>> require_memory(10**18, "tensor x", "file m", remedy="Copy the file again.")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dstlib.errors.StateError: tensor x of file m: expected no more than the ... GB of memory that are left, got ...
    """
    left = available_memory()
    if num_bytes > left:
        allowed = f"no more than the {left / 1e9:,.1f} GB of memory that are left"
        given = f"{min(num_bytes, sys.maxsize) / 1e9:,.1f} GB"
        raise error.of(what, where, allowed=allowed, given=given, remedy=remedy)


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error tells that memory is out, and nothing else is wrong.

    On a CPU torch raises a RuntimeError of no class of its own, to be known by its text.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shape '[2]' is invalid"))
    (True, False)
    """
    from torch import OutOfMemoryError  # not with the module: what only asks for memory needs no torch

    if isinstance(error, (MemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT)


def available_memory() -> int:
    """Returns how many bytes this process may still take, as far as the system tells."""
    return max(0, min([sys.maxsize, *_of_machine(), *_of_process(), *_of_groups()]))


def most_memory() -> int:
    """Returns how many bytes this process has held at most; 0 where the system does not tell."""
    with suppress(ImportError):
        import resource  # Windows has none

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def trim_heap() -> None:
    """Gives what has been freed in pieces back to the system, where the allocator is glibc's, which keeps it else."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _of_machine() -> Iterator[int]:
    with suppress(OSError, KeyError):
        table = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
        yield 1024 * (int(table["MemAvailable"]) + int(table["SwapFree"]))


def _of_process() -> Iterator[int]:
    with suppress(OSError, ImportError):
        import resource  # Windows has none

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            num_pages = int(Path("/proc/self/statm").read_text().split()[0])
            yield limit - num_pages * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """Yields what the control groups that this process is in leave: that of its container, or of its job."""
    for kind, group in control_groups({kind: root for kind, (root, *_) in _GROUPS.items()}):
        _, limit, usage, droppable = _GROUPS[kind]
        with suppress(OSError, ValueError):  # none there, or "max"
            left = int((group / limit).read_text())
            yield left - _in_use(group, usage, droppable)


def control_groups(roots: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yields the folders of the control groups that this process is in, and of those above, each with its kind.

    ``roots`` are by kind: the name of a controller of the first version, or "" for the second.
    """
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, name = line.split(":", 2)
            for kind in kinds.split(","):
                if kind in roots:
                    group = roots[kind] / name.lstrip("/")
                    yield from ((kind, above) for above in (group, *group.parents))


def _in_use(group: Path, usage: str, droppable: str) -> int:
    """Counts the bytes that a group holds, but for files that were read and can be read again; 0 where it says none."""
    with suppress(OSError, ValueError):
        held = int((group / usage).read_text())
        table = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, held - int(table.get(droppable, 0)))
    return 0

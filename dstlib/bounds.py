"""How much memory is left: what a file asks for is compared with it before anything is allocated."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dstlib.errors import DstlibError, StateError

_GROUPS = {  # where limits of the second version are, and of the first
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}


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


def available_memory() -> int:
    """Returns how many bytes this process may still take, as far as the system tells."""
    return max(0, min([sys.maxsize, *_of_machine(), *_of_process(), *_of_groups()]))


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
    """Yields the limits of the control groups that this process is in: of its container, or of its job."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, name = line.split(":", 2)
            if kind in _GROUPS:
                root, limit = _GROUPS[kind]
                group = root / name.lstrip("/")
                for above in (group, *group.parents):
                    with suppress(OSError, ValueError):  # none there, or "max"
                        yield int((above / limit).read_text())

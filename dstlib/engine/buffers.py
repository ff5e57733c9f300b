"""Memory for large maps, used again: the first touch of fresh memory costs more than most layers compute.

A map of 50 MB from the operating system takes several times as long to fill as one that has been written before, and
the C library gives blocks of that size back at once.
"""

import mmap
import threading
import weakref
from collections import defaultdict

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes from which it pays; the C library keeps smaller blocks by itself
GRAIN = 1 << 16
_lock = threading.Lock()
_idle: dict[int, list[mmap.mmap]] = defaultdict(list)
_bytes = {"idle": 0, "used": 0, "peak": 0}


def buffer(num: int) -> Tensor:
    """``num`` float32 numbers of any value on the CPU; their memory is used again when the last tensor on it is gone.

    >>> buffer(1 << 20).shape
    torch.Size([1048576])
    """
    size = -(-4 * num // GRAIN) * GRAIN
    if size < SMALLEST:
        return torch.empty(num)
    with _lock:
        block = _idle[size].pop() if _idle[size] else None
        if block:
            _bytes["idle"] -= size
        _bytes["used"] += size
        _bytes["peak"] = max(_bytes["peak"], _bytes["used"])
    block = block or _allocate(size)
    view = memoryview(block)  # torch holds this very object for as long as it uses the memory
    weakref.finalize(view, _give_back, block, size).atexit = False
    return torch.frombuffer(view, dtype=torch.float32, count=num)


def release_memory() -> None:
    """Gives the memory that no map uses at the moment back to the system."""
    with _lock:
        _idle.clear()
        _bytes.update(idle=0, peak=_bytes["used"])


def _allocate(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process has its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _give_back(block: mmap.mmap, size: int) -> None:
    with _lock:
        _bytes["used"] -= size
        if _bytes["idle"] + size <= _bytes["peak"]:  # never more than has been of use at one time
            _idle[size].append(block)
            _bytes["idle"] += size

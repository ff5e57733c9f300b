"""Memory for large feature maps, used again: the first touch of fresh memory costs more than most layers compute.

A map of 50 MB from the operating system takes several times as long to fill as one that has been written before, and
the C library gives blocks of that size back at once.
"""

import ctypes
import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes from which it pays; the C library keeps smaller blocks by itself
GRAIN = 1 << 16
HUGE = 1 << 21  # bytes of a huge page
MOST = 2  # times what has been of use at one time is kept: sizes are not all wanted at the same time
SPAN = 4096  # blocks are taken, some passes of a network, until what was of use before them is forgotten
_lock = threading.RLock()  # the garbage of a thread that holds it may give blocks back
_idle: list[tuple[int, "_Block"]] = []  # sizes in bytes and blocks, in the order in which they came back
# peak: of what is used at one time, in this span and the one before; since: in this span; taken: blocks in this span
_bytes = {"idle": 0, "used": 0, "peak": 0, "since": 0, "taken": 0}


class _Block(mmap.mmap):
    """Memory from the system; ``start`` is where its first huge page begins, so that most of a map lies in such."""

    start = 0


class _Loan(weakref.ref[memoryview]):
    """A block in use, which comes back when the view of it is gone; ``weakref.finalize`` takes longer."""

    __slots__ = ("block", "size")
    block: _Block
    size: int


_loans: dict[int, _Loan] = {}


def buffer(num: int) -> Tensor:
    """Returns ``num`` float32 numbers of any value on the CPU.

    Their memory is used again when the last tensor on it is gone.

    >>> buffer(1 << 20).shape
    torch.Size([1048576])
    """
    size = -(-4 * num // GRAIN) * GRAIN
    if size < SMALLEST:
        return torch.empty(num, dtype=torch.float32, device="cpu")  # whatever the defaults are
    with _lock:
        block = _take(size)
        _bytes["used"] += size
        _bytes["since"] = max(_bytes["since"], _bytes["used"])
        _bytes["peak"] = max(_bytes["peak"], _bytes["since"])
        _bytes["taken"] += 1
        if _bytes["taken"] == SPAN:
            _bytes.update(peak=_bytes["since"], since=_bytes["used"], taken=0)
        while _idle and _bytes["idle"] + _bytes["used"] > MOST * _bytes["peak"]:
            oldest, _ = _idle.pop(0)
            _bytes["idle"] -= oldest
    block = block or _allocate(size)
    view = memoryview(block)  # torch holds this very object for as long as it uses the memory
    loan = _Loan(view, _give_back)
    loan.block, loan.size = block, size
    _loans[id(loan)] = loan
    return torch.frombuffer(view, dtype=torch.float32, count=num, offset=block.start)


def release_memory() -> None:
    """Gives the memory that no feature map uses at the moment back to the system."""
    with _lock:
        _idle.clear()
        _bytes.update(idle=0, peak=_bytes["used"], since=_bytes["used"])


def trim_heap() -> None:
    """Gives what has been freed in pieces back to the system, where the allocator is glibc's, which keeps it else."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _take(size: int) -> _Block | None:
    """Takes the idle block of this size that was used last, which caches may still know."""
    for i in reversed(range(len(_idle))):
        if _idle[i][0] == size:
            _bytes["idle"] -= size
            return _idle.pop(i)[1]
    return None


def _allocate(size: int) -> "_Block":
    if not hasattr(mmap, "MAP_PRIVATE"):
        return _Block(-1, size)
    room = size + HUGE if size >= HUGE else size  # what is never touched takes no memory
    block = _Block(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a forked process has its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
        if room > size:
            block.start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % HUGE
    return block


def _begin_anew() -> None:
    """Makes a lock that nobody holds: in a forked process whoever held it at that moment does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _give_back(loan: "_Loan") -> None:
    with _lock:
        del _loans[id(loan)]
        _bytes["used"] -= loan.size
        _bytes["idle"] += loan.size
        _idle.append((loan.size, loan.block))

"""Memory for large feature maps, used again: the first touch of fresh memory costs more than most layers compute.

A map of 50 MB from the operating system takes several times as long to fill as one that has been written before, and
the C library gives blocks of that size back at once. Maps lie in stretches of memory, cut where they end and joined
again where they have gone: a wide map takes the place of two narrow ones, whose sizes need not be known.
"""

import ctypes
import mmap
import os
import threading
import weakref
from bisect import insort
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes from which it pays; the C library keeps smaller blocks by itself
GRAIN = 1 << 12  # where a map may begin
HUGE = 1 << 21  # bytes of a huge page
STRETCH = 1 << 28  # bytes that are asked of the system at a time; what is never touched takes no memory
MOST = 1.25  # times what has been of use at one time is kept: maps do not fill the gaps that others leave
SPAN = 4096  # maps are made, some passes of a network, until what was of use before them is forgotten
_lock = threading.RLock()  # the garbage of a thread that holds it may give memory back
# used: of maps; kept: pages that may take memory of the system; peak: of what is used at one time, in this span and the
# one before; since: in this span; taken: maps in this span
_bytes = {"used": 0, "kept": 0, "peak": 0, "since": 0, "taken": 0}


class _Stretch(mmap.mmap):
    """Memory from the system; ``start`` is where its first huge page begins, so that most of a map lies in such.

    ``idle`` are the ranges of bytes from there that nobody uses, in order, ``touched`` which huge pages were used since
    the system has had them.
    """

    start: int
    idle: list[tuple[int, int]]
    touched: bytearray

    def num_fresh(self, begin: int, end: int) -> int:
        """How many huge pages of a range are still to be touched."""
        return self.touched.count(0, begin // HUGE, -(-end // HUGE))


class _Loan(weakref.ref[memoryview]):
    """A range in use, which comes back when the view of it is gone; ``weakref.finalize`` takes longer."""

    __slots__ = ("range", "stretch")
    stretch: _Stretch
    range: tuple[int, int]


_stretches: list[_Stretch] = []
_loans: dict[int, _Loan] = {}


def buffer(num: int) -> Tensor:
    """Returns ``num`` float32 numbers of any value on the CPU.

    Their memory is used again when the last tensor on it is gone.

    >>> buffer(1 << 20).shape
    torch.Size([1048576])
    """
    if 4 * num < SMALLEST:
        return torch.empty(num, dtype=torch.float32, device="cpu")  # whatever the defaults are
    size = 4 * num
    with _lock:
        stretch, first = _take(size)
        _count(size)
    # torch holds this very object for as long as it uses the memory
    view = memoryview(stretch)[stretch.start + first : stretch.start + first + size]
    loan = _Loan(view, _give_back)
    loan.stretch, loan.range = stretch, (first, first + size)
    _loans[id(loan)] = loan
    return torch.frombuffer(view, dtype=torch.float32)


def zeros(size: Sequence[int]) -> Tensor:
    """Returns zeros in float32 on the CPU, for gradients that maps may take the place of once they are gone.

    >>> zeros((1, 2))
    tensor([[0., 0.]])
    """
    return buffer(prod(size)).resize_(tuple(size)).zero_()  # itself, no view


def release_memory() -> None:
    """Gives the memory that no feature map uses at the moment back to the system."""
    with _lock:
        _trim(0)
        _bytes.update(peak=_bytes["used"], since=_bytes["used"])


def _take(size: int) -> tuple[_Stretch, int]:
    """Takes the range of this size that touches the least fresh memory, of such ones the smallest."""
    best: tuple[tuple[int, int], _Stretch, int, int] | None = None
    for stretch in _stretches:
        for begin, end in stretch.idle:
            first = -(-begin // GRAIN) * GRAIN
            if first + size <= end:
                cost = stretch.num_fresh(first, first + size), end - begin
                if best is None or cost < best[0]:
                    best = cost, stretch, begin, end
    if best is None:
        stretch = _allocate(size)
        _stretches.append(stretch)
        begin, end = stretch.idle[0]
    else:
        _, stretch, begin, end = best
    first = -(-begin // GRAIN) * GRAIN
    stretch.idle.remove((begin, end))
    for rest in ((begin, first), (first + size, end)):
        if rest[0] < rest[1]:
            insort(stretch.idle, rest)
    _bytes["kept"] += HUGE * stretch.num_fresh(first, first + size)
    pages = slice(first // HUGE, -(-(first + size) // HUGE))
    stretch.touched[pages] = bytes([1]) * (pages.stop - pages.start)
    return stretch, first


def _count(size: int) -> None:
    """Notes that so many bytes are in use, and gives back what is idle beyond what is worth keeping."""
    _bytes["used"] += size
    _bytes["since"] = max(_bytes["since"], _bytes["used"])
    _bytes["peak"] = max(_bytes["peak"], _bytes["since"])
    _bytes["taken"] += 1
    if _bytes["taken"] == SPAN:
        _bytes.update(peak=_bytes["since"], since=_bytes["used"], taken=0)
    if _bytes["kept"] > MOST * _bytes["peak"]:
        _trim(MOST * _bytes["peak"])


def _trim(most: float) -> None:
    """Gives whole huge pages that are idle back, the last first, until at most so many bytes are kept, or none is."""
    for stretch in _stretches[::-1]:
        for begin, end in reversed(stretch.idle):
            if _bytes["kept"] > most:
                _give_pages(stretch, -(-begin // HUGE), end // HUGE)
        num_touched = stretch.touched.count(1)
        if stretch.idle == [(0, len(stretch.touched) * HUGE)] and (not num_touched or _bytes["kept"] > most):
            _bytes["kept"] -= HUGE * num_touched  # as the system takes no pages one by one
            _stretches.remove(stretch)


def _give_pages(stretch: _Stretch, first: int, end: int) -> None:
    """Gives huge pages back to the system, where it takes them."""
    if first < end and hasattr(mmap, "MADV_DONTNEED"):
        stretch.madvise(mmap.MADV_DONTNEED, stretch.start + first * HUGE, (end - first) * HUGE)
        _bytes["kept"] -= HUGE * stretch.touched.count(1, first, end)
        stretch.touched[first:end] = bytes(end - first)


def _allocate(size: int) -> _Stretch:
    """Asks the system for a stretch in which a map of this size has room."""
    pages = -(-max(size, STRETCH) // HUGE)
    if hasattr(mmap, "MAP_PRIVATE"):
        stretch = _Stretch(-1, (pages + 1) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a fork has its own
        stretch.start = -ctypes.addressof(ctypes.c_char.from_buffer(stretch)) % HUGE
    else:
        stretch = _Stretch(-1, pages * HUGE)
        stretch.start = 0
    if hasattr(mmap, "MADV_HUGEPAGE"):
        stretch.madvise(mmap.MADV_HUGEPAGE)
    stretch.idle, stretch.touched = [(0, pages * HUGE)], bytearray(pages)
    return stretch


def _begin_anew() -> None:
    """Makes a lock that nobody holds: in a forked process whoever held it at that moment does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _give_back(loan: "_Loan") -> None:
    with _lock:
        del _loans[id(loan)]
        begin, end = loan.range
        _bytes["used"] -= end - begin
        idle = loan.stretch.idle
        insort(idle, (begin, end))
        at = idle.index((begin, end))
        if at + 1 < len(idle) and idle[at + 1][0] == end:
            idle[at : at + 2] = [(begin, idle[at + 1][1])]
        if at > 0 and idle[at - 1][1] == begin:
            idle[at - 1 : at + 1] = [(idle[at - 1][0], idle[at][1])]

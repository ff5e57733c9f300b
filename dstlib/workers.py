"""Worker processes: started, fed and ended alike wherever work is shared between them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

import torch

from dstlib.errors import DstlibError, StateError
from dstlib.files import CONTINUE

T = TypeVar("T")
R = TypeVar("R")


def share(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    workers: int,
    where: str,
    remedy: str,
    lost: Callable[[T], R] | None = None,
) -> Generator[tuple[T, R], None, None]:
    """Does a piece of work on each item, in several processes, and yields each item with its result, in any order.

    With 0 workers it is this process that works, in order. Closing the generator waits for the items in work, and
    drops those that nobody has begun. ``where`` and ``remedy`` word the error. Where the system ends a worker, those
    that are left are done one at a time, if ``lost`` is passed: it gives the result of an item whose worker was ended
    again, though it was alone.

    Raises:
        StateError: The system ended a worker, and ``lost`` is None.

    >>> list(share(abs, [1, -2], workers=0, where="", remedy=""))
    [(1, 1), (-2, 2)]
    """
    if not workers or not items:
        yield from ((item, work(item)) for item in items)
        return
    left = dict(enumerate(items))
    pool = _pool(min(workers, len(items)))
    try:
        futures = {pool.submit(work, item): index for index, item in left.items()}
        for future in as_completed(futures):
            result = future.result()
            yield left.pop(futures[future]), result
    except BrokenProcessPool as error:
        if lost is None:
            allowed, given = "processes that finish", "one that the system ended, most likely for want of memory"
            raise StateError.of("workers", where, allowed=allowed, given=given, remedy=remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if left and lost:
        yield from _one_by_one(work, list(left.values()), lost)


def _one_by_one(work: Callable[[T], R], items: Sequence[T], lost: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    pool = _pool(1)
    try:
        for item in items:
            try:
                result = pool.submit(work, item).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool, result = _pool(1), lost(item)
            yield item, result
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned: a fork would share locks, and may hang in a process with threads.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Words what torch raises when a worker of a DataLoader was killed: from a signal handler, and so from anywhere.

    Raises:
        DstlibError: A worker was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        allowed, given = "processes that live", str(error).splitlines()[0]
        remedy = f"Each takes memory of its own: choose fewer by --workers, then {CONTINUE}."
        raise DstlibError.of("workers", "the loader", allowed=allowed, given=given, remedy=remedy) from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch, and the engine, compute on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def leave_signals_to_the_parent() -> None:
    """Ignores Ctrl-C and a closed terminal, which reach every process of a group: the parent ends its workers."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _begin() -> None:
    """Begins a worker: on one thread, deaf to Ctrl-C, and ended when its parent is no more."""
    leave_signals_to_the_parent()
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

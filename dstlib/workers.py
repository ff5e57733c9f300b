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

T = TypeVar("T")
R = TypeVar("R")


def share(
    work: Callable[[T], R], items: Sequence[T], *, workers: int, where: str, remedy: str
) -> Generator[tuple[T, R], None, None]:
    """Does a piece of work on each item, in several processes, and yields each item with its result, in any order.

    With 0 workers it is this process that works, in order. Closing the generator waits for the items in work, and
    drops those that nobody has begun. ``where`` and ``remedy`` word the error.

    Raises:
        StateError: The system ended a worker.

    >>> list(share(abs, [1, -2], workers=0, where="", remedy=""))
    [(1, 1), (-2, 2)]
    """
    if not workers or not items:
        yield from ((item, work(item)) for item in items)
        return
    # Spawned: a fork would share locks, and may hang in a process with threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _begin)
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        allowed, given = "processes that finish", "one that the system ended, most likely for want of memory"
        raise StateError.of("workers", where, allowed=allowed, given=given, remedy=remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
        remedy = "Continue with --resume and fewer --workers: each takes memory of its own."
        raise DstlibError.of("workers", "the loader", allowed=allowed, given=given, remedy=remedy) from error


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

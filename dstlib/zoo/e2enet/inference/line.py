"""What a prediction of many cases does beside computing: one thread that reads ahead and writes behind, and a bar."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Helper:
    """A thread that does one piece of work after the other, in the order in which they are given to it.

    At the end of the block, by an error too, what is owed is waited for; nothing else is begun, or waited for.

    >>> with Helper() as helper:
    ...     helper.start(lambda: 1 + 1, is_owed=True).result()
    2
    """

    def __init__(self) -> None:
        self._works: SimpleQueue[tuple[Callable[[], None], bool] | None] = SimpleQueue()
        self._owed: list[Future[Any]] = []
        self._is_over = False
        # As a daemon it does not keep a process that was stopped waiting for a scan that is being read.
        self._thread = threading.Thread(target=self._run, name="reads ahead", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._is_over = True
        self._works.put(None)
        if not all(future.done() for future in self._owed):
            self._thread.join()  # not the future: an interruption may have come before its work was handed over

    def start(self, work: Callable[[], T], *, is_owed: bool = False) -> Future[T]:
        """Gives it a piece of work, whose result, or error, is that of the future."""
        future: Future[T] = Future()
        if is_owed:
            self._owed = [future, *(each for each in self._owed if not each.done())]
        self._works.put((partial(_settle, future, work), is_owed))
        return future

    def _run(self) -> None:
        while (given := self._works.get()) is not None:
            work, is_owed = given
            if is_owed or not self._is_over:
                work()
            del given, work  # with what it holds, which may be gigabytes, while the next one is waited for


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        result = work()
    except BaseException as error:  # whoever asks for the result raises it
        future.set_exception(error)
    else:
        future.set_result(result)


class Progress:
    """A bar over the passes through networks that all cases will take, with the time that is left.

    The passes of a case are known once it is read; of those that are not, as many are expected as of those that are,
    in the mean. What was done and how long that took, reading and writing included, gives the time that is left.

    >>> bar = Progress(3, hidden=True)
    >>> bar.begin("a", 8)
    >>> bar.total
    24
    >>> bar.leave_out()
    >>> bar.total
    16
    """

    def __init__(self, num_cases: int, *, hidden: bool) -> None:
        self._num_cases, self._num_unread = num_cases, num_cases
        self._passes: list[int] = []  # of each case that was read
        self._num_done = 0  # passes of this case; a hidden bar counts none
        # mean over all: some windows come with slices to decide upon, others do not
        self._bar = tqdm(desc="predict", unit="pass", smoothing=0, disable=hidden)

    @property
    def total(self) -> int:
        """How many passes there will be, as far as that is known."""
        expected = sum(self._passes) / max(1, len(self._passes))
        return sum(self._passes) + round(self._num_unread * expected)

    def begin(self, name: str, num_passes: int) -> None:
        """Begins a case that was read."""
        self._bar.set_postfix_str(f"{name}, case {self._num_cases - self._num_unread + 1} of {self._num_cases}")
        self._num_unread -= 1
        self._num_done = 0
        self._passes.append(num_passes)
        if len(self._passes) == 1:
            self._bar.reset(self.total)  # the clock, too: the first case was read, and nothing done beside
        self._show()

    def step(self, num: int) -> None:
        """Counts passes that are done."""
        self._num_done += num
        self._bar.update(num)

    def end(self) -> None:
        """Ends a case, which may have stopped half way."""
        self._passes[-1] = self._num_done
        self._show()

    def leave_out(self) -> None:
        """Counts a case that cannot be read."""
        self._num_unread -= 1
        self._show()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()

    def _show(self) -> None:
        self._bar.total = self.total
        self._bar.refresh()

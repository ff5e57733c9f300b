"""Ctrl-C that loses nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = b"\nStopping after this iteration, to save a checkpoint. Once more to stop at once.\n"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGINT (Ctrl-C), SIGTERM or SIGHUP only asks to stop; the second one ends the process at once.

    Yields the question whether one came. To be entered in the main thread, as only that may handle signals.

    >>> with interruptible() as should_stop:
    ...     before = should_stop()
    ...     signal.raise_signal(signal.SIGINT)
    ...     before, should_stop()
    (False, True)
    """
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        came.append(number)
        os.write(2, NOTICE)  # unlike print, it may come in the middle of another print
        for each in heard:
            signal.signal(each, signal.SIG_DFL)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""What a process may use of the cores: how many, by affinity and quota, and whether others take them meanwhile."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import ceil, inf
from pathlib import Path

from dstlib.bounds import control_groups

_ROOTS = {"": Path("/sys/fs/cgroup"), "cpu": Path("/sys/fs/cgroup/cpu")}  # of groups of the second version, the first
OFTEN = 60.0
"""Stops in a second that a process runs, of which more tell of others on its cores. There the system stops it once in 3
to 12 ms; beside programs of a hundredth of its weight, 46 to 59 times a second. ``csrc/runtime/threads.cpp`` has it
too."""


def usable_cores() -> int:
    """Returns how many threads of this process can run at once: on cores that it may use, within its quota of time."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(cores, ceil(min(cpu_quota(), cores))))


def cpu_quota() -> float:
    """Returns to how many cores' time the control groups of this process limit it, infinity where they do not.

    A container started with ``--cpus 1.5`` sees all cores of the machine, and gets the time of 1.5.
    """
    return min(_quotas(), default=inf)


def _quotas() -> Iterator[float]:
    for kind, folder in control_groups(_ROOTS):
        with suppress(OSError, ValueError):  # none there, or "max"
            if kind:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if int(quota) > 0:  # -1: no limit
                yield int(quota) / int(period)


def watch_crowd() -> Callable[[], bool]:
    """Returns what tells whether others have taken the cores from this process since now; once so, it stays so."""
    stopped, seconds, found = _stops(), time.process_time(), False

    def is_found() -> bool:
        nonlocal found
        found = found or is_crowded(_stops() - stopped, time.process_time() - seconds)
        return found

    return is_found


def is_crowded(stopped: int, seconds: float) -> bool:
    """Tells whether a process whose threads ran for so long, and were stopped so often, shares its cores with others.

    >>> is_crowded(2, 0.001), is_crowded(3, 0.01), is_crowded(60, 1.0)
    (False, True, False)
    """
    return stopped > max(2, OFTEN * seconds)


def _stops() -> int:
    """Counts how often threads of this process have been stopped that would have run on; 0 where nobody counts."""
    try:
        import resource  # Windows has none
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

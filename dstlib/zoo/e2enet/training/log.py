"""What a training cost: seconds and memory, a line of JSON per epoch, and TensorBoard's curves on request.

Kept apart from ``metrics.csv``, which is the same for the same settings; these numbers never are.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dstlib.errors import StateError

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


class Log:
    """What a run appends to its ``log.jsonl``: a line per event, with its time.

    ``tensorboard`` must be installed for its curves.

    Raises:
        StateError: The disk is full, say.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self._file = folder / "log.jsonl"
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self._writer = SummaryWriter(folder / "tensorboard")
        self._since = time.perf_counter()
        self._iteration = 0

    def session(self, iteration: int, about: Mapping[str, Any]) -> None:
        """Logs that a process begins, or goes on, at an iteration."""
        self._since, self._iteration = time.perf_counter(), iteration
        self._append({"event": "session", "iteration": iteration, **about})

    def epoch(self, row: Mapping[str, float], device: torch.device) -> None:
        """Logs the end of an epoch: its metrics, the time per iteration since the last event, the peak of memory."""
        now, iteration = time.perf_counter(), int(row["iteration"])
        if iteration == self._iteration:
            return  # saved twice: at the end of the epoch and before stopping
        seconds = (now - self._since) / max(1, iteration - self._iteration)
        self._since, self._iteration = now, iteration
        cost = {"seconds_per_iteration": round(seconds, 4), "peak_memory_bytes": peak_memory(device)}
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._append({"event": "epoch", **finite, **cost})
        if self._writer is not None:
            for name, value in {**row, **cost}.items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()

    def _append(self, event: Mapping[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event})
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            where, allowed = f"run {self._file.parent}", "a disk to write to"
            remedy = "Make room, then continue with --resume."
            raise StateError.of("log.jsonl", where, allowed=allowed, given=error, remedy=remedy) from error


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes used so far: on a GPU those of torch's tensors, else those of the process.

    >>> peak_memory(torch.device("cpu")) > 1_000_000
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT

"""What a training cost: seconds and memory, a line of JSON per epoch, and TensorBoard's curves on request.

A process that is killed may leave half a line, or none of an epoch whose checkpoint is there: the next one that opens
the log takes out what is no line, and adds what is missing, without its cost, which nobody knows. Kept apart from
``metrics.csv``, which is the same for the same settings; these numbers never are.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from dstlib.bounds import most_memory
from dstlib.errors import StateError
from dstlib.files import CONTINUE, write_whole
from dstlib.typed_json import parse_json

_COST = ("seconds_per_iteration", "cpu_seconds_per_iteration", "peak_memory_bytes")


class Log:
    """What a run appends to its ``log.jsonl``: a line per event, with its time, and one for each epoch.

    ``tensorboard`` must be installed for its curves.

    Raises:
        StateError: The disk is full, say.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "log.jsonl"
    ...     _ = file.write_text('{"event": "epoch", "iteration": 50}\\n{"event": "epo')
    ...     Log(Path(folder)).complete([{"iteration": 50}, {"iteration": 100}])
    ...     [json.loads(line)["iteration"] for line in file.read_text().splitlines()]
    [50, 100]
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False) -> None:
        self._file = folder / "log.jsonl"
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self._writer = SummaryWriter(folder / "tensorboard")
        self._since, self._cpu_since = time.perf_counter(), time.process_time()
        self._iteration = 0
        self._epochs = self._mend()  # by their last iterations, as these are logged

    def complete(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Logs the epochs that a process finished which did not come to logging them."""
        for row in rows:
            self._add(row, dict.fromkeys(_COST))

    def session(self, iteration: int, about: Mapping[str, Any]) -> None:
        """Logs that a process begins, or goes on, at an iteration."""
        self._since, self._cpu_since, self._iteration = time.perf_counter(), time.process_time(), iteration
        self._append({"event": "session", "iteration": iteration, **about})

    def epoch(self, row: Mapping[str, float], device: torch.device, *, cpu: float) -> None:
        """Logs the end of an epoch: its metrics, the time per iteration since the last event, the peak of memory.

        ``cpu`` is the ``time.process_time()`` at its end, before anything was saved: of this process, all its threads.
        """
        now, iteration = time.perf_counter(), int(row["iteration"])
        if iteration in self._epochs:
            return  # saved twice: at the end of the epoch and before stopping
        num = max(1, iteration - self._iteration)
        seconds, cpu_seconds = (now - self._since) / num, (cpu - self._cpu_since) / num
        self._since, self._cpu_since, self._iteration = now, time.process_time(), iteration
        costs = (round(seconds, 4), round(cpu_seconds, 4), peak_memory(device))
        self._add(row, dict(zip(_COST, costs, strict=True)))

    def _add(self, row: Mapping[str, float], cost: Mapping[str, float | None]) -> None:
        iteration = int(row["iteration"])
        if iteration in self._epochs:
            return
        self._epochs.add(iteration)
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._append({"event": "epoch", **finite, **cost})
        if self._writer is not None:
            for name, value in {**row, **cost}.items():
                if value is not None:
                    self._writer.add_scalar(name, value, iteration)
            self._writer.flush()

    def _mend(self) -> set[int]:
        """Takes out what is no line of JSON, such as the half of one at the end; returns the epochs that are left."""
        try:
            content = self._file.read_bytes() if self._file.exists() else b""
        except OSError as error:
            raise self._refused(error) from error
        lines = content.splitlines(keepends=True)
        events = {line: _event(line) for line in lines}
        whole = b"".join(line for line in lines if events[line])
        if whole != content:
            write_whole(self._file, whole)
        numbers = (event.get("iteration") for event in events.values() if event.get("event") == "epoch")
        return {number for number in numbers if type(number) is int}

    def _append(self, event: Mapping[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **event})
        try:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StateError:
        where, allowed = f"run {self._file.parent}", "a disk to write to"
        remedy = f"Make room, or repair what the system says, then {CONTINUE}."
        return StateError.of("log.jsonl", where, allowed=allowed, given=error, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class LoggedEpoch:
    """What is read of the line of an epoch: its last iteration, and the CPU time of each, where that is known."""

    event: Literal["epoch"]
    iteration: int
    cpu_seconds_per_iteration: float | None = None


def epochs_of(folder: Path) -> tuple[LoggedEpoch, ...]:
    """Reads what a run logged of each epoch, in their order; nothing where it has no log, and of what is no line."""
    file = folder / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    found = []
    for line in lines:
        with suppress(StateError):
            found.append(parse_json(line, LoggedEpoch, where="a log", remedy="", foreign=True))
    return tuple(found)


def _event(line: bytes) -> dict[str, Any]:
    """Returns what a line says; nothing where it is no whole one."""
    try:
        return parse_json(line, dict[str, Any], where="a log", remedy="") if line.endswith(b"\n") else {}
    except StateError:
        return {}


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes used so far: on a GPU those of torch's tensors, else those of the process.

    >>> peak_memory(torch.device("cpu")) > 1_000_000
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return most_memory()

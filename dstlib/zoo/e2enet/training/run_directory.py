"""The run directory: what a training leaves behind, whole at every moment.

::

    config.json      every setting, written first
    metrics.csv      one line per epoch
    flows.csv        of a sparse E2ENet: one line per epoch, of connections by fusion node and flow
    log.jsonl        one line per epoch and session: seconds and memory
    checkpoint.pt    everything a training continues from; the old one stays whole until the new one is
    model.pt         the trained network's plain state_dict, for the plain network
    architecture.json  of a search: what it has found
    predictions/     the held-out cases, in their own geometry
    scores.csv       the metrics of each case and class
    challenge.csv    what the challenge of BTCV or BraTS ranks by, of its sets; challenge.json with the means
    result.json      what the run came to, written last
    figures/         pictures
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dstlib.errors import StateError, require
from dstlib.files import locked, make_folder, write_json, write_whole
from dstlib.torch_files import is_same, read_torch, write_torch
from dstlib.typed_json import read_json, sealed
from dstlib.zoo.e2enet.training.records import FLOWS, METRICS

FORMAT = "dstlib.e2enet.run/1"
WRITTEN = "a file that a run wrote"
MISSING = "nothing"  # how an error shows a field that one of two configurations lacks


@dataclass(frozen=True)
class Run:
    """An open run directory, and the configuration it belongs to."""

    path: Path
    config: Mapping[str, Any]

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint in one step; on a full disk the previous one stays whole.

        ``state`` may hold tensors, numbers, text, lists and dicts, which is what loads without running code.

        Raises:
            StateError: The file cannot be written.
        """
        content = {"format": FORMAT, "config": dict(self.config), "state": dict(state)}
        write_torch(self.path / "checkpoint.pt", content)

    def load_checkpoint(self) -> dict[str, Any]:
        """Reads the state that was saved last.

        Raises:
            StateError: The file is missing, damaged, foreign, or of a run with other settings.
        """
        file = self.path / "checkpoint.pt"
        saved = read_checkpoint(file, remedy=f"Delete {self.path} and start afresh, or restore the file.")
        _refuse_other_settings(saved["config"], self.config, file)
        state: dict[str, Any] = saved["state"]
        return state

    def write_model(self, state: Mapping[str, Any]) -> None:
        """Writes the plain ``state_dict`` of a network: ``torch.load(..., weights_only=True)`` reads it anywhere."""
        write_torch(self.path / "model.pt", state)

    def write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Replaces ``metrics.csv``: one line per row, under the names of the first."""
        self._write_rows(METRICS, rows)

    def write_flows(self, rows: Sequence[Mapping[str, int]]) -> None:
        """Replaces ``flows.csv`` in the same way, if there are any rows."""
        if rows:
            self._write_rows(FLOWS, rows)

    def _write_rows(self, name: str, rows: Sequence[Mapping[str, float]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path / name, text.getvalue().encode())


@contextmanager
def open_run(path: Path, config: Mapping[str, Any], *, resume: bool = False) -> Iterator[Run]:
    """Opens a run directory for this process alone, a new one or, to ``resume``, the one that is there.

    ``config`` holds whatever settles the result: numbers, text, lists and dicts of them.

    Raises:
        StateError: Another process works there; a run is there already, or none is there to resume; the
            run there has other settings; the directory cannot be made.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, open_run(Path(folder) / "run", {"seed": 0}) as run:
    ...     sorted(file.name for file in run.path.iterdir())
    ['.lock', 'config.json', 'figures']
    """
    config = json.loads(json.dumps(config))  # as it reads back: tuples are lists
    with _lock(path, create=not resume):
        file = path / "config.json"
        if resume:
            _refuse_other_settings(_read_config(file), config, file)
        else:
            found = " and ".join(name for name in ("config.json", "checkpoint.pt") if (path / name).exists())
            where, allowed, given = f"run {path}", "a folder without a run", f"one with {found}"
            remedy = "Pass --resume to continue that run, or another folder to start a new one."
            require(not found, "directory", where, allowed=allowed, given=given, remedy=remedy, error=StateError)
            write_json(file, sealed(config))
        make_folder(path / "figures", what="figures")
        yield Run(path, config)


def read_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """Reads the configuration and the state of a checkpoint, under the keys ``config`` and ``state``.

    Raises:
        StateError: The file is missing, damaged or foreign.
    """
    saved = read_torch(path, where=f"run {path.parent}", allowed=WRITTEN, remedy=remedy)
    parts = [saved.get(name) for name in ("config", "state")] if isinstance(saved, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or saved.get("format") != FORMAT:
        raise _unreadable(path, "a file of something else", remedy)
    return saved


@contextmanager
def _lock(path: Path, *, create: bool) -> Iterator[None]:
    """Holds the run directory against other processes within the block, or refuses to share it."""

    def refuse(error: OSError) -> NoReturn:
        allowed = "a folder to write to" if create else "the folder of a run"
        given = "a file of that name" if path.is_file() else error.strerror
        remedy = "Pass a folder you may write to." if create else "Name the folder of an existing run to resume it."
        raise StateError.of("directory", f"run {path}", allowed=allowed, given=given, remedy=remedy) from error

    def refuse_to_share() -> NoReturn:
        given, remedy = "one in use by another process", "Wait for it or stop it, or train in another folder."
        raise StateError.of("directory", f"run {path}", allowed="a folder nobody trains in", given=given, remedy=remedy)

    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(error)
    with locked(path, if_held=refuse_to_share, refuse=refuse):
        yield


def _read_config(file: Path) -> Any:
    if not file.exists():
        raise _unreadable(
            file, "none", "Leave out --resume to start a run here, or name the folder of an existing one."
        )
    remedy = "Restore the file, or name another folder by --run-dir."
    return read_json(file, dict[str, Any], where=f"{file.name} of run {file.parent}", remedy=remedy)


def _refuse_other_settings(saved: Any, config: Mapping[str, Any], file: Path) -> None:
    """Checks that a run is continued with the settings it was started with."""
    old, new = dict(_flatten(saved)), dict(_flatten(config))
    # what a run of before does not tell was not asked of it
    differing = [name for name in {**old, **new} if not is_same(new.get(name), old.get(name))]
    was, given = (", ".join(f"{n} {_short(values.get(n, MISSING))}" for n in differing) for values in (old, new))
    remedy = "Resume with the settings of the run, or start another with --run-dir."
    require(not differing, "settings", str(file), allowed=was, given=given, remedy=remedy, error=StateError)


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested settings as (dotted name, value) pairs; anything but a dict is a value."""
    if not isinstance(config, dict):
        yield prefix or "configuration", config
        return
    for name, value in config.items():
        yield from _flatten(value, f"{prefix}.{name}" if prefix else name)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unreadable(file: Path, given: object, remedy: str) -> StateError:
    return StateError.of(file.name, f"run {file.parent}", allowed=WRITTEN, given=given, remedy=remedy)

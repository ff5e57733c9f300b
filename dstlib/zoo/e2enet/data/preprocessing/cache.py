"""Prepared cases on disk: made once, in parallel, opened as memory-mapped arrays by every later run.

A cache is a folder: ``fingerprints`` holds what was measured of each scan, ``prepared-KEY`` the arrays of each scan
by one preparation.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeVar

from tqdm import tqdm

from dstlib.errors import DataError, SettingError, StateError, explain
from dstlib.zoo.e2enet.data.cases import Cases
from dstlib.zoo.e2enet.data.layouts.files import refuse_copies
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.preprocessing.cache_entries import Entry, Made, find_case, find_fingerprint, make, num_bytes
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import Fingerprint, Modality, join, plan_preparation
from dstlib.zoo.e2enet.data.preprocessing.preparation import Preparation
from dstlib.zoo.e2enet.data.scans.nifti import Fault

T = TypeVar("T")


def prepared_cases(
    manifest: Manifest,
    files: Sequence[CaseFiles],
    *,
    modality: Modality,
    folder: Path,
    preparation: Preparation | None = None,
    workers: int = 0,
    progress: bool = True,
) -> tuple[Cases, Preparation]:
    """The labelled cases of these files, prepared, in memory-mapped arrays under ``folder``.

    What lies there already is used, if it was made from the same files (by size and time of change) in the same
    way. ``preparation`` is planned from these very files, unless it is passed: then ``modality`` makes no
    difference. ``workers`` processes share the work, 0 does it in this one; the result is the same. Each holds a
    scan and some copies of a channel in memory. However a call ends, the next goes on with what is whole.

    Raises:
        DataError: Files cannot be used. The message lists every defect, after all other files were measured (or
            prepared, by a ``preparation`` that was passed); none of these is read a second time.
        StateError: The disk is full, or the folder cannot be used.
        SettingError: There is no such modality, or ``workers`` is negative.
    """
    if preparation is None:
        measured = measure(manifest, files, folder=folder, workers=workers, progress=progress)
        preparation = plan_preparation(measured, modality=modality)
    entries = [replace(entry, preparation=preparation) for entry in _entries(manifest, files, folder)]
    with _locked(folder):
        found = _all(entries, find_case, _Crew("preparing", manifest.name, workers, progress))
        _mention_unused(folder, entries)
    return Cases(manifest.name, manifest.channels, manifest.classes, tuple(found)), preparation


def measure(
    manifest: Manifest, files: Sequence[CaseFiles], *, folder: Path, workers: int = 0, progress: bool = True
) -> Fingerprint:
    """The fingerprint of these files, each read once for it in the life of the cache in ``folder``.

    Raises:
        DataError, StateError, SettingError: As :func:`prepared_cases`.
    """
    with _locked(folder):
        entries = _entries(manifest, files, folder)
        return join(_all(entries, find_fingerprint, _Crew("measuring", manifest.name, workers, progress)))


def _entries(manifest: Manifest, files: Sequence[CaseFiles], folder: Path) -> list[Entry]:
    refuse_copies(manifest.folder, files)
    num_channels, num_classes = len(manifest.channels), len(manifest.classes)
    return [Entry(cache=folder, files=each, num_channels=num_channels, num_classes=num_classes) for each in files]


def _all(entries: Sequence[Entry], find: Callable[[Entry], T | None], crew: "_Crew") -> list[T]:
    """What is found of each entry, after the missing ones were made."""
    found = {entry.files.name: find(entry) for entry in entries}
    missing = [entry for entry in entries if found[entry.files.name] is None]
    for entry in missing:
        _make_folder(entry.folder)
    faults: list[tuple[str, Fault]] = []
    with closing(crew.make(missing)) as all_made:
        for entry, made in all_made:
            name = entry.files.name
            if made.num_lacking:
                _refuse_full_disk(entries, made.num_lacking)
            faults += [(name, fault) for fault in made.faults]
            if not made.faults and (now := find(entry)) is not None:
                found[name] = now
            elif not made.faults:
                faults.append((name, Fault(entry.files.images[0], "or its label changed while they were read")))
    if faults:
        _refuse(entries, faults)
    return [value for value in found.values() if value is not None]


class _Crew:
    """Those who make entries: this process, or several others."""

    def __init__(self, what: str, name: str, workers: int, progress: bool) -> None:
        if workers < 0:
            allowed, remedy = "a whole number from 0 up", "0 prepares in this process."
            raise SettingError.of("workers", "prepared_cases()", allowed=allowed, given=workers, remedy=remedy)
        self.what, self.name, self.workers, self.progress = what, name, workers, progress

    def make(self, entries: Sequence[Entry]) -> Generator[tuple[Entry, Made], None, None]:
        """Makes the entries, in any order; closed, it waits for those in work, whose results stay in the cache."""
        made = self._by_others(entries) if self.workers and len(entries) > 1 else ((e, make(e)) for e in entries)
        hidden = not self.progress or not entries
        with (
            closing(made),
            tqdm(total=len(entries), desc=f"{self.what} {self.name}", unit="scan", disable=hidden) as bar,
        ):
            for entry, result in made:
                bar.update()
                yield entry, result

    def _by_others(self, entries: Sequence[Entry]) -> Generator[tuple[Entry, Made], None, None]:
        # Spawned: a fork would share the lock, and may hang in a process with threads.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(self.workers, len(entries)), context, _follow_the_parent)
        try:
            futures = {pool.submit(make, entry): entry for entry in entries}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            remedy = "Nothing whole is lost; try again with fewer, each holds a scan and some copies of a channel."
            given = "one that the system ended, most likely for want of memory"
            raise StateError.of(
                "workers", "prepared_cases()", allowed="processes that finish", given=given, remedy=remedy
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_the_parent() -> None:
    """A worker leaves Ctrl-C to its parent, which lets it finish its scan; and ends when the parent is no more."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the cache against other processes, or waits for them; the system lets go of it however this one ends."""
    _make_folder(folder)
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 - closed below, after the yield
    except OSError as error:
        _refuse_folder(folder, error)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process prepares cases in {folder}: waiting for it.", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _refuse_folder(folder, error)


def _refuse_folder(folder: Path, error: OSError) -> NoReturn:
    remedy = "Pass a folder you may write to."
    raise StateError.of(
        "cache", f"folder {folder}", allowed="a folder to write to", given=error.strerror, remedy=remedy
    ) from error


def _refuse(entries: Sequence[Entry], faults: Sequence[tuple[str, Fault]]) -> NoReturn:
    num_bad = len({name for name, _ in faults})
    message = explain(
        "cases",
        f"data set {entries[0].files.images[0].parent}",
        allowed="images and labels that are readable and fit each other",
        given=f"{len(faults)} defect(s) in {num_bad} of {len(entries)} cases",
        remedy="Repair or restore these files, or take the cases out of the set. The others need no second reading:",
    )
    raise DataError("\n".join([message, *(f"  {name}: {file} {text}" for name, (file, text) in sorted(faults))]))


def _refuse_full_disk(entries: Sequence[Entry], num_lacking: int) -> NoReturn:
    """Refuses to go on; what is missing is estimated by what is whole and by the case that did not fit."""
    sizes = [num_bytes(entry) for entry in entries if find_case(entry) is not None]
    num_missing = len(entries) - len(sizes)
    needed = num_missing * (sum(sizes) + num_lacking) / (len(sizes) + 1)
    raise StateError.of(
        "disk",
        f"folder {entries[0].cache}",
        allowed=f"about {_size(needed)} of room for the {num_missing} of {len(entries)} cases that are missing",
        given="a full one",
        remedy=f"The other {len(sizes)} ({_size(sum(sizes))}) are whole: make room, then repeat the command.",
    )


def _mention_unused(folder: Path, entries: Sequence[Entry]) -> None:
    """Says what other preparations take up, which a run of today or a model of yesterday may yet want."""
    used = {entry.folder for entry in entries}
    unused = sorted(each for each in folder.glob("prepared-*") if each not in used)
    if unused:
        size = _size(sum(file.stat().st_size for each in unused for file in each.iterdir()))
        names = ", ".join(each.name for each in unused)
        print(f"Other preparations take up {size} in {folder}: {names}. Delete what you do not need.", file=sys.stderr)


def _size(num: float) -> str:
    """Bytes in words.

    >>> _size(512), _size(3_200_000_000)
    ('0.0 MB', '3.2 GB')
    """
    return f"{num / 1e9:.1f} GB" if num >= 1e9 else f"{num / 1e6:.1f} MB"

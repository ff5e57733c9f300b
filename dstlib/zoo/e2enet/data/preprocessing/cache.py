"""Prepared cases on disk: made once, in parallel, opened as memory-mapped arrays by every later run.

A cache is a folder: ``fingerprints`` holds what was measured of each scan, ``prepared-KEY`` the arrays of each scan
by one preparation. An entry is one case: some files, and a JSON record of what they were made from, which is removed
first and written last. So whatever ends a process, and wherever, an entry with a record is whole. A record is sealed,
and knows the checksums of the arrays, which each run compares once: what a disk or a copy has damaged is made again.
"""

import errno
import hashlib
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dstlib.errors import DataError, StateError, require
from dstlib.files import locked, make_folder, refuse_folder, write_json, write_whole
from dstlib.report import abridge, on_one_line
from dstlib.typed_json import read_json, sealed
from dstlib.workers import share
from dstlib.zoo.e2enet.data.cases import Case, Cases, Spacing
from dstlib.zoo.e2enet.data.layouts.channels import Modality, schemes_of
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Geometry, Manifest, refuse_copies
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import (
    Fingerprint,
    ScanFingerprint,
    join,
    plan_preparation,
    scan_fingerprint,
)
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation, prepare_scan
from dstlib.zoo.e2enet.data.scans.formats import parts
from dstlib.zoo.e2enet.data.scans.geometry import ORIENTATION
from dstlib.zoo.e2enet.data.scans.nifti import Fault, examine_scan

FORMAT = 5  # to be raised whenever the same scan would be prepared, or recorded, otherwise: old entries are then remade

_ARRAYS = ("image.npy", "label.npy")
_HEADER = 128  # bytes of a .npy file before its array, if that has few axes
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Whatever is wrong with a file that was not made here is answered by making it here.
_UNSOUND = (OSError, KeyError, TypeError, ValueError)

T = TypeVar("T")
R = TypeVar("R", "MeasuredRecord", "PreparedRecord")


@dataclass(frozen=True, kw_only=True)
class MadeFrom:
    """All that settles the content of an entry; of each source file its path, its size and its time of change."""

    format: int
    num_channels: int
    labels: Labels
    geometry: Geometry
    preparation: Preparation | None
    sources: tuple[tuple[str, int | None, int | None], ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredRecord:
    """The record of a scan that was measured."""

    made_from: MadeFrom
    fingerprint: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PreparedRecord:
    """The record of a scan that was prepared: the shape of its image, and the CRC-32 of both files of arrays."""

    made_from: MadeFrom
    spacing: Spacing
    shape: tuple[int, int, int, int]
    checksums: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One case that is to be measured or, with a ``preparation``, prepared, and the folder of the whole cache."""

    cache: Path
    files: CaseFiles
    num_channels: int
    labels: Labels
    preparation: Preparation | None = None

    @property
    def folder(self) -> Path:
        """The folder of all entries that are made alike."""
        kind = "fingerprints" if self.preparation is None else preparation_key(self.preparation)
        return self.cache / (kind if self.files.geometry == "itk" else f"{kind}-{self.files.geometry}")

    def file(self, ending: str) -> Path:
        """Returns the path of one file of the entry."""
        return self.folder / f"{self.files.name}.{ending}"

    def made_from(self) -> MadeFrom:
        """Returns all that settles the content, at this moment."""
        return MadeFrom(
            format=FORMAT,
            num_channels=self.num_channels,
            labels=replace(self.labels, regions=None, written=()),  # which make no difference to what is read
            geometry=self.files.geometry,
            preparation=self.preparation,
            sources=tuple(
                _state(part) for path in (*self.files.images, *self.files.label_files) for part in parts(path)
            ),
        )


class Made(NamedTuple):
    """How the making of an entry went: well, or these defects in its sources, or these bytes more than the disk has."""

    faults: tuple[Fault, ...] = ()
    num_lacking: int = 0


def prepared_cases(
    manifest: Manifest,
    files: Sequence[CaseFiles],
    *,
    folder: Path,
    modality: Modality | None = None,
    preparation: Preparation | None = None,
    workers: int = 0,
    progress: bool = True,
) -> tuple[Cases, Preparation]:
    """Prepares the labelled cases of these files, in memory-mapped arrays under ``folder``.

    What lies there already is used, if it was made from the same files (by size and time of change) in the same
    way. ``preparation`` is planned from these very files, unless it is passed: each channel is normalised as it is
    called, or all by ``modality``. ``workers`` processes share the work, 0 does it in this one; the result is the
    same. Each holds a scan and some copies of a channel in memory. However a call ends, the next goes on with what is
    whole.

    Raises:
        DataError: Files cannot be used. The message lists every defect, after all other files were measured (or
            prepared, by a ``preparation`` that was passed); none of these is read a second time.
        StateError: The disk is full, or the folder cannot be used.
        SettingError: There is no such modality, or ``workers`` is negative.
    """
    schemes = schemes_of(manifest.channels, modality)  # before any work: there may be no such modality
    if preparation is None:
        measured = measure(manifest, files, folder=folder, workers=workers, progress=progress)
        preparation = plan_preparation(measured, schemes=schemes)
    entries = [replace(entry, preparation=preparation) for entry in _entries(manifest, files, folder)]
    with _locked(folder):
        title = f"preparing {manifest.name}" if progress else None
        found = _all(entries, _find_case, workers=workers, title=title)
        _mention_unused(folder, entries)
    return Cases(manifest.name, manifest.channels, manifest.classes, tuple(found)), preparation


def measure(
    manifest: Manifest, files: Sequence[CaseFiles], *, folder: Path, workers: int = 0, progress: bool = True
) -> Fingerprint:
    """Measures the fingerprint of these files, each read once for it in the life of the cache in ``folder``.

    Raises:
        DataError, StateError, SettingError: As :func:`prepared_cases`.
    """
    with _locked(folder):
        entries = _entries(manifest, files, folder)
        title = f"measuring {manifest.name}" if progress else None
        return join(_all(entries, _find_fingerprint, workers=workers, title=title))


def _entries(manifest: Manifest, files: Sequence[CaseFiles], folder: Path) -> list[Entry]:
    refuse_copies(manifest.folder, files)
    num_channels, labels = len(manifest.channels), manifest.labels
    return [Entry(cache=folder, files=each, num_channels=num_channels, labels=labels) for each in files]


def _all(entries: Sequence[Entry], find: Callable[[Entry], T | None], *, workers: int, title: str | None) -> list[T]:
    """Returns what is found of each entry, after the missing ones were made, behind a bar if there is a title."""
    where = "the preparation"
    allowed, remedy = "a whole number from 0 up", "Pass 0 (--workers 0) to prepare in this process."
    require(workers >= 0, "workers", where, allowed=allowed, given=workers, remedy=remedy)
    # a bar only where all of a large cache is read through
    with tqdm(entries, title and f"{title}: checking", unit="scan", disable=title is None, delay=2, leave=False) as bar:
        found = {entry.files.name: _sound(entry, find) for entry in bar}
    missing = [entry for entry in entries if found[entry.files.name] is None]
    for entry in missing:
        make_folder(entry.folder, what="cache")
    faults: list[tuple[str, Fault]] = []
    remedy = "Nothing whole is lost; try again with fewer --workers, each holds a scan and some copies of a channel."
    all_made = share(_make, missing, workers=workers if len(missing) > 1 else 0, where=where, remedy=remedy)
    hidden = title is None or not missing
    with closing(all_made), tqdm(all_made, title, total=len(missing), unit="scan", disable=hidden) as bar:
        for entry, made in bar:
            name = entry.files.name
            if made.num_lacking:
                _refuse_full_disk(entries, made.num_lacking)
            faults += [(name, fault) for fault in made.faults]
            if not made.faults and (now := _sound(entry, find)) is not None:
                found[name] = now
            elif not made.faults:
                faults.append((name, Fault(entry.files.images[0], "or its label changed while they were read")))
    if faults:
        _refuse(entries, faults)
    return [value for value in found.values() if value is not None]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the cache against other processes, or waits for them."""
    make_folder(folder, what="cache")
    told = on_one_line(f"Another process prepares cases in {folder}: waiting for it.")
    waiting = partial(print, told, file=sys.stderr)
    with locked(folder, if_held=waiting, refuse=partial(refuse_folder, folder, what="cache")):
        yield


def preparation_key(preparation: Preparation) -> str:
    """Names the folder of everything that is prepared alike."""
    text = json.dumps([FORMAT, preparation.to_json()], sort_keys=True)
    return "prepared-" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _state(path: Path) -> tuple[str, int | None, int | None]:
    text = str(path.absolute()).encode("utf-8", "backslashreplace").decode()  # a name may be no text
    try:
        status = path.stat()
    except OSError:
        return text, None, None
    return text, status.st_size, status.st_mtime_ns


def _make(entry: Entry) -> Made:
    """Reads the sources of an entry and writes it, in whichever process.

    Raises:
        StateError: The folder cannot be written to, for another reason than a full disk.
    """
    made_from = entry.made_from()  # before reading: a file that changes meanwhile makes the entry stale, not wrong
    scan, faults, _ = examine_scan(entry.files, num_channels=entry.num_channels, labels=entry.labels)
    if scan is None:
        return Made(faults)
    entry.file("json").unlink(missing_ok=True)
    if entry.preparation is None:
        record = MeasuredRecord(made_from=made_from, fingerprint=scan_fingerprint(scan).to_json())
        write_json(entry.file("json"), sealed(asdict(record)))
        return Made()
    try:
        case = prepare_scan(scan, entry.preparation)
    except DataError as error:
        return Made((Fault(entry.files.images[0], f"cannot be prepared: {error}"),))
    except MemoryError as error:
        size = "×".join(f"{mm:.3g}" for mm in scan.spacing)
        fault = f"does not fit into memory when it is resampled ({error}): its voxels are {size} mm, is that right?"
        return Made((Fault(entry.files.images[0], fault),))
    arrays = {"image.npy": _npy(case.image), "label.npy": _npy(case.label)}
    checksums = {ending: zlib.crc32(content) for ending, content in arrays.items()}
    shape = (len(case.image), *case.label.shape)
    prepared = PreparedRecord(made_from=made_from, spacing=case.spacing, shape=shape, checksums=checksums)
    try:
        for ending, content in arrays.items():
            write_whole(entry.file(ending), content)
        write_json(entry.file("json"), sealed(asdict(prepared)))
    except StateError as error:
        for ending in arrays:
            entry.file(ending).unlink(missing_ok=True)  # half an entry would only take room
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            return Made(num_lacking=sum(content.nbytes for content in arrays.values()))
        raise
    return Made()


def _npy(array: NDArray[Any]) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    assert buffer.tell() == _HEADER + array.nbytes
    return buffer.getbuffer()


def _sound(entry: Entry, find: Callable[[Entry], T | None]) -> T | None:
    """Finds an entry; None where there is none that holds, and a line says so of one that is damaged."""
    try:
        return find(entry)
    except _UNSOUND as error:
        told = f"{entry.files.name}: what lies of it in {entry.folder} is not as it was written, so it is made again"
        print(on_one_line(f"{told} ({error})."), file=sys.stderr)
        return None


def _find_fingerprint(entry: Entry) -> ScanFingerprint | None:
    """Finds what was measured of a scan; None where nothing is, or it is stale.

    Raises:
        OSError, KeyError, TypeError, ValueError: It is damaged.
    """
    record = _record(entry, MeasuredRecord)
    return None if record is None else ScanFingerprint.from_json(record.fingerprint)


def _find_case(entry: Entry) -> Case | None:
    """Finds a prepared case, in memory-mapped files; None where there is none, or it is stale.

    Raises:
        OSError, ValueError: It is damaged.
    """
    record = _record(entry, PreparedRecord)
    if record is None:
        return None
    image, label = (_mapped(entry, ending, record) for ending in _ARRAYS)
    return Case(entry.files.name, image, label, record.spacing, ORIENTATION, entry.labels)


def _record(entry: Entry, kind: type[R]) -> R | None:
    """Reads the record of an entry; None where there is none, or its sources have changed.

    Raises:
        StateError: It is damaged.
    """
    file = entry.file("json")
    if not file.exists():
        return None
    remedy = "It is a file of the cache"
    try:
        record: R = read_json(file, kind, where=file.name, remedy=remedy)
    except StateError:
        made_from = read_json(file, dict[str, Any], where=file.name, remedy=remedy).get("made_from")
        if isinstance(made_from, dict) and made_from.get("format") not in (None, FORMAT):
            return None  # of an earlier build, which recorded other things
        raise
    return record if record.made_from == entry.made_from() else None


def _mapped(entry: Entry, ending: str, record: PreparedRecord) -> NDArray[Any]:
    """Maps an array into memory, once its file was read through to its checksum.

    Raises:
        OSError, ValueError: It is not what was written.
    """
    file, crc = entry.file(ending), 0
    shape, kind = (record.shape, np.float32) if ending == _ARRAYS[0] else (record.shape[1:], np.uint8)
    num_bytes = _HEADER + math.prod(shape) * np.dtype(kind).itemsize
    if (given := file.stat().st_size) != num_bytes or min(shape) < 1:
        raise ValueError(f"{ending} has {given} bytes, not {num_bytes}")
    with open(file, "rb") as stream:
        while part := stream.read(1 << 20):
            crc = zlib.crc32(part, crc)
    if crc != record.checksums[ending]:
        raise ValueError(f"{ending} has another checksum")
    return np.memmap(file, kind, "r", _HEADER, shape)


def _refuse(entries: Sequence[Entry], faults: Sequence[tuple[str, Fault]]) -> NoReturn:
    names = [name for name, _ in sorted(faults)]
    lines = [f"{name}: {fault}" for name, fault in sorted(faults)]
    told = abridge(lines, names, whole="python -m dstlib.zoo.e2enet check DATA --all lists them")
    listed, num_bad = "".join(f"\n  {line}" for line in told), len(set(names))
    allowed = "images and labels that are readable and fit each other"
    given = f"{len(faults)} defect(s) in {num_bad} of {len(entries)} cases"
    remedy = "Repair or restore these files, or take the cases out of the set. The others need no second reading:"
    where = f"data set {entries[0].files.images[0].parent}"
    raise DataError.of("cases", where, allowed=allowed, given=given, remedy=remedy + listed)


def _refuse_full_disk(entries: Sequence[Entry], num_lacking: int) -> NoReturn:
    """Refuses to go on; what is missing is estimated by what is whole and by the case that did not fit."""
    whole = [entry for entry in entries if _find_case(entry) is not None]
    sizes = [sum(entry.file(ending).stat().st_size for ending in _ARRAYS) for entry in whole]
    num_missing = len(entries) - len(sizes)
    needed = num_missing * (sum(sizes) + num_lacking) / (len(sizes) + 1)
    allowed = f"about {_size(needed)} of room for the {num_missing} of {len(entries)} cases that are missing"
    remedy = f"The other {len(sizes)} ({_size(sum(sizes))}) are whole: make room, then repeat the command."
    raise StateError.of("disk", f"folder {entries[0].cache}", allowed=allowed, given="a full one", remedy=remedy)


def _mention_unused(folder: Path, entries: Sequence[Entry]) -> None:
    """Says what other preparations take up, which a run of today or a model of yesterday may yet want."""
    used = {entry.folder for entry in entries}
    unused = sorted(each for each in folder.glob("prepared-*") if each not in used and each.is_dir())
    if unused:
        size = _size(sum(map(_num_bytes, unused)))
        names = ", ".join(each.name for each in unused)
        told = f"Other preparations take up {size} in {folder}: {names}. Delete what you do not need."
        print(on_one_line(told), file=sys.stderr)


def _num_bytes(folder: Path) -> int:
    """Adds up the sizes of a folder's files, of which others may remove some meanwhile."""
    num = 0
    with suppress(OSError):
        for file in folder.iterdir():
            with suppress(OSError):
                num += file.stat().st_size
    return num


def _size(num: float) -> str:
    return f"{num / 1e9:.1f} GB" if num >= 1e9 else f"{num / 1e6:.1f} MB"

"""One case of a cache: made of its source files, and found again only while it is whole and not stale.

An entry is some files and a JSON record of what they were made from, which is removed first and written last. So
whatever ends a process, and wherever, an entry with a record is whole.
"""

import errno
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import StateError
from dstlib.files import write_json, write_whole
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import ScanFingerprint, scan_fingerprint
from dstlib.zoo.e2enet.data.preprocessing.placement import ORIENTATION
from dstlib.zoo.e2enet.data.preprocessing.preparation import Preparation, prepare_scan
from dstlib.zoo.e2enet.data.scans.nifti import Fault, examine_scan

FORMAT = 1  # to be raised whenever the same scan would be prepared otherwise than before: old entries are then remade

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Which case is to be measured or, with a ``preparation``, prepared, and the folder of the whole cache."""

    cache: Path
    files: CaseFiles
    num_channels: int
    num_classes: int
    preparation: Preparation | None = None

    @property
    def folder(self) -> Path:
        """Of all entries that are made alike."""
        return self.cache / ("fingerprints" if self.preparation is None else preparation_key(self.preparation))

    def file(self, ending: str) -> Path:
        """One file of the entry."""
        return self.folder / f"{self.files.name}.{ending}"

    def made_from(self) -> dict[str, Any]:
        """All that settles the content, as JSON reads it; a source file by its size and the time of its change."""
        paths = [*self.files.images, *([] if self.files.label is None else [self.files.label])]
        return {
            "format": FORMAT,
            "num_channels": self.num_channels,
            "num_classes": self.num_classes,
            "preparation": None if self.preparation is None else self.preparation.to_json(),
            "sources": [_state(path) for path in paths],
        }


class Made(NamedTuple):
    """How the making of an entry went: well, or these defects in its sources, or these bytes more than the disk has."""

    faults: tuple[Fault, ...] = ()
    num_lacking: int = 0


def preparation_key(preparation: Preparation) -> str:
    """A name for the folder of everything that is prepared like this."""
    text = json.dumps([FORMAT, preparation.to_json()], sort_keys=True)
    return "prepared-" + hashlib.sha256(text.encode()).hexdigest()[:12]


def _state(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError:
        return [str(path.absolute()), None, None]
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


def make(entry: Entry) -> Made:
    """Reads the sources and writes the entry, in whichever process.

    Raises:
        StateError: The folder cannot be written to, for another reason than a full disk.
    """
    made_from = entry.made_from()  # before reading: a file that changes meanwhile makes the entry stale, not wrong
    scan, faults, _ = examine_scan(entry.files, num_channels=entry.num_channels, num_classes=entry.num_classes)
    if scan is None:
        return Made(faults)
    entry.file("json").unlink(missing_ok=True)
    if entry.preparation is None:
        write_json(entry.file("json"), {"made_from": made_from, "fingerprint": scan_fingerprint(scan).to_json()})
        return Made()
    try:
        case = prepare_scan(scan, entry.preparation)
    except MemoryError as error:
        size = "×".join(f"{mm:.3g}" for mm in scan.spacing)
        fault = f"does not fit into memory when it is resampled ({error}): its voxels are {size} mm, is that right?"
        return Made((Fault(entry.files.images[0], fault),))
    arrays = {"image.npy": _npy(case.image), "label.npy": _npy(case.label)}
    sizes = {ending: content.nbytes for ending, content in arrays.items()}
    try:
        for ending, content in arrays.items():
            write_whole(entry.file(ending), content)
        write_json(entry.file("json"), {"made_from": made_from, "spacing": list(case.spacing), "num_bytes": sizes})
    except StateError as error:
        for ending in arrays:
            entry.file(ending).unlink(missing_ok=True)  # half an entry would only take room
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
            return Made(num_lacking=sum(sizes.values()))
        raise
    return Made()


def _npy(array: NDArray[Any]) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getbuffer()


def find_fingerprint(entry: Entry) -> ScanFingerprint | None:
    """What was measured, or None where nothing is, or nothing that still holds."""
    record = _record(entry)
    try:
        return None if record is None else ScanFingerprint.from_json(record["fingerprint"])
    except (KeyError, StateError):
        return None


def find_case(entry: Entry) -> Case | None:
    """The prepared case, in memory-mapped files, or None where there is none, or none that is whole and not stale."""
    record = _record(entry)
    if record is None:
        return None
    try:
        for ending, size in record["num_bytes"].items():
            if entry.file(ending).stat().st_size != size:
                return None
        image, label = (np.load(entry.file(f"{kind}.npy"), mmap_mode="r") for kind in ("image", "label"))
        d, h, w = record["spacing"]
        return Case(entry.files.name, image, label, (d, h, w), ORIENTATION)
    # Whatever is wrong with a file that was not made here is answered by making it here.
    except (OSError, KeyError, TypeError, AttributeError, ValueError):
        return None


def num_bytes(entry: Entry) -> int:
    """On disk, of the arrays of an entry that was found."""
    return sum(entry.file(ending).stat().st_size for ending in ("image.npy", "label.npy"))


def _record(entry: Entry) -> dict[str, Any] | None:
    try:
        record = json.loads(entry.file("json").read_text())
    except (OSError, ValueError):
        return None
    is_current = isinstance(record, dict) and record.get("made_from") == entry.made_from()
    return record if is_current else None

"""The smallest DICOM files there are, written by hand: each tag is a test's to choose, leave out or break."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CT, MR, PET = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "4", "128"))
CAPTURE, SEGMENTATION, STRUCTURES, ENHANCED_MR = (
    f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("7", "66.4", "481.3", "4.1")
)
LITTLE_ENDIAN = "1.2.840.10008.1.2.1"  # explicit
LONG = ("OB", "OW", "UT", "UN", "SQ")  # whose lengths take four bytes

Tags = Mapping[tuple[int, int], tuple[str, object]]


def slice_tags(number: int, position: np.ndarray, **changes: object) -> dict[tuple[int, int], tuple[str, object]]:
    """Returns the tags of one slice of a series at ``position`` (LPS); ``changes`` by the names below."""
    named = {
        "sop_class": CT,
        "series": "1.2.3.4",
        "instance": f"1.2.3.4.{number}",
        "modality": "CT",
        "image_type": "ORIGINAL\\PRIMARY\\AXIAL",
        "orientation": (1, 0, 0, 0, 1, 0),
        "spacing": (0.75, 0.5),  # between rows, between columns
        "photometric": "MONOCHROME2",
        "samples": 1,
        "slope": 1,
        "intercept": -1024,
        "frames": None,
        "thickness": 2.5,
        "signed": 1,
    } | changes
    tags: dict[tuple[int, int], tuple[str, object]] = {
        (0x0008, 0x0008): ("CS", named["image_type"]),
        (0x0008, 0x0016): ("UI", named["sop_class"]),
        (0x0008, 0x0018): ("UI", named["instance"]),
        (0x0008, 0x0060): ("CS", named["modality"]),
        (0x0010, 0x0010): ("PN", "DOE^JANE"),
        (0x0018, 0x0050): ("DS", named["thickness"]),
        (0x0020, 0x000E): ("UI", named["series"]),
        (0x0020, 0x0011): ("IS", 7),
        (0x0020, 0x0013): ("IS", number),
        (0x0020, 0x0032): ("DS", position),
        (0x0020, 0x0037): ("DS", named["orientation"]),
        (0x0028, 0x0002): ("US", named["samples"]),
        (0x0028, 0x0004): ("CS", named["photometric"]),
        (0x0028, 0x0008): ("IS", named["frames"]),
        (0x0028, 0x0030): ("DS", named["spacing"]),
        (0x0028, 0x0100): ("US", 16),
        (0x0028, 0x0101): ("US", 16),
        (0x0028, 0x0102): ("US", 15),
        (0x0028, 0x0103): ("US", named["signed"]),
        (0x0028, 0x1052): ("DS", named["intercept"]),
        (0x0028, 0x1053): ("DS", named["slope"]),
    }
    return {tag: value for tag, value in tags.items() if value[1] is not None}


def write_slice(file: Path, pixels: np.ndarray, tags: Tags) -> None:
    """Writes whole numbers (rows, columns) of two bytes as they are stored."""
    rows, columns = pixels.shape[-2:]
    shape: Tags = {(0x0028, 0x0010): ("US", rows), (0x0028, 0x0011): ("US", columns)}
    stored: Tags = {(0x7FE0, 0x0010): ("OW", pixels.astype("<i4").astype("<u2").tobytes())}
    write_dicom(file, {**shape, **tags, **stored})


def write_dicom(file: Path, tags: Tags) -> None:
    """Writes an object of any tags."""
    sop_class = tags[(0x0008, 0x0016)][1]
    head: Tags = {
        (0x0002, 0x0001): ("OB", b"\0\1"),
        (0x0002, 0x0002): ("UI", sop_class),
        (0x0002, 0x0003): ("UI", tags.get((0x0008, 0x0018), ("UI", "1.2"))[1]),
        (0x0002, 0x0010): ("UI", LITTLE_ENDIAN),
    }
    meta = b"".join(_element(tag, *head[tag]) for tag in sorted(head))
    meta = _element((0x0002, 0x0000), "UL", len(meta)) + meta
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(128) + b"DICM" + meta + b"".join(_element(tag, *tags[tag]) for tag in sorted(tags)))


def _element(tag: tuple[int, int], kind: str, value: object) -> bytes:
    if kind == "US":
        content = struct.pack("<H", value)
    elif kind == "UL":
        content = struct.pack("<I", value)
    elif isinstance(value, bytes):
        content = value
    else:
        values = value if isinstance(value, (tuple, list, np.ndarray)) else (value,)
        content = "\\".join(v if isinstance(v, str) else f"{v:.10g}" for v in values).encode()
    content += (b"\0" if kind in ("UI", "OB", "OW") else b" ") * (len(content) % 2)
    length = struct.pack("<2xI" if kind in LONG else "<H", len(content))
    return struct.pack("<HH", *tag) + kind.encode() + length + content

"""Files that are whole at every moment: written under another name, then renamed."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstlib.errors import StateError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes strict JSON, whole or not at all; NaN is refused (write None)."""
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Puts ``content`` into ``path`` in one step: a reader, or a crash, meets the old file or the new one.

    Raises:
        StateError: The disk is full, say; the old file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")  # in the same folder: only so is replacing one step
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        remedy = "What was written before is whole. Make room, then repeat the command (a training: with --resume)."
        raise StateError.of(
            path.name, f"folder {path.parent}", allowed="a disk to write to", given=error, remedy=remedy
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
        StateError: It cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given, remedy = error.strerror, "Pass a folder you may write to."
        raise StateError.of(
            "output", f"folder {folder}", allowed="a folder to write to", given=given, remedy=remedy
        ) from error


def _remove(path: Path) -> None:
    with suppress(OSError):  # what is being reported matters more than a file left over
        path.unlink(missing_ok=True)

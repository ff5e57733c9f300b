"""Files that are whole at every moment, and folders that one process has to itself."""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

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
    except BaseException as error:
        with suppress(OSError):  # what is being reported matters more than a file left over
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        allowed = "a disk to write to"
        remedy = "What was written before is whole. Make room, then repeat the command (a training: with --resume)."
        raise StateError.of(path.name, f"folder {path.parent}", allowed=allowed, given=error, remedy=remedy) from error


def read_whole(path: Path, *, max_bytes: int) -> bytes:
    """Reads a file that is one: not a folder, and neither a pipe nor a device, which may never end.

    Raises:
        OSError: It is something else, is larger, or cannot be read.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - closed below
    except ValueError as error:
        raise OSError(errno.EINVAL, "no name that a file can have", path) from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "a pipe or a device, not a file", path)
        if status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, of {max_bytes} at most", path)
        return file.read(status.st_size)


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to opens too


def make_folder(folder: Path, *, what: str = "output") -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
        StateError: It cannot be made, or is a file; ``what`` says what was to lie in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse_folder(folder, error, what=what)


def refuse_folder(folder: Path, error: OSError, *, what: str) -> NoReturn:
    """Refuses a folder that the system does not let this process write to.

    Raises:
        StateError: Always.
    """
    allowed, remedy = "a folder to write to", "Pass a folder you may write to."
    raise StateError.of(what, f"folder {folder}", allowed=allowed, given=error.strerror, remedy=remedy) from error


@contextmanager
def locked(folder: Path, *, if_held: Callable[[], object], refuse: Callable[[OSError], NoReturn]) -> Iterator[None]:
    """Holds a folder against other processes; the system lets go of it however this one ends.

    Where another process holds it, ``if_held`` is called: it may raise, or else the lock is waited for. ``refuse``
    raises what a user is to read where the folder cannot be written to.
    """
    import fcntl  # here, as Windows has none

    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 - closed below, after the yield
    except OSError as error:
        refuse(error)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if_held()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

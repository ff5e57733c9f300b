"""Files that are whole at every moment, and folders that one process has to itself."""

import errno
import json
import os
import platform
import re
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from dstlib.errors import StateError

_TEMPORARY = re.compile(r"\.dstlib-[0-9a-f]{8}-[0-9a-f]{16}\.tmp")
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # of which several may share a folder
_DAY = 24 * 60 * 60  # seconds
_REPLACES_OPEN = os.name != "nt"  # Windows renames and removes no file that is open
CONTINUE = "repeat the command (with --resume, if it has that option)"  # a remedy, of every command
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"Make room, then {CONTINUE}."),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Choose a folder that you may write to."),
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes strict JSON, whole or not at all; NaN is refused (write None)."""
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Puts ``content`` into ``path`` in one step: a reader, or a crash, meets the old file or the new one.

    Several may write to one path: each file is whole, and the last one stays. The new file has the mode of the old one.
    A link is replaced, and what it leads to is left alone; links among the folders above are followed, so a folder
    may lie on another disk. What a process that was killed has left in the folder is cleared.

    Raises:
        StateError: The disk is full, say; the old file is as it was.
    """
    try:
        mode = _mode_to_keep(path)
        _clear_left(path.parent)
        temporary, file = _make_temporary(path.parent, 0o666 if mode is None else mode | 0o600)
        with file:
            try:
                file.write(content)
                file.flush()
                if mode is not None and os.chmod in os.supports_fd:
                    os.chmod(file.fileno(), mode)
                os.fsync(file.fileno())
                if not _REPLACES_OPEN:
                    file.close()
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):  # what is being reported matters more than a file left over
                    file.close()
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
        _sync(path.parent)
    except OSError as error:
        allowed = "a disk to write to"
        remedy = _REMEDIES.get(error.errno or 0, "Repair what the system says, or choose another folder.")
        remedy = f"What was written before is whole. {remedy}"
        raise StateError.of(path.name, f"folder {path.parent}", allowed=allowed, given=error, remedy=remedy) from error


def _mode_to_keep(path: Path) -> int | None:
    """Returns the mode of the file at a path, None where there is none."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _no_name(path) from error
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EEXIST, "Another thing than a file has that name", str(path))
    return stat.S_IMODE(mode) & 0o777 if stat.S_ISREG(mode) else None


def _make_temporary(folder: Path, mode: int) -> tuple[Path, BinaryIO]:
    """Makes a file that did not exist, by no link, and holds it: it is in use for as long as that is so."""
    while True:
        temporary = (
            folder / f".dstlib-{_MACHINE}-{secrets.token_hex(8)}.tmp"
        )  # in the same folder: replacing is one step
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = open(os.open(temporary, flags, mode), "wb")  # noqa: SIM115 - closed by the caller
        try:
            is_held = _hold(file)
        except OSError:  # a file system without locks
            return temporary, file
        with suppress(OSError):
            if is_held and os.path.samestat(temporary.lstat(), os.fstat(file.fileno())):
                return temporary, file
        file.close()  # another one has cleared it between its making and its holding


def _clear_left(folder: Path) -> None:
    """Removes the temporary files that nobody holds: each was left by a process that was killed."""
    left = []
    with suppress(OSError), os.scandir(folder) as entries:  # a folder may be open to writing only
        left = [entry for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for entry in left:
        with (
            suppress(OSError),
            open(entry.path, "r+b", opener=_without_links) as file,
        ):  # OSError: it is not there any more
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                continue
            is_old = time.time() - status.st_mtime > _DAY
            try:
                is_free = _hold(file)
            except OSError:
                is_free = is_old
            # Not every file system shares its locks between machines.
            if is_free and (is_old or f"-{_MACHINE}-" in entry.name):
                os.unlink(entry.path)


def _hold(file: BinaryIO, *, wait: bool = False) -> bool:
    """Takes a file's lock, which the system lets go of when the file is closed; False where another has it.

    Raises:
        OSError: There are no locks here.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows has none
        raise OSError(errno.ENOSYS, "a system without locks") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def read_whole(path: Path, *, max_bytes: int) -> bytes:
    """Reads a file, unless it is larger.

    Raises:
        OSError: As :func:`open_file`, or it is larger, or cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, of {max_bytes} at most", str(path))
        return file.read(size)


def open_file(path: Path) -> BinaryIO:
    """Opens a file to read, if it is one: not a folder, and neither a pipe nor a device, which may never end.

    Raises:
        OSError: It is none, or cannot be opened.
    """
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - closed by the caller
    except ValueError as error:
        raise _no_name(path) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return file


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o666)  # a pipe that nobody writes to opens too


def _without_links(name: str, flags: int) -> int:
    return _without_waiting(name, flags | getattr(os, "O_NOFOLLOW", 0))


def _no_name(path: Path) -> OSError:
    return OSError(errno.EINVAL, "No file can have this name", str(path))


def make_folder(folder: Path, *, what: str = "output") -> None:
    """Makes a folder, and those above it, unless it is there.

    Raises:
        StateError: It cannot be made, or is a file; ``what`` says what was to lie in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError:
        refuse_folder(folder, _no_name(folder), what=what)
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
def alone_in(folder: Path, *, what: str = "output") -> Iterator[None]:
    """Makes a folder, unless it is there, and holds it: another process that would work there is refused at once.

    Raises:
        StateError: Another process holds it, or it cannot be written to; ``what`` says what was to lie in it.
    """

    def refuse_to_share() -> NoReturn:
        allowed, given = "a folder that nobody else works in", "one in use by another process"
        remedy = "Wait for it or stop it, or pass another folder."
        raise StateError.of(what, f"folder {folder}", allowed=allowed, given=given, remedy=remedy)

    make_folder(folder, what=what)
    with locked(folder, if_held=refuse_to_share, refuse=partial(refuse_folder, folder, what=what)):
        yield


@contextmanager
def locked(folder: Path, *, if_held: Callable[[], object], refuse: Callable[[OSError], NoReturn]) -> Iterator[None]:
    """Holds a folder against other processes; the system lets go of it however this one ends.

    Where another process holds it, ``if_held`` is called: it may raise, or else the lock is waited for. ``refuse``
    raises what a user is to read where the folder cannot be written to.
    """
    lock = folder / ".lock"
    try:
        file = open(lock, "ab", opener=_without_links)  # noqa: SIM115 - closed below, after the yield
    except OSError as error:
        refuse(OSError(errno.ELOOP, "one whose .lock is a link") if lock.is_symlink() else error)
    with file:
        try:
            is_held = _hold(file)
        except OSError as error:
            refuse(error)
        if not is_held:
            if_held()
            _hold(file, wait=True)
        yield

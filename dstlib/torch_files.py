"""Files of ``torch.save``, read with every check that torch leaves out.

Such a file is a zip archive: a pickle, and the bytes of each tensor's storage as a member of its own. torch writes
members side by side, without compression, each with a checksum; it reads past a wrong one, follows a directory that
names the same bytes twice, and in some releases believes the sizes that the pickle promises.
"""

import io
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.types import Storage

from dstlib.errors import StateError
from dstlib.files import open_file, write_whole

_HEADER = 30  # bytes of a local header, before its name


def read_torch(path: Path, *, where: str, allowed: str, remedy: str, safe_globals: Sequence[Any] = ()) -> Any:
    """Reads what ``torch.save`` wrote: tensors, on the CPU, and plain containers; nothing in it runs code.

    ``where``, ``allowed`` and ``remedy`` are for the error; ``safe_globals`` are further names that the pickle may use.
    Bit for bit, the content is what was saved, unless somebody has forged checksums along with it.

    Raises:
        StateError: There is no such file, it is damaged, or of something else.

    >>> from tempfile import TemporaryDirectory
    >>> words = {"where": "a run", "allowed": "its weights", "remedy": "Train it anew."}
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "model.pt"
    ...     torch.save({"weight": torch.ones(2)}, path)
    ...     whole = read_torch(path, **words)
    ...     content = bytearray(path.read_bytes())
    ...     content[content.index(torch.ones(2).numpy().tobytes())] ^= 1
    ...     _ = path.write_bytes(content)
    ...     read_torch(path, **words)
    Traceback (most recent call last):
    dstlib.errors.StateError: model.pt of a run: expected its weights, got a damaged file (data/0 has another \
checksum). Train it anew.
    """
    try:
        with open_file(path) as file:
            sizes = _member_sizes(file)
            file.seek(0)
            return _load(file, sizes, safe_globals)
    except FileNotFoundError as error:
        raise StateError.of(path.name, where, allowed=allowed, given="no such file", remedy=remedy) from error
    except OSError as error:
        raise StateError.of(path.name, where, allowed=allowed, given=error.strerror, remedy=remedy) from error
    except _DamageError as error:
        given = f"a damaged file ({error})"
        raise StateError.of(path.name, where, allowed=allowed, given=given, remedy=remedy) from error
    # Which type zipfile or torch raises depends on where the damage lies: RuntimeError, EOFError, KeyError, ...
    except Exception as error:
        given = f"a damaged or foreign file ({type(error).__name__})"
        raise StateError.of(path.name, where, allowed=allowed, given=given, remedy=remedy) from error


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Writes what :func:`read_torch` reads, whole or not at all; the same content is the same bytes.

    Raises:
        StateError: The disk is full, say; the old file is as it was.
    """
    buffer = io.BytesIO()  # serialised before the disk is touched, so that only the write can fail
    torch.save(_with_texts_once(dict(content)), buffer)
    write_whole(path, buffer.getbuffer())


def _with_texts_once(content: Any) -> Any:
    """Returns plain containers in which equal texts are one object.

    A pickle refers to objects that it has met before, and texts that came out of a file are objects of their own.
    """
    if type(content) is str:  # Python keeps one object of no other class
        return sys.intern(content)
    if type(content) is dict:
        return {_with_texts_once(key): _with_texts_once(value) for key, value in content.items()}
    if type(content) in (list, tuple):
        return type(content)(map(_with_texts_once, content))
    return content


class _DamageError(Exception):
    """What is wrong with a file."""


def _load(file: BinaryIO, sizes: dict[str, int], safe_globals: Sequence[Any]) -> Any:
    """Loads a file whose members have these sizes, and compares those with what the pickle promises."""
    # torch numbers storages as it meets them, and tells of each as it is read
    promised: list[int] = []

    def keep(storage: Storage, location: str) -> Storage:
        promised.append(storage.nbytes())
        return storage

    with torch.serialization.safe_globals(list(safe_globals)):
        content = torch.load(file, map_location=keep, weights_only=True)
    numbered = sorted((int(name), size) for name, size in sizes.items())
    if [size for _, size in numbered if size] != [size for size in promised if size]:
        raise _DamageError("tensors are of other sizes than what is stored")
    return content


def _member_sizes(file: BinaryIO) -> dict[str, int]:
    """Checks all members of an archive; returns the sizes of the storages by their names, which are numbers.

    Raises:
        _DamageError: A checksum is wrong, or torch did not write it so.
    """
    with zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        if not members or members[0].header_offset:  # torch would read what comes before in an older way
            raise _DamageError("it does not begin with a member")
        folder = members[0].filename.partition("/")[0]
        end, seen, sizes = 0, set[str](), dict[str, int]()
        for member in members:
            name = member.filename.removeprefix(f"{folder}/")
            if member.filename == name or name in seen:
                raise _DamageError("two members of one name" if name in seen else "members in several folders")
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise _DamageError(f"{name} is compressed")
            if member.header_offset < end:
                raise _DamageError(f"{name} overlaps another member")
            end = member.header_offset + _HEADER + len(member.filename.encode()) + member.file_size
            seen.add(name)
            _check_bytes(archive, member, name)
            if name.startswith("data/"):
                sizes[name.removeprefix("data/")] = member.file_size
        if end > archive.start_dir:
            raise _DamageError("a member overlaps the directory")
        if "byteorder" in seen and archive.read(f"{folder}/byteorder").decode() != sys.byteorder:
            raise _DamageError("numbers are in the byte order of another machine")
    return sizes


def _check_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> None:
    """Reads a member through to its checksum."""
    try:
        with archive.open(member) as stream:
            while stream.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        raise _DamageError(f"{name} has another checksum") from error


def load_weights(model: nn.Module, weights: Any, *, what: str, where: str, remedy: str) -> None:
    """Puts weights into a model, if each fits one of its own by name, shape and type, and is finite.

    Raises:
        StateError: One does not; nothing has been loaded then.
    """
    check_weights(model, weights, what=what, where=where, remedy=remedy)
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: Any, *, what: str, where: str, remedy: str) -> None:
    """Checks that each of these weights fits one of a model by name, shape and type, and is finite.

    Raises:
        StateError: One does not.

    >>> check_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 2)}, what="model.pt", where="a run", remedy="Train.")
    Traceback (most recent call last):
    dstlib.errors.StateError: model.pt of a run: expected the 2 weights of this network, got 1 missing (bias), 0 more. \
Train.
    """
    own = model.state_dict()
    given = weights if isinstance(weights, Mapping) else {}
    missing, more = ([str(name) for name in names] for names in (own.keys() - given.keys(), given.keys() - own.keys()))
    if missing or more:
        counts = (f"{len(names)} {kind}{_some(names)}" for names, kind in ((missing, "missing"), (more, "more")))
        allowed = f"the {len(own)} weights of this network"
        raise StateError.of(what, where, allowed=allowed, given=", ".join(counts), remedy=remedy)
    for name, ours in own.items():
        theirs = given[name]
        is_tensor = isinstance(theirs, Tensor) and theirs.layout == ours.layout
        if not is_tensor or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
            described = f"{theirs.dtype} {tuple(theirs.shape)}" if isinstance(theirs, Tensor) else type(theirs).__name__
            allowed = f"{name} as {ours.dtype} {tuple(ours.shape)}"
            raise StateError.of(what, where, allowed=allowed, given=described, remedy=remedy)
        # a buffer may hold infinities from its start on
        if num_odd := int((~theirs.isfinite() & ours.to(theirs.device).isfinite()).sum()):
            allowed, described = f"finite numbers in {name}", f"{num_odd:,} that are NaN or infinite"
            raise StateError.of(what, where, allowed=allowed, given=described, remedy=remedy)


def is_same(ours: Any, theirs: Any) -> bool:
    """Says whether a file holds a plain value of ours: in a damaged one a tensor may stand in the place of any part.

    >>> is_same([1, 2], [1, 2]), is_same([1, 2], [1, torch.ones(2)]), is_same(1, torch.ones(1))
    (True, False, False)
    """
    if isinstance(ours, list | tuple):
        is_alike = type(ours) is type(theirs) and len(ours) == len(theirs)
        return is_alike and all(map(is_same, ours, theirs))
    return not isinstance(theirs, Tensor) and bool(ours == theirs)


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(sorted(names)[:3])})" if names else ""


def checksum(content: Any) -> int:
    """Computes the CRC-32 of plain values, containers of them, and tensors, wherever these lie.

    Lists and tuples count alike, and so do dictionaries in another order: they may change on the way through a file.

    >>> checksum({"mask": torch.ones(2), "step": 1}) == checksum({"step": 1, "mask": torch.ones(2)})
    True
    >>> checksum([torch.ones(2), True]) == checksum([torch.ones(2), 1])
    False
    """
    crc = 0
    for part in _bytes_of(content):
        crc = zlib.crc32(part, crc)
    return crc


def check_seal(state: Mapping[str, Any], content: Any, *, where: str) -> None:
    """Checks a saved state for changes after which every part still fits; earlier states have no ``checksum``.

    Raises:
        StateError: Its checksum is not that of the content.

    >>> check_seal({"checksum": 1, "step": 2}, {"step": 2}, where="a state")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dstlib.errors.StateError: checksum of a state: expected ..., that of its contents, got 1. It was damaged or ...
    """
    if "checksum" in state and state["checksum"] != (own := checksum(content)):
        allowed, given = f"{own}, that of its contents", state["checksum"]
        remedy = "It was damaged or changed since it was saved: load an earlier one."
        raise StateError.of("checksum", where, allowed=allowed, given=given, remedy=remedy)


def _bytes_of(content: Any) -> Iterator[bytes | memoryview]:
    if isinstance(content, Tensor):
        yield f"tensor {content.dtype} {tuple(content.shape)};".encode()
        yield content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(content, Mapping):
        yield f"table {len(content)};".encode()
        for key in sorted(content, key=repr):
            yield f"{key!r}:".encode()
            yield from _bytes_of(content[key])
    elif isinstance(content, list | tuple):
        yield f"list {len(content)};".encode()
        for part in content:
            yield from _bytes_of(part)
    else:
        yield f"{content!r};".encode()

"""JSON read into the type that it was written from, or refused by the place in it that does not fit.

A type is a dataclass, ``list``, ``tuple`` or ``dict`` of types, a ``Literal``, a union, text, a number, a truth value,
None, or ``Any`` for what nobody here reads. ``dataclasses.asdict`` and :func:`dstlib.files.write_json` lead back.
"""

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dstlib.errors import DstlibError, StateError, shown
from dstlib.files import read_whole

MAX_BYTES = 16 * 2**20  # of a document: in memory it takes up to some twenty times as much
OPTIONAL = "optional"  # in the metadata of a field
MAX_DEPTH = 64  # of brackets in brackets: Python's own limit depends on who calls
_SEAL = "crc32"  # the key of a checksum
_MAX_INT = 2**64  # what all others can read

_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)  # possessive: damaged text takes no longer
_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}

T = TypeVar("T")


def read_json(
    path: Path,
    kind: type[T],
    *,
    remedy: str,
    where: str | None = None,
    foreign: bool = False,
    error: type[DstlibError] = StateError,
) -> T:
    """Reads a file of JSON as a value of ``kind``.

    Whole numbers pass for fractions, nothing else for anything else. What was ``sealed`` must be as it was written. A
    field whose metadata say ``OPTIONAL`` may be lacking, as in files of before there was one. Where the file is
    ``foreign``, that is not written from ``kind``, it may hold more, and lack what has a default.

    Raises:
        StateError: The file cannot be read, is no strict JSON, or holds something else; or an error of the class
            ``error``. It says at which place in ``where``, and ends with ``remedy``.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder) / "sizes.json"
    ...     _ = file.write_text('{"patch": [32, "a"]}')
    ...     read_json(file, dict[str, tuple[int, ...]], where="sizes.json", remedy="Write it anew.")
    Traceback (most recent call last):
    dstlib.errors.StateError: patch[1] of sizes.json: expected a whole number, got 'a'. Write it anew.
    """
    where = str(path) if where is None else where
    try:
        content = read_whole(path, max_bytes=MAX_BYTES)
    except OSError as refused:
        given = refused.strerror or str(refused)
        raise error.of("content", where, allowed="a file of JSON", given=given, remedy=remedy) from refused
    return parse_json(content, kind, where=where, remedy=remedy, foreign=foreign, error=error)


def parse_json(
    content: bytes,
    kind: type[T],
    *,
    where: str,
    remedy: str,
    foreign: bool = False,
    error: type[DstlibError] = StateError,
    max_bytes: int = MAX_BYTES,
) -> T:
    """Reads JSON in UTF-8, as :func:`read_json` does, that came from elsewhere than a file of its own.

    Raises:
        StateError: As :func:`read_json`.
    """
    try:
        plain = _parsed(content, max_bytes)
        is_sealed = type(plain) is dict and type(plain.get(_SEAL)) is str and not foreign
        seal = plain.pop(_SEAL) if is_sealed else None
        value: T = _fit(plain, kind, None, foreign)
        if seal is not None:
            _check_seal(seal, plain)
    except _MisfitError as misfit:
        what, allowed, given = _path(misfit.at) or "content", misfit.allowed, misfit.given
        raise error.of(what, where, allowed=allowed, given=given, remedy=remedy) from misfit.__cause__
    return value


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is to be written, with a checksum of it that is checked, and left out, when it is read.

    >>> sealed({"size": 3})
    {'size': 3, 'crc32': '2d82a84a'}
    """
    return {**content, _SEAL: _seal_of(content)}


def _seal_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _check_seal(seal: Any, content: Mapping[str, Any]) -> None:
    """Checks a document for changes after which everything still fits; not every one is sealed."""
    if seal != (own := _seal_of(content)):
        given = f"{shown(seal)}: it was changed since it was written (who means that takes {_SEAL!r} out)"
        raise _MisfitError((None, _SEAL), f"{own!r}, the checksum of the rest", given)


_Place = tuple[Any, str | int] | None  # where it is in, and its key or number there; None for a document


class _MisfitError(Exception):
    """A place in a document, what was to be there, and what is."""

    def __init__(self, at: _Place, allowed: str, given: str) -> None:
        self.at, self.allowed, self.given = at, allowed, given


def _parsed(content: bytes, max_bytes: int) -> Any:
    """Returns what JSON says, of which every number is finite and of 64 bits at most, and every text Unicode."""
    if len(content) > max_bytes:
        raise _MisfitError(None, f"at most {max_bytes} bytes", f"{len(content)}")
    try:
        text = content.decode("utf-8-sig")  # an editor's byte order mark does no harm
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_once, parse_int=_parse_int)
    except ValueError as error:
        raise _MisfitError(None, "strict JSON in UTF-8", f"{error}") from error
    _check_parts(value)
    return value


def _check_parts(value: Any) -> None:
    parts = [value]
    while parts:
        part = parts.pop()
        if type(part) is list:
            parts.extend(part)
        elif type(part) is dict:
            parts.extend(part)
            parts.extend(part.values())
        elif _wrong(part):
            for at, each in _places(value, None):  # which makes the places: rarely, as that takes most of the time
                if wrong := _wrong(each):
                    raise _MisfitError(at, wrong, shown(each))


def _wrong(part: Any) -> str | None:
    """Says what a number or a text would have to be; None where it is."""
    if type(part) is float and not math.isfinite(part):
        return "a finite number of 64 bits"
    if type(part) is str and not part.isascii() and any("\ud800" <= c <= "\udfff" for c in part):
        return "text in Unicode"
    return None


def _places(value: Any, at: _Place) -> Iterator[tuple[_Place, Any]]:
    """Yields every value, and every key, of a document, and where it is."""
    yield at, value
    if isinstance(value, list):
        for i, part in enumerate(value):
            yield from _places(part, (at, i))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield at, key
            yield from _places(part, (at, key))


def _check_depth(text: str) -> None:
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        depth += (token in "[{") - (token in "]}")
        if depth > MAX_DEPTH:
            raise _MisfitError(None, f"at most {MAX_DEPTH} brackets in brackets", "more")


def _parse_int(text: str) -> float:
    """Returns a whole number, an infinite one where it is of more than 64 bits."""
    return value if len(text) <= 21 and abs(value := int(text)) <= _MAX_INT else math.inf


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _MisfitError(None, "each key once", f"{shown(key)} twice")
        table[key] = value
    return table


def _path(at: _Place) -> str:
    """Returns a place as code would reach it."""
    if at is None:
        return ""
    above, step = _path(at[0]), at[1]
    if isinstance(step, int) or not re.fullmatch(r"\w{1,60}", step):
        return f"{above}[{shown(step)}]"
    return f"{above}.{step}" if above else step


def _fit(value: Any, kind: Any, at: _Place, foreign: bool) -> Any:
    """Returns a value that JSON has given as one of ``kind``, or raises where it is no such."""
    if kind is Any or type(value) is kind:
        return value
    if is_dataclass(kind):
        return _fit_fields(value, kind, at, foreign)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _fit_any(value, parts, at, foreign)
    if origin is Literal:
        fits = any(type(value) is type(option) and value == option for option in parts)
    elif kind is float:
        fits = type(value) in (int, float)
    elif origin in (list, tuple):
        fits = type(value) is list and (origin is list or parts[-1] is ... or len(value) == len(parts))
    else:
        assert origin in (dict, Mapping) or kind in _PLAIN, kind
        fits = type(value) is (dict if origin else kind)
    if not fits:
        raise _MisfitError(at, _described(kind), shown(value))
    if kind is float:
        return float(value)
    if origin in (dict, Mapping):
        return {key: _fit(part, parts[1], (at, key), foreign) for key, part in value.items()}
    if origin is list or (origin is tuple and parts[-1] is ...):
        return origin(_fit(part, parts[0], (at, i), foreign) for i, part in enumerate(value))
    if origin is tuple:
        return tuple(_fit(part, of, (at, i), foreign) for i, (part, of) in enumerate(zip(value, parts, strict=True)))
    return value


def _fit_fields(value: Any, kind: Any, at: _Place, foreign: bool) -> Any:
    if type(value) is not dict:
        raise _MisfitError(at, _described(kind), shown(value))
    table, hints = _fields_of(kind)
    if not foreign and (unknown := next((key for key in value if key not in table), None)) is not None:
        raise _MisfitError((at, unknown), f"none but {', '.join(table)}", shown(value[unknown]))
    optional = {n for n, f in table.items() if (foreign or f.metadata.get(OPTIONAL)) and _has_default(f)}
    for name in table:
        if name not in value and name not in optional:
            raise _MisfitError((at, name), _described(hints[name]), "nothing")
    fitting = {n: _fit(value[n], hints[n], (at, n), foreign) for n in table if n in value}
    try:
        return kind(**fitting)
    except ValueError as error:  # of a value that the class itself refuses
        raise _MisfitError(at, f"a value of {kind.__name__}", str(error).rstrip(".")) from error


def _has_default(of: Field[Any]) -> bool:
    return (of.default, of.default_factory) != (MISSING, MISSING)


@cache
def _fields_of(kind: Any) -> tuple[Mapping[str, Field[Any]], Mapping[str, Any]]:
    return {field.name: field for field in fields(kind) if field.init}, get_type_hints(kind)


def _fit_any(value: Any, kinds: Iterable[Any], at: _Place, foreign: bool) -> Any:
    misfits = []
    for kind in kinds:
        try:
            return _fit(value, kind, at, foreign)
        except _MisfitError as misfit:
            misfits.append((_in_common(value, kind), len(_path(misfit.at)), misfit))
    _, _, nearest = max(misfits, key=lambda of: of[:2])
    if nearest.at == at and nearest.__cause__ is None:
        raise _MisfitError(at, " or ".join(dict.fromkeys(map(_described, kinds))), shown(value))
    raise nearest


def _in_common(value: Any, kind: Any) -> int:
    """Counts the keys that a value has of the fields of a kind."""
    is_record: bool = is_dataclass(kind) and isinstance(value, dict)
    return len(_fields_of(kind)[0].keys() & value) if is_record else 0


def _described(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, parts))
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple and parts[-1] is not ...:
        return f"a list of {len(parts)}"
    if origin in (list, tuple):
        return "a list"
    return _PLAIN.get(kind, "an object")

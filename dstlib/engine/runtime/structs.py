"""The structs and constants of the kernels' plain C headers, read from ``csrc/include`` while this module is imported.

``structs.Conv(stride=(1, 1, 1), ...)`` describes a convolution; structs within structs and arrays take tuples.
"""

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Why ctypes: copying a struct, setting 13 fields and calling a kernel was measured to take 1.7 µs, with cffi (ABI mode)
# 4.1 µs, or 2.1 µs where addresses are integer fields. Why the headers are read: a list of fields written by hand is a
# second truth, and where two fields of one size have changed places, no comparison of sizes finds it.
INCLUDE = Path(__file__).parents[1] / "csrc" / "include"

_SCALARS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}
_STATEMENT = re.compile(r"\s*(?:enum \{(?P<constants>[^}]*)\}|typedef struct \{(?P<fields>[^}]*)\} (?P<struct>\w+));")
_CONSTANT = re.compile(r"\s*(?P<name>\w+)(?: = (?P<value>\d+))?\s*(?:,|$)")
_FIELD = re.compile(
    r"\s*(?:(?:const )?(?P<pointee>\w+)\* (?P<pointer>\w+)|int \(\*(?P<function>\w+)\)\([\w ,*]*\)"
    r"|(?P<type>\w+) (?P<names>\w+(?:\[\w+\])?(?:, \w+(?:\[\w+\])?)*));"
)


def read_headers(folder: Path) -> dict[str, Any]:
    """Returns the structs and the enum constants of all headers in a folder, by name."""
    return {name: value for path in folder.glob("*.h") for name, value in read_header(path.read_text()).items()}


def read_header(text: str) -> dict[str, Any]:
    """Returns the structs and the enum constants of a plain C header, by name.

    It knows ``enum { ... };`` and ``typedef struct { ... } Name;`` with scalars, pointers, structs that precede, and
    arrays; an assertion names the line of anything else.

    >>> found = read_header("enum { MOST = 2 };\\ntypedef struct { int64_t n, size[MOST]; const float* x; } Map;")
    >>> found["MOST"], list(found["Map"](size=(3, 4)).size), [name for name, _ in found["Map"]._fields_]
    (2, [3, 4], ['n', 'size', 'x'])
    """
    text = re.sub(r"//.*|^#.*", "", text, flags=re.MULTILINE)
    found: dict[str, Any] = {}
    for statement in _each(_STATEMENT, text, (0, len(text))):
        if name := statement["struct"]:
            fields = list(_fields(text, statement.span("fields"), _SCALARS | found))
            found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        else:
            value = -1
            for constant in _each(_CONSTANT, text, statement.span("constants")):
                found[constant["name"]] = value = int(constant["value"] or value + 1)
    return found


def _fields(text: str, span: tuple[int, int], known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for field in _each(_FIELD, text, span):
        if not field["type"]:
            kind = ctypes.c_char_p if field["pointee"] == "char" else ctypes.c_void_p
            yield field["pointer"] or field["function"], kind
            continue
        for name, _, size in (each.rstrip("]").partition("[") for each in field["names"].split(", ")):
            for word in (field["type"], size):
                assert not word or word.isdigit() or word in known, _unreadable(text, field.start("type"))
            kind = known[field["type"]]
            yield name, kind * int(known.get(size, size)) if size else kind


def _each(pattern: re.Pattern[str], text: str, span: tuple[int, int]) -> Iterator[re.Match[str]]:
    """Yields the matches that fill this part of the text, one behind the other."""
    start, end = span
    while rest := text[start:end].lstrip():
        found = pattern.match(text, start, end)
        assert found, _unreadable(text, end - len(rest))
        yield found
        start = found.end()


def _unreadable(text: str, at: int) -> str:
    line = text.count("\n", 0, at)
    return f"line {line + 1} of a header, {text.splitlines()[line].strip()!r}, is not of the C that Python can read"


globals().update(read_headers(INCLUDE))
if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...

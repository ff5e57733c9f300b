"""Names that come with data: which of them can be printed, and which can be the name of a file on every platform.

A case gives its name to its prepared arrays and to its prediction, a data set to the folder of its prepared cases. A
class is never the name of a file: AMOS22 itself has a "prostate/uterus".
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from dstlib.errors import DataError, DstlibError, few, require, shown

MAX_BYTES = 200  # of the 255 that file systems take: endings come on top

_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_SEPARATORS = "/\\:"  # of any platform; on Windows a colon also parts a file from a hidden stream of it
_REFUSED = '<>"|?*'  # by Windows
_FORMULAS = "=+-@"


def name_fault(name: str) -> str | None:
    """Says why a name cannot stand in tables and spreadsheets; None if it can.

    >>> name_fault("prostate/uterus")
    >>> name_fault("=1+1")
    "begins with '=', as formulas of spreadsheets do"
    """
    if not name:
        return "is empty"
    if not name.isprintable():
        return "has characters that cannot be printed"
    if name[0] in _FORMULAS:
        return f"begins with {name[0]!r}, as formulas of spreadsheets do"
    return None


def file_name_fault(name: str) -> str | None:
    """Says why a name cannot be that of a file, on this or another platform; None if it can.

    >>> file_name_fault("amos_0001")
    >>> file_name_fault("../amos_0001")
    "has '/', which parts folders"
    """
    if fault := name_fault(name):
        return fault
    if separator := next((c for c in name if c in _SEPARATORS), None):
        return f"has {separator!r}, which parts folders"
    if refused := next((c for c in name if c in _REFUSED), None):
        return f"has {refused!r}, which no file on Windows has"
    if name.startswith("."):
        return "begins with a dot, as hidden files do"
    if name[0] == " " or name[-1] in " .":
        return "begins or ends with a space, or ends with a dot, which Windows drops"
    if _DEVICES.fullmatch(name):
        return "is a device on Windows"
    if (length := len(name.encode())) > MAX_BYTES:
        return f"takes {length} bytes, but {MAX_BYTES} at most leave room for endings"
    return None


def one_file(name: str) -> str:
    """Returns the same text for names that are one file on some platform: capitals and accents are told apart by few.

    >>> one_file("Scan_A") == one_file("scan_a"), one_file("é") == one_file("e\\u0301")
    (True, True)
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def read_alike(names: Sequence[str]) -> tuple[str, ...]:
    """Lists the names that are read as others of them: they are the same, or differ in capitals or spaces alone.

    >>> read_alike(("liver", "Liver", "left  kidney", "spleen", "spleen"))
    ('liver beside Liver', 'spleen more than once')
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", one_file(name)).split()), []).append(name)
    found = [list(dict.fromkeys(each)) for each in alike.values() if len(each) > 1]
    return tuple(" beside ".join(each) if len(each) > 1 else f"{each[0]} more than once" for each in found)


def repeated(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names that are there more than once, sorted.

    >>> repeated(("liver", "spleen", "liver"))
    ('liver',)
    """
    return tuple(sorted(name for name, count in Counter(names).items() if count > 1))


def refuse_repeated(
    names: Sequence[str], what: str, where: str, *, allowed: str, remedy: str, error: type[DstlibError] = DataError
) -> None:
    """Refuses names of which one is there more than once.

    Raises:
        DataError: One is; or an error of another class, ``error``.
    """
    twice = repeated(names)
    require(not twice, what, where, allowed=allowed, given=f"{few(twice)} more than once", remedy=remedy, error=error)


def refuse_name(name: str, what: str, where: str, *, fault: Callable[[str], str | None]) -> None:
    """Refuses a name that has a fault: :func:`name_fault`, or :func:`file_name_fault`.

    Raises:
        DataError: It has one.
    """
    if reason := fault(name):
        remedy = "Rename it: its files, and in dataset.json where that names it."
        allowed = "a name that can be printed" if fault is name_fault else "a name that a file can have everywhere"
        raise DataError.of(what, where, allowed=allowed, given=f"{shown(name)}, which {reason}", remedy=remedy)

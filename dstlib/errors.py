"""The exceptions of dstlib, and the one wording of them.

Every error that a user can cause is a :class:`DstlibError`, hence a ``ValueError``. A failed ``assert`` is
our own bug.
"""

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from reprlib import Repr
from typing import Self

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def printable(text: str) -> str:
    """Returns text with every character escaped that a terminal would not print but obey, but for ends of lines.

    >>> print(printable("liver\x1b[2J"))
    liver\\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """Returns a value as code shows it, shortened, and with nothing in it that a terminal would obey.

    >>> print(shown({"name": "liver\x1b[2J", "sizes": list(range(100))}))
    {'name': 'liver\\x1b[2J', 'sizes': [0, 1, 2, 3, 4, 5, ...]}
    """
    return _SHORT.repr(value)


class DstlibError(ValueError):
    """Something given to dstlib cannot be used; the message says what, where, and what to do.

    Whatever a file or a user put into it can be printed: control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))

    @classmethod
    def of(cls, what: str, where: str, *, allowed: str, given: object, remedy: str) -> Self:
        """Makes an error from its parts, which read as one sentence and a remedy.

        >>> raise SettingError.of("sparsity", "sparsify()", allowed="a number in [0, 1)", given=1.5, remedy="Pass 0.9.")
        Traceback (most recent call last):
        dstlib.errors.SettingError: sparsity of sparsify(): expected a number in [0, 1), got 1.5. Pass 0.9.
        """
        what, where, given = (
            str(part).replace("\n", "\\n") for part in (what, where, given)
        )  # a line of their own is ours
        return cls(f"{what} of {where}: expected {allowed}, got {given}. {remedy}")


class SettingError(DstlibError):
    """A setting lies outside what is allowed."""


class InputError(SettingError, RuntimeError):
    """A tensor does not fit the fast layer that it is given to; torch raises a ``RuntimeError`` of such."""


class SelectionError(DstlibError):
    """The weights that were asked for cannot be made sparse, or do not exist."""


class ScoreError(DstlibError):
    """A criterion returned scores by which units cannot be ordered."""


class StateError(DstlibError):
    """A saved state is damaged, or belongs to something else."""


class DataError(DstlibError):
    """A data set, an image or a label cannot be used."""


def require(
    holds: bool,
    what: str,
    where: str,
    *,
    allowed: str,
    given: object,
    remedy: str,
    error: type[DstlibError] = SettingError,
) -> None:
    """Checks a condition on what a user gave.

    The texts are made even where it holds: in what runs in every pass of a network, an ``if`` raises by hand.

    Raises:
        SettingError: It does not hold; or an error of another class, ``error``.

    >>> require(0 <= 1.5 < 1, "sparsity", "sparsify()", allowed="a number in [0, 1)", given=1.5, remedy="Pass 0.9.")
    Traceback (most recent call last):
    dstlib.errors.SettingError: sparsity of sparsify(): expected a number in [0, 1), got 1.5. Pass 0.9.
    """
    if not holds:
        raise error.of(what, where, allowed=allowed, given=given, remedy=remedy)


def similar(name: str, known: Collection[str]) -> str:
    """Lists the names that ``name`` may have meant, or else the first few known ones, as text.

    >>> similar("rigle", ["set", "rigl"])
    "'rigl'"
    """
    names = get_close_matches(name, known, n=3, cutoff=0.5) or list(known)[:5]
    return ", ".join(repr(n) for n in names) if names else "none"


def few(names: Sequence[str], *, most: int = 10, noun: str = "") -> str:
    """Lists names, so many at most, and says how many more there are, by a noun in the plural if they have one.

    >>> few(["liver", "spleen"]), few([f"scan_{number}" for number in range(1000)])[-27:]
    ('liver, spleen', 'scan_8, scan_9 and 990 more')
    >>> few(["stem", "body", "head"], most=1, noun="weights")
    'stem and 2 more weights'
    """
    told = ", ".join(names[:most])
    return told if len(names) <= most else f"{told} and {len(names) - most} more {noun}".rstrip()


def number_of(number: int, noun: str) -> str:
    """Counts things in words.

    >>> number_of(1, "scan"), number_of(0, "scan")
    ('1 scan', '0 scans')
    """
    return f"{number} {noun}" + "s" * (number != 1)

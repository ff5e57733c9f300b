"""How methods look in every figure: a colour, a marker and a line each, which also tell them apart in print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dstlib.plot import DISTINCT, plain

COLOURS = (*DISTINCT[::-1], "#000000")  # the dark ones first, as lines are thin
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "*", "d", "H")
_LINES = ("-", "--", "-.", ":")
_LETTER = 0.08  # inches of a headline's letter, about
_LABEL = 2.35  # inches of a legend's column, at most


@dataclass(frozen=True)
class Look:
    """What one method is drawn with."""

    colour: str
    marker: str
    line: str


def looks(number: int) -> tuple[Look, ...]:
    """Returns as many looks, no two alike; of up to seven methods no two share a colour.

    >>> looks(8)[7]
    Look(colour='#0072B2', marker='p', line='--')
    """
    each = zip(range(number), COLOURS * number, _MARKERS * number, strict=False)
    return tuple(Look(colour, marker, _LINES[(i // len(COLOURS)) % len(_LINES)]) for i, colour, marker in each)


def label(name: str, *, width: int = 22, most_lines: int = 2) -> str:
    """Returns a name as figures write it: over some lines where it is long, cut where it is too long even so.

    >>> label("E2ENet with DSFF, without the shift", width=20)
    'E2ENet with DSFF,\\nwithout the shift'
    """
    lines = wrap(name, width, max_lines=most_lines, placeholder=" …")
    return plain("\n".join(lines))


def headline(figure: Figure, text: str) -> None:
    """Writes a title over a figure, in as many lines as its width asks for."""
    most = int(figure.get_figwidth() / _LETTER)
    num_lines = math.ceil(len(text) / most)
    lines = wrap(text, min(most, len(text) // num_lines + 12))  # of about one length
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)


def legend(figure: Figure, names: Sequence[str], *, more: Sequence[Artist] = ()) -> None:
    """Draws below a figure which look is whose."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line, label=label(name, width=30))
        for name, look in zip(names, looks(len(names)), strict=True)
    ]
    below(figure, [*handles, *more])


def below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draws a legend below a figure, in as many columns as it has room for."""
    rows = num_rows(len(handles), figure.get_figwidth())
    columns = math.ceil(len(handles) / rows)  # rows of one length
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, columnspacing=1.2)


def num_rows(num_labels: int, width: float) -> int:
    """Returns how many rows a legend has below a figure of so many inches.

    >>> num_rows(4, 9.4), num_rows(4, 4.0)
    (1, 4)
    """
    return math.ceil(num_labels / max(1, int(width / _LABEL)))

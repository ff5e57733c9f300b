"""Text tables: of what is sparse in a model, and of anything else in rows."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dstlib.errors import number_of, printable

MOST_OF_A_KIND, MOST_KINDS = 10, 20  # lines that are told

# In what lines of a kind differ: quoted text, and words with a digit, or a separator of paths.
_PARTICULARS = re.compile(r"""(?:('[^']*'|"[^"]*"|\S*[\d/\\#]\S*)\s*)+""")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One weight of a summary; ``reason`` says why it is dense and is empty where it is sparse.

    ``num_active`` counts all that is not surely zero; ``note`` says what of that is not as planned.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    num_active: int
    num_total: int
    reason: str = ""
    note: str = ""

    @property
    def density(self) -> float:
        """Active entries over all entries; 1 where there are none."""
        return self.num_active / self.num_total if self.num_total else 1.0


@dataclass(frozen=True)
class Summary:
    """Every weight with two axes or more, sparse or dense and why; ``num_other`` counts all other entries.

    ``notes`` are lines that are told after the table.
    """

    rows: tuple[Row, ...]
    num_other: int
    title: str
    notes: tuple[str, ...] = ()

    @property
    def num_active(self) -> int:
        """Active entries of the sparse weights."""
        return sum(row.num_active for row in self.rows if not row.reason)

    @property
    def num_sparse(self) -> int:
        """All entries of the sparse weights."""
        return sum(row.num_total for row in self.rows if not row.reason)

    @property
    def density(self) -> float:
        """Active entries over all entries, of the sparse weights."""
        return self.num_active / self.num_sparse if self.num_sparse else 1.0

    @property
    def params(self) -> int:
        """Active entries of the whole model: what there is to train and to store."""
        return sum(row.num_active for row in self.rows) + self.num_other

    def totals(self) -> str:
        """Returns what the table comes to: a line on the sparse weights, one on the whole model."""
        num_sparse_rows = sum(not row.reason and row.num_total > 0 for row in self.rows)
        dense = [row for row in self.rows if row.reason]
        num_dense = sum(row.num_active for row in dense)
        num_all = sum(row.num_total for row in self.rows) + self.num_other
        sparse = (
            f"{number_of(num_sparse_rows, 'sparse weight')}: {self.num_active:,} of "
            f"{self.num_sparse:,} entries active (density {self.density:.4f}, sparsity {1 - self.density:.4f})"
        )
        whole = (
            f"whole model: {self.params:,} of {num_all:,} parameters: {self.num_active:,} in sparse weights, "
            f"{num_dense:,} in dense ones, {self.num_other:,} in biases, norms and other vectors"
        )
        return "\n".join([sparse, *_zeros_of(dense), whole])

    def __str__(self) -> str:
        cells = [("weight", "layer", "shape", "active", "density", "")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape))
            full = " (full)" if row.num_active == row.num_total else ""
            state = f"dense: {row.reason}" if row.reason else row.note or f"sparse{full}"
            cells.append((row.name, row.kind, shape, f"{row.num_active:,}", f"{row.density:.4f}", state))
        return "\n".join([self.title, *align(cells, left=(0, 1, 2, 5)), self.totals(), *self.notes])


def _zeros_of(dense: Iterable[Row]) -> Iterator[str]:
    """Says how sparse those of the dense weights are that hold zeros, as what branches were fused into does."""
    rows = [row for row in dense if row.num_active < row.num_total]
    num_active, num_total = sum(row.num_active for row in rows), sum(row.num_total for row in rows)
    if rows:
        yield (
            f"{number_of(len(rows), 'dense weight')} with zeros: {num_active:,} of {num_total:,} entries "
            f"are not zero (density {num_active / num_total:.4f})"
        )


def on_one_line(text: str) -> str:
    """Returns text as :func:`~dstlib.errors.printable` does, ends of lines escaped too.

    >>> on_one_line("a\\nb")
    'a\\\\nb'
    """
    return printable(text).replace("\n", "\\n")


def align(cells: Sequence[tuple[str, ...]], *, left: Sequence[int]) -> list[str]:
    """Aligns the columns of rows of text; the first row is the heading, the columns ``left`` are flush left.

    A cell stays on its line, and has nothing in it that a terminal would obey: names may come from files.

    >>> print("\\n".join(align([("organ", "Dice"), ("liver", "0.9")], left=(0,))))
    organ  Dice
    -----------
    liver   0.9
    """
    cells = [tuple(map(on_one_line, row)) for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    lines = [line.rstrip() for line in lines]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def abridge(lines: Sequence[str], names: Sequence[str] = (), *, whole: str = "") -> list[str]:
    """Returns the lines, but for those after the tenth of a kind, which are counted: a thousand are seldom read.

    Lines are of one kind where nothing but numbers, paths, quoted text and ``names`` differ: of each line, what it is
    about. ``whole`` says where all of them are.

    >>> names = [f"scan_{number}" for number in range(100)]
    >>> for line in abridge([f"{name}: is missing" for name in names], names, whole="--all lists them")[8:]:
    ...     print(line)
    scan_8: is missing
    scan_9: is missing
    and 90 more of this kind (--all lists them)
    """
    kinds = [_kind(line, name) for line, name in zip_longest(lines, names[: len(lines)], fillvalue="")]
    counts, where = Counter(kinds), f" ({whole})" if whole else ""
    num_told, told = dict.fromkeys(list(counts)[:MOST_KINDS], 0), []
    for line, kind in zip(lines, kinds, strict=True):
        if num_told.get(kind, MOST_OF_A_KIND) == MOST_OF_A_KIND:
            continue
        num_told[kind] += 1
        told.append(line)
        if num_told[kind] == MOST_OF_A_KIND < counts[kind]:
            told.append(f"and {counts[kind] - MOST_OF_A_KIND} more of this kind{where}")
    if num_other := sum(count for kind, count in counts.items() if kind not in num_told):
        told.append(f"and {num_other} more of {len(counts) - len(num_told)} other kinds{where}")
    return told


def _kind(line: str, name: str) -> str:
    """Returns what is the same in lines of a kind."""
    if name:
        line = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "#", line)
    return _PARTICULARS.sub("# ", line).strip()

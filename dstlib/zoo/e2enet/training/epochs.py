"""What a run tells of its epochs, read back from its tables: ``metrics.csv``, and ``flows.csv`` of a sparse E2ENet."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from dstlib.errors import StateError, few, require, shown
from dstlib.files import read_whole
from dstlib.zoo.e2enet.training.records import FLOWS, METRICS

FlowCounts = dict[str, dict[str, int]]  # by node, stage1_level1 and so on, and flow

MAX_BYTES = 16 * 2**20  # of a table
_REMEDY = "Restore the file, or train the run anew."
# whether a column of metrics.csv must be there: some runs are not validated, and few search an architecture
_COLUMNS = {"epoch": True, "iteration": True, "learning_rate": True, "loss": True, "val_dice": False, "memory": False}

Number = TypeVar("Number", int, float)


def metrics_of(run: Path, *, num_epochs: int) -> tuple[dict[str, float], ...]:
    """Reads the metrics of each epoch: epoch, iteration, learning_rate, loss and, where validated, val_dice.

    Raises:
        StateError: There is no such file, or it is no table of these epochs.
    """
    rows = _read(run, METRICS, _COLUMNS, _fraction, num_epochs=num_epochs)
    if rows[0]["epoch"] != 1:
        given = rows[0]["epoch"]
        raise StateError.of("line 2", _where(run, METRICS), allowed="epoch 1", given=given, remedy=_REMEDY)
    return tuple(rows)


def flows_of(run: Path, nodes: Mapping[str, Iterable[str]], *, num_epochs: int) -> dict[int, FlowCounts]:
    """Reads how many connections each flow brought into each fusion node, by epoch.

    ``nodes`` are those of the network, with the names of their flows. Epoch 0 stands for the first masks; of a run that
    an earlier release began, the first epochs are missing.

    Raises:
        StateError: There is no such file, or it is no table of these nodes and epochs.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "flows.csv").write_text("epoch,stage1_level1.forward,stage1_level1.upward\\n1,3,1\\n")
    ...     flows_of(Path(folder), {"stage1_level1": ("forward", "upward")}, num_epochs=1)
    {1: {'stage1_level1': {'forward': 3, 'upward': 1}}}
    """
    columns = {"epoch": True, **{f"{node}.{flow}": True for node, flows in nodes.items() for flow in flows}}
    rows = _read(run, FLOWS, columns, _count, num_epochs=num_epochs)
    return {
        row["epoch"]: {node: {flow: row[f"{node}.{flow}"] for flow in flows} for node, flows in nodes.items()}
        for row in rows
    }


def _read(
    run: Path, name: str, columns: Mapping[str, bool], parse: Callable[[str], Number], *, num_epochs: int
) -> list[dict[str, Number]]:
    """Reads a table of numbers, an epoch after the other to the last; ``columns`` says which of them must be there."""
    where = _where(run, name)
    try:
        header, *lines = read_whole(run / name, max_bytes=MAX_BYTES).decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        given = getattr(error, "strerror", None) or str(error)
        raise StateError.of("content", where, allowed="a table in UTF-8", given=given, remedy=_REMEDY) from error
    names: list[str] = header.split(",")
    required = {column for column, must in columns.items() if must}
    if len(names) != len({*names}) or not required <= {*names} <= columns.keys():
        allowed = f"the columns {few([*columns])}"
        raise StateError.of("line 1", where, allowed=allowed, given=shown(header), remedy=_REMEDY)
    rows: list[dict[str, Number]] = []
    for number, line in enumerate(lines, start=2):
        is_end = number == len(lines) + 1  # nothing is after the last newline, if the file is whole
        if is_end and not line:
            break
        row = _row(names, line, parse)
        if is_end or row is None or (rows and row["epoch"] != rows[-1]["epoch"] + 1):
            allowed = f"a whole line of {len(names)} numbers, of the epoch after that of the line before"
            raise StateError.of(f"line {number}", where, allowed=allowed, given=shown(line), remedy=_REMEDY)
        rows.append(row)
    last, allowed = rows[-1]["epoch"] if rows else None, f"epoch {num_epochs}"
    require(last == num_epochs, "last line", where, allowed=allowed, given=last, remedy=_REMEDY, error=StateError)
    return rows


def _row(names: Sequence[str], line: str, parse: Callable[[str], Number]) -> dict[str, Number] | None:
    """Returns the numbers of a line by their names; None where it has others."""
    try:
        return dict(zip(names, map(parse, line.split(",")), strict=True))
    except ValueError:
        return None


def _where(run: Path, name: str) -> str:
    return f"{name} of run {run}"


def _count(cell: str) -> int:
    count = int(cell)
    if count < 0:
        raise ValueError
    return count


def _fraction(cell: str) -> float:
    """Returns a finite number, or NaN, as a validation has it whose patches show no class."""
    number = float(cell)
    if math.isinf(number):
        raise ValueError
    return number

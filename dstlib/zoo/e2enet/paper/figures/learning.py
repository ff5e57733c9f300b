"""Figure 12: how methods learn beside each other: the loss they train with, and the Dice where it was validated."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dstlib.errors import DataError
from dstlib.plot import drawn
from dstlib.zoo.e2enet.paper.figures.style import Look, legend, looks, num_rows

Metrics = Sequence[Mapping[str, float]]  # a row per epoch: epoch, loss, and val_dice where it was validated


def learning_curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[Metrics]]]) -> None:
    """Draws loss and validated Dice over the epochs, a column per panel, a curve per method: the mean of its runs.

    Of several runs, folds or seeds, the standard error is shaded. ``panels`` are by title, methods by name; one that
    is in two panels looks alike in both.

    Raises:
        DataError: A method has no run, or runs of other lengths.
    """
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    look = dict(zip(names, looks(len(names)), strict=True))
    runs = [run for methods in panels.values() for of in methods.values() for run in of]
    measured = {"loss": "training loss", "val_dice": "validated Dice"}
    if not any("val_dice" in run[0] for run in runs if run):
        del measured["val_dice"]
    width = 1.0 + 4.3 * len(panels)
    size = (width, 0.6 + 2.3 * len(measured) + 0.3 * num_rows(len(names), width))
    with drawn(path, size=size) as figure:
        grid = figure.subplots(len(measured), len(panels), sharex="col", sharey="row", squeeze=False)
        for column, (title, methods) in zip(grid.T, panels.items(), strict=True):
            for name, of in methods.items():
                epochs = _epochs(name, of)
                for axes, what in zip(column, measured, strict=True):
                    if what in of[0][0]:
                        values = np.array([[row[what] for row in run] for run in of], np.float64)
                        _draw_curve(axes, epochs, values, look[name], name)
            column[0].set_title(title, parse_math=False)
            column[-1].set_xlabel("epoch")
            column[-1].margins(x=0.01)
            column[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # of one epoch, too
        for row, label in zip(grid, measured.values(), strict=True):
            row[0].set_ylabel(label)
            row[0].set_ylim(bottom=0)
        legend(figure, names)


def _epochs(name: str, runs: Sequence[Metrics]) -> NDArray[np.float64]:
    lengths = sorted({len(run) for run in runs})
    if len(lengths) != 1 or lengths == [0]:
        given = f"runs of {', '.join(map(str, lengths))} epochs" if lengths else "no run"
        allowed, remedy = (
            "finished runs of as many epochs",
            "Leave the others out: --folds and --seeds name those to take.",
        )
        raise DataError.of("runs", f"figure 12, {name}", allowed=allowed, given=given, remedy=remedy)
    return np.array([row["epoch"] for row in runs[0]], np.float64)


def _draw_curve(axes: Axes, epochs: NDArray[np.float64], values: NDArray[np.float64], look: Look, name: str) -> None:
    mean, every = values.mean(axis=0), max(1, len(epochs) // 8)
    axes.plot(
        epochs,
        mean,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markevery=every,
        markersize=4,
        gid=name,
    )
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / len(values) ** 0.5
        axes.fill_between(epochs, mean - error, mean + error, color=look.colour, alpha=0.18, linewidth=0)

"""Figures 13 to 15: how large each structure is, how well each method finds it, and how far that is from a reference.

Shapes: N cases, K classes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from dstlib.errors import DataError, few
from dstlib.plot import FAINT, INK, drawn
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, mean_without_nan
from dstlib.zoo.e2enet.paper.figures.style import Look, headline, label, legend, looks, num_rows


def volumes_and_dice(path: Path, scores: Mapping[str, Evaluation], *, reference: str, title: str) -> None:
    """Draws the volume of each class, the Dice of each method and its difference to the reference; the largest first.

    Bars and points are means over the cases, and lines to both sides one standard error; differences are paired by
    case. A class that a case does not have is left out there.

    Raises:
        DataError: The methods were scored on other cases or classes, or the reference is none of them.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Figures 13 to 15.
    """
    _refuse_misfits(scores, reference)
    first, others = scores[reference], [name for name in scores if name != reference]
    volume_NK = np.where(first.volumes[..., 0] > 0, first.volumes[..., 0], np.nan)
    volume, volume_error = mean_and_error(volume_NK)
    order = np.argsort(-np.nan_to_num(volume), kind="stable")
    look = dict(zip(scores, looks(len(scores)), strict=True))
    row = max(0.4, 0.06 * len(scores) + 0.12)  # inches of a class
    with drawn(path, size=(10.5, 1.5 + row * len(order) + 0.3 * num_rows(len(scores), 10.5))) as figure:
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(1.0, 1.4, 1.4))
        places = np.arange(len(order))
        left.errorbar(volume[order], places, xerr=volume_error[order], fmt="o", color=INK, markersize=6, label="volume")
        left.hlines(places, 0, 1, transform=left.get_yaxis_transform(), color=FAINT, linestyle=":", zorder=0)
        span = np.nanmax(volume, initial=0) / np.nanmin(volume, initial=np.inf)
        if span > 10:
            left.set_xscale("log")
            left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,), numticks=5))
            left.xaxis.set_minor_formatter(NullFormatter())
        else:
            left.xaxis.set_major_locator(MaxNLocator(4))
        left.xaxis.set_major_formatter("{x:g}")
        left.set_title("Volume in the label, ml")
        left.set_yticks(places, [label(first.classes[k]) for k in order], fontsize=9)
        left.invert_yaxis()
        _draw_points(middle, {name: of.dice[:, order] for name, of in scores.items()}, look, len(scores))
        middle.set_title("Dice")
        differences = {name: 100 * (scores[name].dice - first.dice)[:, order] for name in others}
        right.axvline(0, color="#555555", linewidth=1)
        _draw_points(right, differences, look, len(others))
        right.set_title(label(f"Dice minus that of {reference}, points", width=32))
        for axes in (middle, right):
            axes.hlines(places[:-1] + 0.5, 0, 1, transform=axes.get_yaxis_transform(), color=FAINT, linewidth=0.8)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        left.set_ylim(len(order) - 0.5, -0.5)
        headline(figure, title)
        legend(figure, list(scores))


def mean_and_error(values_NK: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the mean over the cases that have a value, and its standard error; NaN where too few have one.

    >>> mean, error = mean_and_error(np.array([[1.0, 5.0], [3.0, np.nan]]))
    >>> mean.tolist(), error.tolist()
    ([2.0, 5.0], [1.0, nan])
    """
    counts, mean = np.isfinite(values_NK).sum(axis=0), mean_without_nan(values_NK, axis=0)
    squares = np.nansum((values_NK - mean) ** 2, axis=0)
    nan = np.full(counts.shape, np.nan)
    variance = np.divide(squares, (counts - 1) * counts, out=nan, where=counts > 1)
    return mean, np.sqrt(variance)


def _draw_points(axes: Axes, values: Mapping[str, NDArray[np.float64]], look: Mapping[str, Look], number: int) -> None:
    """Draws a point per class and method, methods from top to bottom within the row of a class."""
    for i, (name, values_NK) in enumerate(values.items()):
        mean, error = mean_and_error(values_NK)
        offset = 0.76 * ((i + 0.5) / number - 0.5)
        of = look[name]
        axes.errorbar(
            mean,
            np.arange(len(mean)) + offset,
            xerr=error,
            fmt=of.marker,
            color=of.colour,
            markersize=3.5 if number > 6 else 4.5,
            elinewidth=1,
            label=name,
        )


def _refuse_misfits(scores: Mapping[str, Evaluation], reference: str) -> None:
    where = "figures 13 to 15"
    if reference not in scores:
        remedy = f"Add {reference} to --rows."
        raise DataError.of("rows", where, allowed=f"{reference} among them", given=", ".join(scores), remedy=remedy)
    if len(scores) < 2:
        remedy = "Add another to --rows."
        raise DataError.of("rows", where, allowed=f"one beside {reference}", given="none", remedy=remedy)
    first = scores[reference]
    for name, other in scores.items():
        for what, ours, theirs in (("classes", first.classes, other.classes), ("cases", first.cases, other.cases)):
            if ours != theirs:
                allowed = f"those of {reference}: {few(ours)}"
                remedy = "Compare runs on the same data set and folds."
                raise DataError.of(what, f"{where}, {name}", allowed=allowed, given=few(theirs), remedy=remedy)

"""Figure 7: Nemenyi's critical-distance diagram of the average ranks of methods over cases."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from dstlib.plot import ACCENT, INK, drawn
from dstlib.zoo.e2enet.evaluation.pt_score import NemenyiTest
from dstlib.zoo.e2enet.paper.figures.style import headline, label

_ROW, _BAR = 0.4, 0.17  # inches from label to label, and from bar to bar


def critical_distance(path: Path, names: Sequence[str], test: NemenyiTest, *, title: str) -> None:
    """Draws the average rank of each method on one line, the best on the left, and a bar over those that do not differ.

    The bar above the line is the critical distance, from which on two ranks differ.

    Reference: Demšar, *Statistical comparisons of classifiers over multiple data sets* (JMLR 2006), section 3.2.4.
    """
    order = np.argsort(test.average, kind="stable").tolist()
    num_left = (len(names) + 1) // 2
    overhang = 0.008 * len(names)  # of a bar beyond the ranks that it joins
    ends = [(test.average[g[0]] - overhang, test.average[g[-1]] + overhang) for g in test.groups]
    levels = _levels(ends, gap=2 * overhang)
    num_bars = max(levels, default=-1) + 1
    below = 0.25 + _BAR * num_bars  # inches under the line, to the first label
    with drawn(path, size=(8.2, 1.35 + below + _ROW * num_left)) as figure:
        axes = figure.subplots()
        _draw_ranks(axes, len(names), height=below + _ROW * num_left)
        _draw_distance(axes, test.critical_distance)
        for place, method in enumerate(order):
            is_left = place < num_left
            row = place if is_left else len(names) - 1 - place
            rank = float(test.average[method])
            _draw_method(axes, label(names[method], width=26), rank, -(below + _ROW * (row + 0.4)), is_left=is_left)
        for (left, right), level in zip(ends, levels, strict=True):
            y = -(0.2 + _BAR * level)
            axes.plot([left, right], [y, y], color=INK, linewidth=4, solid_capstyle="butt", gid="group")
        headline(figure, title)


def _levels(ends: Iterable[tuple[float, float]], *, gap: float) -> list[int]:
    """Returns at which level each bar is drawn, so that none touches another; bars come by their left ends.

    >>> _levels([(1.0, 2.0), (1.5, 3.0), (2.5, 4.0)], gap=0.1)
    [0, 1, 0]
    """
    taken: list[float] = []  # by level, where the last bar ends
    levels = []
    for left, right in ends:
        level = next((i for i, end in enumerate(taken) if end + gap < left), len(taken))
        taken[level : level + 1] = [right]
        levels.append(level)
    return levels


def _draw_ranks(axes: Axes, number: int, *, height: float) -> None:
    """Draws the line of ranks, from 1 to the number of methods; y is in inches below it."""
    axes.plot([1, number], [0, 0], color="#555555", linewidth=1.2)
    for rank in range(1, number + 1):
        axes.plot([rank, rank], [0, 0.09], color="#555555", linewidth=1.2)
        axes.text(rank, 0.13, f"{rank}", ha="center", va="bottom", fontsize=9)
    axes.set_xlim(1 - 0.08 * number, number + 0.08 * number)  # room for a number at each end
    axes.set_ylim(-height, 0.85)
    axes.set_axis_off()


def _draw_distance(axes: Axes, distance: float) -> None:
    left, right = axes.get_xlim()
    shown = min(1 + distance, right)  # a distance beyond all ranks ends with them
    axes.plot([1, shown], [0.5, 0.5], color=ACCENT, linewidth=1.5, gid="distance")
    for end in (1.0, shown) if shown == 1 + distance else (1.0,):
        axes.plot([end, end], [0.44, 0.56], color=ACCENT, linewidth=1.5)
    if shown < 1 + distance:
        axes.plot([shown], [0.5], marker=">", color=ACCENT, markersize=7, clip_on=False, gid="beyond")
    axes.text(1, 0.6, f"critical distance {distance:.2f}", color=ACCENT, fontsize=9, va="bottom")
    axes.set_xlim(left, right)


def _draw_method(axes: Axes, name: str, rank: float, y: float, *, is_left: bool) -> None:
    """Draws a line from the rank down and out to the name."""
    edge = axes.get_xlim()[0 if is_left else 1]
    axes.plot([rank, rank, edge], [0, y, y], color="#555555", linewidth=1)
    axes.plot([rank], [0], "o", color=INK, markersize=4)
    outside, inside = ("right", "left") if is_left else ("left", "right")
    axes.text(edge, y, f" {name} ".replace("\n", " \n "), ha=outside, va="center", fontsize=9, linespacing=0.95)
    axes.text(edge, y + 0.03, f" {rank:.2f} ", ha=inside, va="bottom", fontsize=8)

"""Figure 8: the PT score of methods as accuracy weighs more and more against cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from dstlib.errors import DataError
from dstlib.plot import FAINT, drawn
from dstlib.zoo.e2enet.evaluation.pt_score import Row, pt_scores
from dstlib.zoo.e2enet.paper.figures.style import legend, looks, num_rows

RATIOS = tuple(np.geomspace(1, 20, 40).tolist())  # of α1 to α2; the paper's own is 2, its figure's last 20
PAPER_RATIO = 2.0
MARKS = (1.0, PAPER_RATIO, 5.0, 10.0, 20.0)


def trade_off(path: Path, panels: Mapping[str, Sequence[Row]]) -> None:
    """Draws a curve per row over α1 / α2, with α1 = 1, in panels for the same axes: these runs, and what was published.

    The extremes of the score are taken over the rows of a panel. Rows of one name look alike in all.

    Raises:
        DataError: Fewer than two rows of a panel have a score.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Figure 8.
    """
    panels = {title: _scored(rows, title) for title, rows in panels.items()}
    names = list(dict.fromkeys(row.name for rows in panels.values() for row in rows))
    look = dict(zip(names, looks(len(names)), strict=True))
    width = 1.0 + 4.4 * len(panels)
    with drawn(path, size=(width, 3.6 + 0.3 * num_rows(len(names) + 1, width))) as figure:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
            scores = np.array([pt_scores(rows, alpha=1 / ratio) for ratio in RATIOS], np.float64)
            at_marks = np.array([pt_scores(rows, alpha=1 / ratio) for ratio in MARKS], np.float64)
            axes.axvline(PAPER_RATIO, color=FAINT, linewidth=1.5, zorder=0)
            for i, row in enumerate(rows):
                of = look[row.name]
                axes.plot(RATIOS, scores[:, i], color=of.colour, linestyle=of.line, linewidth=1.6, gid=row.name)
                axes.plot(MARKS, at_marks[:, i], of.marker, color=of.colour, markersize=5, clip_on=False)
            axes.set_xscale("log")
            axes.set_xticks(MARKS, [f"{ratio:g}" for ratio in MARKS])
            axes.minorticks_off()
            axes.set_xlim(RATIOS[0], RATIOS[-1])
            axes.set_title(title)
            axes.set_xlabel("α1 / α2: weight of accuracy over cost (α1 = 1)")
        all_axes[0].set_ylabel("PT score")
        mark = Line2D([], [], color=FAINT, linewidth=1.5, label="α1 = 1, α2 = 1/2: the paper's")
        legend(figure, names, more=[mark])


def _scored(rows: Sequence[Row], title: str) -> list[Row]:
    """Returns the rows that have a score."""
    scored = [row for row, score in zip(rows, pt_scores(rows), strict=True) if score is not None]
    if len(scored) < 2:
        without = ", ".join(row.name for row in rows if row not in scored)
        given = f"{len(scored)}" + (f"; without: {without}" if without else "")
        allowed, remedy = (
            "two or more rows with mDice, parameters and FLOPs",
            "Finish more rows, or name others by --rows.",
        )
        raise DataError.of("rows", f"figure 8, {title}", allowed=allowed, given=given, remedy=remedy)
    return scored

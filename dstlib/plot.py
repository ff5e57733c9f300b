"""Figures of what happened to the masks of a run, from its :class:`dstlib.history.History`.

Each function returns a matplotlib figure, which needs no display, and writes it if given a path, whole or not at
all. matplotlib comes with the extra ``viz`` and is loaded when the first figure is drawn.

    from dstlib import plot
    plot.layers(history, "density.png")
    plot.exchange(history, "exchange.pdf")
    plot.dead_channels(history, "dead.png")

Shapes: L layers, T steps with a mask update, that of the attachment first.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import SettingError, require
from dstlib.files import write_whole
from dstlib.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "legend.frameon": False,
    "savefig.dpi": 150,
}
# Six of Okabe and Ito's colours, told apart with any colour vision; their yellow is faint on paper.
DISTINCT = ("#D55E00", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#0072B2")
INK, ACCENT, FAINT = "#0b4f6c", "#d1495b", "#d9d9d9"
DEAD = ("#f2f2f2", "#d1495b", "#3d0a14")  # none, some, most
SHARES = {
    "density": "Density: active entries over all",
    "explored_share": "Explored share: entries active at some time over all",
    "churn": "Churn: share of the active entries exchanged at an update",
    "overlap": "Overlap with the mask before: share of its entries still active",
    "jaccard": "Jaccard index with the mask before",
    "first_overlap": "Overlap with the first mask: share of its entries still active",
}
_ROUND = [digit * 10.0**power for power in range(-6, 0) for digit in (1, 2, 5)] + [1.0]
_MOST_LABELS = 64  # rows with a name of their own; of more layers, every second or third has one


def layers(history: History, path: str | os.PathLike[str] | None = None, *, share: str = "density") -> "Figure":
    """Draws one of the shares of ``History.arrays`` as a heat map, layers × steps, all layers together above it.

    Raises:
        SettingError: There is no such share, or no matplotlib, or it does not write this file format.
    """
    remedy = "They are described at History.arrays."
    require(share in SHARES, "share", "plot.layers()", allowed=", ".join(SHARES), given=repr(share), remedy=remedy)
    a = history.arrays()
    edges, values, start = _edges(history, a), a[share], _first_of(share, a)
    num_layers = len(values)
    with drawn(path, size=(9, 2.4 + _height(num_layers))) as figure:
        above, map_ = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, _height(num_layers)))
        above.stairs(a[f"total_{share}"][start:], edges[start:], baseline=None, color=INK, linewidth=1.8)
        above.set_title(SHARES[share])
        above.set_ylabel("all layers")
        above.set_ylim(0, 1.12 * max(a[f"total_{share}"].max(), 1e-9))
        _mark_last(above, edges[-1], a[f"total_{share}"][-1])
        log = share == "density" and values[values > 0].min(initial=1.0) < 0.1
        mesh = _heat(map_, edges[start:], values[:, start:], a["name"], log=log)
        bar = figure.colorbar(mesh, ax=[above, map_], pad=0.02, aspect=30, format="%g")
        if log:
            bar.set_ticks([t for t in _ROUND if t >= mesh.norm.vmin])
            bar.minorticks_off()
        if num_layers <= _MOST_LABELS:
            for row, value in enumerate(values[:, -1]):
                at = (1.01, row)
                map_.annotate(f"{value:.3g}", at, xycoords=map_.get_yaxis_transform(), va="center", fontsize=7)
        map_.set_xlabel("optimizer step")
    return figure


def exchange(history: History, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draws churn, overlaps and explored share against the step: all layers together, and how far layers differ.

    Raises:
        SettingError: There is no matplotlib, or it does not write this file format.
    """
    a = history.arrays()
    step = a["step"]
    with drawn(path, size=(8, 7)) as figure:
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        for share, panel, colour, label in (
            ("explored_share", top, INK, None),
            ("churn", middle, INK, None),
            ("overlap", bottom, INK, "with the mask before"),
            ("first_overlap", bottom, ACCENT, "with the first mask"),
        ):
            start, total = _first_of(share, a), a[f"total_{share}"]
            low, high = np.quantile(a[share][:, start:], (0.1, 0.9), axis=0)
            panel.fill_between(step[start:], low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(step[start:], total[start:], color=colour, linewidth=1.8, label=label)
            _mark_last(panel, step[-1], total[-1], colour=colour)
        top.set_title("Explored share of the entries, all layers together (shaded: 10 to 90 % of the layers)")
        middle.set_title("Churn: share of the active entries exchanged at an update")
        bottom.set_title("Overlap: share of the entries of an earlier mask still active")
        bottom.legend(loc="best")
        bottom.set_xlabel("optimizer step")
        for panel in (top, bottom):
            panel.set_ylim(0, 1.04)
        middle.set_ylim(0, 1.1 * middle.get_ylim()[1])
    return figure


def dead_channels(history: History, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draws the shares of outputs without an active input, and of inputs that no output reads, layers × steps.

    Raises:
        SettingError: There is no matplotlib, or it does not write this file format.
    """
    a = history.arrays()
    dead = {side: a[f"dead_{side}"] / a[f"num_{side}"][:, None] for side in ("outputs", "inputs")}
    most = max(float(values.max()) for values in dead.values())
    with drawn(path, size=(10.5, 1.3 + _height(len(a["name"])))) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        titles = ("Outputs without an active input", "Inputs that no output reads")
        for panel, title, (side, values) in zip(panels, titles, dead.items(), strict=True):
            mesh = _heat(panel, _edges(history, a), values, a["name"], colours=DEAD, limits=(0.0, most or 1.0))
            num_now, num_all = a[f"dead_{side}"][:, -1].sum(), a[f"num_{side}"].sum()
            panel.set_title(f"{title}: {num_now:,} of {num_all:,} now", fontsize=10)
            panel.set_xlabel("optimizer step")
        figure.colorbar(mesh, ax=panels, pad=0.02, aspect=30, label="share of the layer's channels")
    return figure


def _height(num_layers: int) -> float:
    """Returns the inches of a heat map: 0.17 a row until a page is full."""
    return min(max(0.17 * num_layers, 1.6), 11.0)


def _first_of(share: str, a: Mapping[str, NDArray[Any]]) -> int:
    """Returns the first column that says something: at attachment there is no mask before to compare with."""
    return int(share in ("churn", "overlap", "jaccard") and len(a["step"]) > 1)


def _edges(history: History, a: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Returns where the columns of a heat map begin, and where the last one ends: (T + 1,)."""
    step = a["step"]
    usual = int(np.median(np.diff(step))) if len(step) > 1 else 1
    return np.append(step, max(history.sparsifier.step, step[-1] + max(usual // 4, 1)))


def _heat(
    axes: "Axes",
    edges: NDArray[Any],
    values: NDArray[Any],
    names: NDArray[Any],
    *,
    log: bool = False,
    colours: str | Sequence[str] = "viridis",
    limits: tuple[float, float] | None = None,
) -> Any:
    """Draws a heat map: rows are layers, the first on top; columns last from one update to the next."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    map_ = colours if isinstance(colours, str) else LinearSegmentedColormap.from_list("shades", colours)
    low, high = limits or (float(values.min(initial=1.0)), float(values.max(initial=0.0)))
    norm = Normalize(low, high if high > low else low + 1e-9)
    if log:
        norm = LogNorm(float(values[values > 0].min()), 1.0, clip=True)
    rows = np.arange(len(values) + 1) - 0.5
    mesh = axes.pcolormesh(edges, rows, values, norm=norm, cmap=map_, rasterized=True)
    axes.set_ylim(rows[-1], rows[0])
    every = -(-len(values) // _MOST_LABELS)
    shown = range(0, len(values), every)
    axes.set_yticks(list(shown), [_short(names[row]) for row in shown], fontsize=7)
    axes.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return mesh


def _short(name: str) -> str:
    """Shortens a layer's name: without ".weight", and without its middle if it is long; a dollar stays one."""
    name = name.removesuffix(".weight") or name
    name = name if len(name) <= 36 else f"{name[:14]}…{name[-21:]}"
    return plain(name)


def plain(name: str) -> str:
    """Returns a name as matplotlib is to be given it: a dollar stays one, and begins no formula.

    >>> plain("5 $")
    '5 \\\\$'
    """
    return name.replace("$", r"\$")


def _mark_last(axes: "Axes", x: float, y: float, *, colour: str = INK) -> None:
    """Writes the last value beside the end of a line."""
    axes.annotate(f"{y:.3f}", (x, y), (5, 0), textcoords="offset points", color=colour, va="center", fontsize=9)
    axes.margins(x=0)


@contextmanager
def drawn(path: str | os.PathLike[str] | None, *, size: tuple[float, float]) -> Iterator["Figure"]:
    """Opens a figure to draw into, in the house's style, and writes it at the end.

    Raises:
        SettingError: matplotlib is not installed, or does not write files of the kind that the path names.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        allowed = "an installed package"
        remedy = 'Install it with the extra: pip install "dstlib[viz]".'
        raise SettingError.of("matplotlib", "dstlib.plot", allowed=allowed, given=error, remedy=remedy) from error
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        if path is not None:
            _write(figure, Path(path))


def _write(figure: "Figure", path: Path) -> None:
    kind, kinds = path.suffix[1:].lower(), figure.canvas.get_supported_filetypes()
    remedy = "Name it density.png, say."
    require(kind in kinds, "path", "a figure", allowed=f"*.{', *.'.join(kinds)}", given=path, remedy=remedy)
    content = BytesIO()
    figure.savefig(content, format=kind)
    write_whole(path, content.getbuffer())

"""The pictures of a run: how it learned, what it predicts, and where the connections of the fusion went.

Shapes: K foreground classes, D, H, W depth, height, width in voxels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from dstlib.layers.blocks import FusionNode
from dstlib.plot import ACCENT, DISTINCT, FAINT, INK, drawn
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.evaluation.slices import (
    OPPOSITE,
    View,
    bar_length,
    busiest_slice,
    classes_on_top,
    usual_view,
)
from dstlib.zoo.e2enet.network import E2ENet, flow_counts

FLOWS = {"forward": "#0b4f6c", "upward": "#edae49", "downward": "#66a182"}
ON_FLOW = {"forward": "white", "upward": "#222222", "downward": "#222222"}  # readable on each
PARTS = {  # of a fusion node, and how the density of each is shown
    "upward": ("up-convolution", "#b8b8b8"),
    "units.0.conv": ("first convolution", "#7d7d7d"),
    "units.1.conv": ("second convolution", "#444444"),
}
OUTLINED = [withStroke(linewidth=4, foreground="black")]  # white on black is seen on dark and on bright pictures
MOST_MARKS = 60  # points of a curve that are marked; more would be a thick line
MAX_TALL = 7.0  # inches of a picture: one that is long and narrow takes no more


def learning_curve(
    path: Path, metrics: Sequence[Mapping[str, float]], updates: Sequence[Mapping[str, int]], *, title: str = ""
) -> None:
    """Draws the loss of each epoch, the Dice where it was validated, and of each mask update the share that grew.

    ``title`` stands over all panels.
    """
    epochs, marks = [float(m["iteration"]) for m in metrics], [float(u["iteration"]) for u in updates]
    curves = [("Training loss, mean of each epoch", "Dice + cross-entropy", epochs, [m["loss"] for m in metrics], INK)]
    if "val_dice" in metrics[0]:
        told, dice = "Dice over patches of the held-out cases", [m["val_dice"] for m in metrics]
        curves.append((told, "mean of the classes", epochs, dice, FLOWS["downward"]))
    if updates:
        told = "Share of the active connections that grew at each mask update (grey lines)"
        curves.append((told, "percent", marks, [100 * u["grown"] / u["active"] for u in updates], ACCENT))
    with drawn(path, size=(7.5, 0.9 + 2.2 * len(curves))) as figure:
        panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
        for panel, (told, label, x, y, colour) in zip(panels, curves, strict=True):
            panel.vlines(marks, 0, 1, transform=panel.get_xaxis_transform(), color=FAINT, linewidth=0.8, zorder=0)
            panel.plot(x, y, "-" if len(x) > MOST_MARKS else "o-", color=colour, markersize=3.5)
            panel.set_xlim(left=0)
            panel.set_ylim(0, 1.08 * max((value for value in y if np.isfinite(value)), default=0) or 1)
            panel.set_title(told)
            panel.set_ylabel(label)
        if title:
            figure.suptitle(title, fontsize=11, parse_math=False)
        panels[-1].set_xlabel("iteration")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))


def slice_comparison(
    path: Path, case: Case, prediction: NDArray[np.uint8], labels: Labels, dice: Mapping[str, float]
) -> None:
    """Draws the slice with the most classes: the image, the label on it, the prediction on it.

    Of several channels it is the first one. Letters say where the patient's sides are, a bar how long some millimetres.
    ``dice`` of each class, of the whole volume, goes into the legend. Shapes: prediction (D, H, W).
    """
    view, colours = usual_view(case.orientation, case.spacing), class_colours(len(dice))
    label, prediction = (classes_on_top(volume, labels) for volume in (case.label, prediction))
    index = busiest_slice(label if label.any() else prediction, view.axis)
    picture = view.of(case.image[0], index)
    aspect = view.spacing[0] / view.spacing[1]
    tall = min(10.5 / 3 * aspect * picture.shape[0] / picture.shape[1], MAX_TALL)
    with drawn(path, size=(10.5, tall + 0.6 + 0.22 * -(-len(dice) // 5))) as figure:
        volumes = {"Image": None, "Label": view.of(label, index), "Prediction": view.of(prediction, index)}
        for panel, (title, volume) in zip(figure.subplots(1, 3), volumes.items(), strict=True):
            show_slice(panel, view, picture, volume, colours)
            panel.set_title(title)
        handles = [
            Patch(color=colours(i), label=f"{name} {value:.2f}" if np.isfinite(value) else f"{name} (absent)")
            for i, (name, value) in enumerate(dice.items())
        ]
        place = f"{view.name} slice {index + 1} of {label.shape[view.axis]}"
        title = f"{case.name}, {place}; with the Dice of the whole volume"
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=5, title=title, fontsize=9)
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_parse_math(False)  # a dollar in a name is a dollar


def show_slice(
    panel: Axes, view: View, picture: NDArray[Any], classes: NDArray[np.uint8] | None, colours: ListedColormap
) -> None:
    """Draws a slice of an image, the classes on it if any, its sides and a scale bar; all lie as the view has it."""
    low, high = np.percentile(picture, (1, 99))
    aspect = view.spacing[0] / view.spacing[1]
    panel.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    if classes is not None:
        shown, last = np.ma.masked_equal(classes, 0), colours.N + 0.5
        panel.imshow(shown, colours, aspect=aspect, interpolation="nearest", alpha=0.5, vmin=0.5, vmax=last)
    panel.set_axis_off()
    mark_sides(panel, view)
    mark_scale(panel, view)


def mark_sides(panel: Axes, view: View) -> None:
    """Writes at each edge of a picture which side of the patient lies there."""
    for letter, x, y in (
        (view.left, 0.03, 0.5),
        (OPPOSITE[view.left], 0.97, 0.5),
        (view.top, 0.5, 0.96),
        (OPPOSITE[view.top], 0.5, 0.04),
    ):
        text = panel.text(x, y, letter, ha="center", va="center", transform=panel.transAxes)
        text.set(color="white", fontsize=9, path_effects=OUTLINED)


def mark_scale(panel: Axes, view: View) -> None:
    """Draws a bar into the lower left of a picture, with its length in millimetres."""
    left, right = sorted(panel.get_xlim())
    length = bar_length((right - left) * view.spacing[1])
    start = left + 0.08 * (right - left)
    end, across = start + length / view.spacing[1], panel.get_xaxis_transform()  # x in voxels, y from 0 to 1
    panel.plot([start, end], [0.05, 0.05], color="white", linewidth=2, path_effects=OUTLINED, transform=across)
    text = panel.text((start + end) / 2, 0.07, f"{length:g} mm", ha="center", va="bottom", transform=across)
    text.set(color="white", fontsize=8, path_effects=OUTLINED)
    panel.set_xlim(left, right)


def class_colours(num_classes: int) -> ListedColormap:
    """Returns one colour per class: told apart with any colour vision where they are few, and else far from neighbours.

    Of many they are hues a golden section apart, and three shades in turn.
    """
    if num_classes <= len(DISTINCT):
        return ListedColormap(DISTINCT[:num_classes])
    hues = (0.618034 * np.arange(num_classes)) % 1
    shades = [((0.85, 0.95), (0.5, 1.0), (0.9, 0.65))[i % 3] for i in range(num_classes)]
    return ListedColormap([hsv_to_rgb((hue, *shade)) for hue, shade in zip(hues, shades, strict=True)])


def flow_shares(model: E2ENet, masks: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Returns, of each fusion node, which share of its active connections comes from which flow.

    A model without masks has the shares of its channels, as has a random mask on average.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Figure 6.
    """
    return {node: shares_of(counts) for node, counts in flow_counts(model, masks).items()}


def shares_of(counts: Mapping[str, int]) -> dict[str, float]:
    """Returns which share of all has each; of nothing, each has none.

    >>> shares_of({"forward": 3, "upward": 1})
    {'forward': 0.75, 'upward': 0.25}
    """
    total = sum(counts.values()) or 1
    return {name: count / total for name, count in counts.items()}


def _nodes(model: E2ENet) -> dict[str, FusionNode]:
    return {name: node for name, node in model.fusion.items() if isinstance(node, FusionNode)}


def flow_figure(path: Path, model: E2ENet, masks: Mapping[str, Tensor]) -> None:
    """Draws the density of every fusion weight on the left, the share of each flow per fusion node on the right."""
    nodes = list(_nodes(model))
    with drawn(path, size=(10.5, 1.8 + 0.36 * len(nodes))) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(0.6, 1.6))
        _draw_densities(left, model, masks)
        shares, at_random = flow_shares(model, masks), flow_shares(model, {})
        for row, node in enumerate(nodes):
            _draw_flows(right, row, shares[node], at_random[node])
        right.set_title("Share of each flow in the active connections of the first convolution")
        right.set_xlim(0, 1)
        right.xaxis.set_major_formatter(PercentFormatter(1))
        left.set_yticks(range(len(nodes)), [n.replace("stage", "stage ").replace("_level", ", level ") for n in nodes])
        left.invert_yaxis()
        handles: list[Artist] = [Patch(color=colour, label=title) for title, colour in PARTS.values()]
        handles += [Patch(color=colour, label=flow) for flow, colour in FLOWS.items()]
        handles.append(Line2D([], [], color="black", linewidth=1.2, label="expected at random"))
        figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=9, handlelength=1.2)


def _draw_densities(axes: Axes, model: E2ENet, masks: Mapping[str, Tensor]) -> None:
    """Draws a bar per weight; one without a mask is dense."""
    for row, (name, node) in enumerate(_nodes(model).items()):
        parts = [(part, colour) for part, (_, colour) in PARTS.items() if f"{part}.weight" in node.state_dict()]
        for i, (part, colour) in enumerate(parts):
            mask = masks.get(f"fusion.{name}.{part}.weight")
            density = 1.0 if mask is None else float(mask.float().mean())
            axes.barh(row + 0.22 * (i - (len(parts) - 1) / 2), density, height=0.2, color=colour)
    axes.set_title("Density")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def _draw_flows(axes: Axes, row: int, shares: Mapping[str, float], at_random: Mapping[str, float]) -> None:
    start = expected = 0.0
    for flow, share in shares.items():
        axes.barh(row, share, left=start, height=0.66, color=FLOWS[flow])
        middle = start + share / 2
        axes.text(middle, row, f"{share:.0%}", ha="center", va="center", fontsize=9, color=ON_FLOW[flow])
        start += share
        expected += at_random[flow]
        if flow != list(shares)[-1]:
            axes.plot([expected] * 2, [row - 0.42, row + 0.42], color="black", linewidth=1.2)

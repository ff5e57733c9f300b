"""Figure 6: where the connections of each fusion node come from, epoch by epoch, on the grid of the nodes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dstlib.errors import DataError
from dstlib.plot import drawn
from dstlib.zoo.e2enet.evaluation.figures import FLOWS, ON_FLOW, shares_of
from dstlib.zoo.e2enet.paper.figures.style import headline
from dstlib.zoo.e2enet.training.epochs import FlowCounts


def flows_over_epochs(path: Path, counts: Mapping[int, FlowCounts], *, title: str) -> None:
    """Draws the share of each flow in the connections of each node, over the epochs; levels are rows, stages columns.

    ``counts`` are by epoch, of which 0 stands for the first masks. The last shares are written on the flows.

    Raises:
        DataError: There are fewer than two epochs, or two epochs with other nodes.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Figure 6, which shows three epochs.
    """
    epochs, nodes = sorted(counts), [_place(node) for node in next(iter(counts.values()), {})]
    if len(epochs) < 2 or len({tuple(of) for of in counts.values()}) > 1:
        remedy = "Train anew by this release, whose runs write flows.csv after each epoch, for two epochs at least."
        given = f"{len(epochs)}" if len(epochs) < 2 else "epochs with other nodes"
        raise DataError.of("epochs", "figure 6", allowed="two or more, of one network", given=given, remedy=remedy)
    num_stages, num_levels = max(stage for stage, _ in nodes), max(level for _, level in nodes)
    with drawn(path, size=(max(5.0, 0.9 + 1.75 * num_stages), 1.5 + 1.3 * num_levels)) as figure:
        grid = figure.subplots(num_levels, num_stages, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for stage, level in nodes:
            node = grid[level - 1, stage - 1]
            node.set_visible(True)
            _draw_node(node, epochs, [shares_of(counts[epoch][_node(stage, level)]) for epoch in epochs])
            # the lowest of a column and the first of a row carry the numbers
            node.tick_params(labelbottom=(stage, level + 1) not in nodes, labelleft=stage == 1)
            node.set_title(f"stage {stage}" if level == 1 else "", loc="center", fontsize=10)
            node.set_ylabel(f"level {level}" if stage == 1 else "")
            node.set_xlabel("epoch" if (stage, level + 1) not in nodes else "")
        headline(figure, title)
        handles = [Patch(color=colour, label=flow) for flow, colour in FLOWS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, title="Share of the connections by flow")


def _draw_node(axes: Axes, epochs: Sequence[int], shares: Sequence[Mapping[str, float]]) -> None:
    flows = list(shares[-1])
    axes.stackplot(
        epochs,
        *([each[flow] for each in shares] for flow in flows),
        colors=[FLOWS[flow] for flow in flows],
        edgecolor="white",
    )
    below = 0.0
    for flow in flows:
        share = shares[-1][flow]
        if share >= 0.14:  # room for a line of text
            at, colour = (0.97, below + share / 2), ON_FLOW[flow]
            axes.text(
                *at,
                f"{share:.0%}",
                color=colour,
                fontsize=8,
                ha="right",
                va="center",
                transform=axes.get_yaxis_transform(),
            )
        below += share
    axes.set_xlim(epochs[0], epochs[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.tick_params(labelsize=8)


def _node(stage: int, level: int) -> str:
    return f"stage{stage}_level{level}"


def _place(node: str) -> tuple[int, int]:
    stage, level = node.removeprefix("stage").split("_level")
    return int(stage), int(level)

"""The command that makes the paper's tables and figures: its options, and what all runs of one have in common.

What is heavy, torch above all, is imported once the options are read.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstlib.command_line import make_parser
from dstlib.errors import require
from dstlib.zoo.e2enet.paper.figures.table import FIGURES
from dstlib.zoo.e2enet.paper.published import TABLES
from dstlib.zoo.e2enet.paper.scale import SCALES
from dstlib.zoo.e2enet.paper.systems import chosen
from dstlib.zoo.e2enet.recipes import RECIPES, short_name

if TYPE_CHECKING:
    from dstlib.zoo.e2enet.paper.runs import Plan, ReadConfig

NAMES = [short_name(name) for name in RECIPES]
EPILOG = "Any other option goes to the recipe, for all rows alike: see `python examples/e2enet_amos.py --help`."


def run_paper(description: str | None, read: "ReadConfig", arguments: Sequence[str] | None = None) -> int:
    """Makes the tables and figures that a command line asks for, and returns the exit code: 1 where a row failed.

    ``read`` makes a run of a recipe's command line: :func:`dstlib.zoo.e2enet.cli.read_config`.

    Raises:
        KeyboardInterrupt: It was asked to stop; what was done is kept.
        DstlibError: What is asked for cannot be done.
    """
    options, rest = _parser(description).parse_known_args(arguments)
    where, allowed = "the command line", "the number of a table, or --figure and that of a figure"
    remedy = f"Tables are {_span(TABLES)}, figures {_span(FIGURES)}."
    require(bool(options.table or options.figure), "--table", where, allowed=allowed, given="none", remedy=remedy)
    rows, failed = chosen(options.rows), dict[str, str]()

    from dstlib.zoo.e2enet.paper.making import make_figure, make_table

    for number in options.table:
        failed |= make_table(number, rows, _plan(TABLES[number].data, options, rest, read))
    for number in options.figure:
        failed |= make_figure(number, rows, _plan(FIGURES[number].recipe, options, rest, read))
    return 1 if failed else 0


def _parser(description: str | None) -> argparse.ArgumentParser:
    lines = make_parser(description, epilog=EPILOG)
    option = lines.add_argument
    option("--table", type=int, nargs="+", choices=TABLES, default=[], metavar="N", help=f"tables, {_span(TABLES)}")
    option("--figure", type=int, nargs="+", choices=FIGURES, default=[], metavar="N", help=f"figures, {_span(FIGURES)}")
    option("--rows", nargs="+", default=[], metavar="NAME", help="systems, such as e2enet-0.8 nnunet (default: all)")
    option("--data", type=Path, metavar="DIR", help="folder of the data set (default: procedural phantoms)")
    option("--mri", type=Path, metavar="DIR", help="folder of the MRI scans of Table 6, whose CT scans are --data")
    option("--recipe", choices=NAMES, help="how all are trained (default: as the table's data set is)")
    scales = "tiny: to see that all runs; quick: small; paper: as published (default: quick on --data, else tiny)"
    option("--scale", choices=SCALES, help=scales)
    option("--folds", nargs="+", default=["0"], metavar="N", help="folds to hold out, 0 to 4 (default: 0)")
    option("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of weights, batches and masks (default: 0)")
    minutes = "train each run for so many minutes of CPU time, in the place of the scale's epochs"
    option("--cpu-minutes", type=float, metavar="M", help=minutes)
    option("--width", type=float, metavar="W", help="multiplies the channels of baselines (default: 1; tiny: 0.25)")
    found = "what DiNTS is built by: a finished search or its file (default: a search of its own, by row dints-search)"
    option("--architecture", type=Path, metavar="FILE|RUN", help=found)
    share = "share of the memory of all paths that row dints-search is to keep to (default: 0.8, as published)"
    option("--memory-budget", type=float, metavar="SHARE", help=share)
    option("--runs", type=Path, default=Path("runs/paper"), metavar="DIR", help="of all runs (default: %(default)s)")
    return lines


def _span(numbers: Mapping[int, Any]) -> str:
    return f"{min(numbers)} to {max(numbers)}"


def _plan(recipe: str, options: argparse.Namespace, rest: Sequence[str], read: "ReadConfig") -> "Plan":
    """Returns what all runs of a table or figure have in common; refuses what none of them can use.

    Raises:
        DstlibError: One of them cannot be used.
    """
    import torch

    from dstlib.zoo.e2enet.baselines.architecture import read_architecture
    from dstlib.zoo.e2enet.paper.runs import Plan

    chosen_recipe = RECIPES[f"e2enet_{options.recipe or recipe}"]
    plan = Plan(
        recipe=chosen_recipe,
        scale=options.scale or ("quick" if options.data else "tiny"),
        read=read,
        runs=options.runs,
        data=options.data,
        mri=options.mri,
        folds=tuple(dict.fromkeys(options.folds)),
        seeds=tuple(dict.fromkeys(options.seeds)),
        width=options.width,
        cpu_minutes=options.cpu_minutes,
        architecture=options.architecture,
        memory_budget=options.memory_budget,
        options=tuple(rest),
    )
    if plan.architecture is not None:
        read_architecture(plan.architecture)  # refused before anything is trained
    numbers = (("--width", options.width), ("--memory-budget", options.memory_budget))
    given = [f"{name}={value}" for name, value in numbers if value is not None]
    device = read(chosen_recipe, [*SCALES[plan.scale], *given, *rest]).execution.device
    fits = plan.cpu_minutes is None or torch.device(device).type == "cpu"
    allowed, remedy = "a training on the CPU", "Pass --device cpu, or leave out --cpu-minutes."
    require(fits, "--cpu-minutes", "the command line", allowed=allowed, given=f"one on {device}", remedy=remedy)
    return plan

"""The command that makes the paper's tables and figures: what is asked for, trained where it is missing, and shown."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstlib.command_line import make_parser
from dstlib.errors import number_of, require
from dstlib.files import make_folder, write_json, write_whole
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.baselines.architecture import read_architecture
from dstlib.zoo.e2enet.paper.figures.table import FIGURES
from dstlib.zoo.e2enet.paper.published import TABLES
from dstlib.zoo.e2enet.paper.runs import (
    SCALES,
    TINY_WIDTH,
    FinishedRun,
    Plan,
    ReadConfig,
    Sets,
    finished_runs,
    short_name,
    train_missing,
)
from dstlib.zoo.e2enet.paper.scans import with_mri
from dstlib.zoo.e2enet.paper.systems import System, chosen, refusal
from dstlib.zoo.e2enet.paper.tables import Filled, fill, lines_of, to_json, to_text
from dstlib.zoo.e2enet.recipes import RECIPES

NAMES = [short_name(name) for name in RECIPES]
LATENCY, TRANSFER = 9, 6  # tables that are made in another way
EPILOG = "Any other option goes to the recipe, for all rows alike: see `python examples/e2enet_amos.py --help`."


def run_paper(description: str | None, read: ReadConfig, arguments: Sequence[str] | None = None) -> int:
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
    for number in options.table:
        if number == LATENCY:
            _make_latency(rows, _plan(TABLES[number].data, options, rest, read))
            continue
        failed |= _make_table(number, rows, _plan(TABLES[number].data, options, rest, read))
    for number in options.figure:
        failed |= _make_figure(number, rows, _plan(FIGURES[number].recipe, options, rest, read))
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


def _plan(recipe: str, options: argparse.Namespace, rest: Sequence[str], read: ReadConfig) -> Plan:
    """Returns what all runs of a table or figure have in common; refuses what none of them can use.

    Raises:
        DstlibError: One of them cannot be used.
    """
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


def _make_table(number: int, rows: Sequence[System], plan: Plan) -> Mapping[str, str]:
    """Trains what a table lacks, prints it, and leaves it as text and as data; says which systems failed, and why."""
    table = TABLES[number]
    if number == TRANSFER:
        plan = with_mri(plan)
    lines = lines_of(table, rows)
    runs, failed = _runs(plan, [line.system for line in lines])
    filled = fill(table, lines, runs, failed=failed, recipe=short_name(plan.recipe.name))
    text = to_text(filled, is_full=plan.scale == "paper", remarks=_remarks(plan))
    _show(filled, text, plan.folder)
    return failed


def _make_figure(number: int, rows: Sequence[System], plan: Plan) -> Mapping[str, str]:
    """Trains what a figure lacks, and draws it; says which systems failed, and why."""
    figure = FIGURES[number]
    systems = rows or chosen(figure.systems)
    figure.refuse_unfit(systems)
    runs, failed = _runs(plan, systems)
    folder = plan.folder / "figures"
    make_folder(folder)
    for file in figure.draw(folder, runs):
        print(on_one_line(f"Figure {number}, {figure.title}: {file}"))
    return failed


def _make_latency(rows: Sequence[System], plan: Plan) -> None:
    """Measures what Table 9 has, which trains nothing; small networks at the tiny scale."""
    from dstlib.zoo.e2enet.paper.latency import HOW, NETWORK, columns, latencies

    table, is_tiny = TABLES[LATENCY], plan.scale == "tiny"
    lines = lines_of(table, rows)
    systems = {line.system.name: line.system for line in lines if not refusal(line.system)}
    rounds, width = (3, TINY_WIDTH) if is_tiny else (15, 1.0)
    network = plan.preset.network if is_tiny else NETWORK
    found = latencies(
        [*systems.values()],
        network=network,
        width=plan.width or width,
        architecture=None if plan.architecture is None else read_architecture(plan.architecture),
        rounds=rounds,
    )
    ours = columns(found)
    measured = tuple(replace(line, ours=ours.get(line.system.name, {}), reason=refusal(line.system)) for line in lines)
    filled = Filled(table=table, lines=measured, classes=(), is_papers_set=True)
    remarks = [HOW.format(rounds=rounds, threads=number_of(torch.get_num_threads(), "thread"))]
    if is_tiny:
        remarks.append("Ours are of the scale 'tiny': small networks, to see that it runs.")
    _show(filled, to_text(filled, is_full=not is_tiny, remarks=remarks), plan.runs)


def _show(filled: Filled, text: str, folder: Path) -> None:
    """Prints a table, and leaves it in a folder as text and as data."""
    name = f"table{filled.table.number}"
    print(f"\n{text}\n")
    make_folder(folder)
    write_whole(folder / f"{name}.txt", f"{text}\n".encode())
    write_json(folder / f"{name}.json", to_json(filled))
    print(f"Written to {folder}: {name}.txt and {name}.json.")


def _remarks(plan: Plan) -> Iterator[str]:
    """Yields what is to be known of all runs of a plan."""
    if plan.scale != "paper":
        yield f"Ours are of the scale {plan.scale!r}: smaller, and trained for far less than the paper's 1000 epochs."
    if plan.data is None:
        yield "Ours are of procedural phantoms: they show that everything works, and nothing of patients."
    if plan.sources:
        yield (
            "CT → MRI goes on from the CT run of the same fold for a quarter of the epochs; CT + MRI learns from every "
            "CT scan too, all z-scored. All are scored on the MRI scans that the fold holds out."
        )
    if plan.cpu_minutes is not None:
        transfer = ", CT → MRI a quarter of it on top of its CT run" if plan.sources else ""
        yield (
            f"Each run has {plan.cpu_minutes:g} CPU minutes of training{transfer}: an iteration was measured before "
            "the first run of a system, and settled how many it has. Preparation, that measurement, prediction and "
            "scores are not in the budget. Mask updates stand at the shares of a training that they have in the "
            "scale's own."
        )


def _runs(plan: Plan, systems: Sequence[System]) -> tuple[tuple[FinishedRun, ...], dict[str, str]]:
    systems, sets = [*{system.name: system for system in systems}.values()], Sets(plan)
    failed = train_missing(plan, systems, sets)
    return finished_runs(plan, systems, sets), failed

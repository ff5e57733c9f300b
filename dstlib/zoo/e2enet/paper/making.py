"""Tables and figures of the paper, made by a plan: trained where a run is missing, shown, and left in files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dstlib.errors import number_of
from dstlib.files import make_folder, write_json, write_whole
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.baselines.architecture import read_architecture
from dstlib.zoo.e2enet.paper.figures.table import FIGURES
from dstlib.zoo.e2enet.paper.latency import HOW, NETWORK, columns, latencies
from dstlib.zoo.e2enet.paper.published import TABLES
from dstlib.zoo.e2enet.paper.runs import FinishedRun, Plan, Sets, finished_runs, train_missing
from dstlib.zoo.e2enet.paper.scale import TINY_WIDTH
from dstlib.zoo.e2enet.paper.scans import with_mri
from dstlib.zoo.e2enet.paper.systems import System, chosen, refusal
from dstlib.zoo.e2enet.paper.tables import Filled, fill, lines_of, to_json, to_text
from dstlib.zoo.e2enet.recipes import short_name

LATENCY, TRANSFER = 9, 6  # tables that are made in another way


def make_table(number: int, rows: Sequence[System], plan: Plan) -> Mapping[str, str]:
    """Trains what a table lacks, prints it, and leaves it as text and as data; says which systems failed, and why.

    ``number`` is that of the paper; without ``rows`` it has all of them.

    Raises:
        DstlibError: It cannot be made of such rows, or by such a plan.
    """
    if number == LATENCY:
        _make_latency(rows, plan)
        return {}
    table = TABLES[number]
    if number == TRANSFER:
        plan = with_mri(plan)
    lines = lines_of(table, rows)
    runs, failed = _runs(plan, [line.system for line in lines])
    filled = fill(table, lines, runs, failed=failed, recipe=short_name(plan.recipe.name))
    text = to_text(filled, is_full=plan.scale == "paper", remarks=_remarks(plan))
    _show(filled, text, plan.folder)
    return failed


def make_figure(number: int, rows: Sequence[System], plan: Plan) -> Mapping[str, str]:
    """Trains what a figure lacks, and draws it; says which systems failed, and why.

    ``number`` is that of the paper; without ``rows`` it is of the systems that the paper compares there.

    Raises:
        DstlibError: It cannot be drawn of such rows, or by such a plan.
    """
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

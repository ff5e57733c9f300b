"""The paper's tables with our numbers: which rows, what they come to, how it is laid out and written down."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from textwrap import fill as fill_lines
from textwrap import shorten
from typing import Any

import numpy as np

from dstlib.errors import few, number_of
from dstlib.report import align, on_one_line
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.layouts.btcv import BTCV_ORGANS
from dstlib.zoo.e2enet.data.layouts.decathlon import TUMOUR_CLASSES
from dstlib.zoo.e2enet.evaluation.metrics import METRICS
from dstlib.zoo.e2enet.evaluation.pt_score import Row, nemenyi, pt_scores
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, mean_without_nan
from dstlib.zoo.e2enet.paper.published import MARKS, PAPER, Printed, PrintedTable, Set
from dstlib.zoo.e2enet.paper.runs import FinishedRun, cpu_minutes, post_processed_scores
from dstlib.zoo.e2enet.paper.statistics import (
    CaseScores,
    Estimate,
    PairTest,
    case_scores,
    estimate,
    over_folds,
    over_seeds,
    pair_tests,
)
from dstlib.zoo.e2enet.paper.systems import SYSTEMS, System, refusal

CLASSES: Mapping[Set, tuple[str, ...]] = {"amos": AMOS_ORGANS, "btcv": BTCV_ORGANS, "brats": TUMOUR_CLASSES}
METRIC_OF = {"mDice": "dice", "mNSD": "nsd", "HD": "hd"}  # columns that are means of a metric
LEVEL, WIDTH = 0.05, 120
_UNITS = {"Params": "Params, M", "FLOPs": "FLOPs, G"}
_OF_MACHINE = ("ms", "items/s")
_COUNTED = (
    "Params are what is not zero, FLOPs those of one {size} patch by the paper's rules, where an up-convolution costs "
    "too much by the volume of its stride; heads here have the background too."
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of a table: a system, what the paper prints of it, if anything, and what ours came to.

    ``ours`` are by column, in the units of the paper; ``reason`` says why there are none, or why runs are missing.
    """

    system: System
    printed: Printed | None = None
    ours: Mapping[str, Estimate] = field(default_factory=dict)
    reason: str = ""
    runs: tuple[FinishedRun, ...] = ()

    @property
    def name(self) -> str:
        return self.printed.name if self.printed else self.system.title

    @property
    def is_post_processed(self) -> bool:
        return self.printed is not None and self.printed.is_post_processed


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A table of the paper with ours: its lines, the columns of the set at hand, and the tests between systems.

    ``is_papers_set`` says whether the classes are those of the paper's table, so that scores can be set against it.
    """

    table: PrintedTable
    lines: tuple[Line, ...]
    classes: tuple[str, ...]
    is_papers_set: bool
    num_omitted: int = 0
    scores: CaseScores | None = None
    tests: tuple[PairTest, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.classes, *self.table.measures)


def lines_of(table: PrintedTable, rows: Sequence[System] = ()) -> tuple[Line, ...]:
    """Returns the lines of a table, all of them, or those of the systems asked for and no others.

    A system that the table does not have gets a line behind the others, without anything printed.
    """
    asked = {system.name for system in rows}
    printed = [row for row in table.rows if not asked or row.system in asked]
    there = {row.system for row in printed}
    beyond = [Line(system=system) for system in rows if system.name not in there]
    return (*(Line(system=SYSTEMS[row.system], printed=row) for row in printed), *beyond)


def fill(
    table: PrintedTable, lines: Sequence[Line], runs: Sequence[FinishedRun], *, failed: Mapping[str, str], recipe: str
) -> Filled:
    """Puts the runs into the lines; ``failed`` says of systems why they could not be trained.

    Raises:
        DataError: Runs that should be folds of one comparison have other classes.
    """
    of_system = {name: [run for run in runs if run.system.name == name] for name in {run.system.name for run in runs}}
    of_table = [run for line in lines for run in of_system.get(line.system.name, ()) if not line.is_post_processed]
    classes = of_table[0].result.classes if of_table else CLASSES[table.data]
    is_papers = recipe == table.data and _are_those_of(table.data, classes)
    is_told_by_class = bool(table.classes) or recipe != table.data  # of another set, in every table
    of_set = classes if is_told_by_class else ()
    shown = table.classes if is_papers or not of_table else of_set
    filled = []
    for line in lines:
        mine = of_system.get(line.system.name, [])
        if not mine:
            reason = failed.get(line.system.name) or refusal(line.system) or "not yet run"
            filled.append(replace(line, reason=reason))
            continue
        ours = _measured(mine, shown, is_papers=is_papers, post_processed=line.is_post_processed)
        filled.append(replace(line, ours=ours, runs=tuple(mine), reason=failed.get(line.system.name, "")))
    whole = _with_pt(filled)
    unique = {id(run): run for run in of_table}
    found = case_scores([*unique.values()]) if unique else None
    tests = pair_tests(found) if found and len(found.cases) > 1 else ()
    return Filled(
        table=table,
        lines=whole,
        classes=shown,
        is_papers_set=is_papers,
        num_omitted=len(table.rows) - sum(line.printed is not None for line in lines),
        scores=found,
        tests=tests,
    )


def _are_those_of(data: Set, classes: Sequence[str]) -> bool:
    """Says whether the classes are those of the paper's set: as many, and most of them called alike."""
    known = CLASSES[data]
    alike = sum(a.casefold() == b.casefold() for a, b in zip(known, classes, strict=False))
    return len(classes) == len(known) and 2 * alike > len(known)


def _measured(
    runs: Sequence[FinishedRun], columns: Sequence[str], *, is_papers: bool, post_processed: bool
) -> dict[str, Estimate]:
    """Returns what the runs of one system come to: over the cases of all folds, averaged over the seeds."""
    scored = [(run.seed, post_processed_scores(run) if post_processed else run.evaluation) for run in runs]
    whole = over_seeds([*over_folds(scored).values()])
    dice = whole.dice
    per_class = [dice[:, k] for k in range(dice.shape[1])]
    if is_papers and len(columns) == len(per_class) - 1:  # BTCV: both adrenal glands in one column
        per_class = [*per_class[:-2], mean_without_nan(dice[:, -2:], axis=1)]
    found = {column: _scaled(estimate(values), 100) for column, values in zip(columns, per_class, strict=False)}
    for column, metric in METRIC_OF.items():
        factor = 100 if METRICS[metric].is_share else 1
        found[column] = _mean_of(whole, metric, factor)
    cost = runs[0].result.cost.as_trained
    found["Params"] = Estimate(mean=cost.params / 1e6)
    found["FLOPs"] = Estimate(mean=cost.flops.paper / 1e9)
    return {column: value for column, value in found.items() if value is not None}


def _mean_of(whole: Evaluation, metric: str, factor: float) -> Estimate | None:
    """Returns the mean over cases and classes, with the standard error of the cases' own means."""
    cases, mean = estimate(whole.case_means(metric)), whole.mean_of(metric)
    return None if cases is None else _scaled(replace(cases, mean=mean), factor)


def _scaled(value: Estimate | None, factor: float) -> Estimate | None:
    if value is None:
        return None
    return replace(value, mean=factor * value.mean, error=None if value.error is None else factor * value.error)


def _with_pt(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Adds the PT score over the lines that have been run."""
    done = [i for i, line in enumerate(lines) if "mDice" in line.ours]
    rows = [
        Row(
            name=lines[i].name,
            dice=lines[i].ours["mDice"].mean,
            params=lines[i].ours["Params"].mean,
            flops=lines[i].ours["FLOPs"].mean,
        )
        for i in done
    ]
    scores = dict(zip(done, pt_scores(rows), strict=True))
    found = {i: {"PT": Estimate(mean=score)} for i, score in scores.items() if score is not None}
    return tuple(replace(line, ours={**line.ours, **found.get(i, {})}) for i, line in enumerate(lines))


# ---- as text


def to_text(filled: Filled, *, is_full: bool, remarks: Iterable[str]) -> str:
    """Returns a table in the paper's layout, what was trained, which differences are sure, and what it all means.

    ``is_full`` says whether the networks are of the paper's size, so that costs can be set against its; ``remarks`` are
    on all runs.
    """
    table = filled.table
    parts = [f"Table {table.number}: {table.title}\n", *align([*_cells(filled, is_full=is_full)], left=(0, 1))]
    for line in (line for line in filled.lines if line.reason):
        told, reason = "Not all folds and seeds" if line.runs else "Not run", shorten(line.reason, 2 * WIDTH)
        parts.append(f"{told}: {on_one_line(line.name)}: {on_one_line(reason.rstrip('.'))}.")
    if filled.num_omitted:
        parts.append(f"{number_of(filled.num_omitted, 'row')} of the paper's table not asked for (--rows).")
    notes = [fill_lines(on_one_line(note), width=WIDTH) for note in (*_notes(filled), *remarks)]
    parts += ["", *_trainings(filled), *_tests(filled), "", *notes]
    return "\n".join(parts)


def _cells(filled: Filled, *, is_full: bool) -> Iterator[tuple[str, ...]]:
    columns = filled.columns
    is_whole = is_full and all(line.ours for line in filled.lines) and not filled.num_omitted  # PT is of all rows
    yield ("method", "", *(_UNITS.get(column, column) for column in columns))
    for line in filled.lines:
        name = line.name
        if line.ours:
            values = [line.ours.get(column) for column in columns]
            yield (name, "ours", *("-" if value is None else f"{value.mean:.2f}" for value in values))
            if any(value is not None and value.error is not None for value in values):
                errors = (None if value is None else value.error for value in values)
                yield ("", "± s.e.", *("" if error is None else f"{error:.2f}" for error in errors))
            name = ""
        if line.printed:
            yield (name, "paper", *(line.printed.values.get(column, "-") for column in columns))
            if line.ours and filled.is_papers_set:
                apart = {*_OF_MACHINE, *(() if is_full else _UNITS), *(() if is_whole else ("PT",))}
                compared = ["" if column in apart else column for column in columns]
                yield ("", "ours - paper", *(_difference(line, column) for column in compared))
        elif not line.ours:
            yield (name, "-", *("" for _ in columns))


def _difference(line: Line, column: str) -> str:
    ours, theirs = line.ours.get(column), line.printed.number(column) if line.printed else None
    return "" if ours is None or theirs is None else f"{ours.mean - theirs:+.2f}"


def _trainings(filled: Filled) -> Iterator[str]:
    """Yields a table of what was trained for the lines, and how far its mDice scatters."""
    systems = {line.system.name: line for line in filled.lines if line.runs}
    if not systems:
        return
    cells: list[tuple[str, ...]] = [
        ("trained", "folds", "seeds", "cases", "iterations", "CPU min", "mDice", "± cases", "± folds", "± seeds")
    ]
    not_scored = []
    for line in systems.values():
        runs = line.runs
        seeds = over_folds([(run.seed, run.evaluation) for run in runs])
        folds = [
            over_seeds([run.evaluation for run in runs if run.fold == fold]).mean
            for fold in dict.fromkeys(run.fold for run in runs)
        ]
        whole = over_seeds([*seeds.values()])
        errors = (estimate(whole.case_means("dice")), estimate(folds), estimate([each.mean for each in seeds.values()]))
        minutes = [cpu_minutes(run) for run in runs]
        spent = "-" if None in minutes else f"{np.mean([m for m in minutes if m is not None]):.2f}"
        cells.append(
            (
                line.system.title,
                str(len(folds)),
                str(len(seeds)),
                str(len(whole.cases)),
                f"{runs[0].config.training.num_iterations:,}",
                spent,
                f"{100 * whole.mean:.2f}",
                *("-" if of is None or of.error is None else f"{100 * of.error:.2f}" for of in errors),
            )
        )
        if whole.left_out:
            names = f"{line.system.title}: {few([*whole.left_out])}"
            not_scored.append(f"Not scored: {names}; result.json of its runs says why.")
    yield from align(cells, left=(0,))
    yield from map(on_one_line, not_scored)
    yield "Iterations and CPU minutes are of the training of one run. ± are standard errors over cases, folds, seeds."


def _tests(filled: Filled) -> Iterator[str]:
    """Yields the tests between systems."""
    found = filled.scores
    if found is None or not filled.tests:
        return
    titles = {line.system.name: line.system.title for line in filled.lines}
    cells = [("A", "B", "A - B, Dice", "± s.e.", "Wilcoxon p", "Holm p", "")]
    for test in filled.tests:
        of = test.difference
        error = "-" if of.error is None else f"{100 * of.error:.2f}"
        sure = "differ" if test.corrected < LEVEL else ""
        names = (titles[test.first], titles[test.second])
        cells.append((*names, f"{100 * of.mean:+.2f}", error, _p(test.p), _p(test.corrected), sure))
    ranks = nemenyi(found.scores, alpha=LEVEL)
    order = np.argsort(ranks.average, kind="stable")
    ranked = ", ".join(f"{titles[found.systems[i]]} {ranks.average[i]:.2f}" for i in order)
    groups = "; ".join(" = ".join(titles[found.systems[i]] for i in group) for group in ranks.groups) or "none"
    yield ""
    yield from align(cells, left=(0, 1, 6))
    yield f"Paired over {number_of(len(found.cases), 'held-out case')}, each by its mean Dice over classes and seeds."
    yield "p: Wilcoxon's signed-rank test, two-sided, over the cases that differ; Holm's is over the pairs shown."
    yield f"Average ranks, 1 the best: {on_one_line(ranked)}."
    told = f"Nemenyi at {LEVEL:g}: ranks differ from a distance of {ranks.critical_distance:.2f} on"
    yield f"{told}; not told apart: {on_one_line(groups)}."


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _notes(filled: Filled) -> Iterator[str]:
    """Yields what numbers mean, and what is not to be read into them."""
    table, done = filled.table, [line for line in filled.lines if line.runs]
    yield f"paper: {PAPER}, Table {table.number}. It prints no errors: those of a difference are ours."
    marks = {mark for line in filled.lines if line.printed for value in line.printed.values.values() for mark in value}
    if told := ", ".join(f"{mark} {MARKS[mark]}" for mark in MARKS if mark in marks):
        yield f"Marks of the paper's numbers: {told}."
    yield from table.notes
    if not done:
        return
    run = done[0].runs[0]
    if not filled.is_papers_set:
        yield f"The scans are not those of the table ({run.config.data.name}): no difference to the paper is shown."
    size = "×".join(map(str, run.result.patch_size))
    yield "Scores in per cent, HD in mm, of held-out cases; ours ± the standard error over cases."
    yield _COUNTED.format(size=size)
    if any(line.is_post_processed for line in done):
        yield "*: the largest component alone of the classes that gain by it, chosen on the held-out cases themselves."
    if "PT" in table.measures:
        yield "PT = mDice / highest mDice + ½ (fewest params / params + fewest FLOPs / FLOPs), over our rows shown."
    yield run.result.definition


# ---- as data


def to_json(filled: Filled) -> dict[str, Any]:
    """Returns the table as plain data."""
    found = filled.scores
    ranks = nemenyi(found.scores, alpha=LEVEL) if found and filled.tests else None
    return {
        "table": filled.table.number,
        "title": filled.table.title,
        "columns": list(filled.columns),
        "is_papers_set": filled.is_papers_set,
        "rows": [
            {
                "row": line.name,
                "system": line.system.name,
                "ours": {column: asdict(value) for column, value in line.ours.items()},
                "paper": dict(line.printed.values) if line.printed else None,
                "not_run": line.reason or None,
                "runs": [_run_json(run) for run in line.runs],
            }
            for line in filled.lines
        ],
        "tests": [asdict(test) for test in filled.tests],
        "nemenyi": {
            "level": LEVEL,
            "cases": list(found.cases),
            "ranks": dict(zip(found.systems, ranks.average.tolist(), strict=True)),
            "critical_distance": ranks.critical_distance,
        }
        if found and ranks
        else None,
    }


def _run_json(run: FinishedRun) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "fold": run.fold,
        "seed": run.seed,
        "iterations": run.config.training.num_iterations,
        "cpu_minutes": cpu_minutes(run),
        "mean_dice": run.result.mean_dice,
    }

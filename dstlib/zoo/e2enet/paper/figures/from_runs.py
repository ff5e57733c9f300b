"""What each figure takes of finished runs, and refuses: runs without it, or of other folds, seeds or classes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import friedmanchisquare

from dstlib.errors import DataError, few, number_of
from dstlib.zoo.e2enet.data.scans.nifti import read_label
from dstlib.zoo.e2enet.evaluation.figures import learning_curve
from dstlib.zoo.e2enet.evaluation.pt_score import Row, nemenyi
from dstlib.zoo.e2enet.evaluation.scores import Evaluation
from dstlib.zoo.e2enet.paper.figures.critical_distance import critical_distance
from dstlib.zoo.e2enet.paper.figures.flows import flows_over_epochs
from dstlib.zoo.e2enet.paper.figures.learning import Metrics, learning_curves
from dstlib.zoo.e2enet.paper.figures.panels import Predicted, chosen_cases, panels
from dstlib.zoo.e2enet.paper.figures.trade_off import trade_off
from dstlib.zoo.e2enet.paper.figures.volumes import volumes_and_dice
from dstlib.zoo.e2enet.paper.published import TABLES
from dstlib.zoo.e2enet.paper.runs import FinishedRun
from dstlib.zoo.e2enet.paper.statistics import case_scores, over_folds, over_seeds
from dstlib.zoo.e2enet.paper.systems import SYSTEMS, System
from dstlib.zoo.e2enet.recipes import short_name
from dstlib.zoo.e2enet.report import case_of
from dstlib.zoo.e2enet.training.epochs import flows_of
from dstlib.zoo.e2enet.training.records import FLOWS

REFERENCE = "nnunet"
LEVEL = 0.05
_WITH_COSTS = {"amos": 1, "brats": 2, "btcv": 11}  # the tables of the paper that have PT scores


def draw_flows(number: int, folder: Path, runs: Sequence[FinishedRun]) -> tuple[Path, ...]:
    """Draws figure 6 of each run."""
    _refuse_fewer(number, runs, 1)
    without = [_told(run) for run in runs if not (run.folder / FLOWS).exists()]
    if without:
        allowed = f"runs of a sparse E2ENet with {FLOWS}, which this release writes"
        remedy = (
            "Leave the rows without masks out by --rows; a run of before has to be trained anew, in another --runs."
        )
        raise DataError.of("rows", f"figure {number}", allowed=allowed, given=few(without), remedy=remedy)
    files = []
    for run in runs:
        counts = flows_of(run.folder, run.result.flows, num_epochs=run.config.training.epochs)
        files.append(_file(number, folder, run))
        flows_over_epochs(files[-1], counts, title=f"{_told(run)}: where the connections of each fusion node come from")
    return tuple(files)


def draw_ranks(number: int, folder: Path, runs: Sequence[FinishedRun]) -> tuple[Path, ...]:
    """Draws figure 7 over the cases that every system has a score of."""
    found = case_scores(_matched(number, runs))
    _refuse_no_case(number, found.cases)
    over = number_of(len(found.cases), "case")
    told = f"Average rank over {over}; a bar joins those that do not differ at p = {LEVEL:g}"
    if len(found.systems) > 2 and np.ptp(found.scores, axis=1).any():
        told += f" (Friedman's test of all: p = {friedmanchisquare(*found.scores.T).pvalue:.2g})"
    names = [SYSTEMS[name].title for name in found.systems]
    file = _file(number, folder)
    critical_distance(file, names, nemenyi(found.scores, alpha=LEVEL), title=told)
    return (file,)


def draw_trade_off(number: int, folder: Path, runs: Sequence[FinishedRun], *, recipe: str) -> tuple[Path, ...]:
    """Draws figure 8, the rows of the paper beside; without a run, those alone."""
    shown: dict[str, Sequence[Row]] = {}
    if runs:
        matched = _matched(number, runs)
        scores = _scores(number, matched)
        costs = {run.system.title: run.result.cost.as_trained for run in matched}
        shown["These runs"] = [
            Row(
                name=name,
                dice=None if np.isnan(of.mean) else 100 * of.mean,
                params=costs[name].params / 1e6,
                flops=costs[name].flops.paper / 1e9,
            )
            for name, of in scores.items()
        ]
    table = _WITH_COSTS.get(short_name(runs[0].config.recipe) if runs else recipe)
    if table is not None:
        shown[f"As published (Table {table})"] = _published(table)
    file = _file(number, folder)
    trade_off(file, shown)
    return (file,)


def draw_updates(number: int, folder: Path, runs: Sequence[FinishedRun]) -> tuple[Path, ...]:
    """Draws figure 11 of each run."""
    _refuse_fewer(number, runs, 1)
    without = [_told(run) for run in runs if not run.result.mask_updates]
    if without:
        allowed, remedy = "runs whose masks were updated", "Choose dynamic sparse rows by --rows, such as e2enet-0.8."
        raise DataError.of("rows", f"figure {number}", allowed=allowed, given=few(without), remedy=remedy)
    files = [_file(number, folder, run) for run in runs]
    for file, run in zip(files, runs, strict=True):
        learning_curve(file, run.metrics, run.result.mask_updates, title=_told(run))
    return tuple(files)


def draw_learning(number: int, folder: Path, runs: Sequence[FinishedRun]) -> tuple[Path, ...]:
    """Draws figure 12; rows that differ in the interval between mask updates alone have a panel of their own."""
    systems, curves = dict[str, System](), dict[str, list[Metrics]]()
    for run in _matched(number, runs):
        systems[run.system.title] = run.system
        curves.setdefault(run.system.title, []).append(run.metrics)
    varied = [_at_usual_interval(system) for system in systems.values() if system.interval != 1]
    others = {title: curves[title] for title, system in systems.items() if system.interval == 1}
    intervals = {title: curves[title] for title, system in systems.items() if _at_usual_interval(system) in varied}
    file = _file(number, folder)
    columns = {"Networks": others, "Intervals between mask updates": intervals}
    learning_curves(file, {title: of for title, of in columns.items() if of})
    return (file,)


def draw_volumes(number: int, folder: Path, runs: Sequence[FinishedRun]) -> tuple[Path, ...]:
    """Draws figures 13 to 15, with the differences to nnU-Net, or to the first row where it is not among them."""
    scores = _scores(number, _matched(number, runs))
    reference = SYSTEMS[REFERENCE].title
    first = next(iter(scores))
    cases = number_of(len(scores[first].cases), "case")
    title = f"{runs[0].config.data.name}, {cases}: mean over the cases, and one standard error to each side"
    file = _file(number, folder)
    volumes_and_dice(file, scores, reference=reference if reference in scores else first, title=title)
    return (file,)


def draw_panels(number: int, folder: Path, runs: Sequence[FinishedRun], *, num_cases: int) -> tuple[Path, ...]:
    """Draws figures 5, 9 and 10, of one seed: cases from the largest loss of the last row to its largest gain."""
    matched = _matched(number, runs)
    matched = [run for run in matched if run.seed == matched[0].seed]
    scores = _scores(number, matched)
    names, usual = [*scores], SYSTEMS[REFERENCE].title
    last, reference = names[-1], usual if usual in names[:-1] else names[0]
    cases, dice = scores[last].cases, {name: of.case_means("dice") for name, of in scores.items()}
    shown = [
        _predicted(matched, cases[n], {name: float(dice[name][n]) for name in names})
        for n in chosen_cases(dice[last] - dice[reference], num_cases)
    ]
    data = matched[0].config.data
    title = (
        f"{data.name}: cases from the lowest difference in Dice ({last} - {reference}) to the highest, at even steps"
    )
    file = _file(number, folder)
    panels(file, shown, labels=data.meaning, classes=data.classes, title=title)
    return (file,)


def _predicted(runs: Sequence[FinishedRun], name: str, dice: Mapping[str, float]) -> Predicted:
    """Reads a case and what each system predicted of it."""
    of_case = {run.system.title: run for run in runs if name in run.evaluation.cases}
    first = next(iter(of_case.values()))
    labels, num_channels = first.config.data.meaning, len(first.config.data.channels)
    files = next(files for files in first.files if files.name == name)
    predictions = {
        title: read_label(run.folder / "predictions" / f"{name}.nii.gz", labels).voxels.T
        for title, run in of_case.items()
    }
    return Predicted(case_of(files, num_channels=num_channels, labels=labels), predictions, dice)


def _scores(number: int, runs: Sequence[FinishedRun]) -> dict[str, Evaluation]:
    """Returns the scores of each system by its title, averaged over its seeds, of the cases that all have scores of.

    Raises:
        DataError: There is no such case.
    """
    of_title: dict[str, list[tuple[int, Evaluation]]] = {}
    for run in runs:
        of_title.setdefault(run.system.title, []).append((run.seed, run.evaluation))
    scores = {title: over_seeds([*over_folds(of).values()]) for title, of in of_title.items()}
    first = next(iter(scores.values()))
    common = [case for case in first.cases if all(case in of.cases for of in scores.values())]
    _refuse_no_case(number, common)
    return {title: _of_cases(of, common) for title, of in scores.items()}


def _of_cases(scores: Evaluation, cases: Sequence[str]) -> Evaluation:
    at = [scores.cases.index(case) for case in cases]
    chosen = {metric: values[at] for metric, values in scores.scores.items()}
    return replace(scores, cases=tuple(cases), scores=chosen, volumes=scores.volumes[at])


def _refuse_no_case(number: int, cases: Sequence[str]) -> None:
    if not cases:
        allowed, remedy = "a case that every row has a score of", "Compare rows that were scored on the same cases."
        raise DataError.of("cases", f"figure {number}", allowed=allowed, given="none", remedy=remedy)


def _matched(number: int, runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Returns the runs of the folds and seeds that every system has finished.

    Raises:
        DataError: There is none, or one system alone, or they have other classes.
    """
    _refuse_fewer(number, runs, 2)
    done = {name: {(run.fold, run.seed) for run in runs if run.system.name == name} for name in _names(runs)}
    common = set.intersection(*done.values())
    where = f"figure {number}"
    if not common:
        given = "; ".join(
            f"{name}: {few([f'{fold} (seed {seed})' for fold, seed in sorted(of)])}" for name, of in done.items()
        )
        allowed, remedy = "folds and seeds that every row has finished", "Finish the rows on the same folds and seeds."
        raise DataError.of("folds", where, allowed=allowed, given=given, remedy=remedy)
    matched = [run for run in runs if (run.fold, run.seed) in common]
    first = matched[0]
    for run in matched:
        if run.result.classes != first.result.classes:
            allowed = f"those of {first.system.title}: {few(first.result.classes)}"
            given, remedy = few(run.result.classes), "Compare runs on one data set."
            raise DataError.of("classes", f"{where}, {_told(run)}", allowed=allowed, given=given, remedy=remedy)
    return matched


def _refuse_fewer(number: int, runs: Sequence[FinishedRun], least: int) -> None:
    names = _names(runs)
    if len(names) < least:
        allowed = f"{least} or more with a finished run" if least > 1 else "one with a finished run"
        remedy = "Name others by --rows, and see above why rows could not be trained."
        given = ", ".join(names) or "none"
        raise DataError.of("rows", f"figure {number}", allowed=allowed, given=given, remedy=remedy)


def _published(table: int) -> list[Row]:
    """Returns the printed rows without post-processing, by the title of the system where a system has one row."""
    rows = [row for row in TABLES[table].rows if not row.is_post_processed and row.number("FLOPs") is not None]
    times = Counter(row.system for row in rows)
    return [
        Row(
            name=SYSTEMS[row.system].title if times[row.system] == 1 else row.name,
            dice=row.number("mDice"),
            params=row.number("Params"),
            flops=row.number("FLOPs"),
        )
        for row in rows
    ]


def _at_usual_interval(system: System) -> System:
    """Returns what a system is but for its names and the interval between its updates."""
    return replace(system, name="", title="", interval=1.0)


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    return [*dict.fromkeys(run.system.name for run in runs)]


def _told(run: FinishedRun) -> str:
    return f"{run.system.title}, fold {run.fold}, seed {run.seed}"


def _file(number: int, folder: Path, run: FinishedRun | None = None) -> Path:
    of_run = f"-{run.system.name}-fold{run.fold}-seed{run.seed}" if run else ""
    return folder / f"figure{number}{of_run}.png"

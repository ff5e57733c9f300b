"""Runs side by side, and beside what was published."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dstlib.errors import require
from dstlib.report import align, on_one_line
from dstlib.zoo.e2enet.evaluation.pt_score import Row, pt_scores
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, pooled
from dstlib.zoo.e2enet.paper.published import PUBLISHED
from dstlib.zoo.e2enet.training.records import CONFIG, config_of, result_of


def compare(runs: Sequence[Path], *, pool: bool = False, beside: str | None = None, alpha: float = 0.5) -> str:
    """Returns a table of finished runs: mDice, mNSD, parameters, FLOPs by the paper's convention, PT score.

    With ``pool`` the runs are the folds of one network: a further row has the scores over all their held-out cases.

    Raises:
        SettingError: Nothing was published under the name ``beside``.
        StateError: A run is not finished.
    """
    allowed, remedy = f"one of {', '.join(PUBLISHED)}", "Leave it out to show the runs alone."
    require(beside is None or beside in PUBLISHED, "--beside", "compare", allowed=allowed, given=beside, remedy=remedy)
    results = {run: result_of(run) for run in runs}
    rows = [row_of(run) for run in runs]
    if pool:
        scores = pooled([Evaluation.from_json(asdict(results[run])) for run in runs])
        name = f"all {len(scores.cases)} held-out cases"
        dice, nsd = _per_cent(scores.mean), _per_cent(scores.mean_of("nsd"))
        rows.append(replace(rows[0], name=name, dice=dice, scores={} if nsd is None else {"mNSD": nsd}))
    sizes = [f"{'×'.join(map(str, results[run].patch_size))} in {run.name}" for run in runs]
    notes = [f"FLOPs are of one patch, and compare for one size alone: {', '.join(sizes)}; published ones 128×128×128."]
    if len({result.classes for result in results.values()}) > 1:
        classes = [f"{', '.join(result.classes)} in {run.name}" for run, result in results.items()]
        notes.append(f"mDice is over other classes: {', '.join(classes)}.")
    of_runs = {run.name: config_of(run).data for run in runs if (run / CONFIG).exists()}
    sources = {name: data.name for name, data in of_runs.items()}
    rules = {name: f"--geometry {data.rule}" for name, data in of_runs.items()}
    for what, told in (("on other data sets", sources), ("in millimetres by other rules", rules)):
        if len({*told.values()}) > 1:
            notes.append(f"Scores are {what}: {', '.join(f'{each} in {name}' for name, each in told.items())}.")
    overlapping = [name for name, data in of_runs.items() if data.meaning.regions]
    if beside and overlapping:
        notes.append(f"mDice is over regions, which overlap, in {', '.join(overlapping)}; published ones over classes.")
    return "\n".join(
        [comparison([*rows, *(PUBLISHED[beside] if beside else ())], alpha=alpha), *map(on_one_line, notes)]
    )


def comparison(rows: Sequence[Row], *, alpha: float = 0.5) -> str:
    """Returns a table of the rows with their PT scores, and their sources below; unknown numbers are a dash.

    Raises:
        DataError: See :func:`pt_scores`.

    >>> print(comparison(PUBLISHED["amos-mri"]).splitlines()[3])
    nnU-Net, CT → MRI   87.4  83.3          -         -   -  [1]
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.scores))
    sources = list(dict.fromkeys(row.source for row in rows if row.source))
    cells = [("method", "mDice", *columns, "params, M", "FLOPs, G", "PT", "")]
    for row, trade_off in zip(rows, pt_scores(rows, alpha=alpha), strict=True):
        scores = (_rounded(row.scores.get(column), 1) for column in columns)
        numbers = (_rounded(row.params, 2), _rounded(row.flops, 2), _rounded(trade_off, 4))
        mark = f"[{sources.index(row.source) + 1}]" if row.source else ""
        cells.append((row.name, _rounded(row.dice, 1), *scores, *numbers, mark))
    score = f"mDice / highest mDice + {alpha:g} (fewest params / params + fewest FLOPs / FLOPs)"
    note = f"Scores in per cent. PT = {score}, over the rows shown."
    listed = [f"[{i}] {source}" for i, source in enumerate(sources, start=1)]
    return "\n".join([*align(cells, left=(0,)), note, *listed])


def row_of(run: Path) -> Row:
    """Reads what a run came to, as a row that is named by its folder."""
    result = result_of(run)
    cost = result.cost.as_trained
    dice, nsd = _per_cent(result.mean_dice), _per_cent(result.mean_nsd)
    scores = {} if nsd is None else {"mNSD": nsd}
    return Row(name=run.name, dice=dice, params=cost.params / 1e6, flops=cost.flops.paper / 1e9, scores=scores)


def _per_cent(share: float | None) -> float | None:
    return None if share is None or math.isnan(share) else 100 * share


def _rounded(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"

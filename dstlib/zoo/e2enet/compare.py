"""Runs side by side, and beside what was published."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dstlib.errors import require
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.evaluation.pt_score import Row
from dstlib.zoo.e2enet.evaluation.published import PUBLISHED, comparison
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, pooled
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


def row_of(run: Path) -> Row:
    """Reads what a run came to, as a row that is named by its folder."""
    result = result_of(run)
    cost = result.cost.sparse or result.cost.dense
    dice, nsd = _per_cent(result.mean_dice), _per_cent(result.mean_nsd)
    scores = {} if nsd is None else {"mNSD": nsd}
    return Row(name=run.name, dice=dice, params=cost.params / 1e6, flops=cost.flops.paper / 1e9, scores=scores)


def _per_cent(share: float | None) -> float | None:
    return None if share is None or math.isnan(share) else 100 * share

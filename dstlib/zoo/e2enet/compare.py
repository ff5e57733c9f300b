"""Runs side by side, and beside what was published."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dstlib.errors import require
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.evaluation.pt_score import Row
from dstlib.zoo.e2enet.evaluation.published import PUBLISHED, comparison
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, pooled
from dstlib.zoo.e2enet.training.records import result_of


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
        means = {"mNSD": 100 * scores.mean_of("nsd")}
        rows.append(replace(rows[0], name=name, dice=100 * scores.mean, scores=means))
    sizes = [f"{'×'.join(map(str, results[run].patch_size))} in {run.name}" for run in runs]
    note = f"FLOPs are of one patch, and compare for one size alone: {', '.join(sizes)}; published ones 128×128×128."
    return comparison([*rows, *(PUBLISHED[beside] if beside else ())], alpha=alpha) + "\n" + on_one_line(note)


def row_of(run: Path) -> Row:
    """Reads what a run came to, as a row that is named by its folder."""
    result = result_of(run)
    cost = result.cost.sparse or result.cost.dense
    scores = {} if result.mean_nsd is None else {"mNSD": 100 * result.mean_nsd}
    dice, params, flops = 100 * (result.mean_dice or 0.0), cost.params / 1e6, cost.flops.paper / 1e9
    return Row(name=run.name, dice=dice, params=params, flops=flops, scores=scores)

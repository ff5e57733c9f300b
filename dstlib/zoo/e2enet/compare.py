"""Runs side by side, and beside what was published."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstlib.errors import SettingError, StateError, explain
from dstlib.zoo.e2enet.evaluation.pt_score import Row
from dstlib.zoo.e2enet.evaluation.published import PUBLISHED, comparison


def compare(runs: Sequence[Path], *, beside: str | None = None, alpha: float = 0.5) -> str:
    """A table of finished runs: mDice, mNSD, parameters, FLOPs by the paper's convention, PT score over all rows.

    Raises:
        SettingError: Nothing was published under the name ``beside``.
        StateError: A run is not finished.
    """
    if beside is not None and beside not in PUBLISHED:
        allowed, remedy = f"one of {', '.join(PUBLISHED)}", "Leave it out to show the runs alone."
        raise SettingError(explain("--beside", "compare", allowed=allowed, given=beside, remedy=remedy))
    rows = [row_of(run) for run in runs]
    return comparison([*rows, *(PUBLISHED[beside] if beside else ())], alpha=alpha)


def row_of(run: Path, *, name: str | None = None) -> Row:
    """What a run came to; named by its folder unless given."""
    result = read_result(run)
    cost = result["cost"].get("sparse", result["cost"]["dense"])
    scores = {} if result["mean_nsd"] is None else {"mNSD": 100 * result["mean_nsd"]}
    return Row(
        name=name or run.name,
        dice=100 * (result["mean_dice"] or 0.0),
        params=cost["params"] / 1e6,
        flops=cost["flops"]["paper"] / 1e9,
        scores=scores,
    )


def read_result(run: Path) -> Mapping[str, Any]:
    """The content of a run's ``result.json``.

    Raises:
        StateError: There is none, or it is something else.
    """
    try:
        result: Mapping[str, Any] = json.loads((run / "result.json").read_text())
    except (OSError, ValueError) as error:
        remedy = "It is written last: finish the run with --resume."
        raise StateError(
            explain("result.json", f"run {run}", allowed="a finished run", given=error, remedy=remedy)
        ) from error
    return result

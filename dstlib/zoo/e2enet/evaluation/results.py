"""What a finished training comes to: tables on the screen, ``result.json`` and figures in the run directory.

Shapes: K foreground classes.
"""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dstlib.profile import Convention, profile
from dstlib.report import align
from dstlib.zoo.e2enet.data.cases import Cases
from dstlib.zoo.e2enet.evaluation.evaluate import Evaluation, predict
from dstlib.zoo.e2enet.evaluation.figures import flow_figure, flow_shares, learning_curve, slice_comparison
from dstlib.zoo.e2enet.training.run import Run
from dstlib.zoo.e2enet.training.train import Training

CONVENTIONS: tuple[Convention, ...] = ("exact", "paper")


def write_report(
    run: Run, training: Training, scores: Evaluation, held_out: Cases, *, patch_size: Sequence[int]
) -> None:
    """Prints the tables, then writes ``result.json`` and the figures."""
    cost = costs(training, patch_size)
    print(f"\n{scores.table()}\n\n{cost_table(cost, patch_size)}")
    masks = training.sparsifier.masks if training.sparsifier else {}
    run.write_result(
        {
            **scores.to_json(),
            "cost": cost,
            "patch_size": list(patch_size),
            "flows": flow_shares(training.model, masks),
            "final_loss": training.metrics[-1]["loss"],
            "mask_updates": training.updates,
            "versions": {"python": platform.python_version(), **{p: version(p) for p in ("dstlib", "torch", "monai")}},
        }
    )
    learning_curve(run.figures / "learning_curve.png", training.metrics, training.updates)
    if masks:
        flow_figure(run.figures / "flows.png", training.model, masks)
    _draw_median_case(run.figures / "slice.png", training, scores, held_out, patch_size)
    print(f"\nEverything is in {run.path}: config, metrics, checkpoint, result and figures.")


def costs(training: Training, patch_size: Sequence[int]) -> dict[str, Any]:
    """Parameters and FLOPs of one patch, of the network dense and, if it is, sparse."""
    shape = (1, training.model.config.in_channels, *patch_size)
    kinds = {"dense": None, **({"sparse": training.sparsifier} if training.sparsifier else {})}
    return {
        kind: {
            "params": profile(training.model, shape, sparsifier=masked).params,
            "flops": {c: profile(training.model, shape, sparsifier=masked, convention=c).flops for c in CONVENTIONS},
        }
        for kind, masked in kinds.items()
    }


def cost_table(cost: dict[str, Any], patch_size: Sequence[int]) -> str:
    """Dense and sparse, with what the two conventions mean below."""
    cells = [("network", "params", *(f"FLOPs, {c}" for c in CONVENTIONS))]
    cells += [
        (kind, f"{of['params']:,}", *(f"{of['flops'][c] / 1e9:,.3f} G" for c in CONVENTIONS))
        for kind, of in cost.items()
    ]
    if "sparse" in cost:
        of, dense = cost["sparse"], cost["dense"]
        flops = (f"{of['flops'][c] / dense['flops'][c]:.1%}" for c in CONVENTIONS)
        cells.append(("sparse / dense", f"{of['params'] / dense['params']:.1%}", *flops))
    size = "×".join(map(str, patch_size))
    note = (
        f"One forward pass of a {size} patch; inactive weights cost nothing. 'exact' counts the operations done;\n"
        "'paper' counts as E2ENet's tables do, where an up-convolution costs too much by the volume of its stride."
    )
    return "\n".join([*align(cells, left=(0,)), note])


def _draw_median_case(
    path: Path, training: Training, scores: Evaluation, held_out: Cases, patch_size: Sequence[int]
) -> None:
    """Neither the best nor the worst of the cases: the one whose mean Dice is the median."""
    ranked = sorted(range(len(scores.cases)), key=scores.case_mean)
    chosen = ranked[len(ranked) // 2]
    case = held_out.cases[chosen]
    prediction = predict(training.model, case.image, patch_size=patch_size)
    slice_comparison(path, case, prediction, held_out.classes, dice=scores.dice[chosen])

"""What a finished run comes to: tables on the screen, and ``result.json``, ``scores.csv`` and figures in its folder.

Shapes: K foreground classes.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from nibabel import aff2axcodes
from numpy.typing import NDArray
from torch import Tensor

from dstlib.files import write_json, write_whole
from dstlib.profile import Convention, profile
from dstlib.report import align, on_one_line
from dstlib.typed_json import sealed
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans.nifti import read_case_label, read_label, read_scan
from dstlib.zoo.e2enet.evaluation.evaluate import choose_postprocessing
from dstlib.zoo.e2enet.evaluation.figures import flow_figure, flow_shares, learning_curve, slice_comparison
from dstlib.zoo.e2enet.evaluation.scores import Evaluation
from dstlib.zoo.e2enet.network import E2ENet
from dstlib.zoo.e2enet.training.records import MODEL, RESULT, sha256_of
from dstlib.zoo.e2enet.training.run_directory import Run
from dstlib.zoo.e2enet.training.state import Training

CONVENTIONS: tuple[Convention, ...] = ("exact", "paper")


def write_report(
    run: Run,
    training: Training,
    scores: Evaluation,
    files: Sequence[CaseFiles],
    *,
    labels: Labels,
    patch_size: Sequence[int],
) -> None:
    """Prints the tables of a finished run, then writes ``scores.csv``, ``result.json`` and the figures.

    ``files`` are the held-out cases, whose predictions lie in the run; ``labels`` says what their values mean.
    """
    cost = costs(training, patch_size, in_channels=run.config["network"]["in_channels"])
    print(f"\n{scores.table()}\n\n{cost_table(cost, patch_size)}")
    helped = _postprocessing(run, files, labels)
    if helped:
        names = ", ".join(scores.classes[k - 1] for k in helped)
        print(f"\nKeeping the largest component alone helps {names}: `predict` does so.")
    write_whole(run.path / "scores.csv", scores.csv().encode())
    result = {
        **scores.to_json(),
        "cost": cost,
        "patch_size": list(patch_size),
        "postprocessing": list(helped),
        "flows": flow_shares(training.model, _masks(training)) if isinstance(training.model, E2ENet) else {},
        "final_loss": training.metrics[-1]["loss"],
        "mask_updates": training.updates,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("dstlib", "torch", "monai")}},
        "model_sha256": sha256_of(run.path / MODEL),
    }
    write_json(run.path / RESULT, sealed(result))
    _draw(run, training, scores, files, labels)
    what = "configuration, metrics, weights, predictions, scores and figures"
    print("\n" + on_one_line(f"Everything is in {run.path}: {what}."))


def _masks(training: Training) -> Mapping[str, Tensor]:
    return training.sparsifier.masks if training.sparsifier else {}


def costs(training: Training, patch_size: Sequence[int], *, in_channels: int) -> dict[str, Any]:
    """Counts parameters and FLOPs of one patch, of the network dense and, if it is, sparse."""
    shape, cost = (1, in_channels, *patch_size), {}
    for kind, masked in {"dense": None, **({"sparse": training.sparsifier} if training.sparsifier else {})}.items():
        counted = {c: profile(training.model, shape, sparsifier=masked, convention=c) for c in CONVENTIONS}
        cost[kind] = {"params": counted["exact"].params, "flops": {c: of.flops for c, of in counted.items()}}
    return cost


def cost_table(cost: dict[str, Any], patch_size: Sequence[int]) -> str:
    """Returns the table of :func:`costs`, dense and sparse, with what the two conventions mean below."""
    cells = [("network", "params", *(f"FLOPs, {c}" for c in CONVENTIONS))]
    for kind, of in cost.items():
        cells.append((kind, f"{of['params']:,}", *(f"{of['flops'][c] / 1e9:,.3f} G" for c in CONVENTIONS)))
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


def _postprocessing(run: Run, files: Sequence[CaseFiles], labels: Labels) -> tuple[int, ...]:
    """Chooses the classes to post-process, over the cases that could be predicted and have a label."""
    pairs = [(run.path / "predictions" / f"{case.name}.nii.gz", case) for case in files if case.label]
    pairs = [(prediction, case) for prediction, case in pairs if prediction.exists()]

    def read() -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        for prediction, case in pairs:
            yield read_label(prediction, labels).voxels.T, read_case_label(case, labels).voxels.T

    return choose_postprocessing(read, labels)


def case_of(files: CaseFiles, *, num_channels: int, labels: Labels) -> Case:
    """Reads a labelled case as its files have it, to be shown."""
    scan = read_scan(files, num_channels=num_channels, labels=labels)
    assert scan.label is not None
    return Case(scan.name, scan.image, scan.label, scan.spacing, "".join(aff2axcodes(scan.affine))[::-1])


def _draw(run: Run, training: Training, scores: Evaluation, files: Sequence[CaseFiles], labels: Labels) -> None:
    figures, masks = run.path / "figures", _masks(training)
    learning_curve(figures / "learning_curve.png", training.metrics, training.updates)
    if masks and isinstance(training.model, E2ENet):
        flow_figure(figures / "flows.png", training.model, masks)
    if not scores.cases:
        return
    chosen = scores.typical_case()
    found = next(case for case in files if case.name == scores.cases[chosen])
    case = case_of(found, num_channels=run.config["network"]["in_channels"], labels=labels)
    prediction = read_label(run.path / "predictions" / f"{case.name}.nii.gz", labels).voxels.T
    dice = dict(zip(scores.classes, scores.dice[chosen].tolist(), strict=True))
    slice_comparison(figures / "slice.png", case, prediction, labels, dice)

"""Evaluation of the files that a prediction left, in the geometry of the scans, and the postprocessing that would help.

Shapes: K foreground classes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.affines import voxel_sizes
from numpy.typing import NDArray
from tqdm import tqdm

from dstlib.bounds import is_out_of_memory
from dstlib.errors import DataError, few, require
from dstlib.report import abridge, on_one_line
from dstlib.workers import share
from dstlib.zoo.e2enet.data.layouts.files import by_case, reading
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans.defects import mismatches
from dstlib.zoo.e2enet.data.scans.nifti import read_case_label, read_label
from dstlib.zoo.e2enet.evaluation.metrics import Scoring, dice_per_class, dice_per_region, score, score_regions
from dstlib.zoo.e2enet.evaluation.scores import Evaluation
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest

Both = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # a label and a prediction, or the other way


class _Pair(NamedTuple):
    """A case and its prediction, if there is one."""

    case: CaseFiles
    prediction: Path | None


def evaluate_folder(
    predictions: Path,
    files: Sequence[CaseFiles],
    classes: Sequence[str],
    *,
    labels: Labels | None = None,
    scoring: Scoring | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Scores the prediction NAME.nii.gz of each case, or one of another ending, against its label, both as stored.

    ``labels`` says what the values of both files mean; by default class i has value i + 1. A region is what belongs to
    it in each file; what the label ignores counts nowhere, and is outside of every structure. A case without a
    prediction, or with a file that cannot be used, is left out of the means and listed with the reason. ``workers``
    processes score several cases at a time, with the same result; a script that asks for them needs
    ``if __name__ == "__main__":``.

    Raises:
        SettingError: The number of workers or of tolerances cannot be used.
        DataError: Two predictions share a name, or no case could be scored; the message lists every reason.
    """
    scoring, labels = scoring or Scoring(), labels or Labels.consecutive(len(classes))
    tolerances = scoring.tolerances(len(classes))
    where = "the evaluation"
    require(
        workers >= 0,
        "workers",
        where,
        allowed="0 or more",
        given=workers,
        remedy="Pass 0 (--workers 0) to score in this process.",
    )
    predicted = predicted_files(predictions)
    pairs = [_Pair(case, predicted.get(case.name)) for case in files]
    work = partial(_score_files, labels=labels, scoring=scoring)
    remedy = "Try again with fewer workers (--workers)."
    scored_pairs = share(work, pairs, workers=workers, where=where, remedy=remedy, lost=_lost)
    with (
        closing(scored_pairs),
        tqdm(scored_pairs, desc="evaluate", unit="case", total=len(pairs), disable=not progress) as bar,
    ):
        found = dict(bar)
    results = {pair.case.name: found[pair] for pair in pairs}
    reasons = {name: result for name, result in results.items() if isinstance(result, str)}
    scored = {name: result for name, result in results.items() if not isinstance(result, str)}
    if not scored:
        lines = abridge([on_one_line(f"{name}: {reason}") for name, reason in reasons.items()], [*reasons])
        listed = "".join(f"\n  {line}" for line in lines)
        allowed, given = "a label and a prediction for some case that can be scored", f"none of {len(files)}"
        remedy = f"Predict into this folder first, or mend what is there.{listed}"
        raise DataError.of("predictions", str(predictions), allowed=allowed, given=given, remedy=remedy)
    values, volumes = zip(*scored.values(), strict=True)
    scores = dict(zip(scoring.metrics, np.stack(values, axis=1), strict=True))
    evaluation = Evaluation(tuple(scored), tuple(classes), scores, np.stack(volumes), tolerances, reasons)
    return evaluation if scoring.penalty is None else evaluation.penalised(scoring.penalty)


def predicted_files(folder: Path) -> dict[str, Path]:
    """Finds the label files of a folder by the names of their cases: NAME.nii.gz, NAME.nii, or of another format.

    Raises:
        DataError: The folder cannot be read, or two files share a name.
    """
    allowed, given, remedy = "a folder of label files", "no such folder", "Predict into it first."
    require(folder.is_dir(), "predictions", str(folder), allowed=allowed, given=given, remedy=remedy, error=DataError)
    with reading(folder):
        found = by_case(folder)
    twice = [" beside ".join(file.name for file in files) for files in found.values() if len(files) > 1]
    allowed, remedy = "one file per case", "Remove those that are not to be scored."
    given = few(twice)
    require(not twice, "predictions", str(folder), allowed=allowed, given=given, remedy=remedy, error=DataError)
    return {name: file for name, (file,) in found.items()}


def choose_postprocessing(pairs: Callable[[], Iterable[Both]], labels: Labels) -> tuple[int, ...]:
    """Returns the classes, or regions, whose mean Dice over the validation cases rises by :func:`keep_largest`.

    ``pairs`` reads the prediction and the label of each case, one at a time, by numbers in memory: once for classes,
    of which no other can lose, as what is removed becomes background; and once per region, as regions share voxels.
    They are tried in their order, each on what those before it have left, and kept where no other loses.

    Reference: nnU-Net's choice of postprocessing, class by class; it also tries all foreground as one, first, and does
    not look at what other regions lose.
    """
    everything = tuple(range(1, labels.num_classes + 1))
    if labels.regions is None:
        gains = _gains(pairs(), (), everything, labels)
        return tuple(k for k in everything if gains[k - 1] > 0)
    chosen: tuple[int, ...] = ()
    for k in everything:
        gains = _gains(pairs(), chosen, (*chosen, k), labels)
        if gains[k - 1] > 0 and gains.min() >= 0:
            chosen = (*chosen, k)
    return chosen


def _gains(pairs: Iterable[Both], before: Sequence[int], after: Sequence[int], labels: Labels) -> NDArray[np.float64]:
    """Adds up over the cases how much Dice (K,) is gained where more classes are reduced to their largest component."""
    gains = np.zeros(labels.num_classes)
    for prediction, label in pairs:
        fewer, more = (keep_largest(prediction, classes, labels.members) for classes in (before, after))
        gains += np.nan_to_num(_dice(label, more, labels) - _dice(label, fewer, labels))
    return gains


def _dice(label: NDArray[np.uint8], prediction: NDArray[np.uint8], labels: Labels) -> NDArray[np.float64]:
    label, prediction = _counted(label, prediction, labels)
    if labels.regions is None:
        return dice_per_class(label, prediction, num_classes=labels.num_classes)
    return dice_per_region(label, prediction, regions=labels.members)


def _counted(label: NDArray[np.uint8], prediction: NDArray[np.uint8], labels: Labels) -> Both:
    """Takes out of both volumes what the label says is to be ignored: as if neither had anything there."""
    if labels.ignored is None:
        return label, prediction
    is_counted = label != labels.ignored_number
    return label * is_counted, prediction * is_counted


def _score_files(
    pair: _Pair, *, labels: Labels, scoring: Scoring
) -> tuple[NDArray[np.floating], NDArray[np.floating]] | str:
    """Scores one prediction: its values (M, K), a row per metric, and volumes (K, 2) in ml; or says why it cannot."""
    if pair.case.label is None:
        return "no label"
    if pair.prediction is None:
        return f"no prediction {pair.case.name}.nii.gz"
    try:
        return _score(pair.case, pair.prediction, labels=labels, scoring=scoring)
    except DataError as error:
        return " ".join(str(error).split())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return f"does not fit into memory: {error}"


def _lost(pair: _Pair) -> str:
    return "the system ended the process that scored it, most likely for want of memory"


def _score(
    case: CaseFiles, file: Path, *, labels: Labels, scoring: Scoring
) -> tuple[NDArray[np.floating], NDArray[np.floating]] | str:
    label = read_case_label(case, labels)
    prediction = read_label(file, labels, geometry=case.geometry)
    if reasons := mismatches(prediction, label, "its label"):
        return f"the prediction {reasons[0]}"
    spacing = [float(size) for size in voxel_sizes(label.affine)[::-1]]
    predicted = keep_largest(prediction.voxels.T, scoring.postprocessing, labels.members)
    volumes = _counted(label.voxels.T, predicted, labels)
    if labels.regions is None:
        found = score(*volumes, spacing=spacing, num_classes=labels.num_classes, scoring=scoring)
    else:
        found = score_regions(*volumes, spacing=spacing, regions=labels.members, scoring=scoring)
    return found.values, found.num_voxels * (float(np.prod(spacing)) / 1000)

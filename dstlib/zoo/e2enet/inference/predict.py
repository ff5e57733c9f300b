"""Prediction, from image files to label files: what a trained network finds, in the geometry of each image.

Shapes: C channels, K foreground classes, D, H, W depth, height, width in voxels.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from dstlib.errors import DataError, SettingError, StateError, require
from dstlib.files import make_folder, write_json
from dstlib.report import align
from dstlib.zoo.e2enet.data.layouts.detect import folder_cases
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation, place_back, prepare_image
from dstlib.zoo.e2enet.data.scans.nifti import Scan, read_scan, write_label
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest
from dstlib.zoo.e2enet.inference.sliding_window import probabilities

RECORD = "prediction.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """All that a prediction needs: the networks of the folds, and how images were prepared for them.

    ``mirror`` names the spatial axes to flip; ``postprocessing`` the classes of which the largest component is kept.

    Raises:
        SettingError: There is no network, or ``postprocessing`` names a class that there is not.
    """

    models: tuple[nn.Module, ...]
    preparation: Preparation
    patch_size: tuple[int, int, int]
    mirror: tuple[int, ...]
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    postprocessing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where, remedy = "Trained", "Pass one network per fold."
        require(len(self.models) > 0, "models", where, allowed="one or more", given="none", remedy=remedy)
        foreign = [k for k in self.postprocessing if not 1 <= k <= len(self.classes)]
        allowed, remedy = f"classes 1 to {len(self.classes)}", "Choose it on these classes."
        require(not foreign, "postprocessing", where, allowed=allowed, given=foreign, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case: its file (``kept`` if it was there before), or the error in words."""

    name: str
    file: Path | None
    error: str | None
    kept: bool = False


def predict_folder(
    trained: Trained, images: Path, output: Path, *, overwrite: bool = False, progress: bool = True
) -> tuple[Outcome, ...]:
    """Predicts every image of a folder into ``output``/NAME.nii.gz; see :func:`predict_scans`.

    Raises:
        DataError: The folder holds no images, or they do not go together.
        SettingError: See :func:`predict_scans`.
    """
    files = folder_cases(images, num_channels=len(trained.channels))
    return predict_scans(trained, files, output, overwrite=overwrite, progress=progress)


def predict_scans(
    trained: Trained, files: Sequence[CaseFiles], output: Path, *, overwrite: bool = False, progress: bool = True
) -> tuple[Outcome, ...]:
    """Predicts the images of each case into ``output``/NAME.nii.gz, labels in the image's own geometry.

    A file that is there is kept unless ``overwrite``, so an interrupted prediction is continued by repeating it;
    ``prediction.json`` says of which networks the files are, and others are refused.
    A case that cannot be used is reported in its outcome, and the others go on. Files appear whole: a name that is
    there is a finished prediction, whenever the process was stopped.

    Raises:
        SettingError: A prediction would take the place of an input.
        StateError: A prediction cannot be written; the disk is full, say. The folder holds those of other networks.
    """
    targets = {case.name: output / f"{case.name}.nii.gz" for case in files}
    _refuse_inputs(files, targets)
    make_folder(output)
    _refuse_other_networks(trained, output / RECORD, overwrite=overwrite)
    outcomes = []
    with tqdm(files, desc="predict", unit="case", disable=not progress) as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            target, error = targets[case.name], None
            kept = target.exists() and not overwrite
            try:
                if not kept:
                    scan = read_scan(case, num_channels=len(trained.channels), num_classes=0, with_label=False)
                    write_label(target, predict_scan(trained, scan), scan.affine)
            except DataError as refused:
                error = str(refused)
            except (MemoryError, torch.OutOfMemoryError) as refused:  # one huge scan must not stop the others
                error = f"does not fit into memory: {refused}"
            outcomes.append(Outcome(name=case.name, file=target if error is None else None, error=error, kept=kept))
    return tuple(outcomes)


def predict_scan(trained: Trained, scan: Scan) -> NDArray[np.uint8]:
    """Segments one scan: the label (D, H, W), as its image is stored."""
    image, placement = prepare_image(scan.image, scan.affine, trained.preparation)
    found = probabilities(trained.models, image, patch_size=trained.patch_size, mirror=trained.mirror)
    return keep_largest(place_back(found, placement), trained.postprocessing)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """Lists the cases that failed, a line each, and counts all."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    num_kept = sum(outcome.kept for outcome in outcomes)
    counts = f"{len(outcomes) - len(failed) - num_kept} predicted, {num_kept} kept as they were, {len(failed)} failed"
    if not failed:
        return counts
    cells = [("case", "error"), *((outcome.name, " ".join(str(outcome.error).split())) for outcome in failed)]
    return "\n".join([*align(cells, left=(0, 1)), counts])


def _refuse_other_networks(trained: Trained, record: Path, *, overwrite: bool) -> None:
    made_by = {
        "networks": [_digest(model) for model in trained.models],
        "patch_size": list(trained.patch_size),
        "mirror": list(trained.mirror),
        "postprocessing": list(trained.postprocessing),
    }
    if record.exists() and not overwrite:
        try:
            is_same = json.loads(record.read_text()) == made_by
        except ValueError:
            is_same = False
        if not is_same:
            allowed, given = "predictions of these networks", "those of other networks or settings"
            remedy = "Choose another folder, or overwrite (--overwrite)."
            raise StateError.of("files", f"folder {record.parent}", allowed=allowed, given=given, remedy=remedy)
    write_json(record, made_by)


def _digest(model: nn.Module) -> str:
    """Computes a checksum of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_inputs(files: Sequence[CaseFiles], targets: dict[str, Path]) -> None:
    inputs = {file.resolve() for case in files for file in (*case.images, *((case.label,) if case.label else ()))}
    taken = sorted(str(target) for target in targets.values() if target.resolve() in inputs)
    if taken:
        allowed, given = "another folder than that of the images and labels", f"one where {taken[0]} is an input"
        remedy = "Choose a folder of its own for the predictions."
        raise SettingError.of("output folder", "a prediction", allowed=allowed, given=given, remedy=remedy)

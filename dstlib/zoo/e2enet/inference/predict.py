"""Prediction, from image files to label files: what a trained network finds, in the geometry of each image.

Shapes: C channels, K foreground classes, D, H, W depth, height, width in voxels.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from dstlib.bounds import is_out_of_memory, require_memory
from dstlib.errors import DataError, SettingError, StateError, require
from dstlib.files import alone_in, write_json
from dstlib.report import abridge, align, on_one_line
from dstlib.typed_json import OPTIONAL, read_json
from dstlib.zoo.e2enet.data.layouts.detect import folder_cases
from dstlib.zoo.e2enet.data.layouts.labels import ORDINARY, Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Geometry, refuse_copies
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation, place_back, prepare_image
from dstlib.zoo.e2enet.data.preprocessing.resampling import most_probable, topmost
from dstlib.zoo.e2enet.data.scans.geometry import Placement, box_shape
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, write_label
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest
from dstlib.zoo.e2enet.inference.sliding_window import memory_needed, probabilities, softmax

RECORD = "prediction.json"
ENDING = ".nii.gz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """All that a prediction needs: the networks of the folds, and how images were prepared for them.

    ``labels`` says in which values the ``classes`` are written; by default class i has value i + 1. ``geometry`` is the
    rule by which headers are read. ``mirror`` names the spatial axes to flip; ``postprocessing`` the classes of which
    the largest component is kept.

    Raises:
        SettingError: There is no network, or ``postprocessing`` names a class that there is not.
    """

    models: tuple[nn.Module, ...]
    preparation: Preparation
    patch_size: tuple[int, int, int]
    mirror: tuple[int, ...]
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Labels = ORDINARY
    geometry: Geometry = "itk"
    postprocessing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.labels == ORDINARY:
            object.__setattr__(self, "labels", Labels.consecutive(len(self.classes)))  # as it is frozen
        where, remedy = "Trained", "Pass one network per fold."
        require(len(self.models) > 0, "models", where, allowed="one or more", given="none", remedy=remedy)
        foreign = [k for k in self.postprocessing if not 1 <= k <= len(self.classes)]
        allowed, remedy = f"classes 1 to {len(self.classes)}", "Choose it on these classes."
        require(not foreign, "postprocessing", where, allowed=allowed, given=foreign, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case: its file (``kept`` if it was there before), or the error in words.

    ``odd`` says what was legal, but seldom meant, in its images.
    """

    name: str
    file: Path | None
    error: str | None
    kept: bool = False
    odd: tuple[str, ...] = ()


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

    A file that is there is kept unless ``overwrite``, so an interrupted prediction is continued by repeating it.
    ``prediction.json`` says of which networks and settings all predictions of the folder are: where there are others,
    or any of unknown origin, ``overwrite`` removes those of the same cases before the first is predicted, and more than
    these are refused. One process predicts into a folder at a time.
    A case that cannot be used is reported in its outcome, and the others go on. Files appear whole: a name that is
    there is a finished prediction, whenever the process was stopped.

    Raises:
        SettingError: The folder is that of the images or labels.
        DataError: Two cases share a name.
        StateError: A prediction cannot be written; the disk is full, say. The folder holds predictions of other
            networks, or another process predicts into it.
    """
    refuse_copies(output, files)
    targets = {case.name: output / f"{case.name}{ENDING}" for case in files}
    _refuse_inputs(files, output)
    with alone_in(output):
        _begin(_MadeBy.of(trained), output, list(targets.values()), overwrite=overwrite)
        outcomes = []
        with tqdm(files, desc="predict", unit="case", disable=not progress) as bar:
            for case in bar:
                bar.set_postfix_str(case.name)
                outcome = _predict_case(trained, case, targets[case.name], overwrite=overwrite, progress=progress)
                outcomes.append(outcome)
    return tuple(outcomes)


def predict_scan(
    trained: Trained, image_CDHW: NDArray[np.float32], placement: Placement, *, title: str | None = None
) -> NDArray[np.uint8]:
    """Segments one scan that was prepared: the label (D, H, W), as it is stored, by the numbers of classes in memory.

    With a ``title``, a bar counts the windows.

    Raises:
        DataError: It needs more memory than is left, or the result is not finite.
    """
    _require_memory(trained, len(image_CDHW), placement)
    labels = trained.labels
    overlaps = labels.regions is not None
    with closing(
        probabilities(
            trained.models,
            image_CDHW,
            patch_size=trained.patch_size,
            mirror=trained.mirror,
            activate=torch.sigmoid if overlaps else softmax,
            title=title,
        )
    ) as slices:
        decide = partial(topmost, numbers=labels.written_numbers) if overlaps else most_probable
        label = place_back(slices, placement, decide=decide)
    return keep_largest(label, trained.postprocessing, labels.members)


def _require_memory(trained: Trained, num_channels: int, placement: Placement) -> None:
    """Refuses a scan before the work, which may take hours, where memory would be out in the midst of it."""
    num_outputs = trained.labels.num_outputs
    num_voxels = math.prod(placement.stored_shape)
    label, components = 2 * num_voxels, 9 * num_voxels  # as it is turned back, and where the largest are looked for
    planes = 4 * num_outputs * (math.prod(placement.shape[1:]) + math.prod(box_shape(placement.box)[1:]))
    windows = memory_needed(placement.shape, trained.patch_size, num_channels=num_channels, num_outputs=num_outputs)
    on_cpu = next(trained.models[0].parameters()).device.type == "cpu"
    size = "×".join(map(str, placement.shape))
    require_memory(
        label + max(components, 3 * planes + windows * on_cpu),
        "memory",
        f"a prediction of {size} voxels and {num_outputs} outputs",
        remedy="Predict this scan where there is more, or crop it.",
        error=DataError,
    )


def _predict_case(
    trained: Trained, case: CaseFiles, target: Path, *, overwrite: bool, progress: bool = False
) -> Outcome:
    error, kept = None, target.is_file() and not overwrite
    odd: tuple[str, ...] = ()
    try:
        if not kept:
            placed = replace(case, geometry=trained.geometry)
            examined = examine_scan(placed, num_channels=len(trained.channels), labels=None)
            odd = tuple(on_one_line(f"{fault.file.name} {fault.text}") for fault in examined.warnings)
            if examined.scan is None:
                return Outcome(name=case.name, file=None, error="; ".join(map(str, examined.defects)))
            scan = examined.scan
            image, placement = prepare_image(scan.image, scan.affine, trained.preparation)
            place = scan.place
            del examined, scan  # the image as stored, which the windows do not need: they may take hours, and gigabytes
            label = predict_scan(trained, image, placement, title=case.name if progress else None)
            write_label(target, trained.labels.to_values(label), place)
    except DataError as refused:
        error = str(refused)
    except (MemoryError, RuntimeError) as refused:  # one huge scan must not stop the others
        if not is_out_of_memory(refused):
            raise
        error = f"does not fit into memory: {refused}"
    return Outcome(name=case.name, file=target if error is None else None, error=error, kept=kept, odd=odd)


def outcome_table(outcomes: Sequence[Outcome], *, whole: bool = False) -> str:
    """Lists the cases that failed, and what was odd, ten at most of a kind unless the ``whole`` list is asked for."""
    failed = [(outcome.name, outcome.error) for outcome in outcomes if outcome.error is not None]
    odd = [(outcome.name, f"warning: {text}") for outcome in outcomes for text in outcome.odd]
    num_kept = sum(outcome.kept for outcome in outcomes)
    counts = f"{len(outcomes) - len(failed) - num_kept} predicted, {num_kept} kept as they were, {len(failed)} failed"
    if not failed and not odd:
        return counts
    cells = [("case", "finding"), *((name, " ".join(text.split())) for name, text in (*failed, *odd))]
    head, rule, *lines = align(cells, left=(0, 1))
    told = lines if whole else abridge(lines, [name for name, _ in (*failed, *odd)], whole="--all lists them")
    return "\n".join([head, rule, *told, counts])


@dataclass(frozen=True, kw_only=True)
class _MadeBy:
    """What predictions depend on beside their images, as the record of a folder says it."""

    networks: tuple[str, ...]
    patch_size: tuple[int, int, int]
    mirror: tuple[int, ...]
    postprocessing: tuple[int, ...]
    geometry: Geometry = field(default="sform", metadata={OPTIONAL: True})  # as of before

    @staticmethod
    def of(trained: Trained) -> "_MadeBy":
        return _MadeBy(
            networks=tuple(map(_digest, trained.models)),
            patch_size=trained.patch_size,
            mirror=tuple(trained.mirror),
            postprocessing=tuple(trained.postprocessing),
            geometry=trained.geometry,
        )


def _begin(made_by: _MadeBy, output: Path, targets: Sequence[Path], *, overwrite: bool) -> None:
    """Makes the record of a folder true: of what is to be predicted, and of every prediction that is there already."""
    record, found = output / RECORD, None
    there = sorted(file for file in output.glob(f"[!.]*{ENDING}") if file.is_file())
    remedy = "Choose another folder; --overwrite replaces those of the cases that are predicted now, and no others."
    if there:
        try:
            found = read_json(record, _MadeBy, remedy=f"Nothing says of which networks the predictions are. {remedy}")
        except StateError:
            if not overwrite:
                raise
    if found == made_by:
        return
    if others := sorted({*there} - {*targets}) if overwrite else there:
        names = ", ".join(file.name for file in others[:3]) + ", ..." * (len(others) > 3)
        allowed, given = "those of these networks and settings", f"others: {names}"
        raise StateError.of("predictions", f"folder {output}", allowed=allowed, given=given, remedy=remedy)
    for file in there:  # before the record says otherwise: whenever this is stopped, it is true of all that is there
        file.unlink()
    write_json(record, asdict(made_by))


def _digest(model: nn.Module) -> str:
    """Computes a checksum of the weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_inputs(files: Sequence[CaseFiles], output: Path) -> None:
    """Refuses the folder of an input: a prediction would replace it, or be taken for one the next time."""
    inputs = [file for case in files for file in (*case.images, *case.label_files)]
    of_cases = [image.parent for case in files for image in case.images if image.parent.name == case.name]
    folder = output.resolve()
    found = next(
        (
            file
            for file in (*inputs, *of_cases)
            if folder in (file.resolve(), file.parent.resolve(), file.resolve().parent)
        ),
        None,
    )
    if found is not None:
        allowed, remedy = "another folder than that of the images and labels", "Choose one for the predictions alone."
        given = f"{output}, where {found.name} is an input"
        raise SettingError.of("output folder", "a prediction", allowed=allowed, given=given, remedy=remedy)

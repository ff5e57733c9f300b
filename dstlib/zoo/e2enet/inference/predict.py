"""Prediction, from image files to label files: what a trained network finds, in the geometry of each image.

Shapes: C channels, K foreground classes, D, H, W depth, height, width in voxels.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dstlib.bounds import available_memory, is_out_of_memory, most_memory, require_memory
from dstlib.errors import DataError, SettingError, StateError, require
from dstlib.files import alone_in, write_json
from dstlib.report import abridge, align, on_one_line
from dstlib.typed_json import OPTIONAL, read_json
from dstlib.zoo.e2enet.data.cases import Shape
from dstlib.zoo.e2enet.data.layouts.detect import folder_cases
from dstlib.zoo.e2enet.data.layouts.labels import ORDINARY, Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Geometry, refuse_copies
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation, place_back, prepare_image
from dstlib.zoo.e2enet.data.preprocessing.resampling import most_probable, topmost
from dstlib.zoo.e2enet.data.scans.geometry import Placement, box_shape
from dstlib.zoo.e2enet.data.scans.header import Header
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, write_label
from dstlib.zoo.e2enet.inference.empty import empty_ranges, without_empty
from dstlib.zoo.e2enet.inference.line import Helper, Progress
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest
from dstlib.zoo.e2enet.inference.sliding_window import (
    Windows,
    memory_needed,
    num_passes,
    probabilities,
    sigmoid,
    softmax,
    windows_of,
)

RECORD = "prediction.json"
ENDING = ".nii.gz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """All that a prediction needs: the networks of the folds, and how images were prepared for them.

    ``labels`` says in which values the ``classes`` are written; by default class i has value i + 1. ``geometry`` is the
    rule by which headers are read. ``mirror`` names the spatial axes to flip; ``postprocessing`` the classes of which
    the largest component is kept. With ``skip_empty`` windows that hold nothing are not read, but taken to be
    background: see :func:`dstlib.zoo.e2enet.inference.empty.empty_ranges`.

    Raises:
        SettingError: There is no network, ``postprocessing`` names a class that there is not, or ``skip_empty`` is
            asked of a preparation that has no threshold for that.
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
    skip_empty: bool = False

    def __post_init__(self) -> None:
        if self.labels == ORDINARY:
            object.__setattr__(self, "labels", Labels.consecutive(len(self.classes)))  # as it is frozen
        where, remedy = "Trained", "Pass one network per fold."
        require(len(self.models) > 0, "models", where, allowed="one or more", given="none", remedy=remedy)
        foreign = [k for k in self.postprocessing if not 1 <= k <= len(self.classes)]
        allowed, remedy = f"classes 1 to {len(self.classes)}", "Choose it on these classes."
        require(not foreign, "postprocessing", where, allowed=allowed, given=foreign, remedy=remedy)
        if self.skip_empty and empty_ranges(self.preparation) is None:
            allowed = "channels that are CTs, or standardised inside the patient's mask: in others air has no value"
            given = ", ".join(rule.kind for rule in self.preparation.normalization)
            remedy = "Read all windows: leave --skip-empty out."
            raise SettingError.of("skip_empty", where, allowed=allowed, given=given, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case: its file (``kept`` if it was there before), or the error in words.

    ``odd`` says what was legal, but seldom meant, in its images. ``skipped`` has how many windows held nothing, and of
    how many, if these were skipped.
    """

    name: str
    file: Path | None
    error: str | None
    kept: bool = False
    odd: tuple[str, ...] = ()
    skipped: tuple[int, int] | None = None


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

    While a case is computed, a thread writes the one before, and reads and prepares the one after it, if as much memory
    is left then as the process has held so far: so two prepared scans and two labels are held at most. A prediction
    that is computed is written even if the process is interrupted meanwhile.

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
        record = _begin(_MadeBy.of(trained), output, list(targets.values()), overwrite=overwrite)
        outcomes = {
            name: Outcome(name=name, file=target, error=None, kept=True)
            for name, target in targets.items()
            if target.is_file() and not overwrite
        }
        left = [case for case in files if case.name not in outcomes]
        bar = Progress(len(left), hidden=not progress)
        with closing(bar):
            outcomes |= {outcome.name: outcome for outcome in _predict_in_turn(trained, left, output, record, bar)}
    return tuple(outcomes[case.name] for case in files)


def scan_windows(trained: Trained, image_CDHW: NDArray[np.float32]) -> Windows:
    """Lays windows over a prepared scan, and marks those that hold nothing, if these are to be skipped."""
    windows = windows_of(image_CDHW.shape[1:], trained.patch_size)
    ranges = empty_ranges(trained.preparation) if trained.skip_empty else None
    return windows if ranges is None else without_empty(windows, image_CDHW, ranges)


def predict_scan(
    trained: Trained,
    image_CDHW: NDArray[np.float32],
    placement: Placement,
    windows: Windows,
    *,
    on_pass: Callable[[int], None] = lambda num: None,
) -> NDArray[np.uint8]:
    """Segments one scan that was prepared: the label (D, H, W), as it is stored, by the numbers of classes in memory.

    ``on_pass`` is told of passes through the networks: see :func:`probabilities`.

    Raises:
        DataError: It needs more memory than is left, or the result is not finite.
    """
    _require_memory(trained, len(image_CDHW), placement, windows)
    labels = trained.labels
    overlaps = labels.regions is not None
    with closing(
        probabilities(
            trained.models,
            image_CDHW,
            windows,
            mirror=trained.mirror,
            activate=sigmoid if overlaps else softmax,
            background=[0.0 if overlaps or k else 1.0 for k in range(labels.num_outputs)],
            on_pass=on_pass,
        )
    ) as slices:
        decide = partial(topmost, numbers=labels.written_numbers) if overlaps else most_probable
        label = place_back(slices, placement, axis=windows.axis, decide=decide)
    return keep_largest(label, trained.postprocessing, labels.members)


def _require_memory(trained: Trained, num_channels: int, placement: Placement, windows: Windows) -> None:
    """Refuses a scan before the work, which may take hours, where memory would be out in the midst of it."""
    num_outputs = trained.labels.num_outputs
    num_voxels = math.prod(placement.stored_shape)
    label, components = 2 * num_voxels, 9 * num_voxels  # as it is turned back, and where the largest are looked for
    planes = 4 * num_outputs * sum(math.prod(shape) // shape[windows.axis] for shape in _shapes(placement))
    work = memory_needed(windows, num_channels=num_channels, num_outputs=num_outputs)
    on_cpu = next(trained.models[0].parameters()).device.type == "cpu"
    size = "×".join(map(str, placement.shape))
    require_memory(
        label + max(components, 3 * planes + work * on_cpu),
        "memory",
        f"a prediction of {size} voxels and {num_outputs} outputs",
        remedy="Predict this scan where there is more, or crop it.",
        error=DataError,
    )


def _shapes(placement: Placement) -> tuple[Shape, Shape]:
    """Returns the shapes of a scan as it was prepared, and as it was before."""
    return placement.shape, box_shape(placement.box)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A case that was read: its image as the networks see it, how it got there, its windows, and where it lies."""

    name: str
    image: NDArray[np.float32]
    placement: Placement
    windows: Windows
    place: Header
    odd: tuple[str, ...]


def _predict_in_turn(
    trained: Trained, cases: Sequence[CaseFiles], output: Path, record: "_MadeBy", bar: Progress
) -> Iterator[Outcome]:
    """Predicts the cases one after the other, while a thread reads the next one and writes the last."""
    ahead: Future[_Prepared | Outcome] | None = None
    writing: Future[Outcome] | None = None

    def on_pass(num: int) -> None:
        nonlocal ahead
        bar.step(num)
        if writing is not None and writing.done():
            writing.result()  # where the disk is full, the next hours would be for nothing
        # What this case takes has been taken by now: sums, and the networks' own.
        if ahead is None and following is not None and available_memory() >= most_memory():
            ahead = helper.start(partial(_read, trained, following))

    with Helper() as helper:
        for number, case in enumerate(cases, start=1):
            following = next(iter(cases[number:]), None)
            read = _taken(ahead) or _read(trained, case)
            ahead = None
            if isinstance(read, Outcome):
                bar.leave_out()
                yield read
                continue
            found = _predict_case(trained, read, bar, on_pass)
            del read
            if writing is not None:
                yield writing.result()
                writing = None
            if isinstance(found, Outcome):
                yield found
                continue
            label, place, outcome = found
            if outcome.skipped is not None:
                record = replace(record, skipped=record.skipped | {case.name: outcome.skipped})
            write = partial(_write, output, record, trained.labels.to_values(label), place, outcome)
            writing = helper.start(write, is_owed=True)
            del found, label, write
        if writing is not None:
            yield writing.result()


def _taken(ahead: "Future[_Prepared | Outcome] | None") -> _Prepared | None:
    """Returns what was read ahead; None where that failed, for want of memory say: then it is read once more, alone."""
    if ahead is None or ahead.exception() is not None:
        return None
    read = ahead.result()
    return read if isinstance(read, _Prepared) else None


def _read(trained: Trained, case: CaseFiles) -> _Prepared | Outcome:
    """Reads and prepares a case, or says why that cannot be."""
    odd: tuple[str, ...] = ()
    try:
        placed = replace(case, geometry=trained.geometry)
        examined = examine_scan(placed, num_channels=len(trained.channels), labels=None)
        odd = tuple(on_one_line(f"{fault.file.name} {fault.text}") for fault in examined.warnings)
        if examined.scan is None:
            return Outcome(name=case.name, file=None, error="; ".join(map(str, examined.defects)))
        scan = examined.scan
        image, placement = prepare_image(scan.image, scan.affine, trained.preparation)
        windows = scan_windows(trained, image)
        return _Prepared(case.name, image, placement, windows, scan.place, odd)  # without the image as stored
    except (DataError, MemoryError, RuntimeError) as error:
        return Outcome(name=case.name, file=None, error=_told(error), odd=odd)


def _predict_case(
    trained: Trained, read: _Prepared, bar: Progress, on_pass: Callable[[int], None]
) -> tuple[NDArray[np.uint8], Header, Outcome] | Outcome:
    """Segments a case that was read: its label, where it lies, and what is to be told; or why that cannot be."""
    windows = read.windows
    skipped = (sum(windows.is_empty), len(windows.places)) if trained.skip_empty else None
    outcome = Outcome(name=read.name, file=None, error=None, odd=read.odd, skipped=skipped)
    bar.begin(read.name, windows.num_read * num_passes(trained.models, trained.mirror))
    try:
        label = predict_scan(trained, read.image, read.placement, windows, on_pass=on_pass)
    except (DataError, MemoryError, RuntimeError) as error:
        return replace(outcome, error=_told(error))
    finally:
        bar.end()
    return label, read.place, outcome


def _write(output: Path, record: "_MadeBy", values: NDArray[np.uint8], place: Header, outcome: Outcome) -> Outcome:
    """Writes a label, and before it what the record has to say of it."""
    target = output / f"{outcome.name}{ENDING}"
    try:
        if outcome.skipped is not None:
            write_json(output / RECORD, asdict(record))
        write_label(target, values, place)
    except (DataError, MemoryError, RuntimeError) as error:
        return replace(outcome, error=_told(error))
    return replace(outcome, file=target)


def _told(error: Exception) -> str:
    """Words an error that is of one case alone; raises any other: one huge scan must not stop the others."""
    if isinstance(error, DataError):
        return str(error)
    if not is_out_of_memory(error):
        raise error
    return f"does not fit into memory: {error}"


def outcome_table(outcomes: Sequence[Outcome], *, whole: bool = False) -> str:
    """Lists the cases that failed, and what was odd, ten at most of a kind unless the ``whole`` list is asked for."""
    failed = [(outcome.name, outcome.error) for outcome in outcomes if outcome.error is not None]
    odd = [(outcome.name, f"warning: {text}") for outcome in outcomes for text in outcome.odd]
    num_kept = sum(outcome.kept for outcome in outcomes)
    counts = f"{len(outcomes) - len(failed) - num_kept} predicted, {num_kept} kept as they were, {len(failed)} failed"
    skipped = [outcome.skipped for outcome in outcomes if outcome.skipped is not None]
    if skipped:
        num, of = map(sum, zip(*skipped, strict=True))
        counts += f"\n{num:,} of {of:,} windows held nothing and were skipped"
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
    skip_empty: bool = field(default=False, metadata={OPTIONAL: True})
    # of each case, how many windows were skipped, of how many
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, metadata={OPTIONAL: True})

    @staticmethod
    def of(trained: Trained) -> "_MadeBy":
        return _MadeBy(
            networks=tuple(map(_digest, trained.models)),
            patch_size=trained.patch_size,
            mirror=tuple(trained.mirror),
            postprocessing=tuple(trained.postprocessing),
            geometry=trained.geometry,
            skip_empty=trained.skip_empty,
        )


def _begin(made_by: _MadeBy, output: Path, targets: Sequence[Path], *, overwrite: bool) -> _MadeBy:
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
        return found
    if others := sorted({*there} - {*targets}) if overwrite else there:
        names = ", ".join(file.name for file in others[:3]) + ", ..." * (len(others) > 3)
        allowed, given = "those of these networks and settings", f"others: {names}"
        raise StateError.of("predictions", f"folder {output}", allowed=allowed, given=given, remedy=remedy)
    for file in there:  # before the record says otherwise: whenever this is stopped, it is true of all that is there
        file.unlink()
    write_json(record, asdict(made_by))
    return made_by


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

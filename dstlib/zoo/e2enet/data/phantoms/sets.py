"""Writing phantoms as data sets on disk, in the layouts of the real ones: what reads the one reads the other."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, ornt_transform
from numpy.typing import DTypeLike, NDArray
from tqdm import tqdm

from dstlib.errors import DataError, StateError, require, shown, similar
from dstlib.files import locked, make_folder, refuse_folder, write_json
from dstlib.report import on_one_line
from dstlib.typed_json import read_json
from dstlib.zoo.e2enet.data.cases import Case, Shape, three
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.layouts.btcv import BTCV_ORGANS
from dstlib.zoo.e2enet.data.layouts.decathlon import TUMOUR_CHANNELS, TUMOUR_CLASSES
from dstlib.zoo.e2enet.data.phantoms.ct import patient_seed, phantom
from dstlib.zoo.e2enet.data.phantoms.mri import hippocampus_phantom, tumour_phantom

VERSION = 1  # of the phantoms' voxels and of their layouts: a set of another version is another set
RECORD = "phantoms.json"
SHAPE = (48, 64, 64)
NUM_TEST = 2  # images without labels, beside the scans: something to predict
MAX_SCANS = 400  # with the tests below 500, from where AMOS numbers its MRIs


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How the phantoms of one data set are drawn, named and stored; ``{:04d}`` takes the number of the scan.

    ``orientations`` are the directions in which x, y and z lead, dealt out to the scans in turn. Without
    ``name`` the layout has no dataset.json, and without ``takes_shape`` each scan draws a size of its own.
    """

    draw: Callable[[int, Shape], Case]
    image: str
    label: str
    test: str
    orientations: tuple[str, ...]
    image_type: DTypeLike = np.int16
    name: str = ""
    modality: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    bare_tests: bool = False  # the Decathlon lists its tests as names, AMOS as {"image": name}
    takes_shape: bool = True


KINDS = {
    "amos": Kind(
        draw=phantom,
        image="imagesTr/amos_{:04d}.nii.gz",
        label="labelsTr/amos_{:04d}.nii.gz",
        test="imagesTs/amos_{:04d}.nii.gz",
        orientations=("LAS", "RAS", "LPS"),
        name="AMOS",
        modality=("CT",),
        classes=AMOS_ORGANS,
    ),
    "btcv": Kind(
        draw=partial(phantom, organs=BTCV_ORGANS),
        image="RawData/Training/img/img{:04d}.nii.gz",
        label="RawData/Training/label/label{:04d}.nii.gz",
        test="RawData/Testing/img/img{:04d}.nii.gz",
        orientations=("LAS", "RAS"),
    ),
    "brats": Kind(
        draw=tumour_phantom,
        image="imagesTr/BRATS_{:03d}.nii.gz",
        label="labelsTr/BRATS_{:03d}.nii.gz",
        test="imagesTs/BRATS_{:03d}.nii.gz",
        orientations=("RAS", "LPS"),
        name="BRATS",
        modality=TUMOUR_CHANNELS,
        classes=TUMOUR_CLASSES,
        bare_tests=True,
    ),
    "hippocampus": Kind(
        draw=lambda seed, _: hippocampus_phantom(seed),
        image="imagesTr/hippocampus_{:03d}.nii.gz",
        label="labelsTr/hippocampus_{:03d}.nii.gz",
        test="imagesTs/hippocampus_{:03d}.nii.gz",
        orientations=("RAS", "LAS"),
        image_type=np.float32,
        name="Hippocampus",
        modality=("MRI",),
        classes=("Anterior", "Posterior"),
        bare_tests=True,
        takes_shape=False,
    ),
}


def write_phantoms(
    folder: str | Path,
    kind: str,
    *,
    num_scans: int,
    seed: int = 0,
    shape: Sequence[int] | None = None,
    progress: bool = True,
) -> Path:
    """Writes labelled phantoms, and two images to predict, into a folder in the layout of the real data set.

    ``kind`` is "amos" (the layout of AMOS22), "btcv" (Synapse), "brats" (Decathlon, Task01) or "hippocampus"
    (Decathlon, Task04); ``shape`` (D, H, W) is 48 x 64 x 64 unless given. CT and the brain are int16, the
    hippocampus float32, the labels uint8. The orientation of the files changes from scan to scan, as it does in
    collected data. The folder appears when it is complete; if it holds the same set already, nothing is done.

    Raises:
        SettingError: There is no such kind, or the numbers are out of range.
        DataError: The folder holds something else.
        StateError: It cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as parent:
    ...     folder = write_phantoms(Path(parent) / "set", "hippocampus", num_scans=1, progress=False)
    ...     sorted(file.name for file in folder.iterdir())
    ['dataset.json', 'imagesTr', 'imagesTs', 'labelsTr', 'phantoms.json']
    """
    folder, plan = Path(folder), _plan(kind, num_scans, seed, shape)
    try:
        if _holds(folder, plan) and not _is_left(_place(folder)):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _building(folder) as built:
            if not _holds(folder, plan):  # nor has the process that was waited for made it
                built.mkdir(parents=True)
                _write_set(built, plan, progress=progress)
            if not _holds(folder, plan):
                os.rename(built, folder)
    except OSError as error:
        allowed = "a disk to write to"
        remedy = "Make room or pass another folder, then repeat the command: nothing half-made was left."
        raise StateError.of("phantoms", f"folder {folder}", allowed=allowed, given=error, remedy=remedy) from error
    return folder


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which set it is: two folders of one plan hold the same voxels."""

    kind: str
    num_scans: int
    seed: int
    shape: Shape | None
    version: int = VERSION


def _place(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-building")


def _is_left(place: Path) -> bool:
    """Tells whether a process that was killed behind its last renaming has left something to clear."""
    return place.is_dir() and not place.is_symlink() and os.access(place, os.W_OK)


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """Gives a place beside a folder, so that the last step is one renaming, to one process at a time.

    An interruption removes it, a reader never meets it, and what a killed process left there is cleared.
    """
    place = _place(folder)
    if place.is_symlink():
        raise OSError(errno.ELOOP, f"{place} is a link")
    make_folder(place, what="phantoms")
    waiting = partial(print, on_one_line(f"Another process draws {folder}: waiting for it."), file=sys.stderr)
    with locked(place, if_held=waiting, refuse=partial(refuse_folder, place, what="phantoms")):
        try:
            shutil.rmtree(place / folder.name, ignore_errors=True)
            yield place / folder.name
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _plan(kind: str, num_scans: int, seed: int, shape: Sequence[int] | None) -> _Plan:
    where = "the phantoms"
    remedy = f"Did you mean {similar(kind, KINDS)}?"
    require(kind in KINDS, "kind", where, allowed=f"one of {', '.join(KINDS)}", given=repr(kind), remedy=remedy)
    allowed = f"1 to {MAX_SCANS}"
    require(1 <= num_scans <= MAX_SCANS, "num_scans", where, allowed=allowed, given=num_scans, remedy="Pass 30, say.")
    require(seed >= 0, "seed", where, allowed="0 or more", given=seed, remedy="Pass 0, say.")
    remedy = "Leave it out: each scan has a size of its own, as the real ones."
    holds = shape is None or KINDS[kind].takes_shape
    require(holds, "shape", where, allowed=f"none for {kind}", given=shape and tuple(shape), remedy=remedy)
    size = three(SHAPE if shape is None else shape) if KINDS[kind].takes_shape else None
    return _Plan(kind=kind, num_scans=num_scans, seed=seed, shape=size)


def _holds(folder: Path, plan: _Plan) -> bool:
    """Says whether the folder holds the set of this plan already; something else in it is refused."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    remedy = "Pass another folder, or remove this one if nobody needs it."
    whole = f"The folder holds something else, or a part of a set. {remedy}"
    found = read_json(folder / RECORD, _Plan, remedy=whole, error=DataError)
    allowed, given, where = f"the set {asdict(plan)}", shown(asdict(found)), f"folder {folder}"
    require(found == plan, "phantoms", where, allowed=allowed, given=given, remedy=remedy, error=DataError)
    return True


def _write_set(folder: Path, plan: _Plan, *, progress: bool) -> None:
    kind, num_scans = KINDS[plan.kind], plan.num_scans
    scans = [(kind.image.format(i), kind.label.format(i)) for i in range(1, num_scans + 1)]
    tests = [kind.test.format(i) for i in range(num_scans + 1, num_scans + NUM_TEST + 1)]
    for name in (*scans[0], tests[0]):
        (folder / name).parent.mkdir(parents=True)
    files: list[tuple[str, str | None]] = [*scans, *((test, None) for test in tests)]
    for number, (image, label) in enumerate(tqdm(files, "drawing phantoms", unit="scan", disable=not progress)):
        seed = patient_seed(plan.seed, number)
        case = kind.draw(seed, plan.shape or SHAPE)
        codes = kind.orientations[number % len(kind.orientations)]
        voxels = np.rint(case.image) if np.issubdtype(kind.image_type, np.integer) else case.image
        _save(folder / image, voxels.astype(kind.image_type), _affine(case, seed), codes)
        if label is not None:
            _save(folder / label, case.label[None], _affine(case, seed), codes)
    if kind.name:
        write_json(folder / "dataset.json", _description(kind, scans, tests))
    write_json(folder / RECORD, asdict(plan))


def _affine(case: Case, seed: int) -> NDArray[np.float64]:
    """Draws the way from voxels (x, y, z) to mm: the scan's middle is somewhere near the scanner's, as patients lie."""
    axes = axcodes2ornt(case.orientation[::-1]).astype(int)
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[axes[:, 0], range(3)] = axes[:, 1] * case.spacing[::-1]
    middle = (np.array(case.label.shape[::-1]) - 1) / 2
    affine[:3, 3] = np.random.default_rng(seed).uniform(-40, 40, 3) - affine[:3, :3] @ middle
    return affine


def _save(file: Path, voxels: NDArray[Any], affine: NDArray[np.float64], codes: str) -> None:
    """Writes voxels (C, D, H, W), whose place the affine gives, so that x, y and z lead in the directions of codes."""
    turned = voxels.T if len(voxels) > 1 else voxels[0].T
    nifti = nibabel.Nifti1Image(turned, affine)
    nifti = nifti.as_reoriented(ornt_transform(nibabel.io_orientation(affine), axcodes2ornt(codes)))
    nifti.header.set_xyzt_units("mm")
    for set_form in (nifti.set_qform, nifti.set_sform):
        set_form(nifti.affine, code=1)  # 1: the scanner's own coordinates
    nifti.to_filename(file)


def _description(kind: Kind, scans: Sequence[tuple[str, str]], tests: Sequence[str]) -> dict[str, Any]:
    """Returns what dataset.json says, with the entries of the real one."""
    return {
        "name": kind.name,
        "description": "Procedural phantoms in the layout of the data set; no patient is in it.",
        "tensorImageSize": "4D" if len(kind.modality) > 1 else "3D",
        "modality": {str(i): name for i, name in enumerate(kind.modality)},
        "labels": {str(i): name for i, name in enumerate(("background", *kind.classes))},
        "numTraining": len(scans),
        "numTest": len(tests),
        "training": [{"image": f"./{image}", "label": f"./{label}"} for image, label in scans],
        **({} if kind.bare_tests else {"numValidation": 0, "validation": []}),
        "test": [f"./{test}" if kind.bare_tests else {"image": f"./{test}"} for test in tests],
    }

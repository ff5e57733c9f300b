"""The scans of Table 6: CT, MRI and both together, as data sets that the ordinary command trains on."""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dstlib.errors import DataError, StateError, require
from dstlib.files import make_folder, write_json, write_whole
from dstlib.zoo.e2enet.data.layouts.amos import AmosModality, only_modality
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.data.splits import split
from dstlib.zoo.e2enet.paper.runs import Plan
from dstlib.zoo.e2enet.paper.scale import SCALES

NUM_FOLDS = 5


def with_mri(plan: Plan) -> Plan:
    """Returns a plan that knows where the MRI scans are, and both kinds together; links to both are made for that.

    Both together are trained on as MRI, each scan normalised by itself, with every CT scan and the MRI scans of the
    fold: those held out are the same as for MRI alone.

    Raises:
        SettingError: One of the two folders is missing, or a fold that is none of five.
        DataError: The sets cannot be used, or have other classes.
    """
    where = "Table 6"
    remedy = "Pass --data CT_FOLDER --mri MRI_FOLDER (one folder for both, if it is AMOS22's), or neither for phantoms."
    given = " and ".join(name for name, folder in (("--data", plan.data), ("--mri", plan.mri)) if folder)
    is_pair = (plan.data is None) == (plan.mri is None)
    require(is_pair, "scans", where, allowed="both folders", given=f"{given} alone", remedy=remedy)
    numbers = [str(fold) for fold in range(NUM_FOLDS)]
    remedy, allowed = "Its rows share the folds of the MRI scans.", f"some of {', '.join(numbers)}"
    require({*plan.folds} <= {*numbers}, "--folds", where, allowed=allowed, given=" ".join(plan.folds), remedy=remedy)
    if plan.data is None or plan.mri is None:
        ct, mri = _phantoms(plan)
    else:
        ct, mri = _read(plan.data, "ct"), _read(plan.mri, "mri")
    for of in (ct, mri):
        remedy = "Leave the others out: a row learns from both kinds of scans alike."
        given = ", ".join(of.channels)
        holds = len(of.channels) == 1
        require(holds, "channels", f"{where}, {of.name}", allowed="one", given=given, remedy=remedy, error=DataError)
    if (ct.classes, ct.labels) != (mri.classes, mri.labels):
        remedy = "Write the labels of both alike."
        given = f"{', '.join(ct.classes)} of CT and {', '.join(mri.classes)} of MRI"
        raise DataError.of("classes", where, allowed="the same in both", given=given, remedy=remedy)
    of_mri: tuple[str, ...] = ("--data", str(plan.mri), "--modality", "mri")
    if plan.mri is None:
        alone = _link(plan.runs / "sets" / "phantoms-mri", mri, {case.name: case for case in mri.train})
        of_mri = ("--data", str(alone), "--modality", "mri", "--layout", "decathlon")
    return replace(plan, sources={"mri": of_mri, "both": _both(plan, ct, mri)})


def _read(folder: Path, modality: AmosModality) -> Manifest:
    manifest = read_manifest(folder, None)
    return only_modality(manifest, modality) if manifest.layout == "amos" else manifest


def _phantoms(plan: Plan) -> tuple[Manifest, Manifest]:
    """Draws two sets of phantoms: those of the recipe, and as many others that stand for MRI."""
    kind, num = plan.read(plan.recipe, [*SCALES[plan.scale], *plan.options]).data.phantoms
    drawn = [
        write_phantoms(plan.runs / "sets" / f"{kind}-{num}-{seed}", kind, num_scans=num, seed=seed) for seed in (0, 1)
    ]
    ct, mri = (read_manifest(folder, None) for folder in drawn)
    return ct, mri


def _both(plan: Plan, ct: Manifest, mri: Manifest) -> tuple[str, ...]:
    """Makes the set of CT and MRI, and the file of its folds; returns the options that train on it."""
    names = [case.name for case in mri.train]
    others = {f"ct_{case.name}": case for case in ct.train}
    folder = plan.runs / "sets" / f"{ct.folder.name}+{mri.folder.name}"
    _link(folder, mri, {**{case.name: case for case in mri.train}, **others})
    folds = [split(names, fold=fold, num_folds=NUM_FOLDS) for fold in range(NUM_FOLDS)]
    splits = folder / "folds.json"
    listed = [{"train": [*train, *others], "val": [*held_out]} for train, held_out in folds]
    write_whole(splits, json.dumps(listed).encode())
    return ("--data", str(folder), "--modality", "mri", "--layout", "decathlon", "--splits", str(splits))


def _link(folder: Path, like: Manifest, cases: Mapping[str, CaseFiles]) -> Path:
    """Makes a set in the Decathlon's layout that links to the files of these cases, under other names."""
    if like.labels != Labels.consecutive(len(like.classes)) or any(case.masks for case in cases.values()):
        allowed, remedy = "one label file for each case, class i as i + 1", "Write the labels so (values from 1 up)."
        raise DataError.of("labels", "Table 6", allowed=allowed, given=f"those of {like.name}", remedy=remedy)
    training = []
    for name, case in cases.items():
        assert case.label is not None
        entry = {}
        for part, file in (("image", case.images[0]), ("label", case.label)):
            ending = ".nii.gz" if file.name.endswith(".nii.gz") else file.suffix
            link = folder / f"{part}sTr" / f"{name}{ending}"
            make_folder(link.parent)
            _point(link, file.resolve())
            entry[part] = f"./{part}sTr/{link.name}"
        training.append(entry)
    labels = {str(i): name for i, name in enumerate(("background", *like.classes))}
    description = {"name": folder.name, "modality": {"0": "MRI"}, "labels": labels, "training": training}
    write_json(folder / "dataset.json", {**description, "numTraining": len(training), "numTest": 0, "test": []})
    return folder


def _point(link: Path, file: Path) -> None:
    """Makes a link to a file, in one step in the place of one that points elsewhere: others may read the set.

    Raises:
        StateError: It cannot be made.
    """
    if link.is_symlink() and link.readlink() == file:
        return
    temporary = link.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.symlink_to(file)
        os.replace(temporary, link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        allowed, remedy = "a folder in which links can be made", "Choose another one by --runs."
        raise StateError.of(link.name, f"folder {link.parent}", allowed=allowed, given=error, remedy=remedy) from error

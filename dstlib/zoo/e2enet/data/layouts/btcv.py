"""The layout of BTCV (Synapse's Abdomen), which has no list, only folders.

RawData/Training/img/img0001.nii.gz belongs to RawData/Training/label/label0001.nii.gz; RawData/Testing/img holds
images without labels.
"""

import re
from dataclasses import replace
from pathlib import Path

from dstlib.errors import DataError
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.layouts.files import by_case, case_name, scan_files
from dstlib.zoo.e2enet.data.layouts.left_out import left_out
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import LIST, Source

_NAMES = {folder: re.compile(folder + r"\d{4}\.") for folder in ("img", "label")}
BTCV_ORGANS = (*AMOS_ORGANS[:9], "portal and splenic veins", *AMOS_ORGANS[9:12])


def training_folder(folder: Path) -> Path | None:
    """Finds the folder with img and label: ``folder`` may be Abdomen, RawData, or Training itself."""
    for candidate in (folder / "RawData" / "Training", folder / "Training", folder):
        if (candidate / "img").is_dir() and (candidate / "label").is_dir():
            return candidate
    return None


def btcv_evidence(source: Source) -> str | None:
    """Says by what a set is BTCV: folders img and label, in which files are called so, and no list."""
    training = None if source.content else training_folder(source.folder)
    if training is None:
        return None
    names = [[f.name for f in scan_files(training / folder) if name.match(f.name)] for folder, name in _NAMES.items()]
    if not all(names):
        return None
    return f"img/{names[0][0]} and label/{names[1][0]}, without a {LIST}"


def read_btcv(source: Source) -> Manifest:
    """Reads which files BTCV consists of: those that are there, each case named as its image is: img0001.

    An image without a label, or a label without an image, becomes a case of which one file does not exist:
    whoever reads it says so.

    Raises:
        DataError: There are no folders img and label with NIfTI files.

    Reference: Landman et al., *Multi-Atlas Labeling Beyond the Cranial Vault* (MICCAI 2015, syn3193805).
    """
    folder = source.folder
    training = training_folder(folder)
    images = by_case(training / "img", prefix="img") if training else {}
    if training is None or not images:
        allowed = "BTCV's RawData/Training with img/img0001.nii.gz, ... and label/label0001.nii.gz, ..."
        given = "no folders img and label in it" if training is None else f"no NIfTI file in {training / 'img'}"
        remedy = "Pass the folder Abdomen, RawData or Training, with both in it."
        raise DataError.of("data set", str(folder), allowed=allowed, given=given, remedy=remedy)
    labels = by_case(training / "label", prefix="label")
    train = tuple(
        CaseFiles(name=case_name(image), images=(image,), label=label)
        for number in sorted({*images, *labels})
        for image in images.get(number, [training / "img" / f"img{number}.nii.gz"])
        for label in labels.get(number, [training / "label" / f"label{number}.nii.gz"])
    )
    testing = training.parent / "Testing"
    images_to_predict = scan_files(testing / "img")
    manifest = Manifest(
        name="BTCV",
        folder=folder,
        layout="btcv",
        channels=("CT",),
        classes=BTCV_ORGANS,
        train=train,
        test=tuple(CaseFiles(name=case_name(file), images=(file,)) for file in images_to_predict),
    )
    folders = [training / "img", training / "label", testing / "img", testing / "label"]
    return replace(manifest, notes=tuple(left_out(manifest, folders, why="no case of BTCV has them")))

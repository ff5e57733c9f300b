"""Sets with one folder per case, in which files are called alike: TotalSegmentator, KiTS, AbdomenAtlas, and one's own.

A case is NAME/ct.nii.gz with NAME/segmentations/ORGAN.nii.gz, one mask per class, or with a single label file. Masks
name the classes by themselves. The values of label files are known of KiTS and AbdomenAtlas; a dataset.json with
'labels', and no lists, gives them for others.
"""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dstlib.errors import DataError, number_of
from dstlib.files import read_whole
from dstlib.typed_json import MAX_BYTES
from dstlib.zoo.e2enet.data.layouts.files import case_name, numbered, scan_files, subfolders
from dstlib.zoo.e2enet.data.layouts.label_table import told_labels
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.left_out import listed, promised
from dstlib.zoo.e2enet.data.layouts.manifest import MAX_CLASSES, CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import Source

CHANNELS = {"ct": "CT", "imaging": "CT", "mri": "MRI", "image": None}  # by the names of image files
MASKS = "segmentations"
LABELS = ("segmentation", "combined_labels", "label")  # the names of label files
KITS = {1: "kidney", 2: "tumour", 3: "cyst"}
KITS19 = {1: "kidney", 2: "tumour"}  # beside its cases lies a kits.json, where later ones have a kits21.json
_ATLAS = (
    "aorta gall_bladder kidney_left kidney_right liver pancreas postcava spleen stomach adrenal_gland_left "
    "adrenal_gland_right bladder celiac_trunk colon duodenum esophagus femur_left femur_right hepatic_vessel intestine "
    "lung_left lung_right portal_vein_and_splenic_vein prostate rectum"
)
ATLAS = dict(enumerate(_ATLAS.split(), start=1))  # AbdomenAtlas 1.1; the first nine are those of 1.0


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """One case as it lies in its folder: the image, and its label file or its masks by their names."""

    folder: Path
    image: Path
    label: Path | None
    masks: Mapping[str, Path]


def case_folders_evidence(source: Source) -> str | None:
    """Says by what a set has a folder per case: folders with an image and a label of the names that are known."""
    if "training" in source.content or (source.folder / "imagesTr").is_dir():
        return None
    found = next((case for case in _cases(source.folder) if case.label or case.masks), None)
    if found is None:
        return None
    label = f"{MASKS}/" if found.masks else found.label.name if found.label else ""
    return f"{found.folder.name}/{found.image.name} and {found.folder.name}/{label}"


def read_case_folders(source: Source) -> Manifest:
    """Reads which files a set with a folder per case consists of, each case named as its folder is.

    A folder without a label is a test case, one without an image is left out, and notes say so. What meta.csv divides
    off for validation or test, as TotalSegmentator's does, are validation cases.

    Raises:
        DataError: Cases have different kinds of images or labels, none has a label, the values of label files mean
            nothing that is known, or meta.csv is no table.

    Reference: Wasserthal et al., *TotalSegmentator* (2023); Heller et al., *KiTS19* and *KiTS21*; Qu et al.,
    *AbdomenAtlas-8K* (2023), and version 1.1 for its 25 classes.
    """
    folder, found = source.folder, _cases(source.folder)
    images = {case_name(case.image) for case in found}
    labels = {MASKS if case.masks else case_name(case.label or "") for case in found if case.masks or case.label}
    if len(images) != 1 or len(labels) != 1:
        allowed = f"folders with the same image ({', '.join(CHANNELS)}) and label ({', '.join((MASKS, *LABELS))})"
        given = f"images {', '.join(sorted(images)) or 'of no such name'}, labels {', '.join(sorted(labels)) or 'none'}"
        raise DataError.of("cases", str(folder), allowed=allowed, given=given, remedy="Rename files to one name each.")
    kind = labels.pop()
    classes, meaning = _labels(source, found, kind=kind)
    cases = {case.folder: _case_files(case, classes) for case in found}
    apart = _set_apart(folder)
    labelled = [case for case in cases.values() if case.label is not None]
    bare = [case for case in cases.values() if case.label is None]
    train = tuple(case for case in labelled if case.name not in apart)
    manifest = Manifest(
        name=source.content.get("name") or folder.resolve().name,
        folder=folder,
        layout="case-folders",
        channels=(_channel(source, images.pop()),),
        classes=classes,
        labels=meaning,
        train=train,
        validation=tuple(case for case in labelled if case.name in apart),
        test=tuple(bare),
    )
    return replace(manifest, notes=tuple(_notes(source, found, manifest)))


def images_in_folders(folder: Path) -> tuple[CaseFiles, ...]:
    """Returns the images of a set with a folder per case, without their labels: what can be predicted."""
    return tuple(CaseFiles(name=case.folder.name, images=(case.image,)) for case in _cases(folder))


def _notes(source: Source, found: list[_Folder], manifest: Manifest) -> list[str]:
    names = [case.name for case in manifest.test]
    others = [
        each.name for each in subfolders(source.folder) if each.name not in {case.name for case in manifest.cases}
    ]
    doubled = [case.folder.name for case in found if case.masks and case.label]
    notes = promised(source.content, {"numTraining": len(manifest.train)}, where=source.list_name)
    unnamed = sorted({name for case in found for name in case.masks} - {*manifest.classes})
    if manifest.validation:
        notes.append(f"{number_of(len(manifest.validation), 'case')} set apart for validation or test by meta.csv")
    if names:
        notes.append(f"{number_of(len(names), 'case')} without a label, taken for testing: {listed(names)}")
    if others:
        image = manifest.cases[0].images[0].name
        notes.append(f"{number_of(len(others), 'folder')} left out, without an image {image}: {listed(others)}")
    if unnamed:
        told = f"as 'labels' of {source.list_name} does not name them: {listed(unnamed)}"
        notes.append(f"{number_of(len(unnamed), 'mask')} left out, {told}")
    if doubled:
        told = f"as {MASKS} has the same by names: {listed(doubled)}"
        notes.append(f"the label files of {number_of(len(doubled), 'case')} left out, {told}")
    return notes


def _cases(folder: Path) -> list[_Folder]:
    """Finds the folders with an image of a known name, and what they hold."""
    cases = []
    for each in subfolders(folder):
        files = {case_name(file): file for file in scan_files(each)}
        image = next((files[name] for name in CHANNELS if name in files), None)
        if image is not None:
            masks = {case_name(file): file for file in scan_files(each / MASKS)}
            label = next((files[name] for name in LABELS if name in files), None)
            cases.append(_Folder(folder=each, image=image, label=label, masks=masks))
    return cases


def _labels(source: Source, found: list[_Folder], *, kind: str) -> tuple[tuple[str, ...], Labels]:
    """Returns the classes, and their values: as dataset.json says, as masks are called, or as it is known of the set.

    Raises:
        DataError: Nothing says so, or there are more than a byte holds.
    """
    told = told_labels(source.content)
    if isinstance(told, tuple) and (kind != MASKS or told[1].is_plain):
        return told
    names = {name for case in found for name in case.masks}
    if told is None and kind == MASKS and len(names) <= MAX_CLASSES:
        return tuple(sorted(names)), Labels.consecutive(len(names))
    if told is None and (known := _known(source.folder, found[0], kind)):
        return tuple(known.values()), Labels(values=tuple(known))
    allowed = f"what the values of {kind} mean: at most {MAX_CLASSES} classes" + ", no regions" * (kind == MASKS)
    given = "no 'labels'" if told is None else told if isinstance(told, str) else "regions, or values to ignore"
    remedy = 'Write {"labels": {"0": "background", "1": "liver"}} into it, say, with your classes.'
    file = source.folder / source.list_name
    raise DataError.of("classes", str(file), allowed=allowed, given=given, remedy=remedy)


def _known(folder: Path, case: _Folder, kind: str) -> Mapping[int, str] | None:
    """Returns the classes by their values of the sets that name their cases, and files, as this one."""
    if re.match(r"BDMAP_\d{8}$", case.folder.name) and kind == "combined_labels":
        return ATLAS
    if re.match(r"case_\d{5}$", case.folder.name) and (case_name(case.image), kind) == ("imaging", "segmentation"):
        return KITS19 if (folder / "kits.json").is_file() else KITS
    return None


def _case_files(case: _Folder, classes: tuple[str, ...]) -> CaseFiles:
    """Returns the files of a case; a mask that it lacks is named all the same: what nobody drew is no background."""
    name = case.folder.name
    if not case.masks:
        return CaseFiles(name=name, images=(case.image,), label=case.label)
    masks = tuple(case.masks.get(each, case.folder / MASKS / f"{each}.nii.gz") for each in classes)
    return CaseFiles(name=name, images=(case.image,), label=case.folder / MASKS, masks=masks)


def _channel(source: Source, image: str) -> str:
    """Returns what the images show: by dataset.json, or by the name of their files; which may be no more than that."""
    told = numbered(source.content.get("channel_names")) or numbered(source.content.get("modality"))
    return told[0] if told else CHANNELS[image] or image


def _set_apart(folder: Path) -> set[str]:
    """Returns the cases that a meta.csv, as TotalSegmentator's, sets apart for validation and test.

    Raises:
        DataError: It is no table.
    """
    file = folder / "meta.csv"
    try:
        content = read_whole(file, max_bytes=MAX_BYTES).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=";"))
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        allowed, given = "a table in UTF-8, as TotalSegmentator's", getattr(error, "strerror", None) or str(error)
        remedy = "Restore it; or rename it, if it sets no case apart."
        raise DataError.of("content", str(file), allowed=allowed, given=given, remedy=remedy) from error
    return {row["image_id"] for row in rows if row.get("split") in ("val", "test") and row.get("image_id")}

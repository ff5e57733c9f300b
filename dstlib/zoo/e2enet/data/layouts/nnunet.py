"""The layout of nnU-Net v2's raw data sets: DatasetXXX_NAME with one image file per channel.

dataset.json holds channel_names, labels (name → value, or values), numTraining and file_ending; the cases are the files
imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz and imagesTs/CASE_0000.nii.gz, or listed under 'dataset'.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from os.path import exists
from pathlib import Path
from typing import Any

from dstlib.errors import DataError, few, shown
from dstlib.zoo.e2enet.data.layouts.files import (
    ENDINGS,
    by_case,
    case_channel,
    case_name,
    numbered,
    path_fault,
    refuse_json,
    scan_files,
    wrong_name,
)
from dstlib.zoo.e2enet.data.layouts.label_table import read_table, table_notes
from dstlib.zoo.e2enet.data.layouts.left_out import PARTS, left_out, promised
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import Source


def nnunet_evidence(source: Source) -> str | None:
    """Says by what a set has nnU-Net v2's layout: its entries, and labels that are not numbered as the Decathlon's."""
    keys = [key for key in ("channel_names", "file_ending") if key in source.content]
    if not keys or ("training" in source.content and numbered(source.content.get("labels"))):
        return None
    return f"{' and '.join(map(repr, keys))} in {source.list_name}"


def read_nnunet(source: Source) -> Manifest:
    """Reads which files a raw data set of nnU-Net v2 consists of.

    A file that a case lacks (a channel, the label) is in the manifest nevertheless: whoever reads it says so.
    Variables of the environment stay as they are written; nnU-Net puts their values in.

    Raises:
        DataError: dataset.json lacks something, or names files of an ending that is not read, leads out of the folder,
            or counts other cases than are there.

    Reference: nnU-Net's documentation/dataset_format.md.
    """
    folder, content = source.folder, source.content
    wrong = _wrong_entries(content, allow_outside=source.allow_outside)
    channels = numbered(content.get("channel_names"))
    table = read_table(content.get("labels"), content.get("regions_class_order"))
    if wrong or channels is None or isinstance(table, str):
        refuse_json(folder / source.list_name, allowed="entries of nnU-Net v2 that can be read here", wrong=wrong)
    ending, listed = content.get("file_ending", ".nii.gz"), content.get("dataset")
    train = _listed(folder, listed) if listed else _found(folder, len(channels), ending)
    manifest = Manifest(
        name=content.get("name") or re.sub(r"^Dataset\d+_", "", folder.resolve().name),
        folder=folder,
        layout="nnunet",
        channels=channels,
        classes=table[0],
        labels=table[1],
        train=train,
        test=channel_cases(scan_files(folder / "imagesTs"), num_channels=len(channels)),
    )
    why = f"{source.list_name} does not list them" if listed else "no case of nnU-Net's has them"
    notes = (*table_notes(*table), *promised(content, {"numTest": len(manifest.test)}, where=source.list_name))
    beside = left_out(manifest, [folder / part for part in PARTS], why=why)
    _check_number(source, train, beside)
    return replace(manifest, notes=(*notes, *beside))


def _check_number(source: Source, train: tuple[CaseFiles, ...], beside: list[str]) -> None:
    expected = source.content.get("numTraining", len(train))
    if len(train) == expected:
        return
    partial = [case.name for case in train if not all(exists(f) for f in (*case.images, case.label) if f)]
    given = f"{len(train)}" + (f", of which files are missing: {few(partial)}" if partial else "")
    given += "".join(f"; {note}" for note in beside)
    allowed = f"{expected}, as {source.list_name} says under 'numTraining'"
    remedy = "Restore or remove files, or correct the number."
    raise DataError.of("training cases", str(source.folder), allowed=allowed, given=given, remedy=remedy)


def channel_cases(files: tuple[Path, ...], *, num_channels: int) -> tuple[CaseFiles, ...]:
    """Groups files named CASE_0000.nii.gz into cases without labels; absent channels are named all the same.

    Raises:
        DataError: A file is not named so, or there are two of one channel.
    """
    cases: dict[str, dict[int, Path]] = {}
    odd = []
    for file in files:
        named = case_channel(file)
        if named is None or named[1] in cases.get(named[0], {}):
            odd.append(file)
        else:
            cases.setdefault(named[0], {})[named[1]] = file
    if odd:
        allowed = "one file CASE_0000.nii.gz, CASE_0001.nii.gz, ... per case and channel"
        given, remedy = few([file.name for file in odd]), "Rename or remove these files."
        raise DataError.of("image files", str(odd[0].parent), allowed=allowed, given=given, remedy=remedy)
    return tuple(CaseFiles(name=name, images=_channels(name, cases[name], num_channels)) for name in sorted(cases))


def _channels(name: str, found: dict[int, Path], num_channels: int) -> tuple[Path, ...]:
    any_file = next(iter(found.values()))
    ending = any_file.name.removeprefix(case_name(any_file))
    here = range(max(num_channels, max(found) + 1))
    return tuple(found.get(i, any_file.parent / f"{name}_{i:04d}{ending}") for i in here)


def _found(folder: Path, num_channels: int, ending: str) -> tuple[CaseFiles, ...]:
    cases = channel_cases(scan_files(folder / "imagesTr"), num_channels=num_channels)
    images, labels = {case.name: case.images for case in cases}, by_case(folder / "labelsTr")
    for name in labels.keys() - images:
        images[name] = tuple(folder / "imagesTr" / f"{name}_{i:04d}{ending}" for i in range(num_channels))
    return tuple(
        CaseFiles(name=name, images=images[name], label=label)
        for name in sorted(images)
        for label in labels.get(name, [folder / "labelsTr" / f"{name}{ending}"])
    )


def _listed(folder: Path, table: dict[str, Any]) -> tuple[CaseFiles, ...]:
    return tuple(
        CaseFiles(
            name=name,
            images=tuple(folder / image for image in table[name]["images"]),
            label=folder / table[name]["label"],
        )
        for name in sorted(table)
    )


def _wrong_entries(content: Mapping[str, Any], *, allow_outside: bool) -> list[str]:
    """Says what dataset.json lacks, or asks for in vain, and what to do."""
    wrong = wrong_name(content)
    if numbered(channels := content.get("channel_names")) is None:
        wrong.append(f'\'channel_names\' is {shown(channels)} but numbers its names from 0, as in {{"0": "CT"}}')
    if isinstance(table := read_table(content.get("labels"), content.get("regions_class_order")), str):
        wrong.append(table)
    ending = content.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        known = ", ".join(ENDINGS)
        wrong.append(f"'file_ending' is {shown(ending)}, but what is read is {known}: convert the files, and change it")
    if type(number := content.get("numTraining", 0)) is not int:
        wrong.append(f"'numTraining' is {shown(number)} but a whole number")
    return wrong + _wrong_list(content.get("dataset"), allow_outside=allow_outside)


def _wrong_list(table: object, *, allow_outside: bool) -> list[str]:
    if not table:
        return []
    if not isinstance(table, dict):
        return [f"'dataset' is {shown(table)} but lists files by case"]
    wrong = []
    for name, entry in table.items():
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        listed = [*images, label] if isinstance(images, list) else []
        files = [file for file in listed if isinstance(file, str)]
        if len(listed) < 2 or len(files) < len(listed):
            wrong.append(f"case {shown(name)} of 'dataset' is {shown(entry)} but names 'images' and a 'label'")
            continue
        wrong += [
            f"case {shown(name)} of 'dataset' names {shown(file)}, which {fault}"
            for file in files
            if (fault := path_fault(file, allow_outside=allow_outside))
        ]
    return wrong

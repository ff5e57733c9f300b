"""The layout of the Medical Segmentation Decathlon, and of AMOS22, which adds a validation list to it.

dataset.json holds modality, labels and the lists training, test and (AMOS22) validation of files. Only listed
files make the set, so whatever else lies in the folder does no harm.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstlib.errors import shown
from dstlib.zoo.e2enet.data.layouts.files import case_name, numbered, path_fault, refuse_json, wrong_name
from dstlib.zoo.e2enet.data.layouts.left_out import PARTS, left_out, listed, promised
from dstlib.zoo.e2enet.data.layouts.manifest import MAX_CLASSES, CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import Source

TUMOUR_CHANNELS = ("FLAIR", "T1w", "T1gd", "T2w")  # of Task01_BrainTumour
TUMOUR_CLASSES = ("edema", "non-enhancing tumour", "enhancing tumour")


COUNTS = {"numTraining": "training", "numValidation": "validation", "numTest": "test"}


def decathlon_evidence(source: Source) -> str | None:
    """Says by what a set has the Decathlon's layout: its entries; where nnU-Net's are too, numbered labels."""
    content = source.content
    keys = [key for key in ("modality", "labels", "training") if key in content]
    of_nnunet = "channel_names" in content or "file_ending" in content
    if not {"modality", "training"} & {*keys} or (of_nnunet and numbered(content.get("labels")) is None):
        return None
    return f"{', '.join(map(repr, keys))} in {source.list_name}"


def listed_images(content: Mapping[str, Any]) -> list[str]:
    """Returns the images that the lists of a dataset.json name; what is no entry of a list is passed over here."""
    lists = [content.get(part) for part in COUNTS.values()]
    entries = [entry for each in lists if isinstance(each, list) for entry in each]
    images = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
    return [image for image in images if isinstance(image, str) and image]


def read_decathlon(source: Source, *, layout: str) -> Manifest:
    """Reads which files a set of the Decathlon, or AMOS22, consists of: those that dataset.json lists.

    A validation case without a label (as AMOS22 gave them out during the challenge) counts as a test case, and a note
    says so.

    Raises:
        DataError: The message says all that dataset.json lacks.

    Reference: Antonelli et al., *The Medical Segmentation Decathlon* (Nature Communications 2022); Ji et al.,
    *AMOS* (NeurIPS 2022).
    """
    folder, content = source.folder, source.content
    channels, labels = numbered(content.get("modality")), numbered(content.get("labels"))
    wrong = _wrong_entries(content, allow_outside=source.allow_outside)
    if channels is None or labels is None or wrong:
        refuse_json(folder / source.list_name, allowed="the Decathlon's entries", wrong=wrong)
    parts = {part: _files(folder, content.get(part) or []) for part in ("training", "validation", "test")}
    bare = [case for case in parts["validation"] if case.label is None]
    notes = promised(content, {key: len(parts[part]) for key, part in COUNTS.items()}, where=source.list_name)
    if bare:
        told = f"{len(bare)} of the {len(parts['validation'])} validation cases have no label, so they are test cases"
        notes.append(f"{told}: {listed([case.name for case in bare])}")
    manifest = Manifest(
        name=content.get("name") or folder.resolve().name,
        folder=folder,
        layout=layout,
        channels=channels,
        classes=labels[1:],
        train=parts["training"],
        validation=tuple(case for case in parts["validation"] if case.label is not None),
        test=_sorted((*parts["test"], *bare)),
    )
    notes += left_out(manifest, [folder / part for part in PARTS], why=f"{source.list_name} does not list them")
    return replace(manifest, notes=tuple(notes))


def _files(folder: Path, entries: list[Any]) -> tuple[CaseFiles, ...]:
    cases = []
    for entry in entries:
        image, label = (entry, None) if isinstance(entry, str) else (entry["image"], entry.get("label"))
        cases.append(
            CaseFiles(name=case_name(image), images=(folder / image,), label=folder / label if label else None)
        )
    return _sorted(cases)


def _sorted(cases: list[CaseFiles] | tuple[CaseFiles, ...]) -> tuple[CaseFiles, ...]:
    return tuple(sorted(cases, key=lambda case: case.name))


def _wrong_entries(content: Mapping[str, Any], *, allow_outside: bool) -> list[str]:
    """Says what dataset.json lacks."""
    wrong = wrong_name(content)
    for key, example in (("modality", '{"0": "CT"}'), ("labels", '{"0": "background", "1": "liver"}')):
        table = content.get(key)
        names = numbered(table)
        if names is None:
            wrong.append(f"{key!r} is {shown(table)} but numbers its names from 0, as in {example}")
        elif len(names) > MAX_CLASSES + 1:
            wrong.append(f"{key!r} has {len(names)} entries, but a label is a byte: {MAX_CLASSES + 1} at most")
    if not content.get("training"):
        wrong.append(f"'training' is {shown(content.get('training'))} but lists at least one case")
    for part in ("training", "validation", "test"):
        wrong += _wrong_files(part, content.get(part) or [], allow_outside=allow_outside)
    return wrong


def _wrong_files(part: str, entries: object, *, allow_outside: bool) -> list[str]:
    if not isinstance(entries, list):
        return [f"{part!r} is {shown(entries)} but a list of files"]
    wrong = []
    for i, entry in enumerate(entries):
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
        is_image, is_label = (isinstance(file, str) and bool(file) for file in (image, label))
        if not is_image or not (is_label or (part != "training" and label in (None, ""))):
            needs = "an 'image' and a 'label'" if part == "training" else "an 'image'"
            wrong.append(f"entry {i} of {part!r} is {shown(entry)} but names {needs}")
            continue
        wrong += [
            f"entry {i} of {part!r} names {shown(file)}, which {fault}"
            for file in (image, label)
            if file and (fault := path_fault(file, allow_outside=allow_outside))
        ]
    return wrong

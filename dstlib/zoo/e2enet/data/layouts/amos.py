"""AMOS22: its organs, and which of its scans are CT and which MRI. Its files lie as the Decathlon's do."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.data.layouts.decathlon import decathlon_evidence
from dstlib.zoo.e2enet.data.layouts.files import case_name, numbered
from dstlib.zoo.e2enet.data.layouts.left_out import listed
from dstlib.zoo.e2enet.data.layouts.lists import listed_images
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.source import Source

AMOS_ORGANS = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "oesophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "bladder",
    "prostate/uterus",
)
_NAMES = {"train": "training", "validation": "validation", "test": "test"}
FIRST_MRI = 500  # AMOS22's readme: "id numbers less than 500 belong to CT data, otherwise they belong to MRI data"
# Spelt alike in its dataset.json, which has an "arota", and wherever its labels are written out again.
_AGREED = {1: "spleen", 2: "right kidney", 3: "left kidney", 6: "liver", 7: "stomach", 10: "pancreas", 13: "duodenum"}
_ID = re.compile(r"amos_(\d{4})$")

AmosModality = Literal["ct", "mri"]


def amos_evidence(source: Source) -> str | None:
    """Says by what a set is AMOS22: all its cases are named amos_NNNN, and its 15 organs are numbered as there.

    Neither a list of validation cases nor a folder imagesVa is evidence: other sets have them too.
    """
    if decathlon_evidence(source) is None or not (_has_names(source) and _has_organs(source)):
        return None
    return f"cases named amos_NNNN and the 15 organs of AMOS22, so numbered, in {source.list_name}"


def nearly_amos(source: Source) -> list[str]:
    """Says that a set is not taken for AMOS22 although its cases are named so."""
    if not _has_names(source) or _has_organs(source):
        return []
    told = "its cases are named as AMOS22's, but its labels are others, so it is not taken for it"
    return [f"{told}: pass --layout amos if ids from {FIRST_MRI} up are MRI"]


def _has_names(source: Source) -> bool:
    names = [case_name(image) for image in listed_images(source.content)]
    return bool(names) and all(map(_ID.match, names))


def _has_organs(source: Source) -> bool:
    labels = numbered(source.content.get("labels")) or ()
    return len(labels) == len(AMOS_ORGANS) + 1 and all(labels[i].casefold() == name for i, name in _AGREED.items())


def amos_modality(name: str) -> AmosModality | None:
    """Tells what an AMOS22 case was taken with, by its id; None for another name than amos_NNNN.

    >>> amos_modality("amos_0410"), amos_modality("amos_0507"), amos_modality("toy_507")
    ('ct', 'mri', None)
    """
    match = _ID.match(name)
    if match is None:
        return None
    return "ct" if int(match[1]) < FIRST_MRI else "mri"


def only_modality(manifest: Manifest, modality: AmosModality) -> Manifest:
    """Returns the CT or the MRI scans of AMOS22, which come mixed in one folder; the channel is named for it.

    What is left out is said in the notes.

    Raises:
        SettingError: The data set is not AMOS22.
        DataError: No training case is left.
    """
    where = f"data set {manifest.name!r}"
    if manifest.layout != "amos":
        remedy = "Other data sets are not divided by the ids of their cases."
        given = f"layout {manifest.layout!r}"
        raise SettingError.of("CT or MRI by ids", where, allowed="AMOS22 (--layout amos)", given=given, remedy=remedy)
    parts = {"train": manifest.train, "validation": manifest.validation, "test": manifest.test}
    kept = {part: tuple(c for c in cases if amos_modality(c.name) == modality) for part, cases in parts.items()}
    if not kept["train"]:
        allowed, given = f"some that are {modality.upper()}", f"none of {len(manifest.train)}"
        remedy = (
            f"Its names are like {listed([case.name for case in manifest.train])}: if ids say nothing of how these "
            "scans were taken, pass --layout decathlon."
        )
        raise DataError.of("training cases", where, allowed=allowed, given=given, remedy=remedy)
    lost = {part: [case.name for case in cases if case not in kept[part]] for part, cases in parts.items()}
    notes = [
        f"{len(names)} of the {len(parts[part])} {_NAMES[part]} cases left out, as --modality {modality} takes the "
        f"{modality.upper()} scans of AMOS22 alone (ids from {FIRST_MRI} up are MRI): {listed(names)}"
        for part, names in lost.items()
        if names
    ]
    return replace(
        manifest,
        channels=(modality.upper(),),
        train=kept["train"],
        validation=kept["validation"],
        test=kept["test"],
        notes=(*manifest.notes, *notes),
    )


def modalities(cases: Iterable[CaseFiles]) -> Counter[str]:
    """Counts what the cases of AMOS22 were taken with: "ct", "mri", and "neither" for names that are not AMOS22's."""
    return Counter(amos_modality(case.name) or "neither" for case in cases)

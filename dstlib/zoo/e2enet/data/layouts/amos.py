"""AMOS22: its organs, and which of its scans are CT and which MRI. Its files lie as the Decathlon's do."""

import re
from dataclasses import replace
from typing import Literal

from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest

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
FIRST_MRI = 500  # AMOS22's readme: "id numbers less than 500 belong to CT data, otherwise they belong to MRI data"
_ID = re.compile(r"(\d+)$")


def amos_modality(name: str) -> Literal["ct", "mri"] | None:
    """Tells what an AMOS22 case was taken with, by its id; None if the name ends in no id.

    >>> amos_modality("amos_0410"), amos_modality("amos_0507"), amos_modality("phantom")
    ('ct', 'mri', None)
    """
    match = _ID.search(name)
    if match is None:
        return None
    return "ct" if int(match[1]) < FIRST_MRI else "mri"


def only_modality(manifest: Manifest, modality: Literal["ct", "mri"]) -> Manifest:
    """Returns the CT or the MRI scans of AMOS22, which come mixed in one folder; the channel is named for it.

    Raises:
        SettingError: The data set is not AMOS22.
        DataError: No training case is left.
    """
    where, given = f"data set {manifest.name!r}", f"layout {manifest.layout!r}"
    remedy = "Other data sets hold one modality: leave it out."
    require(manifest.layout == "amos", "only_modality()", where, allowed="AMOS22", given=given, remedy=remedy)
    train, validation, test = (
        tuple(case for case in cases if amos_modality(case.name) == modality)
        for cases in (manifest.train, manifest.validation, manifest.test)
    )
    allowed, given = f"some that are {modality.upper()}", f"none of {len(manifest.train)}"
    remedy = f"Its names are like {', '.join(case.name for case in manifest.train[:3])}."
    require(bool(train), "training cases", where, allowed=allowed, given=given, remedy=remedy, error=DataError)
    return replace(manifest, channels=(modality.upper(),), train=train, validation=validation, test=test)


def modalities(manifest: Manifest) -> tuple[str, ...]:
    """Tells what the scans of an AMOS22 manifest were taken with: "ct", "mri" or both; () for another layout."""
    if manifest.layout != "amos":
        return ()
    return tuple(sorted({modality for case in manifest.cases if (modality := amos_modality(case.name))}))

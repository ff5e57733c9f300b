"""Regions on request, for sets whose own lists name classes: those of BraTS, or what a file says."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dstlib.errors import DataError, SettingError
from dstlib.typed_json import read_json
from dstlib.zoo.e2enet.data.layouts.label_table import read_table, table_notes
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest

BRATS = "brats"
OPTION = f"{BRATS}, or a file of JSON with nnU-Net's 'labels' and 'regions_class_order'"

# How the classes of BraTS are called, in its years and in the Decathlon: in any order, with any values.
_PARTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in ("edema", "necro|non[- ]?enhancing", "(?<!non[- ])(?<!non)enhancing")
)


BRATS_REGIONS = ("whole tumour", "tumour core", "enhancing tumour")


def brats_regions(classes: Sequence[str], labels: Labels) -> Labels | None:
    """Returns the labels of BraTS's regions, as :data:`BRATS_REGIONS` names them; None where these are no such classes.

    The classes are edema, the core that does not enhance, and what does, in any order, with any values.

    >>> names = ("edema", "non-enhancing tumour", "enhancing tumour")
    >>> found = brats_regions(names, Labels.consecutive(3))
    >>> found.regions if found else None
    ((1, 2, 3), (2, 3), (3,))
    """
    found = [[i for i, name in enumerate(classes) if part.search(name)] for part in _PARTS]
    if labels.regions is not None or len(classes) != 3 or sorted(found) != [[0], [1], [2]]:
        return None
    edema, core, enhancing = (labels.values[i] for (i,) in found)
    regions = tuple(tuple(sorted(region)) for region in ((edema, core, enhancing), (core, enhancing), (enhancing,)))
    return replace(labels, regions=regions, written=(edema, core, enhancing))


def with_regions(manifest: Manifest, regions: str | None) -> Manifest:
    """Returns a set whose classes are these regions: "brats", or the path of a file; None leaves it as it is.

    BraTS's are whole tumour, tumour core and enhancing tumour, as the challenge ranks by them.

    Raises:
        SettingError: They are of other values than the label files hold.
        DataError: The file cannot be read.
    """
    if regions is None:
        return manifest
    names, labels = _brats(manifest) if regions == BRATS else _of_file(manifest, Path(regions))
    notes = (*manifest.notes, *table_notes(names, labels))
    return replace(manifest, classes=names, labels=labels, notes=tuple(dict.fromkeys(notes)))


def _brats(manifest: Manifest) -> tuple[tuple[str, ...], Labels]:
    labels = brats_regions(manifest.classes, manifest.labels)
    if labels is None:
        _refuse(manifest, "edema, a necrotic or non-enhancing core, and enhancing tumour", ", ".join(manifest.classes))
    return BRATS_REGIONS, labels


def _of_file(manifest: Manifest, file: Path) -> tuple[tuple[str, ...], Labels]:
    remedy = f"Pass {OPTION}."
    content = read_json(file, dict[str, Any], remedy=remedy, foreign=True, error=DataError)
    table = read_table(content.get("labels"), content.get("regions_class_order"))
    if isinstance(table, str) or table[1].regions is None:
        given = table if isinstance(table, str) else "'labels' without lists of values"
        raise DataError.of("content", str(file), allowed="regions as nnU-Net has them", given=given, remedy=remedy)
    names, labels = table
    ours, ignored = manifest.labels, labels.ignored or manifest.labels.ignored
    values = tuple(sorted(value for value in map(int, ours.in_files) if value not in (0, ignored)))
    if not {*labels.values} <= {*values}:
        _refuse(manifest, f"values {ours.told()}", f"{labels.told()} in {file}")
    return names, replace(labels, values=values, ignored=ignored)


def _refuse(manifest: Manifest, allowed: str, given: str) -> NoReturn:
    remedy = "Leave --regions out, or pass a file that says which values make each region."
    raise SettingError.of("--regions", f"data set {manifest.name!r}", allowed=allowed, given=given, remedy=remedy)

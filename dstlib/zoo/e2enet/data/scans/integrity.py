"""A data set checked before any training: every defect and every oddity of every case, in one table.

A defect forbids the use of its case; a warning tells what is legal but seldom meant. What is checked of one case is in
:mod:`dstlib.zoo.e2enet.data.scans.defects`; here are the checks that compare cases.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from tqdm import tqdm

from dstlib.errors import few, number_of
from dstlib.report import abridge, on_one_line
from dstlib.zoo.e2enet.data.cases import Spacing, three
from dstlib.zoo.e2enet.data.layouts.amos import modalities
from dstlib.zoo.e2enet.data.layouts.channels import name_oddity, scheme_of
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest
from dstlib.zoo.e2enet.data.scans.defects import colour_defects
from dstlib.zoo.e2enet.data.scans.nifti import Fault, Scan, examine_scan

WHOLE_SET = "(whole set)"  # in the place of a case's name
MAX_RATIO = 10.0  # between the largest and the smallest spacing of an axis of the patient


class Defect(NamedTuple):
    """What is wrong with, or odd about, one case."""

    case: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What :func:`check` found in a data set: defects and warnings, in the order of the cases.

    >>> findings = Findings(manifest_name="toy", num_cases=3, defects=(Defect("b", "b.nii is missing"),), warnings=())
    >>> print(findings.table())
    toy: 3 cases, 1 defect in 1 case, 0 warnings
    case
    b     DEFECT  b.nii is missing
    """

    manifest_name: str
    num_cases: int
    defects: tuple[Defect, ...]
    warnings: tuple[Defect, ...]

    @property
    def ok(self) -> bool:
        """Whether every case can be used."""
        return not self.defects

    def table(self, *, whole: bool = False) -> str:
        """Returns a line per finding, defects first: ten at most of a kind, unless the ``whole`` list is asked for."""
        num_bad = len({defect.case for defect in self.defects})
        head = f"{self.manifest_name}: {number_of(self.num_cases, 'case')}, {number_of(len(self.defects), 'defect')}"
        head += f" in {number_of(num_bad, 'case')}" if num_bad else ""
        lines = [f"{head}, {number_of(len(self.warnings), 'warning')}"]
        rows = [(d.case, "DEFECT", d.text) for d in self.defects] + [(w.case, "warning", w.text) for w in self.warnings]
        if rows:
            width, kind_width = max(4, *(len(case) for case, _, _ in rows)), max(len(kind) for _, kind, _ in rows)
            told = [on_one_line(f"{case:<{width}}  {kind:<{kind_width}}  {text}") for case, kind, text in rows]
            names = [case for case, _, _ in rows]
            lines += ["case", *(told if whole else abridge(told, names, whole="--all lists them"))]
        return "\n".join(lines)


class _Facts(NamedTuple):
    """What the checks of the whole set need of one sound case."""

    name: str
    orientation: str
    spacing: Spacing  # towards right, front and top of the patient
    numbers: frozenset[int]  # of its label, in memory
    image: bytes  # a checksum of its voxels, and their shape


def check(manifest: Manifest, *, progress: bool = True) -> Findings:
    """Opens every file of a data set, one case after the other, and says all that is wrong or odd.

    A part that is listed, but of which no file is there (a test set that was not downloaded), is one warning.
    """
    defects: list[Defect] = []
    warnings: list[Defect] = []
    facts: dict[str, list[_Facts]] = {"train": [], "validation": [], "test": []}
    parts = {"train": manifest.train, "validation": manifest.validation, "test": manifest.test}
    for part in ("validation", "test"):
        if parts[part] and not any(exists(file) for case in parts[part] for file in case.images):
            text = f"none of the {len(parts[part])} images of the {part} part is there: left out of this check"
            warnings.append(Defect(WHOLE_SET, text))
            parts[part] = ()
    todo = [(part, case) for part, cases in parts.items() for case in cases]
    for part, case in tqdm(todo, f"checking {manifest.name}", unit="case", disable=not progress):
        labels = None if part == "test" else manifest.labels
        scan, wrong, odd = examine_scan(case, num_channels=len(manifest.channels), labels=labels)
        defects += [_defect(case.name, fault, manifest.folder) for fault in wrong]
        warnings += [_defect(case.name, fault, manifest.folder) for fault in odd]
        if scan is not None:
            colours = [i for i, channel in enumerate(manifest.channels) if scheme_of(channel) == "rgb_to_0_1"]
            defects += [Defect(case.name, text) for text in colour_defects(scan.image, colours)]
            facts[part].append(_facts(scan))
        del scan  # or it would be held while the next one is read
    warnings += [Defect(WHOLE_SET, text) for text in (*manifest.notes, *_oddities_of_set(manifest, facts))]
    num_cases = len(manifest.cases)
    return Findings(manifest_name=manifest.name, num_cases=num_cases, defects=tuple(defects), warnings=tuple(warnings))


def _defect(case: str, fault: Fault, folder: Path) -> Defect:
    file = fault.file.relative_to(folder) if fault.file.is_relative_to(folder) else fault.file
    return Defect(case, str(fault._replace(file=file)))


def _facts(scan: Scan) -> _Facts:
    present = np.zeros(256, bool)
    for plane in () if scan.label is None else scan.label:  # as an index takes eight times the memory of a label
        present[plane] = True
    spacing = voxel_sizes(scan.affine)[np.argsort(nibabel.io_orientation(scan.affine)[:, 0])]
    orientation = "".join(nibabel.aff2axcodes(scan.affine))
    digest = hashlib.sha256(repr(scan.image.shape).encode())
    digest.update(np.ascontiguousarray(scan.image).data)
    numbers = frozenset(np.flatnonzero(present).tolist())
    return _Facts(scan.name, orientation, three(spacing.tolist()), numbers, digest.digest())


def _oddities_of_set(manifest: Manifest, facts: dict[str, list[_Facts]]) -> list[str]:
    cases = [case for part in facts.values() for case in part]
    texts = []
    if manifest.layout == "amos" and len(found := modalities(manifest.cases)) > 1:
        counts = ", ".join(f"{number} {name.upper()}" for name, number in sorted(found.items()))
        texts.append(f"CT and MRI are mixed, told apart by ids ({counts}): a training takes those of its --modality")
    texts += [f"channel {i} {text}" for i, name in enumerate(manifest.channels) if (text := name_oddity(name))]
    texts += _copies(cases) + _orientations(cases) + _spacings(cases)
    seen = frozenset[int]().union(*(case.numbers for case in facts["train"]))
    members = zip(manifest.classes, manifest.labels.members, strict=True)
    if facts["train"] and (absent := [name for name, numbers in members if seen.isdisjoint(numbers)]):
        texts.append(f"no training case that can be used holds {', '.join(absent)}")
    return texts


def _copies(cases: Sequence[_Facts]) -> list[str]:
    by_image: dict[bytes, list[str]] = {}
    for case in cases:
        by_image.setdefault(case.image, []).append(case.name)
    alike = [" = ".join(sorted(names)) for names in by_image.values() if len(names) > 1]
    if not alike:
        return []
    told = "image(s) are there more than once, voxel for voxel, so that a copy may be held out of what is trained on"
    return [f"{len(alike)} {told}: {few(sorted(alike))}"]


def _orientations(cases: Sequence[_Facts]) -> list[str]:
    by_code: dict[str, list[str]] = {}
    for case in cases:
        by_code.setdefault(case.orientation, []).append(case.name)
    if len(by_code) < 2:
        return []
    counts = sorted(by_code.items(), key=lambda item: (-len(item[1]), item[0]))
    told = ", ".join(f"{code} in {number_of(len(names), 'case')} ({names[0]}, say)" for code, names in counts)
    return [f"orientations are mixed: {told}; preparing the cases brings them into one"]


def _spacings(cases: Sequence[_Facts]) -> list[str]:
    texts = []
    for axis, towards in enumerate(("right", "front", "top")):
        sizes = {case.name: case.spacing[axis] for case in cases}
        if sizes and max(sizes.values()) > MAX_RATIO * min(sizes.values()):
            at, to = min(sizes, key=lambda name: sizes[name]), max(sizes, key=lambda name: sizes[name])
            low, high = sizes[at], sizes[to]
            texts.append(f"spacing towards {towards} goes from {low:g} mm ({at}) to {high:g} mm ({to}): is one wrong?")
    return texts

"""The data of a run: real scans or phantoms from their files, prepared, and divided by fold."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from dstlib.errors import SettingError, few
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.data.cases import Cases, same_images
from dstlib.zoo.e2enet.data.division import divide
from dstlib.zoo.e2enet.data.layouts.amos import only_modality
from dstlib.zoo.e2enet.data.layouts.channels import (
    SCHEMES,
    Modality,
    Scheme,
    modality_of,
    name_oddity,
    schemes_of,
)
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Geometry, Manifest
from dstlib.zoo.e2enet.data.layouts.regions import with_regions
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.data.preprocessing.cache import prepared_cases
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.records import DataRecord

RUNS = Path("runs")
NUM_PREPARING = 4  # processes at most: each takes up to 6 float32 copies of a scan, 4 GB of 768×768×300 voxels


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which scans a run takes, and how they are divided.

    - ``folder``: of a data set; None to draw phantoms.
    - ``phantoms``: the kind and the number to draw where there is no folder.
    - ``layout``: one of ``data.layouts.detect.LAYOUTS``; None to recognise it.
    - ``allow_outside``: whether dataset.json may name files outside of the folder.
    - ``geometry``: the rule by which NIfTI headers are read; None for ITK's.
    - ``regions``: what to predict in the place of the classes: "brats", or a file that says it; None for the classes.
    - ``modality``: how every channel is normalised; None and "declared" for each as it is called.
    - ``made_for``: the modality of the recipe: where no channel is of it, ``modality`` must not be None.
    - ``fold``: which fifth is held out, "0" to "4", or which entry of ``splits``; "all" trains on every case and holds
      out the set's own validation cases, if it has any.
    - ``splits``: a file of folds, as nnU-Net's splits_final.json; None to draw them.
    - ``groups``: the file, or the pattern of names, that tells which scans are of one patient; see
      :func:`~dstlib.zoo.e2enet.data.groups.read_groups`.
    - ``cache``: where prepared scans are kept, those of each set in a folder of its own; None for one under ``runs``.
    """

    phantoms: tuple[str, int]
    modality: Modality | Literal["declared"] | None = None
    made_for: Modality | None = None
    folder: Path | None = None
    layout: str | None = None
    allow_outside: bool = False
    geometry: Geometry | None = None
    regions: str | None = None
    fold: str = "0"
    splits: Path | None = None
    groups: str | None = None
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a run trains on, and what it is judged by: the held-out cases, prepared and as the files they came in."""

    name: str
    modality: Modality | Literal["declared"]
    labels: Labels
    geometry: Geometry
    preparation: Preparation
    train_on: Cases
    held_out: Cases
    held_out_files: tuple[CaseFiles, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        return self.train_on.channels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train_on.classes

    def record(self) -> DataRecord:
        """Returns what settles the result, without where the files lie."""
        return DataRecord(
            name=self.name,
            modality=self.modality,
            channels=self.channels,
            classes=self.classes,
            preparation=self.preparation,
            train_on=tuple(case.name for case in self.train_on.cases),
            held_out=tuple(case.name for case in self.held_out.cases),
            labels=None if self.labels == Labels.consecutive(len(self.classes)) else self.labels,
            geometry=None if self.geometry == "sform" else self.geometry,
        )

    def absent_classes(self) -> list[str]:
        """Returns the classes that no case to train on has."""
        found = tqdm(self.train_on.cases, "reading labels", unit="case", leave=False)
        present = set().union(*(case.class_voxels for case in found))
        return [name for label, name in enumerate(self.classes, start=1) if label not in present]


def open_dataset(settings: DataSettings, *, workers: int, ranks: Ranks) -> Dataset:
    """Reads, checks and prepares the scans that the settings name, or draws phantoms, with so many processes.

    Intensities are normalised by all labelled scans of the set, whatever the fold, as nnU-Net does: folds then share
    their prepared scans, and the held-out ones contribute four numbers per channel.

    Raises:
        DataError: The set cannot be used; the message lists every defect.
        SettingError: There is no such fold, or no channel is of the modality that the recipe is made for.
    """
    if not ranks.leads:
        ranks.wait()  # the leader has drawn and prepared
    manifest = _read_manifest(settings)
    schemes = _schemes(manifest, settings)
    modality = modality_of(schemes)
    word: Modality | Literal["declared"] = modality or "declared"
    division = divide(manifest, fold=settings.fold, splits=settings.splits, groups=settings.groups)
    if ranks.leads:
        normalised = f"Channels are normalised: {'; '.join(_told(manifest.channels, schemes))}."
        _print((*manifest.told(), normalised, *division.notes))
    cache = settings.cache or RUNS / "prepared" / f"{manifest.name}-{word}"
    if ranks.leads:
        _print(_told_left(cache))
    workers = min(workers, NUM_PREPARING)
    prepared = partial(
        prepared_cases, manifest, modality=modality, folder=cache / set_key(manifest.folder), workers=workers
    )
    cases, preparation = prepared(manifest.train)
    files = {files.name: files for files in (*manifest.train, *manifest.validation)}
    if {*division.train, *division.held_out} - {case.name for case in manifest.train}:
        judged, _ = prepared(manifest.validation, preparation=preparation)
        cases = replace(cases, cases=cases.cases + judged.cases)
    train_on, held_out = _named(cases, division.train), _named(cases, division.held_out)
    if ranks.leads:
        _print(_told_copies(train_on, held_out))
        ranks.wait()
    return Dataset(
        name=manifest.name,
        modality=word,
        labels=manifest.labels,
        geometry=settings.geometry or "itk",
        preparation=preparation,
        train_on=train_on,
        held_out=held_out,
        held_out_files=tuple(files[name] for name in division.held_out),
    )


def set_key(folder: Path) -> str:
    """Names the folder of a set's prepared scans, by where the set lies.

    Sets may share their names and those of their cases, as phantoms and what they stand for do: in one folder, each
    would take the place of the other.
    """
    return "set-" + hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]


def _told_left(cache: Path) -> list[str]:
    """Says what earlier builds have left, which kept all sets in one folder."""
    left = sorted(each.name for each in cache.glob("prepared-*") if each.is_dir())
    told = f"{cache} holds prepared scans of an earlier build, which nothing reads any more: {few(left)}. Delete them."
    return [told] if left else []


def _read_manifest(settings: DataSettings) -> Manifest:
    if settings.folder is None:
        kind, num_scans = settings.phantoms
        drawn = write_phantoms(RUNS / "phantoms" / f"{kind}-{num_scans}", kind, num_scans=num_scans)
        manifest = replace(read_manifest(drawn, settings.layout), recognised="")
    else:
        manifest = read_manifest(settings.folder, settings.layout, allow_outside=settings.allow_outside)
    manifest = manifest.placed_by(settings.geometry or "itk")
    manifest = with_regions(manifest, settings.regions)
    if manifest.layout != "amos":
        return manifest
    asked = None if settings.modality == "declared" else settings.modality
    return only_modality(manifest, asked or settings.made_for or "ct")


def _schemes(manifest: Manifest, settings: DataSettings) -> tuple[Scheme, ...]:
    """Returns how each channel is normalised: as it is called, unless another modality is asked for.

    Raises:
        SettingError: None is asked for, and no channel is of the modality that the recipe is made for.
    """
    asked, made_for = settings.modality, settings.made_for
    schemes = schemes_of(manifest.channels, None if asked == "declared" else asked)
    if asked is None and made_for is not None and schemes_of(("",), made_for)[0] not in schemes:
        where, allowed = f"data set {manifest.name!r}", f"{made_for.upper()}, for which this recipe is made"
        given = f"channels that are normalised: {'; '.join(_told(manifest.channels, schemes))}"
        remedy = f"Pass --modality declared to do so, or --modality {made_for} to take it for {made_for.upper()}."
        raise SettingError.of("channels", where, allowed=allowed, given=given, remedy=remedy)
    return schemes


def _told(channels: Sequence[str], schemes: Sequence[Scheme]) -> list[str]:
    return [
        f"{channel!r} {SCHEMES[scheme]}" + " (a name that is not known)" * (name_oddity(channel) is not None)
        for channel, scheme in zip(channels, schemes, strict=True)
    ]


def _told_copies(train_on: Cases, held_out: Cases) -> list[str]:
    """Says which held-out cases are trained on under another name."""
    inside, outside = ({case.name for case in cases.cases} for cases in (train_on, held_out))
    alike = same_images((*train_on.cases, *held_out.cases))
    pairs = [" = ".join(names) for names in alike if inside & set(names) and outside & set(names)]
    if not pairs:
        return []
    told = f"{len(pairs)} image(s) are both trained on and held out, voxel for voxel, and their scores tell nothing"
    return [f"Warning: {told}: {few(pairs)}. Remove the copies, or give them one patient (--groups)."]


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(on_one_line(line))


def _named(cases: Cases, names: Sequence[str]) -> Cases:
    by_name = {case.name: case for case in cases.cases}
    return replace(cases, cases=tuple(by_name[name] for name in names))

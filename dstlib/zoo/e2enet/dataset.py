"""The data of a run: real scans or phantoms from their files, prepared, and divided by fold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dstlib.errors import SettingError, require, shown
from dstlib.report import on_one_line
from dstlib.zoo.e2enet.data.cases import Cases
from dstlib.zoo.e2enet.data.layouts.amos import only_modality
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.left_out import listed
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.data.preprocessing.cache import prepared_cases
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import Modality
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.data.splits import split
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.records import DataRecord

RUNS = Path("runs")
NUM_FOLDS = 5
NUM_PREPARING = 4  # processes at most: each takes up to 6 float32 copies of a scan, 4 GB of 768×768×300 voxels


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which scans a run takes, and how they are divided.

    - ``folder``: of a data set; None to draw phantoms.
    - ``phantoms``: the kind and the number to draw where there is no folder.
    - ``layout``: decathlon, amos, btcv or nnunet; None to recognise it.
    - ``allow_outside``: whether dataset.json may name files outside of the folder.
    - ``modality``: how intensities are normalised.
    - ``fold``: which fifth is held out, "0" to "4"; "all" trains on every case and holds out the set's own
      validation cases, if it has any.
    - ``cache``: where prepared scans are kept; None for a folder under ``runs``.
    """

    phantoms: tuple[str, int]
    modality: Modality
    folder: Path | None = None
    layout: str | None = None
    allow_outside: bool = False
    fold: str = "0"
    cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a run trains on, and what it is judged by: the held-out cases, prepared and as the files they came in."""

    name: str
    modality: Modality
    labels: Labels
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
        SettingError: There is no such fold.
    """
    if not ranks.leads:
        ranks.wait()  # the leader has drawn and prepared
    manifest = _read_manifest(settings)
    train_names, held_out_names = _fold(manifest, settings.fold)
    if ranks.leads:
        for line in (*manifest.told(), *_unused(manifest, settings.fold)):
            print(on_one_line(line))
    cache = settings.cache or RUNS / "prepared" / f"{manifest.name}-{settings.modality}"
    workers = min(workers, NUM_PREPARING)
    prepared = partial(prepared_cases, manifest, modality=settings.modality, folder=cache, workers=workers)
    cases, preparation = prepared(manifest.train)
    if settings.fold == "all" and manifest.validation:
        judged, _ = prepared(manifest.validation, preparation=preparation)
        cases = replace(cases, cases=cases.cases + judged.cases)
    if ranks.leads:
        ranks.wait()
    files = {files.name: files for files in (*manifest.train, *manifest.validation)}
    return Dataset(
        name=manifest.name,
        modality=settings.modality,
        labels=manifest.labels,
        preparation=preparation,
        train_on=_named(cases, train_names),
        held_out=_named(cases, held_out_names),
        held_out_files=tuple(files[name] for name in held_out_names),
    )


def _read_manifest(settings: DataSettings) -> Manifest:
    if settings.folder is None:
        kind, num_scans = settings.phantoms
        drawn = write_phantoms(RUNS / "phantoms" / f"{kind}-{num_scans}", kind, num_scans=num_scans)
        manifest = replace(read_manifest(drawn, settings.layout), recognised="")
    else:
        manifest = read_manifest(settings.folder, settings.layout, allow_outside=settings.allow_outside)
    return only_modality(manifest, settings.modality) if manifest.layout == "amos" else manifest


def _unused(manifest: Manifest, fold: str) -> list[str]:
    """Says which labelled cases a training neither learns from nor is judged by."""
    if fold == "all" or not manifest.validation:
        return []
    number, names = len(manifest.validation), listed([case.name for case in manifest.validation])
    told = f"Note: {number} labelled cases that the set sets apart for validation take no part ({names})"
    return [f"{told}: --fold all holds out these, and trains on all others."]


def _fold(manifest: Manifest, fold: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names to train on, and those held out."""
    names = [files.name for files in manifest.train]
    if fold == "all":
        return tuple(sorted(names)), tuple(sorted(files.name for files in manifest.validation))
    remedy = "Pass 0 for the first fold."
    is_one = fold in map(str, range(NUM_FOLDS))
    require(is_one, "--fold", "the command line", allowed="0 to 4, or all", given=shown(fold), remedy=remedy)
    if len(names) < NUM_FOLDS:
        where, allowed = f"data set {manifest.name!r}", f"at least {NUM_FOLDS}, for as many folds"
        remedy = "Pass --fold all to train on every case without holding any out."
        raise SettingError.of("training cases", where, allowed=allowed, given=len(names), remedy=remedy)
    return split(names, fold=int(fold), num_folds=NUM_FOLDS)


def _named(cases: Cases, names: Sequence[str]) -> Cases:
    by_name = {case.name: case for case in cases.cases}
    return replace(cases, cases=tuple(by_name[name] for name in names))

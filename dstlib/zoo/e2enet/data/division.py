"""Which cases of a data set a run trains on, and which it holds out: by folds that are drawn, or those of a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstlib.errors import SettingError, few, number_of, require, shown
from dstlib.zoo.e2enet.data.groups import read_groups
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest
from dstlib.zoo.e2enet.data.splits import Fold, parted, read_splits, refuse_fold, split

NUM_FOLDS = 5
_COMMAND_LINE = "the command line"


@dataclass(frozen=True, kw_only=True)
class Division:
    """The names of the cases to train on, and of those held out; ``notes`` say what it leaves out, or mixes."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    notes: tuple[str, ...]


def divide(manifest: Manifest, *, fold: str = "0", splits: Path | None = None, groups: str | None = None) -> Division:
    """Divides the labelled cases of a set.

    ``fold`` is the number of a fold, or "all": then every training case is trained on, and the set's own validation
    cases are held out. The folds are those of the file ``splits``, or the set's own, or five are drawn: see
    :func:`~dstlib.zoo.e2enet.data.splits.read_splits`; ``groups`` tells which scans are of one patient, see
    :func:`~dstlib.zoo.e2enet.data.groups.read_groups`.

    Raises:
        SettingError: There is no such fold, there are too few cases for folds, or ``groups`` cannot be used.
        DataError: A file cannot be used, or the fold in it cannot be that of this set.
    """
    labelled = [files.name for files in (*manifest.train, *manifest.validation)]
    patients = _own_patients(manifest) if groups is None else read_groups(groups, labelled)
    if fold == "all":
        allowed, remedy = "a number with --splits", "Leave --splits out to train on every case."
        require(splits is None, "fold", _COMMAND_LINE, allowed=allowed, given="all", remedy=remedy)
        train, held_out = (
            tuple(sorted(files.name for files in part)) for part in (manifest.train, manifest.validation)
        )
    elif splits is not None:
        train, held_out = _chosen(read_splits(splits), fold, labelled, where=str(splits))
    elif manifest.folds:
        train, held_out = _chosen(_own_folds(manifest), fold, labelled, where=f"the list of {manifest.folder}")
    else:
        train, held_out = _drawn(manifest, fold, patients)
    notes = (*_left_out(manifest, {*train, *held_out}, splits), *_mixed(patients, train, held_out))
    is_of_set = splits is None and fold != "all"
    if is_of_set and manifest.folds:
        notes = (f"Note: the {len(manifest.folds)} folds are those that the set's own list gives.", *notes)
    elif is_of_set and groups is None and patients is not None:
        whole = f"the {len(patients)} scans are of {len({*patients.values()})} patients, of whom each is in one fold"
        notes = (f"Note: by their names {whole}.", *notes)
    return Division(train=train, held_out=held_out, notes=notes)


def _own_patients(manifest: Manifest) -> dict[str, str] | None:
    """Returns whom each scan is of, where the names of a set tell it and some are of one patient."""
    patients = {files.name: files.patient or files.name for files in (*manifest.train, *manifest.validation)}
    return patients if len({*patients.values()}) < len(patients) else None


def _own_folds(manifest: Manifest) -> tuple[Fold, ...]:
    """Returns the folds that a set has of its own."""
    names = [files.name for files in manifest.train]
    return tuple(
        Fold(train=tuple(name for name in names if name not in held_out), val=held_out) for held_out in manifest.folds
    )


def _chosen(
    folds: Sequence[Fold], fold: str, names: Sequence[str], *, where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    is_one, allowed = fold in map(str, range(len(folds))), f"the number of one of the {len(folds)} folds in {where}"
    remedy = "They count from 0."
    require(is_one, "fold", _COMMAND_LINE, allowed=allowed, given=shown(fold), remedy=remedy)
    chosen = folds[int(fold)]
    refuse_fold(chosen, names, where=f"fold {fold} of {where}")
    return tuple(sorted(chosen.train)), tuple(sorted(chosen.val))


def _drawn(
    manifest: Manifest, fold: str, patients: Mapping[str, str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = [files.name for files in manifest.train]
    remedy = "Pass 0 for the first fold."
    is_one = fold in map(str, range(NUM_FOLDS))
    require(is_one, "fold", _COMMAND_LINE, allowed="0 to 4, or all", given=shown(fold), remedy=remedy)
    number = len(names) if patients is None else len({patients[name] for name in names})
    if number < NUM_FOLDS:
        where, allowed = f"data set {manifest.name!r}", f"at least {NUM_FOLDS}, for as many folds"
        what = "training cases" if patients is None else "patients"
        remedy = "Fold 'all' trains on every case and holds none out."
        raise SettingError.of(what, where, allowed=allowed, given=number, remedy=remedy)
    return split(names, fold=int(fold), num_folds=NUM_FOLDS, groups=patients)


def _left_out(manifest: Manifest, taken: set[str], splits: Path | None) -> list[str]:
    """Says which labelled cases a training neither learns from nor is judged by."""
    train, apart = (
        [files.name for files in part if files.name not in taken] for part in (manifest.train, manifest.validation)
    )
    notes = []
    if train:
        told = f"{len(train)} of the {len(manifest.train)} training cases are in neither part of the fold in {splits}"
        notes.append(f"Note: {told} ({few(train)}).")
    if apart:
        cases = number_of(len(apart), "labelled case")
        told = f"Note: left out: {cases} that the set sets apart for validation"
        notes.append(f"{told} ({few(apart)}): fold 'all' holds out these, and trains on all others.")
    return notes


def _mixed(patients: Mapping[str, str] | None, train: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Says whose scans are on both sides."""
    both = () if patients is None else parted(patients, train, held_out)
    told = f"{len(both)} patient(s) have scans that are trained on and scans that are held out"
    return [f"Warning: {told}, whose scores tell less of new patients: {few(both)}."] if both else []

"""Which cases of a data set are trained on, and which are held out: drawn here, or read from a file."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstlib.errors import DataError, few, require, similar
from dstlib.typed_json import read_json


def split(
    names: Sequence[str],
    *,
    fold: int = 0,
    num_folds: int = 5,
    seed: int = 12345,
    groups: Mapping[str, str] | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names to train on, and those held out, of one fold of a shuffled cross-validation.

    The names are sorted first, so their order does not matter, and both answers are sorted. Every name is
    held out in exactly one fold; the first ``len(names) % num_folds`` folds hold out one name more.

    Where ``groups`` gives a group, a patient say, to each name, and one to several names, all of one group are held out
    in one fold: the largest group first, of equals the first by name, to the fold that holds out the fewest names so
    far, of equals the first. So no two folds differ by more than the largest group; nothing is shuffled.

    Raises:
        SettingError: There is no such fold, or there are fewer names, or groups, than folds.

    Reference: the five folds of nnU-Net, which E2ENet trains on: scikit-learn's
    ``KFold(5, shuffle=True, random_state=12345)`` over the sorted ids, reproduced without scikit-learn.

    >>> split(["e", "d", "c", "b", "a"], fold=0)
    (('b', 'c', 'd', 'e'), ('a',))
    """
    count, what = (len(names), "names") if groups is None else (len({groups[name] for name in names}), "groups")
    allowed, remedy = f"2 to {count}, the number of {what}", f"Choose fewer folds, or pass more {what}."
    require(2 <= num_folds <= count, "num_folds", "a split", allowed=allowed, given=num_folds, remedy=remedy)
    in_range = 0 <= fold < num_folds
    require(in_range, "fold", "a split", allowed=f"0 to {num_folds - 1}", given=fold, remedy="Folds count from 0.")
    ordered = sorted(names)
    if groups is not None and count < len(names):
        held_out = _balanced(ordered, groups, num_folds)[fold]
    else:
        # The legacy generator on purpose: only its shuffle draws the published folds.
        order = np.arange(len(ordered))
        np.random.RandomState(seed).shuffle(order)
        held_out = {ordered[i] for i in np.array_split(order, num_folds)[fold].tolist()}
    train = tuple(name for name in ordered if name not in held_out)
    return train, tuple(name for name in ordered if name in held_out)


def _balanced(names: Sequence[str], groups: Mapping[str, str], num_folds: int) -> list[set[str]]:
    """Deals groups out to folds, each whole.

    Reference: the greedy rule of scikit-learn's ``GroupKFold``, which orders equal groups otherwise.
    """
    members: dict[str, set[str]] = {}
    for name in names:
        members.setdefault(groups[name], set()).add(name)
    folds: list[set[str]] = [set() for _ in range(num_folds)]
    for _, group in sorted(members.items(), key=lambda item: (-len(item[1]), item[0])):
        min(folds, key=len).update(group)
    return folds


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One entry of a file of splits: the names to train on, and those held out."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def read_splits(file: Path) -> tuple[Fold, ...]:
    """Reads nnU-Net's ``splits_final.json``: a list of folds, each with the names under ``train`` and ``val``.

    Raises:
        DataError: The file cannot be read, or holds something else.
    """
    remedy = 'It is a list of {"train": ["case_1", ...], "val": ["case_2", ...]}, as nnU-Net\'s splits_final.json.'
    return read_json(file, tuple[Fold, ...], remedy=remedy, foreign=True, error=DataError)


def refuse_fold(fold: Fold, names: Collection[str], *, where: str) -> None:
    """Refuses a fold that cannot be that of these names.

    Raises:
        DataError: It names a case that there is not, or one twice, or none to train on.
    """
    named, known = (*fold.train, *fold.val), set(names)
    remedy = "Name the cases as their files are called, without channel and ending."
    if unknown := sorted(set(named) - known):
        near = f"Similar to the first: {similar(unknown[0], sorted(known))}. "
        raise DataError.of("cases", where, allowed="cases of the set", given=few(unknown), remedy=near + remedy)
    if twice := sorted(name for name, count in Counter(named).items() if count > 1):
        both = sorted(set(fold.train) & set(fold.val))
        given = f"{few(both)} in train and val" if both else f"{few(twice)} more than once"
        remedy = "What is trained on tells nothing of scans that are new: take them out of one list."
        raise DataError.of("cases", where, allowed="each case once", given=given, remedy=remedy)
    remedy = "Name some under train."
    require(len(fold.train) > 0, "train", where, allowed="some cases", given="none", remedy=remedy, error=DataError)


def parted(groups: Mapping[str, str], train: Sequence[str], held_out: Sequence[str]) -> tuple[str, ...]:
    """Lists the groups that have names on both sides.

    >>> parted({"a": "p", "b": "p", "c": "q"}, ["a"], ["b", "c"])
    ('p',)
    """
    return tuple(sorted({groups[name] for name in train} & {groups[name] for name in held_out}))

"""Which cases of a data set are trained on, and which are held out."""

from collections.abc import Sequence

import numpy as np

from dstlib.errors import require


def split(
    names: Sequence[str], *, fold: int = 0, num_folds: int = 5, seed: int = 12345
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names to train on, and those held out, of one fold of a shuffled cross-validation.

    The names are sorted first, so their order does not matter, and both answers are sorted. Every name is
    held out in exactly one fold; the first ``len(names) % num_folds`` folds hold out one name more.

    Raises:
        SettingError: There is no such fold, or there are fewer names than folds.

    Reference: the five folds of nnU-Net, which E2ENet trains on: scikit-learn's
    ``KFold(5, shuffle=True, random_state=12345)`` over the sorted ids, reproduced without scikit-learn.

    >>> split(["e", "d", "c", "b", "a"], fold=0)
    (('b', 'c', 'd', 'e'), ('a',))
    """
    allowed, remedy = f"2 to {len(names)}, the number of names", "Choose fewer folds, or pass more names."
    require(2 <= num_folds <= len(names), "num_folds", "a split", allowed=allowed, given=num_folds, remedy=remedy)
    in_range = 0 <= fold < num_folds
    require(in_range, "fold", "a split", allowed=f"0 to {num_folds - 1}", given=fold, remedy="Folds count from 0.")
    ordered = sorted(names)
    # The legacy generator on purpose: only its shuffle draws the published folds.
    order = np.arange(len(ordered))
    np.random.RandomState(seed).shuffle(order)
    held_out = set(np.array_split(order, num_folds)[fold].tolist())
    train = tuple(name for i, name in enumerate(ordered) if i not in held_out)
    return train, tuple(name for i, name in enumerate(ordered) if i in held_out)

"""Largest components: by hand, by a slow flood fill, and chosen where validation gains."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import examples

from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.evaluation.evaluate import choose_postprocessing
from dstlib.zoo.e2enet.evaluation.metrics import dice_per_class
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest

LABELS = arrays(np.uint8, st.tuples(*[st.integers(1, 6)] * 3), elements=st.sampled_from([0, 0, 0, 1, 2]))
CLASSES = st.sampled_from([(), (1,), (2,), (1, 2), (2, 1)])


def line(*values):
    return np.array(values, np.uint8).reshape(1, 1, -1)


def test_by_hand():
    label = line(1, 0, 1, 1, 0, 2, 0, 2, 2, 1)
    np.testing.assert_array_equal(keep_largest(label, (1,)), line(0, 0, 1, 1, 0, 2, 0, 2, 2, 0))
    np.testing.assert_array_equal(keep_largest(label, (1, 2)), line(0, 0, 1, 1, 0, 0, 0, 2, 2, 0))
    np.testing.assert_array_equal(keep_largest(label, (5,)), label)


def test_voxels_that_share_a_corner_are_connected():
    label = np.zeros((3, 3, 4), np.uint8)
    label[0, 0, 0] = label[1, 1, 1] = 1  # two by a corner, against one alone
    label[2, 0, 3] = 1
    assert np.argwhere(keep_largest(label, (1,))).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_of_two_of_a_size_the_first_stays():
    np.testing.assert_array_equal(keep_largest(line(0, 1, 1, 0, 1, 1, 0, 1), (1,)), line(0, 1, 1, 0, 0, 0, 0, 0))


def slow_largest(mask):
    """The largest 26-connected set of voxels, the first in the volume of those as large."""
    left, best = {tuple(voxel) for voxel in np.argwhere(mask)}, []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        reached = [start]
        for voxel in reached:  # grows while it is walked over
            for step in product((-1, 0, 1), repeat=3):
                near = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if near in left:
                    left.remove(near)
                    reached.append(near)
        best = reached if len(reached) > len(best) else best
    kept = np.zeros_like(mask)
    for voxel in best:
        kept[voxel] = True
    return kept


@given(LABELS, CLASSES)
def test_equals_a_flood_fill(label, classes):
    before = label.copy()
    kept = keep_largest(label, classes)
    for k in (1, 2):
        expected = slow_largest(label == k) if k in classes else label == k
        np.testing.assert_array_equal(kept == k, expected)
    np.testing.assert_array_equal(label, before)


@given(LABELS, CLASSES)
def test_never_adds_and_a_second_time_changes_nothing(label, classes):
    kept = keep_largest(label, classes)
    assert ((kept == label) | (kept == 0)).all()
    np.testing.assert_array_equal(keep_largest(kept, classes), kept)
    assert kept.dtype == np.uint8


def chosen(predictions, labels, num_classes):
    pairs = list(zip(predictions, labels, strict=True))
    return choose_postprocessing(lambda: iter(pairs), Labels.consecutive(num_classes))


# Class 1 has a false island, class 2 is rightly in two parts, class 3 is as it should be.
def test_chosen_where_validation_gains():
    label = line(1, 1, 0, 0, 2, 0, 2, 0, 3)
    prediction = line(1, 1, 0, 1, 2, 0, 2, 0, 3)
    assert chosen([prediction], [label], 3) == (1,)
    assert chosen([label], [label], 3) == ()
    assert chosen([], [], 3) == ()


def test_the_mean_over_the_cases_decides():
    label = line(1, 1, 1, 0, 1)
    gains, loses = line(1, 1, 1, 0, 0, 0, 1), line(1, 1, 1, 0, 1)
    padded = line(1, 1, 1, 0, 0, 0, 0)
    # 6/7 → 1 against 1 → 6/7: no gain on the mean; with another case that gains, one
    assert chosen([gains, loses], [padded, label], 1) == ()
    assert chosen([gains, loses, gains], [padded, label, padded], 1) == (1,)


@given(st.lists(st.tuples(*[arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 2))] * 2), min_size=1, max_size=3))
@examples(20, 50)
def test_what_is_chosen_raises_its_own_dice_and_lowers_none(pairs):
    predictions, labels = zip(*pairs, strict=True)
    classes = chosen(predictions, labels, 2)
    pairs_before = [dice_per_class(label, p, num_classes=2) for p, label in pairs]
    pairs_after = [dice_per_class(label, keep_largest(p, classes), num_classes=2) for p, label in pairs]
    change = np.nansum(np.subtract(pairs_after, pairs_before), axis=0)
    assert all(change[k - 1] > 0 for k in classes)
    assert all(change[k - 1] == 0 for k in (1, 2) if k not in classes)

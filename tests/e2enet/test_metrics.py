"""Dice, surface Dice and Hausdorff distances against cubes worked by hand and against slow definitions."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import examples

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.evaluation.metrics import (
    METRICS,
    Scoring,
    dice_per_class,
    score,
    surface_dice,
    surface_distances,
)

SPACINGS = st.sampled_from([(1.0, 1.0, 1.0), (5.0, 0.75, 0.5), (0.3, 2.0, 1.1)])
MASKS = arrays(bool, st.tuples(*[st.integers(1, 5)] * 3)).filter(np.any)


def box(shape, start, stop):
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, start, stop))] = True
    return mask


# --- Dice: label 1 1 1 1 2 2 0 0 0 0 against prediction 1 1 1 0 2 0 2 0 3 0, classes 1 to 4:
# 1: 2·3 / (4 + 3), 2: 2·1 / (2 + 2), 3: 0 / (0 + 1), 4: in neither
def test_dice_by_hand():
    label = np.array([1, 1, 1, 1, 2, 2, 0, 0, 0, 0])
    prediction = np.array([1, 1, 1, 0, 2, 0, 2, 0, 3, 0])
    dice = dice_per_class(label, prediction, num_classes=4)
    np.testing.assert_array_equal(dice, [6 / 7, 0.5, 0.0, np.nan])


def test_dice_equals_the_definition_voxel_by_voxel(monkeypatch):
    monkeypatch.setattr("dstlib.zoo.e2enet.evaluation.metrics.CHUNK", 50)  # so that several are counted
    label, prediction = np.random.default_rng(0).integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    expected = [
        2 * ((label == k) & (prediction == k)).sum() / ((label == k).sum() + (prediction == k).sum()) for k in (1, 2, 3)
    ]
    np.testing.assert_array_equal(dice_per_class(label, prediction, num_classes=3), expected)


# --- distances
def slow_surface(mask):
    """Voxels with one of six neighbours outside."""
    padded = np.pad(mask, 1)
    found = []
    for voxel in np.argwhere(mask):
        z, y, x = voxel + 1
        around = (
            padded[z - 1, y, x],
            padded[z + 1, y, x],
            padded[z, y - 1, x],
            padded[z, y + 1, x],
            padded[z, y, x - 1],
            padded[z, y, x + 1],
        )
        if not all(around):
            found.append(voxel)
    return np.array(found)


def of_one_class(metric, label, prediction, spacing):
    volumes = label.astype(np.uint8), prediction.astype(np.uint8)
    scoring = Scoring(metrics=("dice", metric))
    return score(*volumes, spacing=spacing, num_classes=1, scoring=scoring).values[1, 0]


def hd95(label, prediction, *, spacing):
    return of_one_class("hd95", label, prediction, spacing)


def hd(label, prediction, *, spacing):
    return of_one_class("hd", label, prediction, spacing)


def slow_distances(label, prediction, spacing):
    a, b = slow_surface(label) * spacing, slow_surface(prediction) * spacing
    pairs = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return np.concatenate([pairs.min(axis=1), pairs.min(axis=0)])


@given(st.data(), SPACINGS)
def test_distances_equal_all_pairs_of_surface_voxels(data, spacing):
    label = data.draw(MASKS)
    prediction = data.draw(arrays(bool, label.shape).filter(np.any))
    expected = np.sort(slow_distances(label, prediction, spacing))
    found = np.sort(surface_distances(label, prediction, spacing=spacing))
    np.testing.assert_allclose(found, expected, atol=1e-12)  # the sum of three squares, in another order
    assert hd(label, prediction, spacing=spacing) == pytest.approx(expected.max())
    assert hd95(label, prediction, spacing=spacing) == pytest.approx(np.percentile(expected, 95))


# Two 2×2×2 cubes, one moved by 3 slices of 5 mm: of each, the far face is 15 mm away and so is the near one's
# partner: near face to near face 2·5 = 10 mm, far face 15 mm. Half the voxels of each cube are in either face.
def test_distances_of_a_moved_cube_by_hand():
    a, b = box((6, 2, 2), (0, 0, 0), (2, 2, 2)), box((6, 2, 2), (3, 0, 0), (5, 2, 2))
    distances = surface_distances(a, b, spacing=(5, 1, 1))
    assert sorted(distances) == [10.0] * 8 + [15.0] * 8
    assert hd(a, b, spacing=(5, 1, 1)) == 15.0
    # 16 values: the 95th percentile lies at index 0.95·15 = 14.25, among the 15s
    assert hd95(a, b, spacing=(5, 1, 1)) == 15.0


def test_the_percentile_pools_both_directions():
    # one voxel far away: it is 1 of 1 + 21 distances, so the pooled 95th percentile does not see it, and the
    # larger of the directions' percentiles would
    label = box((1, 1, 200), (0, 0, 0), (1, 1, 20))
    prediction = label.copy()
    prediction[0, 0, 199] = True
    distances = [0.0] * 40 + [180.0]
    assert sorted(surface_distances(label, prediction, spacing=(1, 1, 1))) == distances
    assert hd95(label, prediction, spacing=(1, 1, 1)) == 0.0
    assert hd(label, prediction, spacing=(1, 1, 1)) == 180.0


@examples(15, 30)
@given(st.data(), SPACINGS)
def test_distances_and_surface_dice_are_symmetric(data, spacing):
    a = data.draw(MASKS)
    b = data.draw(arrays(bool, a.shape).filter(np.any))
    assert hd95(a, b, spacing=spacing) == hd95(b, a, spacing=spacing)
    found = [surface_dice(x, y, spacing=spacing, tolerance=1.0) for x, y in ((a, b), (b, a))]
    assert found[0] == pytest.approx(found[1], abs=1e-6)  # float32 sums of areas in another order
    assert 0 <= found[0] <= 1 + 1e-6


# --- surface Dice
def corner_areas(mask, spacing):
    """Of a box: the centre (in mm) and the area of surface within each cube of eight neighbouring voxel centres.

    Eight neighbours with four inside share a face, of which the whole cross-section is surface; with two an edge,
    where it cuts halfway from side to side; with one a corner, cut off by a triangle halfway along each side.
    """
    d, h, w = spacing
    padded, found = np.pad(mask, 1), []
    for start in product(*(range(size - 1) for size in padded.shape)):
        inside = np.argwhere(padded[tuple(slice(i, i + 2) for i in start)])
        spread = np.ptp(inside, axis=0) if len(inside) else ()
        if len(inside) == 1:
            area = math.sqrt((h * w) ** 2 + (d * w) ** 2 + (d * h) ** 2) / 8
        elif len(inside) == 2:
            along = int(np.argmax(spread))
            across = [size for axis, size in enumerate(spacing) if axis != along]
            area = spacing[along] * math.hypot(*across) / 2
        elif len(inside) == 4:
            area = math.prod(size for axis, size in enumerate(spacing) if spread[axis])
        else:
            continue
        found.append((np.array(start) * spacing, area))
    centres, areas = zip(*found, strict=True)
    return np.array(centres), np.array(areas)


def slow_surface_dice(label, prediction, spacing, tolerance):
    (a, area_a), (b, area_b) = corner_areas(label, spacing), corner_areas(prediction, spacing)
    pairs = np.linalg.norm(a[:, None] - b[None], axis=-1)
    near = area_a[pairs.min(axis=1) <= tolerance].sum() + area_b[pairs.min(axis=0) <= tolerance].sum()
    return near / (area_a.sum() + area_b.sum())


@st.composite
def boxes(draw, shape=(6, 6, 6)):
    start = [draw(st.integers(0, size - 1)) for size in shape]
    return box(shape, start, [draw(st.integers(a + 1, size)) for a, size in zip(start, shape, strict=True)])


@examples(15, 40)
@given(boxes(), boxes(), SPACINGS, st.sampled_from([0.0, 0.6, 1.3, 2.7]))  # no multiple of a spacing: no near ties
def test_surface_dice_of_boxes_equals_their_geometry(label, prediction, spacing, tolerance):
    assume(tolerance != 0.6 or 0.3 not in spacing)  # twice 0.3 in float32 may be either side of 0.6
    found = surface_dice(label, prediction, spacing=spacing, tolerance=tolerance)
    assert found == pytest.approx(slow_surface_dice(label, prediction, spacing, tolerance), abs=1e-5)  # float32


# A cube of 2×2×2 voxels of 1 mm and the same moved by one voxel along W, tolerance 0. Surface elements lie at the
# corners of voxels, 3×3×3 without the cube's midpoint: 6 in the faces, of area 1, 12 on the edges, of √2/2, and 8
# corners of √3/8. The planes w = 1 and 2 of the first are the planes 0 and 1 of the second: all of their elements
# are shared, but for the two midpoints.
def test_surface_dice_of_a_moved_cube_by_hand():
    a, b = box((2, 2, 3), (0, 0, 0), (2, 2, 2)), box((2, 2, 3), (0, 0, 1), (2, 2, 3))
    face, edge, corner = 1.0, math.sqrt(2) / 2, math.sqrt(3) / 8
    total = 6 * face + 12 * edge + 8 * corner
    middle = 4 * face + 4 * edge  # plane w = 1 of the first: its ring
    end = face + 4 * edge + 4 * corner  # plane w = 2 of the first: all of it
    shared = middle + end - face  # but (1, 1, 2) is no surface of the second
    assert surface_dice(a, b, spacing=(1, 1, 1), tolerance=0.0) == pytest.approx(shared / total, abs=1e-6)  # float32
    assert surface_dice(a, b, spacing=(1, 1, 1), tolerance=1.0) == 1.0


@examples(15, 30)
@given(MASKS, SPACINGS)
def test_a_perfect_prediction(mask, spacing):
    assert surface_dice(mask, mask, spacing=spacing, tolerance=0.0) == 1.0
    assert hd95(mask, mask, spacing=spacing) == hd(mask, mask, spacing=spacing) == 0.0


@settings(max_examples=15)
@given(st.data(), SPACINGS)
def test_surface_dice_grows_with_the_tolerance_up_to_one(data, spacing):
    a = data.draw(MASKS)
    b = data.draw(arrays(bool, a.shape).filter(np.any))
    found = [surface_dice(a, b, spacing=spacing, tolerance=t) for t in (0.0, 1.0, 2.0, 100.0)]
    assert found == sorted(found)
    assert found[-1] == 1.0


# --- all at once
def test_missing_structures():
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert [surface_dice(a, b, spacing=(1, 1, 1), tolerance=1.0) for a, b in ((empty, full), (full, empty))] == [0, 0]
    assert math.isnan(surface_dice(empty, empty, spacing=(1, 1, 1), tolerance=1.0))
    for a, b in ((empty, full), (full, empty), (empty, empty)):
        assert math.isnan(hd95(a, b, spacing=(1, 1, 1)))
        assert math.isnan(hd(a, b, spacing=(1, 1, 1)))


@settings(max_examples=20)
@given(st.data(), SPACINGS)
def test_score_equals_the_metrics_of_whole_volumes(data, spacing):
    label = data.draw(arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3), elements=st.integers(0, 3)))
    prediction = data.draw(arrays(np.uint8, label.shape, elements=st.integers(0, 3)))
    scoring = Scoring(tolerance=(0.0, 1.0, 2.0))
    found = score(label, prediction, spacing=spacing, num_classes=3, scoring=scoring)
    assert found.values.shape == (4, 3)
    for k in range(3):
        masks = label == k + 1, prediction == k + 1
        assert found.num_voxels[k].tolist() == [mask.sum() for mask in masks]
        expected = [
            dice_per_class(label, prediction, num_classes=3)[k],
            surface_dice(*masks, spacing=spacing, tolerance=float(k)),
            hd95(*masks, spacing=spacing),
            hd(*masks, spacing=spacing),
        ]
        np.testing.assert_allclose(found.values[:, k], expected, rtol=1e-6)  # float32 areas, summed over another box


@pytest.mark.parametrize("metrics", [("dice",), ("dice", "hd95"), ("hd", "nsd", "dice")])
def test_only_the_metrics_asked_for(metrics):
    label, prediction = np.random.default_rng(1).integers(0, 3, (2, 5, 6, 7)).astype(np.uint8)
    every = score(label, prediction, spacing=(1, 1, 1), num_classes=2, scoring=Scoring()).values
    some = score(label, prediction, spacing=(1, 1, 1), num_classes=2, scoring=Scoring(metrics=metrics)).values
    np.testing.assert_array_equal(some, every[[list(METRICS).index(name) for name in metrics]])


def test_other_shapes_are_refused():
    with pytest.raises(DataError, match=r"expected the label's shape \(2, 3\), got \(3, 2\)"):
        dice_per_class(np.zeros((2, 3), int), np.zeros((3, 2), int), num_classes=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ("dice", "hd59")}, "Similar to 'hd59': 'hd95'"),
        ({"metrics": ("nsd",)}, "expected 'dice' and more"),
        ({"tolerance": -1.0}, r"expected millimetres from 0 up, got -1\.0"),
        ({"tolerance": (1.0, math.nan)}, "millimetres"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(SettingError, match=message):
        Scoring(**change)


def test_one_tolerance_per_class_or_one_for_all():
    with pytest.raises(SettingError, match=r"expected one number, or 3 of them, got \(1\.0, 2\.0\)"):
        Scoring(tolerance=(1.0, 2.0)).tolerances(3)

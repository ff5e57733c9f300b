"""From a stored scan to the prepared one and back: hand-worked cases, laws, and other people's formulas."""

import json
import tracemalloc
from itertools import permutations, product

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from strategies import examples

from dstlib.errors import DataError, SettingError, StateError
from dstlib.typed_json import parse_json
from dstlib.zoo.e2enet.data.preprocessing import preprocessor
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import (
    Preparation,
    place_back,
    prepare_image,
    prepare_label,
    prepare_scan,
)
from dstlib.zoo.e2enet.data.preprocessing.resampling import (
    new_shape,
    resample_intensities,
    resample_slices,
)
from dstlib.zoo.e2enet.data.scans.geometry import coarse_axis, uncropped
from dstlib.zoo.e2enet.data.scans.nifti import Scan

RAS = np.eye(4)
AS_IT_IS = CtNormalization(low=-1e6, high=1e6, mean=0.0, std=1.0)  # of intensities within ± a million
ORIENTATIONS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]


def affine_of(axes, signs, spacing, tilt=0.0):
    """Of a file whose axis i runs along the patient's axis axes[i], in direction signs[i]."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    affine[list(axes), range(3)] = np.multiply(signs, spacing)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-7, 11, 13)
    return affine


def keeping(spacing=None, *, crop=True, rule=AS_IT_IS, num_channels=1):
    return Preparation(spacing=spacing, normalization=(rule,) * num_channels, crop=crop)


def one_hot(label, num_classes):
    """Slices (K, H, W), as many as the label is deep."""
    return np.stack([(label == k).astype(np.float32) for k in range(num_classes)], axis=1)


def resample_linearly(volume, new, coarse):
    slices = resample_slices((each[None] for each in volume), volume.shape, new, coarse)
    return np.concatenate([*slices])


shapes = st.tuples(*[st.integers(1, 9)] * 3)
spacings = st.tuples(*[st.floats(0.3, 6.0)] * 3)
orientations = st.sampled_from(ORIENTATIONS)
seeds = st.integers(0, 2**32 - 1)


# ---- orientation


def test_a_scan_in_las_is_mirrored_and_an_axial_one_turned():
    image = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3) + 1
    las, placement = prepare_image(image, np.diag([-1.0, 1, 1, 1]), keeping())
    assert las.tolist() == [[[[3, 2, 1], [6, 5, 4]]]]
    assert placement.flips == (False, False, True)
    # x of this file leads to the front, y to the right: height and width change places
    turned, placement = prepare_image(image, affine_of((1, 0, 2), (1, 1, 1), (1, 2, 3)), keeping())
    assert turned.tolist() == [[[[1, 4], [2, 5], [3, 6]]]]
    assert placement.spacing == (3.0, 1.0, 2.0)


@given(orientations, shapes, spacings, st.floats(-0.7, 0.7), seeds)
def test_canonical_order_is_nibabels(orientation, shape, spacing, tilt, seed):
    affine = affine_of(*orientation, spacing, tilt)
    voxels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    canonical = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))
    placement = uncropped(shape[::-1], affine)
    assert np.array_equal(placement.turn(voxels.T), np.asarray(canonical.dataobj).T)
    assert np.array_equal(placement.turn_back(placement.turn(voxels.T)), voxels.T)
    expected = nibabel.affines.voxel_sizes(canonical.affine)[::-1]
    np.testing.assert_allclose(placement.stored_spacing, expected, rtol=1e-6)  # the file keeps it as float32


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_what_is_prepared_is_placed_back_exactly(orientation):
    """In all 48 orientations, with a border to crop: the whole way there and back is the identity."""
    rng = np.random.default_rng(ORIENTATIONS.index(orientation))
    inside = np.zeros((7, 8, 9), bool)
    inside[1:5, 2:8, 3:4] = True
    label = rng.integers(0, 4, inside.shape).astype(np.uint8) * inside
    image = np.where(inside, rng.uniform(1, 2, inside.shape), 0).astype(np.float32)[None]
    prepared, placement = prepare_image(image, affine_of(*orientation, (0.5, 1, 3), 0.1), keeping())
    assert prepared[0].size == inside.sum()
    prepared_label = prepare_label(label, placement)
    assert prepared_label.shape == prepared.shape[1:]
    assert np.array_equal(place_back(one_hot(prepared_label, 4), placement), label)


@given(orientations, shapes, spacings, st.booleans(), seeds)
def test_without_anything_to_do_an_image_keeps_its_values(orientation, shape, spacing, crop, seed):
    image = np.random.default_rng(seed).uniform(1, 2, (2, *shape)).astype(np.float32)
    prepared, placement = prepare_image(image, affine_of(*orientation, spacing), keeping(crop=crop, num_channels=2))
    assert prepared.dtype == np.float32
    assert np.array_equal(prepared, np.stack([placement.turn(channel) for channel in image]))
    assert placement.stored_spacing == placement.spacing


def test_the_box_holds_what_any_channel_shows_and_an_empty_image_stays_whole():
    image = np.zeros((2, 4, 5, 6), np.float32)
    assert prepare_image(image, RAS, keeping(num_channels=2))[1].box == ((0, 4), (0, 5), (0, 6))
    image[0, 1, 2, 3] = -5
    image[1, 2, 2, 5] = 7
    prepared, placement = prepare_image(image, RAS, keeping(num_channels=2))
    assert placement.box == ((1, 3), (2, 3), (3, 6))
    assert prepared.shape == (2, 2, 1, 3)
    assert prepare_image(image, RAS, keeping(crop=False, num_channels=2))[0].shape == image.shape


# ---- resampling


@given(shapes, spacings, spacings, seeds)
@examples(20, 50)
def test_shapes_round_and_ranges_hold(shape, old, new, seed):
    image = np.random.default_rng(seed).uniform(1, 9, (1, *shape)).astype(np.float32)
    affine = affine_of((0, 1, 2), (1, 1, 1), old[::-1])
    prepared, placement = prepare_image(image, affine, keeping(new))
    assert prepared.shape[1:] == tuple(max(1, round(n * a / b)) for n, a, b in zip(shape, old, new, strict=True))
    assert placement.shape == prepared.shape[1:]
    assert image.min() <= prepared.min() <= prepared.max() <= image.max()


@given(shapes, shapes, seeds)
@examples(20, 50)
def test_cubic_and_linear_resampling_are_scipys_zoom(old, new, seed):
    volume = np.random.default_rng(seed).uniform(-1, 1, old).astype(np.float32)
    zoom = np.divide(new, old)
    cubic = ndimage.zoom(volume.astype(np.float64), zoom, order=3, mode="nearest", grid_mode=True)
    cubic = cubic.clip(volume.min(), volume.max())
    # Both sum some hundred products of numbers within ±3, we in float32 with its 6e-8 of rounding each.
    np.testing.assert_allclose(resample_intensities(volume, new, None), cubic, atol=1e-5)
    linear = ndimage.zoom(volume.astype(np.float64), zoom, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resample_linearly(volume, new, None), linear, atol=1e-6)


@given(shapes, shapes, st.integers(0, 2), seeds)
@examples(20, 50)
def test_along_the_coarse_axis_slices_are_resampled_for_themselves(old, new, coarse, seed):
    """nnU-Net's way: each slice in its plane, cubic and clipped to its own range, then the nearest slice."""
    volume = np.random.default_rng(seed).uniform(-1, 1, old).astype(np.float32)
    zoom = np.delete(np.divide(new, old), coarse)
    slices = []
    for plane in np.moveaxis(volume.astype(np.float64), coarse, 0):
        out = ndimage.zoom(plane, zoom, order=3, mode="nearest", grid_mode=True)
        slices.append(out.clip(plane.min(), plane.max()))
    # half-way between two slices, the later one
    nearest = [min(old[coarse] - 1, (2 * i + 1) * old[coarse] // (2 * new[coarse])) for i in range(new[coarse])]
    expected = np.moveaxis(np.stack(slices)[nearest], 0, coarse)
    np.testing.assert_allclose(resample_intensities(volume, new, coarse), expected, atol=1e-5)  # float32, as above


def test_the_coarse_axis_is_that_of_the_scan_then_that_of_the_network():
    assert coarse_axis((1.0, 3.0, 1.0)) is None  # not over three times
    assert coarse_axis((1.0, 3.1, 1.0), (9.0, 1.0, 1.0)) == 1
    assert coarse_axis((1.0, 1.0, 1.0), (9.0, 1.0, 1.0)) == 0
    assert coarse_axis((4.0, 4.0, 1.0), (9.0, 1.0, 1.0)) is None
    image = np.zeros((1, 2, 4, 4), np.float32)
    image[:, 1] = 1
    prepared, placement = prepare_image(
        image, affine_of((0, 1, 2), (1, 1, 1), (1, 1, 4)), keeping((1, 1, 1), crop=False)
    )
    assert placement.coarse == 0
    assert prepared[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # no ramp between slices


@given(shapes, spacings, spacings, st.sets(st.integers(0, 255), min_size=1, max_size=5), seeds)
@examples(20, 50)
def test_labels_keep_to_their_classes(shape, old, new, classes, seed):
    label = np.random.default_rng(seed).choice(sorted(classes), shape).astype(np.uint8)
    scan = Scan("a", np.ones((1, *shape), np.float32), label, affine_of((0, 1, 2), (1, -1, 1), old[::-1]))
    case = prepare_scan(scan, keeping(new))
    assert case.label.shape == new_shape(shape, old, new)
    assert set(np.unique(case.label)) <= set(np.unique(label))
    assert (case.spacing, case.orientation) == (new, "SAR")


def test_labels_by_hand():
    label = np.array([[[1, 1, 2, 2, 0, 0]]], np.uint8)
    affine = affine_of((0, 1, 2), (1, 1, 1), (1, 1, 1))
    _, placement = prepare_image(np.ones((1, 1, 1, 6), np.float32), affine, keeping((1, 1, 2)))
    assert prepare_label(label, placement).tolist() == [[[1, 2, 0]]]
    _, placement = prepare_image(np.ones((1, 1, 1, 6), np.float32), affine, keeping((1, 1, 1.5)))
    # centres at 0.25, 1.75, 3.25 and 4.75 of the old voxels: at 1.75 class 1 has 1/4 and class 2 has 3/4
    assert prepare_label(label, placement).tolist() == [[[1, 2, 2, 0]]]


@pytest.mark.parametrize("new", [(1.0, 1.0, 1.0), (3.0, 0.7, 1.3), (5.0, 0.8, 0.8)])
def test_a_ball_keeps_its_volume_there_and_back(new):
    old = (2.0, 1.0, 1.0)
    d, h, w = np.ogrid[:30, :60, :60]
    ball = ((d - 14.5) * 2) ** 2 + (h - 29.5) ** 2 + (w - 29.5) ** 2 < 25**2
    image = np.ones((1, *ball.shape), np.float32)
    scan = Scan("ball", image, ball.astype(np.uint8), affine_of((0, 1, 2), (1, 1, 1), old[::-1]))
    case = prepare_scan(scan, keeping(new))
    volume = 4 / 3 * np.pi * 25**3
    # A boundary off by a tenth of a millimetre all around is 3 · 0.1 / 25 = 1.2 %; voxels of 5 mm take it to 2 %.
    assert case.label.sum() * np.prod(new) == pytest.approx(volume, rel=0.02)
    _, placement = prepare_image(image, scan.affine, keeping(new))
    again = place_back(one_hot(case.label, 2), placement)
    assert again.shape == ball.shape
    assert again.sum() * np.prod(old) == pytest.approx(volume, rel=0.02)
    overlap = 2 * np.sum(again & ball) / (again.sum() + ball.sum())
    assert overlap > 0.95  # the nearest of slices up to 5 mm thick steps where the ball is round; 1 without resampling


def test_placing_back_compares_probabilities_on_the_grid_of_the_scan():
    rng = np.random.default_rng(0)
    image = rng.uniform(1, 2, (1, 6, 8, 10)).astype(np.float32)
    affine = affine_of((0, 1, 2), (1, 1, 1), (1, 1.5, 1))
    _, placement = prepare_image(image, affine, keeping((2.0, 2.0, 2.0)))
    probabilities = rng.dirichlet(np.ones(4), placement.shape).transpose(3, 0, 1, 2).astype(np.float32)
    zoom = np.divide((6, 8, 10), placement.shape)
    volumes = [ndimage.zoom(p.astype(np.float64), zoom, order=1, mode="nearest", grid_mode=True) for p in probabilities]
    slices = probabilities.swapaxes(0, 1)
    assert np.array_equal(place_back(slices, placement), np.argmax(volumes, axis=0))
    equal = np.full_like(slices, 1 / 4)
    assert not place_back(equal, placement).any()  # the lowest class of equals
    for axis in (1, 2):  # in whatever direction they come
        moved = np.moveaxis(probabilities, 1 + axis, 0)
        assert np.array_equal(place_back(moved, placement, axis=axis), np.argmax(volumes, axis=0))
    last = place_back(slices, placement, decide=lambda values_KHW: values_KHW[-1] > 2)
    assert last.dtype == np.uint8
    assert not last.any()


@given(shapes, shapes, st.sampled_from([None, 0, 1, 2]), seeds)
@examples(30, 100)
def test_slices_are_resampled_as_the_whole_volume_is(old, new, coarse, seed):
    """Class by class and axis by axis, the way it was done when all of it was in memory; so decisions are the same."""
    values = np.random.default_rng(seed).dirichlet(np.ones(3), old).transpose(3, 0, 1, 2).astype(np.float32)
    whole = values
    for axis in sorted(range(3), key=lambda axis: new[axis] / old[axis]):
        place = np.clip((np.arange(new[axis]) + 0.5) * (old[axis] / new[axis]) - 0.5, 0, old[axis] - 1)
        before = np.minimum(np.floor(place).astype(int), max(old[axis] - 2, 0))
        share = (place - before).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        if old[axis] == new[axis]:
            continue
        if axis == coarse:
            whole = whole.take(np.floor(place + 0.5).astype(int), axis + 1)
        else:
            after = np.minimum(before + 1, old[axis] - 1)
            whole = whole.take(before, axis + 1) * (1 - share) + whole.take(after, axis + 1) * share
    found = np.stack([*resample_slices(values.swapaxes(0, 1), old, new, coarse)], axis=1)
    np.testing.assert_array_equal(found, whole)


RULES = [AS_IT_IS, ZScoreNormalization(), ZScoreNormalization(inside_mask=True)]
large = st.tuples(*[st.integers(20, 50)] * 3)  # where small arrays, and what Python itself takes, do not count


@given(large, st.sampled_from(RULES), spacings, spacings, orientations, st.integers(1, 3))
@examples(10, 25)
def test_an_image_takes_no_more_memory_than_was_asked_for(shape, rule, old, new, orientation, num_channels):
    image = np.random.default_rng(0).uniform(1, 9, (num_channels, *shape)).astype(np.float32)
    asked = (image, affine_of(*orientation, old), keeping(new, rule=rule, num_channels=num_channels))
    told = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(preprocessor, "require_memory", lambda num, *words, **more: told.append(num))
        tracemalloc.start()
        try:
            prepare_image(*asked)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak <= told[0] + 300_000  # matrices of the splines


# ---- intensities


@given(spacings, seeds)
@examples(15, 30)
def test_ct_lies_within_the_clipped_range(new, seed):
    rng = np.random.default_rng(seed)
    rule = CtNormalization(low=-150.0, high=250.0, mean=40.0, std=70.0)
    image = rng.uniform(-1024, 3000, (1, 5, 6, 7)).astype(np.float32)
    prepared, _ = prepare_image(image, RAS, keeping(new, rule=rule))
    low, high = rule.apply(np.array([[[-150, 250]]], np.float32)).ravel()
    assert low <= prepared.min() <= prepared.max() <= high
    assert (float(low), float(high)) == pytest.approx((-190 / 70, 3))


def test_mri_inside_the_mask_leaves_zeros_outside_and_counts_dark_voxels_inside():
    image = np.zeros((2, 7, 7, 7), np.float32)
    image[:, 1:6, 1:6, 1:6] = np.random.default_rng(0).uniform(100, 200, (2, 5, 5, 5))
    image[:, 3, 3, 3] = 0  # enclosed by the patient
    prepared, _ = prepare_image(
        image, RAS, keeping(rule=ZScoreNormalization(inside_mask=True), crop=False, num_channels=2)
    )
    inside = np.zeros((7, 7, 7), bool)
    inside[1:6, 1:6, 1:6] = True
    assert not prepared[:, ~inside].any()
    np.testing.assert_allclose(prepared[:, inside].mean(1), 0, atol=1e-5)  # float32
    np.testing.assert_allclose(prepared[:, inside].std(1), 1, atol=1e-5)
    assert (prepared[:, 3, 3, 3] < -4).all()
    whole, _ = prepare_image(image, RAS, keeping(rule=ZScoreNormalization(), crop=False, num_channels=2))
    np.testing.assert_allclose(whole.mean((1, 2, 3)), 0, atol=1e-5)


@pytest.mark.parametrize("rule", [AS_IT_IS, ZScoreNormalization(), ZScoreNormalization(inside_mask=True)])
@given(value=st.floats(-1e5, 1e5, width=32), new=st.none() | spacings)
def test_a_constant_channel_stays_finite(rule, value, new):
    image = np.full((1, 3, 4, 5), value, np.float32)
    prepared, _ = prepare_image(image, RAS, keeping(new, rule=rule))
    assert np.isfinite(prepared).all()
    if isinstance(rule, ZScoreNormalization):
        assert not prepared.any()


# ---- what is saved, and what is refused


@given(
    st.none() | spacings,
    st.lists(
        st.builds(ZScoreNormalization, inside_mask=st.booleans())
        | st.builds(
            CtNormalization, low=st.floats(-9, 0), high=st.floats(0, 9), mean=st.floats(-9, 9), std=st.floats(0, 9)
        ),
        min_size=1,
    ),
    st.booleans(),
)
def test_a_preparation_comes_back_from_json(spacing, rules, crop):
    preparation = Preparation(spacing=spacing, normalization=tuple(rules), crop=crop)
    assert from_json(preparation.to_json()) == preparation


def from_json(content):
    return parse_json(json.dumps(content).encode(), Preparation, where="a saved run", remedy="Train anew.")


@pytest.mark.parametrize(
    "change",
    [
        {"spacing": [1, 1]},
        {"spacing": "abc"},
        {"crop": None},
        {"crop": "no"},
        {"normalization": [{"kind": "pet"}]},
        {"normalization": [{"kind": "ct", "low": 1.0, "high": 0.0, "mean": 0.0, "std": 1.0}]},
        {"normalization": [{"kind": "ct", "low": 1.0}]},
        {"normalization": [3]},
        {"normalization": 3},
        {"normalization": []},
    ],
)
def test_a_damaged_preparation_is_refused(change):
    with pytest.raises(StateError, match=rf"^({next(iter(change))}.*|content) of a saved run: expected"):
        from_json(keeping((1.0, 1.0, 1.0)).to_json() | change)
    with pytest.raises(StateError, match="spacing of a saved run"):
        from_json({})


def test_settings_that_cannot_be_are_refused():
    for spacing in ((1.0, 0.0, 1.0), (1.0, float("nan"), 1.0), (1.0, 1.0)):
        with pytest.raises(SettingError, match="spacing of Preparation: expected three finite numbers above 0"):
            keeping(spacing)
    with pytest.raises(SettingError, match="normalization of Preparation: expected one per channel"):
        keeping(num_channels=0)
    for change in ({"low": 9.0}, {"std": -1.0}, {"mean": float("inf")}):
        with pytest.raises(SettingError, match="CtNormalization: expected finite numbers with low <= high"):
            CtNormalization(**({"low": 0.0, "high": 1.0, "mean": 0.5, "std": 1.0} | change))


def test_arrays_that_do_not_fit_are_refused():
    image = np.ones((2, 3, 4, 5), np.float32)
    with pytest.raises(DataError, match=r"image of a scan: expected \(1, D, H, W\), got shape \(2, 3, 4, 5\)"):
        prepare_image(image, RAS, keeping())
    _, placement = prepare_image(image[:1], RAS, keeping())
    with pytest.raises(DataError, match=r"expected the shape \(3, 4, 5\) of its image, got \(3, 4, 4\)"):
        prepare_label(np.zeros((3, 4, 4), np.uint8), placement)
    for wrong in ((3, 2, 4, 4), (2, 2, 4, 5), (4, 2, 4, 5)):
        with pytest.raises(DataError, match=r"probabilities of a scan: expected 3 slices \(K, 4, 5\), got \d slices"):
            place_back(np.zeros(wrong, np.float32), placement)
    with pytest.raises(DataError, match="case 'a': expected one with a label"):
        prepare_scan(Scan("a", image[:1], None, RAS), keeping())
    for broken in (np.diag([1.0, 0, 1, 1]), np.diag([1.0, np.nan, 1, 1])):
        with pytest.raises(DataError, match="affine of a scan: expected three axes of voxels"):
            prepare_image(image[:1], broken, keeping())

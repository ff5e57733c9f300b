"""Normalisation and patches: a batch is a pure function, holds what was promised, and stays aligned."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.data.augment import change_intensities, margins, random_affine, resample
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.normalization import CtNormalization, normalize_ct, normalize_mri
from dstlib.zoo.e2enet.data.patches import PatchSettings, draw_batch
from dstlib.zoo.e2enet.data.phantom import phantoms

MM = (1.0, 1.0, 1.0)


def case_of(label, image=None, name="case"):
    label = np.asarray(label, np.uint8)
    return Case(name, np.asarray(label[None] if image is None else image, np.float32), label, MM)


def block_case(shape=(20, 22, 24)):
    """Image equal to the label: one large block."""
    label = np.zeros(shape, np.uint8)
    label[4:15, 5:17, 6:18] = 1
    return case_of(label)


@pytest.fixture(scope="module")
def cases():
    return phantoms(3, shape=(32, 40, 40)).cases


# ---- draw_batch


def test_a_batch_is_a_pure_function_of_seed_and_iteration(cases):
    patches = PatchSettings(patch_size=(16, 24, 24))
    draws = {i: draw_batch(cases, patches, seed=3, iteration=i) for i in range(12)}
    torch.manual_seed(99)
    np.random.seed(99)  # neither global generator matters
    for i in reversed(range(12)):
        image, label = draw_batch(cases, patches, seed=3, iteration=i)
        assert torch.equal(image, draws[i][0])
        assert torch.equal(label, draws[i][1])
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draw_batch(cases, patches, seed=4, iteration=0)[0])


def test_drawing_leaves_the_cases_alone(cases):
    before = [(c.image.copy(), c.label.copy()) for c in cases]
    for i in range(10):
        image, label = draw_batch(cases, PatchSettings(patch_size=(32, 40, 40)), seed=0, iteration=i)
        image.fill_(7.0)  # a loop may write into its batch
        label.fill_(7)
    for case, (old_image, old_label) in zip(cases, before, strict=True):
        np.testing.assert_array_equal(case.image, old_image)
        np.testing.assert_array_equal(case.label, old_label)


def test_the_global_generators_are_left_alone(cases):
    torch.manual_seed(0)
    np.random.seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for i in range(10):
        draw_batch(cases, PatchSettings(patch_size=(16, 16, 16)), seed=0, iteration=i)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


def test_types_and_values(cases):
    for i in range(30):
        image, label = draw_batch(cases, PatchSettings(patch_size=(16, 24, 20), batch_size=3), seed=0, iteration=i)
        assert type(image) is torch.Tensor  # not MONAI's subclass, which is slow in a network
        assert (image.shape, image.dtype) == ((3, 1, 16, 24, 20), torch.float32)
        assert (label.shape, label.dtype) == ((3, 1, 16, 24, 20), torch.int64)
        assert torch.isfinite(image).all()
        assert set(label.unique().tolist()) <= set(range(16))


@pytest.mark.parametrize(
    ("batch_size", "oversample", "forced"),
    [(2, 0.33, 1), (1, 0.33, 0), (3, 0.33, 1), (4, 0.33, 1), (9, 0.33, 3), (2, 0.0, 0), (2, 1.0, 2)],
)
def test_how_many_patches_are_forced(batch_size, oversample, forced):
    patches = PatchSettings(patch_size=(8, 8, 8), batch_size=batch_size, oversample=oversample)
    assert patches.num_forced == forced  # by hand: batch - round(batch * (1 - oversample))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("corner", [(0, 0, 0), (29, 29, 29), (0, 15, 29)])
def test_the_last_patch_holds_foreground_even_if_it_is_one_voxel(augment, corner):
    label = np.zeros((30, 30, 30), np.uint8)
    label[corner] = 1
    patches = PatchSettings(patch_size=(8, 8, 8), augment=augment)
    drawn = [draw_batch([case_of(label)], patches, seed=0, iteration=i)[1] for i in range(100)]
    assert all(label[1].any() for label in drawn)
    assert not all(label[0].any() for label in drawn)  # the other one lies anywhere


def test_rare_classes_are_forced_as_often_as_large_ones():
    label = np.ones((16, 16, 16), np.uint8)
    label[3, 3, 3] = 2
    patches = PatchSettings(patch_size=(3, 3, 3), augment=False, oversample=1.0, batch_size=1)
    held = [bool((draw_batch([case_of(label)], patches, seed=0, iteration=i)[1] == 2).any()) for i in range(400)]
    # A fair coin over 400 draws has a standard deviation of 2.5 %; this is four of them.
    assert 0.4 < np.mean(held) < 0.6


def test_a_case_without_foreground_still_gives_patches():
    empty = case_of(np.zeros((9, 9, 9)), name="empty")
    image, label = draw_batch([empty], PatchSettings(patch_size=(4, 4, 4), oversample=1.0), seed=0, iteration=0)
    assert image.shape == (2, 1, 4, 4, 4)
    assert not label.any()


def test_patches_reach_every_voxel():
    label = np.arange(6 * 5 * 4).reshape(6, 5, 4) + 1
    patches = PatchSettings(patch_size=(3, 3, 3), augment=False, oversample=0.0)
    seen = [draw_batch([case_of(label)], patches, seed=0, iteration=i)[1].unique() for i in range(200)]
    assert torch.cat(seen).unique().tolist() == list(range(1, 121))


def test_small_cases_are_padded_in_the_middle():
    label = np.ones((2, 3, 6), np.uint8)
    image, drawn = draw_batch([case_of(label)], PatchSettings(patch_size=(4, 4, 4), augment=False), seed=0, iteration=0)
    expected = torch.zeros(4, 4, 4)
    expected[1:3, 0:3] = 1  # 1 + 1 slices of padding, 0 + 1 rows, and W is cropped
    for i in range(2):
        assert torch.equal(drawn[i, 0].float(), expected)
        assert torch.equal(image[i, 0], expected)


@settings(deadline=None, max_examples=60)
@example(shape=(1, 1, 2), size=(1, 1, 1), channels=1, augment=True, iteration=0)  # gamma of a single voxel
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    channels=st.integers(1, 3),
    augment=st.booleans(),
    iteration=st.integers(0, 10_000),
)
def test_any_case_fits_any_patch(shape, size, channels, augment, iteration):
    rng = np.random.default_rng(iteration)
    label = rng.integers(0, 4, shape).astype(np.uint8)
    case = case_of(label, image=rng.normal(size=(channels, *shape)))
    patches = PatchSettings(patch_size=size, augment=augment)
    image, drawn = draw_batch([case], patches, seed=1, iteration=iteration)
    assert image.shape == (2, channels, *size)
    assert torch.isfinite(image).all()
    assert set(drawn.unique().tolist()) <= {0, *np.unique(label).tolist()}
    if label.any():
        assert drawn[1].any()
    if not augment:  # every voxel of the patch is a voxel of the case or padding
        inside = np.prod(np.minimum(shape, size))
        assert (image[0, 0] != 0).sum() == inside


def test_mirroring_happens_along_the_named_axes_only():
    ramp = np.broadcast_to(np.arange(6)[:, None, None], (6, 6, 6))
    for axis in range(3):
        case = case_of(np.moveaxis(ramp, 0, axis) + 1)
        patches = PatchSettings(patch_size=(6, 6, 6), mirror=(0,))
        plain = torch.from_numpy(np.ascontiguousarray(case.label)).long()
        drawn = [draw_batch([case], patches, seed=0, iteration=i)[1] for i in range(40)]
        flips = sum(torch.equal(label[0, 0], plain.flip(axis)) for label in drawn)
        assert (flips > 5) == (axis == 0)
        assert sum(torch.equal(label[0, 0], plain) for label in drawn) > 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": (0, 8, 8)},
        {"patch_size": (8, 8)},
        {"batch_size": 0},
        {"oversample": 1.5},
        {"oversample": -0.1},
        {"mirror": (3,)},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} of PatchSettings: expected"):
        replace(PatchSettings(patch_size=(8, 8, 8)), **wrong)


def test_no_cases_are_refused():
    with pytest.raises(DataError, match="cases of draw_batch"):
        draw_batch([], PatchSettings(patch_size=(8, 8, 8)), seed=0, iteration=0)


# ---- augmentation


def test_image_and_label_stay_aligned_through_any_rotation_and_scaling():
    seen = 0
    for axis, seed in itertools.product(range(3), range(40)):
        matrix = random_affine(np.random.default_rng(seed))
        if matrix is None:
            continue
        seen += 1
        # Along one axis every voxel holds its own position. Linear interpolation returns the exact position,
        # and the nearest voxel lies within half a voxel of it: any shift between the two would show.
        position = torch.arange(60.0).reshape([60 if a == axis else 1 for a in range(3)]).expand(1, 60, 60, 60)
        image, label = resample(position, position.byte(), matrix, (16, 16, 16))
        assert (image - label).abs().max() <= 0.5 + 1e-4  # float32 positions of up to 60
        assert abs(float(image.mean()) - 29.5) < 1e-3  # and the patch turns about its centre
    assert seen >= 30


def test_identity_leaves_the_patch_as_it_is():
    case = block_case()
    image, label = torch.from_numpy(case.image), torch.from_numpy(case.label[None])
    turned, turned_label = resample(image, label, np.eye(4), (20, 22, 24))
    assert torch.equal(turned_label, label.long())
    assert torch.allclose(turned, image, atol=1e-5)  # float32 coordinates of up to 24 voxels


def test_scaling_up_shows_more_of_the_case():
    case = block_case()
    image, label = torch.from_numpy(case.image), torch.from_numpy(case.label[None])
    sizes = [resample(image, label, np.diag([s, s, s, 1.0]), (20, 22, 24))[1].sum() for s in (0.8, 1.0, 1.3)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_corners_of_a_turned_patch_show_the_case():
    full = case_of(np.ones((60, 60, 60)))
    patches = PatchSettings(patch_size=(12, 12, 12), batch_size=1)
    centred = 0
    for i in range(60):
        _, label = draw_batch([full], patches, seed=0, iteration=i)
        centred += bool(label.all())
    # Only a patch drawn at the very border may turn out of the volume; most lie well inside.
    assert centred > 50
    matrix = np.diag([1.4, 1.0, 1.0, 1.0])
    assert margins(matrix, (10, 10, 10)) == (3, 1, 1)  # (14 - 10) / 2, and one voxel for the interpolation


def test_how_often_patches_are_turned():
    turned = [random_affine(np.random.default_rng(i)) is not None for i in range(2000)]
    # 1 - 0.8 * 0.8 = 0.36 with a standard deviation of 1.1 % over 2000 draws; this is four of them.
    assert np.mean(turned) == pytest.approx(0.36, abs=0.043)
    for i in range(200):
        matrix = random_affine(np.random.default_rng(i))
        if matrix is not None:
            scale = np.cbrt(np.linalg.det(matrix[:3, :3]))
            assert 0.7 - 1e-9 <= scale <= 1.4 + 1e-9  # rounding of the determinant
            np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, scale**2 * np.eye(3), atol=1e-9)


def test_intensities_change_sometimes_and_moderately():
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32))
    changed = [change_intensities(image, np.random.default_rng(i)) for i in range(400)]
    unchanged = np.mean([torch.equal(c, image) for c in changed])
    # 0.9 * 0.85 * 0.85 * 0.9 * 0.7 = 0.41 with a standard deviation of 2.5 %; this is four of them.
    assert unchanged == pytest.approx(0.41, abs=0.1)
    for c in changed:
        assert torch.isfinite(c).all()
        # Brightness and contrast together reach 1.25² = 1.6; the noise adds 0.1² to a variance of 1.
        assert 0.5 < float(c.std()) / float(image.std()) < 1.65


# ---- normalisation


def test_ct_is_normalised_by_the_foreground_of_the_training_set():
    rng = np.random.default_rng(0)
    label = np.zeros((10, 10, 10), np.uint8)
    label[:5] = 1
    cases = [case_of(label, image=rng.normal(40, 20, (1, 10, 10, 10)), name=str(i)) for i in range(3)]
    for case in cases:
        case.image[:, 5:] = -1000  # background does not count
    values = np.concatenate([c.image[0, :5].ravel() for c in cases]).astype(np.float64)
    rule = normalize_ct(cases)
    # The statistics of float32 voxels, computed by another route.
    assert (rule.low, rule.high) == pytest.approx(tuple(np.quantile(values, [0.005, 0.995])), rel=1e-6)
    assert (rule.mean, rule.std) == pytest.approx((values.mean(), values.std()), rel=1e-6)
    out = rule(cases[0])
    assert out.image.dtype == np.float32
    assert out.image.min() == pytest.approx((rule.low - rule.mean) / rule.std, rel=1e-6)  # float32
    np.testing.assert_array_equal(out.label, cases[0].label)
    assert CtNormalization(**vars(rule)) == rule  # four plain numbers, fit for a run's config


def test_ct_normalisation_needs_foreground():
    for cases in ([], [case_of(np.zeros((3, 3, 3)))]):
        with pytest.raises(DataError, match="foreground of the training cases"):
            normalize_ct(cases)


def test_mri_is_normalised_by_case_and_channel():
    image = np.random.default_rng(0).normal(size=(2, 6, 6, 6)) * [[[[3.0]]], [[[500.0]]]] + 100
    out = normalize_mri(case_of(np.zeros((6, 6, 6)), image=image)).image
    np.testing.assert_allclose(out.mean((1, 2, 3)), 0, atol=1e-5)  # float32 over 216 voxels
    np.testing.assert_allclose(out.std((1, 2, 3)), 1, atol=1e-5)
    constant = normalize_mri(case_of(np.zeros((3, 3, 3)), image=np.full((1, 3, 3, 3), 7.0))).image
    assert (constant == 0).all()

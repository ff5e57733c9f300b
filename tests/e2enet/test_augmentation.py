"""Each change of a patch alone, against hand-worked values, SciPy or MONAI; then what holds for any of them."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from monai.transforms import AdjustContrast, ScaleIntensityFixedMean
from scipy import ndimage
from strategies import examples

from dstlib.errors import SettingError
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.dataloading.augmentation import (
    blur,
    change_intensities,
    contrast,
    gamma,
    low_resolution,
    random_affine,
    seen_box,
    spatial_transform,
    thin_axis,
)
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import draw_batch
from dstlib.zoo.e2enet.data.dataloading.settings import Augmentation, Chance, PatchSettings

NAMES = [field.name for field in fields(Augmentation) if field.name != "per_channel"]
NEVER = Augmentation(**{name: replace(getattr(Augmentation(), name), probability=0) for name in NAMES})
SHAPES = st.tuples(*[st.integers(1, 9)] * 3)


def only(per_channel=0.5, **chances):
    """Nothing but these changes."""
    return replace(NEVER, per_channel=per_channel, **chances)


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(3, 2, shape).astype(np.float32))


# ---- what each change of intensities does


@pytest.mark.parametrize("sigma", [0.5, 0.73, 1.0])
def test_blur_is_scipys(sigma):
    x = noise(9, 12, 1)
    expected = ndimage.gaussian_filter(x.numpy().astype(np.float64), sigma, mode="nearest")
    np.testing.assert_allclose(blur(x, sigma), expected, atol=5e-6)  # float32 sums of values up to 10


@pytest.mark.parametrize(("shape", "scale"), [((8, 10, 12), 0.5), ((9, 7, 5), 0.77), ((2, 1, 3), 0.5)])
def test_low_resolution_is_scipys(shape, scale):
    x = noise(*shape)
    kept = [max(1, round(scale * n)) for n in shape]
    down = x.numpy().astype(np.float64)
    for axis, (n, k) in enumerate(zip(shape, kept, strict=True)):  # the voxel below the middle of each new one
        down = np.take(down, [int((i + 0.5) * n / k) for i in range(k)], axis)
    ratio = np.divide(shape, kept)
    expected = ndimage.zoom(down, ratio, order=3, mode="nearest", grid_mode=True) if max(ratio) > 1 else down
    np.testing.assert_allclose(low_resolution(x, scale), expected, atol=2e-5)  # float32, splines overshoot to 12


def test_a_skipped_axis_keeps_its_resolution():
    x = noise(8, 1, 1).expand(8, 6, 6)
    assert torch.allclose(low_resolution(x, 0.5, skip=0), x, atol=1e-5)  # constant in plane; float32 spline weights
    assert not torch.allclose(low_resolution(x, 0.5), x, atol=0.1)


def test_contrast_is_monais():
    x = noise(5, 6, 7)
    for factor in (0.75, 1.25):
        expected = ScaleIntensityFixedMean(factor - 1, preserve_range=True)(x[None])[0]
        np.testing.assert_allclose(contrast(x, factor), expected.numpy(), atol=1e-5)  # float32 values up to 10


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("exponent", [0.7, 1.5])
def test_gamma_is_monais(exponent, inverted):
    x = noise(5, 6, 7)
    theirs = AdjustContrast(exponent, invert_image=inverted, retain_stats=True)(x[None])[0]
    # MONAI adds 1e-7 to the range and 1e-8 to a deviation, and both round float32 values of up to 10.
    np.testing.assert_allclose(gamma(x, exponent, inverted=inverted), theirs.numpy(), atol=1e-4)


def test_gamma_by_hand():
    x = torch.tensor([[[0.0, 1.0, 2.0]]])
    # Positions 0, 1/2, 1 squared: 0, 1/4, 1, of mean 5/12 and deviations (-5, -2, 7)/12, norm sqrt(78)/12.
    # The channel has mean 1 and deviations (-1, 0, 1), norm sqrt(2): 1 + (-5, -2, 7) * sqrt(2 / 78).
    expected = 1 + np.array([-5, -2, 7]) * np.sqrt(2 / 78)
    np.testing.assert_allclose(gamma(x, 2.0)[0, 0], expected, rtol=1e-6)  # float32
    np.testing.assert_allclose(gamma(x, 2.0, inverted=True)[0, 0], 2 - expected[::-1], rtol=1e-6)


@examples(20, 60)
@example(shape=(2, 2, 2), value=1e-42, spread=1e-44)  # a range of denormal numbers
@given(shape=SHAPES, value=st.floats(-1e4, 1e4, width=32), spread=st.sampled_from([0.0, 1e-30, 1e-3, 100.0]))
def test_finite_values_stay_finite(shape, value, spread):
    x = torch.full(shape, value)
    x.view(-1)[0] += spread
    before = x.clone()
    for out in (blur(x, 0.8), low_resolution(x, 0.5), contrast(x, 1.25), gamma(x, 0.7), gamma(x, 1.5, inverted=True)):
        assert out.shape == x.shape
        assert torch.isfinite(out).all()
        if not spread:  # nothing to blur, to spread or to raise; the matrices' float32 weights sum to 1 within this
            assert torch.allclose(out, x, rtol=1e-5)
    assert torch.equal(x, before)


# ---- which changes come, and how often


@pytest.mark.parametrize("name", NAMES)
def test_how_often_each_change_comes(name):
    chance = getattr(Augmentation(), name)
    alone, size = only(per_channel=1, **{name: chance}), (4, 4, 4)
    image, came = noise(1, *size), 0
    for seed in range(800):
        rng = np.random.default_rng(seed)
        if name in ("rotation", "scaling"):
            came += random_affine(rng, alone, size) is not None
        else:
            came += not torch.equal(change_intensities(image, rng, alone), image)
    # The standard deviation of the share over 800 draws is at most sqrt(.3 * .7 / 800) = 1.6 %; four of them. A
    # quarter of the resolutions keep all 4 voxels of an axis, and show nothing.
    shown = chance.probability * (0.75 if name == "resolution" else 1)
    assert came / 800 == pytest.approx(shown, abs=0.065)


def test_the_defaults_are_the_papers():
    assert {name: (c.probability, c.low, c.high) for name in NAMES if (c := getattr(Augmentation(), name))} == {
        "rotation": (0.2, -30, 30),
        "scaling": (0.2, 0.7, 1.4),
        "noise": (0.1, 0, 0.1),
        "blur": (0.2, 0.5, 1),
        "brightness": (0.15, 0.75, 1.25),
        "contrast": (0.15, 0.75, 1.25),
        "resolution": (0.25, 0.5, 1),
        "inverted_gamma": (0.1, 0.7, 1.5),
        "gamma": (0.3, 0.7, 1.5),
    }
    assert Augmentation().per_channel == 0.5


def test_blur_and_resolution_toss_for_each_channel():
    image = noise(2, 4, 4, 4)
    for part in (only(blur=Chance(1, 1, 1)), only(resolution=Chance(1, 0.5, 0.5))):
        seen = set()
        for seed in range(40):
            out = change_intensities(image, np.random.default_rng(seed), part)
            seen.add(tuple(bool((a == b).all()) for a, b in zip(out, image, strict=True)))
        assert len(seen) == 4


def test_noise_has_the_drawn_standard_deviation_in_all_channels():
    image = torch.zeros(2, 30, 30, 30)
    out = change_intensities(image, np.random.default_rng(0), only(noise=Chance(1, 0.1, 0.1)))
    for channel in out:
        # 27,000 values: the standard deviation is known to 0.1 / sqrt(2 * 27000) = 0.0004; four of them.
        assert float(channel.std()) == pytest.approx(0.1, abs=0.0018)
    assert not torch.equal(out[0], out[1])


def test_factors_lie_as_often_below_one_as_above():
    drawn = [Chance(1, 0.7, 1.5).around_one(np.random.default_rng(seed)) for seed in range(1000)]
    assert 0.7 <= min(drawn) < 0.72  # 500 draws over 0.3 come nearer to the ends than that
    assert 1.48 < max(drawn) <= 1.5
    # A fair coin over 1000 draws has a standard deviation of 1.6 %; four of them.
    assert np.mean(np.array(drawn) < 1) == pytest.approx(0.5, abs=0.065)
    for low, high in ((0.5, 0.9), (1.2, 1.4), (1, 1)):
        assert all(low <= Chance(1, low, high).around_one(np.random.default_rng(s)) <= high for s in range(50))


def test_identity_ranges_change_nothing():
    ones = {name: Chance(1, 1, 1) for name in ("scaling", "brightness", "contrast", "resolution", "gamma")}
    same = only(1.0, **ones, inverted_gamma=Chance(1, 1, 1), rotation=Chance(1, 0, 0), noise=Chance(1, 0, 0))
    image = noise(2, 6, 7, 8)
    out = change_intensities(image, np.random.default_rng(0), same)
    assert torch.allclose(out, image, atol=1e-5)  # values of up to 10 go through float32 means and ratios
    np.testing.assert_array_equal(random_affine(np.random.default_rng(0), same, (6, 7, 8)), np.eye(3))


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"rotation": Chance(1.5, -30, 30)}, "rotation"),
        ({"rotation": Chance(0.2, -300, 30)}, "rotation"),
        ({"scaling": Chance(0.2, 1.4, 0.7)}, "scaling"),
        ({"blur": Chance(0.2, 0.0, 1.0)}, "blur"),
        ({"noise": Chance(0.2, -0.1, 0.1)}, "noise"),
        ({"resolution": Chance(0.2, 0.5, 2.0)}, "resolution"),
        ({"gamma": Chance(float("nan"), 0.7, 1.5)}, "gamma"),
        ({"per_channel": -1}, "per_channel"),
    ],
)
def test_wrong_chances_are_refused(wrong, name):
    with pytest.raises(SettingError, match=f"{name} of Augmentation: expected .* in \\[0, 1\\]"):
        Augmentation(**wrong)


# ---- rotation and scaling


def turned_patch(volume, matrix, start, size):
    """A patch of a volume (D, H, W), its label the volume in bytes."""
    box = seen_box(matrix, start, size, volume.shape)
    centre = np.asarray(start) + (np.asarray(size) - 1) / 2 - [s.start for s in box]
    part = volume[box][None]
    image, label = spatial_transform(part, part.byte(), matrix, centre=centre, size=size)
    return image[0], label[0]


def test_rotated_patches_are_scipys():
    volume, start, size = noise(30, 28, 26).abs() * 9, (8, 6, 7), (12, 14, 10)
    shift = np.asarray(start) + (np.asarray(size) - 1) / 2
    seen = 0
    for seed in range(40):
        matrix = random_affine(np.random.default_rng(seed), Augmentation(), size)
        if matrix is None:
            continue
        seen += 1
        offset = shift - matrix @ (np.asarray(size) - 1) / 2
        image, label = turned_patch(volume, matrix, start, size)
        # float32 positions are exact to 1e-5 voxels, over which these values change by up to 100.
        expected = ndimage.affine_transform(volume.numpy(), matrix, offset, size, order=1, mode="grid-constant")
        np.testing.assert_allclose(image, expected, atol=1e-3)
        nearest = ndimage.affine_transform(volume.byte().numpy(), matrix, offset, size, order=0, mode="grid-constant")
        assert (label.numpy() != nearest).mean() < 0.002  # voxels that lie half way between two
    assert seen >= 10


def test_image_and_label_stay_aligned_through_any_rotation_and_scaling():
    for axis, seed in itertools.product(range(3), range(12)):
        matrix = random_affine(np.random.default_rng(seed), only(rotation=Chance(1, -30, 30)), (16, 16, 16))
        # Along one axis every voxel holds its own position. Linear interpolation returns the exact position,
        # and the nearest voxel lies within half a voxel of it: any shift between the two would show.
        position = torch.arange(60.0).reshape([60 if a == axis else 1 for a in range(3)]).expand(60, 60, 60)
        image, label = turned_patch(position, matrix, (22, 22, 22), (16, 16, 16))
        assert (image - label).abs().max() <= 0.5 + 1e-4  # float32 positions of up to 60
        assert abs(float(image.mean()) - 29.5) < 1e-3  # and the patch turns about its centre


def test_a_quarter_turn_is_exact():
    volume = torch.arange(5.0 * 5 * 5).reshape(5, 5, 5)
    quarter = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # patch (h, w) shows case (-w, h), about the centre
    image, label = turned_patch(volume, quarter, (0, 0, 0), (5, 5, 5))
    expected = np.rot90(volume.numpy(), -1, axes=(1, 2))
    np.testing.assert_array_equal(label, expected)
    np.testing.assert_allclose(image, expected, atol=1e-3)  # float32 positions, values of up to 124


def test_identity_leaves_the_patch_as_it_is():
    volume = noise(20, 22, 24).abs()
    image, label = turned_patch(volume, np.eye(3), (3, 0, 5), (10, 22, 12))
    assert torch.equal(label, volume.byte()[3:13, :, 5:17])
    assert torch.allclose(image, volume[3:13, :, 5:17], atol=1e-4)  # float32 positions of up to 24 voxels


def test_scaling_up_shows_more_of_the_case():
    volume = torch.zeros(20, 22, 24)
    volume[4:15, 5:17, 6:18] = 1
    sizes = [turned_patch(volume, np.eye(3) * s, (0, 0, 0), (20, 22, 24))[1].sum() for s in (0.8, 1.0, 1.3)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_matrices_turn_and_scale_and_do_nothing_else():
    for seed in range(300):
        matrix = random_affine(np.random.default_rng(seed), Augmentation(), (8, 8, 8))
        if matrix is not None:
            scale = np.cbrt(np.linalg.det(matrix))
            assert 0.7 - 1e-9 <= scale <= 1.4 + 1e-9  # rounding of the determinant
            np.testing.assert_allclose(matrix @ matrix.T, scale**2 * np.eye(3), atol=1e-9)


def test_the_corners_of_a_turned_patch_show_the_case():
    full = Case("full", np.ones((1, 60, 60, 60), np.float32), np.ones((60, 60, 60), np.uint8), (1.0, 1.0, 1.0))
    turn = only(rotation=Chance(1, -30, 30), scaling=Chance(1, 0.7, 1.4))
    patches = PatchSettings(patch_size=(12, 12, 12), batch_size=1, augment=turn)
    whole = [bool(draw_batch([full], patches, seed=0, iteration=i)[1].all()) for i in range(60)]
    # A patch may turn out of the volume only where it lies within 12 * (1.4 * sqrt(3) - 1) / 2 = 8.5 voxels of a
    # border, hence not where all three starts are among 9..39 of 0..48: (31 / 49) ** 3 = 25 % of the patches.
    assert np.mean(whole) > 0.25


@pytest.mark.parametrize("thin", [0, 1, 2])
def test_thin_patches_turn_in_their_plane_by_any_angle(thin):
    size = tuple(2 if axis == thin else 8 for axis in range(3))
    assert thin_axis(size) == thin
    turn = only(rotation=Chance(1, -30, 30), scaling=Chance(1, 0.7, 1.4))
    plane, cosines = [axis for axis in range(3) if axis != thin], []
    for seed in range(100):
        matrix = random_affine(np.random.default_rng(seed), turn, size)
        np.testing.assert_allclose(matrix[thin], np.eye(3)[thin], atol=1e-12)  # sines of a zero angle
        np.testing.assert_allclose(matrix[:, thin], np.eye(3)[thin], atol=1e-12)
        within = matrix[np.ix_(plane, plane)]
        cosines.append(within[0, 0] / np.sqrt(np.linalg.det(within)))
    # Over the full circle 5 in 6 angles lie beyond 30 degrees; four standard deviations of 3.7 %.
    assert np.mean(np.array(cosines) < np.cos(np.pi / 6)) == pytest.approx(5 / 6, abs=0.15)


def test_three_times_is_not_thin_yet():
    assert thin_axis((4, 12, 12)) is None
    assert thin_axis((4, 13, 12)) == 0


# ---- everything at once


@examples(20, 60)
@given(
    shape=SHAPES,
    size=SHAPES,
    channels=st.integers(1, 3),
    constant=st.booleans(),
    iteration=st.integers(0, 10_000),
)
def test_no_patch_is_not_a_number_and_labels_keep_their_classes(shape, size, channels, constant, iteration):
    rng = np.random.default_rng(iteration)
    label = rng.integers(0, 5, shape).astype(np.uint8)
    image = np.full((channels, *shape), -2.5) if constant else rng.normal(size=(channels, *shape))
    case = Case("any", image.astype(np.float32), label, (1.0, 1.0, 1.0))
    always = {name: replace(getattr(Augmentation(), name), probability=1) for name in NAMES}
    patches = PatchSettings(patch_size=size, augment=Augmentation(**always, per_channel=1))
    images, labels = draw_batch([case], patches, seed=0, iteration=iteration)
    assert images.shape == (2, channels, *size)
    assert torch.isfinite(images).all()
    assert set(labels.unique().tolist()) <= {0, *np.unique(label).tolist()}
    if label.any():
        assert labels[1].any()


def test_mirroring_flips_image_and_label_alike():
    ramp = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    case = Case("ramp", ramp[None].astype(np.float32), ramp, (1.0, 1.0, 1.0))
    patches = PatchSettings(patch_size=(4, 4, 4), augment=NEVER)
    seen = set()
    for i in range(40):
        for image, label in zip(*draw_batch([case], patches, seed=0, iteration=i), strict=True):
            assert torch.equal(image, label.float())
            seen.add(int(label[0, 0, 0, 0]))
    # Each set of flipped axes brings another corner first, so left becomes right where 2 is among them.
    assert seen == {d * 48 + h * 12 + w * 3 for d, h, w in itertools.product((0, 1), repeat=3)}

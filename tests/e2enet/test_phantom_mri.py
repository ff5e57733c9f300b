"""The procedural MRIs: every class in every seed, where it belongs, with the contrast of its sequence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstlib.errors import SettingError
from dstlib.zoo.e2enet.data.layouts.decathlon import TUMOUR_CHANNELS, TUMOUR_CLASSES
from dstlib.zoo.e2enet.data.phantoms.mri import BRAIN_VIEW, MIN_BRAIN_SHAPE, hippocampus_phantom, tumour_phantom

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.sampled_from([MIN_BRAIN_SHAPE, (48, 64, 64), (40, 72, 48)])
EDEMA, CORE, RIM = 1, 2, 3


@settings(max_examples=25)
@given(seed=SEEDS, shape=SHAPES)
def test_every_tumour_has_its_three_classes_within_a_brain_in_zeros(seed, shape):
    case = tumour_phantom(seed, shape)
    counts = np.bincount(case.label.ravel(), minlength=4)
    assert len(counts) == len(TUMOUR_CLASSES) + 1
    assert counts.min() >= 8, counts
    brain = (case.image > 0).all(0)
    np.testing.assert_array_equal(case.image[:, ~brain], 0)  # zero in one channel is zero in all
    assert case.image[:, brain].min() >= 1
    assert brain[case.label > 0].all()
    assert 0.2 < brain.mean() < 0.5
    for axis in range(3):
        assert not brain.take([0, -1], axis).any(), "the brain touches the border"


@settings(max_examples=12)
@given(seed=SEEDS)
def test_each_sequence_shows_what_it_is_made_to_show(seed):
    case = tumour_phantom(seed)
    healthy = (case.image[0] > 0) & (case.label == 0)
    median = {
        name: [np.median(channel[healthy])] + [np.median(channel[case.label == label]) for label in (1, 2, 3)]
        for name, channel in zip(TUMOUR_CHANNELS, case.image, strict=True)
    }
    # The bias differs by tens of per cent from place to place; each of these contrasts is larger.
    assert median["FLAIR"][EDEMA] > 1.3 * median["FLAIR"][0]
    assert median["T1gd"][RIM] == max(median["T1gd"])
    assert median["T1gd"][RIM] > 1.6 * median["T1gd"][CORE]
    assert median["T2w"][EDEMA] > 1.3 * median["T2w"][0]
    assert median["T2w"][CORE] > 1.3 * median["T2w"][0]
    assert max(median["T1w"][EDEMA], median["T1w"][CORE]) < 0.9 * median["T1w"][0]


def test_the_rim_lies_between_core_and_edema():
    for seed in range(8):
        label = tumour_phantom(seed).label
        core = np.argwhere(label == CORE)
        beside = np.concatenate([core + step for step in np.vstack([np.eye(3, dtype=int), -np.eye(3, dtype=int)])])
        around = label[tuple(beside.T)]
        assert np.isin(around, (CORE, RIM)).mean() > 0.9  # some cores reach the surface, or another lesion's edema


def test_scans_have_scales_of_their_own_and_a_seed_is_a_patient():
    brightness = [tumour_phantom(seed).image.max((1, 2, 3)) for seed in range(8)]
    assert np.max(brightness) / np.min(brightness) > 3
    for draw in (tumour_phantom, hippocampus_phantom):
        first, again = draw(5), draw(5)
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.label, again.label)
    assert (tumour_phantom(5).label != tumour_phantom(6).label).any()
    assert hippocampus_phantom(5).image.mean() != hippocampus_phantom(6).image.mean()


def test_lesions_vary_in_number_place_and_size():
    cases = [tumour_phantom(seed, MIN_BRAIN_SHAPE) for seed in range(30)]
    volumes = [np.count_nonzero(case.label) for case in cases]
    assert max(volumes) > 3 * min(volumes)
    left = [np.argwhere(case.label)[:, 2].mean() > 20 for case in cases]
    assert 5 < sum(left) < 25  # of 30 tosses of a coin; both sides are met


def test_types_and_spacing():
    case = tumour_phantom(0, (32, 48, 40))
    assert case.image.shape == (4, 32, 48, 40)
    assert case.spacing == (BRAIN_VIEW[0] / 32, BRAIN_VIEW[1] / 48, BRAIN_VIEW[2] / 40)
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.uint8)
    assert case.orientation == "SPL"


@pytest.mark.parametrize("shape", [(31, 64, 64), (48, 64), (48, 64, 39)])
def test_too_small_a_brain_is_refused(shape):
    with pytest.raises(SettingError, match=r"shape of a phantom: expected three sizes .*thinner than a voxel"):
        tumour_phantom(0, shape)


@settings(max_examples=25)
@given(seed=SEEDS)
def test_every_hippocampus_has_two_adjoining_parts(seed):
    case = hippocampus_phantom(seed)
    anterior, posterior = case.label == 1, case.label == 2
    # 208 cases of the real set were looked at: 31 to 42, 40 to 58 and 24 to 45 voxels along (x, y, z).
    assert all(low <= n <= high for n, low, high in zip(case.label.shape, (24, 40, 31), (45, 58, 42), strict=True))
    for part in (anterior, posterior):
        assert 600 < part.sum() < 3500
    assert case.label.max() == 2
    # H leads to the front, and the plane between the parts is coronal.
    assert np.argwhere(anterior)[:, 1].mean() > np.argwhere(posterior)[:, 1].mean() + 8
    assert (anterior[:, 1:] & posterior[:, :-1]).sum() > 10, "the parts do not touch"
    assert np.isfinite(case.image).all()
    assert case.image.min() >= 0
    assert np.median(case.image[0][case.label > 0]) < 0.9 * np.median(case.image[0][case.label == 0])

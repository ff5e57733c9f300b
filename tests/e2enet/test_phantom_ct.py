"""The procedural CTs: every organ in every patient, in its place, with its intensity."""

import numpy as np
import pytest
from scipy import ndimage

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.data.cases import Case, Cases
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.layouts.btcv import BTCV_ORGANS
from dstlib.zoo.e2enet.data.phantoms.ct import FIELD_OF_VIEW, MIN_SHAPE, ORGANS, phantom, phantoms
from dstlib.zoo.e2enet.data.splits import split

SHAPES = [MIN_SHAPE, (48, 64, 64), (40, 72, 48)]


def middle(case: Case, organ: str) -> np.ndarray:
    """The mean position (D, H, W) of an organ, from -1 to 1."""
    voxels = np.argwhere(case.label == AMOS_ORGANS.index(organ) + 1)
    return 2 * (voxels.mean(0) + 0.5) / np.array(case.label.shape) - 1


@pytest.mark.parametrize("shape", SHAPES)
def test_every_organ_is_in_every_patient(shape):
    for seed in range(20):
        for organs in (AMOS_ORGANS, BTCV_ORGANS):
            counts = np.bincount(phantom(seed, shape, organs=organs).label.ravel(), minlength=len(organs) + 1)
            assert len(counts) == len(organs) + 1
            assert counts.min() >= 5, f"seed {seed}: {counts.tolist()}"


def test_an_organ_is_one_piece_and_lies_in_the_body():
    for seed in range(10):
        case = phantom(seed)
        outside, _ = ndimage.label(case.image[0] < -500)
        air = outside == outside[0, 0, 0]  # gas in the bowel is not connected to the air around the body
        assert not ndimage.binary_erosion(air)[case.label > 0].any()
        for label, organ in enumerate(AMOS_ORGANS, start=1):
            pieces, _ = ndimage.label(case.label == label, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            # The duodenum passes behind the veins, the stomach behind the liver: some are cut in two.
            assert sizes.max() > 0.6 * sizes.sum(), (seed, organ, sizes)


def test_small_organs_stand_out_from_what_is_around_them():
    for seed in range(10):
        case = phantom(seed)
        for organ in ("right adrenal gland", "left adrenal gland"):
            inside = case.label == AMOS_ORGANS.index(organ) + 1
            shell = ndimage.binary_dilation(inside) & ~inside
            assert (case.image[0][shell] < 10).mean() > 0.8, (seed, organ)  # fat, at half of its contrast or less
        liver, bile = (np.median(case.image[0][case.label == label]) for label in (6, 4))
        assert liver - bile > 60


def test_btcv_is_the_same_patient_with_other_labels():
    for seed in range(5):
        amos, btcv = phantom(seed), phantom(seed, organs=BTCV_ORGANS)
        np.testing.assert_array_equal(amos.image, btcv.image)
        for label, organ in enumerate(BTCV_ORGANS, start=1):
            if organ in AMOS_ORGANS:
                np.testing.assert_array_equal(btcv.label == label, amos.label == AMOS_ORGANS.index(organ) + 1)
        veins = btcv.label == BTCV_ORGANS.index("portal and splenic veins") + 1
        assert not amos.label[veins].any()
        across = np.argwhere(veins)[:, 2] / veins.shape[2]
        assert across.min() < 0.42 < 0.65 < across.max()  # from the liver to the spleen
        assert 130 < np.median(btcv.image[0][veins]) < 190
    assert [BTCV_ORGANS[i - 1] for i in (9, 10, 11, 12, 13)] == [
        "postcava",
        "portal and splenic veins",
        "pancreas",
        "right adrenal gland",
        "left adrenal gland",
    ]


def test_shapes_types_and_spacing():
    case = phantom(3, (32, 40, 64))
    assert case.image.shape == (1, 32, 40, 64)
    assert case.image.dtype == np.float32
    assert case.label.dtype == np.uint8
    assert case.spacing == (FIELD_OF_VIEW[0] / 32, FIELD_OF_VIEW[1] / 40, FIELD_OF_VIEW[2] / 64)
    assert np.isfinite(case.image).all()
    assert -1024 <= case.image.min() < case.image.max() <= 3071


def test_a_seed_is_a_patient():
    first, again, other = phantom(5), phantom(5), phantom(6)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.label, again.label)
    assert (first.label != other.label).mean() > 0.01
    assert (first.image != other.image).mean() > 0.9


def test_sets_grow_without_changing_and_differ_by_seed():
    small, large, other = phantoms(2, seed=1), phantoms(3, seed=1), phantoms(3, seed=2)
    for a, b in zip(small.cases, large.cases, strict=False):
        assert a.name == b.name
        np.testing.assert_array_equal(a.image, b.image)
    images = [c.image.tobytes() for c in (*large.cases, *other.cases)]
    assert len(set(images)) == 6, "neighbouring seeds must not share patients: one trains, the other tests"
    assert large.classes == AMOS_ORGANS
    assert large.channels == ("CT",)


def test_intensities_are_those_of_a_portal_venous_ct():
    for seed in range(10):
        case = phantom(seed)
        for label, organ in enumerate(AMOS_ORGANS, start=1):
            median = np.median(case.image[0][case.label == label])
            # The patient (sd 4 HU), the texture and noise, and for the smallest the fat next to them.
            assert abs(median - ORGANS[organ].hu) < 45, (seed, organ, median)
        assert np.median(case.image[0, :, :3, :3]) == pytest.approx(-1000, abs=15)  # air; the noise is 10 HU
        assert (case.image > 180).sum() > 500  # bone


def test_organs_lie_where_they_belong():
    for seed in range(10):
        case = phantom(seed)
        at = {organ: middle(case, organ) for organ in AMOS_ORGANS}
        assert at["liver"][2] < 0 < at["spleen"][2]  # right is at low W
        for pair in ("kidney", "adrenal gland"):
            assert at[f"right {pair}"][2] < 0 < at[f"left {pair}"][2]
            assert at[f"right {pair}"][0] > at["bladder"][0]
        assert at["right adrenal gland"][0] > at["right kidney"][0]  # above, that is at higher D
        assert at["left adrenal gland"][0] > at["left kidney"][0]
        assert at["postcava"][2] < at["aorta"][2]
        assert at["aorta"][1] > at["pancreas"][1] > at["gallbladder"][1]  # the back is at high H
        assert at["prostate/uterus"][0] < at["bladder"][0] < -0.5
        assert at["oesophagus"][0] > 0.6


@pytest.mark.parametrize("shape", [(31, 64, 64), (48, 39, 64), (64, 64), (0, 64, 64)])
def test_too_small_a_shape_is_refused(shape):
    with pytest.raises(SettingError, match=r"shape of a phantom: expected three sizes .* got \("):
        phantom(0, shape)
    with pytest.raises(SettingError, match=r"shape of a phantom: .* the adrenal glands vanish"):
        phantom(0, shape, organs=BTCV_ORGANS)


# The folds. By definition: np.random.RandomState(12345) shuffles 0..9 to 0 7 9 3 6 4 1 8 2 5 (in some order
# within each pair), cut into five pairs; the values were checked against scikit-learn's KFold.
TEN = [("0", "7"), ("3", "9"), ("4", "6"), ("1", "8"), ("2", "5")]
SEVEN = [("3", "6"), ("0", "4"), ("1",), ("5",), ("2",)]  # the first 7 % 5 folds are one longer


@pytest.mark.parametrize("folds", [TEN, SEVEN])
def test_folds_are_those_of_scikit_learn(folds):
    names = [str(i) for i in range(sum(map(len, folds)))]
    for fold, expected in enumerate(folds):
        train, held_out = split(names[::-1], fold=fold)  # the order given does not matter
        assert held_out == expected
        assert train == tuple(n for n in names if n not in expected)


def test_each_name_is_held_out_once():
    names = [f"case_{i:03d}" for i in range(208)]
    held_out = [split(names, fold=fold)[1] for fold in range(5)]
    assert [len(h) for h in held_out] == [42, 42, 42, 41, 41]
    assert sorted(name for fold in held_out for name in fold) == names


@pytest.mark.parametrize(
    ("fold", "num_folds", "what"), [(5, 5, "fold"), (-1, 5, "fold"), (0, 1, "num_folds"), (0, 8, "num_folds")]
)
def test_impossible_folds_are_refused(fold, num_folds, what):
    with pytest.raises(SettingError, match=rf"^{what} of a split"):
        split(list("abcdefg"), fold=fold, num_folds=num_folds)


def test_a_case_must_fit_itself_and_its_set():
    image, label = np.zeros((1, 2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint8)
    case = Case("a", image, label, (1.0, 1.0, 1.0))
    for wrong in ((image[0], label), (image, label[:1]), (image.astype(float), label), (image, label.astype(int))):
        with pytest.raises(DataError, match="case 'b'"):
            Case("b", *wrong, (1.0, 1.0, 1.0))
    with pytest.raises(DataError, match="a more than once"):
        Cases("set", ("CT",), ("organ",), (case, case))
    with pytest.raises(DataError, match="1 in a"):
        Cases("set", ("T1", "T2"), ("organ",), (case,))

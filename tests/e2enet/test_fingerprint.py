"""What is measured of a data set, and the preparation that follows: nnU-Net's rules, worked by hand."""

import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib.errors import DataError
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import (
    Fingerprint,
    ScanFingerprint,
    join,
    plan_preparation,
    scan_fingerprint,
    target_spacing,
)
from dstlib.zoo.e2enet.data.preprocessing.intensities import NUM_VALUES
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.scans.nifti import Scan


def scan_of(name="a", *, shape=(4, 5, 6), spacing=(3.0, 2.0, 1.0), num_channels=1, seed=0, foreground=0.5):
    rng = np.random.default_rng(seed)
    image = rng.uniform(1, 100, (num_channels, *shape)).astype(np.float32)
    return Scan(name, image, (rng.random(shape) < foreground).astype(np.uint8), np.diag([*spacing[::-1], 1.0]))


def fingerprint(scans):
    return join(map(scan_fingerprint, scans))  # a loop's variable would keep a scan while the next is read


def measured(spacings, shapes=None, kept=None):
    """A fingerprint by hand, of one channel."""
    each = CtNormalization(low=-100.0, high=200.0, mean=50.0, std=30.0)
    return Fingerprint(
        num_channels=1,
        spacings=tuple(spacings),
        shapes=tuple(shapes or [(100, 100, 100)] * len(spacings)),
        kept=tuple(kept or [1.0] * len(spacings)),
        intensities=(each,),
    )


# ---- measuring


def test_one_scan_by_hand():
    image = np.zeros((2, 2, 3, 4), np.float32)
    image[:, :, :2, 1:] = np.arange(1, 25).reshape(2, 2, 2, 3)
    label = np.zeros((2, 3, 4), np.uint8)
    label[0, 0, 1], label[1, 1, 3] = 1, 2
    # a file whose x leads to the left and whose y leads up: height is D in canonical order
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 3, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    found = scan_fingerprint(Scan("a", image, label, affine))
    assert found.spacing == (2.0, 3.0, 1.0)
    assert found.shape == (2, 2, 3)
    assert found.kept == 0.5
    assert [each.values.tolist() for each in found.intensities] == [[1, 12], [13, 24]]
    assert [each.counts.tolist() for each in found.intensities] == [[1, 1], [1, 1]]


def test_intensities_are_those_of_the_foreground_and_scans_count_alike():
    """As nnU-Net has it: a case of few foreground voxels counts as much as one of many."""
    scans = [scan_of(name, seed=seed, num_channels=2, foreground=0.1 + 0.8 * seed) for seed, name in enumerate("ab")]
    result = fingerprint(iter(scans))
    assert result.num_channels == 2
    for channel, found in enumerate(result.intensities):
        few, many = (scan.image[channel][scan.label > 0].astype(np.float64) for scan in scans)
        assert len(few) * 5 < len(many)
        alike = np.concatenate([np.repeat(few, len(many)), np.repeat(many, len(few))])
        assert (found.low, found.high) == tuple(np.percentile(alike, (0.5, 99.5), method="inverted_cdf"))
        assert (found.mean, found.std) == pytest.approx((alike.mean(), alike.std()))


def test_what_lies_outside_the_box_of_the_image_is_cropped_away():
    scan = scan_of(foreground=1.0)
    scan.image[:, 0] = 0
    (found,) = scan_fingerprint(scan).intensities
    assert found.values.min() > 0
    assert found.counts.sum() == scan.image[0, 1:].size


def test_whole_numbers_are_counted_to_the_last_voxel():
    scan = scan_of(shape=(30, 40, 50), foreground=0.9)
    scan.image[:] = np.rint(scan.image * 20)
    (found,) = scan_fingerprint(scan).intensities
    values, counts = np.unique(scan.image[0][scan.label > 0], return_counts=True)
    assert counts.sum() > 5 * NUM_VALUES
    assert np.array_equal(found.values, values)
    assert np.array_equal(found.counts, counts)


def test_large_foregrounds_of_other_numbers_are_sampled_by_the_name_of_the_case():
    scan = scan_of(shape=(30, 30, 30), foreground=0.9)
    (found,), (again,) = scan_fingerprint(scan).intensities, scan_fingerprint(scan).intensities
    assert found.counts.sum() == NUM_VALUES
    assert np.array_equal(found.values, again.values)
    voxels = scan.image[0][scan.label > 0]
    assert len(found.values) > 0.99 * NUM_VALUES  # each voxel once: few of the float32 are equal
    assert set(found.values) <= set(voxels)
    # The mean of 10,000 draws from a standard deviation of 29 lies within 5 of its standard errors, 1.4.
    assert np.average(found.values, weights=found.counts) == pytest.approx(voxels.mean(), abs=1.5)
    (other,) = scan_fingerprint(replace(scan, name="b")).intensities
    assert not np.array_equal(found.values, other.values)


@given(st.permutations("abcd"))
def test_the_order_of_the_scans_makes_no_difference(names):
    scans = {name: scan_of(name, seed=ord(name), spacing=(ord(name) / 50, 1.0, 1.0)) for name in "abcd"}
    assert fingerprint(scans[name] for name in names) == fingerprint(scans.values())


def test_scans_are_measured_one_after_the_other():
    read = []

    def reading():
        for name in "abc":
            assert not any(earlier() for earlier in read)  # freed before the next one takes up memory
            scan = scan_of(name)
            read.append(weakref.ref(scan))
            yield scan
            del scan

    assert len(fingerprint(reading()).spacings) == len(read) == 3


@given(st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_measured_scan_comes_back_from_json(num_channels, foreground, seed):
    found = scan_fingerprint(scan_of(num_channels=num_channels, foreground=foreground, seed=seed))
    again = ScanFingerprint.from_json(json.loads(json.dumps(found.to_json())))
    for one, other in zip(again.intensities, found.intensities, strict=True):
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.counts, other.counts)
        assert (one.values.dtype, one.counts.dtype) == (np.float32, np.int32)
    assert {**vars(again), "intensities": 0} == {**vars(found), "intensities": 0}


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="scans of the fingerprint: expected at least one, got none"):
        fingerprint([])
    with pytest.raises(DataError, match="case 'a': expected one with a label"):
        fingerprint([replace(scan_of(), label=None)])
    empty = fingerprint([scan_of(foreground=0)])
    assert empty.intensities == ()
    with pytest.raises(DataError, match="foreground of the training cases: expected a labelled voxel, got none in 1"):
        plan_preparation(empty, schemes=("ct",))
    assert plan_preparation(empty, schemes=("zscore",)).normalization == (ZScoreNormalization(),)


# ---- planning


def test_the_spacing_is_the_median_along_each_axis():
    assert target_spacing(measured([(1.0, 5.0, 2.0), (3.0, 1.0, 2.5), (2.0, 4.0, 9.0)])) == (2.0, 4.0, 2.5)


def test_an_anisotropic_set_gets_the_tenth_percentile():
    spacings = [(float(d), 0.8, 0.8) for d in range(2, 13)]  # 2 to 12 mm: the median is 7, the 10th percentile 3
    thin, thick = [(30, 512, 512)] * 11, [(200, 512, 512)] * 11
    assert target_spacing(measured(spacings, thin)) == (3.0, 0.8, 0.8)
    assert target_spacing(measured(spacings, thick)) == (7.0, 0.8, 0.8)  # enough slices: 200 · 3 ≥ 512
    with_fine_ones = [(0.5, 0.8, 0.8)] * 2 + spacings[4:]
    assert target_spacing(measured(with_fine_ones, thin[:9])) == (0.8, 0.8, 0.8)  # no finer than the others


def test_an_axis_three_times_as_coarse_is_not_yet_anisotropic():
    spacings = [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (9.0, 1.0, 1.0)]
    assert target_spacing(measured(spacings, [(10, 99, 99)] * 3)) == (3.0, 1.0, 1.0)


def test_ct_takes_the_numbers_of_the_set():
    plan = plan_preparation(measured([(2.0, 1.0, 1.0)]), schemes=("ct",))
    assert plan.normalization == (CtNormalization(low=-100.0, high=200.0, mean=50.0, std=30.0),)
    assert (plan.spacing, plan.crop) == ((2.0, 1.0, 1.0), True)


@pytest.mark.parametrize(("kept", "inside"), [((0.2, 0.3, 1.0), True), ((0.2, 0.75, 1.0), False), ((1.0,) * 3, False)])
def test_mri_is_masked_where_cropping_takes_over_a_quarter_of_the_median_scan(kept, inside):
    plan = plan_preparation(measured([(1.0, 1.0, 1.0)] * 3, kept=kept), schemes=("zscore",))
    assert plan.normalization == (ZScoreNormalization(inside_mask=inside),)

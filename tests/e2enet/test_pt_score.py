"""The PT score and the Nemenyi distance against published values."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.compare import comparison
from dstlib.zoo.e2enet.evaluation.pt_score import Row, nemenyi, pt_scores
from dstlib.zoo.e2enet.paper.published import PUBLISHED

POSITIVE = st.floats(0.1, 1000)
ROWS = st.lists(
    st.builds(Row, name=st.just("m"), dice=st.floats(1, 100), params=POSITIVE, flops=POSITIVE), min_size=1, max_size=6
)


def test_table_2_of_the_paper():
    found = dict(zip((row.name for row in PUBLISHED["brats"]), pt_scores(PUBLISHED["brats"]), strict=True))
    expected = {
        "E2ENet s=0.9": 1.9973,
        "E2ENet s=0.8": 1.7167,
        "E2ENet s=0.7": 1.5711,
        "nnU-Net": 1.3466,
        "UNet++": 1.1228,
    }
    assert found.pop("DiNTS") is None, "no costs are printed"
    assert {name: round(value, 4) for name, value in found.items()} == expected


def test_by_hand_with_extremes_of_different_rows():
    rows = [Row(name="a", dice=80, params=10, flops=400), Row(name="b", dice=100, params=40, flops=100)]
    # a: 0.8 + (1 + 1/4) / 2, b: 1 + (1/4 + 1) / 2; with alpha 2: 0.8 + 2.5, 1 + 2.5
    assert pt_scores(rows) == pytest.approx((1.425, 1.625))
    assert pt_scores(rows, alpha=2) == pytest.approx((3.3, 3.5))
    assert pt_scores(rows, alpha=0) == pytest.approx((0.8, 1.0))


def test_a_row_of_unknown_cost_has_no_score_and_changes_none():
    rows = PUBLISHED["brats"]
    unknown = Row(name="?", dice=99.0, params=1.0)
    assert pt_scores([*rows, unknown]) == (*pt_scores(rows), None)
    assert pt_scores([unknown]) == (None,)
    assert pt_scores([]) == ()


@given(ROWS)
def test_laws(rows):
    found = pt_scores(rows)
    # 1e-9: ratios of floats, rounded
    assert all(0 < value <= 2 + 1e-9 for value in found)
    scaled = [replace(row, dice=row.dice / 100, params=row.params * 7, flops=row.flops * 3) for row in rows]
    assert pt_scores(scaled) == pytest.approx(found), "units do not matter"
    assert pt_scores(rows[::-1]) == found[::-1], "nor does the order"


def test_an_mdice_of_0_is_a_score_and_one_that_is_none_is_not():
    zero, none = Row(name="0", dice=0.0, params=10, flops=10), Row(name="-", dice=None, params=1, flops=1)
    best = Row(name="best", dice=50.0, params=20, flops=20)
    assert pt_scores([zero, none, best]) == pytest.approx((1.0, None, 1.5))
    assert pt_scores([zero, none]) == (None, None), "nothing to divide by"
    lines = comparison([zero, none, best]).splitlines()
    assert lines[2].split() == ["0", "0.0", "10.00", "10.00", "1.0000"]
    assert lines[3].split() == ["-", "-", "1.00", "1.00", "-"]


@pytest.mark.parametrize("change", [{"dice": -1.0}, {"dice": math.nan}, {"params": 0.0}, {"flops": math.nan}])
def test_numbers_that_can_be_none_are_refused(change):
    with pytest.raises(DataError, match="row of 'nnU-Net': expected mDice from 0 up, positive costs"):
        pt_scores([replace(PUBLISHED["brats"][2], **change)])


def test_a_negative_weight_is_refused():
    with pytest.raises(SettingError, match="alpha of the PT score"):
        pt_scores(PUBLISHED["brats"], alpha=-1)


def test_every_published_row_names_its_source():
    for rows in PUBLISHED.values():
        assert all(row.source.startswith("Wu et al.") for row in rows)
        assert len({row.name for row in rows}) == len(rows)


def test_the_comparison_shows_ours_beside_theirs():
    ours = Row(name="ours", dice=74.0, source="this run")
    lines = comparison([*PUBLISHED["brats"], ours]).splitlines()
    assert lines[0].split() == ["method", "mDice", "ED", "ET", "NET", "params,", "M", "FLOPs,", "G", "PT"]
    assert lines[4].split() == ["nnU-Net", "74.1", "81.0", "62.0", "79.3", "31.20", "1076.62", "1.3466", "[1]"]
    assert lines[8].split() == ["ours", "74.0", "-", "-", "-", "-", "-", "-", "[2]"]
    assert "PT = mDice / highest mDice + 0.5 (fewest params / params + fewest FLOPs / FLOPs)" in lines[9]
    assert lines[-1] == "[2] this run"


# Demšar (2006), Table 5: critical values for the two-tailed Nemenyi test at 0.05 and 0.10, 2 to 10 methods.
DEMSAR = {
    0.05: (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164),
    0.10: (1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920),
}


@pytest.mark.parametrize("alpha", DEMSAR)
@pytest.mark.parametrize("num_methods", range(2, 11))
def test_the_critical_distance_of_demsars_table(num_methods, alpha):
    num_cases = 14
    found = nemenyi(np.random.default_rng(0).normal(size=(num_cases, num_methods)), alpha=alpha)
    q = DEMSAR[alpha][num_methods - 2]
    expected = q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_cases))
    assert found.critical_distance == pytest.approx(expected, rel=5e-4)  # three digits of the table


def test_the_example_of_demsar():
    # his section 3.2.2: four methods, 14 data sets, a critical distance of 1.25 at 0.05 and of 1.12 at 0.10
    scores = np.random.default_rng(0).normal(size=(14, 4))
    assert nemenyi(scores).critical_distance == pytest.approx(1.25, abs=0.005)  # two digits
    assert nemenyi(scores, alpha=0.1).critical_distance == pytest.approx(1.12, abs=0.005)


def test_two_methods_are_a_test_of_the_normal_distribution():
    found = nemenyi(np.ones((9, 2)), alpha=0.1)
    assert found.critical_distance == pytest.approx(norm.ppf(0.95) * math.sqrt(6 / 54), rel=1e-6)  # an integral


# Ranks by hand: case 1: a b c = 1 2 3; case 2: a and b share 1.5, c 3; case 3: b 1, a 2, c 3.
def test_average_ranks_by_hand():
    found = nemenyi(np.array([[0.9, 0.8, 0.1], [0.7, 0.7, 0.1], [0.5, 0.6, 0.1]]))
    np.testing.assert_allclose(found.average, [1.5, 1.5, 3.0])


def test_groups_are_the_bars_of_the_diagram():
    # Of 100 cases, four methods always in one order: ranks 1, 2, 3, 4 and a distance of 2.569·√(20/600) = 0.47
    scores = np.tile([0.1, 0.4, 0.3, 0.2], (100, 1))
    assert nemenyi(scores).groups == ()
    # four cases: 2.35, so ranks 1 to 3 go together, and 2 to 4; columns in order of rank are 1, 2, 3, 0
    assert nemenyi(scores[:4]).groups == ((1, 2, 3), (2, 3, 0))
    # one case: 4.69, more than all
    assert nemenyi(scores[:1]).groups == ((1, 2, 3, 0),)


@settings(max_examples=20)  # the studentized range is an integral, and slow
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_ranks_add_up_and_any_monotone_scale_has_the_same(num_cases, num_methods, seed):
    scores = np.random.default_rng(seed).integers(0, 4, (num_cases, num_methods)).astype(float)
    found = nemenyi(scores)
    assert found.average.sum() == pytest.approx(num_methods * (num_methods + 1) / 2)
    np.testing.assert_array_equal(nemenyi(np.exp(scores)).average, found.average)


@pytest.mark.parametrize("scores", [np.ones((3, 1)), np.ones((0, 3)), np.ones(3), np.array([[0.5, np.nan]])])
def test_scores_without_ranks_are_refused(scores):
    with pytest.raises(DataError, match="scores of the Nemenyi test"):
        nemenyi(scores)


def test_a_level_that_is_none_is_refused():
    with pytest.raises(SettingError, match=r"a level between 0 and 1, got 1\.5"):
        nemenyi(np.ones((3, 3)), alpha=1.5)

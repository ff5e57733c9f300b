"""Pictures of a scan: which way up, which side is which, how many millimetres; and of which case and slice."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.evaluation.figures import mark_scale, mark_sides, slice_comparison
from dstlib.zoo.e2enet.evaluation.scores import Evaluation
from dstlib.zoo.e2enet.evaluation.slices import OPPOSITE, bar_length, busiest_slice, usual_view

ORIENTATIONS = ["".join(letters) for axes in permutations(("RL", "AP", "SI")) for letters in product(*axes)]
SPACINGS = st.tuples(*[st.floats(0.1, 10.0)] * 3)


def towards(letter, orientation, spacing, shape):
    """Millimetres towards a side of the patient, of every voxel of a volume (D, H, W)."""
    axis = next(i for i in range(3) if orientation[i] in (letter, OPPOSITE[letter]))
    sign = 1 if orientation[axis] == letter else -1
    return sign * spacing[axis] * np.indices(shape)[axis]


@given(st.sampled_from(ORIENTATIONS), SPACINGS, st.tuples(*[st.integers(2, 4)] * 3))
def test_a_picture_lies_as_its_letters_and_its_scale_say(orientation, spacing, shape):
    view = usual_view(orientation, spacing)
    down, right = (
        view.of(towards(letter, orientation, spacing, shape), 1) for letter in (OPPOSITE[view.top], OPPOSITE[view.left])
    )
    np.testing.assert_allclose(np.diff(down, axis=0), view.spacing[0], rtol=1e-9)  # rounding of float64
    np.testing.assert_allclose(np.diff(right, axis=1), view.spacing[1], rtol=1e-9)
    assert not np.diff(down, axis=1).any()
    assert not np.diff(right, axis=0).any()
    assert (view.top, view.left) in {"axial": {("A", "R")}, "coronal": {("S", "R")}, "sagittal": {("S", "A")}}[
        view.name
    ]


def test_there_are_48_orientations_and_each_is_shown_through_its_coarse_axis_or_from_below():
    assert len(set(ORIENTATIONS)) == 48
    for orientation in ORIENTATIONS:
        assert usual_view(orientation, (1.0, 1.0, 1.0)).name == "axial"
        for axis in range(3):
            spacing = [0.8, 0.8, 0.8]
            spacing[axis] = 5.0
            view = usual_view(orientation, spacing)
            assert view.axis == axis
            assert view.spacing == (0.8, 0.8)


@given(st.floats(1e-6, 1e6))
def test_a_scale_bar_is_a_round_length_that_fits(width):
    length = bar_length(width)
    assert length <= width / 3 < 2.5 * length * (1 + 1e-9)  # from 2 to 5 is the largest step; rounding of float64
    assert f"{length:.0e}"[0] in "125"


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 0.4), (0.7, 0.7, 5.0)])
def test_the_bar_that_is_drawn_is_as_long_as_it_says(spacing):
    view = usual_view("SAR", spacing)
    panel = Figure().subplots()
    panel.imshow(view.of(np.zeros((30, 40, 50)), 0), aspect=view.spacing[0] / view.spacing[1])
    before = panel.get_xlim(), panel.get_ylim()
    mark_sides(panel, view)
    mark_scale(panel, view)
    (bar,) = panel.lines
    start, end = bar.get_xdata()
    assert before == (panel.get_xlim(), panel.get_ylim())
    assert panel.get_xlim()[0] < start < end < panel.get_xlim()[1]
    texts = {text.get_text(): text.get_position() for text in panel.texts}
    assert f"{(end - start) * view.spacing[1]:g} mm" in texts
    assert texts[view.left][0] < 0.1
    assert texts[view.top][1] > 0.9, "axes count upwards"


def test_the_busiest_slice_counts_classes_alone():
    label = np.zeros((4, 2, 2), np.uint8)
    label[0] = 1  # no background there, which is no class
    label[2, 0] = 1
    assert busiest_slice(label) == 0
    label[3, 0] = (1, 2)
    assert busiest_slice(label) == 3
    assert busiest_slice(label, axis=2) == 1
    label[3] = 0
    label[2] = 1
    assert busiest_slice(label[:, :, :1], axis=1) == 0, "the middle or the one before, where all is alike"


def scores_of(dice, volumes):
    names = tuple(f"{i}" for i in range(len(dice)))
    return Evaluation(names, ("a", "b"), {"dice": np.array(dice)}, np.array(volumes), (1.0, 1.0))


def test_the_case_that_is_shown_has_a_class_and_the_median_dice():
    nan, some, false, none = np.nan, [[1.0, 1.0], [0, 0]], [[0, 1.0], [0, 0]], [[0, 0], [0, 0]]
    scores = scores_of(
        [[nan, nan], [0.9, nan], [0.0, nan], [0.5, nan], [nan, nan], [0.2, nan]], [none, some, false, some, none, some]
    )
    assert scores.typical_case() == 3
    assert scores_of([[nan, nan], [0.0, nan]], [none, false]).typical_case() in (0, 1)


@pytest.mark.parametrize("has_classes", [True, False])
@pytest.mark.parametrize(("orientation", "num_channels"), [("SPL", 1), ("LSP", 4), ("AIR", 2)])
def test_a_picture_is_drawn_of_any_scan(tmp_path, orientation, num_channels, has_classes):
    label = np.zeros((3, 4, 5), np.uint8)
    label[1, 2, 2:] = (1, 2, 3) if has_classes else 0
    case = Case("a", np.zeros((num_channels, 3, 4, 5), np.float32), label, (5.0, 1.0, 0.5), orientation)
    for labels in (Labels.consecutive(2), Labels(values=(2, 4), regions=((2, 4), (4,)), written=(2, 4), ignored=9)):
        slice_comparison(tmp_path / "slice.png", case, label, labels, {"liver": np.nan, "tumour": 0.5})
        assert (tmp_path / "slice.png").stat().st_size > 0

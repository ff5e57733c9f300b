"""Dice against tables worked by hand, and prediction by windows that changes nothing but the output."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dstlib.zoo.e2enet.data.cases import Case, Cases
from dstlib.zoo.e2enet.evaluation.evaluate import Evaluation, dice_per_class, evaluate, predict
from dstlib.zoo.e2enet.evaluation.figures import _upright


class ReadsTheImage(nn.Module):
    """A network that has learned its task: its image holds the label, and every logit says so."""

    def __init__(self, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.num_classes = num_classes
        self.deep_supervision = True

    def forward(self, x):
        logits = self.scale * functional.one_hot(x[:, 0].long(), self.num_classes).movedim(-1, 1).float()
        return (logits, logits) if self.deep_supervision else logits


def labelled(shape, seed=0):
    label = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)
    return Case(f"case{seed}", label[None].astype(np.float32), label, (1.0, 1.0, 1.0))


# label 1 1 1 1 2 2 0 0 0 0 against prediction 1 1 1 0 2 0 2 0 3 0, classes 1 to 4:
# 1: 2·3 / (4 + 3), 2: 2·1 / (2 + 2), 3: 0 / (0 + 1), 4: in neither
def test_dice_by_hand():
    label = np.array([1, 1, 1, 1, 2, 2, 0, 0, 0, 0])
    prediction = np.array([1, 1, 1, 0, 2, 0, 2, 0, 3, 0])
    dice = dice_per_class(label, prediction, num_classes=4)
    np.testing.assert_array_equal(dice, [6 / 7, 0.5, 0.0, np.nan])


def test_dice_of_a_volume_equals_the_definition_voxel_by_voxel():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 4, (2, 5, 6, 7)).astype(np.uint8)
    expected = [
        2 * ((label == k) & (prediction == k)).sum() / ((label == k).sum() + (prediction == k).sum()) for k in (1, 2, 3)
    ]
    np.testing.assert_array_equal(dice_per_class(label, prediction, num_classes=3), expected)


# Two cases and three classes; class b is missing in one case, class c in both.
SCORES = Evaluation(("x", "y"), ("a", "b", "c"), np.array([[0.5, np.nan, np.nan], [1.0, 0.25, np.nan]]))


def test_the_mean_is_over_the_cases_with_the_class_and_then_over_the_classes():
    np.testing.assert_array_equal(SCORES.class_dice, [0.75, 0.25, np.nan])
    assert SCORES.num_cases.tolist() == [2, 1, 0]
    assert SCORES.mean == 0.5
    assert [SCORES.case_mean(i) for i in (0, 1)] == [0.5, 0.625]


def test_without_any_foreground_there_is_no_mean():
    assert np.isnan(Evaluation(("x",), ("a",), np.array([[np.nan]])).mean)


def test_the_table_says_what_was_left_out_and_what_dice_is():
    lines = SCORES.table().splitlines()
    assert [line.split() for line in lines[2:5]] == [["a", "0.750", "2"], ["b", "0.250", "1"], ["c", "-", "0"]]
    assert lines[6].split() == ["mDice", "0.500", "2"]
    assert lines[7].startswith("3 of 6 (class, case) pairs left out")
    assert "Dice = 2 |label ∩ prediction|" in lines[8]


def test_the_json_is_strict_and_holds_every_case():
    text = json.dumps(SCORES.to_json(), allow_nan=False)
    assert json.loads(text)["cases"] == {
        "x": {"a": 0.5, "b": None, "c": None},
        "y": {"a": 1.0, "b": 0.25, "c": None},
    }
    assert json.loads(text)["mean_dice"] == 0.5


@pytest.mark.parametrize("shape", [(4, 6, 8), (3, 5, 8), (9, 11, 20)], ids=["a patch", "smaller", "larger"])
def test_windows_cover_a_volume_of_any_size(shape):
    case = labelled(shape)
    prediction = predict(ReadsTheImage(3), case.image, patch_size=(4, 6, 8))
    assert prediction.dtype == np.uint8
    np.testing.assert_array_equal(prediction, case.label)


def test_prediction_leaves_the_model_as_it_was():
    model = ReadsTheImage(3).train()
    predict(model, labelled((4, 4, 4)).image, patch_size=(4, 4, 4))
    assert model.training
    assert model.deep_supervision
    model.eval().deep_supervision = False
    predict(model, labelled((4, 4, 4)).image, patch_size=(4, 4, 4))
    assert not model.training
    assert not model.deep_supervision


def test_a_perfect_network_scores_one():
    cases = Cases("set", ("CT",), ("a", "b"), (labelled((4, 5, 6), 0), labelled((6, 5, 4), 1)))
    scores = evaluate(ReadsTheImage(3), cases, patch_size=(4, 4, 4))
    assert scores.cases == ("case0", "case1")
    np.testing.assert_array_equal(scores.dice, np.ones((2, 2)))


def test_slices_are_shown_upright():
    plane = np.arange(6).reshape(2, 3)  # (H, W)
    assert np.array_equal(_upright("SPL")(plane), plane)
    assert np.array_equal(_upright("SAR")(plane), plane[::-1, ::-1]), "RAS, as most NIfTI files"

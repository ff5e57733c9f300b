"""Means, tables and files of scores, against values worked by hand; cases and folders scored."""

import csv
import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nifti_headers import write_nifti

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans.header import header_at
from dstlib.zoo.e2enet.data.scans.nifti import write_label
from dstlib.zoo.e2enet.evaluation import evaluate
from dstlib.zoo.e2enet.evaluation.evaluate import evaluate_folder
from dstlib.zoo.e2enet.evaluation.metrics import Scoring, score
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, pooled

NAN = np.nan


# Two cases and three classes: b is missing in case x on both sides, and false in y; c is missed in y.
SCORES = Evaluation(
    ("x", "y"),
    ("a", "b", "c"),
    {
        "dice": np.array([[0.5, NAN, NAN], [1.0, 0.0, 0.0]]),
        "nsd": np.array([[0.25, NAN, NAN], [0.75, 0.0, 0.0]]),
        "hd95": np.array([[4.0, NAN, NAN], [2.0, NAN, NAN]]),
    },
    np.array([[[1.0, 2.0], [0, 0], [0, 0]], [[3.0, 3.0], [0, 0.5], [0.25, 0]]]),
    (1.0, 1.0, 1.0),
)


def test_the_mean_is_over_the_cases_with_the_class_and_then_over_the_classes():
    np.testing.assert_array_equal(SCORES.class_dice, [0.75, 0.0, 0.0])
    np.testing.assert_array_equal(SCORES.class_means("hd95"), [3.0, NAN, NAN])
    assert SCORES.num_cases.tolist() == [2, 1, 1]
    assert SCORES.mean == 0.25
    assert SCORES.mean_of("hd95") == 3.0
    assert SCORES.case_means("dice").tolist() == [0.5, pytest.approx(1 / 3)]


def test_missed_and_false_structures_are_told_apart():
    assert SCORES.num_false.tolist() == [0, 1, 0]
    assert SCORES.num_missed.tolist() == [0, 0, 1]


def test_without_any_foreground_there_is_no_mean():
    nothing = Evaluation(("x",), ("a",), {"dice": np.array([[NAN]])}, np.zeros((1, 1, 2)), (1.0,))
    assert np.isnan(nothing.mean)
    assert nothing.typical_case() == 0


@given(arrays(float, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.floats(0, 1)))
def test_both_orders_of_averaging_agree_when_nothing_is_missing(dice):
    names = [tuple(f"{i}" for i in range(n)) for n in dice.shape]
    scores = Evaluation(*names, {"dice": dice}, np.ones((*dice.shape, 2)), (1.0,) * dice.shape[1])
    assert scores.mean == pytest.approx(scores.case_means("dice").mean(), abs=1e-12)  # sums in another order


def test_the_table_says_what_was_counted_left_out_and_meant():
    lines = SCORES.table().splitlines()
    assert lines[0].split() == ["class", "Dice", "NSD", "HD95", "cases", "missed", "false"]
    assert [line.split() for line in lines[2:5]] == [
        ["a", "0.750", "0.500", "3.00", "2", "0", "0"],
        ["b", "0.000", "0.000", "-", "1", "0", "1"],
        ["c", "0.000", "0.000", "-", "1", "1", "0"],
    ]
    assert lines[6].split() == ["mean", "0.250", "0.167", "3.00", "2", "1", "1"]
    assert lines[7] == "2 of 6 (class, case) pairs left out: absent from both."
    assert lines[8] == "2 of 6 pairs with Dice 0 and without a distance: absent from one."
    assert "Dice = 2 |label ∩ prediction|" in lines[9]
    assert "within 1 mm of the other one" in lines[10]
    assert "class by class, then over the classes" in lines[12]


def test_the_table_lists_cases_that_were_not_scored():
    lines = Evaluation(*_fields(SCORES), {"z": "no prediction z.nii.gz"}).table().splitlines()
    assert lines[9:11] == ["NOT SCORED, 1 of 3 cases:", "  z: no prediction z.nii.gz"]


def _fields(scores):
    return scores.cases, scores.classes, scores.scores, scores.volumes, scores.tolerances


def test_tolerances_that_differ_are_named():
    cases, classes, values, volumes, _ = _fields(SCORES)
    text = Evaluation(cases, classes, values, volumes, (1.0, 2.0, 0.5)).definition()
    assert "the tolerance of its class (1, 2, 0.5 mm)" in text


def test_the_json_is_strict_and_comes_back():
    scores = Evaluation(*_fields(SCORES), {"z": "no prediction"})
    content = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert content["mean_dice"] == 0.25
    assert content["class_dice"] == {"a": 0.75, "b": 0.0, "c": 0.0}
    assert content["num_cases"] == {"a": 2, "b": 1, "c": 1}
    assert content["cases"]["x"]["dice"] == {"a": 0.5, "b": None, "c": None}
    again = Evaluation.from_json(content)
    assert again.to_json() == scores.to_json()
    np.testing.assert_array_equal(again.scores["hd95"], scores.scores["hd95"])


@pytest.mark.parametrize("content", [{}, {"cases": 1, "classes": []}, {"cases": {"x": {}}, "classes": ["a"]}])
def test_other_json_is_refused(content):
    with pytest.raises(DataError, match="expected the JSON of an evaluation"):
        Evaluation.from_json(content)


def test_the_csv_has_a_line_per_case_and_class():
    rows = list(csv.DictReader(io.StringIO(SCORES.csv())))
    assert len(rows) == 6
    assert rows[1] == {
        "case": "x",
        "class": "b",
        "dice": "",
        "nsd": "",
        "hd95": "",
        "label_ml": "0",
        "prediction_ml": "0",
    }
    assert rows[3]["hd95"] == "2"


def test_folds_are_pooled_case_by_case():
    other = Evaluation(("w",), *_fields(SCORES)[1:2], _first(SCORES.scores), SCORES.volumes[:1], SCORES.tolerances)
    both = pooled([SCORES, other])
    assert both.cases == ("x", "y", "w")
    np.testing.assert_array_equal(both.dice, SCORES.dice[[0, 1, 0]])
    np.testing.assert_array_equal(both.volumes, SCORES.volumes[[0, 1, 0]])
    with pytest.raises(DataError, match="expected each case once, got x, y more than once"):
        pooled([SCORES, SCORES])
    with pytest.raises(DataError, match=r"tolerances of the runs to pool"):
        pooled([SCORES, Evaluation(*_fields(other)[:4], (2.0, 2.0, 2.0))])
    with pytest.raises(DataError, match=r"metrics of the runs to pool"):
        pooled([SCORES, Evaluation(("w",), other.classes, {"dice": other.dice}, other.volumes, other.tolerances)])


def _first(scores):
    return {name: values[:1] for name, values in scores.items()}


# --- files
AFFINE = np.diag([0.5, 2.0, 3.0, 1.0])  # x, y, z
CLASSES = ("a", "b")


def folder(tmp_path, predictions):
    """Labels 1 in a box of 2×2×2 voxels for each name, and the predictions given."""
    label = np.zeros((4, 5, 6), np.uint8)
    label[1:3, 1:3, 1:3] = 1
    (tmp_path / "labels").mkdir()
    (tmp_path / "out").mkdir()
    files = []
    for name, change in predictions.items():
        path = tmp_path / "labels" / f"{name}.nii.gz"
        write_label(path, label, header_at(AFFINE, label.shape[::-1]))
        files.append(CaseFiles(name=name, images=(path,), label=path))
        if change is not None:
            prediction, affine = change(label)
            write_label(tmp_path / "out" / f"{name}.nii.gz", prediction, header_at(affine, prediction.shape[::-1]))
    return files


def same(label):
    return label, AFFINE


def one_lower(label):
    return np.roll(label, 1, axis=0), AFFINE


# Moved by one slice of 3 mm: half the voxels overlap; of the four in each direction that do not, each is 3 mm away.
def test_a_folder_is_scored_in_millimetres_of_its_files(tmp_path):
    files = folder(tmp_path, {"x": same, "y": one_lower})
    scores = evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    np.testing.assert_array_equal(scores.dice, [[1.0, NAN], [0.5, NAN]])
    np.testing.assert_array_equal(scores.scores["hd"], [[0.0, NAN], [3.0, NAN]])
    np.testing.assert_allclose(scores.volumes[0, 0], [0.024, 0.024])  # 8 voxels of 3 mm³
    assert scores.left_out == {}


@pytest.mark.parametrize(("geometry", "millimetres", "millilitres"), [("itk", 10.0, 0.2), ("sform", 1.0, 0.008)])
def test_millimetres_are_those_of_the_rule(tmp_path, geometry, millimetres, millilitres):
    """Of a set whose sforms have no sizes: a slice is 10 mm by pixdim, and 1 mm by the sform."""
    label = np.zeros((4, 5, 6), np.uint8)
    label[1:3, 1:3, 1:3] = 1
    forms = {"sform": np.diag([-1.0, -1.0, 1.0, 1.0]), "qform": np.diag([1.0, 2.5, 10.0, 1.0])}
    label_file = write_nifti(tmp_path / "label.nii", voxels=label, **forms)
    content = write_nifti(tmp_path / "moved.nii", voxels=np.roll(label, 1, axis=2), **forms).read_bytes()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.nii.gz").write_bytes(gzip.compress(content))
    files = [CaseFiles(name="x", images=(label_file,), label=label_file, geometry=geometry)]
    scores = evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    np.testing.assert_allclose(scores.scores["hd95"], [[millimetres, NAN]])
    np.testing.assert_allclose(scores.volumes[0, 0], millilitres)


def test_what_cannot_be_scored_is_listed_with_the_reason(tmp_path):
    changes = {
        "good": same,
        "missing": None,
        "shape": lambda label: (label[1:], AFFINE),
        "moved": lambda label: (label, AFFINE + _shift(2.0)),
        "foreign": lambda label: (label * 7, AFFINE),
        "broken": same,
        "unlabelled": same,
    }
    files = folder(tmp_path, changes)
    (tmp_path / "out" / "broken.nii.gz").write_bytes(b"no scan")
    files[-1] = CaseFiles(name="unlabelled", images=files[-1].images)
    scores = evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    assert scores.cases == ("good",)
    assert scores.left_out["missing"] == "no prediction missing.nii.gz"
    assert "shape (6, 5, 3), but its label has (6, 5, 4)" in scores.left_out["shape"]
    assert "lies 2 mm away from its label" in scores.left_out["moved"]
    assert "foreign.nii.gz has values 7, but the classes are numbered 0 to 2" in scores.left_out["foreign"]
    assert "broken.nii.gz cannot be read" in scores.left_out["broken"]
    assert scores.left_out["unlabelled"] == "no label"
    assert scores.mean == 1.0


def _shift(millimetres):
    affine = np.zeros((4, 4))
    affine[2, 3] = millimetres
    return affine


def test_a_folder_without_predictions_is_refused(tmp_path):
    files = folder(tmp_path, {"x": None, "y": None})
    with pytest.raises(DataError, match=r"got none of 2\.(.|\n)*x: no prediction x\.nii\.gz\n  y: no prediction"):
        evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    for name in "xy":
        (tmp_path / "out" / f"{name}.nii.gz").touch()
    with pytest.raises(
        DataError, match=r"mend what is there\.\n  x: .* or leave the case out: \S+x\.nii\.gz cannot be read"
    ):
        evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)


def test_predictions_of_other_programs_have_other_endings(tmp_path):
    files = folder(tmp_path, {"x": same, "y": one_lower})
    zipped = tmp_path / "out" / "y.nii.gz"
    expected = evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    (tmp_path / "out" / "y.nii").write_bytes(gzip.decompress(zipped.read_bytes()))
    with pytest.raises(DataError, match=r"expected one file per case, got y\.nii beside y\.nii\.gz"):
        evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    zipped.unlink()
    assert evaluate_folder(tmp_path / "out", files, CLASSES, progress=False).to_json() == expected.to_json()


@pytest.mark.parametrize("error", [MemoryError("3 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate 3 TiB")])
def test_a_case_too_large_for_the_memory_is_named_and_the_others_are_scored(tmp_path, monkeypatch, error):
    files, scored = folder(tmp_path, {"x": same, "y": same}), []

    def score_unless_first(*arguments, **settings):
        scored.append(arguments)
        if len(scored) == 1:
            raise error
        return score(*arguments, **settings)

    monkeypatch.setattr(evaluate, "score", score_unless_first)
    scores = evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    assert scores.cases == ("y",)
    assert scores.left_out["x"].startswith("does not fit into memory: ")
    assert "3 TiB" in scores.left_out["x"]


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(DataError, match="classes of an evaluation: expected each name once, got a more than once"):
        Evaluation(("x",), ("a", "b", "a"), {"dice": np.zeros((1, 3))}, np.zeros((1, 3, 2)), (1.0,) * 3)
    content = SCORES.to_json()
    with pytest.raises(DataError, match="got a more than once"):
        Evaluation.from_json({**content, "classes": ["a", "a", "b"]})


def test_workers_change_nothing(tmp_path):
    files = folder(tmp_path, {"x": same, "y": one_lower, "z": None})
    alone = evaluate_folder(tmp_path / "out", files, CLASSES, progress=False)
    shared = evaluate_folder(tmp_path / "out", files, CLASSES, workers=1, progress=False)
    assert shared.to_json() == alone.to_json()
    assert shared.cases == alone.cases


def test_settings_are_refused_before_any_work(tmp_path):
    with pytest.raises(SettingError, match="workers of the evaluation"):
        evaluate_folder(tmp_path, [], CLASSES, workers=-1)
    with pytest.raises(SettingError, match="expected one number, or 2 of them"):
        evaluate_folder(tmp_path, [], CLASSES, scoring=Scoring(tolerance=(1.0, 1.0, 1.0)))

"""Scores as the challenges of BTCV and BraTS have them, tolerances of each class, and what empty regions count."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from monai.metrics import compute_average_surface_distance

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet import cli
from dstlib.zoo.e2enet.data.layouts.btcv import BTCV_ORGANS
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.layouts.regions import BRATS_REGIONS
from dstlib.zoo.e2enet.data.scans.header import header_at
from dstlib.zoo.e2enet.data.scans.nifti import write_label
from dstlib.zoo.e2enet.evaluation.challenges import BRATS_PENALTY, challenge_of
from dstlib.zoo.e2enet.evaluation.evaluate import evaluate_folder
from dstlib.zoo.e2enet.evaluation.metrics import Scoring, score, surface_distances
from dstlib.zoo.e2enet.evaluation.scores import Evaluation, pooled
from dstlib.zoo.e2enet.evaluation.tolerances import read_tolerance

DECATHLON = ("edema", "non-enhancing tumor", "enhancing tumour")
NAN = np.nan
SPACINGS = st.sampled_from([(1.0, 1.0, 1.0), (5.0, 0.75, 0.5)])
VOLUMES = arrays(np.uint8, (2, 4, 3, 3), elements=st.integers(0, 3))  # label and prediction


# --- mean surface distance
def msd(label, prediction, spacing):
    scoring = Scoring(metrics=("dice", "msd", "hd"))
    values = score(label, prediction, spacing=spacing, num_classes=1, scoring=scoring).values[:, 0]
    return values[1], values[2]


@settings(max_examples=40, deadline=None)
@given(st.data(), SPACINGS)
def test_mean_surface_distance_is_monais(data, spacing):
    volumes = data.draw(
        arrays(np.uint8, (2, 4, 3, 3), elements=st.integers(0, 1)).filter(lambda x: x[0].any() and x[1].any())
    )
    found, largest = msd(*volumes, spacing)
    prediction, label = (torch.from_numpy(x)[None, None] for x in volumes[::-1])
    expected = compute_average_surface_distance(
        prediction, label, include_background=True, symmetric=True, spacing=list(spacing)
    )
    assert found == pytest.approx(float(expected), abs=1e-5)  # MONAI's distances are float32
    assert 0 <= found <= largest
    assert found == pytest.approx(msd(*volumes[::-1], spacing)[0], abs=1e-12)  # sums in another order
    assert found == surface_distances(*volumes.astype(bool), spacing=spacing).mean()


# --- which challenge
@pytest.mark.parametrize("names", [DECATHLON, ("necrotic core", "oedema edema", "enhancing")])
def test_the_classes_of_brats_are_scored_by_its_regions(names):
    challenge = challenge_of(names, Labels(values=(1, 2, 4)))
    assert challenge.name == "BraTS"
    assert challenge.classes == BRATS_REGIONS
    assert challenge.labels.regions[0] == (1, 2, 4)
    assert challenge.labels.regions[2] == (4,)
    assert challenge.scoring.penalty == pytest.approx(373.12866, abs=1e-5)  # what nnU-Net's evaluation has
    again = challenge_of(BRATS_REGIONS, challenge.labels)
    assert again == challenge


def test_the_organs_of_btcv_are_scored_by_their_distances():
    challenge = challenge_of(BTCV_ORGANS, Labels.consecutive(13))
    assert challenge.scoring == Scoring(metrics=("dice", "msd", "hd"))
    assert challenge.labels == Labels.consecutive(13)


@pytest.mark.parametrize("names", [("edema", "core"), ("Anterior", "Posterior"), BTCV_ORGANS[:12], BRATS_REGIONS])
def test_other_classes_are_of_no_challenge(names):
    assert challenge_of(names, Labels.consecutive(len(names))) is None


# --- empty regions
def evaluated(label, prediction, challenge, tmp_path):
    """Scores one case by files, as they are read again."""
    header = header_at(np.diag([1.0, 1.0, 1.0, 1.0]), label.shape[::-1])
    paths = tmp_path / "label.nii.gz", tmp_path / "out" / "x.nii.gz"
    paths[1].parent.mkdir(exist_ok=True)
    for path, volume in zip(paths, (label, prediction), strict=True):
        write_label(path, volume, header)
    files = [CaseFiles(name="x", images=(paths[0],), label=paths[0])]
    return evaluate_folder(
        paths[1].parent, files, challenge.classes, labels=challenge.labels, scoring=challenge.scoring, progress=False
    )


@settings(max_examples=25, deadline=None)
@given(VOLUMES)
def test_brats_scores_regions_of_class_predictions_by_its_rules(tmp_path_factory, volumes):
    """Every region has both values: of a region in both volumes the plain ones, else those of the table of rules."""
    challenge = challenge_of(DECATHLON, Labels.consecutive(3))
    found = evaluated(*volumes, challenge, tmp_path_factory.mktemp("case"))
    assert tuple(found.scores) == ("dice", "hd95")
    for k, region in enumerate([(1, 2, 3), (2, 3), (3,)]):
        label, prediction = np.isin(volumes, region)
        dice, hd95 = (found.scores[name][0, k] for name in ("dice", "hd95"))
        if not label.any() and not prediction.any():
            assert (dice, hd95) == (1.0, 0.0)
        elif label.any() != prediction.any():
            assert (dice, hd95) == (0.0, BRATS_PENALTY)
        else:
            assert dice == pytest.approx(2 * (label & prediction).sum() / (label.sum() + prediction.sum()))
            assert hd95 == np.percentile(surface_distances(label, prediction, spacing=(1, 1, 1)), 95)


def test_regions_of_a_perfect_prediction_are_perfect(tmp_path):
    label = np.random.default_rng(0).integers(0, 4, (4, 5, 6)).astype(np.uint8)
    found = evaluated(label, label, challenge_of(DECATHLON, Labels.consecutive(3)), tmp_path)
    assert found.scores["dice"].tolist() == [[1.0, 1.0, 1.0]]
    assert found.scores["hd95"].tolist() == [[0.0, 0.0, 0.0]]


# Of two cases and one class: missed in the first, in neither in the second.
PLAIN = Evaluation(
    ("x", "y"),
    ("a",),
    {"dice": np.array([[0.0], [NAN]]), "hd95": np.array([[NAN], [NAN]])},
    np.array([[[1.0, 0.0]], [[0.0, 0.0]]]),
    (1.0,),
)


def test_the_penalty_is_told_and_comes_back():
    scores = PLAIN.penalised(100.0)
    assert scores.scores["dice"].tolist() == [[0.0], [1.0]]
    assert scores.scores["hd95"].tolist() == [[100.0], [0.0]]
    assert scores.mean_of("hd95") == 50.0
    assert "1 of 2 pairs with Dice 0 and a distance of 100 mm: absent from one." in scores.table()
    assert "its Dice and NSD are 0 and its distances 100 mm." in scores.definition()
    assert "left out" not in scores.table()
    again = Evaluation.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False)))
    assert again.to_json() == scores.to_json()
    assert again.penalty == 100.0
    assert "penalty_mm" not in PLAIN.to_json()  # as in every run of before


def test_scores_with_and_without_a_penalty_are_not_pooled():
    with pytest.raises(DataError, match=r"penalty of the runs to pool: expected None in all, got 100\.0"):
        pooled([PLAIN, PLAIN.penalised(100.0)])


@pytest.mark.parametrize("penalty", [-1.0, math.inf, math.nan])
def test_a_penalty_that_is_no_distance_is_refused(penalty):
    with pytest.raises(SettingError, match="penalty of Scoring: expected millimetres from 0 up, or None"):
        Scoring(penalty=penalty)


# --- tolerances
def test_tolerances_of_each_class_come_from_a_file(tmp_path):
    file = tmp_path / "mm.json"
    file.write_text(json.dumps({"liver": 5, "aorta": 2.5, "spleen": 3}))
    assert read_tolerance(str(file), ("aorta", "liver")) == (2.5, 5.0)
    assert read_tolerance("0", ("aorta", "liver")) == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"liver": 5}, r"a tolerance for each class, got none for aorta, among 1 entries"),
        ({"liver": 5, "aorta": -1}, r"expected millimetres from 0 up, got .*-1.* for aorta"),
        ({"liver": "5", "aorta": 1}, r"expected a number"),
        ([5, 2], r"tolerances"),
    ],
)
def test_files_of_other_tolerances_are_refused(tmp_path, content, message):
    file = tmp_path / "mm.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_tolerance(str(file), ("aorta", "liver"))


@pytest.mark.parametrize("text", ["-1", "inf", "nan", "amos", "mm.csv", ""])
def test_a_tolerance_that_is_no_number_is_refused(text):
    with pytest.raises(
        SettingError, match="--tolerance of the command line: expected millimetres from 0 up, or a file"
    ):
        read_tolerance(text, ("liver",))


# --- the command
def test_evaluate_prints_and_writes_both_tables(tmp_path, capsys):
    """Of phantoms of BraTS whose labels stand in for predictions, with tolerances of a file."""
    data, out = tmp_path / "brats", tmp_path / "out"
    assert cli.main(["phantoms", "brats", str(data), "--scans", "2"]) == 0
    names = json.loads((data / "dataset.json").read_text())["labels"]
    tolerances = tmp_path / "mm.json"
    tolerances.write_text(json.dumps({name: float(value) for value, name in names.items()}))
    capsys.readouterr()
    command = ["evaluate", str(data / "labelsTr"), "--data", str(data), "--tolerance", str(tolerances)]
    assert cli.main([*command, "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "within the tolerance of its class (1, 2, 3 mm)" in text
    assert "As the challenge BraTS scores:" in text
    assert "its distances 373.129 mm" in text
    challenge, scores = (json.loads((out / f"{name}.json").read_text()) for name in ("challenge", "scores"))
    assert scores["tolerances_mm"] == [1.0, 2.0, 3.0]
    assert challenge["classes"] == list(BRATS_REGIONS)
    assert challenge["mean_dice"] == 1.0
    assert challenge["mean_hd95"] == 0.0
    assert challenge["penalty_mm"] == BRATS_PENALTY
    assert (out / "challenge.csv").read_text().startswith("case,class,dice,hd95,label_ml,prediction_ml\n")

"""The two examples as a user runs them: what they print, leave behind, refuse, and survive."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from dstlib.zoo.e2enet.recipe import HELP
from dstlib.zoo.e2enet.training import train as train_module

EXAMPLES = Path(__file__).parents[2] / "examples"
AMOS, HIPPOCAMPUS = EXAMPLES / "e2enet_amos.py", EXAMPLES / "e2enet_hippocampus.py"
TINY = ("--scans", "5", "--epochs", "2", "--iterations", "2", "--interval", "1")
FILES = {"config.json", "metrics.csv", "checkpoint.pt", "result.json", "figures"}
PICTURES = {"learning_curve.png", "flows.png", "slice.png"}


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs a script in this process: its exit code, stdout and stderr."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(script), run_name="__main__")
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def scans(tmp_path):
    """A data set in the Decathlon's layout: seven volumes of two blobs."""
    folder, rng = tmp_path / "Task04_Hippocampus", np.random.default_rng(0)
    training = []
    for i in range(7):
        label = np.zeros((18, 22, 17), np.uint8)
        label[4:9, 5:12, 4:9], label[9:14, 12:18, 8:13] = 1, 2
        image = (40 * label + rng.normal(0, 5, label.shape)).astype(np.float32)
        entry = {}
        for key, part, voxels in (("image", "imagesTr", image), ("label", "labelsTr", label)):
            file = folder / part / f"hippocampus_{i:03d}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), file)
            entry[key] = f"./{part}/{file.name}"
        training.append(entry)
    manifest = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def left_by(run):
    return {file.name for file in run.iterdir() if file.name != ".lock"}


def test_amos_in_a_process_of_its_own_leaves_all_it_promises(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(AMOS), "--run", str(run), *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # several threads per busy core wait for each other
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert left_by(run) == FILES
    assert {file.name for file in (run / "figures").iterdir()} == PICTURES
    result = json.loads((run / "result.json").read_text())
    assert re.search(rf"^mDice +{result['mean_dice']:.3f} +1$", done.stdout, re.MULTILINE)
    assert len(result["class_dice"]) == 15
    assert "sparsity 0.8" in done.stdout
    for kind in ("dense", "sparse"):
        assert f"{result['cost'][kind]['params']:,}" in done.stdout
    assert result["cost"]["sparse"]["flops"]["paper"] > result["cost"]["sparse"]["flops"]["exact"]
    assert (run / "metrics.csv").read_text().count("\n") == 3
    assert "train:" in done.stderr  # the progress bar


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(tmp_path, example, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example(AMOS, "--run", whole, *TINY)[0] == 0

    draw = train_module.draw_batch

    def draw_and_interrupt(*arguments, iteration, **options):
        if iteration == 2:
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments, iteration=iteration, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "draw_batch", draw_and_interrupt)
        code, _, errors = example(AMOS, "--run", parts, *TINY)
    assert code == 130
    assert "Stopped after iteration 3 of 4" in errors
    assert errors.rstrip().endswith(f"--run {parts} {' '.join(TINY)} --resume")
    assert not (parts / "result.json").exists()

    assert example(AMOS, "--run", parts, *TINY, "--resume")[0] == 0
    for name in ("metrics.csv", "result.json", "config.json"):
        assert (whole / name).read_text() == (parts / name).read_text(), name
    saved = [torch.load(run / "checkpoint.pt", weights_only=True)["state"] for run in (whole, parts)]
    for name, weight in saved[0]["model"].items():
        assert torch.equal(weight, saved[1]["model"][name]), name


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path, example, monkeypatch):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "draw_batch", fail)
        assert example(AMOS, "--run", tmp_path / "run", *TINY)[0] == 130
    assert left_by(tmp_path / "run") == {"config.json", "figures"}
    assert example(AMOS, "--run", tmp_path / "run", *TINY, "--resume")[0] == 0


def test_ctrl_c_in_the_last_iteration_is_heard(tmp_path, example, monkeypatch):
    draw = train_module.draw_batch

    def draw_and_interrupt(*arguments, iteration, **options):
        if iteration == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments, iteration=iteration, **options)

    monkeypatch.setattr(train_module, "draw_batch", draw_and_interrupt)
    code, _, errors = example(AMOS, "--run", tmp_path / "run", *TINY)
    assert code == 130
    assert "Stopped after iteration 4 of 4" in errors


def test_hippocampus_takes_the_decathlons_layout_dense_and_sparse(tmp_path, scans, example):
    for name, flags in {"dsff": (), "static": ("--method", "static"), "dense": ("--sparsity", "0")}.items():
        run = tmp_path / name
        code, output, _ = example(
            HIPPOCAMPUS, "--data", scans, "--run", run, "--epochs", 1, "--iterations", 1, "--interval", 1, *flags
        )
        assert code == 0
        assert left_by(run) == FILES
        result = json.loads((run / "result.json").read_text())
        assert list(result["class_dice"]) == ["Anterior", "Posterior"]
        assert set(result["cost"]) == ({"dense"} if name == "dense" else {"dense", "sparse"})
        assert len(result["mask_updates"]) == (name == "dsff")
        assert ("active (density 0.2" in output) == (name != "dense")


def test_method_dense_is_sparsity_zero(tmp_path, example):
    run = tmp_path / "run"
    code, *_ = example(AMOS, "--run", run, "--scans", 5, "--epochs", 1, "--iterations", 1, "--method", "dense")
    assert code == 0
    assert json.loads((run / "config.json").read_text())["training"]["sparsity"] == 0


@pytest.mark.parametrize("script", [AMOS, HIPPOCAMPUS], ids=lambda script: script.stem)
def test_help_names_every_setting_and_its_default(script, example):
    code, output, _ = example(script, "--help")
    assert code == 0
    for name in ("run", "resume", *HELP):
        assert f"--{name.replace('_', '-')}" in output
    assert output.count("(default:") >= len(HELP)
    assert f"python examples/{script.name}" in output


def refused(example, *arguments):
    """The one line on stderr of a script that cannot start."""
    code, _, errors = example(*arguments)
    assert code == 2
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    return errors


def test_data_that_is_not_there_is_one_line(tmp_path, example):
    errors = refused(example, HIPPOCAMPUS, "--data", tmp_path / "missing")
    assert errors.startswith("error: ")
    assert "missing" in errors
    assert "dataset.json" in refused(example, HIPPOCAMPUS, "--data", tmp_path)


def test_settings_that_are_out_of_range_are_one_line(tmp_path, example):
    assert "sparsity" in refused(example, AMOS, "--sparsity", "1.5", "--run", tmp_path / "a")
    assert "pass more names" in refused(example, AMOS, "--scans", "2", "--run", tmp_path / "a")
    assert "interval" in refused(example, AMOS, *TINY, "--interval", "9", "--run", tmp_path / "a")
    assert "device" in refused(example, AMOS, *TINY, "--device", "abacus", "--run", tmp_path / "a")
    assert "--run" in refused(example, AMOS, *TINY, "--resume")
    assert not (tmp_path / "a").exists()


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path, example):
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    (run / "config.json").write_text('{"name": "e2enet_amos"}')
    assert "--resume" in refused(example, AMOS, "--run", run, *TINY)
    assert "training.seed 3" in refused(example, AMOS, "--run", run, *TINY, "--seed", 3, "--resume")
    assert "figures" in left_by(run)
    assert "no-such-run" in refused(example, AMOS, "--run", tmp_path / "no-such-run", *TINY, "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--interval", 5, "--epochs", 1, "--iterations", 2), "Lower --interval"),
        (("--method", "dense", "--sparsity", 0.9), "Leave one of them out"),
        (("--run", ""), "Leave --run out"),
        (("--seed", -1), "seed of TrainSettings"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_cannot_be_used_are_one_line(example, arguments, message):
    assert message in refused(example, AMOS, "--scans", 5, *arguments)

"""The engine's benchmarks run as a stranger would run them, and leave their files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_each

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


HELPFUL = (
    "conv.py",
    "e2enet_inference.py",
    "prediction_memory.py",
    "whole_scan.py",
    "training_step.py",
    "linear.py",
    "linear_training.py",
    "gpu_conv.py",
    "gpu_e2enet.py",
    "gpu_losses.py",
    "soak.py",
    "before_after.py",
    "busy.py",
)


@pytest.fixture(scope="module")
def told():
    return dict(zip(HELPFUL, run_each([[str(BENCHMARKS / name), "--help"] for name in HELPFUL]), strict=True))


@pytest.mark.parametrize("name", HELPFUL)
def test_help_shows_a_command(told, name):
    assert told[name].code == 0
    assert f"python benchmarks/{name}" in told[name].output


def test_a_small_run_writes_what_it_prints(tmp_path):
    options = ["--size", "16", "--levels", "4", "--sparsities", "0.9", "--repeats", "1", "--out", str(tmp_path)]
    assert "832→320, 2×2×2" in run("conv.py", *options)
    assert (tmp_path / "conv.png").is_file()
    assert "832" in json.dumps(json.loads((tmp_path / "conv.json").read_text()))


def test_layers_are_chosen_beside_other_programs(tmp_path):
    printed = run("busy.py", "--sizes", "--programs", "1", "--tries", "1", "--out", str(tmp_path))
    assert "10 (Linear)" in printed
    rows = json.loads((tmp_path / "busy.json").read_text())["results"]
    assert [row["layer"].split()[0] for row in rows] == ["0", "2", "4", "6", "8", "10", "12"]
    assert all(row["gain"] > 0 and row["chosen"] in (0, 1) and len(row["gains_busy"]) == 1 for row in rows)


def test_a_short_soak_says_what_it_saw(tmp_path):
    options = ["--minutes", "0.01", "--seconds", "0", "--within", "100", "--out", str(tmp_path)]
    printed = run("soak.py", *options, "--lives", "set", "--parts", "train", "reload")
    assert "wrong 0" in printed
    assert printed.endswith("memory stays within 100 MB\ncounts exact\n")
    results = json.loads((tmp_path / "soak.json").read_text())["results"]
    assert {row["part"] for row in results if "part" in row} == {"train", "reload"}


@pytest.mark.long
def test_the_memory_of_a_small_prediction_is_measured(tmp_path):
    options = ["--size", "24", "24", "40", "--patch", "16", "--out", str(tmp_path)]
    assert "peak of the process: " in run("prediction_memory.py", *options)
    assert "Stopped after 2 windows." in run("prediction_memory.py", *options, "--stop-after", "2")
    (result,) = json.loads((tmp_path / "prediction_memory.json").read_text())["results"]
    assert result["peak_bytes"] > 1e8  # torch alone takes as much

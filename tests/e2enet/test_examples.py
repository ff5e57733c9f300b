"""The examples as a user runs them: what they print, leave behind, refuse, and survive."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from dstlib.zoo.e2enet import E2ENet
from dstlib.zoo.e2enet import report as report_module
from dstlib.zoo.e2enet import run as run_module
from dstlib.zoo.e2enet.cli import HELP
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.training import loop as loop_module
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.records import config_of

EXAMPLES = Path(__file__).parents[2] / "examples"
AMOS, HIPPOCAMPUS = EXAMPLES / "e2enet_amos.py", EXAMPLES / "e2enet_hippocampus.py"
KINDS = {"amos": AMOS, "btcv": EXAMPLES / "e2enet_btcv.py", "brats": EXAMPLES / "e2enet_brats.py"}
KINDS["hippocampus"] = HIPPOCAMPUS
SHORT = ("--epochs", "2", "--iterations", "2", "--interval", "1")
PATCH = ("--patch-size", 16, 16, 16)
TINY = ("--scans", "5", *SHORT)
FILES = {
    "config.json",
    "metrics.csv",
    "flows.csv",
    "log.jsonl",
    "checkpoint.pt",
    "model.pt",
    "scores.csv",
    "result.json",
}
CHALLENGE = {"challenge.csv", "challenge.json"}  # of sets of BTCV and BraTS, which score in a way of their own
FOLDERS = {"figures", "predictions"}
PICTURES = {"learning_curve.png", "flows.png", "slice.png"}


def exit_code(patch, script, *arguments):
    """Runs a script in this process; its figures, which take longest, are drawn by those in processes of their own."""
    patch.setattr(report_module, "_draw", lambda *_: None)
    patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    return caught.value.code


@pytest.fixture
def example(monkeypatch, capsys, tmp_path):
    """Runs a script in this process, in a folder of its own: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda script, *arguments: (exit_code(monkeypatch, script, *arguments), *capsys.readouterr())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Phantoms of the smallest size, in the layouts of all recipes."""
    folder = tmp_path_factory.mktemp("small")
    shapes = {"amos": (32, 40, 40), "btcv": (32, 40, 40), "brats": (32, 40, 40), "hippocampus": None}
    return {
        kind: write_phantoms(folder / kind, kind, num_scans=5, shape=shape, progress=False)
        for kind, shape in shapes.items()
    }


def demo(folder):
    """Options for a set of phantoms: each is prepared once for all tests, and patches are small."""
    return "--data", folder, "--cache", folder.with_name(f"{folder.name}-cache"), "--preset", "demo", *PATCH


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """A finished run on the smallest CT phantoms, for tests to read and to compare theirs with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert exit_code(patch, AMOS, *demo(small["amos"]), "--run-dir", run, *SHORT) == 0
    return run


def left_by(run):
    return {file.name for file in run.iterdir() if file.name != ".lock"}


def batches_watched(monkeypatch, watch):
    """Calls ``watch(iteration)`` before the training sees a batch."""
    draw = loop_module.batches

    def watched(*arguments, start, **options):
        for iteration, batch in enumerate(draw(*arguments, start=start, **options), start):
            watch(iteration)
            yield batch

    monkeypatch.setattr(loop_module, "batches", watched)


def interrupt_at(iteration):
    return lambda at: signal.raise_signal(signal.SIGINT) if at == iteration else None


def in_a_process(*arguments, timeout=300, **options):
    """A command as a shell runs it; one thread, as several per busy core wait for each other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, **options)


def test_amos_in_a_process_of_its_own_leaves_all_it_promises(tmp_path):
    run = tmp_path / "run"
    done = in_a_process(AMOS, "--run-dir", run, *TINY, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert left_by(run) == FILES | FOLDERS
    assert {file.name for file in (run / "figures").iterdir()} == PICTURES
    result = json.loads((run / "result.json").read_text())
    assert re.search(rf"^mean +{result['mean_dice']:.3f} +{result['mean_nsd']:.3f} .* 1 ", done.stdout, re.MULTILINE)
    assert len(result["class_dice"]) == 15
    assert "sparsity 0.8" in done.stdout
    for kind in ("dense", "sparse"):
        assert f"{result['cost'][kind]['params']:,}" in done.stdout
    assert result["cost"]["sparse"]["flops"]["paper"] > result["cost"]["sparse"]["flops"]["exact"]
    assert (run / "metrics.csv").read_text().count("\n") == 3
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["session", "epoch", "epoch"]
    assert all(event["seconds_per_iteration"] > 0 and event["peak_memory_bytes"] > 0 for event in events[1:])
    assert "train:" in done.stderr  # the progress bar


@pytest.mark.parametrize("kind", KINDS)
def test_each_recipe_takes_its_layout_and_predicts_in_the_geometry_of_the_files(tmp_path, small, example, kind):
    run = tmp_path / "run"
    code, output, errors = example(KINDS[kind], *demo(small[kind]), "--run-dir", run, *SHORT)
    assert code == 0, errors
    assert left_by(run) == FILES | FOLDERS | (CHALLENGE if kind in ("btcv", "brats") else set())
    config, result = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "result"))
    assert config["data"]["modality"] == ("mri" if kind in ("brats", "hippocampus") else "ct")
    assert config["network"]["num_classes"] == len(result["class_dice"]) + 1
    assert config["network"]["in_channels"] == (4 if kind == "brats" else 1)
    (name,) = config["data"]["held_out"]
    prediction = nibabel.load(run / "predictions" / f"{name}.nii.gz")
    label = next(file for file in small[kind].rglob("*.nii.gz") if "label" in str(file) and label_of(file) == name)
    assert prediction.shape == nibabel.load(label).shape
    assert np.array_equal(prediction.affine, nibabel.load(label).affine)
    assert "1 held out" in output


def label_of(file):
    """The case that a label file belongs to; BTCV names its images img0001 and its labels label0001."""
    return file.name.removesuffix(".nii.gz").replace("label", "img")


def test_the_weights_it_leaves_load_in_the_plain_network(whole):
    network = E2ENet(config_of(whole).network)
    network.load_state_dict(torch.load(whole / "model.pt", weights_only=True))
    sparse = [p for name, p in network.named_parameters() if name.startswith("fusion.") and p.ndim == 5]
    active = sum(int(p.flatten(2).any(dim=2).sum()) for p in sparse)
    total = sum(p.shape[0] * p.shape[1] for p in sparse)
    assert abs(active - 0.2 * total) <= len(sparse) / 2  # each weight keeps round(0.2 n) connections


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(tmp_path, small, whole, example, monkeypatch):
    parts, options = tmp_path / "parts", (*demo(small["amos"]), *SHORT)
    with monkeypatch.context() as patch:
        batches_watched(patch, interrupt_at(2))
        code, _, errors = example(AMOS, "--run-dir", parts, *options)
    assert code == 130
    assert "Stopped after iteration 3 of 4" in errors
    assert errors.rstrip().endswith(f"--run-dir {parts} {' '.join(map(str, options))} --resume")
    assert not (parts / "result.json").exists()

    assert example(AMOS, "--run-dir", parts, *options, "--resume")[0] == 0
    assert_same_runs(whole, parts)


def assert_same_runs(one, other):
    """Raises unless two runs came to the same, bit for bit."""
    for name in ("metrics.csv", "result.json", "config.json", "scores.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name
    first, second = (torch.load(run / "model.pt", weights_only=True) for run in (one, other))
    assert list(first) == list(second)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_killed_in_the_second_epoch_it_goes_on_bit_for_bit(tmp_path, small, whole, example, monkeypatch):
    options, killed = (*demo(small["amos"]), *SHORT), tmp_path / "killed"
    with monkeypatch.context() as patch:
        batches_watched(patch, lambda iteration: os.kill(os.getpid(), signal.SIGKILL) if iteration == 3 else None)
        # a fork, as a process of its own would load all that this one has
        child = multiprocessing.get_context("fork").Process(target=example, args=(AMOS, *options, "--run-dir", killed))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert example(AMOS, *options, "--run-dir", killed, "--resume")[0] == 0
    assert_same_runs(whole, killed)


def test_two_processes_train_as_one(tmp_path, small, whole):
    options = (*demo(small["amos"]), *SHORT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = in_a_process(*launcher, AMOS, *options, "--run-dir", tmp_path / "two", check=False)
    assert done.returncode == 0, done.stderr
    assert left_by(tmp_path / "two") == FILES | FOLDERS
    losses = [read_losses(run) for run in (whole, tmp_path / "two")]
    # the same patches, but Dice and gradients are averaged in another order
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_patches_that_two_processes_cannot_share_are_refused(tmp_path, small, example, monkeypatch):
    monkeypatch.setattr(run_module, "process_group", lambda device: nullcontext(Ranks(0, 2)))
    error = refused(example, AMOS, *demo(small["amos"]), *SHORT, "--batch-size", 3, "--run-dir", tmp_path / "b")
    assert "expected a multiple of 2, the number of processes, got 3" in error
    assert not (tmp_path / "b").exists()


def read_losses(run):
    return [float(line.split(",")[3]) for line in (run / "metrics.csv").read_text().splitlines()[1:]]


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path, small, example, monkeypatch):
    def fail(iteration):
        raise KeyboardInterrupt

    options = (*demo(small["amos"]), "--run-dir", tmp_path / "run", *SHORT)
    with monkeypatch.context() as patch:
        batches_watched(patch, fail)
        assert example(AMOS, *options)[0] == 130
    assert left_by(tmp_path / "run") == {"config.json", "figures", "log.jsonl"}
    assert example(AMOS, *options, "--resume")[0] == 0


def test_ctrl_c_in_the_last_iteration_is_heard(tmp_path, small, example, monkeypatch):
    batches_watched(monkeypatch, interrupt_at(3))
    code, _, errors = example(AMOS, *demo(small["amos"]), "--run-dir", tmp_path / "run", *SHORT)
    assert code == 130
    assert "Stopped after iteration 4 of 4" in errors


def test_a_method_changes_what_is_counted_and_shown(tmp_path, small, example):
    for name, flags in {"static": ("--method", "static"), "dense": ("--sparsity", "0")}.items():
        run = tmp_path / name
        code, output, _ = example(
            AMOS,
            *demo(small["amos"]),
            "--run-dir",
            run,
            "--epochs",
            1,
            "--iterations",
            1,
            *flags,
        )
        assert code == 0
        result = json.loads((run / "result.json").read_text())
        assert set(result["cost"]) == ({"dense"} if name == "dense" else {"dense", "sparse"})
        assert result["mask_updates"] == []
        assert ("15 sparse weights:" in output) == (name != "dense")


def test_a_baseline_goes_through_the_same_command(tmp_path, small, example):
    run, short = tmp_path / "run", ("--epochs", 1, "--iterations", 1)
    code, _, errors = example(HIPPOCAMPUS, *demo(small["hippocampus"]), "--model", "nnunet", "--run-dir", run, *short)
    assert code == 0, errors
    result = json.loads((run / "result.json").read_text())
    assert set(result["cost"]) == {"dense"}
    assert result["flows"] == {}


def test_all_folds_at_once_are_judged_by_the_sets_own_validation_cases(tmp_path, small, example):
    folder = tmp_path / "amos"
    shutil.copytree(small["amos"], folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["validation"] = [manifest["training"].pop()]
    (folder / "dataset.json").write_text(json.dumps(manifest))
    flags = (*demo(folder), "--fold", "all", "--epochs", 1, "--iterations", 1, "--interval", 1)
    code, output, errors = example(AMOS, *flags, "--method", "static", "--run-dir", tmp_path / "run")
    assert code == 0, errors
    assert "4 cases to train on, 1 held out" in output
    flags = (*demo(small["hippocampus"]), *flags[len(demo(folder)) :])
    hippocampus = (*flags, "--method", "static", "--run-dir", tmp_path / "none")
    code, output, errors = example(HIPPOCAMPUS, *hippocampus)
    assert code == 0, errors
    assert "nothing is evaluated" in output
    assert (tmp_path / "none" / "model.pt").exists()


def test_fine_tuning_with_the_topology_kept(tmp_path, small, whole, example):
    options = (*demo(small["amos"]), *SHORT)
    first, second = whole, tmp_path / "second"
    code, _, errors = example(AMOS, *options, "--from", first, "--freeze-topology", "--run-dir", second)
    assert code == 0, errors
    third = tmp_path / "third"  # stopped before its first checkpoint, it begins from the first run again
    shutil.copytree(second, third, ignore=lambda folder, names: {*names} - {"config.json"})
    assert example(AMOS, *options, "--from", first, "--freeze-topology", "--run-dir", third, "--resume")[0] == 0
    assert_same_runs(second, third)
    masks = [torch.load(run / "checkpoint.pt", weights_only=True)["state"]["sparsifier"] for run in (first, second)]
    assert masks[1]["frozen"]
    for name, weight in masks[0]["weights"].items():
        assert torch.equal(weight["mask"], masks[1]["weights"][name]["mask"])
    assert json.loads((second / "result.json").read_text())["mask_updates"] == []
    assert "--from with it" in refused(example, AMOS, *options, "--freeze-topology")
    error = refused(example, AMOS, *options, "--from", small["amos"])
    assert "checkpoint.pt" in error
    assert "Delete" not in error


def test_method_dense_is_sparsity_zero(tmp_path, small, example):
    flags = (*demo(small["amos"]), "--epochs", 1, "--iterations", 1, "--method", "dense")
    assert example(AMOS, "--run-dir", tmp_path / "run", *flags)[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["sparsity"] == 0


@pytest.mark.parametrize("script", KINDS.values(), ids=lambda script: script.stem)
def test_help_names_every_setting_and_its_default(script, example):
    code, output, _ = example(script, "--help")
    assert code == 0
    for name in ("run", "resume", *HELP):
        assert f"--{name.replace('_', '-')}" in output
    assert output.count("(default:") >= len(HELP)
    assert f"python examples/{script.name}" in output


def refused(example, *arguments):
    """What stands on stderr, after the progress bars, of a script that cannot start."""
    code, _, errors = example(*arguments)
    assert code == 2, errors
    assert "Traceback" not in errors
    (start,) = [i for i, line in enumerate(errors.splitlines()) if line.startswith("error: ")]
    return "\n".join(errors.splitlines()[start:])


def test_data_that_is_not_there_is_one_line(tmp_path, example):
    assert "missing" in refused(example, HIPPOCAMPUS, "--data", tmp_path / "missing")
    assert "dataset.json" in refused(example, HIPPOCAMPUS, "--data", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", 1.5), "sparsity of TrainSettings"),
        (("--interval", 9), "Lower --interval"),
        (("--device", "abacus"), "device of Execution"),
        (("--fold", "first"), "fold of the command line: expected 0 to 4, or all"),
        (("--fold", 7), "fold"),
        (("--patch-size", 0, 1, 1), "patch_size of PatchSettings"),
        (("--patch-size", 9, 9, 9), "multiples of (8, 8, 8)"),
        (
            ("--model", "cotr", "--patch-size", 8, 16, 16),
            "error: size of input of CoTr: expected more than (8, 16, 16)",
        ),
        (("--model", "nnunet", "--patch-size", 9, 9, 9), "error: size of input of PlainConvUNet: expected D, H, W in"),
        (("--method", "dense", "--sparsity", 0.9), "Leave one of them out"),
        (("--seed", -1), "seed of TrainSettings"),
        (("--run-dir", ""), "Leave --run-dir out"),
        (("--resume",), "--run-dir with it"),
        (("--layout", "nifti"), "layout"),
        (("--tensorboard",), "tensorboard installed"),
        (("--optimizer", "sgd", "--learning-rate", -1), "learning_rate of TrainSettings"),
    ],
    ids=lambda value: str(value),
)
def test_settings_that_cannot_be_used_are_one_line(tmp_path, small, example, monkeypatch, arguments, message):
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)  # no tensorboard
    run = () if {"--run-dir", "--resume"} & set(arguments) else ("--run-dir", tmp_path / "a")
    assert message in refused(example, AMOS, *demo(small["amos"]), *SHORT, *arguments, *run)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nnunett"), "Similar: 'nnunet'"),
        (("--model", "dints"), "architecture of dints: expected the result of a search, got none"),
        (("--model", "dints_search", "--memory-budget", 2), "memory_budget of the search: expected a number in (0, 1]"),
    ],
    ids=lambda value: str(value),
)
def test_a_network_that_cannot_be_built_is_refused_before_any_scan_is_read(tmp_path, example, arguments, message):
    assert message in refused(example, AMOS, "--data", tmp_path / "missing", *SHORT, *arguments)


def test_too_few_phantoms_for_five_folds_are_refused(example):
    assert "Fold 'all'" in refused(example, AMOS, "--scans", "2")


def test_a_run_is_not_overwritten_and_another_programs_is_not_resumed(tmp_path, small, example):
    run, options = tmp_path / "run", (*demo(small["amos"]), *SHORT)
    (run / "figures").mkdir(parents=True)
    (run / "config.json").write_text('{"name": "e2enet_amos"}')
    assert "--resume" in refused(example, AMOS, "--run-dir", run, *options)
    assert "name of config.json of run" in refused(example, AMOS, "--run-dir", run, *options, "--resume")
    assert "figures" in left_by(run)
    assert "no-such-run" in refused(example, AMOS, "--run-dir", tmp_path / "no-such-run", *options, "--resume")

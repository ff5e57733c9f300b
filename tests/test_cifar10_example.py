"""The CIFAR-10 example and its grid: files read or refused, batches that are pure functions, models by formula."""

import doctest
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import dstlib
from dstlib.command_line import run_command
from dstlib.errors import DataError, SettingError, StateError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import cifar10
import cifar10_data as data
import cifar10_models as models
import cifar10_settings as settings_of
import cifar10_training as training

ROOT = Path(__file__).resolve().parents[1]
TINY = settings_of.Settings(epochs=2, batch_size=32, images=96)


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    """The benchmark, whose name is the example's."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("cifar10_grid", ROOT / "benchmarks" / "cifar10.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # by which worker processes find its functions
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images() -> data.Images:
    (train, train_labels), (test, test_labels) = data.drawn(200, seed=0), data.drawn(600, seed=1)
    return data.Images(name="few", train=train, train_labels=train_labels, test=test, test_labels=test_labels)


def npz(path: Path, labels: list[int], /, *, size: int = 32, **changed: np.ndarray) -> Path:
    """An npz of flat grey images: image i of grey level 20·i."""
    image = pytest.importorskip("PIL.Image")
    files = []
    for i in range(len(labels)):
        buffer = io.BytesIO()
        image.new("RGB", (size, size), (20 * i,) * 3).save(buffer, "JPEG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.concatenate(files), "offsets": offsets, "labels": np.array(labels, np.uint8)}
    np.savez(path, **{name: array for name, array in {**arrays, **changed}.items() if array is not None})
    return path


def binary(path: Path, labels: list[int]) -> Path:
    """Image i of red level i, green 100 + i and blue 200 + i."""
    records = [[label, *[i] * 1024, *[100 + i] * 1024, *[200 + i] * 1024] for i, label in enumerate(labels)]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(np.array(records, np.uint8).tobytes())
    return path


# ---- files


def test_jpeg_files_of_an_npz_are_images(tmp_path):
    npz(tmp_path / "cifar10_train.npz", [3, 0, 9])
    npz(tmp_path / "cifar10_test.npz", [1, 2])
    held = data.open_images(tmp_path)
    assert held.name == "CIFAR-10 from JPEG"
    assert held.train.shape == (3, 3, 32, 32)
    assert held.train.dtype == torch.uint8
    assert (held.train_labels.tolist(), held.test_labels.tolist()) == ([3, 0, 9], [1, 2])
    for i in range(3):  # JPEG keeps a flat grey to a level or two
        assert (held.train[i].int() - 20 * i).abs().max() <= 2


@pytest.mark.parametrize("inside", [True, False])
def test_the_official_binary_files_are_images(tmp_path, inside):
    folder = tmp_path / data.BINARY
    for number in range(1, 6):
        binary(folder / f"data_batch_{number}.bin", [number, number - 1])
    binary(folder / "test_batch.bin", [7])
    held = data.open_images(folder if inside else tmp_path)
    assert held.name == "CIFAR-10"
    assert held.train_labels.tolist() == [1, 0, 2, 1, 3, 2, 4, 3, 5, 4]
    assert held.train[1].flatten(1).unique(dim=1).flatten().tolist() == [1, 101, 201]
    assert held.test.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"labels": np.array([0, 10])}, r"label 1 of file .*: expected 0 to 9, got 10"),
        ({"labels": np.array([0, -1])}, r"label 1 of file .*: expected 0 to 9, got -1"),
        ({"labels": np.array([0])}, r"offsets of file .*: expected rising ones.*got 1 labels and 3 offsets"),
        ({"labels": np.array([0.5, 1])}, r"labels of file .*: expected one row of whole numbers, got float64"),
        ({"labels": np.array(["a", None], object)}, r"contents of file .*Object arrays cannot be loaded"),
        ({"labels": None}, r"contents of file .*labels.*damaged"),
        ({"offsets": np.array([0, 500, 400])}, r"offsets of file .*: expected rising ones"),
        ({"offsets": np.array([0, 2**62, 2**62 + 1])}, r"offsets of file .*: expected rising ones"),
        (
            {"jpeg": np.zeros(20, np.uint8), "offsets": np.array([0, 10, 20])},
            r"image 0 of file .*: expected a JPEG file",
        ),
        (
            {"jpeg": np.zeros(20, np.int64), "offsets": np.array([0, 10, 20])},
            r"jpeg of file .*: expected one row of uint8",
        ),
        ({"size": 16}, r"image 0 of file .*: expected 32×32 pixels, got 16×16"),
    ],
)
def test_a_damaged_npz_is_one_clear_error(tmp_path, changed, told):
    path = npz(tmp_path / "cifar10_train.npz", [0, 1], **changed)
    with pytest.raises(DataError, match=told) as caught:
        data.read_npz(path)
    assert "Restore the file" in str(caught.value)


def test_every_cut_of_an_npz_is_refused(tmp_path):
    path = npz(tmp_path / "cifar10_train.npz", [0, 1])
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"contents of file .*damaged or cut short"):
            data.read_npz(path)


@pytest.mark.parametrize("content", [b"no array", bytes(2**26)], ids=["no array", "a bomb"])
def test_a_member_that_is_no_array_or_unpacks_without_end_is_refused(tmp_path, content):
    path = npz(tmp_path / "cifar10_train.npz", [0, 1], offsets=None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("offsets.npy", content)
    with pytest.raises(DataError, match=r"offsets of file .*something else|contents of file .*67,\d+,\d+ bytes"):
        data.read_npz(path)


def test_a_jpeg_that_is_cut_short_is_refused(tmp_path):
    path = npz(tmp_path / "cifar10_train.npz", [0, 1])
    with np.load(path) as held:
        jpeg, offsets = held["jpeg"], held["offsets"]
    npz(path, [0, 1], jpeg=np.delete(jpeg, range(offsets[2] - 40, offsets[2])), offsets=offsets - [0, 0, 40])
    with pytest.raises(DataError, match=r"(?i)image 1 of file .*truncated"):
        data.read_npz(path)


def test_binary_files_that_are_wrong_are_refused(tmp_path):
    path = binary(tmp_path / "data_batch_1.bin", [0, 1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"length of file .*: expected a multiple of 3073 bytes, got 6145"):
        data.open_images(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"length of file"):
        data.open_images(tmp_path)
    binary(path, [0, 200])
    with pytest.raises(DataError, match=r"label 1 of file .*: expected 0 to 9, got 200"):
        data.open_images(tmp_path)
    binary(path, [0, 9])
    with pytest.raises(DataError, match=r"file of file .*data_batch_2.bin: .* No such file"):
        data.open_images(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"images of folder .*nowhere: expected cifar10_train.npz .*no such folder"):
        data.open_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"got neither"):
        data.open_images(tmp_path)
    npz(tmp_path / "cifar10_train.npz", [0])
    with pytest.raises(DataError, match=r"cifar10_test.npz: expected a file, got none"):
        data.open_images(tmp_path)


def test_without_pillow_the_error_says_so(tmp_path, monkeypatch):
    path = npz(tmp_path / "cifar10_train.npz", [0])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SettingError, match=r"expected Pillow, to decode JPEG.*pip install pillow"):
        data.read_npz(path)


@pytest.mark.data
def test_the_real_images_are_read():
    folder = Path(os.environ.get("DSTLIB_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    if not folder.is_dir():
        pytest.skip("CIFAR-10 is not here: no folder cifar10 in $DSTLIB_DATA or ../shared/data")
    pytest.importorskip("PIL")
    images, labels = data.read_npz(folder / "cifar10_test.npz")
    assert images.shape == (10_000, 3, 32, 32)
    assert labels.bincount().tolist() == [1000] * 10
    assert images[0, 0].float().std() > 10  # a picture
    mean = images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor(data.MEAN), atol=0.01)  # of the training images, within a level or two


def test_docstrings_tell_the_truth(grid):
    for module in (data, training, sys.modules["cifar10_table"]):
        outcome = doctest.testmod(module)
        assert (outcome.attempted > 0, outcome.failed) == (True, 0), module.__name__


# ---- batches


def test_procedural_images_are_a_function_of_the_seed(images):
    again = data.drawn(200, seed=0)
    assert torch.equal(again[0], images.train)
    assert torch.equal(again[1], images.train_labels)
    assert not torch.equal(images.test[:200], images.train)
    assert images.train_labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("crop", [0, 2, 4])
def test_augmentation_is_a_pure_function_that_crops_and_flips(images, crop):
    x, before = images.train[:64], images.train[:64].clone()
    out = data.augmented(x, crop=crop, seed=3, step=7)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(out, data.augmented(x, crop=crop, seed=3, step=7))
    assert torch.equal(x, before)
    assert not torch.equal(out, data.augmented(x, crop=crop, seed=3, step=8))
    assert not torch.equal(out, data.augmented(x, crop=crop, seed=4, step=7))
    padded = torch.nn.functional.pad(x, (crop,) * 4)
    flips = 0
    for i in range(len(x)):  # by definition: one of the windows, or its mirror image
        windows = [padded[i, :, r : r + 32, c : c + 32] for r in range(2 * crop + 1) for c in range(2 * crop + 1)]
        straight = any(torch.equal(out[i], window) for window in windows)
        flipped = any(torch.equal(out[i], window.flip(2)) for window in windows)
        assert straight or flipped
        flips += flipped
    assert 16 < flips < 48


def test_normalized_images_have_the_moments_they_should():
    level = torch.tensor(data.MEAN).mul(255).round().to(torch.uint8)
    x = data.normalized(level[None, :, None, None].expand(2, 3, 32, 32))
    assert x.abs().max() < 0.01  # half a level of 255, over a deviation of a quarter
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_batches_leave_no_image_out_and_run_on_over_the_ends():
    drawn = torch.cat([data.batch_indices(10, 4, seed=1, step=step) for step in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert torch.equal(data.batch_indices(10, 4, seed=1, step=2), drawn[8:12])


# ---- models


def wide_params(depth: int, widen: int) -> int:
    """Of a wide residual network, layer by layer: convolutions without bias, norms with two numbers a channel."""
    per_group, width, total = (depth - 4) // 6, 16, 3 * 16 * 9
    for channels in (16 * widen, 32 * widen, 64 * widen):
        for _ in range(per_group):
            total += 2 * width + 9 * width * channels + 2 * channels + 9 * channels**2
            total += width * channels if width != channels else 0
            width = channels
    return total + 2 * width + 10 * width + 10


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("small", sum(9 * i * o + 2 * o for i, o in ((3, 24), (24, 48), (48, 48), (48, 96), (96, 128))) + 1290),
        ("wrn-16-1", wide_params(16, 1)),
        ("wrn-22-2", wide_params(22, 2)),
    ],
)
def test_models_have_the_parameters_of_their_formulas(name, params):
    model = models.MODELS[name](10)
    assert sum(p.numel() for p in model.parameters()) == params
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_published_sizes():
    assert wide_params(16, 1) == 175_066  # "0.2 M" in Zagoruyko & Komodakis 2016
    assert 1.07e6 < wide_params(22, 2) < 1.09e6
    small = dstlib.profile(models.small(10), (1, 3, 32, 32))
    assert small.params == 185_794
    assert 3.2e6 < small.flops / 2 < 3.4e6  # multiply-adds


def test_the_vision_transformer_is_timms_or_says_why_not(monkeypatch):
    pytest.importorskip("timm")
    model = models.vit(10)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 0.9e6
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(SettingError, match=r"--model vit of the run: expected timm installed.*dstlib\[timm\]"):
        models.vit(10)


# ---- schedule and settings


def test_the_published_schedule_is_the_published_one():
    published = settings_of.PRESETS["published"]
    assert training._ends(published, 50_000)[-1] == 97_656
    assert training.method_of(published, 97_656) == replace(dstlib.RIGL, interval=100)
    falls = [s for s in range(1, 97_656) if _rate(published, s) != _rate(published, s - 1)]
    assert falls == [30_000, 60_000, 90_000]


def _rate(settings, step):
    return training.learning_rate(settings, step, 97_656)


def test_the_cosine_rises_to_its_height_and_falls_to_nothing():
    rates = [training.learning_rate(settings_of.Settings(), step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(0.05)
    assert rates.index(max(rates)) in (49, 50)
    assert rates[0] == pytest.approx(0.001)
    assert rates[-1] < 1e-6
    assert rates[:50] == sorted(rates[:50])


def test_short_runs_shorten_all_intervals_alike():
    def interval(method, steps, given=None):
        return training.method_of(settings_of.Settings(method=method, interval=given), steps).interval

    assert [interval(m, 2343) for m in ("set", "rigl", "granet", "srigl", "dsff")] == [39] * 5
    assert interval("static", 2343) is None
    assert [interval(m, 97_656) for m in ("rigl", "dsff")] == [100, 1200]
    assert interval("rigl", 5) == 1
    assert interval("rigl", 2343, 7) == 7
    uniform = training.method_of(settings_of.Settings(method="rigl", distribution="uniform"), 100)
    assert uniform.distribution is dstlib.masking.uniform
    cold, warm = (training.method_of(settings_of.Settings(method=f"rigl-{how}"), 2343) for how in ("cold", "warm"))
    assert cold == replace(dstlib.RIGL, interval=39, grown_state="birth")
    assert warm == replace(dstlib.RIGL, interval=39, grown_warmup=10)
    assert training.method_of(settings_of.Settings(method="dsff"), 100).distribution is dstlib.DSFF.distribution


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"interval": 0},
        {"images": 0},
        {"method": "rigle"},
        {"model": "resnet"},
        {"distribution": "er"},
        {"sparsity": 1.0},
        {"learning_rate": float("nan")},
        {"warmup": 1.0},
        {"crop": 9},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changed):
    with pytest.raises(SettingError, match=rf"{next(iter(changed))} of the run: expected .*See --help"):
        settings_of.Settings(**changed)


# ---- training


@pytest.mark.parametrize("method", ["dense", "rigl", "srigl", "dsff"])
def test_a_run_is_reproducible_and_has_its_density(images, method):
    first, second = (training.train(replace(TINY, method=method), images, show=False) for _ in range(2))
    timed = {"seconds", "cpu_seconds"}
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}
    assert [epoch["step"] for epoch in first["epochs"]] == [3, 6]
    # kernels and rows are whole, so their number is the nearest to a tenth
    assert first["density"] == pytest.approx(1.0 if method == "dense" else 0.1, abs=1e-3)
    assert first["accuracy"] == first["epochs"][-1]["accuracy"]
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_what_cannot_be_trained_says_why(images):
    with pytest.raises(SettingError, match=r"batch_size of the run: expected at most 96, got 128"):
        training.train(replace(TINY, batch_size=128), images, show=False)
    with pytest.raises(SettingError, match=r"loss of epoch 1: expected a finite number, got (nan|inf)"):
        training.train(replace(TINY, method="dense", learning_rate=1e30), images, show=False)


def test_the_test_accuracy_counts_every_image_once(images):
    class Knows(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(self.answers.pop(0), 10).float()

    model = Knows()
    wrong = (images.test_labels + (torch.arange(600) % 4 == 0)) % 10
    model.answers = list(wrong.split(500))
    assert training.accuracy_on(model, images) == 0.75
    assert model.training


# ---- the command


def test_the_example_from_its_command_line(tmp_path, capsys):
    out = tmp_path / "deep" / "run.json"
    cifar10.main(["--images", "128", "--epochs", "1", "--method", "set", "--sparsity", "0.8", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.startswith("procedural stand-in, not CIFAR-10: 10,000 images to train on, 2,000 to test on")
    assert re.search(r"small +set +\d+\.\d\d% +0\.2000 ", printed)
    held = json.loads(out.read_text())
    assert (held["settings"]["method"], held["settings"]["sparsity"], held["num_train"]) == ("set", 0.8, 128)
    assert list(out.parent.iterdir()) == [out]


def test_help_teaches_every_setting(capsys):
    with pytest.raises(SystemExit):
        cifar10.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "quick 0.05, published 0.1, vit 0.001" in text
    assert "wants a GPU" in text
    assert "--seed N of the weights, the batches and the masks (default: 0)" in text


def test_presets_give_way_to_options():
    def chosen(*arguments):
        return cifar10.chosen(cifar10.parser().parse_args(arguments))

    assert chosen() == settings_of.PRESETS["quick"]
    assert chosen("--model", "vit") == settings_of.PRESETS["vit"]
    assert chosen("--preset", "published", "--epochs", "2") == replace(settings_of.PRESETS["published"], epochs=2)
    assert chosen("--crop", "0", "--preset", "published").crop == 0


def test_another_optimizer_brings_its_own_rates_in_the_example_and_the_grid(grid, tmp_path, monkeypatch):
    def chosen(*arguments):
        return cifar10.chosen(cifar10.parser().parse_args(arguments))

    rates = settings_of.CHOSEN
    for optimizer, (rate, decay) in rates.items():
        settings = chosen("--optimizer", optimizer)
        assert (settings.optimizer, settings.learning_rate, settings.weight_decay) == (optimizer, rate, decay)
    assert rates["sgd"] == (settings_of.Settings().learning_rate, settings_of.Settings().weight_decay)
    assert chosen("--preset", "vit", "--optimizer", "adamw") == settings_of.PRESETS["vit"]
    assert chosen("--preset", "published", "--optimizer", "sgd") == settings_of.PRESETS["published"]
    assert chosen("--optimizer", "adamw", "--learning-rate", "0.5").learning_rate == 0.5

    asked = []
    monkeypatch.setattr(grid, "run_grid", lambda todo, folder, *, workers: asked.extend(s for s, _ in todo))
    monkeypatch.setattr(grid, "report", lambda results, options: None)
    grid.main(["--methods", "set", "--sparsities", "0.9", "--optimizer", "adamw", "--results", str(tmp_path)])
    assert {(s.optimizer, s.learning_rate, s.weight_decay) for s in asked} == {("adamw", *rates["adamw"])}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "nowhere"], "error: images of folder nowhere: expected"),
        (["--device", "warp"], "error: --device of the command line: expected a device of this machine, got 'warp'"),
        (["--threads", "0"], "error: --threads of the command line"),
        (["--sparsity", "2"], "error: sparsity of the run: expected a share in [0, 1), got 2.0."),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cifar10.py", *arguments])
    assert run_command(cifar10.main) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(told)
    assert printed.count("\n") == 1


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"output of folder .*file: expected a folder to write to"):
        training.write_result(tmp_path / "file" / "x.json", {})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StateError, match="No space left"):
        training.write_result(tmp_path / "x.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- the grid


def fake(settings, accuracy):
    costs = {"density": 0.1, "flops_share": 0.2, "cpu_seconds": 3.0, "seconds": 4.0}
    about = {"settings": training.asdict(settings), "data": "few", "num_train": 96, "num_test": 600}
    return {**about, **costs, "accuracy": accuracy}


def write_cells(grid, folder, accuracies, base):
    """Finished cells: (method, sparsity, seed) → accuracy."""
    for (method, sparsity, seed), accuracy in accuracies.items():
        cell = grid.Cell(method, sparsity, seed)
        training.write_result(folder / f"{cell.name}.json", fake(cell.settings(base), accuracy))


BASE = replace(settings_of.PRESETS["quick"], distribution="erk")
HELD = {
    **{("dense", 0.0, seed): accuracy for seed, accuracy in enumerate((0.80, 0.82, 0.84))},
    **{("static", 0.9, seed): accuracy for seed, accuracy in enumerate((0.70, 0.74, 0.72))},
    **{("rigl", 0.9, seed): accuracy for seed, accuracy in enumerate((0.71, 0.76, 0.75))},
    ("static", 0.95, 0): 0.6,
    ("rigl", 0.95, 0): 0.65,
    ("rigl", 0.95, 1): 0.9,  # static has no such seed, so no pair
}
ASKED = ("--methods", "dense", "static", "rigl", "--sparsities", "0.9", "0.95")


def test_the_table_worked_by_hand(grid, tmp_path, capsys):
    write_cells(grid, tmp_path, HELD, BASE)
    assert grid.main([*ASKED, "--results", str(tmp_path), "--table"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"15 cells in {tmp_path}: 12 done, 3 to run"
    rows = [line.split("  ") for line in printed[3:9]]
    assert [[cell.strip() for cell in row if cell.strip()][:5] for row in rows] == [
        # mean and deviation / √3; differences by seed: 10, 8, 12 and 1, 2, 3
        ["90%", "dense", "82.00 ± 1.15", "+10.00 ± 1.15", "3"],
        ["90%", "static", "72.00 ± 1.15", "-", "3"],
        ["90%", "rigl", "74.00 ± 1.53", "+2.00 ± 0.58", "3"],
        ["95%", "dense", "82.00 ± 1.15", "+20.00", "3"],
        ["95%", "static", "60.00", "-", "1"],
        ["95%", "rigl", "77.50 ± 12.50", "+5.00", "2"],
    ]
    assert "paired by seed" in printed[9]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def test_the_grid_goes_seed_by_seed_and_runs_what_is_missing_only(grid, tmp_path, monkeypatch, capsys):
    names = [cell.name for cell in grid.cells(["dense", "set", "rigl"], [0.8, 0.9], [0, 1])]
    first = ["dense-0-seed0", "set-0.8-seed0", "set-0.9-seed0", "rigl-0.8-seed0", "rigl-0.9-seed0"]
    assert names == [*first, *(name.replace("seed0", "seed1") for name in first)]
    write_cells(grid, tmp_path, HELD, BASE)
    asked = []

    def run_grid(todo, folder, *, workers):
        asked.extend((path.stem, settings.seed, workers) for settings, path in todo)
        return 0

    monkeypatch.setattr(grid, "run_grid", run_grid)
    grid.main([*ASKED, "--results", str(tmp_path), "--workers", "2"])
    assert asked == [("static-0.95-seed1", 1, 2), ("static-0.95-seed2", 2, 2), ("rigl-0.95-seed2", 2, 2)]


def test_a_cell_is_trained_once(grid, tmp_path, images, monkeypatch):
    monkeypatch.setattr(grid, "_images", lambda folder: images)
    path = tmp_path / "cell.json"
    result = grid.run_cell(TINY, path, None)
    assert json.loads(path.read_text()) == result
    monkeypatch.setattr(grid, "train", None)  # would fail if it were called
    assert grid.run_cell(TINY, path, None) == result


def test_cells_that_are_damaged_or_of_other_settings_are_refused(grid, tmp_path):
    write_cells(grid, tmp_path, HELD, BASE)
    with pytest.raises(StateError, match=r"settings of file .*: expected epochs 9, got \{'epochs': 3\}"):
        grid.main([*ASKED, "--results", str(tmp_path), "--epochs", "9", "--table"])
    (tmp_path / "dense-0-seed0.json").write_text("{")
    with pytest.raises(StateError, match=r"cell of file .*dense-0-seed0.json: expected a result.*Delete it"):
        grid.main([*ASKED, "--results", str(tmp_path), "--table"])
    with pytest.raises(StateError, match=r"expected finished ones, got none"):
        grid.main(["--results", str(tmp_path / "none"), "--table"])
    with pytest.raises(SettingError, match=r"--workers of the command line"):
        grid.main(["--workers", "0"])


def test_a_grid_that_is_stopped_keeps_what_is_whole(grid, tmp_path):
    """In processes of its own: the first cell cannot run and stops no other, then the whole is told to stop."""
    options = ["--methods", "srste", "static", "--sparsities", "0.8", "--images", "64", "--epochs", "1"]
    options += ["--seeds", *map(str, range(300)), "--results", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "cifar10.py"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        patience = time.monotonic() + 120
        while not any(tmp_path.glob("static-*.json")) and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err.strip() == "Stopped; finished cells are kept. Give the same command again to go on."
    assert "srste-0.8-seed0: failed: " in out
    done = sorted(tmp_path.iterdir())
    assert 0 < len(done) < 300
    for path in done:
        assert 0 <= json.loads(path.read_text())["accuracy"] <= 1

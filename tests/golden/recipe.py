"""A run of the E2ENet recipe on scans of a few thousand voxels: stopped, resumed, and predicting."""

import contextlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from dstlib.zoo.e2enet.cli import main, read_config
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.run import run_recipe
from golden.files import HERE, checksum, write

SETTINGS = ("--epochs", "3", "--iterations", "3", "--interval", "2", "--patch-size", "16", "16", "16")
STOPPED_AFTER = 4  # in an epoch, at an update


def train(run: Path, data: Path, *more: str) -> None:
    """Runs a recipe with a network that fits into a few kilobytes."""
    places = ("--data", str(data), "--cache", str(data.with_name("cache")), "--run-dir", str(run), "--device", "cpu")
    config = read_config(HIPPOCAMPUS_RECIPE, ["--preset", "demo", *places, *SETTINGS, *more])
    network = replace(config.preset.network, channels=(4, 6, 8), strides=((2, 2, 2),) * 2, heads=2)
    run_recipe(replace(config, preset=replace(config.preset, network=network)))


def predict(run: Path, data: Path, output: Path) -> str:
    """The checksum of the labels that a finished run predicts."""
    images = str(data / "imagesTs")
    assert (
        main(["predict", str(run), "--images", images, "--output", str(output), "--device", "cpu", "--no-engine"]) == 0
    )
    labels = [np.asarray(nibabel.load(file).dataobj) for file in sorted(output.glob("*.nii.gz"))]
    return checksum(map(torch.from_numpy, labels))


def came_to(run: Path) -> dict[str, str]:
    """Checksums of the masks and the weights that a finished run has left."""
    weights = torch.load(run / "model.pt", weights_only=True)
    masks = [weight != 0 for name, weight in weights.items() if name.startswith("fusion.") and weight.ndim > 1]
    return {"masks": checksum(masks), "weights": checksum(weights.values())}


def write_scans(folder: Path) -> Path:
    """Draws scans in the layout of the Decathlon: two boxes in noise, in whole numbers, the same everywhere."""
    names = [f"scan_{i}.nii.gz" for i in range(6)]
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        image, label = torch.randint(1, 100, (22, 20, 24), generator=generator), torch.zeros(22, 20, 24)
        for number in (1, 2):
            x, y, z = torch.randint(1, 10, (3,), generator=generator)
            label[x : x + 8, y : y + 7, z : z + 9] = number
        _save(folder / ("imagesTs" if i == 5 else "imagesTr") / name, image + 100 * label)
        if i < 5:
            _save(folder / "labelsTr" / name, label)
    description = {
        "name": "Boxes",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "first", "2": "second"},
        "training": [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in names[:5]],
        "test": [f"imagesTs/{names[5]}"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def _save(file: Path, voxels: Tensor) -> None:
    nibabel.Nifti1Image(voxels.numpy(), np.eye(4)).to_filename(file)


def machine() -> dict[str, str]:
    """What decides how torch rounds: its version, its code path, and the processor."""
    processor, cpuinfo = {}, Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        processor[name.strip()] = value.strip()
    names = ("vendor_id", "cpu family", "model", "cache size")
    return {
        "torch": torch.__version__,
        "code": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(f"{name} {processor.get(name)}" for name in names),
    }


def write_recipe() -> None:
    """checkpoint/, trained/ and recipe.json."""
    with TemporaryDirectory() as folder:
        data, run = write_scans(Path(folder) / "data"), Path(folder) / "run"
        with contextlib.suppress(KeyboardInterrupt), _stopping():
            train(run, data)
        _keep(run, "checkpoint", "config.json", "checkpoint.pt", "metrics.csv")
        train(run, data, "--resume")
        _keep(run, "trained", "config.json", "model.pt", "result.json")
        write("recipe.json", {"machine": machine(), **came_to(run), "labels": predict(run, data, run / "labels")})


@contextlib.contextmanager
def _stopping() -> Any:
    """Presses Ctrl-C after some steps."""
    left = [None] * STOPPED_AFTER

    def count(*_: Any) -> None:
        left.pop()
        if not left:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _keep(run: Path, name: str, *files: str) -> None:
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    for file in files:
        shutil.copy(run / file, HERE / name / file)

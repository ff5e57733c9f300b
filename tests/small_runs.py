"""The smallest data set and the smallest run of it, made in a second: what files are mutated in, and runs killed."""

import contextlib
import json
import os
from pathlib import Path

import nibabel
import numpy as np

from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.dataset import DataSettings
from dstlib.zoo.e2enet.recipes import Preset
from dstlib.zoo.e2enet.run import RunConfig, run_recipe
from dstlib.zoo.e2enet.training.settings import TrainSettings

PRESET = Preset(
    network=E2ENetConfig(channels=(3, 6, 6), strides=((2, 2, 2),) * 2, heads=1),
    patches=PatchSettings(patch_size=(8, 8, 8), oversample=1.0, augment=None, mirror=()),
    training=TrainSettings(
        epochs=2, iterations=2, interval=1, optimizer="adamw", learning_rate=0.03, val_iterations=1, seed=3
    ),
)
CLASSES = ("Anterior", "Posterior")


def write_set(folder: Path, *, num_scans: int = 5) -> Path:
    """Writes labelled scans of some voxels, and an image to predict, in the layout of the Decathlon."""
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    names = [f"scan_{number}" for number in range(num_scans)]
    for number, name in enumerate([*names, "test"]):
        rng = np.random.default_rng(number)
        label = np.zeros((9, 9, 9), np.uint8)
        label[2:5, 2:6, 2:6], label[5:8, 3:7, 2:6] = 1, 2
        image = (rng.normal(100, 5, label.shape) + 40 * label).astype(np.float32)
        write_nifti(folder / ("imagesTs" if name == "test" else "imagesTr") / f"{name}.nii.gz", image)
        if name != "test":
            write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label)
    (folder / "dataset.json").write_text(json.dumps(description(names)))
    return folder


def write_nifti(file: Path, voxels: np.ndarray) -> None:
    """Writes voxels (x, y, z) of 1 × 1 × 2 mm; the same bytes each time."""
    nibabel.Nifti1Image(voxels, np.diag([-1.0, 1.0, 2.0, 1.0])).to_filename(file)


def description(names: list[str]) -> dict[str, object]:
    """Returns what dataset.json says of labelled scans of these names, and of the image to predict."""
    return {
        "name": "Small",
        "modality": {"0": "MRI"},
        "labels": {str(number): name for number, name in enumerate(("background", *CLASSES))},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/test.nii.gz"],
    }


def config(data: Path, run: Path, *, cache: Path | None = None, resume: bool = False) -> RunConfig:
    """Returns what is asked of the run; prepared scans lie beside it unless a ``cache`` is passed."""
    cache = run.parent / "cache" if cache is None else cache
    settings = DataSettings(phantoms=("hippocampus", 5), modality="mri", folder=data, cache=cache)
    return RunConfig(recipe="small", preset=PRESET, data=settings, folder=run, resume=resume)


def train(asked: RunConfig) -> None:
    """Trains, predicts and reports, without a word."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run_recipe(asked)

"""The trainers in an installed nnU-Net v2, through its own commands, on eight real scans: minutes on a CPU.

Needs the packages of constraints-nnunet.txt; docs/nnunet.md says how to install them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dstlib.integrations.nnunet_checkpoint import KEY, read_checkpoint
from dstlib.integrations.nnunet_cli import SHIM

pytestmark = [
    pytest.mark.long,
    pytest.mark.data,
    pytest.mark.skipif(
        importlib.util.find_spec("nnunetv2") is None,
        reason="nnU-Net is not installed: see docs/nnunet.md, and constraints-nnunet.txt for the versions",
    ),
]

CONFIGURATION = "nnUNetPlans__3d_fullres"
SHORT = """
from dstlib.integrations.nnunet import nnUNetTrainerDST, nnUNetTrainerE2ENetDST

class Short:
    interval, epochs = 2, 2

    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 4, 1, 1

class nnUNetTrainerDSTShort(Short, nnUNetTrainerDST):
    pass

class nnUNetTrainerE2ENetDSTShort(Short, nnUNetTrainerE2ENetDST):
    pass
"""
# torchvision's binary may not match the torch build (see conftest.py); nnU-Net imports it by way of timm
DECLARE = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


class Workplace:
    """nnU-Net's three folders below one, and its commands run there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.preprocessed, self.results = (root / name for name in ("raw", "preprocessed", "results"))
        for folder in (self.raw, self.preprocessed, self.results, root / "trainers", root / "site"):
            folder.mkdir()
        (root / "trainers" / "short.py").write_text(SHORT)
        if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
            (root / "site" / "sitecustomize.py").write_text(DECLARE)
        self.environment = {
            **os.environ,
            **{f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_extTrainer": f"{root / 'trainers'}{os.pathsep}{SHIM}",
            "nnUNet_def_n_proc": "1",
            "nnUNet_n_proc_DA": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(root / "site"),
        }

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        program, *arguments = command.split()
        return subprocess.Popen(
            [Path(sys.executable).with_name(program), *arguments],
            cwd=self.root,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, **environment: str) -> str:
        process = self.start(command, **environment)
        told, _ = process.communicate(timeout=1800)
        assert process.returncode == 0, told[-4000:]
        return told

    def train(self, trainer: str, *flags: str) -> str:
        return self.run(
            f"nnUNetv2_train 4 3d_fullres 0 -tr {trainer} -device cpu {' '.join(flags)}", nnUNet_n_proc_DA="0"
        )

    def predict(self, trainer: str) -> np.ndarray:
        out = self.root / f"predicted_{trainer}"
        images = self.raw / "Dataset004_Hippocampus" / "imagesTs"
        self.run(
            f"nnUNetv2_predict -i {images} -o {out} -d 4 -c 3d_fullres -f 0 -tr {trainer} -device cpu -npp 1 -nps 1 "
            "--disable_tta"
        )
        import nibabel

        (file,) = out.glob("*.nii.gz")
        return np.asarray(nibabel.load(file).dataobj)

    def fold(self, trainer: str) -> Path:
        return self.results / "Dataset004_Hippocampus" / f"{trainer}__{CONFIGURATION}" / "fold_0"


def write_raw(scans: Path, folder: Path, *, num_cases: int) -> None:
    """Some cases of the Decathlon's hippocampus task in nnU-Net's raw layout; the first one to predict, too."""
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    names = sorted(file.name.removesuffix(".nii.gz") for file in (scans / "labelsTr").glob("hippocampus_*.nii.gz"))
    for name in names[:num_cases]:
        shutil.copy(scans / "imagesTr" / f"{name}.nii.gz", folder / "imagesTr" / f"{name}_0000.nii.gz")
        shutil.copy(scans / "labelsTr" / f"{name}.nii.gz", folder / "labelsTr")
    shutil.copy(folder / "imagesTr" / f"{names[0]}_0000.nii.gz", folder / "imagesTs")
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, hippocampus):
    """Eight cases, planned and preprocessed; then the plan made small enough for a CPU."""
    place = Workplace(tmp_path_factory.mktemp("nnunet"))
    write_raw(hippocampus, place.raw / "Dataset004_Hippocampus", num_cases=8)
    place.run("nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -np 1 -npfp 1")
    file = place.preprocessed / "Dataset004_Hippocampus" / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["architecture"]["arch_kwargs"]["n_stages"] == 4
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 16, 16]
    configuration["patch_size"] = [24, 32, 24]
    file.write_text(json.dumps(plans))
    return place


def assert_exactly_sparse(file: Path, *, step: int) -> None:
    """Every sparse weight of a checkpoint has the kernels that 0.8 asks for, and zeros elsewhere."""
    checkpoint = read_checkpoint(file)
    saved = checkpoint[KEY]["sparsifier"]["weights"]
    assert len(saved) > 10
    for name, weight in saved.items():
        kernels = weight["mask"].flatten(2)
        assert torch.equal(kernels.any(2), kernels.all(2)), name
        assert int(kernels.any(2).sum()) == round(0.2 * kernels.shape[0] * kernels.shape[1]), name
        assert not checkpoint["network_weights"][name][~weight["mask"]].any(), name
        assert weight["step"] == step


def kill_after_the_first_epoch(place: Workplace, trainer: str) -> None:
    latest = place.fold(trainer) / "checkpoint_latest.pth"
    process = place.start(f"nnUNetv2_train 4 3d_fullres 0 -tr {trainer} -device cpu", nnUNet_n_proc_DA="0")
    started = time.monotonic()
    while not latest.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() - started < 900
        time.sleep(0.05)
    process.kill()
    process.communicate()


def test_a_sparse_unet_is_killed_continued_validated_predicts_and_is_exported(workplace):
    trainer = "nnUNetTrainerDSTShort"
    kill_after_the_first_epoch(workplace, trainer)
    fold = workplace.fold(trainer)
    assert not (fold / "checkpoint_final.pth").exists()
    assert_exactly_sparse(fold / "checkpoint_latest.pth", step=4)

    told = workplace.train(trainer, "--c")
    assert "Epoch 1" in told
    assert "Epoch 0" not in told
    assert "dstlib: step 8, density 0.199411, 0 entries outside the masks, 2 mask updates" in told  # of narrow layers
    assert_exactly_sparse(fold / "checkpoint_final.pth", step=8)
    assert json.loads((fold / "dstlib_summary.json").read_text())["steps"] == 8

    assert "Mean Validation Dice" in workplace.train(trainer, "--val")
    stock = workplace.fold("nnUNetTrainer")
    shutil.copytree(fold.parent, stock.parent, ignore=shutil.ignore_patterns("fold_*"))
    workplace.run(f"dstlib-nnunet export {fold / 'checkpoint_final.pth'} {stock / 'checkpoint_final.pth'}")
    sparse, exported = workplace.predict(trainer), workplace.predict("nnUNetTrainer")
    assert np.array_equal(sparse, exported)
    assert sparse.shape == (35, 51, 35)


def test_a_sparse_e2enet_trains_predicts_and_is_not_exported(workplace):
    trainer = "nnUNetTrainerE2ENetDSTShort"
    told = workplace.train(trainer)
    assert "Mean Validation Dice" in told
    assert "encoder.0.0.conv.weight" in told
    file = workplace.fold(trainer) / "checkpoint_final.pth"
    assert_exactly_sparse(file, step=8)
    assert all(name.startswith("fusion.") for name in read_checkpoint(file)[KEY]["sparsifier"]["weights"])
    assert set(np.unique(workplace.predict(trainer))) <= {0, 1, 2}
    process = workplace.start(f"dstlib-nnunet export {file} {workplace.root / 'stock.pth'}")
    assert "got an E2ENet" in process.communicate()[0]
    assert process.returncode == 1


def test_nnunet_finds_every_trainer_by_name(workplace):
    told = workplace.run("dstlib-nnunet check nnUNetTrainerDST nnUNetTrainerE2ENet nnUNetTrainerE2ENetDST_90_static")
    assert told.count("found in dstlib.integrations.nnunet") == 3

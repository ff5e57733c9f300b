"""Whatever a data set calls its cases, classes and itself: all commands refuse it, or write below their own folders."""

import json
import os
from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from strategies import examples
from torch import nn

from dstlib.errors import DstlibError
from dstlib.zoo.e2enet.__main__ import main
from dstlib.zoo.e2enet.cli import read_config
from dstlib.zoo.e2enet.data.layouts.detect import LAYOUTS, folder_cases, read_manifest
from dstlib.zoo.e2enet.data.preprocessing.normalization import ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.dataset import DataSettings, open_dataset
from dstlib.zoo.e2enet.inference.predict import Trained, predict_scans
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.run import run_recipe
from dstlib.zoo.e2enet.training.ranks import Ranks

AROUND = "AROUND"  # stands for the folder of an example, in which all of it lies
MINE = ("cwd/runs", "out", "scores")  # what the commands may write to
PARTS = ["..", "/", "\\", ":", ".", " ", "$HOME", "NUL", "=1", "\0", "\n", "\x1b[2J", "\udcff", f"{AROUND}/victim"]
NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["a", "B", "é", "日本", "$x_{$", "_a", "a" * 200, "../../victim", f"{AROUND}/victim"]),
    st.lists(st.sampled_from(PARTS), max_size=3).map("".join),
)
SCAN = np.zeros((8, 8, 8), np.uint8)
SCAN[2:6, 2:6, 2:6] = 1
SHORT = ("--preset", "demo", "--epochs", "1", "--iterations", "1", "--val-iterations", "0", "--batch-size", "1")
SHORT += ("--interval", "1", "--patch-size", "16", "16", "16", "--fold", "all", "--modality", "mri")


class Threshold(nn.Module):
    """A network of one class."""

    deep_supervision = False

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return torch.cat([-x, x], 1) * self.scale


TRAINED = Trained(
    models=(Threshold(),),
    preparation=Preparation(spacing=None, normalization=(ZScoreNormalization(),), crop=True),
    patch_size=(8, 8, 8),
    mirror=(),
    channels=("MRI",),
    classes=("a",),
)


def put(around, *files):
    """Writes scans where these paths lead, if that is in the folder around, and a file can be called so."""
    for file in files:
        with suppress(OSError, ValueError):
            inside = Path(os.path.normpath(file)).is_relative_to(around)
            if inside and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(nibabel.Nifti1Image(SCAN, np.eye(4)).to_bytes())


def listed(around, data, cases, classes, name, *, layout):
    """The Decathlon's layout, or that of AMOS22: names are parts of paths in a list."""
    files = [(f"imagesTr/{case}.nii", f"labelsTr/{case}.nii") for case in cases]
    put(around, *(data / file for pair in files for file in pair))
    entries = [{"image": image, "label": label} for image, label in files]
    labels = {str(i): label for i, label in enumerate(("background", *classes))}
    content = {"name": name, "modality": {"0": "MRI"}, "labels": labels, "training": entries}
    return content | ({"validation": entries[:1], "training": entries[1:]} if layout == "amos" else {})


def nnunet(around, data, cases, classes, name):
    put(around, *(data / f"{part}/{i}.nii" for part in ("imagesTr", "labelsTr") for i in range(len(cases))))
    table = {case: {"images": [f"imagesTr/{i}.nii"], "label": f"labelsTr/{i}.nii"} for i, case in enumerate(cases)}
    labels = {"background": 0, **{label: i for i, label in enumerate(classes, start=1)}}
    return {"name": name, "channel_names": {"0": "MRI"}, "labels": labels, "dataset": table, "file_ending": ".nii"}


def write_set(around, layout, cases, classes, name):
    data = around / "data"
    cases, classes = ([each.replace(AROUND, str(around)) for each in names] for names in (cases, classes))
    name = name.replace(AROUND, str(around))
    if layout == "btcv":
        training = data / "RawData" / "Training"
        put(around, *(training / file for case in cases for file in (f"img/img{case}.nii", f"label/label{case}.nii")))
        return data
    data.mkdir(parents=True)
    if layout == "nnunet":
        content = nnunet(around, data, cases, classes, name)
    else:
        content = listed(around, data, cases, classes, name, layout=layout)
    (data / "dataset.json").write_text(json.dumps(content))
    return data


def others(around):
    """All that lies around, but below the folders of the commands: each file with its time and size."""
    found = {}
    for file in around.rglob("*"):
        if not any(file.is_relative_to(around / mine) for mine in MINE):
            status = file.stat()
            found[file] = None if file.is_dir() else (status.st_mtime_ns, status.st_size)
    return found


def prepare(around, data):
    modality = "ct" if (data / "RawData").exists() else "mri"
    settings = DataSettings(folder=data, phantoms=("hippocampus", 5), modality=modality, fold="all")
    open_dataset(settings, workers=0, ranks=Ranks())


def predict(around, data):
    manifest = read_manifest(data)
    assert all(file.resolve().is_relative_to(data) for case in manifest.cases for file in (*case.images, case.label))
    predict_scans(TRAINED, manifest.cases, around / "out", progress=False)
    folder_cases(data / "imagesTr", num_channels=1)


def commands(around, data):
    yield lambda: main(["check", str(data)])
    yield lambda: prepare(around, data)
    yield lambda: predict(around, data)
    yield lambda: main(["evaluate", str(around / "out"), "--data", str(data), "--output", str(around / "scores")])


def assert_all_stays(around, data, todo):
    """Runs the commands, of which each is done or refuses in words, and compares what lies around."""
    (around / "cwd").mkdir()
    (around / "victim").write_text("precious")
    before = others(around)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(around / "cwd")
        for command in todo(around, data):
            with suppress(DstlibError):
                command()
    after = others(around)
    assert {file: state for file, state in after.items() if before.get(file, "new") != state and state} == {}
    assert before.keys() <= after.keys()


@st.composite
def sets(draw):
    """Layouts, and sets of usual names with an odd one, or more, among them."""
    layout, odd = draw(st.sampled_from(sorted(LAYOUTS))), draw(st.sets(st.sampled_from(range(4)), min_size=1))
    usual = ("0600", "0601", "b", "toy")
    first, second, label, name = (draw(NAMES) if i in odd else each for i, each in enumerate(usual))
    return layout, (first, second), (label,), name


@examples(20, 50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(each=sets())
@example(each=("decathlon", ("../../other", "a"), ("b",), "toy"))
@example(each=("nnunet", ("../../other", "a"), ("b",), "toy"))
@example(each=("amos", ("a_0600", "b_0601"), ("b",), "../../toy"))
@example(each=("decathlon", ("a", "b"), ("\x1b[2J",), "toy"))
def test_all_that_a_set_makes_dstlib_write_lies_below_its_own_folders(tmp_path_factory, capsys, each):
    around = tmp_path_factory.mktemp("around")
    assert_all_stays(around, write_set(around, *each), commands)
    told = capsys.readouterr()
    assert all(c.isprintable() or c in "\n\r" for c in told.out + told.err)


def train(around, data):
    lines = ["--data", str(data), *SHORT, "--run-dir", str(around / "out" / "run")]
    yield lambda: run_recipe(read_config(HIPPOCAMPUS_RECIPE, lines))


@pytest.mark.long
@examples(15, 30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(each=sets())
@example(each=("decathlon", ("a", "b"), ("$x_{$",), "toy"))
def test_so_does_a_training(tmp_path_factory, each):
    around = tmp_path_factory.mktemp("around")
    assert_all_stays(around, write_set(around, *each), train)


@pytest.mark.parametrize("layout", ["amos", "btcv"])
def test_sets_of_usual_names_go_through_every_command(tmp_path, layout):
    """Else the property would hold of refusals alone."""
    names = ("amos_0600", "amos_0601") if layout == "amos" else ("0001", "0002")
    data = write_set(tmp_path, layout, names, ("a",), "toy")
    assert_all_stays(tmp_path, data, commands)
    assert {file.suffix for file in (tmp_path / "cwd" / "runs" / "prepared").rglob("*.*")} >= {".json", ".npy"}
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2
    assert (tmp_path / "scores" / "scores.csv").is_file()

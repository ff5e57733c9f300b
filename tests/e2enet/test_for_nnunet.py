"""What check says of sets that nnU-Net stops at: each fault by itself, as nnU-Net 2.8.1 was seen to take it."""

import json
import multiprocessing
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pytest
from small_runs import write_set

from dstlib.errors import StateError
from dstlib.zoo.e2enet.cli import main
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest

pytest.importorskip("SimpleITK")
from dstlib.zoo.e2enet.data.scans import for_nnunet
from dstlib.zoo.e2enet.data.scans.for_nnunet import STOPS, WARNS, nnunet_warnings

SHAPE = (9, 10, 11)
LABELS = {"background": 0, "a": 1, "b": 2}
TURN = np.array([[np.cos(1e-3), -np.sin(1e-3), 0], [np.sin(1e-3), np.cos(1e-3), 0], [0, 0, 1]])


class File(NamedTuple):
    """A file of the second case, otherwise than those of the others."""

    voxels: Any = None  # a function of the usual ones
    spacing: tuple[float, float, float] = (1.0, 1.0, 2.0)
    origin: tuple[float, float, float] = (10.0, 20.0, -30.0)
    turn: Any = None
    sheared: bool = False


def write(file, voxels, how):
    """Writes voxels; a sheared sform without a qform is none that ITK takes."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if how.turn is None else how.turn) @ np.diag(how.spacing)
    affine[:3, 3] = how.origin
    affine[0, 1] += 0.2 * how.sheared
    image = nibabel.Nifti1Image(voxels if how.voxels is None else how.voxels(voxels), affine)
    image.set_sform(affine, 1)
    image.set_qform(np.eye(4) if how.sheared else affine, 0 if how.sheared else 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(file)


def make(folder, *, entries=None, without=(), channels=1, cases=5, odd=1, ending=".nii.gz", **files):
    """Writes a raw data set whose case ``odd`` has ``files`` otherwise: image_0, image_1, label."""
    for case in range(cases):
        rng = np.random.default_rng(case)
        label = np.zeros(SHAPE, np.uint8)
        label[2:5, 2:6, 2:6], label[5:8, 3:7, 2:6] = 1, 2
        for channel in range(channels):
            image = (rng.normal(100, 5, SHAPE) + 40 * label).astype(np.float32)
            how = files.get(f"image_{channel}", File()) if case == odd else File()
            write(folder / f"imagesTr/s{case}_{channel:04d}{ending}", image, how)
        write(folder / f"labelsTr/s{case}{ending}", label, files.get("label", File()) if case == odd else File())
    names = {str(i): name for i, name in enumerate(("MRI", "T2")[:channels])}
    content = {"channel_names": names, "labels": LABELS, "numTraining": cases, "file_ending": ending}
    content = {key: value for key, value in (content | (entries or {})).items() if key not in without}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


FAULTS = {
    "spacing of a channel": (
        {"channels": 2, "image_1": File(spacing=(1.00002, 1, 2))},
        f"{STOPS}: the spacings of s1_0001.nii.gz and its first channel differ by a share of 2e-05, of which 1e-05 is",
    ),
    "origin of a channel": (
        {"channels": 2, "image_1": File(origin=(10.01, 20, -30))},
        f"{WARNS} with a warning: the places of s1_0001.nii.gz and its first channel differ by 0.01 mm",
    ),
    "direction of a channel": (
        {"channels": 2, "image_1": File(turn=TURN)},
        f"{WARNS} with a warning: the directions of s1_0001.nii.gz and its first channel differ by 0.001",
    ),
    "shape of a channel": (
        {"channels": 2, "image_1": File(voxels=lambda v: v[:-1])},
        f"{STOPS}: s1_0001.nii.gz and its first channel have shapes (9, 10, 11) and (8, 10, 11)",
    ),
    "spacing of a label": (
        {"label": File(spacing=(1.00003, 1, 2))},
        f"{STOPS} where it verifies the set: the spacings of s1.nii.gz and its image differ by a share of 3e-05",
    ),
    "origin of a label": (
        {"label": File(origin=(10.01, 20, -30))},
        f"{WARNS} with a warning: the places of s1.nii.gz and its image differ by 0.01 mm",
    ),
    "shape of a label": (
        {"label": File(voxels=lambda v: v[:-1])},
        f"{STOPS}: s1.nii.gz and its image have shapes (8, 10, 11) and (9, 10, 11)",
    ),
    "axes at no right angles": (
        {"image_0": File(sheared=True), "label": File(sheared=True)},
        f"{STOPS}: it cannot open s1",
    ),
    "axes at no right angles, in the first image": (
        {"image_0": File(sheared=True), "label": File(sheared=True), "odd": 0},
        f"{WARNS} with all files read by nibabel, as ITK cannot open the first (s0_0000.nii.gz)",
    ),
    "channels in one file": (
        {"channels": 1, "image_0": File(voxels=lambda v: np.stack([v, v], -1))},
        f"{STOPS}: s1_0000.nii.gz has channels in one file: give each a file of its own",
    ),
    "a value to ignore as text": (
        {"entries": {"labels": LABELS | {"ignore": "3"}}},
        f"{STOPS}: 'ignore' is the text '3', but must be a number",
    ),
    "a background in a list": (
        {"entries": {"labels": LABELS | {"background": [0]}}},
        f"{STOPS}: the 'background' of 'labels' is [0], not 0",
    ),
    "labels of no name": (
        {"entries": {"labels": {"air": 0, "a": 1, "b": 2}}},
        f"{STOPS}: 'labels' has no 'background', by this name",
    ),
    "a value of no meaning": (
        {"label": File(voxels=lambda v: np.where(v == 2, 3, v).astype(np.uint8))},
        f"{STOPS} where it verifies the set: the label has values 3, of which dataset.json knows nothing",
    ),
    "a value that is nearly whole": (
        {"label": File(voxels=lambda v: v * np.float32(0.9999999))},
        "the label has values 0.999999881, 1.99999976, of which dataset.json knows nothing; unverified it cuts",
    ),
    "no number of cases": ({"without": ["numTraining"]}, f"{STOPS}: dataset.json lacks 'numTraining'"),
    "no ending": ({"without": ["file_ending"]}, f"{STOPS}: dataset.json lacks 'file_ending'"),
    "few cases": ({"cases": 3}, f"{STOPS} in a training of a fold: 3 cases make no 5 folds (-f all)"),
    "no foreground": (
        {"odd": range(5)},
        f"{STOPS}: no label has any foreground",
    ),
}
SOUND = {
    "of one channel": {},
    "of two channels": {"channels": 2},
    "of two channels but for rounding": {"channels": 2, "image_1": File(spacing=(1.000005, 1, 2))},
    "with labels in floats": {"label": File(voxels=lambda v: v.astype(np.float32))},
    "with values as text": {"entries": {"labels": {"background": "0", "a": "1", "b": "2"}}},
    "with a value to ignore": {"entries": {"labels": LABELS | {"ignore": 3}}},
    "of another ending": {"ending": ".nii"},
    "with a last axis of one": {"image_0": File(voxels=lambda v: v[..., None])},
    "with a label without foreground": {"label": File(voxels=lambda v: v * 0)},
}


def faulty(tmp_path, how):
    """Writes a set; where ``odd`` names several cases, their labels are empty."""
    folder, odd = tmp_path / "Dataset001_Toy", how.get("odd", 1)
    if isinstance(odd, int):
        return make(folder, **how)
    make(folder)
    for case in odd:
        write(folder / f"labelsTr/s{case}.nii.gz", np.zeros(SHAPE, np.uint8), File())
    return folder


def warnings(folder):
    return nnunet_warnings(read_manifest(folder), progress=False)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_and_nothing_else(name, tmp_path):
    how, told = FAULTS[name]
    found = warnings(faulty(tmp_path, how))
    assert {told in text for _, text in found} == {True}, found


@pytest.mark.parametrize("name", SOUND)
def test_of_a_sound_set_nothing_is_told(name, tmp_path):
    assert warnings(faulty(tmp_path, SOUND[name])) == ()


def test_hidden_files_and_other_endings_are_told(tmp_path):
    folder = make(tmp_path / "Toy")
    (folder / "imagesTr/._s1_0000.nii.gz").write_bytes(b"\0" * 9)
    (folder / "imagesTr/notes.txt").write_text("")
    assert [text for _, text in warnings(folder)] == [
        f"{STOPS}: the folder is called 'Toy', but is found by a name like Dataset001_Toy",
        f"{STOPS}: 'numTraining' is 5, but it finds 6 cases by .nii.gz: ._s1, s0, s1, s2, s3, s4",
        f"{STOPS}: imagesTr has what it takes for cases and labelsTr not (hidden files too): ._s1",
        f"{WARNS} without files of imagesTr that do not end in .nii.gz: notes.txt",
    ]


def test_other_layouts_are_told_how_to_be_converted(tmp_path):
    (_, text), *others = warnings(write_set(tmp_path / "set"))
    assert text == f"{STOPS}: it reads no layout but its own raw data sets: nnUNetv2_convert_MSD_dataset converts it"
    assert others == []


def test_the_command_warns_where_it_is_asked_to(tmp_path, capsys):
    folder = faulty(tmp_path, FAULTS["spacing of a channel"][0])
    assert main(["check", str(folder)]) == 0
    assert "nnU-Net" not in capsys.readouterr().out
    assert main(["check", str(folder), "--for-nnunet"]) == 0
    assert "s1    warning  nnU-Net stops: the spacings of s1_0001.nii.gz" in capsys.readouterr().out


def test_without_simpleitk_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(for_nnunet, "find_spec", lambda name: None)
    with pytest.raises(StateError, match=r"SimpleITK of this Python: .* pip install 'dstlib\[itk\]'"):
        warnings(make(tmp_path / "Dataset001_Toy"))


GAPS = {
    "labels with a gap": (
        {"background": 0, "a": 1, "b": 2, "c": 4},
        "1, 2, 4, where nnU-Net demands 1 to 3 without gaps, and stops",
    ),
    "a high value to ignore": (LABELS | {"ignore": 255}, "value 255 is ignored, where nnU-Net demands 3"),
}


@pytest.mark.parametrize("name", GAPS)
def test_values_with_gaps_are_told_of_every_set(name, tmp_path):
    labels, told = GAPS[name]
    manifest = read_manifest(make(tmp_path / "Dataset001_Toy", entries={"labels": labels}))
    assert [told in note for note in manifest.notes] == [True]
    assert nnunet_warnings(manifest, progress=False) == ()


@pytest.mark.long
@pytest.mark.parametrize("name", [*FAULTS, *GAPS, *SOUND])
def test_nnunet_itself_stops_there_and_nowhere_else(name, tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2")
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    from nnunetv2.utilities import utils

    faults = {name: how for name, (how, _) in FAULTS.items()} | {
        name: {"entries": {"labels": labels}} for name, (labels, _) in GAPS.items()
    }
    folder = faulty(tmp_path, (faults | SOUND)[name])
    threads = SimpleNamespace(Pool=lambda *_, **__: ThreadPool(1))  # a process each would take minutes
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: threads)
    monkeypatch.setattr(utils, "Pool", threads.Pool)
    try:
        verify_dataset_integrity(str(folder), 1)
        stops = False
    except (AssertionError, RuntimeError, ValueError):
        stops = True
    told = any(text.startswith(STOPS) for _, text in warnings(folder)) or name in GAPS
    later = name in ("few cases", "no foreground")  # where folds are drawn, and where intensities are measured
    assert stops == (told and not later)

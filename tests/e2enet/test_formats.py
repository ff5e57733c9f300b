"""Sets and images of every format, from check to evaluate; and what is broken among them, told without a loss."""

import gzip
import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from dicom_files import MR, SEGMENTATION, slice_tags, write_slice
from small_runs import CLASSES, config, train, write_set
from torch import nn

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.__main__ import main
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.preprocessing.cache import Entry
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.data.scans.formats import parts
from dstlib.zoo.e2enet.inference.predict import Trained, outcome_table, predict_folder

sitk = pytest.importorskip("SimpleITK")

IMAGE, LABEL = "imagesTr/scan_1_0000{}", "labelsTr/scan_1{}"


def convert(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.ReadImage(str(source))
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)  # of NIfTI, of which the writers of other formats warn
    sitk.WriteImage(image, str(target), True)


def write_nnunet(folder: Path, source: Path, ending: str) -> Path:
    """Writes the small set as nnU-Net has it, in files of another ending."""
    for image in sorted((source / "imagesTr").iterdir()):
        name = image.name.removesuffix(".nii.gz")
        convert(image, folder / "imagesTr" / f"{name}_0000{ending}")
        convert(source / "labelsTr" / image.name, folder / "labelsTr" / f"{name}{ending}")
    labels = {name: number for number, name in enumerate(("background", *CLASSES))}
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 5, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_images(folder: Path, source: Path) -> Path:
    """Writes one image in every format: a to f."""
    image = source / "imagesTs" / "test.nii.gz"
    for name in ("a.nrrd", "b.mha", "c.mhd", "d.nhdr", "e.nii.gz"):
        convert(image, folder / name)
    voxels = np.asanyarray(nibabel.load(image).dataobj)
    for k in range(voxels.shape[2]):
        tags = slice_tags(k, np.array([0, 0, 2.0 * k]), sop_class=MR, modality="MR", spacing=(1, 1), intercept=0)
        write_slice(folder / "f" / f"IM_{(5 * k) % 9}", np.rint(voxels[:, :, k].T), tags)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("small") / "set")


@pytest.fixture(scope="module")
def sets(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {ending: write_nnunet(folder / f"Set{ending}", small, ending) for ending in (".nrrd", ".mha")}


class Bright(nn.Module):
    """Predicts class 1 where the image is above 120, and class 2 above 160."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.deep_supervision = False

    def forward(self, x):
        return self.scale * torch.cat([0 * x, x - 120, 2 * (x - 140)], dim=1)


AS_IT_IS = CtNormalization(low=-1e6, high=1e6, mean=0.0, std=1.0)
TRAINED = Trained(
    models=(Bright(),),
    preparation=Preparation(spacing=None, normalization=(AS_IT_IS,), crop=False),
    patch_size=(8, 8, 8),
    mirror=(),
    channels=("MRI",),
    classes=CLASSES,
)


def command(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


# ---- sound ones


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_set_is_sound(sets, ending, capsys):
    assert command("check", sets[ending]) == 0
    assert "5 cases, 0 defects, 0 warnings" in capsys.readouterr().out


def predicted(folder: Path, small: Path) -> Path:
    """A prediction of every case of the small set: its label."""
    return Path(shutil.copytree(small / "labelsTr", folder))


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_a_set_is_scored(sets, small, tmp_path, ending, capsys):
    assert command("evaluate", predicted(tmp_path / "out", small), "--data", sets[ending]) == 0
    told = capsys.readouterr().out
    assert "5 of the 5 labelled cases" in told
    assert "1.000" in told


def test_predictions_lie_on_images_of_every_format(small, tmp_path):
    images = write_images(tmp_path / "images", small)
    outcomes = predict_folder(TRAINED, images, tmp_path / "out", progress=False)
    assert [(outcome.name, outcome.error) for outcome in outcomes] == [(name, None) for name in "abcdef"]
    files = {file.name[0]: str(file) for file in images.iterdir() if file.is_file() and not file.name.endswith("w.gz")}
    files |= {"c": str(images / "c.mhd"), "d": str(images / "d.nhdr")}
    for name in "abcdef":
        label = sitk.ReadImage(str(tmp_path / "out" / f"{name}.nii.gz"))
        image = sitk.ReadImage(files[name]) if name in files else series(images / "f")
        assert label.GetSize() == image.GetSize()
        affine = nibabel.load(tmp_path / "out" / f"{name}.nii.gz").affine
        for index in ((0, 0, 0), (8, 3, 5)):
            place = np.array(image.TransformIndexToPhysicalPoint(index))
            np.testing.assert_allclose(label.TransformIndexToPhysicalPoint(index), place, atol=1e-4)
            np.testing.assert_allclose(affine @ [*index, 1], [*(place * (-1, -1, 1)), 1], atol=1e-4)
    voxels = {name: np.asanyarray(nibabel.load(tmp_path / "out" / f"{name}.nii.gz").dataobj) for name in "abcde"}
    assert set(np.unique(voxels["e"])) == {0, 1, 2}
    for name in "abcd":
        np.testing.assert_array_equal(voxels[name], voxels["e"])


def test_what_is_odd_is_told_and_a_folder_of_slices_is_no_output(small, tmp_path):
    folder = write_images(tmp_path / "images", small) / "f"
    write_slice(folder / "seg", np.zeros((3, 3)), slice_tags(9, np.zeros(3), sop_class=SEGMENTATION))
    for file in (tmp_path / "images").iterdir():
        if file != folder:
            file.unlink()
    with pytest.raises(SettingError, match="where f is an input"):
        predict_folder(TRAINED, tmp_path / "images", folder, progress=False)
    told = outcome_table(predict_folder(TRAINED, tmp_path / "images", tmp_path / "out", progress=False))
    assert told.splitlines()[2:] == [
        "f     warning: f leaves out what is no slice of it: 1 segmentation(s)",
        "1 predicted, 0 kept as they were, 0 failed",
    ]


def series(folder):
    places = {sitk.ReadImage(str(file)).GetOrigin()[2]: str(file) for file in folder.iterdir()}
    return sitk.ReadImage([places[place] for place in sorted(places)])


# ---- broken ones


def claim(file: Path) -> None:
    """Has a header promise a billion voxels, and more."""
    if file.is_dir():
        for slice_file in file.iterdir():
            content = bytearray(slice_file.read_bytes())
            for tag in (b"\x28\0\x10\0US\2\0", b"\x28\0\x11\0US\2\0"):
                at = content.find(tag) + len(tag)
                content[at : at + 2] = b"\xff\xff"
            slice_file.write_bytes(content)
    elif file.suffix in (".nii", ".gz"):
        content = bytearray(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
        content[42:48] = np.array([1000] * 3, "<i2").tobytes()
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    else:
        content = file.read_bytes()
        for before, after in (
            (b"sizes: 9 9 9", b"sizes: 1000 1000 1000"),
            (b"DimSize = 9 9 9", b"DimSize = 1000 1000 1000"),
        ):
            content = content.replace(before, after)
        file.write_bytes(content)


def voxels_of(file: Path) -> Path:
    """The file that holds the voxels."""
    return sorted(file.iterdir())[0] if file.is_dir() else parts(file)[-1]


def cut(file: Path) -> None:
    target = voxels_of(file)
    target.write_bytes(target.read_bytes()[:-20])


def flip(file: Path) -> None:
    """Changes a bit of packed voxels, or of the header of what is not packed."""
    target = voxels_of(file)
    content = bytearray(target.read_bytes())
    content[len(content) - 30 if not file.is_dir() else content.find(b"\x28\0\x10\0US\2\0") + 8] ^= 0x10
    target.write_bytes(content)


def empty(file: Path) -> None:
    (file / "IM_0.dcm" if file.is_dir() else file).write_bytes(b"")


def replace_by_text(file: Path) -> None:
    (file / "IM_0.dcm" if file.is_dir() else file).write_bytes(b"hello, " * 99)


@pytest.mark.parametrize("damage", [claim, cut, flip, empty, replace_by_text], ids=lambda f: f.__name__)
def test_what_is_broken_is_told_once_and_the_others_go_on(small, tmp_path, damage, capfd):
    """Beside a sound image, one of every format that is broken: a line each, and what was written stays."""
    images = write_images(tmp_path / "images", small)
    shutil.copy(images / "e.nii.gz", images / "sound.nii.gz")
    (images / "g.nii").write_bytes(gzip.decompress((images / "e.nii.gz").read_bytes()))
    broken = [images / name for name in ("a.nrrd", "b.mha", "c.mhd", "d.nhdr", "e.nii.gz", "f", "g.nii")]
    if damage is flip:
        broken.pop()  # an unpacked file has no checksum
    for file in broken:
        damage(file)
    capfd.readouterr()
    told = outcome_table(predict_folder(TRAINED, images, tmp_path / "out", progress=False))
    written = sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz"))
    assert written == (["g.nii.gz", "sound.nii.gz"] if damage is flip else ["sound.nii.gz"])
    for file in broken:
        assert sum(line.startswith(file.name[0] + " ") for line in told.splitlines()) == 1, told
    assert f"{len(written)} predicted, 0 kept as they were, {len(broken)} failed" in told
    assert capfd.readouterr() == ("", "")  # of ITK


@pytest.mark.parametrize(("ending", "damage"), [(".nrrd", claim), (".mha", cut), (".mha", flip), (".nrrd", empty)])
def test_a_set_with_a_broken_file_is_told_by_check_training_and_evaluation(
    sets, small, tmp_path, ending, damage, capsys
):
    data = shutil.copytree(sets[ending], tmp_path / "set")
    for part in (IMAGE, LABEL):
        damage(data / part.format(ending))
    assert command("check", data) == 1
    told = capsys.readouterr().out
    assert all(f"DEFECT  {part.format(ending)} cannot be read: " in told for part in (IMAGE, LABEL)), told
    assert "2 defects in 1 case" in told
    with pytest.raises(DataError, match=f"scan_1{ending} cannot be read: "):
        train(config(data, tmp_path / "run"))
    capsys.readouterr()
    assert command("evaluate", predicted(tmp_path / "out", small), "--data", data) == 1
    told = capsys.readouterr().out
    assert told.count(f"scan_1{ending} cannot be read: ") == 1
    assert "1.000" in told  # of the other cases


# ---- of which files a scan consists


def test_a_scan_changes_with_each_of_its_files(small, tmp_path):
    images = write_images(tmp_path, small)
    found = {file.name: [part.name for part in parts(images / file.name)] for file in images.iterdir()}
    assert found["a.nrrd"] == ["a.nrrd"]
    assert found["c.mhd"] == ["c.mhd", "c.zraw"]
    assert found["d.nhdr"] == ["d.nhdr", "d.raw.gz"]
    assert found["e.nii.gz"] == ["e.nii.gz"]
    assert found["f"] == [f"IM_{i}" for i in range(9)]
    assert parts(tmp_path / "absent.nhdr") == [tmp_path / "absent.nhdr"]


def test_a_scan_is_what_is_read_of_it(tmp_path):
    """Neither what a file manager leaves beside slices, nor a file that a header may not name."""
    (tmp_path / "f").mkdir()
    for name in ("IM_0", ".DS_Store"):
        (tmp_path / "f" / name).write_bytes(b"")
    assert parts(tmp_path / "f") == [tmp_path / "f" / "IM_0"]
    for name in ("../secret.raw", "/etc/passwd", "a\0b", "a" * 300):
        (tmp_path / "a.mhd").write_text(f"NDims = 3\nElementDataFile = {name}\n")
        assert parts(tmp_path / "a.mhd") == [tmp_path / "a.mhd"]


def test_a_changed_slice_is_prepared_anew(tmp_path):
    write_slice(tmp_path / "f" / "0", np.zeros((3, 3)), slice_tags(0, np.zeros(3)))
    files = CaseFiles(name="f", images=(tmp_path / "f",))
    entry = Entry(cache=tmp_path / "cache", files=files, num_channels=1, labels=Labels.consecutive(1))
    before = entry.made_from()
    assert entry.made_from() == before
    os.utime(tmp_path / "f" / "0", ns=(0, 0))
    assert entry.made_from() != before

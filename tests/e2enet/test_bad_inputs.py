"""What the commands say of damaged scans, foreign folders and full disks, and what they leave behind."""

import gzip
import json
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dstlib.errors import StateError
from dstlib.files import alone_in
from dstlib.zoo.e2enet import report as report_module
from dstlib.zoo.e2enet.__main__ import main
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.inference import predict as predict_module

AMOS = Path(__file__).parents[2] / "examples" / "e2enet_amos.py"
IMAGE, LABEL = "imagesTr/amos_0002.nii.gz", "labelsTr/amos_0002.nii.gz"
TINY = ("--preset", "demo", "--epochs", 1, "--iterations", 2, "--interval", 1, "--patch-size", 16, 16, 16)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "amos"
    return write_phantoms(folder, "amos", num_scans=5, shape=(32, 40, 40), progress=False)


@pytest.fixture
def damaged(sound, tmp_path):
    """A copy of the sound set, for a test to damage."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


@pytest.fixture(scope="module")
def trained(sound, tmp_path_factory):
    """A finished run on the sound set."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        assert recipe(patch, "--data", sound, "--cache", folder / "cache", "--run-dir", folder / "run") == 0
    return folder / "run"


def recipe(patch, *arguments):
    """The exit code of a tiny training in this process."""
    patch.setattr(report_module, "_draw", lambda *_: None)  # figures are no input
    patch.setattr(sys, "argv", [str(AMOS), *map(str, (*TINY, *arguments))])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(AMOS), run_name="__main__")
    return caught.value.code


def command(*arguments):
    return main([str(argument) for argument in arguments])


def rewrite(file, change, *, move=lambda affine: affine):
    nifti = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(change(np.asanyarray(nifti.dataobj).copy()), move(nifti.affine.copy())), file)


def with_first(voxels, value, dtype):
    voxels = voxels.astype(dtype)
    voxels[0, 0, 0] = value
    return voxels


def patched(file, at, value):
    """Other bytes inside of a compressed file whose checksum holds."""
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[at : at + len(value)] = value
    file.write_bytes(gzip.compress(content))


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def shifted(affine):
    affine[0, 3] += 20
    return affine


def same(voxels):
    return voxels


DEFECTS = {
    "cut short": (lambda d: (d / IMAGE).write_bytes((d / IMAGE).read_bytes()[:9000]), "ended before"),
    "without its checksum": (lambda d: (d / LABEL).write_bytes((d / LABEL).read_bytes()[:-9]), "ended before"),
    "a flipped byte": (lambda d: flipped(d / IMAGE), f"{IMAGE} cannot be read"),
    "a header that promises more": (lambda d: patched(d / IMAGE, 42, b"\x50\x7f"), "of its header"),
    "an empty file": (lambda d: (d / IMAGE).write_bytes(b""), "its 0 bytes do not begin as NIfTI does"),
    "a class too many": (lambda d: rewrite(d / LABEL, lambda v: with_first(v, 16, "u1")), "has values 16, but"),
    "a negative class": (lambda d: rewrite(d / LABEL, lambda v: with_first(v, -1, "i2")), "has values -1, but"),
    "a fraction": (lambda d: rewrite(d / LABEL, lambda v: with_first(v, 0.5, "f4")), "not whole numbers: 0.5"),
    "a NaN": (lambda d: rewrite(d / IMAGE, lambda v: with_first(v, np.nan, "f4")), "has 1 voxel(s) that are NaN"),
    "another shape": (lambda d: rewrite(d / LABEL, lambda v: v[..., :-1]), "(40, 40, 31), but its image has"),
    "another place": (lambda d: rewrite(d / LABEL, same, move=shifted), "lies 20 mm away from its image"),
    "no voxel": (lambda d: rewrite(d / IMAGE, lambda v: v[:0]), "has shape (0,), but an image is"),
    "a channel too many": (lambda d: rewrite(d / IMAGE, lambda v: np.stack([v, v], -1)), "has 2 channel(s)"),
    "complex numbers": (lambda d: rewrite(d / IMAGE, lambda v: v.astype("c8")), "complex64, not numbers"),
    "voxels without a size": (
        lambda d: (patched(d / IMAGE, 252, bytes(2)), patched(d / IMAGE, 280, bytes(16))),  # no qform, half a sform
        "sizes are positive and finite",
    ),
    "no label": (lambda d: (d / LABEL).unlink(), f"{LABEL} is missing"),
    "no image": (lambda d: (d / IMAGE).unlink(), f"{IMAGE} is missing"),
    "a folder in its place": (lambda d: ((d / IMAGE).unlink(), (d / IMAGE).mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_check_names_the_file_and_what_is_wrong_with_it(damaged, kind, capsys):
    damage, message = DEFECTS[kind]
    damage(damaged)
    assert command("check", damaged) == 1
    output = capsys.readouterr().out
    assert re.search(r"^AMOS: 7 cases, [123] defects? in 1 case, ", output, re.MULTILINE)
    assert message in output
    assert set(re.findall(r"^(\S+) +DEFECT", output, re.MULTILINE)) == {"amos_0002"}


def test_training_names_all_defects_at_once_and_leaves_no_run_behind(damaged, tmp_path, monkeypatch, capsys):
    flipped(damaged / IMAGE)
    (damaged / "labelsTr/amos_0004.nii.gz").unlink()
    run = tmp_path / "run"
    assert recipe(monkeypatch, "--data", damaged, "--cache", tmp_path / "cache", "--run-dir", run) == 2
    *_, head, first, second = capsys.readouterr().err.splitlines()
    assert "2 defect(s) in 2 of 5 cases" in head
    assert f"{IMAGE} cannot be read" in first
    assert "labelsTr/amos_0004.nii.gz is missing" in second
    assert not run.exists()


ODDITIES = {
    "zeros": (lambda d: rewrite(d / IMAGE, lambda v: v * 0), "is constant in channel 0: every voxel is 0"),
    "nothing labelled": (lambda d: rewrite(d / LABEL, lambda v: v * 0), "has no foreground"),
    "metres": (
        lambda d: [
            rewrite(d / file, same, move=lambda a: a @ np.diag([1e-3, 1e-3, 1e-3, 1])) for file in (IMAGE, LABEL)
        ],
        "mm (amos_0002) to 10 mm",
    ),
}


@pytest.mark.parametrize("kind", ODDITIES)
def test_what_is_legal_but_odd_is_a_warning(damaged, kind, capsys):
    damage, message = ODDITIES[kind]
    damage(damaged)
    assert command("check", damaged) == 0
    assert message in capsys.readouterr().out


def test_labels_stored_as_float_and_the_files_of_macos_are_fine(damaged, capsys):
    rewrite(damaged / LABEL, lambda voxels: voxels.astype(np.float32))
    for folder in ("imagesTr", "labelsTr"):
        (damaged / folder / "._amos_0002.nii.gz").write_bytes(b"\0\5\x16\7")
        (damaged / folder / ".DS_Store").write_bytes(b"\0")
    assert command("check", damaged) == 0
    assert "7 cases, 0 defects" in capsys.readouterr().out


def listed(change):
    """Damages the content of dataset.json."""

    def damage(folder):
        content = json.loads((folder / "dataset.json").read_text())
        change(content)
        (folder / "dataset.json").write_text(json.dumps(content))

    return damage


MANIFESTS = {
    "cut short": (lambda d: (d / "dataset.json").write_text("{"), "expected strict JSON in UTF-8"),
    "no text": (lambda d: (d / "dataset.json").write_bytes(b"\xff\xfe\0"), "expected strict JSON in UTF-8"),
    "a list": (lambda d: (d / "dataset.json").write_text("[1]"), "expected an object, got [1]"),
    "a case twice": (listed(lambda c: c["training"].append(c["training"][0])), "amos_0001 2 times"),
    "no case": (listed(lambda c: c["training"].clear()), "lists at least one case"),
    "a case without files": (listed(lambda c: c["training"].append(1)), "entry 5 of 'training' is 1 but"),
    "labels without a background": (listed(lambda c: c["labels"].pop("0")), "from 0 up, as in"),
    "none": (lambda d: (d / "dataset.json").unlink(), "as --layout names them, look so:"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_foreign_or_damaged_data_set_is_one_error(damaged, kind, capsys):
    damage, message = MANIFESTS[kind]
    damage(damaged)
    assert command("check", damaged) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors


def test_a_value_that_dataset_json_does_not_name_is_a_defect_of_each_label(damaged, capsys):
    listed(lambda content: content["labels"].pop("3"))(damaged)
    assert command("check", damaged) == 1
    assert "amos_0001.nii.gz has values 3, but the classes are numbered 0, 1, 2, 4," in capsys.readouterr().out


def test_one_form_that_is_none_leaves_the_other(damaged, capsys):
    patched(damaged / IMAGE, 280, bytes(16))
    assert command("check", damaged) == 0
    told = capsys.readouterr().out
    assert "The sform is none, as an axis of it has no length. The qform is used, as by ITK's programs" in told


def test_the_others_are_predicted_and_a_repetition_makes_what_is_missing(damaged, trained, tmp_path, capsys):
    images, output = damaged / "imagesTr", tmp_path / "predicted"
    for number in (4, 5):
        (images / f"amos_000{number}.nii.gz").unlink()
    whole = (damaged / IMAGE).read_bytes()
    (damaged / IMAGE).write_bytes(whole[:500])
    predict = ("predict", trained, "--images", images, "--output", output, "--no-mirror")
    assert command(*predict) == 1
    told = capsys.readouterr().out
    assert "2 predicted, 0 kept as they were, 1 failed" in told
    assert "amos_0002.nii.gz cannot be read" in told
    names = {file.name for file in images.iterdir()}
    assert {file.name for file in output.glob("*.nii.gz")} == names - {"amos_0002.nii.gz"}
    (damaged / IMAGE).write_bytes(whole)
    assert command(*predict) == 0
    assert "1 predicted, 2 kept as they were, 0 failed" in capsys.readouterr().out
    assert {file.name for file in output.glob("*.nii.gz")} == names
    prediction, image = nibabel.load(output / "amos_0002.nii.gz"), nibabel.load(damaged / IMAGE)
    assert prediction.shape == image.shape
    assert np.array_equal(prediction.affine, image.affine)


def refused(capsys, *arguments):
    assert command(*arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    return last


def test_predict_never_writes_over_its_images(damaged, trained, capsys):
    before = (damaged / IMAGE).read_bytes()
    predict = ("predict", trained, "--images", damaged / "imagesTr", "--output", damaged / "imagesTr", "--overwrite")
    assert "is an input" in refused(capsys, *predict)
    assert (damaged / IMAGE).read_bytes() == before


def test_a_run_and_a_folder_in_use_are_no_places_for_results(sound, trained, tmp_path, capsys):
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    predict = ("predict", trained, "--images", sound / "imagesTr", "--output")
    evaluate = ("evaluate", trained / "predictions", "--data", sound, "--allow-missing", "--output")
    for todo in (predict, evaluate):
        assert "--output of the command line: expected no run, got the run" in refused(capsys, *todo, trained)
        with alone_in(tmp_path / "held"):
            assert "expected a folder that nobody else works in" in refused(capsys, *todo, tmp_path / "held")
    assert {file.name for file in (tmp_path / "held").iterdir()} == {".lock"}
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before


def test_a_run_that_is_unfinished_damaged_or_foreign_is_refused(sound, trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    images = ("--images", sound / "imagesTr", "--output", tmp_path / "predicted")
    (run / "model.pt").write_bytes((trained / "model.pt").read_bytes()[:9000])
    assert "a damaged or foreign file" in refused(capsys, "predict", run, *images)
    (run / "model.pt").unlink()
    assert "--resume" in refused(capsys, "predict", run, *images)
    assert "--resume" in refused(capsys, "predict", trained, run, *images)  # one whole, one not
    (run / "result.json").unlink()
    assert "result.json of run" in refused(capsys, "compare", trained, run)
    assert "config.json of run" in refused(capsys, "predict", sound, *images)
    assert not (tmp_path / "predicted").exists()


def test_a_disk_that_fills_up_and_ctrl_c_leave_whole_predictions_alone(sound, trained, tmp_path, monkeypatch, capsys):
    images, output = tmp_path / "images", tmp_path / "predicted"
    images.mkdir()
    for number in (1, 3):
        shutil.copy(sound / f"imagesTr/amos_000{number}.nii.gz", images)
    predict = ("predict", trained, "--images", images, "--output", output, "--no-mirror")
    write = predict_module.write_label

    def until_third(stop):
        def written(path, *arguments):
            if path.name == "amos_0003.nii.gz":
                stop()
            write(path, *arguments)

        return written

    def fill():
        raise StateError.of("amos_0003.nii.gz", "the disk", allowed="room", given="none", remedy="Make room.")

    monkeypatch.setattr(predict_module, "write_label", until_third(fill))
    assert "Make room" in refused(capsys, *predict)
    monkeypatch.setattr(predict_module, "write_label", until_third(lambda: signal.raise_signal(signal.SIGINT)))
    assert {file.name for file in output.iterdir()} == {".lock", "amos_0001.nii.gz", "prediction.json"}
    assert command(*predict) == 130
    names = {".lock", "amos_0001.nii.gz", "amos_0003.nii.gz", "prediction.json"}
    assert {file.name for file in output.iterdir()} == names, "what is computed is written first"
    monkeypatch.setattr(predict_module, "write_label", write)
    assert command(*predict) == 0
    assert "0 predicted, 2 kept as they were" in capsys.readouterr().out


def test_predictions_that_cannot_be_scored_are_named_and_the_others_scored(damaged, tmp_path, capsys):
    predictions = Path(shutil.copytree(damaged / "labelsTr", tmp_path / "predictions"))
    (predictions / "amos_0001.nii.gz").write_bytes(b"\x1f\x8b")
    rewrite(predictions / "amos_0002.nii.gz", same, move=shifted)
    (predictions / "amos_0005.nii.gz").unlink()
    evaluate = ("evaluate", predictions, "--data", damaged, "--output", tmp_path / "scores")
    assert "got none of amos_0005. Predict these first, or pass --allow-missing" in refused(capsys, *evaluate)
    assert command(*evaluate, "--allow-missing") == 1
    output = capsys.readouterr().out
    assert "NOT SCORED, 2 of 4 cases" in output
    assert "amos_0001.nii.gz cannot be read" in output
    assert "amos_0002: the prediction lies 20 mm away from its label" in output
    assert re.search(r"^mean +1\.000 +1\.000 +0\.00 +0\.00 +2 ", output, re.MULTILINE)
    assert {file.name for file in (tmp_path / "scores").iterdir()} == {".lock", "scores.csv", "scores.json"}
    assert "got no such folder" in refused(capsys, "evaluate", tmp_path / "nowhere", "--data", damaged)

"""Phantoms on disk: the real layouts, the same voxels in whatever orientation, whole or not there."""

import json

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from dstlib.errors import DataError, SettingError, StateError
from dstlib.zoo.e2enet.data.phantoms import sets as phantom_sets
from dstlib.zoo.e2enet.data.phantoms.ct import MIN_SHAPE, patient_seed
from dstlib.zoo.e2enet.data.phantoms.sets import KINDS, NUM_TEST, RECORD, write_phantoms

NUM_SCANS = 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One small set of each kind."""
    folder = tmp_path_factory.mktemp("phantoms")
    return {
        name: write_phantoms(
            folder / name,
            name,
            num_scans=NUM_SCANS,
            seed=4,
            shape=MIN_SHAPE if kind.takes_shape else None,
            progress=False,
        )
        for name, kind in KINDS.items()
    }


def as_drawn(nifti, orientation):
    """The voxels of a file in the order (C, D, H, W) of a case whose axes lead as ``orientation`` says."""
    here, there = (axcodes2ornt(codes) for codes in (nibabel.aff2axcodes(nifti.affine), orientation[::-1]))
    voxels = np.asanyarray(nifti.as_reoriented(ornt_transform(here, there)).dataobj)
    return (voxels if voxels.ndim == 4 else voxels[..., None]).T


@pytest.mark.parametrize("name", KINDS)
def test_files_hold_the_phantoms_in_the_given_orientation(sets, name):
    kind = KINDS[name]
    for number in range(NUM_SCANS):
        case = kind.draw(patient_seed(4, number), MIN_SHAPE)
        image = nibabel.load(sets[name] / kind.image.format(number + 1))
        label = nibabel.load(sets[name] / kind.label.format(number + 1))
        assert nibabel.aff2axcodes(image.affine) == tuple(kind.orientations[number % len(kind.orientations)])
        np.testing.assert_array_equal(image.affine, label.affine)
        assert (image.get_data_dtype(), label.get_data_dtype()) == (kind.image_type, np.uint8)
        half = 0.5 if kind.image_type == np.int16 else 0  # rounding to a whole number
        np.testing.assert_allclose(as_drawn(image, case.orientation), case.image, rtol=0, atol=half)
        np.testing.assert_array_equal(as_drawn(label, case.orientation)[0], case.label)
        sizes = nibabel.affines.voxel_sizes(image.affine)
        np.testing.assert_allclose(sizes, case.spacing[::-1], rtol=1e-6)  # the header is float32
        assert (np.abs(image.affine[:3, 3]) > 1e-3).all()
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)


@pytest.mark.parametrize("name", KINDS)
def test_one_patient_keeps_his_place_in_space(sets, name):
    """Whatever the orientation, the middle of a scan lies within the 40 mm that it is drawn from."""
    kind = KINDS[name]
    for number in range(NUM_SCANS):
        image = nibabel.load(sets[name] / kind.image.format(number + 1))
        middle = nibabel.affines.apply_affine(image.affine, (np.array(image.shape[:3]) - 1) / 2)
        assert (np.abs(middle) <= 40.001).all()  # mm; float32 in the header


def test_liver_is_on_the_right_in_every_orientation(sets):
    for number in range(1, NUM_SCANS + 1):
        label = nibabel.load(sets["amos"] / f"labelsTr/amos_{number:04d}.nii.gz")
        voxels = np.asanyarray(label.dataobj)
        liver, spleen, bladder, spine_side = (
            nibabel.affines.apply_affine(label.affine, np.argwhere(voxels == i).mean(0)) for i in (6, 1, 14, 8)
        )
        assert liver[0] > spleen[0] + 50  # NIfTI's x leads to the right ... of RAS, in mm
        assert bladder[2] < liver[2] - 100
        assert spine_side[1] < bladder[1]


def test_layouts_are_those_of_the_real_sets(sets):
    def files(name):
        return sorted(str(file.relative_to(sets[name])) for file in sets[name].rglob("*") if file.is_file())

    assert files("amos") == [
        "dataset.json",
        *(f"imagesTr/amos_000{i}.nii.gz" for i in (1, 2, 3)),
        *(f"imagesTs/amos_000{i}.nii.gz" for i in (4, 5)),
        *(f"labelsTr/amos_000{i}.nii.gz" for i in (1, 2, 3)),
        RECORD,
    ]
    assert files("btcv") == [
        *(f"RawData/Testing/img/img000{i}.nii.gz" for i in (4, 5)),
        *(f"RawData/Training/img/img000{i}.nii.gz" for i in (1, 2, 3)),
        *(f"RawData/Training/label/label000{i}.nii.gz" for i in (1, 2, 3)),
        RECORD,
    ]
    for name, stem in (("brats", "BRATS"), ("hippocampus", "hippocampus")):
        content = json.loads((sets[name] / "dataset.json").read_text())
        assert content["training"][0] == {
            "image": f"./imagesTr/{stem}_001.nii.gz",
            "label": f"./labelsTr/{stem}_001.nii.gz",
        }
        assert content["test"] == [f"./imagesTs/{stem}_004.nii.gz", f"./imagesTs/{stem}_005.nii.gz"]
        listed = [path for entry in content["training"] for path in entry.values()] + content["test"]
        assert sorted(path.removeprefix("./") for path in listed) == files(name)[1:-1]
    amos = json.loads((sets["amos"] / "dataset.json").read_text())
    assert (amos["modality"], amos["labels"]["15"], amos["numTest"]) == ({"0": "CT"}, "prostate/uterus", NUM_TEST)
    assert amos["test"][0] == {"image": "./imagesTs/amos_0004.nii.gz"}
    assert amos["validation"] == []


def test_the_same_set_is_kept_and_another_one_refused(sets, tmp_path):
    folder = tmp_path / "set"
    write_phantoms(folder, "hippocampus", num_scans=1, progress=False)
    record = folder / RECORD
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert write_phantoms(folder, "hippocampus", num_scans=1) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    for other in ({"num_scans": 2}, {"num_scans": 1, "seed": 1}):
        with pytest.raises(DataError, match=r"phantoms of folder .*expected the set .*Pass another folder"):
            write_phantoms(folder, "hippocampus", **other)
    plan = json.loads(record.read_text())
    record.write_text(record.read_text()[:9])
    with pytest.raises(DataError, match=r"Unterminated .* The folder holds something else, or a part of a set"):
        write_phantoms(folder, "hippocampus", num_scans=1)
    record.write_text("[" * 100_000)
    with pytest.raises(DataError, match="expected at most 64 brackets in brackets, got more"):
        write_phantoms(folder, "hippocampus", num_scans=1)
    record.write_text(json.dumps({**plan, "kind": "\x1b[2J"}))
    with pytest.raises(DataError, match=r"got \{'kind': '\\x1b\[2J', 'num_scans': 1, "):
        write_phantoms(folder, "hippocampus", num_scans=1)
    assert set(folder.rglob("*")) == set(before)


def test_a_file_or_a_strange_folder_is_refused_and_an_empty_one_filled(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.txt").write_text("mine")
    for name in ("file", "strange"):
        with pytest.raises(DataError, match=r"phantoms\.json: expected a file .* The folder holds something else"):
            write_phantoms(tmp_path / name, "hippocampus", num_scans=1, progress=False)
    (tmp_path / "empty").mkdir()
    write_phantoms(tmp_path / "empty", "hippocampus", num_scans=1, progress=False)
    assert (tmp_path / "empty" / RECORD).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    saved = []

    def save(*arguments):
        if len(saved) == 3:
            raise error
        saved.append(arguments)
        return original(*arguments)

    original = phantom_sets._save
    monkeypatch.setattr(phantom_sets, "_save", save)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else StateError
    with pytest.raises(expected, match=None if error is KeyboardInterrupt else "no space left.*nothing half-made"):
        write_phantoms(tmp_path / "a" / "set", "hippocampus", num_scans=3, progress=False)
    assert list((tmp_path / "a").iterdir()) == []


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    left = tmp_path / ".set-building" / "set" / "imagesTr"
    left.mkdir(parents=True)
    (left / "hippocampus_001.nii.gz").write_bytes(b"half")
    folder = write_phantoms(tmp_path / "set", "hippocampus", num_scans=1, progress=False)
    assert list(tmp_path.iterdir()) == [folder]
    assert nibabel.load(folder / "imagesTr" / "hippocampus_001.nii.gz").shape


def test_what_a_process_left_that_was_killed_behind_the_renaming_is_cleared_too(tmp_path):
    folder = write_phantoms(tmp_path / "set", "hippocampus", num_scans=1, progress=False)
    (tmp_path / ".set-building").mkdir()
    write_phantoms(folder, "hippocampus", num_scans=1, progress=False)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_in_the_place_where_a_set_is_built_is_not_followed(tmp_path):
    (tmp_path / "mine" / "set").mkdir(parents=True)
    (tmp_path / ".set-building").symlink_to(tmp_path / "mine")
    with pytest.raises(StateError, match="is a link"):
        write_phantoms(tmp_path / "set", "hippocampus", num_scans=1, progress=False)
    assert (tmp_path / "mine" / "set").is_dir()


def test_a_faster_process_wins(tmp_path, monkeypatch):
    """Another process finishes the same set while this one draws: its folder stays as it is."""
    folder = tmp_path / "set"
    original = phantom_sets._write_set

    def write_twice(built, plan, *, progress):
        original(built, plan, progress=progress)
        if not folder.exists():
            folder.mkdir()
            original(folder, plan, progress=progress)
            (folder / "mark").touch()

    monkeypatch.setattr(phantom_sets, "_write_set", write_twice)
    write_phantoms(folder, "hippocampus", num_scans=1, progress=False)
    assert (folder / "mark").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_set_grows_without_changing(sets, tmp_path):
    larger = write_phantoms(tmp_path / "larger", "hippocampus", num_scans=4, seed=4, progress=False)
    for file in (sets["hippocampus"] / "imagesTr").iterdir():
        first, second = nibabel.load(file), nibabel.load(larger / "imagesTr" / file.name)
        np.testing.assert_array_equal(first.affine, second.affine)
        np.testing.assert_array_equal(np.asanyarray(first.dataobj), np.asanyarray(second.dataobj))


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        ("amoss", {}, r"kind of the phantoms: .*amos, btcv, brats, hippocampus.*Did you mean 'amos'"),
        ("amos", {"num_scans": 0}, r"num_scans of the phantoms: expected 1 to 400, got 0"),
        ("amos", {"num_scans": 401}, "got 401"),
        ("amos", {"seed": -1}, r"seed of the phantoms: expected 0 or more"),
        ("amos", {"shape": (8, 8, 8)}, r"shape of a phantom"),
        ("hippocampus", {"shape": (48, 64, 64)}, r"shape of the phantoms: expected none for hippocampus"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, kind, values, text):
    with pytest.raises(SettingError, match=text):
        write_phantoms(tmp_path / "set", kind, **{"num_scans": 1, "progress": False, **values})
    assert list(tmp_path.iterdir()) == []

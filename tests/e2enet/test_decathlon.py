"""The Decathlon reader: what it reads, and that it names every defect of a set at once."""

import gzip
import json
from itertools import pairwise

import nibabel
import numpy as np
import pytest

from dstlib.errors import DataError
from dstlib.zoo.e2enet.data.cases import split
from dstlib.zoo.e2enet.data.decathlon import read_decathlon

SHAPE = (5, 6, 7)  # x, y, z
AFFINE = np.diag([0.5, 0.75, 3.0, 1.0])


def save(file, voxels, affine=AFFINE):
    file.parent.mkdir(exist_ok=True, parents=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), file)


def write_manifest(folder, **changes):
    content = {
        "name": "toy",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "abc"],
    }
    content |= changes
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def folder(tmp_path):
    """A sound set of three cases: a, b, c."""
    rng = np.random.default_rng(0)
    write_manifest(tmp_path)
    for name in "abc":
        save(tmp_path / f"imagesTr/{name}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        save(tmp_path / f"labelsTr/{name}.nii.gz", rng.integers(0, 3, SHAPE).astype(np.uint8))
    return tmp_path


def refusal(folder) -> str:
    with pytest.raises(DataError) as error:
        read_decathlon(folder, progress=False)
    return str(error.value)


# ---- what it reads


def test_axes_spacing_and_types(folder):
    voxels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    label = np.zeros(SHAPE, np.uint8)
    label[4, 0, 6] = 2
    save(folder / "imagesTr/b.nii.gz", voxels)
    save(folder / "labelsTr/b.nii.gz", label)
    cases = read_decathlon(folder, progress=False)
    assert (cases.name, cases.channels, cases.classes) == ("toy", ("CT",), ("liver", "tumour"))
    assert [c.name for c in cases.cases] == ["a", "b", "c"]
    case = cases.cases[1]
    assert case.image.shape == (1, 7, 6, 5)
    assert (case.image.dtype, case.label.dtype) == (np.float32, np.uint8)
    assert case.image[0, 6, 1, 4] == voxels[4, 1, 6]  # (D, H, W) = (z, y, x)
    assert np.argwhere(case.label).tolist() == [[6, 0, 4]]
    assert case.spacing == (3.0, 0.75, 0.5)
    assert case.image.flags.c_contiguous
    assert case.label.flags.c_contiguous


def test_four_dimensional_images_are_channels(folder):
    write_manifest(folder, modality={"1": "T1w", "0": "FLAIR"})
    for name in "abc":
        save(folder / f"imagesTr/{name}.nii.gz", np.stack([np.zeros(SHAPE), np.ones(SHAPE)], -1).astype(np.float32))
    cases = read_decathlon(folder, progress=False)
    assert cases.channels == ("FLAIR", "T1w")
    assert cases.cases[0].image.shape == (2, 7, 6, 5)
    assert cases.cases[0].image.mean((1, 2, 3)).tolist() == [0.0, 1.0]


def test_labels_stored_as_floats_and_scaled_integers_are_read(folder):
    label = np.random.default_rng(1).integers(0, 3, SHAPE)
    save(folder / "labelsTr/a.nii.gz", label.astype(np.float64))
    scaled = nibabel.Nifti1Image(np.ones(SHAPE, np.int16), AFFINE)
    scaled.header.set_slope_inter(1.0, -1024.0)
    nibabel.save(scaled, folder / "imagesTr/a.nii.gz")
    case = read_decathlon(folder, progress=False).cases[0]
    np.testing.assert_array_equal(case.label, label.T)
    assert np.unique(case.image).size == 1


def test_a_label_without_foreground_is_kept(folder):
    save(folder / "labelsTr/b.nii.gz", np.zeros(SHAPE, np.uint8))
    cases = read_decathlon(folder, progress=False).cases
    assert len(cases) == 3
    assert not cases[1].label.any()


def test_unlisted_files_do_no_harm(folder):
    for junk in ("imagesTr/._a.nii.gz", "labelsTr/._a.nii.gz", "._dataset.json", "imagesTr/notes.txt"):
        (folder / junk).write_bytes(b"\x00\x05\x16\x07")
    assert len(read_decathlon(folder, progress=False).cases) == 3


def test_rounded_headers_are_the_same_place(folder):
    moved = AFFINE.copy()
    moved[1, 3] += 0.04  # mm: less than a tenth of the smallest voxel edge, 0.5 mm
    save(folder / "labelsTr/a.nii.gz", np.zeros(SHAPE, np.uint8), moved @ np.diag([1 + 1e-6, 1, 1, 1]))
    assert len(read_decathlon(folder, progress=False).cases) == 3


def test_progress_goes_to_stderr(folder, capsys):
    read_decathlon(str(folder))
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading toy" in err
    assert "3/3" in err


# ---- what it refuses


def test_no_folder_and_no_manifest(tmp_path):
    assert "got no such folder" in refusal(tmp_path / "absent")
    assert "got no dataset.json in it" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"labels": ', "\xff"])
def test_a_manifest_that_is_not_json(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    message = refusal(tmp_path)
    assert "dataset.json: expected valid JSON, got" in message
    assert "Restore the file" in message


def test_all_that_a_manifest_lacks_is_said_at_once(folder):
    write_manifest(folder, modality=None, labels={"background": 0}, training=[])
    message = refusal(folder)
    assert "'modality' is None" in message
    assert "'labels' is {'background': 0}" in message
    assert "'training' is []" in message


@pytest.mark.parametrize("content", ["[]", '"text"', "3"])
def test_a_manifest_of_another_kind(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    assert "where an object belongs" in refusal(tmp_path)


def test_more_classes_than_a_byte_holds(folder):
    write_manifest(folder, labels={str(i): f"organ {i}" for i in range(257)})
    assert "'labels' has 257 entries" in refusal(folder)


def test_entries_without_files(folder):
    write_manifest(folder, training=[{"image": "imagesTr/a.nii.gz"}, "imagesTr/b.nii.gz"])
    message = refusal(folder)
    assert "entry 0 of 'training'" in message
    assert "entry 1 of 'training'" in message


def break_missing(folder):
    (folder / "imagesTr/b.nii.gz").unlink()
    return "imagesTr/b.nii.gz is missing"


def break_missing_label(folder):
    (folder / "labelsTr/b.nii.gz").unlink()
    return "labelsTr/b.nii.gz is missing"


def break_truncated(folder):
    file = folder / "imagesTr/b.nii.gz"
    file.write_bytes(file.read_bytes()[:-200])
    return "imagesTr/b.nii.gz cannot be read"


def break_cut_volume(folder):
    """A sound gzip of half a volume."""
    file = folder / "imagesTr/b.nii.gz"
    whole = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(whole[: len(whole) // 2]))
    return "imagesTr/b.nii.gz cannot be read"


def break_damaged(folder):
    file = folder / "labelsTr/b.nii.gz"
    content = bytearray(file.read_bytes())
    content[20:40] = bytes(20)
    file.write_bytes(content)
    return "labelsTr/b.nii.gz cannot be read"


def break_checksum(folder):
    """One bit of the content is another one: only the checksum at the very end can tell."""
    file = folder / "imagesTr/b.nii.gz"
    content = bytearray(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=0))
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "imagesTr/b.nii.gz cannot be read: CRC"


def break_foreign(folder):
    (folder / "imagesTr/b.nii.gz").write_bytes(b"<html>404 not found</html>")
    return "imagesTr/b.nii.gz cannot be read"


def break_empty(folder):
    (folder / "imagesTr/b.nii.gz").write_bytes(b"")
    return "imagesTr/b.nii.gz cannot be read"


def break_colour(folder):
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    save(folder / "imagesTr/b.nii.gz", rgb)
    return "imagesTr/b.nii.gz has voxels of type"


def break_shape(folder):
    save(folder / "labelsTr/b.nii.gz", np.zeros((5, 6, 8), np.uint8))
    return "labelsTr/b.nii.gz has shape (5, 6, 8), but its image has (5, 6, 7)"


def break_affine(folder):
    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    save(folder / "labelsTr/b.nii.gz", np.zeros(SHAPE, np.uint8), moved)
    return "labelsTr/b.nii.gz lies 0.5 mm away from its image"


def break_flip(folder):
    save(folder / "labelsTr/b.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE * [[-1], [1], [1], [1]])
    return "labelsTr/b.nii.gz lies 4 mm away"  # 5 voxels of 0.5 mm: the last centre moves from 2 to -2


def break_classes(folder):
    save(folder / "labelsTr/b.nii.gz", np.full(SHAPE, 3, np.uint8))
    return "labelsTr/b.nii.gz has values 3, but dataset.json numbers its classes 0 to 2"


def break_negative(folder):
    save(folder / "labelsTr/b.nii.gz", np.full(SHAPE, -1, np.int16))
    return "labelsTr/b.nii.gz has values -1, but"


def break_fractions(folder):
    save(folder / "labelsTr/b.nii.gz", np.full(SHAPE, 0.5, np.float32))
    return "labelsTr/b.nii.gz has values that are not whole numbers: 0.5"


def break_nan_label(folder):
    save(folder / "labelsTr/b.nii.gz", np.full(SHAPE, np.nan, np.float32))
    return "labelsTr/b.nii.gz has values that are not whole numbers: nan"


def break_infinite_label(folder):
    save(folder / "labelsTr/b.nii.gz", np.full(SHAPE, np.inf, np.float32))
    return "labelsTr/b.nii.gz has values inf"


def break_nan(folder):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[0, 0, :2] = np.nan, np.inf
    save(folder / "imagesTr/b.nii.gz", voxels)
    return "imagesTr/b.nii.gz has 2 voxel(s) that are NaN"


def break_range(folder):
    save(folder / "imagesTr/b.nii.gz", np.full(SHAPE, 1e300))
    return "imagesTr/b.nii.gz has 210 voxel(s) that are NaN, infinite or beyond float32"


def break_channels(folder):
    save(folder / "imagesTr/b.nii.gz", np.zeros((*SHAPE, 4), np.float32))
    return "imagesTr/b.nii.gz has 4 channel(s), but dataset.json names 1"


def break_dimensions(folder):
    save(folder / "imagesTr/b.nii.gz", np.zeros((5, 6), np.float32))
    return "imagesTr/b.nii.gz has shape (5, 6), but an image is (x, y, z)"


def break_voxel_size(folder):
    flat = np.diag([0.5, 0.0, 3.0, 1.0])
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), None)
    image.header.set_sform(flat, code=1)
    nibabel.save(image, folder / "imagesTr/b.nii.gz")
    return "imagesTr/b.nii.gz has voxels of [0.5, 0.0, 3.0] mm"


def break_twice(folder):
    entries = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "abbc"]
    write_manifest(folder, training=entries)
    return "listed 2 times under 'training'"


BREAKS = [value for name, value in list(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda f: f.__name__.removeprefix("break_"))
def test_every_defect_is_refused_by_name(folder, damage):
    expected = damage(folder)
    message = refusal(folder)
    assert message.startswith(f"data set of {folder}: expected cases whose image and label")
    row = next(line for line in message.splitlines() if expected in line)
    assert row.startswith("  b  ")
    assert "in 1 of" in message
    assert "Repair or restore these files, or remove the cases from 'training'" in message


def test_all_defects_are_reported_together(folder):
    (folder / "imagesTr/a.nii.gz").write_bytes(b"")
    (folder / "labelsTr/a.nii.gz").unlink()
    save(folder / "imagesTr/b.nii.gz", np.full(SHAPE, np.nan, np.float32))
    save(folder / "labelsTr/b.nii.gz", np.full((5, 6, 8), 9, np.uint8))
    message = refusal(folder)
    assert "got 5 defect(s) in 2 of 3 cases" in message
    rows = [line.split()[0] for line in message.splitlines() if line.startswith("  ")]
    assert rows == ["a", "a", "b", "b", "b"]


# ---- the real scans


@pytest.mark.data
def test_the_real_hippocampus_scans(hippocampus):
    cases = read_decathlon(hippocampus, progress=False)
    assert len(cases.cases) == 208
    assert cases.channels == ("MRI",)
    assert cases.classes == ("Anterior", "Posterior")
    for case in cases.cases:
        assert case.spacing == (1.0, 1.0, 1.0)
        assert np.unique(case.label).tolist() == [0, 1, 2]
        assert case.image.min() >= 0
    shapes = np.array([case.label.shape for case in cases.cases])
    assert shapes.min(0).tolist() == [24, 40, 31]  # (D, H, W)
    assert shapes.max(0).tolist() == [45, 58, 42]
    highest = [case.image.max() for case in cases.cases]
    assert min(highest) < 256 < max(highest)  # both families of intensities came through


@pytest.mark.data
def test_the_real_scans_are_the_training_part_of_the_published_fold(hippocampus):
    """The 52 cases that are not here were held out by nnU-Net's fold 0 of the 260: our split must agree.

    Their ids are unknown, but each must fit into the gap between the two neighbours that are here.
    """
    cases = read_decathlon(hippocampus, progress=False).cases
    here = sorted(int(case.name.removeprefix("hippocampus_")) for case in cases)
    places = [int(place) for place in split([f"{i:03d}" for i in range(260)], fold=0)[0]]
    for (a, b), (p, q) in zip(pairwise(here), pairwise(places), strict=True):
        assert b - a >= q - p, f"{q - p - 1} held-out case(s) between hippocampus {a} and {b}"

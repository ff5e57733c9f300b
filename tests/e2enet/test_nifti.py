"""NIfTI in and out: what is read, that every defect of a case is named, and that labels come back bit for bit."""

import gzip
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from dstlib.errors import DataError, StateError, number_of
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans.header import header_at
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, read_label, read_scan, write_label

SHAPE = (5, 6, 7)  # x, y, z
AFFINE = np.diag([0.5, 0.75, 3.0, 1.0])


TWO_CLASSES = Labels.consecutive(2)


def save(file, voxels, affine=AFFINE):
    file.parent.mkdir(exist_ok=True, parents=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), file)


@pytest.fixture
def case(tmp_path):
    """A sound case: one channel, two classes."""
    rng = np.random.default_rng(0)
    files = CaseFiles(name="b", images=(tmp_path / "image.nii.gz",), label=tmp_path / "label.nii.gz")
    save(files.images[0], rng.normal(size=SHAPE).astype(np.float32))
    save(files.label, rng.integers(0, 3, SHAPE).astype(np.uint8))
    return files


def read(case, num_channels=1, labels=TWO_CLASSES):
    return read_scan(case, num_channels=num_channels, labels=labels)


def refusal(case, **numbers) -> list[str]:
    """The defects in the message, without the folder."""
    with pytest.raises(DataError) as error:
        read(case, **numbers)
    head, *rows = str(error.value).splitlines()
    assert head.startswith("files of case 'b': expected files that can be read and fit each other, got")
    assert f"got {number_of(len(rows), 'defect')}. Repair or restore these, or leave the case out:" in head
    return [row.strip().removeprefix(f"{case.images[0].parent}/") for row in rows]


def oddities(case) -> list[str]:
    examined = examine_scan(case, num_channels=1, labels=TWO_CLASSES)
    assert examined.scan is not None
    return [f"{fault.file.name} {fault.text}" for fault in examined.warnings]


# ---- what is read


def test_axes_spacing_and_types(case):
    voxels = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    label = np.zeros(SHAPE, np.uint8)
    label[4, 0, 6] = 2
    save(case.images[0], voxels)
    save(case.label, label)
    scan = read(case)
    assert scan.name == "b"
    assert scan.image.shape == (1, 7, 6, 5)
    assert (scan.image.dtype, scan.label.dtype, scan.affine.dtype) == (np.float32, np.uint8, np.float64)
    assert scan.image[0, 6, 1, 4] == voxels[4, 1, 6]  # (D, H, W) = (z, y, x)
    assert np.argwhere(scan.label).tolist() == [[6, 0, 4]]
    assert scan.spacing == (3.0, 0.75, 0.5)
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert scan.image.flags.c_contiguous
    assert scan.label.flags.c_contiguous
    assert scan.image.flags.writeable
    assert oddities(case) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII", ".NII.GZ"])
def test_every_number_type_and_ending(tmp_path, dtype, ending):
    voxels = np.random.default_rng(0).integers(0, 100, SHAPE).astype(dtype)
    content = nibabel.Nifti1Image(voxels, AFFINE, dtype=dtype).to_bytes()
    file = tmp_path / f"scan{ending}"
    file.write_bytes(gzip.compress(content) if ending.lower().endswith("gz") else content)
    scan = read(CaseFiles(name="b", images=(file,)), labels=None)
    np.testing.assert_array_equal(scan.image[0], voxels.T)
    assert scan.label is None


def test_nifti_2_and_big_endian_files(case):
    voxels = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    second = nibabel.Nifti2Image(voxels, AFFINE)
    nibabel.save(second, case.images[0])
    np.testing.assert_array_equal(read(case).image[0], voxels.T)
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">f4")
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE, header), case.images[0])
    assert read(case).image.dtype == np.dtype("=f4")
    np.testing.assert_array_equal(read(case).image[0], voxels.T)


def test_four_dimensional_images_are_channels(case):
    save(case.images[0], np.stack([np.zeros(SHAPE), np.ones(SHAPE)], -1).astype(np.float32))
    image = read(case, num_channels=2).image
    assert image.shape == (2, 7, 6, 5)
    assert image.mean((1, 2, 3)).tolist() == [0.0, 1.0]


def test_a_file_per_channel(case, tmp_path):
    files = tuple(tmp_path / f"b_{i:04d}.nii.gz" for i in range(3))
    for i, file in enumerate(files):
        save(file, np.full(SHAPE, i, np.int16))
    image = read(CaseFiles(name="b", images=files, label=case.label), num_channels=3).image
    assert image[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert image.flags.c_contiguous


def test_labels_stored_as_floats_with_a_channel_and_scaled_integers(case):
    label = np.random.default_rng(1).integers(0, 3, SHAPE)
    save(case.label, label.astype(np.float64)[..., None])
    scaled = nibabel.Nifti1Image(np.full(SHAPE, 24, np.int16), AFFINE)
    scaled.header.set_slope_inter(2.0, -1024.0)
    nibabel.save(scaled, case.images[0])
    voxels = nibabel.load(case.images[0]).get_fdata()
    scan = read(case)
    np.testing.assert_array_equal(scan.label, label.T)
    np.testing.assert_array_equal(scan.image[0], voxels.T)


@pytest.mark.parametrize(
    ("dtype", "slope", "inter"),
    [
        (np.int16, 0.01, 0),
        (np.int16, 0.1, -1024),
        (np.float32, 0.99999994, 0),
        (np.float32, 1, 0.0009),
        (np.uint8, 0.5, 0),
    ],
)
def test_labels_that_are_whole_numbers_but_for_rounding(case, dtype, slope, inter):
    """As other programs write them: scaled, so that a voxel of 1 is read as 0.99999998, or computed in float32."""
    label = np.random.default_rng(1).integers(0, 3, SHAPE)
    stored = np.rint((label - inter) / slope) if np.issubdtype(dtype, np.integer) else label * np.float32(slope) + inter
    image = nibabel.Nifti1Image(stored.astype(dtype), AFFINE)
    content = bytearray(image.to_bytes())
    if np.issubdtype(dtype, np.integer):
        content[112:120] = np.array(
            [slope, inter], "<f4"
        ).tobytes()  # scl_slope and scl_inter, which nibabel would hide
    case.label.write_bytes(gzip.compress(content))
    np.testing.assert_array_equal(read(case).label, label.T)


def test_a_refusal_prints_the_digits_that_offend(case):
    save(case.label, np.full(SHAPE, 1.0011, np.float32))
    assert refusal(case) == ["label.nii.gz has values that are not whole numbers: 1.0011"]
    save(case.label, np.full(SHAPE, 1.00100001))
    assert refusal(case) == ["label.nii.gz has values that are not whole numbers: 1.00100001"]
    save(case.label, np.full(SHAPE, 3.0000002, np.float32))
    assert refusal(case) == ["label.nii.gz has values 3.0000002, but the classes are numbered 0 to 2"]


def test_rounded_headers_are_the_same_place(case):
    moved = AFFINE.copy()
    moved[1, 3] += 0.04  # mm: less than a tenth of the smallest voxel edge, 0.5 mm
    save(case.label, np.ones(SHAPE, np.uint8), moved @ np.diag([1 + 1e-6, 1, 1, 1]))
    np.testing.assert_array_equal(read(case).affine, AFFINE)  # the image's


@pytest.mark.data
def test_the_real_hippocampus_scans(hippocampus):
    cases = read_manifest(hippocampus).train
    assert len(cases) == 208
    scans = [read(case) for case in cases]
    for scan in scans:
        assert scan.spacing == (1.0, 1.0, 1.0)
        assert np.unique(scan.label).tolist() == [0, 1, 2]
        assert scan.image.min() >= 0
    shapes = np.array([scan.label.shape for scan in scans])
    assert shapes.min(0).tolist() == [24, 40, 31]  # (D, H, W)
    assert shapes.max(0).tolist() == [45, 58, 42]
    highest = [scan.image.max() for scan in scans]
    assert min(highest) < 256 < max(highest)  # both families of intensities came through


# ---- what is odd, but legal


def test_a_label_without_foreground_is_odd(case):
    save(case.label, np.zeros(SHAPE, np.uint8))
    assert oddities(case) == ["label.nii.gz has no foreground"]


def test_a_constant_channel_is_odd(case):
    save(case.images[0], np.full(SHAPE, -1024, np.int16))
    assert oddities(case) == ["image.nii.gz is constant in channel 0: every voxel is -1024"]


def test_a_header_that_states_no_place_is_odd(case):
    for file in (case.images[0], case.label):
        image = nibabel.load(file)
        unplaced = nibabel.Nifti1Image(np.asanyarray(image.dataobj), None)
        unplaced.header.set_zooms((0.5, 0.75, 3.0))
        nibabel.save(unplaced, file)
    for geometry, towards, whose in (("itk", "back", "ITK's programs and nnU-Net"), ("sform", "front", "nibabel's")):
        (told,) = oddities(replace(case, geometry=geometry))
        guess = (
            f"image.nii.gz states no place (sform and qform codes are 0): its axes are taken to lead left, {towards}"
        )
        assert told.startswith(f"{guess} and top, as by {whose}")
    by_itk, by_nibabel = (read(replace(case, geometry=geometry)).affine for geometry in ("itk", "sform"))
    np.testing.assert_array_equal(by_itk, np.diag([-0.5, -0.75, 3.0, 1.0]))
    np.testing.assert_array_equal(by_nibabel, nibabel.load(case.images[0]).affine)


# ---- what is refused


def break_missing(case):
    case.images[0].unlink()
    return "image.nii.gz is missing"


def break_missing_label(case):
    case.label.unlink()
    return "label.nii.gz is missing"


def break_truncated(case):
    case.images[0].write_bytes(case.images[0].read_bytes()[:-200])
    return "image.nii.gz cannot be read: Compressed file ended"


def break_cut_volume(case):
    """A sound gzip of half a volume."""
    whole = gzip.decompress(case.images[0].read_bytes())
    case.images[0].write_bytes(gzip.compress(whole[: len(whole) // 2]))
    return f"image.nii.gz cannot be read: it ends after {len(whole) // 2} of {len(whole)} bytes"


def break_cut_header(case):
    whole = gzip.decompress(case.images[0].read_bytes())
    case.images[0].write_bytes(gzip.compress(whole[:100]))
    return "image.nii.gz cannot be read: its 100 bytes do not begin as NIfTI does"


def break_header_of_a_vast_volume(case):
    """Dimensions that would need terabytes are refused before anyone asks for that memory."""
    whole = bytearray(gzip.decompress(case.images[0].read_bytes()))
    whole[42:48] = np.array([32000, 32000, 32000], "<i2").tobytes()
    case.images[0].write_bytes(gzip.compress(whole))
    size = case.images[0].stat().st_size
    return f"image.nii.gz cannot be read: its {size} bytes cannot unpack to the 131072000000352 of its header"


def break_vast_file(case):
    """Terabytes that take no room on the disk."""
    with open(case.images[0], "ab") as file:
        file.truncate(2**41)
    return f"image.nii.gz cannot be read: [Errno 27] {2**41} bytes, of"


def break_unknown_type(case):
    whole = bytearray(gzip.decompress(case.images[0].read_bytes()))
    whole[70:72] = np.array([3], "<i2").tobytes()
    case.images[0].write_bytes(gzip.compress(whole))
    return "image.nii.gz has voxels of an unknown type, 3"


def break_more_than_promised(case):
    """A file that fills the memory of whoever unpacks it to the end."""
    whole = gzip.decompress(case.images[0].read_bytes())
    case.images[0].write_bytes(gzip.compress(whole + bytes(2**26), compresslevel=1))
    return "image.nii.gz cannot be read: it unpacks to more than the 1192 bytes that its header promises"


def break_one_byte_more(case):
    case.label.write_bytes(gzip.compress(gzip.decompress(case.label.read_bytes()) + b"\0"))
    return "label.nii.gz cannot be read: it unpacks to more than the 562 bytes that its header promises"


def break_one_byte_less(case):
    case.label.write_bytes(gzip.compress(gzip.decompress(case.label.read_bytes())[:-1]))
    return "label.nii.gz cannot be read: it ends after 561 of 562 bytes"


def break_negative_dimensions(case):
    whole = bytearray(gzip.decompress(case.images[0].read_bytes()))
    whole[42:46] = np.array([-5, -6], "<i2").tobytes()
    case.images[0].write_bytes(gzip.compress(whole))
    return "image.nii.gz has shape (-5, -6, 7)"


def break_infinite_offset(case):
    whole = bytearray(gzip.decompress(case.images[0].read_bytes()))
    whole[108:112] = np.array([np.inf], "<f4").tobytes()
    case.images[0].write_bytes(gzip.compress(whole))
    return "image.nii.gz cannot be read: cannot convert float infinity to integer"


def break_pipe(case):
    case.images[0].unlink()
    os.mkfifo(case.images[0])
    return "image.nii.gz cannot be read: [Errno 22] a pipe or a device, not a file"


def break_damaged(case):
    content = bytearray(case.label.read_bytes())
    content[20:40] = bytes(20)
    case.label.write_bytes(content)
    return "label.nii.gz cannot be read"


def break_checksum(case):
    """One bit of the content is another one: only the checksum at the very end can tell."""
    content = bytearray(gzip.compress(gzip.decompress(case.images[0].read_bytes()), compresslevel=0))
    content[len(content) // 2] ^= 1
    case.images[0].write_bytes(content)
    return "image.nii.gz cannot be read: CRC"


def break_foreign(case):
    case.images[0].write_bytes(b"<html>404 not found</html>")
    return "image.nii.gz cannot be read: Not a gzipped file"


def break_empty(case):
    case.images[0].write_bytes(b"")
    return "image.nii.gz cannot be read"


def break_folder(case):
    case.images[0].unlink()
    case.images[0].mkdir()
    return "image.nii.gz cannot be read"


def break_colour(case):
    save(case.images[0], np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))
    return "image.nii.gz has voxels of type"


def break_shape(case):
    save(case.label, np.zeros((5, 6, 8), np.uint8))
    return "label.nii.gz has shape (5, 6, 8), but its image has (5, 6, 7)"


def break_flat_label(case):
    save(case.label, np.zeros((5, 6), np.uint8))
    return "label.nii.gz has shape (5, 6), but a label is (x, y, z)"


def break_affine(case):
    moved = AFFINE.copy()
    moved[0, 3] = 0.5
    save(case.label, np.zeros(SHAPE, np.uint8), moved)
    return "label.nii.gz lies 0.5 mm away from its image"


def break_flip(case):
    save(case.label, np.zeros(SHAPE, np.uint8), AFFINE * [[-1], [1], [1], [1]])
    return "label.nii.gz lies 4 mm away"  # 5 voxels of 0.5 mm: the last centre moves from 2 to -2


def break_classes(case):
    save(case.label, np.full(SHAPE, 3, np.uint8))
    return "label.nii.gz has values 3, but the classes are numbered 0 to 2"


def break_negative(case):
    save(case.label, np.full(SHAPE, -1, np.int16))
    return "label.nii.gz has values -1, but"


def break_wrapped(case):
    """257 is 1 in a byte: it must be refused before it is cast."""
    save(case.label, np.full(SHAPE, 257, np.int16))
    return "label.nii.gz has values 257, but"


def break_fractions(case):
    save(case.label, np.full(SHAPE, 0.5, np.float32))
    return "label.nii.gz has values that are not whole numbers: 0.5"


def break_nan_label(case):
    save(case.label, np.full(SHAPE, np.nan, np.float32))
    return "label.nii.gz has values that are not whole numbers: nan"


def break_infinite_label(case):
    save(case.label, np.full(SHAPE, np.inf, np.float32))
    return "label.nii.gz has values inf"


def break_nan(case):
    voxels = np.zeros(SHAPE, np.float32)
    voxels[0, 0, :2] = np.nan, np.inf
    save(case.images[0], voxels)
    return "image.nii.gz has 2 voxel(s) that are NaN"


def break_range(case):
    save(case.images[0], np.full(SHAPE, 1e300))
    return "image.nii.gz has 210 voxel(s) that are NaN, infinite or beyond float32"


def break_channels(case):
    save(case.images[0], np.zeros((*SHAPE, 4), np.float32))
    return "image.nii.gz has 4 channel(s), but the data set names 1"


def break_dimensions(case):
    save(case.images[0], np.zeros((5, 6), np.float32))
    save(case.label, np.zeros((5, 6, 1), np.uint8))
    return "image.nii.gz has shape (5, 6), but an image is (x, y, z)"


def place(file, affine):
    """Gives a file an affine that nibabel would not write by itself."""
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), None)
    image.header.set_sform(affine, code=1)
    nibabel.save(image, file)


def break_voxel_size(case):
    for file in (case.images[0], case.label):
        place(file, np.diag([0.5, 0.0, 3.0, 1.0]))
    return "image.nii.gz has voxels of [0.5, 0.0, 3.0] mm"


def break_axes_in_a_plane(case):
    flat = np.eye(4)
    flat[:3, 2] = 1.0, 1.0, 0.0
    for file in (case.images[0], case.label):
        place(file, flat)
    return "image.nii.gz has axes that lie in one plane"


def break_rotation(case):
    """ITK makes a rotation of it, nibabel refuses it."""
    content = bytearray(nibabel.Nifti1Image(np.zeros(SHAPE, np.float32), AFFINE).to_bytes())
    content[252:260] = np.array([1, 0], "<i2").tobytes() + np.float32(1.5).tobytes()  # qform_code, sform_code, b
    case.images[0].write_bytes(gzip.compress(content))
    return "image.nii.gz has a quaternion (1.5, 0.0, 0.0) in its qform, which is longer than 1 and no rotation"


def break_affine_of_nan(case):
    for file in (case.images[0], case.label):
        place(file, np.diag([0.5, np.nan, 3.0, 1.0]))
    return "image.nii.gz has voxels of [0.5, nan, 3.0] mm"


BREAKS = [value for name, value in list(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("damage", BREAKS, ids=lambda f: f.__name__.removeprefix("break_"))
def test_every_defect_is_refused_by_name(case, damage):
    expected = damage(case)
    assert any(row.startswith(expected) for row in refusal(case)), refusal(case)


def test_all_defects_of_a_case_are_in_one_error(case):
    save(case.images[0], np.full((*SHAPE, 2), np.nan, np.float32))
    save(case.label, np.full((5, 6, 8), 9, np.uint8))
    assert refusal(case) == [
        "image.nii.gz has 2 channel(s), but the data set names 1",
        "image.nii.gz has 420 voxel(s) that are NaN, infinite or beyond float32",
        "label.nii.gz has values 9, but the classes are numbered 0 to 2",
        "label.nii.gz has shape (5, 6, 8), but its image has (5, 6, 7)",
    ]


def test_channels_that_do_not_fit_each_other(case, tmp_path):
    files = tuple(tmp_path / f"b_{i:04d}.nii.gz" for i in range(4))
    save(files[0], np.zeros(SHAPE, np.float32))
    save(files[1], np.zeros((5, 6, 8), np.float32))
    save(files[2], np.zeros(SHAPE, np.float32), AFFINE @ np.diag([1, 1, -1, 1]))
    several = CaseFiles(name="b", images=files, label=case.label)
    assert refusal(several, num_channels=4) == [
        "b_0003.nii.gz is missing",
        "b_0001.nii.gz has shape (5, 6, 8), but its first channel b_0000.nii.gz has (5, 6, 7)",
        "b_0002.nii.gz lies 36 mm away from its first channel b_0000.nii.gz: "
        "the affines differ by more than rounding",  # 7 voxels of 3 mm: the last centre moves from 18 to -18
    ]


def test_a_case_without_a_label_is_read_only_without(case):
    bare = CaseFiles(name="b", images=case.images)
    assert refusal(bare) == ["image.nii.gz has no label"]
    assert read(bare, labels=None).label is None


@examples(20, 60)
@given(changes=st.dictionaries(st.integers(0, 400), st.integers(0, 255), min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # nibabel's arithmetic with the numbers of a broken header
def test_a_damaged_header_is_refused_or_read_but_never_crashes(tmp_path_factory, changes):
    """A file without a checksum, with any bytes changed: a defect, or a sound scan of that other header."""
    file = tmp_path_factory.mktemp("damaged") / "a.nii"
    content = bytearray(nibabel.Nifti1Image(np.arange(210, dtype=np.int16).reshape(SHAPE), AFFINE).to_bytes())
    for place, value in changes.items():
        content[place] = value
    file.write_bytes(content)
    examined = examine_scan(CaseFiles(name="a", images=(file,)), num_channels=1, labels=None)
    assert (examined.scan is None) == bool(examined.defects)
    if examined.scan is not None:
        assert np.isfinite(examined.scan.image).all()
        assert all(size > 0 for size in examined.scan.spacing)
    shutil.rmtree(file.parent)


# ---- writing


@st.composite
def affines(draw):
    """Any rotation of positive spacings, with flips and an offset: as an sform stores it, in float32."""
    angles = [draw(st.floats(-3.25, 3.25)) for _ in range(3)]
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [k for k in range(3) if k != axis]
        turn[[i, j, i, j], [i, j, j, i]] = np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)
        rotation = rotation @ turn
    sizes = [draw(st.floats(0.125, 8, width=32)) * draw(st.sampled_from([1, -1])) for _ in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = rotation * sizes
    affine[:3, 3] = [draw(st.floats(-500, 500, width=32)) for _ in range(3)]
    return affine.astype(np.float32).astype(np.float64)


@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    affine=affines(),
    largest=st.integers(0, 255),
    seed=st.integers(0, 2**16),
)
def test_a_written_label_comes_back_bit_for_bit(tmp_path_factory, shape, affine, largest, seed):
    file = tmp_path_factory.mktemp("label") / "a.nii.gz"
    label = np.random.default_rng(seed).integers(0, largest + 1, shape).astype(np.uint8)
    write_label(file, label, header_at(affine, label.shape[::-1]))
    again = read_label(file, geometry="sform")
    np.testing.assert_array_equal(again.voxels.T, label)
    assert again.voxels.dtype == np.uint8
    np.testing.assert_array_equal(again.affine, affine)
    assert [f.name for f in file.parent.iterdir()] == ["a.nii.gz"]


def test_a_label_read_with_its_scan_is_written_as_it_was(case, tmp_path):
    scan = read(case)
    write_label(tmp_path / "again.nii.gz", scan.label, scan.place)
    before, after = nibabel.load(case.label), nibabel.load(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(after.dataobj), np.asanyarray(before.dataobj))
    np.testing.assert_array_equal(after.affine, before.affine)
    assert after.get_data_dtype() == np.uint8
    assert after.header.get_xyzt_units()[0] == before.header.get_xyzt_units()[0] == "unknown"


def test_the_same_label_makes_the_same_bytes(tmp_path):
    label = np.ones((2, 3, 4), np.uint8)
    for name in ("a", "b"):
        write_label(tmp_path / f"{name}.nii.gz", label, header_at(AFFINE, (4, 3, 2)))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("a.nii.gz", np.zeros((2, 2, 2), np.int64), "got int64 (2, 2, 2) in the place of (2, 2, 2)"),
        ("a.nii.gz", np.zeros((1, 2, 2, 2), np.uint8), "got uint8 (1, 2, 2, 2)"),
        ("a.nii.gz", np.zeros((2, 2, 3), np.uint8), "got uint8 (2, 2, 3) in the place of (2, 2, 2)"),
        ("a.nii", np.zeros((2, 2, 2), np.uint8), "has another ending than .nii.gz"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, label, text):
    with pytest.raises(DataError) as error:
        write_label(tmp_path / name, label, header_at(AFFINE, (2, 2, 2)))
    assert text in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StateError, match="expected a disk to write to"):
        write_label(tmp_path / "absent" / "a.nii.gz", np.ones((2, 2, 2), np.uint8), header_at(AFFINE, (2, 2, 2)))


@pytest.mark.parametrize(
    ("voxels", "text"),
    [
        (np.full(SHAPE, 256, np.int16), "has values 256, but the classes are numbered 0 to 255"),
        (np.zeros((5, 6), np.uint8), "has shape (5, 6), not (x, y, z)"),
    ],
)
def test_labels_that_cannot_be_read(tmp_path, voxels, text):
    save(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(DataError) as error:
        read_label(tmp_path / "a.nii.gz")
    assert f"{tmp_path / 'a.nii.gz'} {text}" in str(error.value)


def test_a_missing_label(tmp_path):
    with pytest.raises(DataError, match=r"absent\.nii\.gz is missing"):
        read_label(Path(tmp_path / "absent.nii.gz"))


def test_more_than_is_promised_is_not_unpacked(case):
    break_more_than_promised(case)
    tracemalloc.start()
    try:
        refusal(case)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_does_not_fit_into_memory_is_refused(case, ending, monkeypatch):
    file = case.images[0].parent / f"other{ending}"
    save(file, np.zeros((100, 100, 100), np.int16))
    case = CaseFiles(name="b", images=(file,))
    for limit, fits in ((6_000_352, True), (6_000_351, False)):  # 2 bytes as stored, 4 as read
        monkeypatch.setattr("dstlib.zoo.e2enet.data.scans.unpacking.available_memory", lambda limit=limit: limit)
        examined = examine_scan(case, num_channels=1, labels=None)
        assert (examined.scan is not None) == fits
    assert examined.defects[0].text == "cannot be read: it asks for 6000352 bytes of memory, of which 6000351 are left"


@examples(60, 300)
@given(
    patches=st.lists(st.tuples(st.integers(0, 351), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.integers(-40, 0),
    packed=st.booleans(),
    second=st.booleans(),
)
def test_no_header_is_more_than_a_defect(tmp_path_factory, patches, cut, packed, second):
    kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    whole = bytearray(kind(np.ones(SHAPE, np.int16), AFFINE).to_bytes())
    for at, value in patches:
        whole[at : at + len(value)] = value
    content = bytes(whole[: len(whole) + cut])
    file = tmp_path_factory.mktemp("nifti") / ("x.nii.gz" if packed else "x.nii")
    file.write_bytes(gzip.compress(content, compresslevel=1) if packed else content)
    examined = examine_scan(CaseFiles(name="x", images=(file,)), num_channels=1, labels=None)
    assert (examined.scan is None) == bool(examined.defects)
    if not patches:
        assert (examined.scan is None) == (cut < 0)

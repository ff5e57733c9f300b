"""Folders of DICOM slices: one volume in its place, or the reason why there is none."""

import locale
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import (
    CAPTURE,
    CT,
    ENHANCED_MR,
    MR,
    PET,
    SEGMENTATION,
    STRUCTURES,
    slice_tags,
    write_dicom,
    write_slice,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples

from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans import dicom, gdcm
from dstlib.zoo.e2enet.data.scans.dicom import Slice, place, read_series
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, read_label, write_label

sitk = pytest.importorskip("SimpleITK")

PIXELS = np.arange(30).reshape(6, 5) * 60 - 900  # as they are stored
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@pytest.fixture(scope="module")
def process():
    """One process for all of the tests here: it takes half a second to start."""
    with gdcm.decoder() as process:
        yield process


@pytest.fixture
def quick(process, monkeypatch):
    monkeypatch.setattr(dicom, "decoder", lambda: nullcontext(process))


def write_series(folder: Path, *, num: int = 5, step: float = 2.5, **changes: object) -> Path:
    """Writes slices of -900 and more by their numbers, along the patient; names tell nothing of the order."""
    for i in range(num):
        tags = slice_tags(i, np.array([10, 20, 30 + step * i]), **changes)
        write_slice(folder / f"IM_{(7 * i) % 11}", PIXELS + i, tags)
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        read_series(folder, None)
    return str(error.value)


# ---- one volume


def test_a_series_is_ordered_by_place(quick, tmp_path):
    volume = read_series(write_series(tmp_path / "case"), None)
    expected = np.stack([PIXELS.T + i - 1024 for i in range(5)], axis=-1)
    np.testing.assert_array_equal(volume.voxels, expected)
    assert volume.voxels.dtype == np.float32
    steps, origin = np.diag([0.5, 0.75, 2.5]), [10, 20, 30]
    np.testing.assert_allclose(volume.affine[:3, :3], LPS_TO_RAS @ steps, atol=1e-12)
    np.testing.assert_array_equal(volume.affine[:3, 3], LPS_TO_RAS @ origin)
    assert volume.odd == ()


def test_slices_below_the_folder_are_found(quick, tmp_path):
    write_series(tmp_path / "case" / "study" / "series")
    assert read_series(tmp_path / "case", None).voxels.shape == (5, 6, 5)


def test_each_slice_has_a_slope_of_its_own(quick, tmp_path):
    for i in range(4):
        tags = slice_tags(i, np.array([0, 0, 3.0 * i]), sop_class=PET, slope=0.25 + i / 8, intercept=i)
        write_slice(tmp_path / f"{i}.dcm", PIXELS, tags)
    voxels = read_series(tmp_path, None).voxels
    for i in range(4):
        np.testing.assert_array_equal(voxels[..., i], PIXELS.T * (0.25 + i / 8) + i)


@pytest.mark.parametrize("sop_class", [CT, MR, PET, CAPTURE])
def test_slopes_of_every_class(quick, tmp_path, sop_class):
    write_series(tmp_path, num=2, sop_class=sop_class, slope=2, intercept=7)
    np.testing.assert_array_equal(read_series(tmp_path, None).voxels[..., 0], PIXELS.T * 2 + 7)


@pytest.mark.parametrize("signed", [0, 1])
def test_numbers_with_a_sign_and_without(quick, tmp_path, signed):
    write_slice(tmp_path / "a", np.array([[0, 65535], [1, 2]]), slice_tags(1, np.zeros(3), signed=signed, intercept=0))
    assert read_series(tmp_path, None).voxels[1, 0, 0] == (-1 if signed else 65535)


@pytest.fixture
def same_locale():
    """Puts the locale back: GDCM sets that of the whole process to C when it writes a position."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
@pytest.mark.usefixtures("same_locale")
def test_packed_pictures(quick, tmp_path, kind):
    pixels = np.random.default_rng(0).integers(-1000, 1000, (64, 48)).astype(np.int16)
    for i in range(2):
        image = sitk.GetImageFromArray(pixels[None] + np.int16(i))
        image.SetSpacing((0.5, 0.75, 2.5))
        tags = {"0008|0060": "CT", "0008|0016": CT, "0020|000e": "1.2", "0020|0032": f"0\\0\\{5 - 2.5 * i}"}
        tags |= {"0020|0037": "1\\0\\0\\0\\1\\0", "0028|1053": "1", "0028|1052": "-1024"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(kind)
        writer.SetFileName(str(tmp_path / f"{i}.dcm"))
        writer.Execute(image)
    voxels = read_series(tmp_path, None).voxels
    np.testing.assert_array_equal(voxels[..., 0], pixels.T + 1)  # the lower one


@st.composite
def directions(draw):
    """Any two axes of a picture."""
    axes, _ = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 2**16))).normal(size=(3, 3)))
    return axes[:, 0], axes[:, 1]


@settings(max_examples=12, deadline=None)
@given(axes=directions(), spacing=st.tuples(*[st.floats(0.25, 4)] * 3), origin=st.tuples(*[st.floats(-300, 300)] * 3))
def test_what_lies_on_a_series_lies_on_it_in_every_program(process, tmp_path_factory, axes, spacing, origin):
    """The label of a series is read by ITK and nibabel where ITK has the series, sorted as it should be."""
    folder = tmp_path_factory.mktemp("series")
    normal, files = np.cross(*axes), []
    for i in range(3):
        tags = slice_tags(i, origin + normal * spacing[2] * i, orientation=np.concatenate(axes), spacing=spacing[:2])
        files.append(folder / f"{(2 * i) % 3}.dcm")
        write_slice(files[-1], PIXELS, tags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom, "decoder", lambda: nullcontext(process))
        examined = examine_scan(CaseFiles(name="a", images=(folder,)), num_channels=1, labels=None)
    assert examined.scan is not None, examined.defects
    series = sitk.ReadImage([str(file) for file in files])
    target = folder.parent / f"{folder.name}.nii.gz"
    write_label(target, np.zeros(examined.scan.image.shape[1:], np.uint8), examined.scan.place)
    label, by_nibabel = sitk.ReadImage(str(target)), nibabel.load(target)
    for index in ((0, 0, 0), (4, 5, 2), (1, 0, 2)):
        place = np.array(series.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose(label.TransformIndexToPhysicalPoint(index), place, atol=1e-3)  # tags have ten digits
        np.testing.assert_allclose(by_nibabel.affine @ [*index, 1], [*LPS_TO_RAS @ place, 1], atol=1e-3)


def test_a_label_in_the_place_of_its_series_fits_it(quick, tmp_path):
    folder = write_series(tmp_path / "case")
    scan = examine_scan(CaseFiles(name="a", images=(folder,)), num_channels=1, labels=None).scan
    write_label(tmp_path / "a.nii.gz", np.ones((5, 6, 5), np.uint8), scan.place)
    label = read_label(tmp_path / "a.nii.gz")
    assert label.voxels.T.shape == scan.image.shape[1:]
    np.testing.assert_allclose(label.affine, scan.affine, rtol=1e-6)  # float32 of a NIfTI header


# ---- what is no slice is left out, and said


def add_capture(folder):
    write_slice(folder / "dose.dcm", PIXELS, slice_tags(9, np.zeros(3), sop_class=CAPTURE, series="9"))
    return "1 secondary capture(s)"


def add_segmentation(folder):
    write_slice(folder / "seg.dcm", PIXELS, slice_tags(9, np.zeros(3), sop_class=SEGMENTATION, series="9"))
    return "1 segmentation(s)"


def add_structures(folder):
    write_dicom(folder / "rt", {(8, 0x16): ("UI", STRUCTURES), (8, 0x60): ("CS", "RTSTRUCT")})
    return "1 radiotherapy object(s)"


def add_localizers(folder):
    for i in range(2):
        tags = slice_tags(i, np.zeros(3), image_type="ORIGINAL\\PRIMARY\\LOCALIZER", series=f"9.{i}")
        write_slice(folder / f"scout_{i}", PIXELS, tags)
    return "2 localizer(s)"


def add_directory(folder):
    write_dicom(folder / "DICOMDIR", {(8, 0x16): ("UI", "1.2.840.10008.1.3.10")})
    return "1 DICOMDIR(s)"


def add_notes(folder):
    (folder / "README").write_text("hello")
    (folder / "notes.txt").write_text("hello")
    (folder / "._IM_0").write_text("hidden")
    return "2 foreign file(s)"


@pytest.mark.parametrize(
    "add", [add_capture, add_segmentation, add_structures, add_localizers, add_directory, add_notes]
)
def test_what_is_no_slice_is_left_out(quick, tmp_path, add):
    told = add(write_series(tmp_path))
    examined = examine_scan(CaseFiles(name="a", images=(tmp_path,)), num_channels=1, labels=None)
    assert examined.scan.image.shape == (1, 5, 6, 5)
    assert [str(warning) for warning in examined.warnings] == [f"{tmp_path} leaves out what is no slice of it: {told}"]


# ---- refused in words


def drop_one(folder):
    (folder / "IM_3").unlink()  # the third of five
    return "its 4 slices are from 2.5 to 5 mm apart, the farthest IM_7 and IM_10: restore the slices that are missing"


def drop_the_second_last(folder):
    (folder / "IM_10").unlink()
    return "its 4 slices are from 2.5 to 5 mm apart, the farthest IM_3 and IM_6"


def copy_one(folder):
    shutil.copy(folder / "IM_3", folder / "IM_99")
    return "it has 1 slice(s) at the place of another one (IM_3 and IM_99, say): put times, echoes or copies"


def two_times(folder):
    for i in range(5):
        write_slice(folder / f"second_{i}", PIXELS, slice_tags(i, np.array([10, 20, 30 + 2.5 * i])))
    return "it has 5 slice(s) at the place of another one (IM_0 and second_0, say)"


def all_in_one_place(folder):
    for i in range(5):
        write_slice(folder / f"IM_{(7 * i) % 11}", PIXELS, slice_tags(i, np.array([10, 20, 30])))
    return "it has 4 slice(s) at the place of another one"


def tilt(folder):
    for i in range(5):
        write_slice(folder / f"IM_{(7 * i) % 11}", PIXELS, slice_tags(i, np.array([10, 20 + 0.7 * i, 30 + 2.5 * i])))
    return "on a slant of 15.6°, the last one 2.8 mm beside the first (tilted gantry): convert it by dcm2niix"


def two_series(folder):
    write_slice(folder / "x", PIXELS, slice_tags(9, np.zeros(3), series="9"))
    return "it holds 2 series (CT 7 of 5 slice(s), CT 7 of 1 slice(s)): put each into a folder of its own"


def other_pixels(folder):
    write_slice(folder / "IM_3", PIXELS[:5], slice_tags(2, np.array([10, 20, 35])))
    return "its slices IM_0 and IM_3 are of different pixels"


def other_directions(folder):
    write_slice(folder / "IM_3", PIXELS, slice_tags(2, np.array([10, 20, 35]), orientation=(1, 0, 0, 0, -1, 0)))
    return "its slices IM_0 and IM_3 are of different directions"


def cut(folder):
    (folder / "IM_3").write_bytes((folder / "IM_3").read_bytes()[:-8])
    return "IM_3 cannot be read by GDCM: "


def cut_in_the_header(folder):
    (folder / "IM_3").write_bytes((folder / "IM_3").read_bytes()[:400])
    return "IM_3 cannot be read by GDCM: "


def empty(folder):
    (folder / "IM_3.dcm").write_bytes(b"")
    return "1 file(s) of it do not begin as DICOM does (IM_3.dcm, say)"


def of_no_class(folder):
    content = (folder / "IM_10").read_bytes()
    (folder / "IM_10").write_bytes(content.replace(b"\x02\0\x02\0UI", b"\x02\0\x09\0UI"))
    return "1 file(s) of it do not begin as DICOM does (IM_10, say)"


def enormous(folder):
    for i in range(5):
        tags = slice_tags(i, np.array([10, 20, 30 + 2.5 * i]))
        write_slice(folder / f"IM_{(7 * i) % 11}", PIXELS, tags | dict.fromkeys([(40, 16), (40, 17)], ("US", 65535)))
    return "bytes of memory, of which"


def large(folder):
    for i in range(5):
        tags = slice_tags(i, np.array([10, 20, 30 + 2.5 * i]))
        write_slice(folder / f"IM_{(7 * i) % 11}", PIXELS, tags | dict.fromkeys([(40, 16), (40, 17)], ("US", 999)))
    return "IM_0 does not hold the 1996002 bytes of pixels that its header promises"


def only_a_segmentation(folder):
    shutil.rmtree(folder)
    add_segmentation(folder)
    return "it holds no slices of CT, MRI or PET, but 1 segmentation(s)"


def only_localizers(folder):
    shutil.rmtree(folder)
    add_localizers(folder)
    return "it holds no slices of CT, MRI or PET, but 2 localizer(s)"


def frames(folder):
    write_slice(folder / "e.dcm", PIXELS, slice_tags(9, np.zeros(3), sop_class=ENHANCED_MR))
    return "e.dcm holds many frames: convert it by dcm2niix, or to a file per slice"


DAMAGES = [drop_one, drop_the_second_last, copy_one, two_times, all_in_one_place, tilt, two_series, other_pixels]
DAMAGES += [
    other_directions,
    cut,
    cut_in_the_header,
    empty,
    enormous,
    large,
    only_a_segmentation,
    only_localizers,
    frames,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_what_makes_no_volume(quick, tmp_path, damage):
    told = damage(write_series(tmp_path / "case"))
    text = refusal(tmp_path / "case")
    assert told in text
    assert "DOE" not in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"photometric": "MONOCHROME1"}, "has colours 'MONOCHROME1', but a slice has MONOCHROME2"),
        ({"photometric": "RGB", "samples": 3}, "has samples '3', but a slice has 1"),
        ({"image_type": "ORIGINAL\\PRIMARY\\M\\MOSAIC"}, "IM_0 is a mosaic of several slices: convert it by dcm2niix"),
        ({"frames": 5}, "has frames '5', but a slice has 1"),
        ({"spacing": None}, "has spacing None, but a slice has 2 number(s)"),
        ({"spacing": "nan\\1"}, "but a slice has 2 number(s)"),
        ({"spacing": (0, 1)}, "has pixels of no size, or none: 6 × 5 of [0.0, 1.0] mm"),
        ({"orientation": None}, "has orientation None, but a slice has 6 number(s)"),
        ({"orientation": (2, 0, 0, 0, 1, 0)}, "has directions that are not of length 1, at a right angle"),
        ({"orientation": (1, 0, 0, 1, 0, 0)}, "has directions that are not of length 1, at a right angle"),
        ({"thickness": None, "num": 1}, "it is one slice, of no thickness"),
    ],
)
def test_headers_that_place_no_slice(quick, tmp_path, changes, told):
    assert told in refusal(write_series(tmp_path, **changes))


def test_a_slice_without_a_position(quick, tmp_path):
    write_slice(write_series(tmp_path) / "IM_3", PIXELS, slice_tags(2, None))
    assert "IM_3 has position None, but a slice has 3 number(s)" in refusal(tmp_path)


# ---- the grid


def at(*heights: float, normal=(0.0, 0.0, 1.0)) -> list[Slice]:
    return [
        Slice(
            file=Path(f"{number}"),
            series="1",
            told="CT 1",
            shape=(4, 4),
            num_bytes=32,
            spacing=(0.5, 0.5),
            position=height * np.array(normal),
            along=np.array([1.0, 0, 0]),
            down=np.array([0, 1.0, 0]),
        )
        for number, height in enumerate(heights)
    ]


@examples(20, 50)
@given(num=st.integers(3, 40), step=st.floats(0.1, 9), off=st.floats(-0.04, 0.04), data=st.data())
def test_a_grid_is_known_with_rounding_and_not_without_a_slice(num, step, off, data):
    heights = data.draw(st.floats(-900, 900)) + step * np.arange(num)
    heights[data.draw(st.integers(0, num - 1))] += off * step  # less than MAX_SHIFT, whichever slice it is
    order = data.draw(st.permutations(range(num)))
    ordered, affine = place(at(*heights[order]))
    assert [each.file.name for each in ordered] == [str(order.index(i)) for i in range(num)]
    assert affine[2, 2] == pytest.approx((heights[-1] - heights[0]) / (num - 1))
    if num > 3:
        missing = data.draw(st.integers(1, num - 2))
        with pytest.raises(ValueError, match="restore the slices that are missing"):
            place(at(*np.delete(heights, missing)))


@examples(20, 50)
@given(num=st.integers(2, 40), step=st.floats(0.5, 5), angle=st.floats(0.05, 0.6), towards=st.floats(0, 6.2))
def test_a_slant_is_known(num, step, angle, towards):
    aside = np.tan(angle) * np.array([np.cos(towards), np.sin(towards), 0])
    slices = at(*(step * np.arange(num)), normal=aside + np.array([0, 0, 1]))
    moved = step * np.tan(angle) * (num - 1)
    if moved <= 0.05:  # a tenth of a pixel
        place(slices)
    else:
        with pytest.raises(ValueError, match=f"slant of {np.degrees(angle):.3g}°"):
            place(slices)


# ---- the process


def test_no_file_ends_more_than_the_process_that_reads_it(tmp_path, monkeypatch):
    """Whatever GDCM does: here it is made to abort by a file of that name."""
    script = tmp_path / "aborts.py"
    script.write_text("import os, sys\nsys.stdin.readline()\nos.abort()\n")
    monkeypatch.setattr(gdcm, "__file__", str(script))
    assert "ended the process that read it, by SIGABRT" in refusal(write_series(tmp_path / "case"))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are the system's")
def test_a_file_gets_as_much_memory_as_its_picture_needs(process, tmp_path, monkeypatch):
    file = write_series(tmp_path, num=1) / "IM_0"
    monkeypatch.setattr(gdcm, "MEMORY", 2**12)
    monkeypatch.setattr(gdcm, "PER_PIXEL", 0)
    with pytest.raises(ValueError, match="IM_0 cannot be read by GDCM"):
        process.pixels(file, (2**15, 2**15))


def test_without_simpleitk(tmp_path, monkeypatch):
    monkeypatch.setattr(gdcm, "find_spec", lambda name: None)
    assert refusal(write_series(tmp_path)) == "it is DICOM, which SimpleITK reads: pip install 'dstlib[itk]'"


@examples(15, 30)
@given(
    patches=st.lists(st.tuples(st.integers(128, 900), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4),
    cut=st.integers(-60, 0),
)
def test_no_slice_is_more_than_a_defect(process, tmp_path_factory, patches, cut):
    folder = write_series(tmp_path_factory.mktemp("damaged") / "case", num=3)
    whole = bytearray((folder / "IM_7").read_bytes())
    for place_of, value in patches:
        whole[place_of : place_of + len(value)] = value
    (folder / "IM_7").write_bytes(bytes(whole[: len(whole) + cut]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dicom, "decoder", lambda: nullcontext(process))
        examined = examine_scan(CaseFiles(name="a", images=(folder,)), num_channels=1, labels=None)
    assert (examined.scan is None) == bool(examined.defects)
    assert examined.scan is None or np.isfinite(examined.scan.image).all()

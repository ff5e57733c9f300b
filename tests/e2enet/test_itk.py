"""NRRD and MetaImage files: read as ITK reads them, and refused in words where ITK reads them wrongly."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans.geometry import Volume
from dstlib.zoo.e2enet.data.scans.metaimage import read_metaimage
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan
from dstlib.zoo.e2enet.data.scans.nrrd import read_nrrd

sitk = pytest.importorskip("SimpleITK")

VOXELS = np.arange(24, dtype="<i2")  # of 2 × 3 × 4
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])

NRRD = {
    "type": "int16",
    "dimension": "3",
    "sizes": "2 3 4",
    "endian": "little",
    "encoding": "raw",
    "space": "left-posterior-superior",
    "space directions": "(0.5,0,0) (0,0.75,0) (0,0,3)",
    "space origin": "(10,20,30)",
}
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "10 20 30",
    "ElementSpacing": "0.5 0.75 3",
    "DimSize": "2 3 4",
    "ElementType": "MET_SHORT",
}


def nrrd(file: Path, data: bytes = VOXELS.tobytes(), **changes: str | None) -> Path:
    """Writes a file of these fields, with underscores for blanks; None leaves one out."""
    fields = NRRD | {name.replace("_", " "): value for name, value in changes.items()}
    lines = ["NRRD0005", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    file.write_bytes("\n".join([*lines, "", ""]).encode() + data)
    return file


def meta(file: Path, data: bytes = VOXELS.tobytes(), **changes: str | None) -> Path:
    fields = META | changes | {"ElementDataFile": changes.get("ElementDataFile") or "LOCAL"}
    lines = [f"{name} = {value}" for name, value in fields.items() if value is not None]
    file.write_bytes("\n".join([*lines, ""]).encode() + data)
    return file


def by_itk(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (x, y, z[, channel]) and the affine to RAS+, as SimpleITK reads them."""
    image = sitk.ReadImage(str(file))
    voxels = sitk.GetArrayFromImage(image)
    has_channels = image.GetNumberOfComponentsPerPixel() > 1
    voxels = voxels.transpose(2, 1, 0, 3) if has_channels else voxels.T
    affine, dimension = np.eye(4), image.GetDimension()
    axes = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
    affine[:3, :3] = LPS_TO_RAS @ axes @ np.diag(image.GetSpacing()[:3])
    affine[:3, 3] = LPS_TO_RAS @ image.GetOrigin()[:3]
    return voxels, affine


def assert_as_itk(volume: Volume, file: Path) -> None:
    voxels, affine = by_itk(file)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.affine, affine, rtol=1e-12, atol=1e-9)  # products of doubles, in another order


# ---- as ITK reads them


@st.composite
def images(draw):
    """Any image that SimpleITK writes: turned, mirrored, with channels, in three dimensions or four."""
    shape = draw(st.tuples(*[st.integers(1, 4)] * 3))
    kind = draw(
        st.sampled_from(
            ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
        )
    )
    extra = draw(st.sampled_from(["none", "channels", "times"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = {"none": shape, "channels": (*shape, 2), "times": (2, *shape)}[extra]
    image = sitk.GetImageFromArray(rng.integers(0, 100, shape).astype(kind), isVector=extra == "channels")
    axes, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    dimension = image.GetDimension()
    direction = np.eye(dimension)
    direction[:3, :3] = axes * draw(st.sampled_from([1, -1]))
    image.SetDirection(direction.ravel())
    image.SetSpacing([draw(st.floats(0.1, 9)) for _ in range(dimension)])
    image.SetOrigin([draw(st.floats(-500, 500)) for _ in range(dimension)])
    return image


@examples(20, 60)
@given(image=images(), packed=st.booleans(), ending=st.sampled_from([".mha", ".mhd", ".nrrd", ".nhdr"]))
def test_what_itk_writes_is_read_as_itk_reads_it(tmp_path_factory, image, packed, ending):
    file = tmp_path_factory.mktemp("itk") / f"a{ending}"
    sitk.WriteImage(image, str(file), packed)
    read = read_nrrd if ending in (".nrrd", ".nhdr") else read_metaimage
    volume = read(file, None)
    assert_as_itk(volume, file)
    is_nrrd_of_times = read is read_nrrd and image.GetDimension() == 4  # whose space of four dimensions has no name
    assert bool(volume.odd) == is_nrrd_of_times
    assert volume.voxels.dtype.itemsize == sitk.GetArrayFromImage(image).dtype.itemsize


SPACES = [
    *("right-anterior-superior", "RAS", "left-anterior-superior", "LAS", "left-posterior-superior", "LPS", "lps"),
    *("scanner-xyz", "3D-right-handed"),
]


@pytest.mark.parametrize("space", SPACES)
def test_every_space_that_itk_knows(tmp_path, space):
    file = nrrd(tmp_path / "a.nrrd", space=space, space_directions="(0.5,0.1,0) (0,0.75,0) (0.2,0,-3)")
    volume = read_nrrd(file, None)
    assert_as_itk(volume, file)
    told = f"is in the space {space!r}, which is none of a patient: its axes are taken to lead left, back and top"
    assert told in " ".join(volume.odd) or space not in ("scanner-xyz", "3D-right-handed")
    assert "has axes that are not at right angles" in volume.odd[-1]


ALIKE_NRRD = {
    "spacings alone": {"space": None, "space_directions": None, "space_origin": None, "spacings": "0.5 -0.75 3"},
    "no geometry": {"space": None, "space_directions": None, "space_origin": None},
    "a space by its dimension": {"space": None, "endian": "little\nspace dimension: 3"},
    "no origin": {"space_origin": None},
    "channels first": {
        "dimension": "4",
        "sizes": "2 2 3 2",
        "kinds": "list domain domain domain",
        "space_directions": "none (1,0,0) (0,2,0) (0,0,3)",
    },
    "channels last": {
        "dimension": "4",
        "sizes": "2 3 2 2",
        "kinds": "domain domain domain list",
        "space_directions": "(1,0,0) (0,2,0) (0,0,3) none",
    },
    "channels between": {
        "dimension": "4",
        "sizes": "2 2 3 2",
        "kinds": "domain vector domain domain",
        "space_directions": "(1,0,0) none (0,2,0) (0,0,3)",
    },
    "units": {"space_units": '"mm" "mm" "mm"'},
    "blanks in vectors": {"space_directions": "( 0.5, 0, 0 ) (0, 0.75, 0) (0, 0, 3)"},
    "big endian": {"endian": "big"},
    "packed": {"encoding": "gzip", "data": gzip.compress(VOXELS.tobytes())},
    "bytes skipped": {"byte_skip": "3", "data": b"abc" + VOXELS.tobytes()},
    "bytes at the end": {"byte_skip": "-1", "data": b"abcde" + VOXELS.tobytes()},
}


@pytest.mark.parametrize("kind", ALIKE_NRRD)
def test_nrrd_as_itk_reads_it(tmp_path, kind):
    file = nrrd(tmp_path / "a.nrrd", **ALIKE_NRRD[kind])
    assert_as_itk(read_nrrd(file, None), file)


ALIKE_META = {
    "other names": {"Offset": None, "Position": "1 2 3", "TransformMatrix": None, "Orientation": "0 1 0 0 0 1 1 0 0"},
    "other names still": {"Offset": None, "Origin": "1 2 3", "TransformMatrix": None, "Rotation": "0 1 0 0 0 1 1 0 0"},
    "sizes alone": {"ElementSpacing": None, "ElementSize": "1 2 3"},
    "no geometry": {"ElementSpacing": None, "Offset": None, "TransformMatrix": None},
    "a mirrored axis": {"ElementSpacing": "1 -2 3"},
    "a turned centre": {"CenterOfRotation": "5 6 7", "TransformMatrix": "0 1 0 0 0 1 1 0 0"},
    "another orientation in words": {"AnatomicalOrientation": "LPI"},
    "big endian": {"BinaryDataByteOrderMSB": "True"},
    "channels": {"DimSize": "2 3 2", "ElementNumberOfChannels": "2"},
    "long": {"ElementType": "MET_LONG", "data": np.arange(24, dtype="<i4").tobytes()},
}


@pytest.mark.parametrize("kind", ALIKE_META)
def test_metaimage_as_itk_reads_it(tmp_path, kind):
    file = meta(tmp_path / "a.mha", **ALIKE_META[kind])
    assert_as_itk(read_metaimage(file, None), file)


# ---- and not where it reads them wrongly, or asks for too much


REFUSED_NRRD = {
    "foreign": ({}, lambda content: b"hello" * 9, "its 45 bytes do not begin as NRRD does"),
    "empty": ({}, lambda content: b"", "its 0 bytes do not begin as NRRD does"),
    "cut": ({}, lambda content: content[:-5], "it ends after 43 of 48 bytes of voxels"),
    "cut in its header": ({}, lambda content: content[:40], "its 'sizes' is '' but some whole number(s)"),
    "enormous": ({"sizes": "1000 1000 1000"}, None, "it ends after 48 of 2000000000 bytes of voxels"),
    "enormous, packed": (
        {"sizes": "1000 1000 1000", "encoding": "gzip"},
        None,
        "48 bytes cannot unpack to the 2000000000",
    ),
    "beyond counting": ({"sizes": "9999999999 9999999999 9999999999"}, None, "bytes of memory, of which"),
    "cut, packed": ({"encoding": "gzip", "data": gzip.compress(VOXELS.tobytes())[:-12]}, None, "ended before the end"),
    "a wrong checksum": (
        {"encoding": "gzip", "data": gzip.compress(VOXELS.tobytes())[:-8] + bytes(8)},
        None,
        "CRC check failed",
    ),
    "packed bytes that are none": ({"encoding": "gzip"}, None, "Not a gzipped file"),
    "more than promised": (
        {"encoding": "gzip", "data": gzip.compress(bytes(50))},
        None,
        "it unpacks to more than the 48 bytes",
    ),
    "another encoding": ({"encoding": "bzip2"}, None, "its encoding is 'bzip2': save it as raw or gzip"),
    "another type": ({"type": "block"}, None, "its voxels are of type 'block', not numbers"),
    "no order of bytes": ({"endian": None}, None, "its 'endian' is None but little or big"),
    "centimetres": ({"space_units": '"cm" "cm" "cm"'}, None, "it is measured in cm, which programs take for mm"),
    "a space that ITK does not know": ({"space": "LPI"}, None, "its space is 'LPI', in which nothing has a place"),
    "a space that ITK takes for LPS": ({"space": "3D-left-handed"}, None, "its space is '3D-left-handed'"),
    "a space of four dimensions": ({"space": "LPST"}, None, "its space is 'LPST'"),
    "axes without a space": (
        {"space": None, "space_directions": None, "space_origin": None, "axis_mins": "0 0 0"},
        None,
        "place it in no space",
    ),
    "two directions": ({"space_directions": "(1,0,0) (0,1,0)"}, None, "are '(1,0,0) (0,1,0)' from '(10,20,30)' but"),
    "directions in words": ({"space_directions": "a b c"}, None, "are 'a b c' from '(10,20,30)' but three vectors"),
    "an origin of two": ({"space_origin": "(1,2)"}, None, "from '(1,2)' but three vectors, and a place"),
    "an origin in words": ({"space_origin": "here"}, None, "from 'here' but three vectors, and a place"),
    "times along space": (
        {
            "space": "LPS",
            "space_directions": "(1,0,0,1) (0,1,0,0) (0,0,1,0) (0,0,0,1)",
            "space_origin": "(0,0,0,0)",
            "dimension": "4",
            "sizes": "2 3 2 2",
        },
        None,
        "its fourth axis leads through space",
    ),
    "several axes of channels": (
        {
            "dimension": "5",
            "sizes": "2 3 2 2 1",
            "kinds": "domain domain domain list time",
            "space_directions": "(1,0,0) (0,1,0) (0,0,1) none none",
        },
        None,
        "it has 2 axes beside those of space",
    ),
    "sizes in words": ({"sizes": "2 three 4"}, None, "its 'sizes' is '2 three 4' but"),
    "another dimension": ({"dimension": "4"}, None, "its 'dimension' is '4' but that of 3 sizes"),
    "a field twice": ({}, lambda content: content.replace(b"endian", b"sizes", 1), "has 'sizes' twice"),
    "voxels elsewhere": ({"data_file": "../a.raw"}, None, "'../a.raw', which is no path below its own folder"),
    "voxels in several files": ({"data_file": "LIST"}, None, "its voxels lie in several files, 'LIST'"),
    "voxels that are missing": ({"data_file": "b.raw"}, None, "its voxels, 'b.raw', are missing"),
    "no voxel": ({"sizes": "2 0 4"}, None, "has shape (2, 0, 4), but an image is"),
    "axes in one plane": ({"space_directions": "(1,0,0) (0,1,0) (1,1,0)"}, None, "has axes that lie in one plane"),
    "a direction of NaN": ({"space_directions": "(1,0,0) (0,nan,0) (0,0,1)"}, None, "has voxels of [1.0, nan, 1.0] mm"),
    "a plane": (
        {"dimension": "2", "sizes": "6 4", "space": None, "space_directions": None, "space_origin": None},
        None,
        "has shape (6, 4), but an image is",
    ),
}


@pytest.mark.parametrize("kind", REFUSED_NRRD)
def test_nrrd_that_is_refused(tmp_path, kind):
    changes, damage, text = REFUSED_NRRD[kind]
    file = nrrd(tmp_path / "a.nrrd", **changes)
    assert_refused(file, damage, text)


REFUSED_META = {
    "foreign": ({}, lambda content: b"hello" * 9, "its 45 bytes do not begin as MetaImage does"),
    "empty": ({}, lambda content: b"", "its 0 bytes do not begin as MetaImage does"),
    "cut": ({}, lambda content: content[:-5], "it ends after 43 of 48 bytes of voxels"),
    "cut in its header": ({}, lambda content: content[:40], "bytes do not begin as MetaImage does"),
    "enormous": ({"DimSize": "1000 1000 1000"}, None, "it ends after 48 of 2000000000 bytes of voxels"),
    "enormous, packed": (
        {"DimSize": "1000 1000 1000", "CompressedData": "True"},
        None,
        "48 bytes cannot unpack to the 2000000000",
    ),
    "beyond counting": ({"DimSize": "9999999999 9999999999 9999999999"}, None, "bytes of memory, of which"),
    "cut, packed": ({"CompressedData": "True", "data": zlib.compress(VOXELS.tobytes())[:-12]}, None, "it ends after"),
    "a wrong checksum": (
        {"CompressedData": "True", "data": zlib.compress(VOXELS.tobytes())[:-4] + b"abcd"},
        None,
        "incorrect data check",
    ),
    "packed bytes that are none": ({"CompressedData": "True"}, None, "while decompressing data"),
    "more than promised": (
        {"CompressedData": "True", "data": zlib.compress(bytes(50))},
        None,
        "it unpacks to more than the 48 bytes",
    ),
    "another type": ({"ElementType": "MET_OTHER"}, None, "its voxels are of type 'MET_OTHER', not numbers"),
    "sizes of less than nothing": ({"DimSize": "2 -3 4"}, None, "its 'DimSize' is '2 -3 4' but 3 whole"),
    "a scaled matrix": ({"TransformMatrix": "2 0 0 0 2 0 0 0 2"}, None, "whose rows are not of length 1"),
    "a matrix of four": ({"TransformMatrix": "1 0 0 1"}, None, "its 'TransformMatrix' are '1 0 0 1' but 9 numbers"),
    "intensities of a slope": (
        {"ElementToIntensityFunctionSlope": "2"},
        None,
        "Slope' is '2', which programs do not look at",
    ),
    "voxels as text": ({"BinaryData": "False"}, None, "its voxels are written as text"),
    "a header within": ({"HeaderSize": "7"}, None, "its voxels have a header of their own"),
    "another object": ({"ObjectType": "Tube"}, None, "do not begin as MetaImage does"),
    "voxels elsewhere": ({"ElementDataFile": "/etc/a.raw"}, None, "which is no path below its own folder"),
    "voxels in several files": ({"ElementDataFile": "a%02d.raw 1 9 1"}, None, "its voxels lie in several files"),
    "axes in one plane": ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, None, "has axes that lie in one plane"),
    "no spacing": ({"ElementSpacing": "1 0 1"}, None, "has voxels of [1.0, 0.0, 1.0] mm"),
}


@pytest.mark.parametrize("kind", REFUSED_META)
def test_metaimage_that_is_refused(tmp_path, kind):
    changes, damage, text = REFUSED_META[kind]
    file = meta(tmp_path / "a.mha", **changes)
    assert_refused(file, damage, text)


def assert_refused(file, damage, text):
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    examined = examine_scan(CaseFiles(name="a", images=(file,)), num_channels=1, labels=None)
    assert examined.scan is None
    assert text in str(examined.defects[0]), examined.defects


def test_a_segmentation_in_layers_is_refused(tmp_path):
    file = nrrd(
        tmp_path / "a.seg.nrrd",
        dimension="4",
        sizes="2 2 3 2",
        kinds="list domain domain domain",
        space_directions="none (1,0,0) (0,2,0) (0,0,3)",
        space_origin="(0,0,0)\nSegment0_Name:=liver: right\nSegment0_LabelValue:=1",
    )
    with pytest.raises(ValueError, match="it is a segmentation of 2 layers that overlap: export it as a label map"):
        read_nrrd(file, None)


def test_a_segmentation_in_one_layer_is_a_label_and_its_names_are_told(tmp_path):
    segments = [
        f"Segment{i}_Name:={name}\nSegment{i}_LabelValue:={i + 1}" for i, name in enumerate(("liver: right", "b"))
    ]
    file = nrrd(tmp_path / "a.seg.nrrd", space_origin="\n".join(["(10,20,30)", *segments]))
    volume = read_nrrd(file, None)
    assert_as_itk(volume, file)
    assert volume.odd == ("calls its values 'liver: right' 1, 'b' 2, by itself: do other files count so too?",)


@examples(40, 150)
@given(
    patches=st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.integers(-40, 0),
    ending=st.sampled_from([".nrrd", ".mha"]),
    packed=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # arithmetic with the numbers of a broken header
def test_no_file_is_more_than_a_defect(tmp_path_factory, patches, cut, ending, packed):
    file = tmp_path_factory.mktemp("damaged") / f"a{ending}"
    data = VOXELS.tobytes()
    if ending == ".nrrd":
        nrrd(file, gzip.compress(data) if packed else data, encoding="gzip" if packed else "raw")
    else:
        meta(file, zlib.compress(data) if packed else data, CompressedData=str(packed))
    whole = bytearray(file.read_bytes())
    for at, value in patches:
        whole[at : at + len(value)] = value
    file.write_bytes(bytes(whole[: len(whole) + cut]))
    examined = examine_scan(CaseFiles(name="a", images=(file,)), num_channels=1, labels=None)
    assert (examined.scan is None) == bool(examined.defects)
    if not patches:
        assert (examined.scan is None) == (cut < 0)
    if examined.scan is not None:
        assert np.isfinite(examined.scan.image).all()
        assert all(math.isfinite(size) and size > 0 for size in examined.scan.spacing)

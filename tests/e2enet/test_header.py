"""Where NIfTI headers place their voxels: as SimpleITK and nibabel see it, of images and of their predictions."""

from itertools import product
from unittest import mock

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_headers import SHAPE, by_itk, by_nibabel, headers, placed, tilted, turned, write_nifti
from strategies import examples

from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.scans.header import Header, apart, header_at, read_header
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, read_scan, write_label
from dstlib.zoo.e2enet.data.scans.places import MAX_SHIFT

pytest.importorskip("SimpleITK")

SFORM, QFORM = placed(turned(5, 0, 20)), placed(turned(-10, 0, 0), origin=(-5.0, 6.0, 7.0))
CODES = [*product(range(5), range(5)), (5, 1), (1, 5), (5, 0), (0, 5)]  # of (sform, qform)
NEAR = 1e-4  # mm: the bound that was asked for, and float32 keeps a place 500 mm away to 3e-5
ROUND = 1e-6  # of float32, relative


def case_of(file, geometry="itk") -> CaseFiles:
    return CaseFiles(name="a", images=(file,), geometry=geometry)


def read(file, geometry="itk"):
    num_channels = nibabel.load(file).shape[3] if len(nibabel.load(file).shape) == 4 else 1
    return read_scan(case_of(file, geometry), num_channels=num_channels, labels=None)


def stored_header(file) -> Header:
    """Reads a header as it is stored: nibabel repairs what it takes for a fault when it loads a file."""
    return read_header(nibabel.Nifti1Header(file.read_bytes()[:348], check=False))


FORMS = {
    "others": {"sform": SFORM, "qform": QFORM},
    "the same": {"sform": SFORM, "qform": SFORM},
    "moved": {"sform": SFORM, "qform": placed(turned(5, 0, 20), origin=(10.0, -20.0, 31.0))},
    "moved by rounding": {"sform": SFORM, "qform": placed(turned(5, 0, 20), origin=(10.0, -20.0, 30.00005))},
    "sheared": {"sform": tilted(SFORM), "qform": SFORM},
    "without sizes": {"sform": placed(turned(5, 0, 20), sizes=(1.0, 1.0, 1.0)), "qform": SFORM},
    "other sizes": {"sform": SFORM, "qform": QFORM, "sizes": (3.0, 4.0, 5.0)},
    "left-handed": {"sform": SFORM @ np.diag([1, 1, -1, 1.0]), "qform": QFORM @ np.diag([-1, 1, 1, 1.0])},
    "nearly half a turn": {"sform": placed(turned(179.97, 0.01, 0)), "qform": placed(turned(179.97, 0.01, 0))},
    "in metres": {"sform": np.diag([1e-3, 1e-3, 1e-3, 1]) @ SFORM, "qform": QFORM, "xyzt_units": 1},
    "in micrometres": {"sform": np.diag([1e3, 1e3, 1e3, 1]) @ SFORM, "qform": QFORM, "xyzt_units": 11},
    "in nobody knows what": {"sform": SFORM, "qform": QFORM, "xyzt_units": 0},
    "of times": {"sform": SFORM, "qform": QFORM, "shape": (*SHAPE, 2)},
    "of one slice": {"sform": SFORM, "qform": QFORM, "shape": (3, 4, 1)},
    "without a qfac": {"sform": SFORM, "qform": QFORM, "qfac": 0},
    "a size of 0": {"sform": SFORM, "qform": QFORM, "sizes": (1.0, 0.0, 2.0)},
    "a size below 0": {"sform": SFORM, "qform": QFORM, "sizes": (1.0, 1.5, -2.0)},
    "a size of NaN": {"sform": SFORM, "qform": QFORM, "sizes": (np.nan, 1.5, 2.0)},
}


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_the_default_places_a_scan_as_itk_does(tmp_path, forms):
    for codes in CODES:
        file = write_nifti(tmp_path / "a.nii", codes=codes, **forms)
        header, of_itk = stored_header(file), by_itk(file)
        if of_itk is None:
            assert header.is_placed
            assert header.itk_form() is None
            np.testing.assert_array_equal(header.affine("itk"), header.form("sform"))
        else:
            told = f"codes of (sform, qform): {codes}"
            np.testing.assert_allclose(header.affine("itk"), of_itk, rtol=ROUND, atol=NEAR, err_msg=told)


@pytest.mark.parametrize("forms", [FORMS[name] for name in FORMS if "size" not in name and "metres" not in name])
def test_the_rule_sform_places_a_scan_as_nibabel_does(tmp_path, forms):
    """Where nibabel repairs sizes, it repairs them its own way, and it does not convert units."""
    for codes in CODES:
        file = write_nifti(tmp_path / "a.nii", codes=codes, **forms)
        # nibabel normalises a quaternion that is nearly half a turn otherwise than niftilib and ITK do
        np.testing.assert_allclose(
            stored_header(file).affine("sform"), by_nibabel(file), rtol=ROUND, atol=5e-3, err_msg=str(codes)
        )


def test_the_rule_qform(tmp_path):
    forms = {(1, 1): QFORM, (0, 3): QFORM, (2, 0): SFORM, (0, 0): np.diag([-1.0, -1.5, 2.0, 1.0])}
    for codes, expected in forms.items():
        header = stored_header(write_nifti(tmp_path / "a.nii", sform=SFORM, qform=QFORM, codes=codes))
        np.testing.assert_allclose(header.affine("qform"), expected, rtol=ROUND, atol=NEAR)


def test_nifti_2_keeps_doubles(tmp_path):
    file = write_nifti(tmp_path / "a.nii", sform=SFORM, qform=QFORM, version=2)
    assert by_itk(file) is None
    np.testing.assert_array_equal(read(file, "sform").affine, SFORM)
    np.testing.assert_array_equal(by_nibabel(file), SFORM)


# ---- a prediction lies on its image


STATED = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d")
STATED += ("qoffset_x", "qoffset_y", "qoffset_z")


def assert_one_place(image, label):
    """Compares the places of all voxels, in mm, in both libraries, and the headers; returns the places of the image."""
    of_image, of_label = by_itk(image), by_itk(label)
    first, second = nibabel.load(image), nibabel.load(label)
    assert second.shape == first.shape[:3]
    assert (of_image is None) == (of_label is None)
    assert of_image is None or apart(of_image, of_label, second.shape) <= NEAR
    assert apart(first.affine, second.affine, second.shape) <= NEAR
    for name in STATED:
        assert first.header[name].tobytes() == second.header[name].tobytes(), name
    assert first.header["pixdim"][:4].tobytes() == second.header["pixdim"][:4].tobytes()
    assert first.header.get_xyzt_units()[0] == second.header.get_xyzt_units()[0]
    assert second.get_data_dtype() == np.uint8
    assert second.dataobj.slope == 1
    assert second.dataobj.inter == 0
    return of_image, first.affine


@examples(40, 200)
@given(written=headers(), codes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=5, max_size=5))
def test_image_and_label_are_one_place_to_every_program(tmp_path_factory, written, codes):
    """In both libraries to 1e-4 mm, and ours is ITK's; or the scan was refused, or warned of."""
    with mock.patch("os.fsync"):  # of so many files
        for pair in codes:
            assert_label_on_image(tmp_path_factory.getbasetemp() / "headers", written | {"codes": pair})


def assert_label_on_image(folder, written):
    image, label = write_nifti(folder / "image.nii", **written), folder / "label.nii.gz"
    shape, channels = written["shape"][:3], (*written["shape"], 1)[3]
    scan, defects, told = examine_scan(case_of(image), num_channels=channels, labels=None)
    if scan is None:
        assert defects
        return
    write_label(label, np.ones(shape[::-1], np.uint8), scan.place)
    of_itk, of_nibabel = assert_one_place(image, label)
    if of_itk is None:
        assert told, "ITK refuses the file"
    else:
        # of two forms that agree ITK takes one by chance
        forms = [form for form in map(scan.header.form, ("sform", "qform")) if form is not None]
        assert told or min(apart(place, of_itk, shape) for place in (scan.affine, *forms)) <= NEAR
        assert told or apart(scan.affine, of_itk, shape) <= MAX_SHIFT * min(scan.spacing)
    assert told or apart(scan.affine, of_nibabel, shape) <= MAX_SHIFT * min(scan.spacing)


# ---- what is told


def doubts(folder, geometry="itk", **written) -> list[str]:
    file = write_nifti(folder / "a.nii", **written)
    scan, defects, warnings = examine_scan(case_of(file, geometry), num_channels=1, labels=None)
    assert scan is not None, defects
    return [fault.text for fault in warnings]


def test_what_agrees_is_not_told_of(tmp_path):
    """Rounding of float32, of a quaternion, of sizes that were written with four digits."""
    oblique = placed(turned(179.97, 12, 40), sizes=(0.7421875, 0.7421875, 1.25), origin=(190.1, -210.3, 800.7))
    rounded = placed(turned(179.97, 12, 40), sizes=(0.7422, 0.7422, 1.25), origin=(190.1, -210.3, 800.7))
    for codes in ((1, 1), (2, 1), (1, 0), (0, 1), (4, 4)):
        assert doubts(tmp_path, sform=oblique, qform=oblique, codes=codes, voxels=voxels_of(200, 200, 60)) == []
        assert doubts(tmp_path, sform=oblique, qform=rounded, codes=codes, voxels=voxels_of(200, 200, 60)) == []


def voxels_of(*shape):
    voxels = np.zeros(shape, np.int8)
    voxels[0, 0, 0] = 1
    return voxels


def test_a_sform_without_sizes(tmp_path):
    """A public cardiac set: the right millimetres are those of pixdim, which ITK's programs and nnU-Net take."""
    forms = {"sform": placed(sizes=(-1, -1, 1)), "qform": placed(sizes=(1.5625, 1.5625, 10.0))}
    (told,) = doubts(tmp_path, **forms)
    assert told == (
        "has more than one place: voxels by its sform (code 1) 1 × 1 × 1 mm, by its qform (code 1) 1.5625 × 1.5625 × "
        "10 mm; corners lie up to 42 mm apart, axes 180 degrees. The axes of the sform with the sizes of pixdim are "
        "used, as by ITK's programs and nnU-Net; --geometry sform or qform chooses"
    )
    assert read(tmp_path / "a.nii").spacing == (10.0, 1.5625, 1.5625)
    assert read(tmp_path / "a.nii", "sform").spacing == (1.0, 1.0, 1.0)
    assert doubts(tmp_path, "sform", **forms)[0].endswith("180 degrees. The sform is used, as --geometry sform has it")
    assert doubts(tmp_path, "qform", **forms)[0].endswith("180 degrees. The qform is used, as --geometry qform has it")
    (told,) = doubts(tmp_path, sform=placed(sizes=(1, 1, 1)), codes=(1, 0), sizes=(1.5625, 1.5625, 10.0))
    assert "voxels by its sform (code 1) 1 × 1 × 1 mm, by its pixdim 1.5625 × 1.5625 × 10 mm; corners" in told


def test_a_scan_that_was_moved_to_another(tmp_path):
    (told,) = doubts(tmp_path, sform=placed(origin=(0, 0, 0)), qform=placed(origin=(0, 15, 0)), codes=(2, 1))
    assert "1 × 1.5 × 2 mm; corners lie up to 15 mm apart, axes 0 degrees. The qform is used, as by ITK's" in told


def test_a_tilted_gantry_is_named(tmp_path):
    """As dcm2niix leaves its plain file: a sheared sform, an orthogonal qform, both of code 1."""
    (told,) = doubts(tmp_path, sform=tilted(placed(), 16.0), qform=placed())
    assert "Its sform is sheared: axes meet at 74, 90, 90 degrees, as dcm2niix leaves a CT with a tilted gantry" in told
    assert "beside a file named _Tilt_1, which alone is in place: use that one. The qform is used" in told
    (told,) = doubts(tmp_path, sform=tilted(placed(), 16.0), codes=(1, 0))
    assert told.endswith("The sform is used; ITK's programs and nnU-Net's first reader refuse the file")
    (told,) = doubts(tmp_path, sform=tilted(placed(), 0.02), codes=(1, 0))
    assert "axes meet at 89.98, 90, 90 degrees. The sform is used; ITK's" in told  # no gantry, but refused all the same


def test_units(tmp_path):
    metres = placed(sizes=(0.001, 0.0015, 0.002), origin=(0.01, 0, 0))
    (told,) = doubts(tmp_path, sform=metres, qform=metres, xyzt_units=1)
    assert told == (
        "is measured in metres, so its voxels are 1 × 1.5 × 2 mm; nibabel's programs take its numbers for mm"
    )
    np.testing.assert_allclose(read(tmp_path / "a.nii").spacing, (2.0, 1.5, 1.0), rtol=ROUND)
    (told,) = doubts(tmp_path, sform=placed(), qform=placed(), xyzt_units=3)
    assert told.startswith("is measured in micrometres, so its voxels are 0.001 × 0.0015 × 0.002 mm")
    assert doubts(tmp_path, sform=placed(), qform=placed(), xyzt_units=0) == []


def test_nifti_2_and_sizes_that_are_none(tmp_path):
    assert doubts(tmp_path, sform=placed(), qform=placed(), version=2) == [
        "is NIfTI-2, which ITK's programs do not read"
    ]
    (told,) = doubts(tmp_path, qform=placed(), codes=(0, 1), sizes=(0.0, 1.5, 2.0))
    assert told == "says in pixdim that voxels are 0 × 1.5 × 2: what is no size counts as 1"


def test_a_label_tells_what_its_image_does_not(tmp_path):
    image, label = (tmp_path / name for name in ("image.nii", "label.nii"))
    write_nifti(image, sform=placed(), qform=placed())
    write_nifti(label, sform=placed(origin=(0, 0, 0)), qform=placed(), codes=(2, 1), voxels=np.ones(SHAPE, np.uint8))
    case = CaseFiles(name="a", images=(image,), label=label)
    scan, _, warnings = examine_scan(case, num_channels=1, labels=Labels.consecutive(1))
    assert scan is not None
    assert [fault.file for fault in warnings] == [label]
    write_nifti(image, sform=placed(origin=(0, 0, 0)), qform=placed(), codes=(2, 1))
    scan, _, warnings = examine_scan(case, num_channels=1, labels=Labels.consecutive(1))
    assert [fault.file for fault in warnings] == [image]  # once


IN_ITKS_PLACE = {"sform": placed(), "qform": placed()}
TWO_FORMS = {"sform": tilted(placed(), 16.0), "qform": placed()}
DIFFER, ALIKE = "and programs differ in what they read;", "reads both alike"
IN_NIBABELS_PLACE = {"sform": tilted(placed(), 16.0), "codes": (2, 0)}


@pytest.mark.parametrize(
    ("image", "label", "geometry", "told"),
    [
        (TWO_FORMS, IN_ITKS_PLACE, "itk", None),
        (TWO_FORMS, IN_NIBABELS_PLACE, "sform", None),
        (
            TWO_FORMS,
            IN_ITKS_PLACE,
            "sform",
            f"its sform lies on the qform of its image, {DIFFER} --geometry itk {ALIKE}",
        ),
        (
            TWO_FORMS,
            IN_NIBABELS_PLACE,
            "itk",
            f"its sform lies on the sform of its image, {DIFFER} --geometry sform {ALIKE}",
        ),
        (IN_NIBABELS_PLACE, IN_ITKS_PLACE, "itk", "the affines differ by more than rounding"),
    ],
)
def test_a_label_in_the_place_of_the_other_form(tmp_path, image, label, geometry, told):
    files = write_nifti(tmp_path / "image.nii", **image), write_nifti(tmp_path / "label.nii", **label)
    case = CaseFiles(name="a", images=files[:1], label=files[1], geometry=geometry)
    scan, defects, _ = examine_scan(case, num_channels=1, labels=Labels.consecutive(255))
    if told is None:
        assert scan is not None, defects
    else:
        (defect,) = defects
        assert defect.text.startswith("lies 2.29 mm away from its image: ")  # 4 slices of 2 mm, times tan 16°
        assert defect.text.endswith(told)


def test_a_place_without_a_header(tmp_path):
    """As scans of other formats have it: both forms, of code 1, in mm; a shear has no qform."""
    for affine, codes in ((placed(turned(5, -170, 20)), (1, 1)), (tilted(placed()), (1, 0))):
        write_label(tmp_path / "a.nii.gz", np.ones(SHAPE[::-1], np.uint8), header_at(affine, SHAPE))
        found = nibabel.load(tmp_path / "a.nii.gz").header
        assert (found["sform_code"], found["qform_code"]) == codes
        assert found.get_xyzt_units()[0] == "mm"
        assert apart(by_nibabel(tmp_path / "a.nii.gz"), affine, SHAPE) <= NEAR
        of_itk = by_itk(tmp_path / "a.nii.gz")
        assert of_itk is None if codes[1] == 0 else apart(of_itk, affine, SHAPE) <= NEAR

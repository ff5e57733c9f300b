"""Names that come with data: which of them become names of files, and that none leads out of a folder."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dstlib.errors import DataError
from dstlib.files import write_whole
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS
from dstlib.zoo.e2enet.data.layouts.btcv import BTCV_ORGANS
from dstlib.zoo.e2enet.data.layouts.decathlon import TUMOUR_CHANNELS, TUMOUR_CLASSES
from dstlib.zoo.e2enet.data.layouts.detect import folder_cases, read_manifest
from dstlib.zoo.e2enet.data.layouts.files import path_fault
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.names import MAX_BYTES, file_name_fault, name_fault, one_file
from dstlib.zoo.e2enet.evaluation.figures import slice_comparison

ESCAPE = "\x1b]0;owned\x07\x1b[2J"

# Any text, and the parts of it that lead somewhere.
PARTS = [
    "..",
    "/",
    "\\",
    ":",
    ".",
    " ",
    "~",
    "$HOME",
    "CON",
    "nul",
    "com1",
    "=1+1",
    "-rf",
    "\0",
    "\n",
    ESCAPE,
    "a",
    "é",
]
NAMES = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(PARTS), max_size=4).map("".join))

NO_FILE = {
    "": "is empty",
    ".": "begins with a dot",
    "..": "begins with a dot",
    ".hidden": "begins with a dot",
    "../a": "has '/'",
    "a/b": "has '/'",
    "/a": "has '/'",
    "a\\b": "parts folders",
    "c:a": "has ':'",
    "a*": "no file on Windows",
    'a"b': "no file on Windows",
    "a<b>|?": "no file on Windows",
    "a\0": "cannot be printed",
    "a\nb": "cannot be printed",
    ESCAPE: "cannot be printed",
    "a\u202eb": "cannot be printed",  # what follows would be shown from right to left
    "a\udcff": "cannot be printed",  # how Python reads a name that is no text
    "=1+1": "begins with '='",
    "+1": "begins with '+'",
    "-1": "begins with '-'",
    "@a": "begins with '@'",
    " a": "which Windows drops",
    "a ": "which Windows drops",
    "a.": "which Windows drops",
    "CON": "is a device",
    "nul.x": "is a device",
    "Com¹": "is a device",
    "aux .x": "is a device",
    "a" * (MAX_BYTES + 1): "takes 201 bytes",
    "é" * 101: "takes 202 bytes",
}


@pytest.mark.parametrize("name", NO_FILE)
def test_what_no_file_can_be_called(name):
    assert NO_FILE[name] in (file_name_fault(name) or "")
    with pytest.raises(DataError, match="expected a name that a file can have everywhere") as error:
        CaseFiles(name=name, images=(Path("a.nii.gz"),))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["amos_0001", "a", "é", "日本", "scan.v2", "a b", "x (1)", "console", "a" * MAX_BYTES])
def test_what_a_file_can_be_called(name):
    assert file_name_fault(name) is None


def test_the_names_of_the_published_sets_are_names():
    for name in (*AMOS_ORGANS, *BTCV_ORGANS, *TUMOUR_CHANNELS, *TUMOUR_CLASSES):
        assert name_fault(name) is None, name


@given(name=NAMES)
@example("日" * 66)
def test_a_name_of_a_file_makes_one_file_below_its_folder_with_any_ending(tmp_path_factory, name):
    if file_name_fault(name) is not None:
        return
    folder = tmp_path_factory.mktemp("around") / "folder"
    folder.mkdir()
    for ending in ("json", "image.npy", "label.npy", "nii.gz"):
        write_whole(folder / f"{name}.{ending}", b"mine")
    written = [file.relative_to(folder.parent).parts for file in folder.parent.rglob("*") if file.is_file()]
    assert len(written) == 4
    assert all(len(parts) == 2 and parts[0] == "folder" for parts in written)
    assert f"{name}\n".splitlines() == [name]
    assert name[0] not in "=+-@\t\r"


@given(name=st.text(max_size=6), other=st.text(max_size=6))
@example("É", "e\u0301")
def test_names_are_one_file_where_capitals_and_the_writing_of_accents_do_not_count(name, other):
    assert {one_file(unicodedata.normalize(form, name)) for form in ("NFD", "NFC")} == {one_file(name)}
    if name.isascii() and other.isascii():
        assert (one_file(name) == one_file(other)) == (name.lower() == other.lower())


@pytest.mark.parametrize("name", ["$x_{$", r"$\frac$", "$", "a_b"])
def test_a_dollar_in_the_name_of_a_class_or_case_is_no_formula(tmp_path, name):
    label = np.ones((2, 4, 4), np.uint8)
    case = Case(name, np.zeros((1, 2, 4, 4), np.float32), label, (1.0, 1.0, 1.0))
    slice_comparison(tmp_path / "slice.png", case, label, Labels.consecutive(1), {name: 1.0})
    assert (tmp_path / "slice.png").is_file()


# ---- paths in lists

OUTSIDE = [
    "../a.nii.gz",
    "a/../../b.nii.gz",
    "/etc/passwd",
    "C:\\a.nii.gz",
    "c:a.nii.gz",
    "\\\\server\\a.nii.gz",
    "a\\..\\b",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leads_out_is_refused_unless_that_is_allowed(path):
    assert "--allow-outside" in path_fault(path, allow_outside=False)
    assert path_fault(path, allow_outside=True) is None


@pytest.mark.parametrize("path", ["a\0b.nii.gz", ESCAPE, "a" * 256, "a/" * 3000])
def test_a_path_that_is_none_is_refused_even_so(path):
    for allow_outside in (False, True):
        assert path_fault(path, allow_outside=allow_outside) is not None


@given(path=st.lists(st.sampled_from([*PARTS, "/"]), max_size=6).map("".join))
def test_a_path_that_passes_lies_below_the_folder(path):
    if path_fault(path, allow_outside=False) is None:
        assert (Path("/set") / path).is_relative_to("/set")
        assert ".." not in (Path("/set") / path).parts


# ---- at the door


def decathlon(folder, **changes):
    content = {
        "name": "toy",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
    }
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return folder


def nnunet(folder, **changes):
    table = {"a": {"images": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz"}}
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "dataset": table}
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return folder


def refusal(folder, **options):
    with pytest.raises(DataError) as error:
        read_manifest(folder, **options)
    assert all(line.isprintable() for line in str(error.value).splitlines())
    return str(error.value)


@pytest.mark.parametrize(
    ("write", "changes", "text"),
    [
        (decathlon, {"name": "../../x"}, "got '../../x', which has '/', which parts folders. Rename it"),
        (decathlon, {"labels": {"0": "b", "1": ESCAPE}}, "class of data set"),
        (decathlon, {"labels": {"0": "b", "1": "=1+1"}}, "as formulas of spreadsheets do"),
        (decathlon, {"labels": {"0": "b", "1": "a", "2": "a"}}, "expected each name once, got a more than once"),
        (decathlon, {"labels": {"0": "b", "1": "Left kidney", "2": "left  kidney"}}, "got Left kidney beside left"),
        (decathlon, {"modality": {"0": ESCAPE}}, "channel of data set"),
        (decathlon, {"test": ["imagesTs/.nii.gz"]}, "which is empty"),
        (decathlon, {"test": ["imagesTs/NUL.nii.gz"]}, "name of the case of"),
        (
            decathlon,
            {"test": ["imagesTs/A.nii.gz"]},
            "expected one case per name, over training, validation and test, ",
        ),
        (
            decathlon,
            {"test": ["../x.nii.gz", "b.nii.gz"]},
            "of 'test' names '../x.nii.gz', which leads up by '..', and",
        ),
        (decathlon, {"training": [{"image": "/a.nii.gz", "label": "../b.nii.gz"}]}, "names '../b.nii.gz', which leads"),
        (decathlon, {"test": ["/x.nii.gz"] * 999}, "and 989 more of this kind"),
        (nnunet, {"name": "."}, "begins with a dot"),
        (nnunet, {"dataset": {"../a": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}, "got '../a', which has '/'"),
        (
            nnunet,
            {"dataset": {"a": {"images": ["~/../a"], "label": "b"}}},
            "case 'a' of 'dataset' names '~/../a', whic",
        ),
        (nnunet, {"labels": {"background": 0, ESCAPE: 1}}, "which has characters that cannot be printed"),
    ],
)
def test_what_is_refused_when_a_set_is_read(tmp_path, write, changes, text):
    assert text in refusal(write(tmp_path / "set", **changes))


def test_the_folder_names_a_set_and_may_be_no_name(tmp_path):
    assert "Rename it" in refusal(decathlon(tmp_path / "a:b", name=None))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" + "0," * 9_000_000 + "0]"])
def test_what_is_deep_or_huge_is_refused_in_words(tmp_path, text):
    decathlon(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_text(text)
    assert "expected at most" in refusal(tmp_path / "set") or "of 16777216 at most" in refusal(tmp_path / "set")


def test_files_outside_are_read_where_that_is_allowed(tmp_path):
    files = {"image": str(tmp_path / "x.nii.gz"), "label": "../y.nii.gz"}
    (case,) = read_manifest(decathlon(tmp_path / "set", training=[files]), allow_outside=True).train
    assert (case.name, case.images, case.label.resolve()) == ("x", (tmp_path / "x.nii.gz",), tmp_path / "y.nii.gz")
    table = {"a": {"images": [files["image"]], "label": files["label"]}}
    (case,) = read_manifest(nnunet(tmp_path / "other", dataset=table), allow_outside=True).train
    assert (case.images, case.label.resolve()) == ((tmp_path / "x.nii.gz",), tmp_path / "y.nii.gz")


def test_links_in_the_folder_are_the_users_own(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a.nii.gz").write_bytes(b"")
    decathlon(tmp_path / "set")
    (tmp_path / "set" / "imagesTr").symlink_to(tmp_path / "store")
    assert read_manifest(tmp_path / "set").train[0].images[0].is_file()


def test_names_of_files_in_a_bare_folder(tmp_path):
    for name in ("a_0000.nii.gz", "A_0000.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="got A beside a"):
        folder_cases(tmp_path, num_channels=1)
    (tmp_path / "A_0000.nii.gz").rename(tmp_path / f"{ESCAPE}_0000.nii.gz")
    with pytest.raises(DataError, match="cannot be printed"):
        folder_cases(tmp_path, num_channels=1)


def test_a_manifest_made_by_hand_is_no_other_door():
    case = CaseFiles(name="a", images=(Path("a.nii.gz"),))
    with pytest.raises(DataError, match=r"name of data set \.: expected a name that a file can have everywhere"):
        Manifest(name="..", folder=Path(), layout="mine", channels=("CT",), classes=("a",), train=(case,))
    with pytest.raises(DataError, match="got a 2 times"):
        Manifest(name="a", folder=Path(), layout="mine", channels=("CT",), classes=("a",), train=(case, case))

"""Which files each layout makes a data set of, and what is said where there is none."""

import json
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.cli import LAYOUT
from dstlib.zoo.e2enet.data.layouts import detect
from dstlib.zoo.e2enet.data.layouts.amos import AMOS_ORGANS, modalities, only_modality
from dstlib.zoo.e2enet.data.layouts.detect import LAYOUTS, folder_cases, read_manifest
from dstlib.zoo.e2enet.data.layouts.files import scan_files
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.scans.nifti import read_label
from dstlib.zoo.e2enet.data.splits import split


def touch(folder: Path, *names: str) -> None:
    """Empty files: a manifest opens none."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(b"")


def write_json(folder: Path, content: dict, **changes) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    content = {k: v for k, v in (content | changes).items() if v is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


def pairs(*names: str, part: str = "Tr") -> list[dict[str, str]]:
    return [{"image": f"./images{part}/{n}.nii.gz", "label": f"./labels{part}/{n}.nii.gz"} for n in names]


DECATHLON = {
    "name": "toy",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "liver", "2": "tumour"},
    "training": pairs("a", "b", "c"),
    "test": ["./imagesTs/d.nii.gz"],
}
# As it is distributed: these spellings differ from those of AMOS_ORGANS.
DISTRIBUTED = (*AMOS_ORGANS[:3], "gall bladder", "esophagus", "liver", "stomach", "arota", *AMOS_ORGANS[8:])
AMOS = {
    "name": "AMOS",
    "modality": {"0": "CT"},
    "labels": {str(i): name for i, name in enumerate(("background", *DISTRIBUTED))},
    "training": pairs("amos_0507", "amos_0001"),
    "validation": pairs("amos_0008", "amos_0600", part="Va"),
    "test": [{"image": "./imagesTs/amos_0002.nii.gz"}],
}
NNUNET = {
    "channel_names": {"0": "FLAIR", "1": "T1w"},
    "labels": {"background": 0, "core": 2, "edema": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def write_nnunet(folder: Path, **changes) -> None:
    write_json(folder, NNUNET, **changes)
    touch(folder, *(f"imagesTr/{n}_000{i}.nii.gz" for n in ("x_1", "x_2") for i in (0, 1)))
    touch(folder, "labelsTr/x_1.nii.gz", "labelsTr/x_2.nii.gz", "imagesTs/x_3_0000.nii.gz", "imagesTs/x_3_0001.nii.gz")


def write_btcv(folder: Path) -> None:
    touch(folder, *(f"RawData/Training/img/img{i:04d}.nii.gz" for i in (1, 2)))
    touch(folder, *(f"RawData/Training/label/label{i:04d}.nii.gz" for i in (1, 2)))
    touch(folder, "RawData/Testing/img/img0061.nii.gz")


def refusal(folder, layout=None) -> str:
    with pytest.raises(DataError) as error:
        read_manifest(folder, layout)
    return str(error.value)


def names(cases) -> list[str]:
    return [case.name for case in cases]


def files(case, folder) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in (*case.images, *([case.label] if case.label else []))]


# ---- Decathlon


def test_decathlon(tmp_path):
    write_json(tmp_path, DECATHLON)
    manifest = read_manifest(str(tmp_path))
    assert (manifest.name, manifest.layout, manifest.folder) == ("toy", "decathlon", tmp_path)
    assert (manifest.channels, manifest.classes) == (("CT",), ("liver", "tumour"))
    assert names(manifest.train) == ["a", "b", "c"]
    assert files(manifest.train[1], tmp_path) == ["imagesTr/b.nii.gz", "labelsTr/b.nii.gz"]
    assert manifest.validation == ()
    assert files(manifest.test[0], tmp_path) == ["imagesTs/d.nii.gz"]


def test_channels_are_sorted_by_number_and_the_folder_names_a_set_without_a_name(tmp_path):
    modality = {str(i): f"channel {i}" for i in reversed(range(11))}
    write_json(tmp_path / "Task01", DECATHLON, name=None, modality=modality, test=None)
    manifest = read_manifest(tmp_path / "Task01")
    assert manifest.channels == tuple(f"channel {i}" for i in range(11))
    assert manifest.name == "Task01"


def test_unlisted_files_do_no_harm(tmp_path):
    write_json(tmp_path, DECATHLON)
    touch(tmp_path, "imagesTr/._a.nii.gz", "imagesTr/notes.txt", "._dataset.json", "imagesTr/z.nii.gz")
    manifest = read_manifest(tmp_path)
    assert names(manifest.train) == ["a", "b", "c"]
    assert manifest.notes == (
        "1 scan in imagesTr left out, as dataset.json does not list them: z.nii.gz",
        "1 file in imagesTr left out, as no scan has such a name: notes.txt",
        "1 hidden file left out, as macOS leaves such beside scans: ._a.nii.gz",
    )


@given(
    listed=st.sets(st.sampled_from("abcdef"), min_size=1),
    there=st.sets(st.sampled_from("abcdef")),
    number=st.integers(0, 7),
)
def test_no_scan_of_a_part_goes_unsaid(tmp_path_factory, listed, there, number):
    """Whatever lies in a folder is in the set, or is counted as left out; a promise that is not kept is told."""
    folder = tmp_path_factory.mktemp("set")
    write_json(folder, DECATHLON, training=pairs(*listed), test=None, numTraining=number)
    touch(folder, *(f"imagesTr/{name}.nii.gz" for name in there))
    manifest, lost = read_manifest(folder), len(there - listed)
    scans = "1 scan" if lost == 1 else f"{lost} scans"
    assert any(note.startswith(f"{scans} in imagesTr left out") for note in manifest.notes) == (lost > 0)
    told = f"dataset.json promises {number} cases under 'numTraining', but there are {len(listed)}: "
    assert any(note.startswith(told) for note in manifest.notes) == (number != len(listed))


@pytest.mark.parametrize("text", ["", "{", '{"labels": ', "\xff"])
def test_a_manifest_that_is_not_json(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    message = refusal(tmp_path)
    assert "dataset.json: expected strict JSON in UTF-8, got" in message
    assert "Restore the file" in message


@pytest.mark.parametrize("content", ["[]", '"text"', "3"])
def test_a_manifest_of_another_kind(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    assert f"dataset.json: expected an object, got {content.replace(chr(34), chr(39))}. Restore" in refusal(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "dataset.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(DECATHLON).encode())
    assert names(read_manifest(tmp_path).train) == ["a", "b", "c"]


def test_all_that_a_manifest_lacks_is_said_at_once(tmp_path):
    write_json(tmp_path, DECATHLON, modality=None, labels={"background": 0}, training=[], test="d.nii.gz")
    message = refusal(tmp_path)
    assert "'modality' is None" in message
    assert "'labels' is {'background': 0}" in message
    assert "'training' is []" in message
    assert "'test' is 'd.nii.gz' but a list of files" in message


def test_more_classes_than_a_byte_holds(tmp_path):
    write_json(tmp_path, DECATHLON, labels={str(i): f"organ {i}" for i in range(257)})
    assert "'labels' has 257 entries" in refusal(tmp_path)


def test_entries_without_files(tmp_path):
    write_json(tmp_path, DECATHLON, training=[{"image": "imagesTr/a.nii.gz"}, "imagesTr/b.nii.gz"], test=[{}, 3])
    message = refusal(tmp_path)
    for i in (0, 1):
        assert f"entry {i} of 'training'" in message
        assert f"entry {i} of 'test'" in message
    assert "but names an 'image' and a 'label'" in message


def test_a_case_listed_twice(tmp_path):
    write_json(tmp_path, DECATHLON, training=pairs("a", "b", "b"), test=["imagesTs/a.nii.gz", "imagesTs/d.nii.gz"])
    assert "got a 2 times, b 2 times. Rename or remove the copies" in refusal(tmp_path)


# ---- AMOS22


def test_amos(tmp_path):
    write_json(tmp_path, AMOS)
    manifest = read_manifest(tmp_path)
    assert manifest.layout == "amos"
    assert names(manifest.train) == ["amos_0001", "amos_0507"]
    assert names(manifest.validation) == ["amos_0008", "amos_0600"]
    assert files(manifest.validation[0], tmp_path) == ["imagesVa/amos_0008.nii.gz", "labelsVa/amos_0008.nii.gz"]
    assert names(manifest.test) == ["amos_0002"]
    assert manifest.test[0].label is None
    assert modalities(manifest.cases) == {"ct": 3, "mri": 2}
    assert manifest.recognised == "cases named amos_NNNN and the 15 organs of AMOS22, so numbered, in dataset.json"
    assert manifest.guess == (f"Layout amos, recognised by {manifest.recognised}; --layout chooses another.",)
    assert read_manifest(tmp_path, "amos").guess == ()


def test_amos_as_it_was_during_the_challenge(tmp_path):
    """The validation scans came without labels, so they are test scans."""
    write_json(tmp_path, AMOS, validation=[{"image": "./imagesVa/amos_0008.nii.gz"}])
    manifest = read_manifest(tmp_path)
    assert manifest.validation == ()
    assert names(manifest.test) == ["amos_0002", "amos_0008"]
    assert manifest.notes == ("1 of the 1 validation cases have no label, so they are test cases: amos_0008",)


SEVEN = {str(i): name for i, name in enumerate(("background", *DISTRIBUTED[:7]))}
TURNED = {str(i): name for i, name in enumerate(("background", *reversed(DISTRIBUTED)))}
OTHER_NAMES = {part: pairs(f"toy_{n}") for n, part in ((490, "training"), (510, "validation"))}


@pytest.mark.parametrize("changes", [{"labels": SEVEN}, {"labels": TURNED}, {"test": None, **OTHER_NAMES}])
def test_a_list_of_validation_cases_makes_no_set_amos(tmp_path, changes):
    """Nor does a folder imagesVa: the names and the organs do, both."""
    write_json(tmp_path, AMOS, **changes)
    touch(tmp_path, "imagesVa/notes.txt")
    manifest = read_manifest(tmp_path)
    assert (manifest.layout, len(manifest.validation)) == ("decathlon", 2 if "labels" in changes else 1)
    told = "pass --layout amos if ids from 500 up are MRI"
    assert any(told in note for note in manifest.notes) == ("labels" in changes)


def test_ct_and_mri_of_amos(tmp_path):
    write_json(tmp_path, AMOS)
    manifest = read_manifest(tmp_path)
    ct, mri = only_modality(manifest, "ct"), only_modality(manifest, "mri")
    assert [names(part) for part in (ct.train, ct.validation, ct.test)] == [["amos_0001"], ["amos_0008"], ["amos_0002"]]
    assert [names(part) for part in (mri.train, mri.validation, mri.test)] == [["amos_0507"], ["amos_0600"], []]
    assert (ct.channels, mri.channels) == (("CT",), ("MRI",))
    assert modalities(ct.cases) == {"ct": 3}
    why = "left out, as --modality ct takes the CT scans of AMOS22 alone (ids from 500 up are MRI): "
    assert ct.notes == (
        f"1 of the 2 training cases {why}amos_0507",
        f"1 of the 2 validation cases {why}amos_0600",
    )
    with pytest.raises(DataError, match=r"some that are MRI, got none of 1\. Its names .* pass --layout decathlon\."):
        only_modality(ct, "mri")


def test_names_without_an_id_are_neither_ct_nor_mri_and_are_named(tmp_path):
    write_json(tmp_path, AMOS, training=pairs("amos_0001", "phantom_1"))
    manifest = only_modality(read_manifest(tmp_path, "amos"), "ct")
    assert modalities(read_manifest(tmp_path, "amos").cases)["neither"] == 1
    assert manifest.notes[0].startswith("1 of the 2 training cases left out")
    assert manifest.notes[0].endswith("phantom_1")


def test_only_amos_is_divided_by_ids(tmp_path):
    write_json(tmp_path, DECATHLON)
    manifest = read_manifest(tmp_path)
    with pytest.raises(SettingError, match=r"expected AMOS22 \(--layout amos\), got layout 'decathlon'"):
        only_modality(manifest, "ct")


# ---- BTCV


@pytest.mark.parametrize("inside", [".", "RawData", "RawData/Training"])
def test_btcv_from_each_of_its_folders(tmp_path, inside):
    write_btcv(tmp_path)
    manifest = read_manifest(tmp_path / inside)
    assert (manifest.name, manifest.layout, manifest.channels) == ("BTCV", "btcv", ("CT",))
    assert len(manifest.classes) == 13
    assert manifest.classes[9] == "portal and splenic veins"
    assert names(manifest.train) == ["img0001", "img0002"]
    assert files(manifest.train[1], tmp_path / "RawData") == [
        "Training/img/img0002.nii.gz",
        "Training/label/label0002.nii.gz",
    ]
    assert files(manifest.test[0], tmp_path / "RawData") == ["Testing/img/img0061.nii.gz"]


def test_folders_img_and_label_alone_are_not_btcv(tmp_path):
    """Many sets have such: BTCV's organs, and its CT, are those of files that are named as its own."""
    touch(tmp_path, "img/patient1.nii.gz", "label/patient1.nii.gz")
    assert "The layouts, as --layout names them" in refusal(tmp_path)
    assert names(read_manifest(tmp_path, "btcv").train) == ["patient1"]
    write_btcv(tmp_path)
    found = read_manifest(tmp_path / "RawData").recognised
    assert found == "img/img0001.nii.gz and label/label0001.nii.gz, without a dataset.json"


def test_btcv_with_halves_of_cases(tmp_path):
    write_btcv(tmp_path)
    (tmp_path / "RawData/Training/img/img0001.nii.gz").unlink()
    (tmp_path / "RawData/Training/label/label0002.nii.gz").unlink()
    touch(tmp_path, "RawData/Training/img/._img0003.nii.gz", "RawData/Training/img/.DS_Store")
    first, second = read_manifest(tmp_path).train
    assert not first.images[0].exists()
    assert first.label.exists()
    assert second.images[0].exists()
    assert not second.label.exists()


def test_btcv_with_copies(tmp_path):
    write_btcv(tmp_path)
    touch(tmp_path, "RawData/Training/img/img0001.nii", "RawData/Training/label/label0002.nii")
    assert "got img0001 2 times, img0002 2 times" in refusal(tmp_path)


def test_btcv_without_images(tmp_path):
    assert "got no folders img and label in it" in refusal(tmp_path, "btcv")
    (tmp_path / "img").mkdir()
    (tmp_path / "label").mkdir()
    assert f"got no NIfTI file in {tmp_path / 'img'}" in refusal(tmp_path, "btcv")


# ---- nnU-Net


def test_nnunet(tmp_path):
    folder = tmp_path / "Dataset137_Brain"
    write_nnunet(folder)
    touch(folder, "imagesTr/._x_1_0000.nii.gz")
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.layout) == ("Brain", "nnunet")
    assert (manifest.channels, manifest.classes) == (("FLAIR", "T1w"), ("edema", "core"))
    assert names(manifest.train) == ["x_1", "x_2"]
    assert files(manifest.train[0], folder) == [
        "imagesTr/x_1_0000.nii.gz",
        "imagesTr/x_1_0001.nii.gz",
        "labelsTr/x_1.nii.gz",
    ]
    assert files(manifest.test[0], folder) == ["imagesTs/x_3_0000.nii.gz", "imagesTs/x_3_0001.nii.gz"]


def test_nnunet_names_the_files_that_lack(tmp_path):
    write_nnunet(tmp_path)
    (tmp_path / "imagesTr/x_1_0000.nii.gz").unlink()
    (tmp_path / "labelsTr/x_2.nii.gz").unlink()
    manifest = read_manifest(tmp_path)
    absent = [f.name for case in manifest.train for f in (*case.images, case.label) if not f.exists()]
    assert absent == ["x_1_0000.nii.gz", "x_2.nii.gz"]


def test_nnunet_with_a_channel_too_many(tmp_path):
    write_nnunet(tmp_path)
    touch(tmp_path, "imagesTr/x_1_0003.nii.gz")
    images = read_manifest(tmp_path).train[0].images
    assert [f.name[-11:-7] for f in images] == ["0000", "0001", "0002", "0003"]


def test_nnunet_with_an_explicit_list(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    table = {"q": {"images": ["imagesTr/q.nii.gz", "other/q.nii.gz"], "label": "${SECRET}/q.nii.gz"}}
    write_json(tmp_path, NNUNET, dataset=table, numTraining=1)
    case = read_manifest(tmp_path).train[0]
    assert case.images == (tmp_path / "imagesTr/q.nii.gz", tmp_path / "other/q.nii.gz")
    assert case.label == tmp_path / "${SECRET}/q.nii.gz", "nnU-Net would put the variable's value in"
    with pytest.raises(DataError) as error:
        read_label(case.label)
    assert "${SECRET}/q.nii.gz is missing: variables of the environment stay as they are written" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"channel_names": {"1": "CT"}}, "'channel_names' is {'1': 'CT'} but numbers its names from 0"),
        ({"labels": {"a": 1, "b": 2}}, "but names the background, which is 0, and more"),
        ({"labels": {"background": 0}}, "but names the background, which is 0, and more"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "gives each value one name"),
        ({"labels": {"0": "background", "1": "a"}}, "but gives each name a value from 0 to 255"),
        ({"labels": {"background": 0, "a": 256}}, "but gives each name a value from 0 to 255"),
        ({"labels": None}, "'labels' is None but gives each name a value from 0 to 255"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "'labels' ignores 1 but one value that is none of 0, 1"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}, "'labels' ignores [2, 3] but one value"),
        ({"labels": {"background": 0, "a": [0, 1], "b": 1}}, "'labels' puts the background, 0, into a"),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}},
            "'regions_class_order' is None but the value that each of the 2 regions (whole, core) is written as",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]},
            "'regions_class_order' is [1] but the value that each of the 2 regions",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [2, 1]},
            "'regions_class_order' is [2, 1], so it writes core as 1, which is none of its values",
        ),
        ({"file_ending": ".png"}, "'file_ending' is '.png', but what is read is .nii.gz, .nii, .seg.nrrd, .nrrd"),
        ({"dataset": ["x"]}, "'dataset' is ['x'] but lists files by case"),
        (
            {"dataset": {"x": {"images": []}}},
            "case 'x' of 'dataset' is {'images': []} but names 'images' and a 'label'",
        ),
        (
            {"dataset": {"x": {"images": 5, "label": "labelsTr/x_1.nii.gz"}}},
            "case 'x' of 'dataset' is {'images': 5, 'label': 'labelsTr/x_1.nii.gz'} but names 'images' and a 'label'",
        ),
        ({"labels": {"background": 0, "a": "9" * 5000}}, "but gives each name a value from 0 to 255"),
        (
            {"channel_names": {"0": {"CT": 1}, "1": "T1w"}},
            "'channel_names' is {'0': {'CT': 1}, '1': 'T1w'} but numbers",
        ),
        ({"name": ["Brain"]}, "'name' is ['Brain'] but text"),
        ({"numTraining": "2"}, "'numTraining' is '2' but a whole number"),
        ({"numTraining": 3}, "expected 3, as dataset.json says under 'numTraining', got 2. Restore"),
    ],
)
def test_what_is_refused_of_nnunet(tmp_path, changes, text):
    write_nnunet(tmp_path, **changes)
    assert text in refusal(tmp_path)


def test_regions_of_nnunet_in_the_order_of_their_names(tmp_path):
    table = {"background": 0, "whole": [1, 2, 3], "enhancing": 3, "core": ["2", 3], "ignore": 4}
    write_nnunet(tmp_path, labels=table, regions_class_order=[1, 3, 2])
    manifest = read_manifest(tmp_path)
    assert manifest.classes == ("whole", "enhancing", "core")
    assert manifest.labels == Labels(values=(1, 2, 3), regions=((1, 2, 3), (3,), (2, 3)), written=(1, 3, 2), ignored=4)
    assert manifest.notes == (
        "no prediction says whole and enhancing and core at once, as value 3 does: by 'regions_class_order' it says "
        "whole and core",
    )


def test_what_nnunet_would_not_take_is_read_and_said(tmp_path):
    write_nnunet(tmp_path, labels={"background": 0, "core": 1, "enhancing": 4, "ignore": 255})
    manifest = read_manifest(tmp_path)
    assert manifest.labels == Labels(values=(1, 4), ignored=255)
    assert manifest.notes == (
        "label files hold 1, 4, where nnU-Net demands 1 to 2 without gaps, and stops",
        "value 255 is ignored, where nnU-Net demands 5, one above the highest class, and stops",
    )


def test_numbers_of_nnunet_labels_may_be_text(tmp_path):
    """As nnU-Net itself accepts them: the conversion of AMOS22 that it ships writes them so."""
    write_nnunet(tmp_path, labels={"background": "0", "edema": "1"})
    assert read_manifest(tmp_path).classes == ("edema",)


def test_a_label_too_many_is_named_where_the_numbers_differ(tmp_path):
    write_nnunet(tmp_path)
    touch(tmp_path, "labelsTr/y.nii.gz")
    assert "got 3, of which files are missing: y." in refusal(tmp_path)


def test_what_lies_beside_is_named_where_the_numbers_differ(tmp_path):
    write_nnunet(tmp_path, numTraining=3)
    touch(tmp_path, *(f"imagesTr/x_9_000{i}.nii.gz.part" for i in (0, 1)))
    message = refusal(tmp_path)
    assert "expected 3, as dataset.json says under 'numTraining', got 2; 2 files in imagesTr left out" in message
    assert "x_9_0000.nii.gz.part, x_9_0001.nii.gz.part" in message


def test_image_names_without_a_channel(tmp_path):
    write_nnunet(tmp_path)
    touch(tmp_path, "imagesTr/y.nii.gz", "imagesTr/x_1_0000.nii")
    message = refusal(tmp_path)
    assert "expected one file CASE_0000.nii.gz, CASE_0001.nii.gz, ... per case and channel, got" in message
    assert "y.nii.gz" in message
    assert "x_1_0000.nii" in message


def test_copies_of_labels(tmp_path):
    write_nnunet(tmp_path, numTraining=None)
    touch(tmp_path, "labelsTr/x_1.nii")
    assert "got x_1 2 times" in refusal(tmp_path)


# ---- recognising


def test_an_unknown_folder_is_told_how_each_layout_looks(tmp_path):
    touch(tmp_path, "scans/a.dcm", ".hidden")
    message = refusal(tmp_path)
    assert message.startswith(
        f"data set of {tmp_path}: expected a folder with a dataset.json, or of another layout, got no dataset"
    )
    assert "got no dataset.json in it, but scans/. The layouts, as --layout names them, look so:" in message
    for layout in LAYOUTS:
        assert f"\n  {layout} " in message


def test_the_folder_above_is_told_the_right_one(tmp_path):
    write_json(tmp_path / "amos22", AMOS)
    assert f"Did you mean {tmp_path / 'amos22'}?" in refusal(tmp_path)


def test_what_is_no_folder(tmp_path):
    touch(tmp_path, "a.zip")
    assert "got a file. The layouts" in refusal(tmp_path / "a.zip")
    assert "got no such folder" in refusal(tmp_path / "absent", "nnunet")


@pytest.mark.parametrize("read", [read_manifest, lambda folder: folder_cases(folder, num_channels=1)])
def test_a_folder_that_cannot_be_looked_into(tmp_path, read, monkeypatch):
    with pytest.raises(DataError, match="expected a folder that can be read, got File name too long"):
        read(tmp_path / ("a" * 300))

    def denied(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(DataError, match="expected a folder that can be read, got Permission denied"):
        read(tmp_path)


def test_another_dataset_json(tmp_path):
    write_json(tmp_path, {"images": [], "annotations": []})
    assert "got a dataset.json with 'images', 'annotations'. The layouts" in refusal(tmp_path)


@pytest.mark.parametrize(("labels", "layout"), [(NNUNET["labels"], "nnunet"), (DECATHLON["labels"], "decathlon")])
def test_entries_of_two_layouts_are_told_apart_by_the_labels(tmp_path, labels, layout):
    """A set that was converted, and kept what it had before."""
    write_nnunet(tmp_path, **{key: DECATHLON[key] for key in ("modality", "training")}, labels=labels)
    assert read_manifest(tmp_path).layout == layout


def test_every_layout_is_named_by_the_help_of_its_option_and_by_the_page_of_data_sets():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text()
    named = LAYOUT.split(" (")[0].replace(" or ", ", ").split(", ")
    assert named == [*LAYOUTS]
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")][: len(LAYOUTS)] == [*LAYOUTS]


def test_two_layouts_that_fit_are_both_named(tmp_path):
    write_json(tmp_path, DECATHLON)
    with pytest.MonkeyPatch.context() as patch:
        other = replace(LAYOUTS["btcv"], evidence=lambda source: "a hunch")
        patch.setattr(detect, "LAYOUTS", {**LAYOUTS, "btcv": other})
        message = refusal(tmp_path)
    evidence = "'modality', 'labels', 'training' in dataset.json"
    assert f"expected one that fits, got decathlon, by {evidence}, and btcv, by a hunch. " in message
    assert message.endswith("Say which it is: --layout decathlon or --layout btcv.")


def test_an_unknown_layout(tmp_path):
    with pytest.raises(SettingError, match=r"got 'nnUnet'\. Did you mean 'nnunet'"):
        read_manifest(tmp_path, "nnUnet")


@given(seed=st.integers(0, 2**16), layout=st.sampled_from(["btcv", "nnunet"]))
def test_a_manifest_does_not_depend_on_the_order_of_a_folder(tmp_path_factory, seed, layout):
    folder = tmp_path_factory.mktemp("set")
    (write_btcv if layout == "btcv" else write_nnunet)(folder)
    manifest = read_manifest(folder)
    listed = Path.iterdir

    def shuffled(path):
        inside = sorted(listed(path))
        np.random.default_rng(seed).shuffle(inside)
        return iter(inside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", shuffled)
        assert read_manifest(folder) == manifest
        cases = folder_cases(folder / ("RawData/Training/img" if layout == "btcv" else "imagesTr"), num_channels=2)
    assert names(cases) == names(manifest.train) == sorted(names(manifest.train))


@given(order=st.permutations(range(3)))
def test_a_manifest_does_not_depend_on_the_order_of_a_list(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("set")
    write_json(folder, DECATHLON, training=[DECATHLON["training"][i] for i in order])
    assert names(read_manifest(folder).train) == ["a", "b", "c"]


# ---- bare folders


@pytest.mark.parametrize(
    ("present", "num_channels", "expected"),
    [
        (["amos_0001.nii.gz", "amos_0004.nii.gz"], 1, {"amos_0001": 1, "amos_0004": 1}),
        (["b.nii", "A.NII.GZ", "._b.nii", "notes.txt"], 1, {"A": 1, "b": 1}),
        (["x_0000.nii.gz", "y_0000.nii.gz"], 1, {"x": 1, "y": 1}),
        (["x_0000.nii.gz", "y.nii.gz"], 1, {"x": 1, "y": 1}),
        (["x_0000.nii.gz", "x_0001.nii.gz", "y_0001.nii.gz", "z.nii"], 2, {"x": 2, "y_0001": 1, "z": 1}),
        (["x_0000.nii.gz", "x_0001.nii.gz", "y_0000.nii.gz", "y_0001.nii.gz"], 2, {"x": 2, "y": 2}),
        (["x_0000.nii.gz"], 2, {"x": 2}),  # the second channel is missing: whoever reads it says so
        (["scan_0001.nii.gz", "scan_0002.nii.gz"], 4, {"scan_0001": 1, "scan_0002": 1}),  # with four channels each
        (["BRATS_001.nii.gz"], 4, {"BRATS_001": 1}),
    ],
)
def test_images_of_a_folder(tmp_path, present, num_channels, expected):
    touch(tmp_path, *present)
    cases = folder_cases(tmp_path, num_channels=num_channels)
    assert {case.name: len(case.images) for case in cases} == expected
    assert all(case.label is None for case in cases)


@given(
    st.sets(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "_0000", "_0001", "_0002", "_x"])), min_size=1),
    st.integers(1, 3),
)
def test_what_a_case_is_called_does_not_depend_on_the_others(tmp_path_factory, present, num_channels):
    def called(letters):
        """The names of the cases, by the names of their files; None where they are refused."""
        folder = tmp_path_factory.mktemp("images")
        touch(folder, *(f"{letter}{end}.nii.gz" for letter, end in present if letter in letters))
        with suppress(DataError):
            cases = folder_cases(folder, num_channels=num_channels)
            return {file.name: case.name for case in cases for file in case.images}

    together, alone = called("abc"), [called(letter) for letter in {letter for letter, _ in present}]
    if together is None:
        assert None in alone
    else:
        assert together == {file: name for each in alone for file, name in each.items()}


def test_numbers_that_may_be_those_of_cases_are_refused(tmp_path):
    touch(tmp_path, "amos_0000.nii.gz", "amos_0004.nii.gz")
    with pytest.raises(
        DataError, match=r"got amos in more numbered files\. Predict with a network of as many channels"
    ):
        folder_cases(tmp_path, num_channels=1)


def test_folders_that_hold_no_images(tmp_path):
    with pytest.raises(
        DataError, match=r"expected files that end in \.nii\.gz, .*, or folders of DICOM slices, got none in it"
    ):
        folder_cases(tmp_path, num_channels=1)
    with pytest.raises(DataError, match="got no such folder"):
        folder_cases(tmp_path / "absent", num_channels=1)
    touch(tmp_path, "a.nii", "a.nii.gz")
    with pytest.raises(DataError, match="got a 2 times"):
        folder_cases(tmp_path, num_channels=1)


def write_slices(*files):
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(128) + b"DICM")


def test_scans_of_every_format_are_listed(tmp_path):
    names = ("a.nii", "b.NII.GZ", "c.nrrd", "d.nhdr", "e.mha", "f.mhd", "g.seg.nrrd")
    touch(tmp_path, *names, "._a.nii", "d.raw", "f.zraw", "notes.txt", "empty/notes.txt")
    write_slices(tmp_path / "h" / "0001.dcm", tmp_path / "i" / "study" / "1.2.840.7", tmp_path / "j" / "IM_1")
    assert [file.name for file in scan_files(tmp_path)] == [*names, "h", "i", "j"]
    assert [case.name for case in folder_cases(tmp_path, num_channels=1)] == list("abcdefghij")


def test_a_folder_of_slices_is_one_scan(tmp_path, monkeypatch):
    write_slices(tmp_path / "liver" / "0001", tmp_path / "liver" / "more" / "0002")
    assert scan_files(tmp_path / "liver") == (tmp_path / "liver",)
    touch(tmp_path / "liver", "a.nii.gz")
    assert scan_files(tmp_path / "liver") == (tmp_path / "liver", tmp_path / "liver" / "a.nii.gz")
    monkeypatch.chdir(tmp_path / "liver")
    assert scan_files(Path(".")) == (tmp_path / "liver", Path("a.nii.gz"))  # whose name is that of the case


def test_slices_with_nothing_in_them_are_no_reason_to_leave_their_folder_out(tmp_path):
    touch(tmp_path, "case/1.dcm", "case/2.DCM")
    assert scan_files(tmp_path) == (tmp_path / "case",)


def test_two_formats_of_one_name_are_refused(tmp_path):
    touch(tmp_path, "a.nrrd", "a.nii.gz")
    with pytest.raises(DataError, match="got a 2 times"):
        folder_cases(tmp_path, num_channels=1)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_nnunet_with_other_endings(tmp_path, ending):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ending})
    )
    touch(tmp_path, f"imagesTr/x_0000{ending}", f"labelsTr/x{ending}", f"imagesTr/y_0000{ending}")
    manifest = read_manifest(tmp_path)
    assert [(c.name, c.images[0].name, c.label.name) for c in manifest.train] == [
        ("x", f"x_0000{ending}", f"x{ending}"),
        ("y", f"y_0000{ending}", f"y{ending}"),
    ]


# ---- the real scans


@pytest.mark.data
def test_the_real_scans_are_the_training_part_of_the_published_fold(hippocampus):
    """The 52 cases that are not here were held out by nnU-Net's fold 0 of the 260: our split must agree.

    Their ids are unknown, but each must fit into the gap between the two neighbours that are here.
    """
    cases = read_manifest(hippocampus).train
    here = sorted(int(case.name.removeprefix("hippocampus_")) for case in cases)
    places = [int(place) for place in split([f"{i:03d}" for i in range(260)], fold=0)[0]]
    for (a, b), (p, q) in zip(pairwise(here), pairwise(places), strict=True):
        assert b - a >= q - p, f"{q - p - 1} held-out case(s) between hippocampus {a} and {b}"

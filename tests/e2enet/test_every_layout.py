"""A set of every layout: what is read of it, and the whole way from the check to the scores."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstlib.errors import DataError
from dstlib.zoo.e2enet.__main__ import main
from dstlib.zoo.e2enet.cli import read_config
from dstlib.zoo.e2enet.data.division import divide
from dstlib.zoo.e2enet.data.layouts import case_folders
from dstlib.zoo.e2enet.data.layouts.detect import folder_cases, read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.left_out import left_out_of_images
from dstlib.zoo.e2enet.data.layouts.lists import names_of
from dstlib.zoo.e2enet.data.preprocessing.cache import prepared_cases
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, read_case_label
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.run import run_recipe
from tests.layout_sets import (
    NUM_CASES,
    SEQUENCES,
    SETS,
    brats,
    decathlon,
    kits,
    monai,
    nnunet_v1,
    save,
    totalsegmentator,
    volumes,
    write_json,
)

BRATS = [*SEQUENCES["_"], "seg"]
# What each set is, beside its name: layout, channels, values of the label files, files of its first case.
EXPECTED = {
    "decathlon": ("decathlon", ("MRI",), (1, 2), "imagesTr/scan_0.nii.gz labelsTr/scan_0.nii.gz"),
    "amos": ("amos", ("CT",), (*range(1, 16),), "imagesTr/amos_0001.nii.gz labelsTr/amos_0001.nii.gz"),
    "btcv": (
        "btcv",
        ("CT",),
        (*range(1, 14),),
        "RawData/Training/img/img0001.nii.gz RawData/Training/label/label0001.nii.gz",
    ),
    "nnunet": (
        "nnunet",
        ("T1", "T2"),
        (1, 2),
        "imagesTr/scan_0_0000.nii.gz imagesTr/scan_0_0001.nii.gz labelsTr/scan_0.nii.gz",
    ),
    "nnunet-v1": ("nnunet-v1", ("MRI",), (1, 2), "imagesTr/scan_0_0000.nii.gz labelsTr/scan_0.nii.gz"),
    "monai": (
        "monai",
        ("FLAIR", "T1w", "T1gd", "T2w"),
        (1, 2, 4),
        " ".join(f"TrainingData/BraTS2021_00000/BraTS2021_00000_{s}.nii.gz" for s in BRATS),
    ),
    "brats": (
        "brats",
        ("FLAIR", "T1w", "T1gd", "T2w"),
        (1, 2, 4),
        " ".join(f"BraTS2021_00000/BraTS2021_00000_{s}.nii.gz" for s in BRATS),
    ),
    "brats-2023": (
        "brats",
        ("FLAIR", "T1w", "T1gd", "T2w"),
        (1, 2, 3),
        " ".join(f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{s}.nii.gz" for s in [*SEQUENCES["-"], "seg"]),
    ),
    "kits": ("case-folders", ("CT",), (1, 2, 3), "case_00000/imaging.nii.gz case_00000/segmentation.nii.gz"),
    "totalsegmentator": (
        "case-folders",
        ("CT",),
        (1, 2),
        "s0000/ct.nii.gz s0000/segmentations/liver.nii.gz s0000/segmentations/spleen.nii.gz",
    ),
    "abdomen-atlas": (
        "case-folders",
        ("CT",),
        (*range(1, 26),),
        "BDMAP_00000000/ct.nii.gz BDMAP_00000000/combined_labels.nii.gz",
    ),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_set_is_recognised_and_every_file_of_it_found(tmp_path, kind):
    manifest = read_manifest(SETS[kind](tmp_path / "Set"))
    layout, channels, values, files = EXPECTED[kind]
    assert (manifest.layout, manifest.channels, manifest.labels) == (layout, channels, Labels(values=values))
    first = manifest.train[0]
    assert [f.relative_to(tmp_path / "Set").as_posix() for f in (*first.images, *first.label_files)] == files.split()
    assert all(file.is_file() for case in manifest.cases for file in (*case.images, *case.label_files))
    assert len(manifest.train) == (6 if kind == "amos" else NUM_CASES)
    assert manifest.guess[0].startswith(f"Layout {layout}, recognised by ")
    assert "--layout" in manifest.guess[0]


def test_names_are_told_by_folders_where_files_are_called_alike():
    assert names_of([["imagesTr/a.nii.gz"], ["imagesTr/b.nii.gz"]]) == ["a", "b"]
    assert names_of([["s1/x/ct.nii.gz"], ["s2/x/ct.nii.gz"]]) == ["s1", "s2"]
    assert names_of([["s1/ct.nii.gz", "s1/pet.nii.gz"], ["s2/ct.nii.gz", "s2/pet.nii.gz"]]) == ["s1", "s2"]
    assert names_of([["i/x_1_0000.nii", "i/x_1_0001.nii"], ["i/x_2_0000.nii", "i/x_2_0001.nii"]]) == ["x_1", "x_2"]
    assert names_of([["B_00_flair.nii", "B_00_t1.nii"], ["B_01_flair.nii", "B_01_t1.nii"]]) == ["B_00", "B_01"]


@given(names=st.lists(st.text("abc_", min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
def test_names_differ_wherever_files_or_folders_do(names):
    assert len(set(names_of([[f"images/{name}.nii.gz"] for name in names]))) == len(names)
    assert len(set(names_of([[f"{name}/ct.nii.gz"] for name in names]))) == len(names)


# ---- data lists


def test_folds_of_a_list_are_those_of_the_set(tmp_path):
    manifest = read_manifest(monai(tmp_path))
    even, odd = (tuple(f"BraTS2021_{i:05d}" for i in range(k, NUM_CASES, 2)) for k in (0, 1))
    assert manifest.folds == (even, odd)
    assert read_manifest(tmp_path / "folds.json") == manifest


def test_several_lists_in_one_folder_are_named(tmp_path):
    content = (monai(tmp_path) / "folds.json").read_text()
    (tmp_path / "folds_b.json").write_text(content)
    with pytest.raises(DataError, match=r"got folds\.json, folds_b\.json\. Pass the one that is meant .*folds\.json\."):
        read_manifest(tmp_path)


def test_a_list_without_labels_is_told_what_to_write(tmp_path):
    content = {"training": [{"image": ["a/x.nii.gz", "a/y.nii.gz"], "label": "a/l.nii.gz", "fold": 0}]}
    write_json(tmp_path / "list.json", content)
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path)
    assert '\'modality\' is None but numbers its names from 0, as in {"0": "CT"}' in str(error.value)
    assert "'labels' is None but names the values of label files" in str(error.value)


@pytest.mark.parametrize(
    ("modality", "channels"),
    [("MRI", ("MRI",) * 2), ({"0": "CT"}, ("CT",) * 2), ({"0": "CT", "1": "PET"}, ("CT", "PET"))],
)
def test_one_modality_is_that_of_all_channels_of_a_list(tmp_path, modality, channels):
    entry = {"image": ["a/ct.nii.gz", "a/pet.nii.gz"], "label": "a/l.nii.gz"}
    write_json(
        tmp_path / "dataset.json", {"training": [entry], "modality": modality, "labels": {"0": "no", "2": "yes"}}
    )
    manifest = read_manifest(tmp_path)
    assert (manifest.layout, manifest.channels, manifest.labels) == ("monai", channels, Labels(values=(2,)))


@pytest.mark.parametrize("folds", [[1], [0, 2], [0, -1], [0, "1"], [True]])
def test_folds_count_from_0_without_gaps(tmp_path, folds):
    entries = [{"image": f"{i}.nii.gz", "label": f"{i}_l.nii.gz", "fold": fold} for i, fold in enumerate(folds)]
    write_json(tmp_path / "dataset.json", {"training": entries, "modality": "CT", "labels": {"0": "no", "1": "yes"}})
    with pytest.raises(DataError, match="'fold'"):
        read_manifest(tmp_path, "monai")


# ---- nnU-Net v1


def test_files_of_both_names_fit_two_layouts(tmp_path):
    nnunet_v1(tmp_path)
    save(tmp_path / "imagesTr/scan_0.nii.gz", volumes(0)[0][0])
    with pytest.raises(DataError, match=r"Say which it is: --layout decathlon or --layout nnunet-v1\."):
        read_manifest(tmp_path)
    assert "imagesTr/scan_0.nii.gz" in str(read_manifest(tmp_path, "decathlon").train[0].images[0])
    note = "1 scan in imagesTr left out, as dataset.json does not list them: scan_0.nii.gz"
    assert note in read_manifest(tmp_path, "nnunet-v1").notes


# ---- a folder per case


def test_a_folder_without_a_label_is_a_test_case_and_one_without_an_image_left_out(tmp_path):
    (kits(tmp_path) / "notes").mkdir()
    manifest = read_manifest(tmp_path)
    assert [case.name for case in manifest.test] == ["case_00005"]
    assert manifest.notes == (
        "1 case without a label, taken for testing: case_00005",
        "1 folder left out, without an image imaging.nii.gz: notes",
    )
    assert manifest.classes == ("kidney", "tumour", "cyst")
    (tmp_path / "kits.json").write_text("[]")
    assert read_manifest(tmp_path).classes == ("kidney", "tumour")


def test_masks_make_the_classes_and_none_may_lack(tmp_path):
    totalsegmentator(tmp_path)
    (tmp_path / "s0001/segmentations/spleen.nii.gz").unlink()
    manifest = read_manifest(tmp_path)
    assert manifest.classes == ("liver", "spleen")
    lacking = manifest.train[1]
    assert lacking.label == tmp_path / "s0001/segmentations"
    assert [file.is_file() for file in lacking.masks] == [True, False]


def test_masks_are_joined_later_ones_on_top_and_what_overlaps_is_counted(tmp_path):
    manifest = read_manifest(totalsegmentator(tmp_path))
    case, expected = manifest.train[0], volumes(0)[1]
    read = partial(examine_scan, case, num_channels=1, labels=manifest.labels)
    assert np.array_equal(read().scan.label.T, expected)
    assert np.array_equal(read_case_label(case, manifest.labels).voxels, expected)
    liver, spleen = (expected == value for value in (1, 2))
    spleen[np.nonzero(liver)[0][:7], np.nonzero(liver)[1][:7], np.nonzero(liver)[2][:7]] = True
    save(case.masks[1], spleen.astype(np.uint8))
    found = read()
    assert np.array_equal(found.scan.label.T, np.where(spleen, 2, liver))
    told = "overlaps liver.nii.gz: its 7 voxel(s) there are taken for this class"
    assert found.warnings == ((case.masks[1], told),)
    save(case.masks[1], spleen.astype(np.uint8) * 255)
    case.masks[0].unlink()
    assert [fault.text for fault in read().defects] == [
        "is missing",
        "has values 255, but the classes are numbered 0 to 1",
    ]
    with pytest.raises(DataError, match="label of case 's0000'"):
        read_case_label(case, manifest.labels)


def test_a_mask_that_changes_is_prepared_again(tmp_path):
    manifest = read_manifest(totalsegmentator(tmp_path / "set"))
    prepared = partial(
        prepared_cases, manifest, manifest.train[:1], modality="ct", folder=tmp_path / "cache", progress=False
    )
    before = prepared()[0].cases[0].class_voxels
    save(manifest.train[0].masks[1], np.zeros_like(volumes(0)[1]))
    after = prepared()[0].cases[0].class_voxels
    assert (sorted(before), sorted(after)) == ([1, 2], [1])


def test_a_file_that_is_two_channels_is_read_twice_and_told(tmp_path):
    case = read_manifest(decathlon(tmp_path)).train[0]
    case = replace(case, images=case.images * 2)
    found = examine_scan(case, num_channels=2, labels=Labels.consecutive(2))
    assert found.scan.image.shape[0] == 2
    assert [fault.text for fault in found.warnings] == ["is 2 of the channels"]


def test_cases_that_meta_csv_sets_apart_are_validation_cases(tmp_path):
    manifest = read_manifest(totalsegmentator(tmp_path))
    assert [case.name for case in manifest.validation] == ["s0005"]
    assert manifest.notes == ("1 case set apart for validation or test by meta.csv",)


@pytest.mark.parametrize("content", [b"image_id;split\ns0001;\xff", b"image_id;split\n" + 200_000 * b"0"])
def test_a_meta_csv_that_is_no_table_is_refused(tmp_path, content):
    (totalsegmentator(tmp_path) / "meta.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"content of .*meta\.csv: expected a table in UTF-8"):
        read_manifest(tmp_path)


def test_classes_of_ones_own_label_files_are_written_in_a_dataset_json(tmp_path):
    (image,), label = volumes(0)
    save(tmp_path / "p1/image.nii.gz", image)
    save(tmp_path / "p1/label.nii.gz", label)
    with pytest.raises(DataError, match=r"got no 'labels'\. Write .* into it, say, with your classes"):
        read_manifest(tmp_path)
    table = {"0": "background", "1": "liver", "2": "cyst"}
    write_json(tmp_path / "dataset.json", {"labels": table, "channel_names": {"0": "PET"}, "numTraining": 2})
    manifest = read_manifest(tmp_path)
    assert (manifest.layout, manifest.classes, manifest.channels) == ("case-folders", ("liver", "cyst"), ("PET",))
    told = "dataset.json promises 2 cases under 'numTraining', but there are 1: were any dropped?"
    assert manifest.notes == (told,)


REGIONS = {"labels": {"background": 0, "all": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@pytest.mark.parametrize(("image", "label"), [("imaging", "segmentation"), ("ct", "combined_labels")])
def test_names_of_files_alone_do_not_say_what_labels_mean(tmp_path, image, label):
    """KiTS and AbdomenAtlas name their cases too: another set with such files has classes of its own."""
    (voxels,), mask = volumes(0)
    save(tmp_path / f"patient/{image}.nii.gz", voxels)
    save(tmp_path / f"patient/{label}.nii.gz", mask)
    with pytest.raises(DataError, match=f"what the values of {label} mean: at most 255 classes, got no 'labels'"):
        read_manifest(tmp_path)
    write_json(tmp_path / "dataset.json", REGIONS)
    manifest = read_manifest(tmp_path)
    assert (manifest.classes, manifest.labels.regions) == (("all", "core"), ((1, 2), (2,)))


def test_a_dataset_json_chooses_masks_and_their_order(tmp_path):
    write_json(totalsegmentator(tmp_path) / "dataset.json", {"labels": {"background": 0, "spleen": 1, "liver": 2}})
    manifest = read_manifest(tmp_path)
    assert [file.name for file in manifest.train[0].masks] == ["spleen.nii.gz", "liver.nii.gz"]
    assert manifest.notes == ("1 case set apart for validation or test by meta.csv",)
    write_json(tmp_path / "dataset.json", {"labels": {"0": "background", "1": "liver"}})
    manifest = read_manifest(tmp_path)
    assert manifest.classes == ("liver",)
    assert "1 mask left out, as 'labels' of dataset.json does not name them: spleen" in manifest.notes
    write_json(tmp_path / "dataset.json", {"labels": {"background": 0, "liver": 1, "ignore": 2}})
    with pytest.raises(DataError, match="no regions, got regions, or values to ignore"):
        read_manifest(tmp_path)


def test_the_organs_of_abdomen_atlas():
    assert len(case_folders.ATLAS) == 25
    assert [case_folders.ATLAS[value] for value in (1, 9, 10, 25)] == [
        "aorta",
        "stomach",
        "adrenal_gland_left",
        "rectum",
    ]


# ---- BraTS


def test_scans_of_one_patient_are_known_by_their_names(tmp_path):
    for time in (0, 1):
        brats(tmp_path, separator="-", enhancing=3, name="BraTS-GLI-{:05d}-00" + str(time))
    manifest = read_manifest(tmp_path)
    assert [case.patient for case in manifest.train[:3]] == ["BraTS-GLI-00000"] * 2 + ["BraTS-GLI-00001"]
    assert read_manifest(brats(tmp_path / "2021")).train[0].patient is None


def test_scans_of_one_patient_are_held_out_together(tmp_path):
    for time in (0, 1):
        brats(tmp_path, separator="-", enhancing=3, name="BraTS-GLI-{:05d}-00" + str(time))
    division = divide(read_manifest(tmp_path), fold="0")
    told = f"Note: by their names the {2 * NUM_CASES} scans are of {NUM_CASES} patients, of whom each is in one fold."
    assert division.notes == (told,)
    folds = [divide(read_manifest(tmp_path), fold=str(k)).held_out for k in range(5)]
    assert [name[-3:] for held_out in folds for name in held_out] == ["000", "001"] * NUM_CASES


@pytest.mark.parametrize("kind", ["brats", "kits", "totalsegmentator"])
def test_the_folders_of_cases_can_be_predicted(tmp_path, kind):
    manifest = read_manifest(SETS[kind](tmp_path))
    cases = folder_cases(tmp_path, num_channels=len(manifest.channels))
    assert [(case.name, case.images) for case in cases] == [
        (case.name, case.images) for case in sorted(manifest.cases, key=lambda case: case.name)
    ]
    assert all(case.label is None and not case.masks for case in cases)
    (tmp_path / "patient").mkdir()
    (told,) = left_out_of_images(tmp_path, cases)  # and not the folders of the cases
    others = ", ".join(sorted({"patient", "meta.csv"} & {file.name for file in tmp_path.iterdir()}))
    assert told.endswith(f" in {tmp_path.name} left out, as no scan has such a name: {others}")


def test_what_lies_beside_images_is_told_and_what_belongs_to_them_is_not(tmp_path, monkeypatch):
    images, (voxels,) = tmp_path / "images", volumes(0)[0]
    save(images / "scan.nii.gz", voxels)
    (images / "series" / "below").mkdir(parents=True)
    (images / "series" / "below" / "1.dcm").touch()
    cases = folder_cases(images, num_channels=1)
    assert [case.name for case in cases] == ["scan", "series"]
    assert left_out_of_images(images, cases) == []
    for name in ("other.img", "other.hdr", "._scan.nii.gz"):
        (images / name).touch()
    assert left_out_of_images(images, cases) == [
        "2 files in images left out, as no scan has such a name: other.hdr, other.img",
        "1 hidden file left out, as macOS leaves such beside scans: ._scan.nii.gz",
    ]
    series = images / "series" / "below"
    monkeypatch.chdir(series)
    for folder in (series, Path()):
        cases = folder_cases(folder, num_channels=1)
        assert left_out_of_images(folder, cases) == [], "whoever reads the series says so"


def test_a_folder_within_imagestr_that_the_list_leads_into_is_not_left_out(tmp_path):
    content = json.loads((decathlon(tmp_path) / "dataset.json").read_text())
    entry = content["training"][0]
    moved = entry["image"].replace("imagesTr/", "imagesTr/p1/")
    (tmp_path / "imagesTr" / "p1").mkdir()
    (tmp_path / entry["image"]).rename(tmp_path / moved)
    content["training"][0]["image"] = moved
    write_json(tmp_path / "dataset.json", content)
    assert read_manifest(tmp_path).notes == ()
    (tmp_path / "imagesTr" / "p1" / "other.nii.gz").touch()
    told = "1 scan in imagesTr/p1 left out, as dataset.json does not list them: other.nii.gz"
    assert read_manifest(tmp_path).notes == (told,)


def test_other_sets_with_such_sequences_are_not_brats_unless_it_is_said(tmp_path):
    brats(tmp_path, name="patient_{:03d}")
    with pytest.raises(DataError, match="The layouts, as --layout names them, look so"):
        read_manifest(tmp_path)
    assert read_manifest(tmp_path, "brats").labels.values == (1, 2, 4)
    write_json(tmp_path / "dataset.json", REGIONS)
    assert read_manifest(tmp_path, "brats").classes == ("all", "core")
    write_json(tmp_path / "dataset.json", {"labels": 3})
    with pytest.raises(DataError, match="'labels' is 3"):
        read_manifest(tmp_path, "brats")


def test_a_sequence_that_lacks_is_named_and_years_are_not_mixed(tmp_path):
    brats(tmp_path)
    (tmp_path / "BraTS2021_00001/BraTS2021_00001_t1.nii.gz").unlink()
    assert [image.is_file() for image in read_manifest(tmp_path).train[1].images] == [True, False, True, True]
    brats(tmp_path, separator="-", enhancing=3, name="BraTS-GLI-{:05d}-000")
    with pytest.raises(DataError, match=r"got _flair _t1 _t1ce _t2 and -t2f -t1n -t1c -t2w\. Part them"):
        read_manifest(tmp_path)


def test_a_data_list_beside_the_folders_that_it_lists_fits_too(tmp_path):
    brats(tmp_path)
    write_json(tmp_path / "list.json", json.loads((monai(tmp_path / "x") / "folds.json").read_text()))
    with pytest.raises(DataError, match=r"Say which it is: --layout monai or --layout brats\."):
        read_manifest(tmp_path)


# ---- the whole way

IMAGES = {"btcv": "RawData/Training/img", "monai": "TrainingData"}
SHORT = ["--preset", "demo", "--epochs", "1", "--iterations", "2", "--patch-size", *["16"] * 3, "--interval", "1"]


@pytest.mark.long
@pytest.mark.parametrize("kind", SETS)
def test_a_set_is_checked_trained_on_predicted_and_evaluated(tmp_path, kind, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = SETS[kind](tmp_path / "Set")
    manifest = read_manifest(data)
    images = data / IMAGES.get(kind, "imagesTr" if (data / "imagesTr").is_dir() else "")
    assert main(["check", str(data)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert (out[0], out[1].split(",")[1]) == (manifest.guess[0], " 0 defects")
    options = ["--data", str(data), *SHORT, "--modality", "ct" if kind == "amos" else "declared", "--run-dir", "run"]
    scores = run_recipe(read_config(HIPPOCAMPUS_RECIPE, options))
    assert scores is not None
    assert manifest.guess[0] in capsys.readouterr().out
    assert scores.left_out == {}
    held_out = manifest.folds[0] if manifest.folds else (scores.cases[0],)
    assert scores.cases == held_out
    assert main(["predict", "run", "--images", str(images), "--output", "out"]) == 0
    # the network has seen next to nothing, but its labels lie where the set's do, in the values of the set
    assert main(["evaluate", "out", "--data", str(data)]) == 0
    labelled = len(manifest.train) + len(manifest.validation) - 2 * (kind == "amos")
    assert f"{labelled} of the" in capsys.readouterr().out
    values = {int(value) for file in Path("out").glob("*.nii.gz") for value in np.unique(nibabel.load(file).dataobj)}
    assert values <= {0, *manifest.labels.values}

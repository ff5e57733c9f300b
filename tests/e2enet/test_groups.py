"""Folds that keep the scans of a patient together, folds of a file, and copies of an image under two names."""

import gzip
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import write_set

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.cli import main, read_config
from dstlib.zoo.e2enet.data.groups import read_groups
from dstlib.zoo.e2enet.data.splits import Fold, parted, read_splits, refuse_fold, split
from dstlib.zoo.e2enet.dataset import DataSettings, open_dataset
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.training.ranks import Ranks

NAMES = [f"BraTS-GLI-{patient:05d}-{visit:03d}" for patient in range(7) for visit in range(1 + patient % 3)]
GROUPS = st.lists(st.integers(0, 9), min_size=2, max_size=40).map(
    lambda numbers: {f"case_{i:02d}": f"patient_{number}" for i, number in enumerate(numbers)}
)


def opened(folder, **settings):
    asked = DataSettings(phantoms=("hippocampus", 5), folder=folder, cache=folder / "cache", **settings)
    return open_dataset(asked, workers=0, ranks=Ranks())


# ---- folds of patients


@given(GROUPS.filter(lambda groups: len(set(groups.values())) >= 3), st.randoms())
def test_groups_stay_whole_and_every_name_is_held_out_once(groups, random):
    names = list(groups)
    folds = [split(names, fold=fold, num_folds=3, groups=groups) for fold in range(3)]
    assert Counter(name for _, held_out in folds for name in held_out) == Counter(names)
    for train, held_out in folds:
        assert parted(groups, train, held_out) == ()
        assert sorted((*train, *held_out)) == sorted(names)
    sizes = [len(held_out) for _, held_out in folds]
    assert max(sizes) - min(sizes) <= max(Counter(groups.values()).values())
    random.shuffle(names)
    assert [split(names, fold=fold, num_folds=3, groups=groups) for fold in range(3)] == folds


@given(GROUPS.filter(lambda groups: len(set(groups.values())) >= 3))
def test_folds_are_as_large_as_those_of_scikit_learn(groups):
    folder = pytest.importorskip("sklearn.model_selection").GroupKFold(3)
    theirs = [len(test) for _, test in folder.split(list(groups), groups=list(groups.values()))]
    mine = [len(split(list(groups), fold=fold, num_folds=3, groups=groups)[1]) for fold in range(3)]
    assert sorted(mine) == sorted(theirs)


def test_patients_of_one_scan_each_make_no_difference():
    names = [f"case_{i}" for i in range(23)]
    for fold in range(5):
        assert split(names, fold=fold, groups={name: name[::-1] for name in names}) == split(names, fold=fold)


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(SettingError, match=r"num_folds of a split: expected 2 to 2, the number of groups, got 3"):
        split(["a", "b", "c"], num_folds=3, groups={"a": "p", "b": "p", "c": "q"})


# ---- groups of a file or a pattern


def test_a_pattern_finds_the_patient_in_each_name():
    groups = read_groups(r"BraTS-GLI-(\d+)-", NAMES)
    assert groups["BraTS-GLI-00002-001"] == "00002"
    assert len(set(groups.values())) == 7


def test_a_pattern_may_be_longer_than_names_of_files():
    names = [f"P{number:03d}_{time}" for number in range(100) for time in ("before", "after")]
    pattern = f"^({'|'.join(sorted({name[:4] for name in names}))})_"
    assert read_groups(pattern, names) == {name: name[:4] for name in names}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("BraTS-(", "expected a file or a pattern, got 'BraTS-(': missing ), unterminated subpattern"),
        ("patients", "expected one (group) in the pattern, got 'patients' with 0, and no such file"),
        (r"(\w+)-(\d+)", r"expected one (group) in the pattern, got '(\\w+)-(\\d+)' with 2. Pass a file"),
        (
            r"GLI-0000([0-3])-",
            "got none in BraTS-GLI-00004-000, BraTS-GLI-00004-001, BraTS-GLI-00005-000, BraTS-GLI-000",
        ),
        ("GLI()", "got none in BraTS-GLI-00000-000"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(text, told):
    with pytest.raises((SettingError, DataError)) as refused:
        read_groups(text, NAMES)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("groups.json", '{"a": "p", "b": 7, "c": "q", "elsewhere": "r"}'),
        ("groups.csv", "case,patient,site\na,p,x\nb,7,y\nc,q,z\n"),
        ("groups.csv", "\ufeffa;p\r\nb;7\r\n\r\nc; q \r\n"),
        ("groups.tsv", "a\tp\nb\t7\nc\tq"),
        ("patients", "a,p\nb,7\nc,q"),
    ],
)
def test_a_file_gives_each_case_its_patient(name, content, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert read_groups(str(tmp_path / name), ["a", "b", "c"]) == {"a": "p", "b": "7", "c": "q"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("groups.json", "[]", "expected an object, got []. It is JSON"),
        ("groups.json", '{"a": ["p"]}', "a of groups"),
        ("groups.json", '{"a": "p"}', "expected one for each case, got none for b, among 1 entries"),
        ("groups.csv", "a,p\nb\n", "expected a case and a patient in each row, got the row 'b'"),
        ("groups.csv", "a,p\nb,\n", "got the row 'b,'"),
        ("groups.csv", "a,p\nb,q\na,q\n", "expected one patient for each case, got 'p' and 'q' for 'a'"),
        ("groups.csv", "a,\0\nb,q\xff\n".encode("latin-1"), "expected a table in UTF-8, got "),
        ("groups.csv", None, "expected a table in UTF-8, got No such file or directory"),
    ],
)
def test_a_file_of_groups_that_cannot_be_used_is_refused(name, content, told, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as refused:
        read_groups(str(tmp_path / name), ["a", "b"])
    assert told in str(refused.value)


# ---- folds of a file


def test_splits_of_nnunet_are_read(tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text('[{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": []}]')
    assert read_splits(file) == (Fold(train=("a", "b"), val=("c",)), Fold(train=("c",), val=()))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{}", "expected a list, got {}. It is a list of"),
        ('[{"train": ["a"]}]', "[0].val of"),
        ('[{"train": ["a"], "val": "b"}]', "[0].val of"),
        ('[{"train": ["a"], "val": [1]}]', "[0].val[0] of"),
    ],
)
def test_a_file_that_holds_no_splits_is_refused(content, told, tmp_path):
    (tmp_path / "splits.json").write_text(content)
    with pytest.raises(DataError) as refused:
        read_splits(tmp_path / "splits.json")
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("fold", "told"),
    [
        (
            Fold(train=("scan_1", "scan_9"), val=("scan_8",)),
            "cases of the set, got scan_8, scan_9. Similar to the first",
        ),
        (
            Fold(train=("scan_1", "scan_2"), val=("scan_2",)),
            "expected each case once, got scan_2 in train and val. What",
        ),
        (Fold(train=("scan_1", "scan_1"), val=("scan_2",)), "expected each case once, got scan_1 more than once. What"),
        (Fold(train=(), val=("scan_2",)), "train of fold 0 of F: expected some cases, got none"),
    ],
)
def test_a_fold_that_cannot_be_that_of_the_set_is_refused(fold, told):
    with pytest.raises(DataError) as refused:
        refuse_fold(fold, ["scan_1", "scan_2"], where="fold 0 of F")
    assert told in str(refused.value)


def test_a_run_takes_its_fold_from_a_file(tmp_path, capsys):
    folder, file = write_set(tmp_path / "set"), tmp_path / "splits.json"
    folds = [{"train": ["scan_0", "scan_3"], "val": ["scan_1"]}, {"train": ["scan_2"], "val": ["scan_0"]}]
    file.write_text(json.dumps(folds))
    data = opened(folder, splits=file, fold="0", groups=r"_(\d)")
    assert (data.record().train_on, data.record().held_out) == (("scan_0", "scan_3"), ("scan_1",))
    told = f"Note: 2 of the 5 training cases are in neither part of the fold in {file} (scan_2, scan_4)."
    out = capsys.readouterr().out
    assert told in out
    assert "Warning" not in out
    opened(folder, splits=file, fold="1", groups=r"(scan)")
    assert "Warning: 1 patient(s) have scans that are trained on and scans that are held out" in capsys.readouterr().out
    for fold, told in (
        ("2", "the number of one of the 2 folds in"),
        ("all", "expected a number with --splits, got all"),
    ):
        with pytest.raises(SettingError, match=told):
            opened(folder, splits=file, fold=fold)


def test_folds_of_the_set_itself_are_taken(tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    content = json.loads((folder / "dataset.json").read_text())
    for entry, fold in zip(content["training"], (0, 1, 1, 0, 1), strict=True):
        entry["fold"] = fold
    (folder / "dataset.json").write_text(json.dumps(content))
    record = opened(folder, fold="1").record()
    assert (record.train_on, record.held_out) == (("scan_0", "scan_3"), ("scan_1", "scan_2", "scan_4"))
    assert "Note: the 2 folds are those that the set's own list gives." in capsys.readouterr().out
    with pytest.raises(SettingError, match="the number of one of the 2 folds in the list of"):
        opened(folder, fold="2")
    assert opened(folder, fold="all").record().held_out == ()


def test_a_run_keeps_the_scans_of_a_patient_in_one_fold(tmp_path):
    folder = write_set(tmp_path / "set", num_scans=8)
    held_out = [opened(folder, fold=str(fold), groups=r"_(\d)").record().held_out for fold in range(5)]
    assert sorted(name for names in held_out for name in names) == [f"scan_{i}" for i in range(8)]
    patients = tmp_path / "patients.json"
    patients.write_text(json.dumps({f"scan_{i}": f"p{i % 3}" for i in range(8)}))
    with pytest.raises(
        SettingError, match="patients of data set 'Small': expected at least 5, for as many folds, got 3"
    ):
        opened(folder, groups=str(patients))
    patients.write_text(json.dumps({f"scan_{i}": f"p{i // 2 if i < 6 else i}" for i in range(8)}))
    assert opened(folder, groups=str(patients)).record().held_out == ("scan_0", "scan_1")


def test_both_options_are_on_the_command_line(tmp_path):
    asked = read_config(HIPPOCAMPUS_RECIPE, ["--splits", str(tmp_path / "f.json"), "--groups", "(a)"]).data
    assert (asked.splits, asked.groups) == (tmp_path / "f.json", "(a)")


# ---- copies


def test_a_copy_is_told_by_check_and_before_a_training_that_holds_it_out(tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    shutil.copy(folder / "imagesTr/scan_1.nii.gz", folder / "imagesTr/scan_3.nii.gz")
    assert main(["check", str(folder)]) == 0
    assert "1 image(s) are there more than once, voxel for voxel" in capsys.readouterr().out
    told = []
    for fold in map(str, range(5)):
        data = opened(folder, fold=fold)
        alone = len({"scan_1", "scan_3"} & set(data.record().held_out)) == 1
        assert ("Warning: 1 image(s) are both trained on and held out" in (out := capsys.readouterr().out)) == alone
        assert ("scan_1 = scan_3. Remove the copies, or give them one patient (--groups)." in out) == alone
        told.append(alone)
    assert any(told)
    groups = tmp_path / "groups.csv"
    groups.write_text("".join(f"scan_{i},{'p' if i in (1, 3) else i}\n" for i in range(5)))
    with pytest.raises(SettingError, match="patients of data set"):
        opened(folder, groups=str(groups))


def test_the_same_voxels_packed_otherwise_are_a_copy_and_similar_ones_are_none(tmp_path, capsys):
    folder = write_set(tmp_path / "set")
    content = gzip.decompress((folder / "imagesTr/scan_0.nii.gz").read_bytes())
    (folder / "imagesTs/test.nii.gz").write_bytes(gzip.compress(content, compresslevel=1, mtime=7))
    changed = np.frombuffer(content, np.uint8).copy()
    changed[-3] ^= 1  # a bit of the last voxel
    (folder / "imagesTr/scan_4.nii.gz").write_bytes(gzip.compress(changed.tobytes()))
    main(["check", str(folder)])
    assert "held out of what is trained on: scan_0 = test" in capsys.readouterr().out

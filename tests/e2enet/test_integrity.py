"""The check of a whole set: every defect is found, and exactly the cases that have one are named."""

import gzip
import json
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from dstlib.zoo.e2enet.data.layouts.amos import only_modality
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.scans.integrity import WHOLE_SET, check

SHAPE = (4, 5, 6)  # x, y, z
AFFINE = np.diag([0.5, 0.75, 3.0, 1.0])
CASES = ("a", "b", "c", "d")


def save(file, voxels, affine=AFFINE):
    file.parent.mkdir(exist_ok=True, parents=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), file)


def entry(name, part="Tr"):
    return {"image": f"images{part}/{name}.nii.gz", "label": f"labels{part}/{name}.nii.gz"}


def write_set(folder, train=CASES, **changes):
    """A sound set of the Decathlon's layout."""
    rng = np.random.default_rng(0)
    content = {
        "name": "toy",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": [entry(name) for name in train],
    }
    for name in train:
        save(folder / f"imagesTr/{name}.nii.gz", rng.normal(size=SHAPE).astype(np.float32))
        save(folder / f"labelsTr/{name}.nii.gz", rng.permutation(np.arange(120) % 3).reshape(SHAPE).astype(np.uint8))
    (folder / "dataset.json").write_text(json.dumps(content | changes))


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path)
    return tmp_path


def findings(folder):
    return check(read_manifest(folder), progress=False)


def test_a_sound_set(folder):
    found = findings(folder)
    assert found.ok
    assert found.table() == "toy: 4 cases, 0 defects, 0 warnings"


def test_nothing_in_the_table_is_obeyed_by_a_terminal(folder):
    """Names of files that are left out come from whoever packed the set."""
    (folder / "imagesTr" / "notes\x1b[2J\n.txt").touch()
    table = findings(folder).table()
    assert r"no scan has such a name: notes\x1b[2J\n.txt" in table
    assert table.count("\n") == 2


def test_the_table(folder):
    (folder / "imagesTr/b.nii.gz").unlink()
    save(folder / "labelsTr/b.nii.gz", np.full(SHAPE, 9, np.uint8))
    save(folder / "labelsTr/c.nii.gz", np.zeros(SHAPE, np.uint8))
    found = findings(folder)
    assert not found.ok
    assert found.table().splitlines() == [
        "toy: 4 cases, 2 defects in 1 case, 1 warning",
        "case",
        "b     DEFECT   imagesTr/b.nii.gz is missing",
        "b     DEFECT   labelsTr/b.nii.gz has values 9, but the classes are numbered 0 to 2",
        "c     warning  labelsTr/c.nii.gz has no foreground",
    ]


def test_progress_goes_to_stderr(folder, capsys):
    check(read_manifest(folder))
    out, err = capsys.readouterr()
    assert out == ""
    assert "checking toy" in err
    assert "4/4" in err


# ---- the whole set


def whole(folder) -> list[str]:
    found = findings(folder)
    assert found.ok
    return [warning.text for warning in found.warnings if warning.case == WHOLE_SET]


def place(folder, name, affine):
    save(folder / f"imagesTr/{name}.nii.gz", np.random.default_rng(1).normal(size=SHAPE), affine)
    save(folder / f"labelsTr/{name}.nii.gz", (np.arange(120) % 3).reshape(SHAPE).astype(np.uint8), affine)


def test_mixed_orientations(folder):
    place(folder, "c", AFFINE @ np.diag([-1, -1, 1, 1]))
    assert whole(folder) == [
        "orientations are mixed: RAS in 3 cases (a, say), LPS in 1 case (c, say); "
        "preparing the cases brings them into one"
    ]


def test_spacings_that_vary_more_than_tenfold(folder):
    place(folder, "b", np.diag([0.5, 0.75, 0.25, 1.0]))
    assert whole(folder) == ["spacing towards top goes from 0.25 mm (b) to 3 mm (a): is one wrong?"]


def test_spacings_are_compared_along_the_axes_of_the_patient(folder):
    """The same scan stored z first is no oddity of spacing: 3 mm still leads to the top."""
    turned = AFFINE[:, [2, 0, 1, 3]]
    assert nibabel.aff2axcodes(turned) == ("S", "R", "A")
    place(folder, "b", turned)
    assert [text.split(":")[0] for text in whole(folder)] == ["orientations are mixed"]


def test_classes_that_no_training_case_has(folder):
    write_set(folder, labels={str(i): name for i, name in enumerate(["background", "liver", "tumour", "cyst", "vein"])})
    assert whole(folder) == ["no training case that can be used holds cyst, vein"]


def test_a_part_that_was_not_downloaded(folder):
    write_set(folder, validation=[entry("v", "Va"), entry("w", "Va")], test=["imagesTs/t.nii.gz"])
    found = findings(folder)
    assert found.num_cases == 7
    assert found.warnings == tuple(
        (WHOLE_SET, f"none of the {n} images of the {part} part is there: left out of this check")
        for part, n in (("validation", 2), ("test", 1))
    )
    save(folder / "imagesVa/v.nii.gz", np.zeros(SHAPE))
    found = findings(folder)
    assert [defect.text for defect in found.defects] == [
        "labelsVa/v.nii.gz is missing",
        "imagesVa/w.nii.gz is missing",
        "labelsVa/w.nii.gz is missing",
    ]


def test_test_scans_need_no_label(folder):
    write_set(folder, test=["imagesTs/t.nii.gz", "imagesTs/u.nii.gz"])
    save(folder / "imagesTs/t.nii.gz", np.random.default_rng(0).normal(size=SHAPE))
    save(folder / "imagesTs/u.nii.gz", np.full(SHAPE, np.nan))
    assert [defect.case for defect in findings(folder).defects] == ["u"]


def test_ct_and_mri_in_one_set(folder):
    write_set(folder, train=("amos_0001", "amos_0507"), validation=[])
    manifest = read_manifest(folder, "amos")
    mixed = check(manifest, progress=False).warnings
    told = "CT and MRI are mixed, told apart by ids (1 CT, 1 MRI): a training takes those of its --modality"
    assert (WHOLE_SET, told) in mixed
    part = check(only_modality(manifest, "ct"), progress=False).warnings
    assert len(part) == len(mixed)
    assert [warning.text.split(", as")[0] for warning in part if warning not in mixed] == [
        "1 of the 2 training cases left out"
    ]


def test_files_outside_the_folder_are_named_in_full(folder, tmp_path_factory):
    manifest = read_manifest(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a.nii.gz"
    moved = replace(manifest, train=(replace(manifest.train[0], label=elsewhere),))
    assert check(moved, progress=False).defects == (("a", f"{elsewhere} is missing"),)


# ---- the law: whatever is broken is found, and nothing else


def cut(file):
    file.write_bytes(file.read_bytes()[:-30])


def flip_a_bit(file):
    content = bytearray(gzip.compress(gzip.decompress(file.read_bytes()), compresslevel=0))
    content[len(content) - 100] ^= 1
    file.write_bytes(content)


IMAGE_DAMAGES = {
    "is missing": lambda file: file.unlink(),
    "ended": cut,
    "CRC": flip_a_bit,
    "NaN": lambda file: save(file, np.full(SHAPE, np.nan, np.float32)),
    "channel(s)": lambda file: save(file, np.zeros((*SHAPE, 2), np.float32)),
}
LABEL_DAMAGES = {
    "is missing": lambda file: file.unlink(),
    "ended": cut,
    "CRC": flip_a_bit,
    "values 3": lambda file: save(file, np.full(SHAPE, 3, np.uint8)),
    "not whole": lambda file: save(file, np.full(SHAPE, 0.5, np.float32)),
    "has shape": lambda file: save(file, np.zeros((4, 5, 7), np.uint8)),
    "away from": lambda file: save(file, np.zeros(SHAPE, np.uint8), AFFINE @ np.diag([1, -1, 1, 1])),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    write_set(folder)
    return folder


@examples(15, 40)  # each reads eight files
@given(
    images=st.dictionaries(st.sampled_from(CASES), st.sampled_from(sorted(IMAGE_DAMAGES))),
    labels=st.dictionaries(st.sampled_from(CASES), st.sampled_from(sorted(LABEL_DAMAGES))),
)
def test_every_injected_defect_is_named_and_no_sound_case_is(sound, tmp_path_factory, images, labels):
    unreadable = {"is missing", "ended", "CRC"}
    labels = {  # where the label belongs is told only by an image that can be read
        name: text
        for name, text in labels.items()
        if not (images.get(name) in unreadable and text in ("has shape", "away from"))
    }
    folder = tmp_path_factory.mktemp("broken") / "set"
    shutil.copytree(sound, folder)
    for name, text in images.items():
        IMAGE_DAMAGES[text](folder / f"imagesTr/{name}.nii.gz")
    for name, text in labels.items():
        LABEL_DAMAGES[text](folder / f"labelsTr/{name}.nii.gz")
    found = findings(folder)
    assert {defect.case for defect in found.defects} == {*images, *labels}
    for kind, injected in (("imagesTr", images), ("labelsTr", labels)):
        told = [d for d in found.defects if d.text.startswith(kind)]
        assert sorted(d.case for d in told) == sorted(injected)  # one defect each, of the right file
        assert all(injected[d.case] in d.text for d in told)
    shutil.rmtree(folder)


# ---- the real scans


@pytest.mark.data
def test_the_real_hippocampus_scans(hippocampus):
    manifest = read_manifest(hippocampus)
    assert (manifest.channels, manifest.classes) == (("MRI",), ("Anterior", "Posterior"))
    found = check(manifest, progress=False)
    assert found.table() == "Hippocampus: 208 cases, 0 defects, 0 warnings"

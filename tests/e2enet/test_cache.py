"""The cache of prepared cases: whatever happens to it, what it returns is whole, current and the same."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import small_runs
from hypothesis import given
from hypothesis import strategies as st

from dstlib import files as whole_files
from dstlib import workers
from dstlib.errors import DataError, SettingError, StateError
from dstlib.zoo.e2enet.data.cases import read_box
from dstlib.zoo.e2enet.data.dataloading.dataloader import batches
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import draw_batch
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.preprocessing import cache
from dstlib.zoo.e2enet.data.preprocessing.cache import measure, prepared_cases
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import join, plan_preparation, scan_fingerprint
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import prepare_scan
from dstlib.zoo.e2enet.data.scans.nifti import examine_scan, read_scan
from dstlib.zoo.e2enet.dataset import DataSettings, open_dataset
from dstlib.zoo.e2enet.training.ranks import Ranks

FORK = multiprocessing.get_context("fork")  # so that children see what a test has replaced


def write_scan(folder, name, seed):
    """An image and its label, of another shape and spacing for each seed; only the image is returned as bytes."""
    rng = np.random.default_rng(seed)
    shape = (5 + seed % 2, 6, 7 + seed % 3)
    affine = np.diag([-1.0, 1.0, 2.0 + seed % 3, 1.0])
    for kind, voxels in (
        ("image", rng.normal(100, 50, shape).astype(np.float32)),
        ("label", rng.integers(0, 3, shape).astype(np.uint8)),
    ):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / f"{name}-{kind}.nii")


def files_of(folder, name):
    return CaseFiles(name=name, images=(folder / f"{name}-image.nii",), label=folder / f"{name}-label.nii")


@pytest.fixture
def manifest(tmp_path):
    """Three sound cases: a, b, c."""
    folder = tmp_path / "source"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        write_scan(folder, name, seed)
    return Manifest(
        name="toy",
        folder=folder,
        layout="decathlon",
        channels=("CT",),
        classes=("liver", "tumour"),
        train=tuple(files_of(folder, name) for name in "abc"),
    )


def prepare(manifest, folder, **changes):
    return prepared_cases(
        manifest, manifest.train, **({"modality": "ct", "folder": folder, "progress": False} | changes)
    )


def contents(folder):
    """Every file of a cache, by its path and bytes: two caches with equal contents are the same bit for bit."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def reads(monkeypatch):
    """The names of the cases whose files are read, as they are."""
    names = []

    def examine(files, **options):
        names.append(files.name)
        return examine_scan(files, **options)

    monkeypatch.setattr(cache, "examine_scan", examine)
    return names


# ---- what it returns


def test_cases_are_those_that_are_prepared_directly(manifest, tmp_path):
    cases, preparation = prepare(manifest, tmp_path / "cache")
    scans = [read_scan(files, num_channels=1, labels=Labels.consecutive(2)) for files in manifest.train]
    assert preparation == plan_preparation(join(map(scan_fingerprint, scans)), schemes=("ct",))
    assert preparation.spacing == (3.0, 1.0, 1.0)
    assert (cases.name, cases.channels, cases.classes) == ("toy", ("CT",), ("liver", "tumour"))
    for case, scan in zip(cases.cases, scans, strict=True):
        expected = prepare_scan(scan, preparation)
        assert isinstance(case.image, np.memmap)
        assert np.array_equal(case.image, expected.image)
        assert np.array_equal(case.label, expected.label)
        assert (case.name, case.spacing, case.orientation) == (scan.name, expected.spacing, expected.orientation)
    with pytest.raises(ValueError, match="read-only"):
        cases.cases[0].image[:] = 0


def test_a_second_call_reads_no_source(manifest, tmp_path, reads):
    first, preparation = prepare(manifest, tmp_path)
    assert reads == list("abcabc")  # to measure, to prepare
    again, same = prepare(manifest, tmp_path)
    assert reads == list("abcabc")
    assert same == preparation
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first.cases, again.cases, strict=True))


def test_a_passed_preparation_needs_no_measuring(manifest, tmp_path, reads):
    _, preparation = prepare(manifest, tmp_path / "one")
    reads.clear()
    cases, same = prepared_cases(
        manifest, manifest.train[1:], modality="mri", folder=tmp_path / "two", preparation=preparation, progress=False
    )
    assert same is preparation
    assert reads == ["b", "c"] == [case.name for case in cases.cases]


def test_the_order_of_the_files_makes_no_difference_but_to_the_order_of_the_cases(manifest, tmp_path):
    prepare(manifest, tmp_path / "one")
    turned, _ = prepare(replace(manifest, train=manifest.train[::-1]), tmp_path / "two")
    assert [case.name for case in turned.cases] == ["c", "b", "a"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_measuring_is_the_fingerprint(manifest, tmp_path, reads):
    found = measure(manifest, manifest.train, folder=tmp_path, progress=False)
    scans = (read_scan(files, num_channels=1, labels=Labels.consecutive(2)) for files in manifest.train)
    assert found == join(map(scan_fingerprint, scans))
    prepare(manifest, tmp_path)
    assert reads == list("abcabc")  # and not measured again


# ---- what is stale


def test_a_changed_source_is_read_again_and_its_set_planned_anew(manifest, tmp_path, reads, capsys):
    prepare(manifest, tmp_path / "cache")
    write_scan(manifest.folder, "b", seed=7)
    reads.clear()
    cases, _ = prepare(manifest, tmp_path / "cache")
    assert reads == ["b", *"abc"]  # to measure the one; its intensities normalise all
    fresh, _ = prepare(manifest, tmp_path / "fresh")
    assert all(np.array_equal(a.image, b.image) for a, b in zip(cases.cases, fresh.cases, strict=True))
    assert "Other preparations take up 0.0 MB" in capsys.readouterr().err


def test_other_preparations_may_vanish_and_be_no_folders(manifest, tmp_path, capsys, monkeypatch):
    (tmp_path / "prepared-gone").mkdir()
    (tmp_path / "prepared-mine").write_bytes(b"a note")
    listed = Path.iterdir

    def vanished(folder):
        return iter([folder / "b.json"]) if folder.name == "prepared-gone" else listed(folder)

    monkeypatch.setattr(Path, "iterdir", vanished)
    prepare(manifest, tmp_path)
    assert "take up 0.0 MB" in (told := capsys.readouterr().err)
    assert told.rstrip().endswith(": prepared-gone. Delete what you do not need.")


def test_a_touched_source_is_prepared_again(manifest, tmp_path, reads):
    prepare(manifest, tmp_path)
    os.utime(manifest.train[1].label, ns=(1, 1))
    reads.clear()
    prepare(manifest, tmp_path)
    assert reads == ["b", "b"]


def test_another_number_of_classes_is_checked_again(manifest, tmp_path):
    prepare(manifest, tmp_path)
    with pytest.raises(DataError, match="has values 2, but the classes are numbered 0 to 1"):
        prepare(replace(manifest, classes=("liver",), labels=Labels.consecutive(1)), tmp_path)


def test_regions_are_of_the_same_arrays_as_classes(manifest, tmp_path, reads):
    cases, _ = prepare(manifest, tmp_path)
    reads.clear()
    labels = Labels(values=(1, 2), regions=((1, 2), (2,)), written=(1, 2))
    regions, _ = prepare(replace(manifest, labels=labels), tmp_path)
    assert reads == []
    for classes, case in zip(cases.cases, regions.cases, strict=True):
        assert case.class_voxels[1].size == sum(voxels.size for voxels in classes.class_voxels.values())


def test_scans_by_each_rule_of_geometry_have_entries_of_their_own(manifest, tmp_path, reads):
    prepare(manifest, tmp_path)
    reads.clear()
    prepare(manifest.placed_by("sform"), tmp_path)
    assert reads == list("abcabc")
    prepare(manifest, tmp_path)
    assert reads == list("abcabc"), "the first are still there"
    prepare(manifest.placed_by("sform"), tmp_path)
    assert reads == list("abcabc")


def test_another_format_is_made_anew(manifest, tmp_path, reads, monkeypatch):
    prepare(manifest, tmp_path)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    prepare(manifest, tmp_path)
    assert reads == list("abcabc") * 2


def test_what_an_earlier_build_made_is_made_anew_and_is_not_called_damaged(manifest, tmp_path, reads, capsys):
    """Its arrays have no checksums."""
    _, preparation = prepare(manifest, tmp_path)
    sources = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in (
        manifest.train[0].images[0], manifest.train[0].label)]  # fmt: skip
    made_from = {"format": 1, "num_channels": 1, "num_classes": 2, "preparation": None, "sources": sources}
    (tmp_path / "fingerprints" / "a.json").write_text(json.dumps({"made_from": made_from, "fingerprint": {}}))
    old = tmp_path / "prepared-fa95f7ccbe13"
    shutil.copytree(tmp_path / cache.preparation_key(preparation), old)
    content = {"made_from": made_from, "spacing": [1.0, 1.0, 1.0], "num_bytes": {"image.npy": 1, "label.npy": 1}}
    (old / "a.json").write_text(json.dumps(content))
    reads.clear()
    prepare(manifest, tmp_path)
    assert reads == ["a"]
    told = capsys.readouterr().err
    assert "not as it was written" not in told
    assert f"{old.name}. Delete" in told


def test_other_preparations_stay_and_are_mentioned(manifest, tmp_path, reads, capsys):
    _, ct = prepare(manifest, tmp_path)
    assert not capsys.readouterr().err
    prepare(manifest, tmp_path, modality="mri")
    said = capsys.readouterr().err
    assert cache.preparation_key(ct) in said
    assert "Delete what you do not need" in said
    reads.clear()
    prepare(manifest, tmp_path)
    assert not reads


def test_an_interrupted_renewal_does_not_pass_for_the_old_entry(manifest, tmp_path, monkeypatch):
    """New arrays are there, the process dies, and a backup brings back the old source with its old time."""
    cases, preparation = prepare(manifest, tmp_path / "cache")
    before = np.array(cases.cases[1].image)
    image = manifest.train[1].images[0]
    content, status = image.read_bytes(), image.stat()
    nibabel.save(nibabel.Nifti1Image(np.full((6, 6, 8), 7.0, np.float32), np.diag([-1.0, 1, 3, 1])), image)
    monkeypatch.setattr(cache, "write_json", Fault(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, tmp_path / "cache", preparation=preparation)
    monkeypatch.undo()
    image.write_bytes(content)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    again, _ = prepare(manifest, tmp_path / "cache", preparation=preparation)
    assert np.array_equal(again.cases[1].image, before)


def test_a_source_that_changes_while_it_is_read_is_a_defect(manifest, tmp_path, monkeypatch):
    def examine(files, **options):
        found = examine_scan(files, **options)
        if files.name == "b":
            os.utime(files.label, ns=(1, time.time_ns()))
        return found

    monkeypatch.setattr(cache, "examine_scan", examine)
    with pytest.raises(DataError, match=r"b: .*b-image.nii or its label changed while they were read"):
        prepare(manifest, tmp_path)


def test_sets_of_one_name_do_not_take_each_others_place(tmp_path, reads, capsys):
    """As phantoms and the scans they stand for: one is opened by a run while another run opens the other."""
    folders = [small_runs.write_set(tmp_path / place / "Small") for place in ("here", "there")]
    for number in range(5):
        voxels = np.random.default_rng(number).normal(50, 20, (9, 9, 9)).astype(np.float32)
        small_runs.write_nifti(folders[1] / f"imagesTr/scan_{number}.nii.gz", voxels)

    def opened(folder):
        asked = DataSettings(phantoms=("hippocampus", 5), folder=folder, cache=tmp_path / "cache")
        return open_dataset(asked, workers=0, ranks=Ranks(rank=0, num=1))

    images = [np.array(opened(folder).held_out.cases[0].image) for folder in folders]
    assert not np.array_equal(*images)
    reads.clear()
    for folder, image in zip(folders, images, strict=True):
        assert np.array_equal(opened(folder).held_out.cases[0].image, image)
    assert not reads, "each is prepared once"
    capsys.readouterr()
    (tmp_path / "cache" / "prepared-fa95f7ccbe13").mkdir()  # as builds before kept all sets in one folder
    opened(folders[0])
    assert "which nothing reads any more: prepared-fa95f7ccbe13. Delete them." in capsys.readouterr().out


# ---- what is damaged


def truncate(file):
    file.write_bytes(file.read_bytes()[:-2])  # the last byte of JSON is a line's end


def flip(file):
    """One bit, of a voxel."""
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def edit(change):
    return lambda file: file.write_text(json.dumps(change(json.loads(file.read_text()))))


def edit_fingerprint(change):
    return edit(lambda record: record | {"fingerprint": record["fingerprint"] | change})


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("prepared-*/b.image.npy", truncate),
        ("prepared-*/b.label.npy", Path.unlink),
        ("prepared-*/b.image.npy", lambda file: file.write_bytes(bytes(file.stat().st_size))),
        ("prepared-*/b.json", Path.unlink),
        ("prepared-*/b.json", truncate),
        ("prepared-*/b.json", lambda file: file.write_text("[]")),
        ("prepared-*/b.json", edit(lambda record: {"made_from": record["made_from"]})),
        ("prepared-*/b.json", edit(lambda record: record | {"checksums": 3})),
        ("prepared-*/b.json", edit(lambda record: record | {"checksums": {}})),
        ("prepared-*/b.json", edit(lambda record: record | {"spacing": 3})),
        ("prepared-*/b.json", edit(lambda record: record | {"spacing": [1.0, 1.0, 1e30]})),
        ("prepared-*/b.json", edit(lambda record: record | {"shape": [1, 1, 1, 1]})),
        ("prepared-*/b.json", edit(lambda record: record | {"shape": [-1, 6, 7, -5]})),
        ("prepared-*/b.json", lambda file: file.write_text("[" * 100_000)),
        ("prepared-*/b.image.npy", flip),
        ("prepared-*/b.label.npy", flip),
        ("prepared-*/b.label.npy", lambda file: file.write_bytes(file.read_bytes() + b"\0")),
        ("fingerprints/b.json", Path.unlink),
        ("fingerprints/b.json", truncate),
        ("fingerprints/b.json", edit(lambda record: {"made_from": record["made_from"]})),
        ("fingerprints/b.json", edit(lambda record: record | {"fingerprint": {"name": "b"}})),
        ("fingerprints/b.json", edit_fingerprint({"intensities": [{"values": "?", "counts": "?"}]})),
        ("fingerprints/b.json", edit_fingerprint({"intensities": [{"values": "AAAA", "counts": ""}]})),
        ("fingerprints/b.json", edit_fingerprint({"spacing": [1]})),
        ("fingerprints/b.json", edit_fingerprint({"kept": None})),
        ("fingerprints/b.json", edit_fingerprint({"shape": 3})),
    ],
)
def test_damaged_entries_are_made_anew(manifest, tmp_path, reads, file, damage, capsys):
    prepare(manifest, tmp_path)
    sound = contents(tmp_path)
    damaged = next(tmp_path.glob(file))
    damage(damaged)
    assert contents(tmp_path) != sound
    reads.clear()
    capsys.readouterr()
    prepare(manifest, tmp_path)
    assert reads == ["b"]
    assert contents(tmp_path) == sound
    told = capsys.readouterr().err.splitlines()
    is_gone = damage is Path.unlink and damaged.suffix == ".json"
    assert [line.startswith("b: what lies of it in ") for line in told] == [True] * (not is_gone)


def test_what_is_sound_is_not_spoken_of(manifest, tmp_path, capsys):
    prepare(manifest, tmp_path)
    prepare(manifest, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_shrinks_while_it_is_used_is_one_error(manifest, tmp_path, workers):
    """Read as mapped memory, it would end the process by a signal."""
    cases, _ = prepare(manifest, tmp_path)
    for file in tmp_path.glob("prepared-*/*.image.npy"):
        os.truncate(file, 200)
    drawn = batches(cases.cases, PatchSettings(patch_size=(4, 4, 4)), seed=0, start=0, stop=2, workers=workers)
    with pytest.raises(DataError, match=r"file of prepared scan .*image\.npy: expected .* got 200 bytes"):
        list(drawn)


def test_a_cache_that_vanishes_while_it_is_used_is_one_error(manifest, tmp_path):
    cases, _ = prepare(manifest, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="got No such file or directory"):
        draw_batch(cases.cases, PatchSettings(patch_size=(4, 4, 4)), seed=0, iteration=0)


@given(st.data())
def test_a_box_of_a_mapped_volume_is_that_of_one_in_memory(tmp_path_factory, data):
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 4))
    kind = data.draw(st.sampled_from([np.float32, np.uint8]))
    volume = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    file = tmp_path_factory.mktemp("box") / "volume.npy"
    np.save(file, volume)
    mapped = np.load(file, mmap_mode="r")
    box = [slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape]
    found = read_box(mapped, box)
    assert found.dtype == kind
    assert np.array_equal(found, volume[tuple(box)])
    label = volume[0]
    np.save(file, label)
    found = read_box(np.load(file, mmap_mode="r")[None], [slice(None), *box[1:]])
    assert np.array_equal(found[0], label[tuple(box[1:])])


# ---- what is interrupted


class Fault:
    """Stands for a function that fails at one call, and before it does what it always does."""

    def __init__(self, error, *, at=0, of=None):
        self.error, self.at, self.of, self.calls = error, at, of, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls > self.at:
            if callable(self.error):
                self.error()
            raise self.error
        return self.of(*arguments)


NUM_WRITES = 3 + 3 * 3  # a fingerprint, and an image, a label and a record of each case


def call(function, at):
    """Which call of a function a write is: each puts the file on the disk, then the folder, of which one fails here."""
    return 2 * at + at // 2 % 2 if function == "fsync" else at


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("at", range(NUM_WRITES))
def test_interrupted_at_any_write_then_repeated_is_uninterrupted(manifest, tmp_path, monkeypatch, at, function):
    prepare(manifest, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            whole_files.os, function, Fault(KeyboardInterrupt(), at=call(function, at), of=getattr(os, function))
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(manifest, tmp_path / "cache")
    prepare(manifest, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_killed_at_any_write_then_repeated_is_uninterrupted(manifest, tmp_path, monkeypatch, function):
    """As kill -9 does: no handler runs, and files lie about half written."""
    prepare(manifest, tmp_path / "whole")
    for at in range(("fsync", "replace").index(function), NUM_WRITES, 2):  # by turns, as a fork takes its time
        folder = tmp_path / f"cache{at}"
        with monkeypatch.context() as patch:
            die = Fault(lambda: os.kill(os.getpid(), signal.SIGKILL), at=call(function, at), of=getattr(os, function))
            patch.setattr(whole_files.os, function, die)
            process = FORK.Process(target=prepare, args=(manifest, folder))
            process.start()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        prepare(manifest, folder)
        assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_is_missing_and_keeps_what_is_whole(manifest, tmp_path, monkeypatch, code):
    prepare(manifest, tmp_path / "whole")
    at = 3 + 3 + 1  # the label of the second case
    with monkeypatch.context() as patch:
        patch.setattr(whole_files.os, "fsync", Fault(OSError(code, "no room"), at=2 * at, of=os.fsync))
        with pytest.raises(StateError) as error:
            prepare(manifest, tmp_path / "cache")
    said = str(error.value)
    assert "expected about 0.0 MB of room for the 2 of 3 cases that are missing, got a full one" in said
    assert "The other 1 (0.0 MB) are whole: make room, then repeat the command." in said
    left = {Path(name).name for name in contents(tmp_path / "cache") if name.startswith("prepared-")}
    assert left == {"a.image.npy", "a.label.npy", "a.json"}  # the image that fitted takes no room any more
    prepare(manifest, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def test_another_failing_disk_is_an_error_too(manifest, tmp_path, monkeypatch):
    for at in (0, 3):
        with monkeypatch.context() as patch:
            patch.setattr(whole_files.os, "fsync", Fault(OSError(errno.EIO, "broken disk"), at=2 * at, of=os.fsync))
            with pytest.raises(StateError, match=r"expected a disk to write to, got .* broken disk"):
                prepare(manifest, tmp_path / str(at))


def test_the_estimate_of_what_is_missing():
    assert cache._size(512) == "0.0 MB"
    assert cache._size(2.5e9) == "2.5 GB"


# ---- defects


def spoil(manifest):
    """Case a without its label, case c cut short; b is sound."""
    manifest.train[0].label.unlink()
    truncate(manifest.train[2].images[0])


def test_all_defects_come_in_one_error_and_sound_files_are_measured_once(manifest, tmp_path, reads):
    kept = [file.read_bytes() for file in (manifest.train[0].label, manifest.train[2].images[0])]
    spoil(manifest)
    with pytest.raises(DataError) as error:
        prepare(manifest, tmp_path)
    assert "2 defect(s) in 2 of 3 cases" in str(error.value)
    assert "\n  a: " in str(error.value)
    assert "a-label.nii is missing" in str(error.value)
    assert "c-image.nii cannot be read" in str(error.value)
    for file, content in zip((manifest.train[0].label, manifest.train[2].images[0]), kept, strict=True):
        file.write_bytes(content)
    reads.clear()
    prepare(manifest, tmp_path)
    assert reads == ["a", "c", *"abc"]


def test_with_a_passed_preparation_sound_files_are_prepared_once(manifest, tmp_path, reads):
    _, preparation = prepare(manifest, tmp_path / "one")
    kept = [file.read_bytes() for file in (manifest.train[0].label, manifest.train[2].images[0])]
    spoil(manifest)
    with pytest.raises(DataError, match=r"2 defect\(s\) in 2 of 3 cases"):
        prepare(manifest, tmp_path / "two", preparation=preparation)
    for file, content in zip((manifest.train[0].label, manifest.train[2].images[0]), kept, strict=True):
        file.write_bytes(content)
    reads.clear()
    prepare(manifest, tmp_path / "two", preparation=preparation)
    assert reads == ["a", "c"]


def test_calls_that_cannot_be_are_refused(manifest, tmp_path):
    with pytest.raises(DataError, match="expected one case per name"):
        prepare(replace(manifest, train=manifest.train[:1] * 2), tmp_path)
    with pytest.raises(SettingError, match=r"workers of the preparation: expected a whole number from 0 up, got -1"):
        prepare(manifest, tmp_path, workers=-1)
    with pytest.raises(SettingError, match="expected ct or mri, got 'pet'"):
        prepare(manifest, tmp_path, modality="pet")
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"expected a folder to write to, got File exists\. Pass a folder"):
        prepare(manifest, tmp_path / "file")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    with pytest.raises(StateError, match="expected a folder to write to, got Is a directory"):
        prepare(manifest, tmp_path / "locked")


# ---- several processes


def test_a_second_process_waits_and_says_so(manifest, tmp_path, capsys):
    waiting = threading.Thread(target=prepare, args=(manifest, tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        said = ""
        while "waiting for it" not in said and waiting.is_alive():
            said += capsys.readouterr().err
            time.sleep(0.01)
        assert f"Another process prepares cases in {tmp_path / 'cache'}: waiting for it." in said
        assert set(contents(tmp_path / "cache")) == set()
    waiting.join()
    assert len(contents(tmp_path / "cache")) == NUM_WRITES


def test_three_processes_at_once_share_the_work(manifest, tmp_path, monkeypatch):
    log = tmp_path / "log"

    def examine(files, **options):
        with open(log, "a") as file:
            file.write(files.name)
        return examine_scan(files, **options)

    monkeypatch.setattr(cache, "examine_scan", examine)
    processes = [FORK.Process(target=prepare, args=(manifest, tmp_path / "cache")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(log.read_text()) == sorted("abcabc")  # nothing twice


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_workers_make_the_same_cache(manifest, tmp_path, monkeypatch, how):
    """They are spawned, which takes seconds; forked, the rest of their life is the same."""
    context = multiprocessing.get_context(how)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: context)
    prepare(manifest, tmp_path / "alone")
    truncate(manifest.train[1].images[0])
    _, preparation = prepare(replace(manifest, train=manifest.train[::2]), tmp_path / "pair")
    with pytest.raises(DataError, match=r"1 defect\(s\) in 1 of 3 cases"):
        prepare(manifest, tmp_path / "workers", workers=2, preparation=preparation)
    pair = {name: content for name, content in contents(tmp_path / "pair").items() if "fingerprints" not in name}
    assert contents(tmp_path / "workers") == pair


def test_a_worker_that_dies_is_an_error(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "as_completed", Fault(BrokenProcessPool()))
    monkeypatch.setattr(workers, "ProcessPoolExecutor", IdlePool)
    with pytest.raises(StateError, match="one that the system ended, most likely for want of memory"):
        prepare(manifest, tmp_path, workers=2)


class IdlePool:
    """A pool of workers that never come to anything."""

    def __init__(self, *arguments):
        self.shut = False

    def submit(self, function, entry):
        return entry.files.name

    def shutdown(self, *, cancel_futures):
        assert cancel_futures


SCRIPT = """
import sys
from pathlib import Path
from dstlib.zoo.e2enet.data.preprocessing.cache import prepared_cases
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
if __name__ == "__main__":
    manifest = read_manifest(sys.argv[1])
    prepared_cases(manifest, manifest.train, modality="mri", folder=Path(sys.argv[2]), workers=2, progress=False)
"""


@pytest.mark.data
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_killed_run_with_workers_leaves_no_orphan_and_loses_nothing(hippocampus, tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "cache"
    process = subprocess.Popen([sys.executable, str(script), str(hippocampus), str(folder)], start_new_session=True)
    while process.poll() is None and len(list(folder.glob("prepared-*/*.json"))) < 20:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)  # is anyone of its group left?
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("workers outlived their parent by a minute")
    before = {file: file.stat().st_mtime_ns for file in folder.glob("prepared-*/*.json")}
    assert 20 <= len(before) < 208
    manifest = read_manifest(hippocampus)
    prepared_cases(manifest, manifest.train, modality="mri", folder=folder, progress=False)
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in before.items())
    prepared_cases(manifest, manifest.train, modality="mri", folder=tmp_path / "whole", progress=False)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.data
@pytest.mark.long
def test_all_real_scans_are_prepared(hippocampus, tmp_path):
    manifest = read_manifest(hippocampus)
    cases, preparation = prepared_cases(manifest, manifest.train, modality="mri", folder=tmp_path, progress=False)
    assert preparation.spacing == (1.0, 1.0, 1.0)
    assert len(cases.cases) == len(manifest.train) == 208
    for case, files in zip(cases.cases, manifest.train, strict=True):
        scan = read_scan(files, num_channels=1, labels=Labels.consecutive(2))
        assert np.bincount(case.label.ravel(), minlength=3)[1:].tolist() == [(scan.label == k).sum() for k in (1, 2)]
        assert abs(float(case.image.mean())) < 1e-4  # of some 60,000 float32
        assert abs(float(case.image.std()) - 1) < 1e-4


def test_a_scan_that_outgrows_the_memory_is_a_defect_that_names_its_voxels(manifest, tmp_path, monkeypatch):
    def fail(scan, preparation):
        raise MemoryError("Unable to allocate 191 GiB")

    monkeypatch.setattr(cache, "prepare_scan", fail)
    with pytest.raises(DataError, match=r"does not fit into memory .*191 GiB.*mm, is that right\?"):
        prepare(manifest, tmp_path / "cache")

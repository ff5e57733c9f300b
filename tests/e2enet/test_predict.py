"""Folders of images to folders of labels: geometry, resuming, and cases that cannot be read."""

import json
import re
import threading
import time
from dataclasses import replace
from itertools import product

import nibabel
import numpy as np
import pytest
import torch
from nifti_headers import by_itk, by_nibabel, placed, tilted, turned, write_nifti
from torch import nn
from torch.nn import functional

from dstlib import bounds
from dstlib.bounds import is_out_of_memory, most_memory
from dstlib.errors import DataError, SettingError, StateError
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.evaluation.evaluate import evaluate_folder
from dstlib.zoo.e2enet.inference import predict
from dstlib.zoo.e2enet.inference.predict import Trained, outcome_table, predict_folder, predict_scans

AS_IT_IS = CtNormalization(low=0.0, high=2.0, mean=0.0, std=1.0)


class ReadsTheImage(nn.Module):
    """A network that has learned its task: the intensity of its image is the label."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.deep_supervision = True
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        logits = self.scale * functional.one_hot(x[:, 0].round().long().clamp(0, 2), 3).movedim(-1, 1).float()
        return (logits, logits) if self.deep_supervision else logits


def trained(model=None, *, spacing=None, num_channels=1, postprocessing=(), high=2.0):
    rule = replace(AS_IT_IS, high=high)
    return Trained(
        models=(model or ReadsTheImage(),),
        preparation=Preparation(spacing=spacing, normalization=(rule,) * num_channels, crop=True),
        patch_size=(4, 4, 4),
        mirror=(),
        channels=("CT", "other")[:num_channels],
        classes=("a", "b"),
        postprocessing=postprocessing,
    )


def blocks(shape=(7, 6, 5)):
    """Labels in blocks, with a rim of 0 that cropping takes away; asymmetric, so that a flip is seen."""
    voxels = np.zeros(shape, np.uint8)
    voxels[1:-1, 1:-1, 1:-1] = 1
    voxels[1:4, 1:3, 1:3] = 2
    return voxels


def affine_of(axes, spacing=(1.0, 1.5, 2.0)):
    """An affine whose file axes lead to ``axes`` ("RAS", say), away from the origin."""
    affine = np.zeros((4, 4))
    for column, (letter, size) in enumerate(zip(axes, spacing, strict=True)):
        row, sign = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[letter]
        affine[row, column] = sign * size
    affine[:, 3] = (-10.0, 20.0, 30.0, 1.0)
    return affine


def write_image(path, voxels, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float32), affine_of("RAS") if affine is None else affine), path)
    return path


def names(folder):
    """What lies in a folder, but for its lock."""
    return sorted(file.name for file in folder.iterdir() if file.name != ".lock")


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA", "ILP", "PSL"])
def test_a_prediction_lies_on_its_image(tmp_path, axes):
    affine = affine_of(axes)
    write_image(tmp_path / "images" / "scan.nii.gz", blocks(), affine)
    (outcome,) = predict_folder(trained(), tmp_path / "images", tmp_path / "out", progress=False)
    assert (outcome.name, outcome.file, outcome.error) == ("scan", tmp_path / "out" / "scan.nii.gz", None)
    found = nibabel.load(outcome.file)
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(found.dataobj), blocks())
    np.testing.assert_allclose(found.affine, affine)


def test_a_prediction_lies_on_its_image_whatever_its_header_says(tmp_path):
    """In SimpleITK and in nibabel, with any codes, forms that differ, a tilted gantry, other units, and channels."""
    pytest.importorskip("SimpleITK")
    forms = {"one": placed(), "other": placed(turned(0, 10, 0), origin=(1.0, 2.0, 3.0)), "tilted": tilted(placed())}
    for name, codes in product(forms, product(range(5), range(5))):
        file = tmp_path / "images" / f"{name}-{codes[0]}{codes[1]}.nii"
        write_nifti(file, sform=forms[name], qform=placed(), codes=codes, voxels=blocks(), xyzt_units=codes[0] % 4)
    outcomes = predict_folder(trained(), tmp_path / "images", tmp_path / "out", progress=False)
    assert len(outcomes) == 75
    for outcome in outcomes:
        image = tmp_path / "images" / f"{outcome.name}.nii"
        np.testing.assert_array_equal(by_itk(outcome.file), by_itk(image))
        np.testing.assert_array_equal(by_nibabel(outcome.file), by_nibabel(image))
        np.testing.assert_array_equal(nibabel.load(outcome.file).get_fdata(), blocks())


def test_a_prediction_of_channels_in_one_file_lies_on_them(tmp_path):
    pytest.importorskip("SimpleITK")
    voxels = np.stack([blocks(), blocks()], -1)
    image = write_nifti(tmp_path / "images" / "a.nii", sform=tilted(placed()), qform=placed(), voxels=voxels)
    (outcome,) = predict_folder(trained(num_channels=2), tmp_path / "images", tmp_path / "out", progress=False)
    np.testing.assert_array_equal(by_itk(outcome.file), by_itk(image))
    np.testing.assert_array_equal(by_nibabel(outcome.file), by_nibabel(image))
    assert nibabel.load(outcome.file).shape == blocks().shape


def test_the_rule_of_the_training_places_a_scan_and_is_recorded(tmp_path):
    """Where the sform states no sizes, the rule settles how a scan is resampled, and so the prediction."""
    fine = np.kron(blocks(), np.ones((1, 1, 3), np.uint8))
    write_nifti(
        tmp_path / "images" / "a.nii", sform=placed(sizes=(1, 1, 1)), qform=placed(sizes=(1, 1, 3)), voxels=fine
    )
    found = {}
    for rule in ("itk", "sform"):
        by_rule = replace(trained(spacing=(1.0, 1.0, 1.0)), geometry=rule)
        (outcome,) = predict_folder(by_rule, tmp_path / "images", tmp_path / rule, progress=False)
        found[rule] = nibabel.load(outcome.file).get_fdata()
        assert json.loads((tmp_path / rule / "prediction.json").read_text())["geometry"] == rule
        assert "a.nii has more than one place" in outcome_table([outcome])
    np.testing.assert_array_equal(found["sform"], fine)  # nothing is resampled
    with pytest.raises(StateError, match="those of these networks and settings"):
        predict_folder(by_rule, tmp_path / "images", tmp_path / "itk", progress=False)
    record = tmp_path / "sform" / "prediction.json"
    before = json.loads(record.read_text())
    del before["geometry"]  # as a build wrote it that knew no rules, and read as nibabel does
    record.write_text(json.dumps(before))
    (outcome,) = predict_folder(by_rule, tmp_path / "images", tmp_path / "sform", progress=False)
    assert outcome.kept


def test_resampled_and_back_scores_one_in_the_original_geometry(tmp_path):
    voxels = np.kron(blocks(), np.ones((2, 2, 2), np.uint8))
    image = write_image(tmp_path / "images" / "scan.nii.gz", voxels)
    predict_folder(trained(spacing=(1.0, 0.75, 0.5)), tmp_path / "images", tmp_path / "out", progress=False)
    files = [CaseFiles(name="scan", images=(image,), label=image)]
    scores = evaluate_folder(tmp_path / "out", files, ("a", "b"), progress=False)
    assert scores.dice.min() > 0.9  # twice as fine and back: voxels at the edges of the blocks may turn


def test_an_unreadable_file_is_reported_and_the_others_go_on(tmp_path):
    for name in ("a", "c"):
        write_image(tmp_path / "images" / f"{name}.nii.gz", blocks())
    (tmp_path / "images" / "b.nii.gz").write_bytes(b"not a scan")
    outcomes = predict_folder(trained(), tmp_path / "images", tmp_path / "out", progress=False)
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert names(tmp_path / "out") == ["a.nii.gz", "c.nii.gz", "prediction.json"]
    lines = outcome_table(outcomes).splitlines()
    assert lines[0].split() == ["case", "finding"]
    file = tmp_path / "images" / "b.nii.gz"
    assert lines[2].startswith(f"b     {file} cannot be read: "), "the fault, first"
    assert lines[-1] == "2 predicted, 0 kept as they were, 1 failed"


def test_what_is_not_finite_is_reported(tmp_path):
    model = ReadsTheImage()
    write_image(tmp_path / "images" / "a.nii.gz", blocks())
    with torch.no_grad():
        model.scale.fill_(float("nan"))
    (outcome,) = predict_folder(trained(model), tmp_path / "images", tmp_path / "out", progress=False)
    assert "expected finite numbers" in outcome.error
    assert names(tmp_path / "out") == ["prediction.json"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("3 TiB"),
        torch.OutOfMemoryError("CUDA out of memory: 3 TiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 3 TiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED, 3 TiB"),
    ],
)
def test_a_scan_too_large_for_the_memory_is_named_and_the_others_go_on(tmp_path, error):
    class Grows(ReadsTheImage):
        def forward(self, x):
            if x.max() > 2:
                raise error
            return super().forward(x)

    images = images_of(tmp_path / "images", "b")
    write_image(images / "a.nii.gz", 3 * blocks())
    outcomes = predict_folder(trained(Grows(), high=9.0), images, tmp_path / "out", progress=False)
    assert [outcome.name for outcome in outcomes] == ["a", "b"]
    assert outcomes[0].error.startswith("does not fit into memory: ")
    assert "3 TiB" in outcomes[0].error
    assert outcomes[1].error is None
    assert names(tmp_path / "out") == ["b.nii.gz", "prediction.json"]


def test_torch_says_what_is_known_of_memory_on_a_cpu():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


def test_another_error_of_a_network_surfaces(tmp_path):
    class Broken(ReadsTheImage):
        def forward(self, x):
            raise RuntimeError("shape '[2]' is invalid for input of size 3")

    images = images_of(tmp_path / "images", "a")
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        predict_folder(trained(Broken()), images, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("spacing", "left", "message"),
    [
        # 4·(60 + 2·60 + 3·60) bytes and some to prepare it; 4·80·(3 + 1) of sums, and 4·64·(1 + 5·3) of a window
        (None, 4_000, r"memory of a prediction of 3×4×5 voxels and 3 outputs: .* 0\.0 GB of memory that are left"),
        ((1e-3, 1.5, 1.0), 1_000_000, r"memory of an image of 6000×4×5 voxels: .* its voxels are 2×1\.5×1 mm: is that"),
        ((1e-300, 1.5, 1.0), 10**18, r"memory of an image of \d+×4×5 voxels: "),
    ],
)
def test_what_will_not_fit_is_refused_by_numbers_before_the_work(tmp_path, monkeypatch, spacing, left, message):
    model, images = ReadsTheImage(), images_of(tmp_path / "images", "a")
    monkeypatch.setattr(bounds, "available_memory", lambda: left)
    (outcome,) = predict_folder(trained(model, spacing=spacing), images, tmp_path / "out", progress=False)
    assert re.match(message, outcome.error), outcome.error
    assert model.num_calls == 0


def test_existing_predictions_are_kept_unless_asked(tmp_path):
    model = ReadsTheImage()
    write_image(tmp_path / "images" / "a.nii.gz", blocks())
    first = predict_folder(trained(model), tmp_path / "images", tmp_path / "out", progress=False)
    calls, content = model.num_calls, first[0].file.read_bytes()
    write_image(tmp_path / "images" / "b.nii.gz", blocks())
    outcomes = predict_folder(trained(model), tmp_path / "images", tmp_path / "out", progress=False)
    assert [outcome.kept for outcome in outcomes] == [True, False]
    assert model.num_calls == 2 * calls, "b alone"
    assert outcome_table(outcomes) == "1 predicted, 1 kept as they were, 0 failed"
    outcomes = predict_folder(trained(model), tmp_path / "images", tmp_path / "out", overwrite=True, progress=False)
    assert not any(outcome.kept for outcome in outcomes)
    assert first[0].file.read_bytes() == content, "the same bytes"


def test_an_interruption_leaves_whole_files_only(tmp_path):
    class Interrupted(ReadsTheImage):
        def forward(self, x):
            if self.num_calls >= 3:
                raise KeyboardInterrupt
            return super().forward(x)

    for name in "abcdefgh":
        write_image(tmp_path / "images" / f"{name}.nii.gz", blocks())
    with pytest.raises(KeyboardInterrupt):
        predict_folder(trained(Interrupted()), tmp_path / "images", tmp_path / "out", progress=False)
    left = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert 0 < len(left) < 8
    for file in left:
        np.testing.assert_array_equal(np.asarray(nibabel.load(file).dataobj), blocks())
    outcomes = predict_folder(trained(), tmp_path / "images", tmp_path / "out", progress=False)
    assert sum(outcome.kept for outcome in outcomes) == len(left)
    assert all(outcome.error is None for outcome in outcomes)


def test_channels_in_files_of_their_own(tmp_path):
    for name in ("scan_0000", "scan_0001"):
        write_image(tmp_path / "images" / f"{name}.nii.gz", blocks())
    (outcome,) = predict_folder(trained(num_channels=2), tmp_path / "images", tmp_path / "out", progress=False)
    assert outcome.file == tmp_path / "out" / "scan.nii.gz"
    np.testing.assert_array_equal(np.asarray(nibabel.load(outcome.file).dataobj), blocks())


def test_the_largest_component_is_kept_of_the_classes_chosen(tmp_path):
    voxels = np.zeros((9, 5, 5), np.uint8)
    voxels[1:4, 1:3, 1:3] = 1
    voxels[6, 2, 2] = 1
    voxels[8, 1:3, 1] = 2
    voxels[8, 4, 4] = 2
    image = write_image(tmp_path / "scan.nii.gz", voxels)
    files = [CaseFiles(name="scan", images=(image,))]
    (outcome,) = predict_scans(trained(postprocessing=(1,)), files, tmp_path / "out", progress=False)
    voxels[6, 2, 2] = 0
    np.testing.assert_array_equal(np.asarray(nibabel.load(outcome.file).dataobj), voxels)


def test_an_input_is_never_written_over(tmp_path):
    image = write_image(tmp_path / "images" / "a.nii.gz", blocks())
    content = image.read_bytes()
    with pytest.raises(SettingError, match="expected another folder than that of the images and labels"):
        predict_folder(trained(), tmp_path / "images", tmp_path / "images", overwrite=True, progress=False)
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(SettingError, match="is an input"):
        predict_folder(trained(), tmp_path / "images", tmp_path / "link", progress=False)
    assert image.read_bytes() == content


def test_the_folder_above_folders_of_cases_takes_no_predictions(tmp_path):
    """They would be taken for the images the next time, in the place of the cases."""
    image = write_image(tmp_path / "set" / "case_00000" / "imaging.nii.gz", blocks())
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(SettingError, match="where case_00000 is an input"):
        predict_folder(trained(), tmp_path / "set", tmp_path / "set", progress=False)
    assert sorted(tmp_path.rglob("*")) == files
    (outcome,) = predict_folder(trained(), tmp_path / "set", tmp_path, progress=False)
    assert (outcome.name, image.is_file()) == ("case_00000", True)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="images of"):
        predict_folder(trained(), tmp_path / "nowhere", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.data
def test_real_scans_come_back_in_their_own_geometry(hippocampus, tmp_path):
    labels = sorted((hippocampus / "labelsTr").glob("hippocampus_*.nii.gz"))[:4]
    files = [CaseFiles(name=file.name.removesuffix(".nii.gz"), images=(file,), label=file) for file in labels]
    outcomes = predict_scans(trained(), files, tmp_path / "out", progress=False)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    scores = evaluate_folder(tmp_path / "out", files, ("Anterior", "Posterior"), progress=False)
    assert scores.num_cases.tolist() == [4, 4]
    assert scores.dice.min() == scores.scores["nsd"].min() == 1.0
    assert scores.scores["hd"].max() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ()}, "models of Trained: expected one or more"),
        ({"postprocessing": (1, 3)}, r"postprocessing of Trained: expected classes 1 to 2, got \[3\]"),
    ],
)
def test_what_cannot_predict_is_refused(change, message):
    settings = {name: getattr(trained(), name) for name in Trained.__dataclass_fields__}
    with pytest.raises(SettingError, match=message):
        Trained(**{**settings, **change})


# ---- reading ahead, writing behind


@pytest.fixture
def with_room(monkeypatch):
    """Says that there is memory to read ahead, whatever else runs here."""
    monkeypatch.setattr(predict, "available_memory", lambda: 1)
    monkeypatch.setattr(predict, "most_memory", lambda: 0)


class Meets(ReadsTheImage):
    """A network that waits, in the midst of the second case, for what must happen meanwhile."""

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile = meanwhile

    def forward(self, x):
        logits = super().forward(x)
        if self.num_calls == NUM_WINDOWS + 2:
            self.meanwhile()
        return logits


NUM_WINDOWS = 2  # of a scan of blocks(), in windows of 4×4×4: 5×4×3 voxels are left of it


def test_the_next_case_is_read_and_the_last_one_written_while_one_is_computed(tmp_path, monkeypatch, with_room):
    read, written = [], {}
    prepare, write = predict.prepare_image, predict.write_label

    def prepared(*arguments):
        read.append(threading.current_thread())
        return prepare(*arguments)

    def noted(path, *arguments):
        write(path, *arguments)
        written[path.name] = threading.current_thread()

    def meanwhile():
        deadline = time.monotonic() + 60
        while (len(read) < 3 or "a.nii.gz" not in written) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(read) == 3, "the second is computed, the third one read, and no other"
        assert [*written] == ["a.nii.gz"]

    monkeypatch.setattr(predict, "prepare_image", prepared)
    monkeypatch.setattr(predict, "write_label", noted)
    model, images = Meets(meanwhile), images_of(tmp_path / "images", *"abc")
    outcomes = predict_folder(trained(model), images, tmp_path / "out", progress=False)
    assert [outcome.name for outcome in outcomes] == ["a", "b", "c"]
    assert model.num_calls == 3 * NUM_WINDOWS
    main = threading.main_thread()
    assert [thread is main for thread in read] == [True, False, False]
    assert not any(thread is main for thread in written.values())


def test_nothing_is_read_ahead_where_memory_is_short(tmp_path, monkeypatch):
    threads, prepare = [], predict.prepare_image

    def prepared(*arguments):
        threads.append(threading.current_thread())
        return prepare(*arguments)

    monkeypatch.setattr(predict, "prepare_image", prepared)
    monkeypatch.setattr(predict, "available_memory", lambda: most_memory() - 1)
    predict_folder(trained(), images_of(tmp_path / "images", *"abc"), tmp_path / "out", progress=False)
    assert threads == [threading.main_thread()] * 3


@pytest.mark.parametrize("error", [MemoryError("3 TiB"), DataError("more memory than is left"), RuntimeError("odd")])
def test_what_could_not_be_read_ahead_is_read_alone(tmp_path, monkeypatch, with_room, error):
    failed, prepare = [], predict.prepare_image

    def prepared(*arguments):
        if threading.current_thread() is not threading.main_thread():
            failed.append(True)
            raise error
        return prepare(*arguments)

    monkeypatch.setattr(predict, "prepare_image", prepared)
    outcomes = predict_folder(trained(), images_of(tmp_path / "images", *"abc"), tmp_path / "out", progress=False)
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert failed


def test_a_full_disk_stops_the_case_that_is_computed_meanwhile(tmp_path, monkeypatch, with_room):
    def full(path, *_):
        raise StateError.of(path.name, "the disk", allowed="room", given="none", remedy="Make room.")

    class Waits(ReadsTheImage):
        def forward(self, x):
            time.sleep(0.2 * (self.num_calls >= NUM_WINDOWS))  # far longer than it takes to fail
            return super().forward(x)

    monkeypatch.setattr(predict, "write_label", full)
    model, images = Waits(), images_of(tmp_path / "images", *"abc")
    with pytest.raises(StateError, match=r"a\.nii\.gz of the disk"):
        predict_folder(trained(model), images, tmp_path / "out", progress=False)
    assert model.num_calls == NUM_WINDOWS + 1


def test_what_is_computed_is_written_although_the_next_case_is_interrupted(tmp_path, monkeypatch, with_room):
    go_on, write = threading.Event(), predict.write_label

    def slow(*arguments):
        assert go_on.wait(60)
        write(*arguments)

    class Interrupted(ReadsTheImage):
        def forward(self, x):
            if self.num_calls == NUM_WINDOWS:
                threading.Timer(0.05, go_on.set).start()
                raise KeyboardInterrupt
            return super().forward(x)

    monkeypatch.setattr(predict, "write_label", slow)
    images = images_of(tmp_path / "images", *"abc")
    with pytest.raises(KeyboardInterrupt):
        predict_folder(trained(Interrupted()), images, tmp_path / "out", progress=False)
    assert names(tmp_path / "out") == ["a.nii.gz", "prediction.json"]
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "out" / "a.nii.gz").dataobj), blocks())


# ---- windows that hold nothing


def amid_air(margin=5):
    """Blocks amid much that is clipped, which is no 0 and so is not cropped away."""
    return np.pad(blocks().astype(np.float32), margin, constant_values=-3.0)


def test_windows_in_the_air_are_skipped_counted_and_recorded(tmp_path):
    write_image(tmp_path / "images" / "a.nii.gz", amid_air())
    write_image(tmp_path / "images" / "b.nii.gz", np.full((9, 8, 7), -3.0))
    plain, sparing = ReadsTheImage(), ReadsTheImage()
    all_read = predict_folder(trained(plain), tmp_path / "images", tmp_path / "all", progress=False)
    skipping = replace(trained(sparing), skip_empty=True)
    outcomes = predict_folder(skipping, tmp_path / "images", tmp_path / "some", progress=False)
    for one, other in zip(all_read, outcomes, strict=True):
        assert one.skipped is None
        np.testing.assert_array_equal(nibabel.load(one.file).get_fdata(), nibabel.load(other.file).get_fdata())
    (a, num_a), (b, num_b) = (outcome.skipped for outcome in outcomes)
    assert 0 < a < num_a
    assert b == num_b > 0
    assert (plain.num_calls, sparing.num_calls) == (num_a + num_b, num_a - a)
    assert outcome_table(outcomes).endswith(
        f"0 failed\n{a + b:,} of {num_a + num_b:,} windows held nothing and were skipped"
    )
    record = json.loads((tmp_path / "some" / "prediction.json").read_text())
    assert record["skip_empty"] is True
    assert record["skipped"] == {"a": [a, num_a], "b": [b, num_b]}
    again = predict_folder(skipping, tmp_path / "images", tmp_path / "some", progress=False)
    assert all(outcome.kept for outcome in again)
    with pytest.raises(StateError, match="those of these networks and settings"):
        predict_folder(trained(sparing), tmp_path / "images", tmp_path / "some", progress=False)


def test_what_has_no_value_of_air_is_refused_to_be_skipped():
    preparation = Preparation(spacing=None, normalization=(AS_IT_IS, ZScoreNormalization()))
    message = "skip_empty of Trained: expected channels that are CTs, .* got ct, mri. .*leave --skip-empty out"
    with pytest.raises(SettingError, match=message):
        replace(trained(num_channels=2), preparation=preparation, skip_empty=True)


# ---- one folder, several predictions


def other():
    """A trained network whose weights differ, though it predicts the same."""
    model = ReadsTheImage()
    with torch.no_grad():
        model.scale.fill_(10.0)
    return trained(model)


def images_of(folder, *names):
    for name in names:
        write_image(folder / f"{name}.nii.gz", blocks())
    return folder


def test_what_is_there_of_other_networks_is_refused_or_replaced_whole(tmp_path):
    images, out = images_of(tmp_path / "images", "a", "b"), tmp_path / "out"
    predict_folder(trained(), images, out, progress=False)
    before = {name: (out / name).read_bytes() for name in names(out)}
    with pytest.raises(
        StateError, match=r"expected those of these networks and settings, got others: a\.nii\.gz, b\.n"
    ):
        predict_folder(other(), images, out, progress=False)
    with pytest.raises(StateError, match=r"got others: b\.nii\.gz\. Choose another folder"):  # it would stay, unnamed
        predict_folder(other(), images_of(tmp_path / "one", "a"), out, overwrite=True, progress=False)
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    outcomes = predict_folder(other(), images, out, overwrite=True, progress=False)
    assert not any(outcome.kept for outcome in outcomes)
    assert all(outcome.kept for outcome in predict_folder(other(), images, out, progress=False))


def test_a_stopped_replacement_leaves_nothing_of_the_networks_before(tmp_path, monkeypatch):
    images, out = images_of(tmp_path / "images", "a", "b"), tmp_path / "out"
    predict_folder(trained(), images, out, progress=False)

    def stopped(*arguments, on_pass):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict_scan", stopped)
        with pytest.raises(KeyboardInterrupt):
            predict_folder(other(), images, out, overwrite=True, progress=False)
    assert names(out) == ["prediction.json"]
    outcomes = predict_folder(other(), images, out, progress=False)
    assert not any(outcome.kept for outcome in outcomes), "the record names the new networks"


@pytest.mark.parametrize("record", [None, "", "[" * 100_000, '{"networks": []}'])
def test_predictions_of_unknown_origin_are_not_claimed(tmp_path, record):
    images, out = images_of(tmp_path / "images", "a"), images_of(tmp_path / "out", "a")
    if record is not None:
        (out / "prediction.json").write_text(record)
    before = (out / "a.nii.gz").read_bytes()
    with pytest.raises(StateError, match=r"prediction\.json: .* Nothing says of which networks the predictions are"):
        predict_folder(trained(), images, out, progress=False)
    assert (out / "a.nii.gz").read_bytes() == before
    (outcome,) = predict_folder(trained(), images, out, overwrite=True, progress=False)
    assert outcome.error is None
    assert predict_folder(trained(), images, out, progress=False)[0].kept


def test_a_second_prediction_into_a_folder_is_refused_before_it_begins(tmp_path, monkeypatch):
    images, out = images_of(tmp_path / "images", "a"), tmp_path / "out"
    inside = []

    def meanwhile(model, image, placement, windows, on_pass):
        for late in (trained(), other()):
            with pytest.raises(StateError, match="expected a folder that nobody else works in, got one in use by anot"):
                predict_folder(late, images, out, overwrite=True, progress=False)
        inside.append(names(out))
        return predict_scan(model, image, placement, windows)

    predict_scan = predict.predict_scan
    monkeypatch.setattr(predict, "predict_scan", meanwhile)
    predict_folder(trained(), images, out, progress=False)
    assert inside == [["prediction.json"]]
    assert names(out) == ["a.nii.gz", "prediction.json"]


def test_the_folder_of_images_is_no_place_for_predictions_whatever_they_are_called(tmp_path):
    images = images_of(tmp_path / "images", "scan_0000", "scan_0001")
    with pytest.raises(SettingError, match=r"where scan_0000\.nii\.gz is an input"):
        predict_folder(trained(num_channels=2), images, images, progress=False)
    (tmp_path / "linked").mkdir()
    for file in images.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    with pytest.raises(SettingError, match="is an input"):
        predict_folder(trained(num_channels=2), tmp_path / "linked", images, progress=False)
    assert names(images) == ["scan_0000.nii.gz", "scan_0001.nii.gz"]


def test_a_link_in_the_place_of_a_prediction_is_replaced_and_not_followed(tmp_path):
    images, out = images_of(tmp_path / "images", "a"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim").write_text("precious")
    (out / "a.nii.gz").symlink_to(tmp_path / "victim")
    (out / "prediction.json").symlink_to(tmp_path / "victim")
    (outcome,) = predict_folder(trained(), images, out, overwrite=True, progress=False)
    assert outcome.error is None
    assert not (out / "a.nii.gz").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_two_cases_of_one_name_are_refused(tmp_path):
    files = [CaseFiles(name=name, images=(tmp_path / f"{name}.nii.gz",)) for name in ("a", "A")]
    with pytest.raises(DataError, match="got A beside a"):
        predict_scans(trained(), files, tmp_path / "out", progress=False)

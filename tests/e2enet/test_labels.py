"""What label files hold: values, regions that overlap and what is ignored, from the file to the score.

Regions are judged by sets of file values in NumPy, which know nothing of the numbers in memory.
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import examples
from torch.nn import functional

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.checkpoint import load_trained
from dstlib.zoo.e2enet.cli import main, read_config
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import PatchSettings, draw_batch
from dstlib.zoo.e2enet.data.layouts.label_table import read_table
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles, Manifest
from dstlib.zoo.e2enet.data.layouts.regions import with_regions
from dstlib.zoo.e2enet.data.preprocessing.fingerprint import scan_fingerprint
from dstlib.zoo.e2enet.data.preprocessing.normalization import RangeNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation, prepare_scan
from dstlib.zoo.e2enet.data.preprocessing.resampling import topmost
from dstlib.zoo.e2enet.data.scans.nifti import Scan, examine_scan, read_label
from dstlib.zoo.e2enet.evaluation.evaluate import choose_postprocessing, evaluate_folder
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest
from dstlib.zoo.e2enet.inference.predict import Trained, predict_scans
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.run import _has_classes_of, run_recipe
from dstlib.zoo.e2enet.training.loop import _count
from dstlib.zoo.e2enet.training.loss import _loss_of, deep_supervision_loss

BRATS = Labels(values=(1, 2, 4), regions=((1, 2, 4), (1, 4), (4,)), written=(2, 1, 4), ignored=255)


EITHER = st.booleans()


@st.composite
def all_labels(draw, regions=EITHER, ignored=EITHER):
    values = sorted(draw(st.sets(st.integers(1, 255), min_size=1, max_size=5)))
    left = [value for value in (7, 77, 255, *range(1, 8)) if value not in values]
    labels = Labels(values=tuple(values), ignored=draw(st.sampled_from(left)) if draw(ignored) else None)
    if not draw(regions):
        return labels
    sets = draw(st.lists(st.sets(st.sampled_from(values), min_size=1), min_size=1, max_size=4))
    written = tuple(draw(st.sampled_from(sorted(region))) for region in sets)
    return replace(labels, regions=tuple(tuple(sorted(region)) for region in sets), written=written)


def drawn_label(labels, seed, shape=(3, 4, 5)):
    """A label by the numbers in memory."""
    return np.random.default_rng(seed).integers(0, len(labels.in_files), shape).astype(np.uint8)


def members_in_files(labels):
    return [{value} for value in labels.values] if labels.regions is None else [*map(set, labels.regions)]


def write_label(file, values):
    file.parent.mkdir(exist_ok=True, parents=True)
    nibabel.Nifti1Image(values.T, np.eye(4)).to_filename(file)
    return file


# ---- the noun


@given(all_labels())
@examples(15, 40)
def test_values_and_numbers_lead_to_each_other(labels):
    numbers = np.arange(len(labels.in_files), dtype=np.uint8)
    np.testing.assert_array_equal(labels.to_numbers(labels.to_values(numbers)), numbers)
    np.testing.assert_array_equal(labels.to_values(numbers), labels.in_files)
    assert labels.ignored_number in (None, len(labels.values) + 1)
    foreign = np.setdiff1d(np.arange(256), labels.in_files)
    assert all(labels.to_numbers(np.array([value], np.uint8)) is None for value in foreign)


@given(all_labels(), st.integers(0, 9))
@examples(15, 30)
def test_a_file_holds_the_values_of_the_set(labels, seed):
    numbers = drawn_label(labels, seed)
    with TemporaryDirectory() as folder:
        file = write_label(Path(folder) / "a.nii.gz", labels.to_values(numbers))
        assert {*np.asarray(nibabel.load(file).dataobj).ravel()} <= {0, *labels.values, labels.ignored}
        np.testing.assert_array_equal(read_label(file, labels).voxels.T, numbers)


@given(all_labels())
def test_as_many_outputs_as_regions_or_classes_and_the_background(labels):
    expected = [frozenset(labels.in_files[list(numbers)].tolist()) for numbers in labels.members]
    assert expected == [frozenset(values) for values in members_in_files(labels)]
    assert labels.num_classes == len(labels.members)
    assert labels.num_outputs == len(labels.members) + (labels.regions is None)


@given(all_labels(regions=st.just(True)))
def test_what_no_prediction_says(labels):
    """A value comes back in its regions alone if the one that is written for them is of the same regions."""
    regions = [set(region) for region in labels.regions]
    unsaid = {value for value, _, _ in labels.unsaid()}
    for value in labels.values:
        wanted = [k for k, region in enumerate(regions) if value in region]
        written = 0
        for k in wanted:
            written = labels.written[k]
        assert (value in unsaid) == (wanted != [k for k, region in enumerate(regions) if written in region])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"values": (2, 1)}, "expected different whole numbers from 1 to 255, ascending"),
        ({"values": (1, 1)}, "expected different whole numbers"),
        ({"values": (0, 1)}, "expected different whole numbers"),
        ({"values": (1, 256)}, "expected different whole numbers"),
        ({"values": (1, 2), "ignored": 2}, "expected different whole numbers"),
        ({"values": (1, 2), "regions": ((1, 3),), "written": (1,)}, "expected sets of the values 1, 2"),
        ({"values": (1, 2), "regions": ((1,), (1, 2)), "written": (1,)}, "expected sets of the values 1, 2"),
        ({"values": (1, 2), "regions": ((1,),), "written": (2,)}, "expected sets of the values 1, 2"),
        ({"values": (1, 2), "written": (1, 2)}, "expected sets of the values 1, 2"),
        ({"values": (1, 2), "regions": ()}, "expected sets of the values 1, 2"),
    ],
)
def test_labels_that_contradict_themselves(settings, text):
    with pytest.raises(DataError, match=text):
        Labels(**settings)


def test_what_is_odd_about_a_label_with_voxels_to_ignore(tmp_path):
    labels = Labels(values=(1,), ignored=9)
    case = CaseFiles(name="a", images=(tmp_path / "a.nii.gz",), label=tmp_path / "label.nii.gz")
    image = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    nibabel.Nifti1Image(image, np.eye(4)).to_filename(case.images[0])
    for values, text in (
        ([9] * 8, ["label.nii.gz is ignored everywhere: each voxel is 9"]),
        ([0, 9] * 4, ["label.nii.gz has no foreground"]),
        ([0] * 8, ["label.nii.gz has no foreground"]),
        ([0, 9, 1, 0] * 2, []),
    ):
        write_label(case.label, np.array(values, np.uint8).reshape(2, 2, 2))
        warnings = examine_scan(case, num_channels=1, labels=labels).warnings
        assert [f"{warning.file.name} {warning.text}" for warning in warnings] == text


# ---- tables


def table_of(labels, names):
    """The table of nnU-Net that these labels are written as."""
    table = {name: sorted(values) for name, values in zip(names, members_in_files(labels), strict=True)}
    if labels.regions is None:
        table = {name: value for name, (value,) in table.items()}
    return {"background": 0, **table, **({} if labels.ignored is None else {"ignore": labels.ignored})}


@given(all_labels())
def test_a_table_is_read_as_it_was_written(labels):
    used = set().union(*members_in_files(labels))
    has_lists = labels.regions is not None and max(map(len, labels.regions)) > 1
    names = tuple(f"name {k}" for k in range(labels.num_classes))
    table = read_table(table_of(labels, names), [*labels.written] or None)
    if labels.regions is not None and not has_lists and len({*labels.regions}) < len(labels.regions):
        assert isinstance(table, str), "one value of two names, and nothing that overlaps"
    elif has_lists:
        assert table == (names, replace(labels, values=tuple(sorted(used))))
    else:
        assert table[1] == Labels(values=tuple(sorted(used)), ignored=labels.ignored), "as nnU-Net: no regions"


def some_manifest(classes, labels):
    case = CaseFiles(name="a", images=(Path("a.nii.gz"),))
    return Manifest(
        name="a", folder=Path(), layout="mine", channels=("FLAIR",), classes=classes, labels=labels, train=(case,)
    )


@pytest.mark.parametrize(
    ("classes", "values", "written"),
    [
        (("edema", "non-enhancing tumor", "enhancing tumour"), (1, 2, 3), (1, 2, 3)),  # as the Decathlon spells them
        (("necrotic core", "edema", "enhancing tumour"), (1, 2, 4), (2, 1, 4)),  # BraTS to 2021
        (("necrotic core", "edema", "enhancing tumour"), (1, 2, 3), (2, 1, 3)),
        (("Peritumoral Oedema", "NonEnhancing", "Enhancing"), (1, 2, 3), (1, 2, 3)),
    ],
)
def test_regions_of_brats(classes, values, written):
    found = with_regions(some_manifest(classes, Labels(values=values)), "brats")
    _, core, enhancing = written
    assert found.classes == ("whole tumour", "tumour core", "enhancing tumour")
    assert [set(region) for region in found.labels.regions] == [{*values}, {core, enhancing}, {enhancing}]
    assert (found.labels.values, found.labels.written, found.labels.unsaid()) == (values, written, [])
    with pytest.raises(SettingError, match="--regions of data set 'a': expected edema"):
        with_regions(found, "brats")


def test_regions_of_a_file(tmp_path):
    manifest = some_manifest(("a", "b", "c"), Labels(values=(1, 2, 3)))
    assert with_regions(manifest, None) is manifest
    file = tmp_path / "regions.json"
    content = {"labels": {"background": 0, "all": [1, 2], "b": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    file.write_text(json.dumps(content))
    found = with_regions(manifest, str(file))
    assert found.classes == ("all", "b")
    assert found.labels == Labels(values=(1, 2), regions=((1, 2), (2,)), written=(1, 2), ignored=3)
    del content["labels"]["ignore"]
    file.write_text(json.dumps(content))
    assert with_regions(manifest, str(file)).labels.values == (1, 2, 3), "value 3 is of no region, but may be there"
    with pytest.raises(SettingError, match="expected values 0 to 1, got 0 to 2 in"):
        with_regions(some_manifest(("a",), Labels.consecutive(1)), str(file))
    file.write_text(json.dumps({"labels": {"background": 0, "a": 1}}))
    with pytest.raises(DataError, match="expected regions as nnU-Net has them, got 'labels' without lists"):
        with_regions(manifest, str(file))
    with pytest.raises(DataError, match="No such file"):
        with_regions(manifest, str(tmp_path / "absent.json"))


# ---- preparation


def test_what_is_ignored_is_measured_and_resampled_as_nnunet_does():
    """Its intensities count as foreground's, and its voxels go along as a class does."""
    label = np.zeros((2, 2, 8), np.uint8)
    label[..., 2:4], label[..., 4:] = 1, 2  # of which 2 is ignored
    image = np.arange(32, dtype=np.float32).reshape(1, 2, 2, 8)
    scan = Scan("a", image, label, np.diag([1.0, 1.0, 1.0, 1.0]))
    labelled = replace(scan, label=np.minimum(label, 1))
    assert scan_fingerprint(scan).to_json() == scan_fingerprint(labelled).to_json()
    assert scan_fingerprint(scan).to_json() != scan_fingerprint(replace(scan, label=label * (label < 2))).to_json()
    preparation = Preparation(spacing=(1.0, 1.0, 0.5), normalization=(RangeNormalization(kind="nonorm"),), crop=False)
    found = prepare_scan(scan, preparation).label
    assert found.shape == (2, 2, 16)
    assert sorted(np.bincount(found[0, 0]).tolist()) == [4, 4, 8]
    assert np.bincount(found.ravel())[2] == 8 * 4


# ---- training


def logits_and_labels(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, labels.num_outputs, 3, 4, 5, generator=generator)
    return logits, torch.from_numpy(drawn_label(labels, seed, (2, 1, 3, 4, 5))).long()


@given(all_labels(ignored=st.just(True)), st.integers(0, 99))
@examples(15, 40)
def test_what_is_ignored_has_no_part_in_the_loss(labels, seed):
    """Neither by what is answered there, in value or gradient, nor by how much of it there is."""
    logits, truth = logits_and_labels(labels, seed)
    ignored = truth == labels.ignored_number
    logits.requires_grad_()
    loss = deep_supervision_loss([logits], truth, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert not gradient[ignored.expand_as(gradient)].any()
    other = torch.where(ignored, logits.detach().roll(1, dims=0) + 1, logits.detach())
    assert deep_supervision_loss([other], truth, labels) == loss
    wider = [functional.pad(x, (0, 2), value=labels.ignored_number) for x in (logits.detach(), truth)]
    # the same numbers are added up in another order
    torch.testing.assert_close(deep_supervision_loss(wider[:1], wider[1], labels), loss.detach(), rtol=1e-5, atol=1e-6)


@given(all_labels(regions=st.just(False), ignored=st.just(True)), st.integers(0, 99))
@examples(15, 40)
def test_where_nothing_is_ignored_the_loss_is_that_of_an_ordinary_set(labels, seed):
    logits, truth = logits_and_labels(replace(labels, ignored=None), seed)
    expected = deep_supervision_loss([logits], truth)  # MONAI's, which sums in another order
    torch.testing.assert_close(deep_supervision_loss([logits], truth, labels), expected, rtol=1e-5, atol=1e-6)


@given(all_labels(regions=st.just(True)), st.integers(0, 99))
@examples(15, 40)
def test_the_loss_of_regions_by_hand(labels, seed):
    """In float64, one patch, region and voxel after the other."""
    logits, truth = logits_and_labels(labels, seed)
    values = labels.in_files[truth.numpy()][:, 0]
    counted = values != (-1 if labels.ignored is None else labels.ignored)
    answers = 1 / (1 + np.exp(-logits.double().numpy()))
    dice, entropy = [], []
    for k, region in enumerate(members_in_files(labels)):
        inside = np.isin(values, [*region])
        entropy.append(-np.where(inside, np.log(answers[:, k]), np.log1p(-answers[:, k]))[counted].sum())
        for patch in range(2):
            p, t = answers[patch, k][counted[patch]], inside[patch][counted[patch]]
            dice.append((2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5))
    share = counted.sum() * (1 if labels.ignored is not None else labels.num_outputs)  # as nnU-Net weighs it
    expected = 1 - np.mean(dice) + sum(entropy) / max(share, 1)
    # the entropy is added up in float32, over at most 120 voxels
    np.testing.assert_allclose(float(_loss_of(labels)(logits, truth)), expected, rtol=1e-5)


@given(all_labels(), st.integers(0, 99))
@examples(15, 40)
def test_the_counts_of_a_validation(labels, seed):
    logits, truth = logits_and_labels(labels, seed)
    values = labels.in_files[truth.numpy()][:, 0]
    counted = values != (-1 if labels.ignored is None else labels.ignored)
    answers = labels.in_files[logits.argmax(1).numpy()] if labels.regions is None else None
    found = _count(logits, truth, labels)
    for k, region in enumerate(members_in_files(labels)):
        inside = np.isin(values, [*region]) & counted
        answer = (np.isin(answers, [*region]) if labels.regions is None else logits[:, k].numpy() > 0) & counted
        assert found[:, k].tolist() == [(inside & answer).sum(), inside.sum() + answer.sum()]
    assert not found[:, labels.num_classes :].any()


def case_of(values, labels):
    label = labels.to_numbers(np.array(values, np.uint8))
    return Case("a", np.zeros((1, *label.shape), np.float32), label, (1.0, 1.0, 1.0), labels=labels)


def test_the_voxels_of_regions():
    case = case_of([[[0, 1, 2, 4, 255]]], BRATS)
    assert {name: voxels.tolist() for name, voxels in case.class_voxels.items()} == {1: [1, 2, 3], 2: [1, 3], 3: [3]}
    assert case.labelled_voxels.tolist() == [0, 1, 2, 3]
    assert case_of([[[2, 2]]], BRATS).class_voxels.keys() == {1}
    ordinary = replace(BRATS, regions=None, written=())
    assert case_of([[[0, 1, 4, 255]]], ordinary).class_voxels.keys() == {1, 3}
    assert case_of([[[0, 1, 4]]], replace(ordinary, ignored=None)).labelled_voxels is None


def patches(case, **settings):
    drawn = PatchSettings(patch_size=(1, 1, 3), batch_size=4, augment=None, **settings)
    return torch.cat([draw_batch([case], drawn, seed=0, iteration=i)[1] for i in range(20)])[:, 0, 0, 0]


def test_patches_are_centred_where_somebody_labelled():
    """As nnU-Net draws them: forced ones on foreground, all others on what is not ignored."""
    values = [255] * 40
    values[20], values[30] = 0, 4
    case = case_of([[values]], BRATS)
    centres = patches(case, oversample=0.0)[:, 1]
    assert {*centres.tolist()} == {0, 3}
    assert {*patches(case, oversample=1.0)[:, 1].tolist()} == {3}
    everything = case_of([[[255] * 40]], BRATS)
    assert {*patches(everything, oversample=0.5)[:, 1].tolist()} == {BRATS.ignored_number}


# ---- prediction


@given(all_labels(regions=st.just(True)), st.integers(0, 99))
@examples(15, 40)
def test_later_regions_are_written_on_top(labels, seed):
    chances = np.random.default_rng(seed).random((labels.num_outputs, 4, 5), np.float32)
    chances[:, 0] = 1 / 2  # which is not above one half
    found = labels.to_values(topmost(chances, labels.written_numbers))
    for place in np.ndindex(4, 5):
        expected = [value for value, chance in zip(labels.written, chances[:, *place], strict=True) if chance > 1 / 2]
        assert found[place] == [0, *expected][-1]


class Known(torch.nn.Module):
    """Answers with logits of the image itself: its channels."""

    def __init__(self):
        super().__init__()
        self.none, self.deep_supervision = torch.nn.Parameter(torch.zeros(1)), False

    def forward(self, x):
        return x + self.none


def test_a_prediction_has_the_values_of_the_set(tmp_path):
    """From logits of whole, core and enhancing tumour to a file, whose values then belong to these regions."""
    rng = np.random.default_rng(0)
    nested = np.sort(rng.normal(size=(3, 6, 7, 8)).astype(np.float32), axis=0)[::-1]
    files = tuple(tmp_path / f"a_{k:04d}.nii.gz" for k in range(3))
    for file, channel in zip(files, nested, strict=True):
        nibabel.Nifti1Image(channel.T, np.eye(4)).to_filename(file)
    trained = Trained(
        models=(Known(),),
        preparation=Preparation(spacing=None, normalization=(RangeNormalization(kind="nonorm"),) * 3, crop=False),
        patch_size=(4, 4, 4),
        mirror=(0, 2),
        channels=("0", "1", "2"),
        classes=("whole", "core", "enhancing"),
        labels=BRATS,
    )
    (outcome,) = predict_scans(trained, [CaseFiles(name="a", images=files)], tmp_path / "out", progress=False)
    found = np.asarray(nibabel.load(outcome.file).dataobj).T
    for region, logits in zip(BRATS.regions, nested, strict=True):
        # the mean over windows of one and the same sigmoid is that, but for rounding
        differs = np.isin(found, region) != (logits > 0)
        assert not differs[np.abs(logits) > 1e-5].any()
    assert {*found.ravel().tolist()} == {0, 1, 2, 4}


# ---- evaluation


@given(all_labels(), st.integers(0, 9))
@settings(max_examples=20)
def test_scores_are_of_what_belongs_to_each_region_in_both_files(labels, seed):
    label = labels.in_files[drawn_label(labels, seed)]
    prediction = labels.in_files[drawn_label(labels, seed + 100)]
    names = [f"name {k}" for k in range(labels.num_classes)]
    with TemporaryDirectory() as folder:
        write_label(Path(folder) / "out" / "a.nii.gz", prediction)
        case = CaseFiles(name="a", images=(), label=write_label(Path(folder) / "a.nii.gz", label))
        scores = evaluate_folder(Path(folder) / "out", [case], names, labels=labels, progress=False)
    counted = label != (-1 if labels.ignored is None else labels.ignored)
    for k, region in enumerate(members_in_files(labels)):
        a, b = (np.isin(values, [*region]) & counted for values in (label, prediction))
        expected = 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else np.nan
        np.testing.assert_allclose(scores.dice[0, k], expected, rtol=1e-12)
        np.testing.assert_allclose(scores.volumes[0, k], [a.sum() / 1000, b.sum() / 1000], rtol=1e-12)


def test_a_surface_is_that_of_the_region(tmp_path):
    """Core and whole lie as far from their labels as drawn; what is ignored is outside of both."""
    label, prediction = (np.zeros((9, 9, 9), np.uint8) for _ in range(2))
    label[2:5, 2:5, 2:7], label[2:5, 2:5, 4:7] = 2, 4
    prediction[2:5, 2:5, 2:7], prediction[2:5, 2:5, 6:7] = 2, 4
    label[7:], prediction[8] = 255, 1
    case = CaseFiles(name="a", images=(), label=write_label(tmp_path / "a.nii.gz", label))
    write_label(tmp_path / "out" / "a.nii.gz", prediction)
    scores = evaluate_folder(tmp_path / "out", [case], ["whole", "core", "top"], labels=BRATS, progress=False)
    assert scores.scores["hd"][0].tolist() == [0.0, 2.0, 2.0]
    assert scores.dice[0].tolist() == [1.0, 0.5, 0.5]


def test_largest_components_of_regions():
    """A false core goes with the whole around it; a core in two parts stays, as its Dice would fall."""
    label = np.array([[[2, 4, 2, 4, 2, 0, 0, 0]]], np.uint8)
    prediction = np.array([[[2, 4, 2, 4, 2, 0, 4, 0]]], np.uint8)
    pairs = [tuple(BRATS.to_numbers(values) for values in (prediction, label))]
    chosen = choose_postprocessing(lambda: iter(pairs), BRATS)
    assert chosen == (1,)
    np.testing.assert_array_equal(keep_largest(pairs[0][0], chosen, BRATS.members), pairs[0][1])


@given(all_labels(regions=st.just(True)), st.integers(0, 99))
@examples(15, 30)
def test_no_region_loses_by_what_is_chosen(labels, seed):
    pairs = [(drawn_label(labels, seed), drawn_label(labels, seed + 100))]
    chosen = choose_postprocessing(lambda: iter(pairs), labels)

    def dice(prediction):
        label = pairs[0][1]
        counted = label != labels.ignored_number
        masks = [[np.isin(x, of) & counted for x in (label, prediction)] for of in labels.members]
        return [2 * (a & b).sum() / max(1, a.sum() + b.sum()) for a, b in masks]

    before, after = dice(pairs[0][0]), dice(keep_largest(pairs[0][0], chosen, labels.members))
    assert all(y >= x - 1e-12 for x, y in zip(before, after, strict=True))


# ---- a run


def write_scans(folder, labels, num=6):
    """Nested boxes in noise, in nnU-Net's layout, a third of each scan unlabelled."""
    names = [f"scan_{i}" for i in range(num)]
    (folder / "imagesTr").mkdir(parents=True)
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        corner = rng.integers(1, 5, 3)
        numbers = np.zeros((20, 18, 22), np.uint8)
        image = rng.normal(size=numbers.shape)
        for number, size in ((2, 12), (1, 8), (3, 4)):  # edema, in it a core, in that what enhances
            start = corner + (12 - size) // 2
            box = tuple(slice(at, at + size) for at in start)
            numbers[box] = number
            image[box] += 3
        numbers[:, :, 15:] = labels.ignored_number
        nibabel.Nifti1Image(image.astype(np.float32).T, np.eye(4)).to_filename(folder / f"imagesTr/{name}_0000.nii.gz")
        write_label(folder / f"labelsTr/{name}.nii.gz", labels.to_values(numbers))
    table = table_of(labels, ["whole", "core", "enhancing"])
    content = {"channel_names": {"0": "MRI"}, "labels": table, "regions_class_order": labels.written}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": num, "file_ending": ".nii.gz"}))
    return folder


def config_of_run(data, run, *more):
    places = ("--data", str(data), "--cache", str(data.with_name("cache")), "--run-dir", str(run), "--device", "cpu")
    short = ("--epochs", "4", "--iterations", "60", "--interval", "60", "--patch-size", "16", "16", "16")
    config = read_config(HIPPOCAMPUS_RECIPE, ["--preset", "demo", *places, *short, "--val-iterations", "4", *more])
    network = replace(config.preset.network, channels=(8, 12, 16), strides=((2, 2, 2),) * 2, heads=2)
    return replace(config, preset=replace(config.preset, network=network))


@pytest.mark.long
def test_a_training_on_regions_from_scans_to_scores(tmp_path, capsys):
    data = write_scans(tmp_path / "data", BRATS)
    scores = run_recipe(config_of_run(data, tmp_path / "run"))
    told = capsys.readouterr().out
    assert "regions are predicted: whole (1, 2, 4) and core (1, 4) and enhancing (4), later ones on top" in told
    assert "voxels of value 255 are ignored" in told
    assert "value 255 is ignored, where nnU-Net demands 5" in told
    assert scores.classes == ("whole", "core", "enhancing")
    assert scores.mean > 0.5, "it learned something of nested boxes in two minutes"
    written = [np.unique(nibabel.load(file).dataobj) for file in (tmp_path / "run" / "predictions").glob("*.nii.gz")]
    assert {*np.concatenate(written).tolist()} <= {0, 1, 2, 4}
    run, trained = str(tmp_path / "run"), load_trained([tmp_path / "run"])
    assert trained.labels == BRATS
    for column in ("loss", "val_dice"):
        rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
        assert column in rows[0]
    assert main(["evaluate", f"{run}/predictions", "--data", str(data), "--allow-missing"]) == 0
    out = str(tmp_path / "out")
    assert main(["predict", run, "--images", str(data / "imagesTr"), "--output", out, "--device", "cpu"]) == 0
    assert main(["evaluate", out, "--data", str(data)]) == 0
    assert main(["check", str(data)]) == 0
    capsys.readouterr()

    # The same files as classes: as many outputs and one more, and heads of their own.
    content = json.loads((data / "dataset.json").read_text())
    content["labels"] = {"background": 0, "necrotic core": 1, "edema": 2, "enhancing": 4, "ignore": 255}
    (data / "dataset.json").write_text(json.dumps(content))
    again = run_recipe(config_of_run(data, tmp_path / "classes", "--from", run, "--epochs", "1"))
    assert "other classes, so they start afresh" in capsys.readouterr().out
    assert again.classes == ("necrotic core", "edema", "enhancing")
    assert load_trained([tmp_path / "classes"]).labels == replace(BRATS, regions=None, written=())
    brats = run_recipe(config_of_run(data, tmp_path / "brats", "--regions", "brats", "--epochs", "1"))
    assert brats.classes == ("whole tumour", "tumour core", "enhancing tumour")
    assert load_trained([tmp_path / "brats"]).labels == BRATS
    assert main(["compare", run, str(tmp_path / "brats"), "--beside", "brats"]) == 0
    assert "over regions, which overlap, in run, brats; published ones over classes" in capsys.readouterr().out


def test_a_damaged_record_of_classes_is_that_of_others():
    data = SimpleNamespace(classes=("liver",), labels=SimpleNamespace(regions=None))
    assert _has_classes_of({"classes": ["liver"], "labels": {"regions": None}}, data)
    assert _has_classes_of({"classes": ["liver"]}, data)
    assert not _has_classes_of({"classes": ["liver"], "labels": {"regions": [[1, 2]]}}, data)
    for damaged in ({"classes": torch.ones(2)}, torch.ones(2), {"classes": ["liver", torch.ones(2)]}):
        assert not _has_classes_of(damaged, data)
    assert _has_classes_of({"classes": ["liver"], "labels": torch.ones(2)}, data)

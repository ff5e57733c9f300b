"""Normalisation and patches: a batch is a pure function, and holds what was promised."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import examples

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.data.cases import MAX_VOXELS, Case
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import draw_batch
from dstlib.zoo.e2enet.data.dataloading.settings import Augmentation, PatchSettings
from dstlib.zoo.e2enet.data.phantoms.ct import phantoms

MM = (1.0, 1.0, 1.0)
CHANCES = {f.name: getattr(Augmentation(), f.name) for f in fields(Augmentation) if f.name != "per_channel"}
ALWAYS = Augmentation(**{name: replace(chance, probability=1) for name, chance in CHANCES.items()}, per_channel=1)


def case_of(label, image=None, name="case"):
    label = np.asarray(label, np.uint8)
    return Case(name, np.asarray(label[None] if image is None else image, np.float32), label, MM)


@pytest.fixture(scope="module")
def cases():
    return phantoms(3, shape=(32, 40, 40)).cases


# ---- draw_batch


def test_a_batch_is_a_pure_function_of_seed_and_iteration(cases):
    patches = PatchSettings(patch_size=(16, 24, 24))
    draws = {i: draw_batch(cases, patches, seed=3, iteration=i) for i in range(12)}
    torch.manual_seed(99)
    np.random.seed(99)  # neither global generator matters
    for i in reversed(range(12)):
        image, label = draw_batch(cases, patches, seed=3, iteration=i)
        assert torch.equal(image, draws[i][0])
        assert torch.equal(label, draws[i][1])
    assert not torch.equal(draws[0][0], draws[1][0])
    assert not torch.equal(draws[0][0], draw_batch(cases, patches, seed=4, iteration=0)[0])


def test_drawing_leaves_the_cases_alone(cases):
    before = [(c.image.copy(), c.label.copy()) for c in cases]
    for i in range(10):
        image, label = draw_batch(cases, PatchSettings(patch_size=(32, 40, 40)), seed=0, iteration=i)
        image.fill_(7.0)  # a loop may write into its batch
        label.fill_(7)
    for case, (old_image, old_label) in zip(cases, before, strict=True):
        np.testing.assert_array_equal(case.image, old_image)
        np.testing.assert_array_equal(case.label, old_label)


def test_the_global_generators_are_left_alone(cases):
    torch.manual_seed(0)
    np.random.seed(0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for i in range(10):
        draw_batch(cases, PatchSettings(patch_size=(16, 16, 16)), seed=0, iteration=i)
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


def test_types_and_values(cases):
    for i in range(30):
        image, label = draw_batch(cases, PatchSettings(patch_size=(16, 24, 20), batch_size=3), seed=0, iteration=i)
        assert type(image) is torch.Tensor  # not MONAI's subclass, which is slow in a network
        assert (image.shape, image.dtype) == ((3, 1, 16, 24, 20), torch.float32)
        assert (label.shape, label.dtype) == ((3, 1, 16, 24, 20), torch.int64)
        assert torch.isfinite(image).all()
        assert set(label.unique().tolist()) <= set(range(16))


@pytest.mark.parametrize(
    ("batch_size", "oversample", "forced"),
    [(2, 0.33, 1), (1, 0.33, 0), (3, 0.33, 1), (4, 0.33, 1), (9, 0.33, 3), (2, 0.0, 0), (2, 1.0, 2)],
)
def test_how_many_patches_are_forced(batch_size, oversample, forced):
    patches = PatchSettings(patch_size=(8, 8, 8), batch_size=batch_size, oversample=oversample)
    assert patches.num_forced == forced  # by hand: batch - round(batch * (1 - oversample))


@pytest.mark.parametrize("augment", [None, Augmentation()])
@pytest.mark.parametrize("corner", [(0, 0, 0), (29, 29, 29), (0, 15, 29)])
def test_the_last_patch_holds_foreground_even_if_it_is_one_voxel(augment, corner):
    label = np.zeros((30, 30, 30), np.uint8)
    label[corner] = 1
    patches = PatchSettings(patch_size=(8, 8, 8), augment=augment)
    drawn = [draw_batch([case_of(label)], patches, seed=0, iteration=i)[1] for i in range(100)]
    assert all(label[1].any() for label in drawn)
    assert not all(label[0].any() for label in drawn)  # the other one lies anywhere


def test_rare_classes_are_forced_as_often_as_large_ones():
    label = np.ones((16, 16, 16), np.uint8)
    label[3, 3, 3] = 2
    patches = PatchSettings(patch_size=(3, 3, 3), augment=None, oversample=1.0, batch_size=1)
    held = [bool((draw_batch([case_of(label)], patches, seed=0, iteration=i)[1] == 2).any()) for i in range(400)]
    # A fair coin over 400 draws has a standard deviation of 2.5 %; this is four of them.
    assert 0.4 < np.mean(held) < 0.6


def test_a_case_without_foreground_still_gives_patches():
    empty = case_of(np.zeros((9, 9, 9)), name="empty")
    image, label = draw_batch([empty], PatchSettings(patch_size=(4, 4, 4), oversample=1.0), seed=0, iteration=0)
    assert image.shape == (2, 1, 4, 4, 4)
    assert not label.any()


def test_patches_reach_every_voxel():
    label = np.arange(6 * 5 * 4).reshape(6, 5, 4) + 1
    patches = PatchSettings(patch_size=(3, 3, 3), augment=None, oversample=0.0)
    seen = [draw_batch([case_of(label)], patches, seed=0, iteration=i)[1].unique() for i in range(200)]
    assert torch.cat(seen).unique().tolist() == list(range(1, 121))


def test_small_cases_are_padded_in_the_middle():
    label = np.ones((2, 3, 6), np.uint8)
    image, drawn = draw_batch([case_of(label)], PatchSettings(patch_size=(4, 4, 4), augment=None), seed=0, iteration=0)
    expected = torch.zeros(4, 4, 4)
    expected[1:3, 0:3] = 1  # 1 + 1 slices of padding, 0 + 1 rows, and W is cropped
    for i in range(2):
        assert torch.equal(drawn[i, 0].float(), expected)
        assert torch.equal(image[i, 0], expected)


@examples(20, 60)
@example(shape=(1, 1, 2), size=(1, 1, 1), channels=1, augment=Augmentation(), iteration=0)  # gamma of a single voxel
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    size=st.tuples(*[st.integers(1, 12)] * 3),
    channels=st.integers(1, 3),
    augment=st.sampled_from([None, Augmentation(), ALWAYS]),
    iteration=st.integers(0, 10_000),
)
def test_any_case_fits_any_patch(shape, size, channels, augment, iteration):
    rng = np.random.default_rng(iteration)
    label = rng.integers(0, 4, shape).astype(np.uint8)
    case = case_of(label, image=rng.normal(size=(channels, *shape)))
    patches = PatchSettings(patch_size=size, augment=augment)
    image, drawn = draw_batch([case], patches, seed=1, iteration=iteration)
    assert image.shape == (2, channels, *size)
    assert torch.isfinite(image).all()
    assert set(drawn.unique().tolist()) <= {0, *np.unique(label).tolist()}
    if label.any():
        assert drawn[1].any()
    if not augment:  # every voxel of the patch is a voxel of the case or padding
        inside = np.prod(np.minimum(shape, size))
        assert (image[0, 0] != 0).sum() == inside


def test_mirroring_happens_along_the_named_axes_only():
    ramp = np.broadcast_to(np.arange(6)[:, None, None], (6, 6, 6))
    for axis in range(3):
        case = case_of(np.moveaxis(ramp, 0, axis) + 1)
        patches = PatchSettings(patch_size=(6, 6, 6), mirror=(0,))
        plain = torch.from_numpy(np.ascontiguousarray(case.label)).long()
        drawn = [draw_batch([case], patches, seed=0, iteration=i)[1] for i in range(40)]
        flips = sum(torch.equal(label[0, 0], plain.flip(axis)) for label in drawn)
        assert (flips > 5) == (axis == 0)
        assert sum(torch.equal(label[0, 0], plain) for label in drawn) > 5


@examples(15, 40)
@given(
    batch_size=st.integers(1, 6),
    num_ranks=st.integers(1, 6),
    oversample=st.sampled_from([0.0, 0.33, 1.0]),
    iteration=st.integers(0, 1000),
)
def test_the_ranks_together_draw_the_batch_of_one(batch_size, num_ranks, oversample, iteration):
    label = np.zeros((7, 7, 7), np.uint8)
    label[1, 2, 3] = 1
    case = case_of(label, image=np.random.default_rng(0).normal(size=(1, 7, 7, 7)))
    patches = PatchSettings(patch_size=(4, 4, 4), batch_size=batch_size, oversample=oversample)
    drawing = {"seed": 5, "iteration": iteration}
    if batch_size % num_ranks:  # with unequal shares, the mean over ranks would not be that over patches
        with pytest.raises(SettingError, match=r"ranks of a batch: expected .* evenly"):
            draw_batch([case], patches, **drawing, ranks=(0, num_ranks))
        return
    whole = draw_batch([case], patches, **drawing)
    for rank in range(num_ranks):
        share = draw_batch([case], patches, **drawing, ranks=(rank, num_ranks))
        for part, all_of_them in zip(share, whole, strict=True):
            assert torch.equal(part, all_of_them[rank::num_ranks])


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(SettingError, match="ranks of a batch"):
        draw_batch(
            [case_of(np.ones((3, 3, 3)))], PatchSettings(patch_size=(2, 2, 2)), seed=0, iteration=0, ranks=(2, 2)
        )


def test_a_batch_does_not_depend_on_the_number_of_threads(cases):
    patches = PatchSettings(patch_size=(32, 40, 40), augment=ALWAYS)
    drawn = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            drawn[threads] = draw_batch(cases, patches, seed=0, iteration=0)
            assert torch.get_num_threads() == threads  # put back
        finally:
            torch.set_num_threads(1)
    assert torch.equal(drawn[1][0], drawn[3][0])
    assert torch.equal(drawn[1][1], drawn[3][1])


@pytest.mark.filterwarnings("error")  # torch warns of tensors that share read-only memory
def test_memory_mapped_cases_give_the_same_batches_and_stay_as_they_are(cases, tmp_path):
    mapped = []
    for case in cases:
        for part in ("image", "label"):
            np.save(tmp_path / f"{case.name}-{part}.npy", getattr(case, part))
        image, label = (np.load(tmp_path / f"{case.name}-{part}.npy", mmap_mode="r") for part in ("image", "label"))
        mapped.append(Case(case.name, image, label, case.spacing))
    for augment in (None, ALWAYS):
        patches = PatchSettings(patch_size=(16, 24, 24), augment=augment)
        for i in range(3):
            ours, theirs = (draw_batch(c, patches, seed=0, iteration=i) for c in (mapped, cases))
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            ours[0].fill_(7.0)  # a copy, whatever the file allows


def test_the_plain_patches_are_those_of_the_cases():
    label = np.arange(27).reshape(3, 3, 3)
    patches = PatchSettings(patch_size=(3, 3, 3), augment=ALWAYS).plain()
    assert patches == PatchSettings(patch_size=(3, 3, 3), augment=None)
    image, drawn = draw_batch([case_of(label)], patches, seed=0, iteration=0)
    np.testing.assert_array_equal(drawn[0, 0], label)
    np.testing.assert_array_equal(image[0, 0], label)


def test_a_case_remembers_the_voxels_of_its_classes():
    label = np.zeros((40, 40, 40), np.uint8)
    label[:20] = 4  # 32,000 voxels
    label[30, 2, 3:6] = 1
    case = case_of(label)
    voxels = case.class_voxels
    assert list(voxels) == [1, 4]
    assert voxels[1].tolist() == [30 * 1600 + 2 * 40 + x for x in (3, 4, 5)]
    assert len(voxels[4]) == len(set(voxels[4].tolist())) == MAX_VOXELS
    assert (label.ravel()[voxels[4]] == 4).all()
    # Drawn from all of them: the mean of 10,000 uniform draws without repetition from 0..31,999, whose standard
    # deviation is 32000 / sqrt(12 * 10000) = 92; this is four of them.
    assert voxels[4].mean() == pytest.approx(15999.5, abs=370)
    assert case.class_voxels is voxels  # scanned once
    again = case_of(label.copy()).class_voxels
    assert all((again[c] == voxels[c]).all() for c in voxels)
    assert case_of(np.zeros((2, 2, 2))).class_voxels == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"patch_size": (0, 8, 8)},
        {"patch_size": (8, 8)},
        {"batch_size": 0},
        {"oversample": 1.5},
        {"oversample": -0.1},
        {"mirror": (3,)},
        {"augment": True},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} of PatchSettings: expected"):
        replace(PatchSettings(patch_size=(8, 8, 8)), **wrong)


def test_no_cases_are_refused():
    with pytest.raises(DataError, match="cases of a batch"):
        draw_batch([], PatchSettings(patch_size=(8, 8, 8)), seed=0, iteration=0)


# ---- normalisation

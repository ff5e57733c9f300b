"""Windows, mirrors and folds: what is averaged, and that the networks are left as they were."""

import weakref
from contextlib import closing
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference
from strategies import examples
from torch import nn
from torch.nn import functional

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization, RangeNormalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.inference import sliding_window as inference
from dstlib.zoo.e2enet.inference.empty import TOLERANCE, empty_ranges, without_empty
from dstlib.zoo.e2enet.inference.sliding_window import memory_needed, num_passes, predicting, windows_of


class ReadsTheImage(nn.Module):
    """A network that has learned its task: its image holds the label, and every logit says so."""

    def __init__(self, num_classes, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.num_classes = num_classes
        self.deep_supervision = True

    def forward(self, x):
        logits = self.scale * functional.one_hot(x[:, 0].long(), self.num_classes).movedim(-1, 1).float()
        return (logits, logits) if self.deep_supervision else logits


class Convolves(nn.Module):
    """Sees one neighbour on one side of each axis, so that a flip makes a difference."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 1, 2, 2, 2, generator=generator))
        self.deep_supervision = False

    def forward(self, x):
        return functional.conv3d(functional.pad(x, (1, 0, 1, 0, 1, 0)), self.weight)


def probabilities(models, image_CDHW, *, patch_size, overlap=0.5, **settings):
    """All slices as one volume (K, D, H, W)."""
    windows = windows_of(image_CDHW.shape[1:], patch_size, overlap=overlap)
    return volume(models, image_CDHW, windows, **settings)


def volume(models, image_CDHW, windows, **settings):
    return np.stack([*inference.probabilities(models, image_CDHW, windows, **settings)], axis=1 + windows.axis)


def labels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)


@given(st.tuples(*[st.integers(1, 12)] * 3), st.sampled_from([(), (1,), (0, 1, 2)]))
@examples(10, 25)
def test_windows_cover_a_volume_of_any_size(shape, mirror):
    label = labels(shape)
    image = label[None].astype(np.float32)
    found = probabilities([ReadsTheImage(3, 5.0)], image, patch_size=(4, 6, 8), mirror=mirror)
    assert found.shape == (3, *shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=0), 1.0, atol=1e-5)  # float32, divided by the sum of the weights
    np.testing.assert_array_equal(found.argmax(axis=0), label)


# Two folds, one voxel: softmax of (2, 0) and of (0, 1), their mean. Logits averaged first would give (1, 0.5).
def test_folds_are_averaged_as_probabilities_by_hand():
    image = np.zeros((1, 1, 1, 1), np.float32)
    found = probabilities([Says(2.0, 0.0), Says(0.0, 1.0)], image, patch_size=(1, 1, 1), mirror=())
    expected = (1 / (1 + np.exp(-2)) + 1 / (1 + np.exp(1))) / 2
    np.testing.assert_allclose(found.ravel(), [expected, 1 - expected], rtol=1e-6)  # float32


@pytest.mark.parametrize("mirror", [(0,), (0, 2), (0, 1, 2)])
def test_mirrors_are_the_mean_over_all_subsets_of_the_axes(mirror):
    model, image = Convolves(), np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    expected = np.zeros((3, 4, 5, 6))
    subsets = [axes for n in range(len(mirror) + 1) for axes in combinations(mirror, n)]
    assert len(subsets) == 2 ** len(mirror)
    for axes in subsets:
        spatial = [1 + axis for axis in axes]
        with torch.no_grad():
            softmax = model(torch.from_numpy(np.flip(image, spatial).copy())[None])[0].softmax(0).numpy()
        expected += np.flip(softmax, spatial) / len(subsets)
    found = probabilities([model], image, patch_size=(4, 5, 6), mirror=mirror)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32


def test_the_mean_of_folds_is_the_mean_of_their_predictions():
    image = np.random.default_rng(0).normal(size=(1, 9, 8, 7)).astype(np.float32)
    models = [Convolves(seed) for seed in range(3)]
    each = [probabilities([model], image, patch_size=(4, 4, 4)) for model in models]
    found = probabilities(models, image, patch_size=(4, 4, 4))
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)  # float32


# Patch 8, an image of 12 along W: windows at 0 and 4. A network that knows where in the window it is shows the
# weights, exp(-(i - 3.5)² / 2σ²) with σ = 8/8 = 1, of both windows.
def test_overlapping_windows_are_weighed_by_a_gaussian_of_an_eighth_of_the_patch():
    class KnowsTheColumn(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(1.0))
            self.deep_supervision = False

        def forward(self, x):
            ramp = self.slope * torch.linspace(-2, 2, x.shape[-1]).expand(len(x), 1, *x.shape[2:])
            return torch.cat([torch.zeros_like(ramp), ramp], dim=1)

    found = probabilities([KnowsTheColumn()], np.zeros((1, 8, 8, 12), np.float32), patch_size=(8, 8, 8), mirror=())
    weight = np.exp(-((np.arange(8) - 3.5) ** 2) / 2)
    value = 1 / (1 + np.exp(-np.linspace(-2, 2, 8)))
    columns, weights = np.zeros(12), np.zeros(12)
    for start in (0, 4):
        columns[start : start + 8] += weight * value
        weights[start : start + 8] += weight
    # MONAI lifts the smallest weights off 0 and integrates the Gaussian over each voxel: about a hundredth
    np.testing.assert_allclose(found[1, 4, 4], columns / weights, atol=0.02)


def test_the_models_are_left_as_they_were():
    model, other = ReadsTheImage(3).train(), ReadsTheImage(3).eval()
    other.deep_supervision = False
    probabilities([model, other], np.zeros((1, 4, 4, 4), np.float32), patch_size=(4, 4, 4))
    assert (model.training, model.deep_supervision) == (True, True)
    assert (other.training, other.deep_supervision) == (False, False)


def test_the_models_are_left_as_they_were_by_an_error_too():
    model = ReadsTheImage(3).train()
    with pytest.raises(RuntimeError, match="smaller than num_classes"), predicting(model):
        model(torch.full((1, 1, 2, 2, 2), 7.0))
    assert (model.training, model.deep_supervision) == (True, True)


def test_a_read_only_image_is_read():
    image = np.zeros((1, 4, 4, 4), np.float32)
    image.flags.writeable = False  # as a memory-mapped one
    assert probabilities([Convolves()], image, patch_size=(4, 4, 4)).shape == (3, 4, 4, 4)


# Slices that are given away one by one are those of the volume that was gathered whole, to the last bit.
@given(
    st.tuples(*[st.integers(1, 14)] * 3),
    st.tuples(*[st.integers(1, 8)] * 3),
    st.floats(0, 0.9),
    st.sampled_from([(), (2,), (0, 1)]),
    st.integers(0, 2**16),
)
@examples(20, 60)
def test_slices_are_those_of_monais_sliding_window(shape, patch, overlap, mirror, seed):
    image = np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32)
    model, flips = Convolves(seed), inference._flips(mirror)
    windows = windows_of(shape, patch, overlap=overlap)
    there, back = (2, 2 + windows.axis), (2 + windows.axis, 2)  # the axis that it goes along is MONAI's first

    def mean_softmax(windows):
        windows = windows.movedim(*there)
        found = sum(model(windows.flip(axes)).softmax(dim=1).flip(axes) for axes in flips) / len(flips)
        return found.movedim(*back)

    with torch.inference_mode():
        expected = sliding_window_inference(
            torch.from_numpy(image)[None].movedim(*back),
            roi_size=[patch[axis] for axis in windows.order],
            sw_batch_size=1,
            predictor=mean_softmax,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=inference.SIGMA,
        )
    found = volume([model], image, windows, mirror=mirror)
    np.testing.assert_array_equal(found, np.moveaxis(expected[0].numpy(), 1, 1 + windows.axis))


def test_a_slice_is_given_away_before_the_windows_above_it_are_read():
    model, image = Counts(), np.zeros((1, 32, 4, 4), np.float32)
    windows = windows_of((32, 4, 4), (4, 4, 4))
    with closing(inference.probabilities([model], image, windows, mirror=())) as slices:
        next(slices)
        assert model.num_windows == 2, "of 15"
        assert not model.training
    assert model.training, "closed half way"
    assert model.deep_supervision


class Counts(nn.Module):
    """Counts the windows that it is given."""

    def __init__(self):
        super().__init__()
        self.zero, self.deep_supervision, self.num_windows = nn.Parameter(torch.zeros(())), True, 0

    def forward(self, x):
        self.num_windows += len(x)
        return torch.cat([x, x], dim=1) + self.zero


def test_what_is_held_does_not_grow_with_the_depth_of_the_image():
    low, high = (windows_of((d, 512, 512), (64, 64, 64)) for d in (512, 6400))
    low, high = (memory_needed(windows, num_channels=1, num_outputs=16) for windows in (low, high))
    assert low == high
    assert low > 4 * 16 * 64 * 512 * 512


# ---- windows that are not read


class Answers(nn.Module):
    """Stands for a network that answers with one class where the window holds nothing: with logits of ±infinity."""

    def __init__(self, model, number):
        super().__init__()
        self.model, self.number, self.deep_supervision = model, number, False

    def forward(self, x):
        logits = self.model(x)
        if not x.any():
            logits[:] = -torch.inf
            logits[:, self.number] = 0.0
        return logits


def islands(shape, seed):
    """An image of a few boxes of noise amid zeros, some of them a voxel."""
    rng = np.random.default_rng(seed)
    image = np.zeros((1, *shape), np.float32)
    for _ in range(rng.integers(0, 4)):
        first = [rng.integers(0, n) for n in shape]
        box = tuple(slice(start, start + rng.integers(1, 4)) for start in first)
        image[0][box] = rng.normal(size=image[0][box].shape)
    return image


# A window that is skipped is one whose network says "background" without any doubt: bit for bit.
@given(
    st.tuples(*[st.integers(1, 16)] * 3),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.floats(0, 0.8),
    st.sampled_from([(), (0, 2)]),
    st.integers(0, 2**16),
)
@examples(20, 60)
def test_a_skipped_window_counts_as_one_that_was_found_to_be_background(shape, patch, overlap, mirror, seed):
    image, model = islands(shape, seed), Convolves(seed)
    windows = windows_of(shape, patch, overlap=overlap)
    skipped = without_empty(windows, image, [(0.0, 0.0)])
    assert skipped.is_empty == tuple(
        not image[0].transpose(windows.order)[windows.inside(p)].any() for p in windows.places
    )
    expected = volume([Answers(model, 0)], image, windows, mirror=mirror)
    found = volume([model], image, skipped, mirror=mirror, background=(1.0, 0.0, 0.0))
    np.testing.assert_array_equal(found, expected)


def test_a_voxel_of_skipped_windows_alone_is_background_and_others_are_blended_by_hand():
    """Patch 4 along W, an image of 8: windows at 0, 2 and 4, of which the first two hold nothing."""
    image = np.zeros((1, 4, 4, 8), np.float32)
    image[..., 7] = 1.0
    windows = without_empty(windows_of((4, 4, 8), (4, 4, 4)), image, [(0.0, 0.0)])
    assert (windows.axis, windows.is_empty, windows.num_read) == (2, (True, True, False), 1)
    model = Says(0.0, 1000.0)
    found = volume([model], image, windows, mirror=(), background=(1.0, 0.0))
    assert model.num_calls == 1
    np.testing.assert_array_equal(found[0, ..., :4], 1.0)
    np.testing.assert_array_equal(found[0, ..., 6:], 0.0)
    weight = compute_importance_map((4, 4, 4), mode="gaussian", sigma_scale=1 / 8)[2, 2].tolist()
    # columns 4 and 5 are the third and fourth of the second window, the first and second of the last
    blended = [weight[2] / (weight[2] + weight[0]), weight[3] / (weight[3] + weight[1])]
    np.testing.assert_allclose(found[0, 2, 2, 4:6], blended, rtol=1e-6)  # float32


def test_no_network_sees_a_scan_that_holds_nothing():
    image, model = np.full((1, 5, 6, 7), -2.0, np.float32), Says(0.0, 1.0)
    windows = without_empty(windows_of((5, 6, 7), (4, 4, 4)), image, [(-np.inf, -2.0)])
    for background in ((1.0, 0.0), (0.0, 0.0)):  # of classes, and of regions
        found = volume([model], image, windows, background=background)
        assert model.num_calls == 0
        for k, value in enumerate(background):
            np.testing.assert_array_equal(found[k], value)


class Says(nn.Module):
    """Answers the same everywhere, and counts how often."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits).reshape(1, 2, 1, 1, 1))
        self.deep_supervision, self.num_calls = False, 0

    def forward(self, x):
        self.num_calls += 1
        return self.logits.expand(len(x), 2, *x.shape[2:])


def test_a_window_with_anything_in_any_channel_is_read():
    image = np.zeros((2, 1, 1, 12), np.float32)
    image[0] = -5.0
    windows = windows_of((1, 1, 12), (1, 1, 4), overlap=0)
    ranges = [(-np.inf, -5.0), (-1.0, 1.0)]
    assert without_empty(windows, image, ranges).is_empty == (True, True, True)
    image[0, ..., 2], image[1, ..., 9] = -4.9, -1.1
    assert without_empty(windows, image, ranges).is_empty == (False, True, False)
    image[0, ..., 5] = np.nan
    assert without_empty(windows, image, ranges).is_empty == (False, False, False)
    small = windows_of((1, 1, 2), (1, 1, 4))  # padded, with what holds nothing
    assert without_empty(small, image[..., 3:5], ranges).is_empty == (True,)


def test_what_holds_nothing_by_the_preparation():
    ct, heads = CtNormalization(low=-100.0, high=200.0, mean=50.0, std=50.0), ZScoreNormalization(inside_mask=True)
    for rules, expected in (
        ((ct,), ((-np.inf, -3.0 + TOLERANCE),)),
        ((heads, ct), ((-TOLERANCE, TOLERANCE), (-np.inf, -3.0 + TOLERANCE))),
        ((ZScoreNormalization(),), None),
        ((ct, RangeNormalization(kind="nonorm")), None),
    ):
        assert empty_ranges(Preparation(spacing=None, normalization=rules)) == expected


# ---- tensors that are used again


class Gives(nn.Module):
    """Returns what is there, or in an order of its own."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.logits = kind, nn.Parameter(torch.arange(3.0 * 120).reshape(1, 3, 4, 5, 6) % 7)

    def forward(self, x):
        if self.kind == "its input":
            return x
        return self.logits if self.kind == "its parameter" else (self.logits * 1).mT.contiguous().mT


@pytest.mark.parametrize("kind", ["its parameter", "its input", "columns side by side"])
@pytest.mark.parametrize("mirror", [(), (0, 2)])
def test_what_was_there_before_is_not_written_to(kind, mirror):
    """Probabilities take the place of logits, but only of those that the network has made for this pass."""
    model, flips = Gives(kind), inference._flips(mirror)
    window, weight = torch.randn(1, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)), torch.ones(4, 5, 6)
    window_before, logits = window.clone(), model.logits.detach().clone()
    found = inference._Passes([model], flips, inference.softmax)(window, weight)
    seen = [window if kind == "its input" else logits.flip(axes) for axes in flips]
    expected = sum(each.softmax(dim=1) for each in seen) / len(flips)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-6)  # the order of four sums
    assert torch.equal(window, window_before)
    assert torch.equal(model.logits, logits)


class Watches(Convolves):
    """Looks at each pass whether what it made before is still held."""

    def __init__(self):
        super().__init__()
        self.made, self.num_held = [], []

    def forward(self, x):
        self.num_held.append(sum(made() is not None for made in self.made))
        logits = super().forward(x)
        self.made.append(weakref.ref(logits))
        return logits


@pytest.mark.parametrize(("mirror", "num_held"), [((), 0), ((0,), 1)])
def test_of_other_windows_nothing_is_held_while_a_network_works(mirror, num_held):
    """And of other mirrors, their mean alone."""
    model = Watches()
    probabilities([model], np.zeros((1, 12, 4, 4), np.float32), patch_size=(4, 4, 4), mirror=mirror)
    assert len(model.num_held) == 5 * 2 ** len(mirror)
    assert max(model.num_held) == num_held


def test_what_a_network_makes_is_written_to():
    """There is one tensor of the logits' size, not two."""
    made = []
    model = Convolves()
    model.register_forward_hook(lambda module, given, logits: made.append(logits.data_ptr()))
    found = inference._Passes([model], [()], inference.softmax)(torch.zeros(1, 1, 4, 5, 6), torch.ones(4, 5, 6))
    assert [found.data_ptr()] == made


def test_every_pass_is_told():
    told = []
    models, windows = [Convolves(0), Convolves(1)], windows_of((4, 4, 8), (4, 4, 4))
    volume(models, np.zeros((1, 4, 4, 8), np.float32), windows, mirror=(1,), on_pass=told.append)
    assert told == [4, 4, 4]  # two networks, two mirrors, three windows
    assert sum(told) == windows.num_read * num_passes(models, (1,))


@pytest.mark.parametrize(("shape", "axis"), [((4, 9, 9), 1), ((9, 4, 9), 0), ((9, 9, 4), 0), ((5, 6, 7), 2)])
def test_windows_go_along_the_axis_on_which_sums_are_the_smallest(shape, axis):
    windows = windows_of(shape, (4, 4, 4))
    assert windows.axis == axis
    needed = [memory_needed(replace(windows, axis=other), num_channels=1, num_outputs=3) for other in range(3)]
    assert min(needed) == needed[axis]


class SumsOnGpu:
    """Stands for sums on a GPU that has no room for windows beside them."""

    def __init__(self):
        self.device = torch.device("cuda", 0)

    def move(self, device):
        self.device = device


def test_sums_move_to_the_cpu_where_the_memory_of_the_gpu_is_out():
    sums, tried = SumsOnGpu(), []

    def work():
        tried.append(sums.device.type)
        if sums.device.type != "cpu":
            raise torch.OutOfMemoryError("no room")
        return torch.ones(1)

    with pytest.warns(RuntimeWarning, match="does not fit on cuda:0; its windows are gathered in the computer's mem"):
        assert inference._with_room(work, sums) == torch.ones(1)
    assert tried == ["cuda", "cpu"]

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        inference._with_room(_no_memory, sums)


def _no_memory():
    raise torch.OutOfMemoryError("no room")


def test_sums_are_made_after_memory_was_out_for_them(monkeypatch):
    sums = inference._Sums(torch.full((2, 2, 2), 2.0), (2, 2))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", lambda *sizes, **where: _no_memory())
        with pytest.raises(torch.OutOfMemoryError):
            sums.allocate(3)
    sums.allocate(3)
    sums.add((slice(0, 2),) * 3, torch.full((3, 2, 2, 2), 4.0))
    assert [values.unique().tolist() for _, values in sums.take(2)] == [[2.0], [2.0]]


def test_sums_that_move_half_way_change_nothing():
    patch, shape = (4, 4, 4), (9, 6, 5)
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    expected = probabilities([Convolves()], image, patch_size=patch)
    move = inference._Sums.move
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inference, "_with_room", lambda work, sums: (move(sums, torch.device("cpu")), work())[1])
        np.testing.assert_array_equal(probabilities([Convolves()], image, patch_size=patch), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_predicts_what_the_cpu_does():
    image = np.random.default_rng(0).normal(size=(1, 9, 8, 7)).astype(np.float32)
    expected = probabilities([Convolves()], image, patch_size=(4, 4, 4))
    found = probabilities([Convolves().cuda()], image, patch_size=(4, 4, 4))
    np.testing.assert_allclose(found, expected, atol=5e-3)  # float16


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_result_that_is_not_finite_is_refused(value):
    image = np.zeros((1, 4, 4, 4), np.float32)
    image[0, 2, 2, 2] = value
    with pytest.raises(DataError, match="probabilities of a prediction: expected finite numbers"):
        probabilities([Convolves()], image, patch_size=(4, 4, 4))


def test_an_image_without_a_channel_is_refused():
    windows = windows_of((4, 4, 4), (4, 4, 4))
    for shape in ((4, 4, 4), (1, 4, 4, 5)):
        with pytest.raises(DataError, match=r"expected \(C, 4, 4, 4\), got \(.*4.*\)"):
            inference.probabilities([Convolves()], np.zeros(shape, np.float32), windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models of a prediction"),
        ({"patch_size": (4, 4)}, "three positive sizes"),
        ({"patch_size": (4, 0, 4)}, "three positive sizes"),
        ({"overlap": 1.0}, r"a share in \[0, 1\), got 1\.0"),
        ({"mirror": (0, 3)}, "axes 0, 1, 2 at most once"),
        ({"mirror": (1, 1)}, "axes 0, 1, 2 at most once"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change, message):
    arguments = {"models": [Convolves()], "image_CDHW": np.zeros((1, 4, 4, 4), np.float32), "patch_size": (4, 4, 4)}

    def begin(*, models, image_CDHW, patch_size, overlap=0.5, mirror=()):
        inference.probabilities(models, image_CDHW, windows_of((4, 4, 4), patch_size, overlap=overlap), mirror=mirror)

    with pytest.raises(SettingError, match=message):  # at once, not with the first slice
        begin(**{**arguments, **change})

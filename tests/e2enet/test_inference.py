"""Windows, mirrors and folds: what is averaged, and that the networks are left as they were."""

from contextlib import closing
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from strategies import examples
from torch import nn
from torch.nn import functional

from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet.inference import sliding_window as inference
from dstlib.zoo.e2enet.inference.sliding_window import memory_needed, predicting


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


def probabilities(models, image_CDHW, **settings):
    """All slices as one volume (K, D, H, W)."""
    return np.stack([*inference.probabilities(models, image_CDHW, **settings)], axis=1)


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
    class Says(nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(logits).reshape(1, 2, 1, 1, 1))
            self.deep_supervision = False

        def forward(self, x):
            return self.logits.expand(len(x), 2, *x.shape[2:])

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

    def mean_softmax(windows):
        return sum(model(windows.flip(axes)).softmax(dim=1).flip(axes) for axes in flips) / len(flips)

    with torch.inference_mode():
        expected = sliding_window_inference(
            torch.from_numpy(image)[None],
            roi_size=patch,
            sw_batch_size=1,
            predictor=mean_softmax,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=inference.SIGMA,
        )
    found = probabilities([model], image, patch_size=patch, overlap=overlap, mirror=mirror)
    np.testing.assert_array_equal(found, expected[0].numpy())


def test_a_slice_is_given_away_before_the_windows_above_it_are_read():
    model, image = Counts(), np.zeros((1, 32, 4, 4), np.float32)
    with closing(inference.probabilities([model], image, patch_size=(4, 4, 4), mirror=())) as slices:
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
    low, high = (memory_needed((d, 512, 512), (64, 64, 64), num_channels=1, num_outputs=16) for d in (64, 6400))
    assert low == high
    assert low > 4 * 16 * 64 * 512 * 512


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


@pytest.mark.parametrize("fails", [1, 2])
def test_sums_are_made_whole_after_memory_was_out_for_one_of_them(fails, monkeypatch):
    zeros, calls = torch.zeros, []

    def full(*sizes, **where):
        calls.append(sizes)
        if len(calls) == fails:
            raise torch.OutOfMemoryError("no room")
        return zeros(*sizes, **where)

    monkeypatch.setattr(torch, "zeros", full)
    sums = inference._Sums((2, 2, 2), (2, 2, 2), torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        sums.allocate(3)
    sums.allocate(3)
    sums.add((slice(0, 2),) * 3, torch.full((3, 2, 2, 2), 4.0), torch.full((2, 2, 2), 2.0))
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
    with pytest.raises(DataError, match=r"expected \(C, D, H, W\), got \(4, 4, 4\)"):
        inference.probabilities([Convolves()], np.zeros((4, 4, 4), np.float32), patch_size=(4, 4, 4))


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
    with pytest.raises(SettingError, match=message):  # at once, not with the first slice
        inference.probabilities(**{**arguments, **change})

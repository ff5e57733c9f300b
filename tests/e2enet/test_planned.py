"""Networks of a prediction on the engine: the same numbers, the same names, and why not."""

import os
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import dstlib
from dstlib.errors import SettingError
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.inference import planned
from dstlib.zoo.e2enet.inference.planned import faster_of, on_plans
from dstlib.zoo.e2enet.inference.predict import Trained, _digest
from dstlib.zoo.e2enet.inference.sliding_window import predicting, probabilities, windows_of

CONFIG = E2ENetConfig(in_channels=2, num_classes=3, channels=(4, 6, 8), strides=((1, 2, 2), (2, 2, 2)), heads=2)


def network(seed=0, **changes):
    torch.manual_seed(seed)
    model = E2ENet(replace(CONFIG, **changes))
    dstlib.sparsify(model, sparsity=0.7, method="static", include=E2ENet.FUSION, total_steps=1)
    return model


def trained(*models):
    return Trained(
        models=models or (network(0), network(1)),
        preparation=Preparation(spacing=None, normalization=(CtNormalization(low=0, high=1, mean=0, std=1),) * 2),
        patch_size=(4, 8, 8),
        mirror=(0, 2),
        channels=("CT", "PET"),
        classes=("a", "b"),
    )


def test_plans_predict_what_the_networks_do_and_are_known_by_the_same_weights():
    plain = trained()
    fast = on_plans(plain)
    image = np.random.default_rng(0).normal(size=(2, 6, 12, 12)).astype(np.float32)
    windows = windows_of((6, 12, 12), (4, 8, 8))
    one, other = (np.stack([*probabilities(each.models, image, windows)]) for each in (plain, fast))
    np.testing.assert_allclose(one, other, atol=1e-5)  # float32: sums in another order
    for before, after in zip(plain.models, fast.models, strict=True):
        assert type(after) is E2ENet
        assert _digest(after) == _digest(before)
        assert before.deep_supervision
        assert before.training
        assert after.deep_supervision
        with torch.no_grad():
            assert isinstance(before(torch.randn(1, 2, 4, 8, 8)), tuple), "the network itself is as it was"


def test_the_engine_is_chosen_where_it_is_faster(monkeypatch):
    plain = trained()
    monkeypatch.setattr(planned, "_fastest", lambda *_: (3.0, 1.5))
    fast, told = faster_of(plain)
    assert fast is not plain
    assert told == "Computed on the engine, 2.0 times as fast as in torch on 32×32×32 voxels."
    monkeypatch.setattr(planned, "_fastest", lambda *_: (1.5, 3.0))
    slow, told = faster_of(plain)
    assert slow is plain
    assert told == "Computed in torch, where 32×32×32 voxels take 0.50 times as long as on the engine."


def test_the_fastest_of_three_counts():
    class Clock(nn.Module):
        def __init__(self, *seconds):
            super().__init__()
            self.deep_supervision, self.left = False, list(seconds)

        def forward(self, x):
            now[0] += self.left.pop(0)

    now = [0.0]
    with mock.patch.object(planned, "perf_counter", side_effect=lambda: now[0]):
        assert planned._fastest(Clock(5, 1, 9), Clock(4, 8, 2), torch.zeros(1)) == (1, 2)


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ((network(), network(kernel_size=(3, 3, 3), shift=None)), "a convolution with the kernel (3, 3, 3)"),
        ((nn.Sequential(nn.Conv3d(2, 3, 1)),), "expected E2ENet, got Sequential"),
    ],
)
def test_what_is_no_plan_is_computed_in_torch_and_says_why(models, told):
    plain = trained(*models)
    same, reason = faster_of(plain)
    assert same is plain
    assert reason.startswith("Computed in torch: ")
    assert told in reason
    with pytest.raises(SettingError):
        on_plans(plain)


def test_torch_can_be_asked_for():
    plain = trained()
    with mock.patch.dict(os.environ, {"DSTLIB_ENGINE": "torch"}):
        same, told = faster_of(plain)
    assert same is plain
    assert told == "Computed in torch, as DSTLIB_ENGINE says."


@pytest.mark.parametrize(
    ("strides", "extents"),
    [
        (((2, 2, 2),) * 5, (64, 32, 32)),  # the paper's: 32³ would leave one voxel
        (((1, 2, 2), *((2, 2, 2),) * 4), (32, 32, 32)),
        (((1, 3, 3), (2, 2, 2)), (32, 30, 30)),
        (((4, 4, 4), (4, 4, 4), (4, 4, 4)), (128, 64, 64)),
    ],
)
def test_networks_are_timed_on_the_smallest_image_that_they_take(strides, extents):
    channels = (1, *(2 for _ in strides))
    model = E2ENet(E2ENetConfig(in_channels=1, num_classes=2, channels=channels, strides=strides, heads=1))
    assert planned._extents(model) == extents
    with torch.device("meta"):
        image = torch.empty(1, 1, *extents)
    with predicting(model.to("meta")):
        assert model(image).shape == (1, 2, *extents)

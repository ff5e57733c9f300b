"""2:4 linear layers: which are taken, which are refused by name, and on a GPU what they compute."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_mask, seeds
from torch import nn

import dstlib
from dstlib.errors import SelectionError
from dstlib.export import semi_structured
from dstlib.export.semi_structured import is_two_of_four, to_semi_structured
from dstlib.masking import NM

has_sparse_cores = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def trained() -> nn.Module:
    """Two layers of 2:4 zeros and a dense head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    dstlib.sparsify(model, sparsity=0.5, method="srste", total_steps=1000, exclude=["4"]).detach()
    return model


@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_two_of_four_is_what_the_granularity_says(seed, outputs, groups):
    shape = torch.Size((outputs, 4 * groups))
    weight = torch.randn(shape) * random_mask(NM(2, 4), shape, seed, 0.5)
    most = NM(2, 4).fold(weight != 0).sum(dim=1).max()
    assert is_two_of_four(weight) == (most <= 2)
    assert not is_two_of_four(torch.zeros(outputs, 4 * groups + 2))


def test_each_layer_in_the_way_is_named_and_none_is_changed():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SelectionError, match="0 is on the cpu; 2 is on the cpu"):
        to_semi_structured(model)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_no_such_layer_is_an_error():
    with pytest.raises(SelectionError, match="none, among 0, 1"):
        to_semi_structured(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with pytest.raises(SelectionError, match=r"no nn\.Linear at all"):
        to_semi_structured(nn.Sequential(nn.ReLU()))


def test_a_shared_weight_is_refused():
    layer = nn.Linear(64, 64)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer, nn.Linear(64, 64))
    model[1].weight = layer.weight
    with pytest.raises(SelectionError, match="0 shares its weight; 1 shares its weight"):
        to_semi_structured(model)


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "reason"),
    [
        ((7, 5), torch.float16, (64, 64), "is on a GPU of capability 7.5"),
        ((8, 0), torch.float32, (64, 64), "is of float32"),
        ((9, 0), torch.float16, (48, 64), "has shape (48, 64)"),
        ((9, 0), torch.float16, (64, 32), "has shape (64, 32)"),
        ((8, 0), torch.bfloat16, (32, 128), ""),
    ],
)
def test_what_a_gpu_asks_for(monkeypatch, capability, dtype, shape, reason):
    class OnGpu:  # what the check looks at of a weight
        device = torch.device("cuda", 0)

    weight = OnGpu()
    weight.dtype, weight.shape = dtype, torch.Size(shape)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert semi_structured._reason(weight, 1) == reason


@pytest.mark.skipif(not has_sparse_cores, reason="needs an Nvidia GPU of capability 8.0 or more")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_a_converted_model_computes_the_same(dtype):
    model = trained().to("cuda", dtype)
    x = torch.randn(64, 128, device="cuda", dtype=dtype)
    with torch.inference_mode():
        expected = model(x)
        assert to_semi_structured(model) == ("0", "2")
        # the same products summed in another order, in float32, then rounded: some units in the last place
        torch.testing.assert_close(model(x), expected, rtol=8 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)

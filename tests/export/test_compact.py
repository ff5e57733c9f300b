"""Compact files: every bit comes back, they are as small as they should be, and nothing damaged is believed."""

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch as package
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Small
from strategies import folds, generator, random_mask, seeds
from torch import nn

import dstlib
from dstlib.errors import StateError
from dstlib.export.compact import _TYPES, load_compact, load_masks, save_compact
from dstlib.zoo.e2enet import AMOS, E2ENet

TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint16, torch.complex64, torch.bool)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> None:
    assert list(theirs) == list(ours)
    for name, x in ours.items():
        assert theirs[name].shape == x.shape, name
        assert theirs[name].dtype == x.dtype, name
        assert torch.equal(bits(theirs[name]), bits(x)), name


def zeroed(mask: torch.Tensor) -> torch.Tensor:
    """Random where the mask is True, +0.0 elsewhere; a product with the mask would be -0.0 there, half the time."""
    return torch.randn(mask.shape).masked_fill(~mask, 0.0)


def sparse_small() -> tuple[nn.Module, dstlib.Sparsifier]:
    torch.manual_seed(0)
    model = nn.Sequential(Small(), nn.BatchNorm1d(3), nn.Linear(3, 200), nn.Linear(200, 100))
    return model, dstlib.sparsify(model, sparsity=0.9, method="set", total_steps=1000)


class Masks:
    """What a sparsifier shows to those who only want its masks."""

    def __init__(self, **masks: torch.Tensor) -> None:
        self.masks = masks


class Holder(nn.Module):
    """One buffer."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)


@given(folds(), seeds, st.floats(0, 1), st.sampled_from(TYPES), st.booleans())
def test_every_bit_comes_back(tmp_path_factory, fold, seed, density, dtype, repeated):
    granularity, shape = fold
    mask = random_mask(granularity, shape, seed, density)
    if repeated:  # large enough for the sparse forms to pay
        mask = mask.repeat(8, 8, *[1] * (mask.ndim - 2))
    size = (mask.numel(), torch.empty(0, dtype=dtype).element_size())
    raw = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator(seed))
    if dtype == torch.bool:
        raw %= 2
    model = Holder((raw * mask.reshape(-1, 1)).view(dtype).reshape(mask.shape))
    path = tmp_path_factory.mktemp("compact") / "x.safetensors"
    for sparsifier in (None, Masks(x=mask)):
        save_compact(model, path, sparsifier=sparsifier)
        assert_same_bits(load_compact(path), model.state_dict())
        masks = load_masks(path)
        assert masks.keys() == ({"x"} if sparsifier else set())
        assert all(torch.equal(masks[name], mask) for name in masks)


def test_a_model_and_its_masks_come_back(tmp_path):
    model, sparsifier = sparse_small()
    with torch.no_grad():
        active = sparsifier.masks["3.weight"].nonzero()[0].tolist()
        model[3].weight[tuple(active)] = 0.0  # an active weight that happens to be zero
    save_compact(model, tmp_path / "m", sparsifier=sparsifier)
    other = copy.deepcopy(model)
    for x in other.state_dict().values():
        x.fill_(7)
    load_compact(tmp_path / "m", other)
    assert_same_bits(dict(other.state_dict()), dict(model.state_dict()))
    masks = load_masks(tmp_path / "m")
    assert masks.keys() == sparsifier.masks.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in sparsifier.masks.items())


def test_negative_zero_and_nan_are_no_empty_room(tmp_path):
    x = torch.zeros(64, 64)
    x[3, 5], x[9, 2] = -0.0, float("nan")
    save_compact(Holder(x), tmp_path / "m")
    assert_same_bits(load_compact(tmp_path / "m"), {"x": x})
    assert (tmp_path / "m").stat().st_size < 1000


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    model[1].weight = model[0].weight
    save_compact(model, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1.2 * 50 * 50 * 4
    other = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    state = load_compact(tmp_path / "m", other)
    assert state["0.weight"] is state["1.weight"]
    assert_same_bits(dict(other.state_dict()), dict(model.state_dict()))


def test_wrappers_do_not_show(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    wrapped = torch.optim.swa_utils.AveragedModel(model)
    save_compact(wrapped, tmp_path / "m")
    assert_same_bits(load_compact(tmp_path / "m", model), dict(model.state_dict()))


@pytest.mark.parametrize(("density", "most"), [(0.5, 0.54), (0.1, 0.14), (0.01, 0.022)])
def test_a_matrix_takes_its_active_weights_and_a_bit_each_or_an_index(tmp_path, density, most):
    torch.manual_seed(0)
    save_compact(Holder(zeroed(torch.rand(300, 300) < density)), tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < most * 300 * 300 * 4 + 400


def test_whole_kernels_and_rows_take_a_bit_each(tmp_path):
    weight = zeroed((torch.rand(40, 40, 1, 1) < 0.1).expand(40, 40, 3, 3))
    kernels = weight.flatten(2).any(-1).sum().item()
    save_compact(Holder(weight), tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= kernels * 36 + 200 + 500
    save_compact(Holder(zeroed((torch.arange(400) < 40)[:, None].expand(400, 100))), tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= 40 * 100 * 4 + 50 + 500


@pytest.mark.parametrize("sparsity", [0.9])
def test_e2enet_takes_a_third(tmp_path, sparsity):
    network = E2ENet(AMOS)
    sparsifier = dstlib.sparsify(network, sparsity=sparsity, method="static", include=E2ENet.FUSION)
    package.save_file(network.state_dict(), tmp_path / "dense")
    save_compact(network, tmp_path / "compact", sparsifier=sparsifier)
    assert (tmp_path / "compact").stat().st_size <= 0.36 * (tmp_path / "dense").stat().st_size
    assert_same_bits(load_compact(tmp_path / "compact"), dict(network.state_dict()))


class Kept(nn.Module):
    """What the first build that wrote compact files has put into the one that is kept beside this test."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.zeros(8, 6, 3, 3, dtype=torch.bool)
        self.mask[0, 1] = self.mask[2, 4] = self.mask[5, 0] = True
        self.weight = nn.Parameter(torch.arange(8 * 6 * 9.0).reshape(8, 6, 3, 3).masked_fill(~self.mask, 0.0))
        self.twin = self.weight
        self.bias = nn.Parameter(torch.arange(8.0))
        self.register_buffer("scale", torch.tensor([1.5, -2.0], dtype=torch.bfloat16))
        self.register_buffer("steps", torch.tensor(7))


def test_files_of_earlier_builds_load_and_are_written_byte_for_byte(tmp_path):
    kept, model = Path(__file__).with_name("compact_1.safetensors"), Kept()
    assert_same_bits(load_compact(kept), model.state_dict())
    assert torch.equal(load_masks(kept)["weight"], model.mask)
    save_compact(model, tmp_path / "m", sparsifier=Masks(weight=model.mask))
    assert (tmp_path / "m").read_bytes() == kept.read_bytes()


def test_all_types_are_those_of_the_safetensors_package(tmp_path):
    model = nn.Module()
    tensors = {f"b{i}": torch.arange(12).reshape(3, 4).to(dtype) for i, dtype in enumerate(_TYPES)}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.zeros(0, 3), 'é"': torch.ones(5)}
    for name, x in tensors.items():
        model.register_buffer(name, x)
    save_compact(model, tmp_path / "m")
    assert_same_bits(load_compact(tmp_path / "m"), tensors)
    read = package.load_file(tmp_path / "m")
    assert_same_bits({name: read[f"values/{name}"] for name in tensors}, tensors)


def test_views_are_written_in_order_and_may_share_memory(tmp_path):
    x, model = torch.arange(12.0).reshape(3, 4).t(), nn.Module()
    for name, view in {"x": x, "row": x[0], "conj": torch.tensor([1 + 2j]).conj()}.items():
        model.register_buffer(name, view)
    save_compact(model, tmp_path / "m")
    read = load_compact(tmp_path / "m")
    assert torch.equal(read["x"], x)
    assert torch.equal(read["row"], x[0])
    assert read["conj"].item() == 1 - 2j


def test_no_damage_goes_unnoticed(tmp_path):
    torch.manual_seed(0)
    save_compact(Holder(zeroed(torch.rand(20, 20) < 0.2)), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    damaged = tmp_path / "damaged"
    for place in range(len(whole)):
        for flip in (1, 128):
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            with pytest.raises(StateError):
                load_compact(damaged)
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(StateError):
            load_compact(damaged)
    damaged.write_bytes(whole + b"\0")
    with pytest.raises(StateError):
        load_compact(damaged)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m"
    with pytest.raises(StateError, match="No such file"):
        load_compact(path)
    torch.save({"x": torch.ones(3)}, path)
    with pytest.raises(StateError, match="whole safetensors file"):
        load_compact(path)
    package.save_file({"x": torch.ones(3)}, path)
    with pytest.raises(StateError, match="another kind"):
        load_compact(path)
    described = json.dumps({"format": "dstlib.compact/9", "entries": "", "checksum": 0})
    package.save_file({}, path, {"dstlib": described})
    with pytest.raises(StateError, match="compact/9"):
        load_compact(path)


@pytest.mark.parametrize(
    "other",
    [nn.Linear(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(3, 4).double(), nn.Sequential(nn.Linear(3, 4))],
    ids=["shape", "names", "type", "prefix"],
)
def test_another_model_is_refused_unchanged(tmp_path, other):
    save_compact(nn.Linear(3, 4), tmp_path / "m")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match="Build the model as it was"):
        load_compact(tmp_path / "m", other)
    assert_same_bits(dict(other.state_dict()), dict(before))


def test_weights_outside_the_masks_are_refused(tmp_path):
    model, sparsifier = sparse_small()
    num_outside = int((~sparsifier.masks["3.weight"]).sum())
    with torch.no_grad():
        model[3].weight.fill_(1.0)
    with pytest.raises(StateError, match=rf"got {num_outside:,} that are not zero, in 3\.weight\..*load_state_dict"):
        save_compact(model, tmp_path / "m", sparsifier=sparsifier)
    with torch.no_grad():
        model[3].weight.mul_(sparsifier.masks["3.weight"]).neg_()
    with pytest.raises(StateError, match=r"3\.weight .*expected \+0\.0 outside its mask, got -0\.0\. weight \+= 0\.0"):
        save_compact(model, tmp_path / "m", sparsifier=sparsifier)
    with torch.no_grad():
        model[3].weight.add_(0.0)
    save_compact(model, tmp_path / "m", sparsifier=sparsifier)
    assert_same_bits(load_compact(tmp_path / "m"), dict(model.state_dict()))
    with pytest.raises(StateError, match="sparsifier of this model"):
        save_compact(nn.Linear(3, 3), tmp_path / "other", sparsifier=sparsifier)
    narrow = nn.Sequential(*model[:3], nn.Linear(3, 3))
    with pytest.raises(StateError, match=r"3\.weight of save_compact\(\): expected the shape of its mask"):
        save_compact(narrow, tmp_path / "other", sparsifier=sparsifier)
    assert not (tmp_path / "other").exists()


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Talkative(nn.Module):
        def get_extra_state(self):
            return "words"

    with pytest.raises(StateError, match="extra state"):
        save_compact(Talkative(), tmp_path / "m")
    with pytest.raises(StateError, match="tensor x"):
        save_compact(Holder(torch.eye(3).to_sparse()), tmp_path / "m")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    old = nn.Linear(3, 4)
    save_compact(old, tmp_path / "m")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StateError, match="No space left"):
        save_compact(nn.Linear(3, 4), tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
    assert_same_bits(load_compact(tmp_path / "m"), dict(old.state_dict()))

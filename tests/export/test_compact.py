"""Compact files: every bit comes back, they are as small as they should be, and nothing damaged is believed."""

import copy
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as package
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Small
from strategies import folds, generator, random_mask, seeds
from torch import nn

import dstlib
from dstlib.errors import StateError
from dstlib.export.compact import _TYPES, FORMAT, _checksum, load_compact, load_masks, save_compact
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
    tensors |= {"crc32": torch.zeros(2), "__metadata__": torch.ones(2)}
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


# ---- files that nobody has written, with checksums that hold


def crafted(path: Path, entries: object, stored: dict[str, torch.Tensor], *, text: str | None = None) -> Path:
    text = json.dumps(entries) if text is None else text
    described = json.dumps({"format": FORMAT, "entries": text, "checksum": _checksum(text, stored)})
    package.save_file(stored, path, {"dstlib": described})
    return path


def units(values: torch.Tensor, pattern: torch.Tensor, **changed: object) -> tuple[object, dict[str, torch.Tensor]]:
    entry = {"shape": [4, 4], "axes": 2, "is_mask": True, **changed}
    return {"w": entry}, {"values/w": values, "pattern/w": pattern}


def indices(*which: int) -> torch.Tensor:
    return torch.tensor(which, dtype=torch.int32)


def bytes_of(*which: int) -> torch.Tensor:
    return torch.tensor(which, dtype=torch.uint8)


VALUES = torch.tensor([[1.0], [2.0]])


def test_a_crafted_file_that_fits_is_read(tmp_path):
    for pattern in (indices(1, 3), indices(1, 3).long(), bytes_of(0b1010, 0)):
        path = crafted(tmp_path / "m", *units(VALUES, pattern))
        assert load_compact(path)["w"].flatten().tolist() == [0, 1, 0, 2, *[0] * 12]
        assert load_masks(path)["w"].flatten().nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (units(VALUES, indices(1, 99)), "indices beyond its 16 units"),
        (units(VALUES, indices(-1, 3)), "indices beyond its 16 units"),
        (units(VALUES, indices(3, 0)), "indices out of order"),
        (units(VALUES, indices(3, 3)), "indices out of order"),
        (units(torch.zeros(5, 1), indices(1, 2)), "5 values for 2 active units"),
        (units(VALUES, bytes_of(1, 0)), "2 values for 1 active units"),
        (units(VALUES, bytes_of(3)), "1 bytes of bits for 16 units"),
        (units(VALUES, bytes_of(3, 0, 0)), "3 bytes of bits for 16 units"),
        (units(torch.zeros(2, 1), bytes_of(0x81), shape=[1, 7]), "bits beyond its 7 units"),
        (units(VALUES, indices(1, 3).float()), "a pattern of torch.float32"),
        (units(VALUES, indices(1, 3)[None]), "a pattern \\(1, 2\\)"),
        (units(VALUES.flatten(), indices(1, 3)), "values \\(2,\\)"),
        (units(VALUES, indices(1, 3), axes=1), "for units of \\(4,\\)"),
        (units(VALUES, indices(1, 3), axes=-1), "-1 axes of units"),
        (units(VALUES, indices(1, 3), axes=0), "0 axes of units"),
        (units(VALUES, indices(1, 3), axes=3), "3 axes of units"),
        (units(VALUES, indices(), shape=[4, -4]), "2 axes of units of the shape \\(4, -4\\)"),
        (units(VALUES, indices(1, 3), shape=[16], axes=1), "1 axes of units"),
        (units(VALUES, indices(1, 3), shape=[1] * 65), "2 axes of units"),
        (units(torch.zeros(0, 1), indices(), shape=[2**20, 2**20]), "no more than the .* GB of memory"),
        (units(torch.zeros(0, 1), indices(), shape=[2**64] * 64, axes=64), "no more than the .* GB of memory"),
        (units(torch.zeros(0, 1), bytes_of(0), shape=[50000, 100000]), "1 bytes of bits for 5000000000 units"),
        (units(torch.zeros(0, 1), bytes_of(0), shape=[50000, 40000], axes=1), "for units of \\(40000,\\)"),
        (units(VALUES, indices(1, 3), shape=["a", None]), "w of .*: expected a whole number or .*|w.shape\\[0\\]"),
        (units(VALUES, indices(1, 3), shape=[4, 4.0]), "w.shape\\[1\\] of .*: expected a whole number, got 4.0"),
        (units(VALUES, indices(1, 3), is_mask=1), "w.is_mask of .*: expected true or false, got 1"),
        (units(VALUES, indices(1, 3), evil=1), "w.evil of .*: expected none but shape, axes, is_mask"),
        (({"w": {"same_as": "nothing"}}, {}), "tensor w of .*: expected the same as a tensor before it, got 'nothing'"),
        (({"w": {"same_as": "w"}}, {}), "tensor w of .*: expected the same as a tensor before it"),
        (({"w": {"same_as": "x"}, "x": {}}, {"values/x": VALUES}), "tensor w of .*: expected the same as a tensor"),
        (({"w": {}}, {}), "tensors of .*: expected values/w stored"),
        (({}, {"values/w": VALUES}), "tensors of .*: expected an entry for values/w"),
        (({"w": {}}, {"values/w": VALUES, "pattern/w": VALUES.clone()}), "expected an entry for pattern/w"),
        (([], {}), "content of .*: expected an object, got \\[\\]"),
        (({"w": 3}, {}), "w of .*: expected an object, got 3"),
    ],
)  # fmt: skip
def test_entries_that_do_not_fit_their_tensors_are_refused_by_name(tmp_path, changed, text):
    path = crafted(tmp_path / "m", *changed)
    for load in (load_compact, load_masks):
        with pytest.raises(StateError, match=text):
            load(path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"w": {}, "w": {}}', '{"w": NaN}'])
def test_entries_that_are_no_json_are_refused(tmp_path, text):
    with pytest.raises(StateError, match=r"content of|w of"):
        load_compact(crafted(tmp_path / "m", None, {}, text=text))


def header_alone(path: Path, header: object) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [10**30, 0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}},
        {"x": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}},
        {"__metadata__": None},
        {"__metadata__": {}},
        {"__metadata__": {"dstlib": "[]"}},
        {"__metadata__": {"dstlib": "[" * 100_000}},
        {"__metadata__": {"dstlib": json.dumps({"format": {}})}},
        {"__metadata__": {"dstlib": json.dumps({"format": FORMAT, "entries": {}, "checksum": 0})}},
        {"__metadata__": {"dstlib": json.dumps({"format": FORMAT, "entries": "{}", "checksum": 0.0})}},
        {"__metadata__": {"dstlib": json.dumps({"format": FORMAT, "entries": "{}"})}},
        b"[" * 100_000,
        b"",
    ],
)
def test_headers_that_nobody_wrote_are_refused(tmp_path, header):
    with pytest.raises(StateError, match=r"of .*/m: expected"):
        load_compact(header_alone(tmp_path / "m", header))


def test_a_header_that_promises_more_than_the_file_is_refused(tmp_path):
    (tmp_path / "m").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(StateError, match="whole safetensors file"):
        load_compact(tmp_path / "m")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "m")
    with pytest.raises(StateError, match="whole safetensors file"):
        load_compact(tmp_path / "m")


def test_what_does_not_fit_into_memory_is_refused_before_it_is_made(tmp_path, monkeypatch):
    model = Holder(torch.zeros(1000, 1000))
    save_compact(model, tmp_path / "m")
    assert (tmp_path / "m").stat().st_size < 1000
    for limit, fits in ((6_000_000, True), (4_000_000, False)):
        monkeypatch.setattr("dstlib.bounds.available_memory", lambda limit=limit: limit)
        with nullcontext() if fits else pytest.raises(StateError, match=r"such as x of .* 0\.0 GB of memory"):
            load_compact(tmp_path / "m")
    monkeypatch.setattr("dstlib.safetensors_files.available_memory", lambda: 100)
    with pytest.raises(StateError, match=r"bytes, of 50 at most"):
        load_compact(tmp_path / "m")


@st.composite
def mutations(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document of which one part is another."""
    keys = (
        list(document)
        if isinstance(document, dict)
        else list(range(len(document)))
        if isinstance(document, list)
        else []
    )
    if keys and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(keys))
        return (
            type(document)(document) | {key: draw(mutations(document[key]))}
            if isinstance(document, dict)
            else [draw(mutations(part)) if i == key else part for i, part in enumerate(document)]
        )
    if isinstance(document, dict) and keys and draw(st.booleans()):
        return {k: v for k, v in document.items() if k != keys[0]}
    others = st.integers(-3, 30) | st.sampled_from(
        [2**31, 2**62, 10**30, True, False, None, "w", "v", 0.5, [], {}, [4, 4]]
    )
    return draw(others)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_of_entries_and_patterns_makes_other_tensors(tmp_path_factory, data):
    torch.manual_seed(0)
    w = zeroed(torch.rand(4, 4) < 0.4)
    active = w.flatten().nonzero().flatten()
    entries: Any = {"v": {}, "w": {"shape": [4, 4], "axes": 2, "is_mask": True}, "u": {"same_as": "w"}}
    stored = {"values/v": torch.ones(3), "values/w": w.flatten()[active][:, None], "pattern/w": active.int()}
    if data.draw(st.booleans()):
        entries = data.draw(mutations(entries))
    else:
        pattern = st.lists(st.integers(-20, 20), min_size=0, max_size=len(active) + 2)
        kind = data.draw(st.sampled_from([torch.int32, torch.int64, torch.uint8]))
        stored["pattern/w"] = torch.tensor(data.draw(pattern), dtype=torch.int64).to(kind)
    path = crafted(tmp_path_factory.mktemp("compact") / "m", entries, stored)
    try:
        state, masks = load_compact(path), load_masks(path)
    except StateError as refused:
        assert str(path) in str(refused)  # noqa: PT017 - that nothing else is raised is the law
        return
    # What was believed holds the very values that were stored, each once, and says so in its mask.
    for name, entry in entries.items():
        of = entry.get("same_as", name)
        shape = entries[of].get("shape", list(stored[f"values/{of}"].shape))
        assert list(state[name].shape) == shape
        assert torch.equal(state[name][state[name] != 0], stored[f"values/{of}"].flatten())
    assert {name for name, entry in entries.items() if entry.get("is_mask")} == masks.keys()
    assert all(torch.equal(mask, state[name] != 0) for name, mask in masks.items())

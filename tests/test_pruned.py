"""Masks and weights of other tools, read from files that these tools wrote (``golden/masks/write.py``)."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.masks.write import LikeLlama, Net, net
from hypothesis import given
from hypothesis import strategies as st
from models import Small, assert_same, small
from safetensors.torch import load_file, save_file
from strategies import generator
from torch import Tensor, nn
from torch.nn.utils import prune

import dstlib
from dstlib.errors import DstlibError, SelectionError, StateError
from dstlib.export.compact import save_compact
from dstlib.pruned import read_weights
from dstlib.pruned.compressed_tensors import masks as unpack_masks
from dstlib.pruned.compressed_tensors import weights as unpack_weights

MASKS = Path(__file__).parent / "golden" / "masks"
WEIGHTS = ("body.0.weight", "block.fc_1.weight", "head.weight")


def sparsify(model: nn.Module, masks, **options) -> dstlib.Sparsifier:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dstlib.sparsify(model, **{"masks": masks, "method": "static", **options})


def zeros_of(name: str) -> dict[str, Tensor]:
    """The weights as the tool itself had them."""
    return load_file(MASKS / f"{name}_weights.safetensors")


# ---- NNCF 3.4.0


@pytest.mark.parametrize("name", ["nncf_magnitude", "nncf_learned"])
def test_masks_of_nncf(name):
    model, theirs = net(), zeros_of(name)
    dense = {key: model.get_parameter(key).detach().clone() for key in WEIGHTS}
    sparsifier = sparsify(model, MASKS / f"{name}.pt")
    assert sparsifier.masks.keys() == theirs.keys() == set(WEIGHTS)
    for key, weight in theirs.items():
        assert torch.equal(sparsifier.masks[key], weight != 0)
        assert torch.equal(model.get_parameter(key).detach(), weight)
        assert 0 < int((weight == 0).sum()) < weight.numel()
        assert torch.equal(weight[weight != 0], dense[key][weight != 0])
    weights = read_weights(MASKS / f"{name}.pt")
    net().load_state_dict(weights)
    assert_same({key: weights[key] for key in theirs}, theirs)


# ---- rigl-torch 0.5.2


def test_masks_of_rigl_torch_and_their_zeros_that_are_active():
    """An update has just grown a weight of the head, which is zero still; its norm has lost half of its gains."""
    model, theirs = net(), zeros_of("rigl_torch")
    model.load_state_dict(theirs)
    with pytest.warns(UserWarning, match=r"of rigl-torch have zeros in block\.norm\.weight \(it has one axis\)"):
        sparsifier = dstlib.sparsify(model, masks=MASKS / "rigl_torch.pt", method="static")
    assert {name: int(mask.sum()) for name, mask in sparsifier.masks.items()} == {
        "block.fc_1.weight": 13,
        "head.weight": 10,
    }
    assert int((theirs["head.weight"] != 0).sum()) == 9
    assert_same(model.state_dict(), theirs)
    reasons = {row.name: row.reason for row in sparsifier.summary().rows}
    assert reasons["body.0.weight"] == "no zeros in the masks given", "the first layer, by its default"


def test_masks_without_names_are_those_of_one_model_alone():
    with pytest.raises(StateError, match=r"masks for the 3 layers of this model that have a weight.*got 4 for layers"):
        sparsify(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), MASKS / "rigl_torch.pt")
    with pytest.raises(StateError, match=r"expected weights, got masks of rigl-torch alone"):
        read_weights(MASKS / "rigl_torch.pt")


# ---- compressed-tensors 0.12.2


@pytest.mark.parametrize("name", ["sparse_bitmask", "sparse_24_bitmask"])
def test_weights_of_compressed_tensors_are_unpacked_as_it_does(name):
    for path in (MASKS / name, MASKS / name / "model.safetensors"):
        assert_same(read_weights(path), zeros_of(name))


@pytest.mark.parametrize("name", ["sparse_bitmask", "sparse_24_bitmask"])
def test_masks_of_compressed_tensors_are_what_it_stores(name):
    model, theirs = LikeLlama(), zeros_of(name)
    model.load_state_dict({key: x.float() for key, x in theirs.items() if key.endswith("proj.weight")})
    sparsifier = sparsify(model, MASKS / name)
    stored = load_file(MASKS / name / "model.safetensors")
    for key, mask in sparsifier.masks.items():
        assert bool(((theirs[key] != 0) <= mask).all())
        assert int(mask.sum()) == stored[key.replace(".weight", ".compressed")].numel()
    live = sparsifier.masks["model.layers.0.mlp.up_proj.weight"][0]
    assert int(live.sum()) == (4 if name == "sparse_24_bitmask" else 0), "of eight zeros, it stores two of four"
    sparsifier.detach()
    if name == "sparse_24_bitmask":
        method = dstlib.METHODS["srste"]
        sparsify(model, MASKS / name, method=method, total_steps=1000).detach()


def packed(weight: Tensor) -> dict[str, Tensor]:
    """The format ``sparse-bitmask``, from its definition."""
    mask = (weight != 0).numpy()
    bits = torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))
    parts = {"compressed": weight[weight != 0], "bitmask": bits, "shape": torch.tensor(weight.shape)}
    return {f"up.{name}": part for name, part in parts.items()}


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8]),
)
def test_packed_weights_come_back_whatever_their_shape_and_type(shape, seed, dtype):
    weight = torch.randint(-1, 2, shape, generator=generator(seed)).to(dtype)
    assert torch.equal(unpack_weights(packed(weight))["up.weight"], weight)
    assert torch.equal(unpack_masks(packed(weight))["up.weight"], weight != 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": torch.tensor([2**40, 2**20])}, "bits for the shape"),
        ({"shape": torch.tensor([2, -4])}, "a shape, got"),
        ({"shape": torch.tensor([], dtype=torch.int64)}, "a shape, got"),
        ({"shape": torch.tensor([2.0, 4.0])}, "a shape, got torch.float32"),
        ({"shape": torch.tensor([4, 2])}, "bits for the shape"),
        ({"shape": torch.ones(100, dtype=torch.int64)}, "a shape, got"),
        ({"bitmask": torch.tensor([[255], [6]]).byte()}, "no bit beyond the 4 of a row, got 4"),
        ({"bitmask": torch.tensor([[1], [14]]).byte()}, "4 values, as there are bits, got 3"),
        ({"bitmask": torch.tensor([[1], [6]])}, r"got torch\.int64"),
        ({"compressed": torch.ones(1, 3)}, "two bits in every four"),
        ({"row_offsets": torch.tensor([0, 2])}, "row_offsets that count its bits"),
        ({"shape": None}, "a tensor each of compressed, bitmask, shape"),
        ({"weight_scale": torch.ones(1)}, "a weight that is sparse alone"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(changes, message):
    parts = packed(torch.tensor([[3.0, 0, 0, 0], [0, 4.0, 5.0, 0]]))
    with pytest.raises(StateError, match=message):
        unpack_weights({**parts, **{f"up.{name}": part for name, part in changes.items()}})


def test_a_format_that_is_not_known_here_is_named(tmp_path):
    config = json.loads((MASKS / "sparse_bitmask" / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["format"] = "marlin-24"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(StateError, match=r"sparsity_config\.format of .*expected sparse-bitmask or .* got marlin-24"):
        sparsify(small(), tmp_path)


# ---- torch.nn.utils.prune, which is here


def live() -> Small:
    model = small()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    prune.random_unstructured(model.head, "weight", 0.5)
    prune.ln_structured(model.up, "weight", 0.5, n=1, dim=1)
    return model


def test_masks_of_torch_prune():
    theirs = live()
    places = {name: theirs.get_submodule(name).weight_mask.bool() for name in ("conv", "up", "head")}
    for masks in (theirs, theirs.state_dict(), {"net": theirs.state_dict(), "step": 3}):
        model = small()
        sparsifier = sparsify(model, masks)
        assert_same({name.removesuffix(".weight"): mask for name, mask in sparsifier.masks.items()}, places)
        sparsifier.detach()
    weights = read_weights(theirs.state_dict())
    for name in places:
        prune.remove(theirs.get_submodule(name), "weight")
    assert_same(weights, dict(theirs.state_dict()))


def test_a_model_that_is_pruned_live_says_how_it_becomes_plain():
    model = live()
    x = torch.ones(1, 2, 6, 6)
    expected = model(x)
    with pytest.raises(SelectionError, match=r'torch\.nn\.utils\.prune\.remove\(layer, "weight"\) makes it plain'):
        sparsify(model, model)
    model.extra = nn.Linear(2, 2)  # a weight that could be sparse
    with pytest.raises(
        SelectionError, match=r"from conv\.weight_orig.*Take the masks first, masks = model\.state_dict"
    ):
        sparsify(model, model)
    masks = model.state_dict()
    for name in ("conv", "up", "head"):
        prune.remove(model.get_submodule(name), "weight")
    sparsifier = sparsify(model, masks)
    assert sparsifier.masks.keys() == {"conv.weight", "up.weight", "head.weight"}
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.full((3, 6), 2.0), "text"])
def test_masks_that_do_not_fit_their_weights_are_refused(mask):
    state = {"head.weight_orig": torch.ones(3, 6), "head.weight_mask": mask}
    for read in (read_weights, lambda masks: sparsify(small(), masks)):
        with pytest.raises(SelectionError, match=r"head\.weight"):
            read(state)


# ---- files


def sparse() -> Small:
    model = small()
    with torch.no_grad():
        for name in ("conv", "up", "head"):
            weight = model.get_submodule(name).weight
            weight[weight.abs() < weight.abs().median()] = 0.0
    return model


def as_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def as_folder(model: nn.Module, folder: Path) -> Path:
    as_safetensors(model, folder)
    (folder / "config.json").write_text("{}")
    return folder


def as_shards(model: nn.Module, folder: Path) -> Path:
    table = {}
    for i, (name, x) in enumerate(model.state_dict().items()):
        save_file({name: x}, folder / f"model-{i}.safetensors")
        table[name] = f"model-{i}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def as_checkpoint(model: nn.Module, folder: Path) -> Path:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


def as_compact(model: nn.Module, folder: Path) -> Path:
    save_compact(model, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("write", [as_safetensors, as_folder, as_shards, as_checkpoint, as_compact])
@pytest.mark.parametrize("kind", [str, Path])
def test_masks_are_the_zeros_of_a_checkpoint_in_any_file(write, kind, tmp_path):
    model = sparse()
    path = write(model, tmp_path)
    expected = {name: p.detach() != 0 for name, p in model.named_parameters() if p.ndim > 1}
    assert_same(read_weights(kind(path)), dict(model.state_dict()))
    fresh = small()
    fresh.load_state_dict(read_weights(path))
    assert_same(sparsify(fresh, kind(path)).masks, expected)


def test_masks_of_a_sparsifier_come_back_from_its_compact_file_and_its_state(tmp_path):
    model = small()
    sparsifier = sparsify(model, None, sparsity=0.6)
    with torch.no_grad():
        model.head.weight[sparsifier.masks["head.weight"].nonzero()[0].unbind()] = 0.0  # zero, and active
    save_compact(model, tmp_path / "model.safetensors", sparsifier=sparsifier)
    torch.save({"model": model.state_dict(), "sparsifier": sparsifier.state_dict()}, tmp_path / "last.pt")
    torch.save(dict(sparsifier.masks), tmp_path / "masks.pt")
    sparsifier.detach()
    for name in ("model.safetensors", "last.pt", "masks.pt"):
        again = sparsify(copy.deepcopy(model), tmp_path / name)
        assert_same(again.masks, sparsifier.masks)
        again.detach()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}, "epoch": 1}, r"content of masks .*got dict with weights \(dict\), epoch \(int\)"),
        ([torch.ones(2)], r"content of masks .*got list"),
        ({1: torch.ones(2)}, r"content of masks .*got dict with 1 \(Tensor\)"),
        (
            {"a": {"x.weight": torch.rand(2)}, "b": {"x.weight": torch.rand(2)}},
            r"got several, a, b\. Load it, and pass",
        ),
        ({"head.weight": torch.rand(3, 6)}, r"names of masks .*got no conv\.weight, up\.weight"),
        ({name: torch.rand(2, 2) for name in ("conv.weight", "up.weight", "head.weight")}, r"expected shape"),
        ({"backward_masks": [None], "N": [torch.ones(2)]}, r"backward_masks of a state of rigl-torch"),
    ],
)
def test_files_without_masks_are_refused_by_name(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(DstlibError, match=message):
        sparsify(small(), tmp_path / "file.pt")


class Evil:
    """Would run code if its pickle were trusted."""

    def __reduce__(self):
        return (print, ("owned",))


def test_a_file_runs_no_code_and_leads_nowhere(tmp_path, capsys):
    torch.save({"head.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(StateError, match=r"evil\.pt of folder .*: expected tensors and plain values, got a damaged or"):
        sparsify(small(), tmp_path / "evil.pt")
    assert "owned" not in capsys.readouterr().out
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"head.weight": "../other.safetensors"}}')
    with pytest.raises(StateError, match=r"a weight_map to files of safetensors beside it, got \.\./other"):
        sparsify(small(), tmp_path)
    for name in ("gone.pt", "gone.safetensors", "gone"):
        with pytest.raises(StateError, match=r"No such file|no such file"):
            sparsify(small(), tmp_path / name)


def test_the_networks_of_the_fixtures_are_those_that_were_pruned():
    """Or else the tests above would compare nothing."""
    assert [name for name, p in Net().named_parameters() if p.ndim > 1] == list(WEIGHTS)
    state = torch.load(MASKS / "nncf_magnitude.pt", weights_only=True)
    assert all(torch.equal(state[name], x) for name, x in net().named_parameters())


# ---- models of the transformer library


def test_a_pruned_transformer_goes_on_from_the_folder_that_it_was_saved_in(tmp_path):
    """Its layers store (inputs, outputs), and its queries, keys and values are one parameter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config)
    layers = {name: layer for name, layer in theirs.named_modules() if type(layer).__name__ == "Conv1D"}
    for layer in layers.values():
        prune.l1_unstructured(layer, "weight", 0.75)
        prune.remove(layer, "weight")
    theirs.save_pretrained(tmp_path)
    expected = {f"{name}.weight": layer.weight.detach() != 0 for name, layer in layers.items()}

    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    method = replace(dstlib.RIGL, interval=2)
    for masks in ("from-zeros", tmp_path, tmp_path / "model.safetensors"):
        sparsifier = sparsify(model, masks, exclude=["*wte", "*wpe", "lm_head"], method=method, total_steps=1000)
        assert_same(sparsifier.masks, expected)
        sparsifier.detach()
    assert_same(dict(model.named_parameters()), dict(theirs.named_parameters()))
    sparsifier = sparsify(model, "from-zeros", method=method, total_steps=1000)
    tokens = torch.randint(0, 20, (2, 8), generator=generator(0))
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = [name for name, mask in sparsifier.masks.items() if not torch.equal(mask, expected[name])]
    assert len(moved) > len(expected) // 2
    assert all(int(mask.sum()) == int(expected[name].sum()) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("name", ["sparse_bitmask", "sparse_24_bitmask"])
def test_a_compressed_transformer_is_loaded_without_the_release_that_wrote_it(name):
    transformers = pytest.importorskip("transformers")
    config = json.loads((MASKS / name / "config.json").read_text())
    del config["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16)
    model.load_state_dict(read_weights(MASKS / name))
    assert_same(dict(model.state_dict()), zeros_of(name))
    sparsifier = sparsify(model, MASKS / name)
    assert len(sparsifier.masks) == 7
    assert_same(dict(model.state_dict()), zeros_of(name))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weights_in_codes_are_no_plain_weights():
    codes = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(StateError, match=r"expected a tensor of numbers, got one of torch.qint8\. .* dequantized"):
        read_weights({"0.weight": codes})

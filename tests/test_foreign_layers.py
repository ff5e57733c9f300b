"""Weights of other libraries' layers: which axis counts outputs, and which of several matrices is which."""

import math
import re
from dataclasses import replace

import einops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_zero_outside
from torch import nn

import dstlib
from dstlib import NM, Block, Channel, FanIn, Kernel, SelectionError, SettingError, uniform
from dstlib.targets import select
from dstlib.targets.layouts import _LAYOUTS

STATIC = replace(dstlib.STATIC, distribution=uniform)


class Turned(nn.Module):
    """GPT-2's layer: a weight of inputs × outputs."""

    def __init__(self, num_out, num_in):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_in, num_out))
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Standardised(Turned):
    def forward(self, x):
        return x @ (self.weight - self.weight.mean(dim=0))


class Experts(nn.Module):
    """Stacked as in transformers 5, a matrix for each expert: inputs × outputs where ``is_transposed``."""

    def __init__(self, is_transposed, num=3, hidden=8, between=12):
        super().__init__()
        self.num_experts, self.is_transposed = num, is_transposed
        up, down = ((hidden, between), (between, hidden)) if is_transposed else ((between, hidden), (hidden, between))
        self.up_proj, self.down_proj = nn.Parameter(torch.randn(num, *up)), nn.Parameter(torch.randn(num, *down))
        self.up_proj_bias = nn.Parameter(torch.zeros(num, between))


Turned.__module__, Turned.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class Stack(nn.Module):
    """Raw parameters of which nobody knows the axes."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 8, 12))
        self.head = nn.Linear(8, 4)


def sparsified(model, granularity, sparsity=0.5, **settings):
    method = replace(STATIC, granularity=granularity)
    return dstlib.sparsify(model, sparsity=sparsity, method=method, **settings)


def test_a_turned_weight_is_sparse_by_its_outputs_and_inputs():
    layer = Turned(12, 8)
    assert [(w.reason, [v.transposed for v in w.views]) for w in select(layer)] == [("", [True])]
    assert sparsified(Turned(12, 8), FanIn()).masks["weight"].sum(dim=0).tolist() == [4] * 12
    by_channel = sparsified(layer, Channel()).masks["weight"]
    assert sorted(by_channel.sum(dim=0).tolist()) == [0] * 6 + [8] * 6
    assert (layer(torch.randn(5, 8)) == 0).all(dim=0).tolist() == (~by_channel.any(dim=0)).tolist()
    of_four = sparsified(Turned(12, 8), NM(2, 4)).masks["weight"]
    assert (of_four.view(2, 4, 12).sum(dim=1) == 2).all(), "2 of every 4 inputs of each output"
    blocks = sparsified(Turned(12, 8), Block(3, 4)).masks["weight"].view(2, 4, 4, 3).sum(dim=(1, 3))
    assert set(blocks.flatten().tolist()) == {0, 12}


def test_turned_queries_keys_and_values_are_three_matrices_side_by_side():
    model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": Turned(24, 8), "c_proj": Turned(8, 8)})})
    with torch.no_grad():
        model["attn"]["c_attn"].weight[:, :8] *= 0.01
    method = replace(STATIC, init=dstlib.masking.magnitude)
    masks = dstlib.sparsify(model, sparsity=0.5, method=method).masks
    assert masks["attn.c_attn.weight"].view(8, 3, 8).sum(dim=(0, 2)).tolist() == [32] * 3, "small queries do not starve"
    names = [view.name.rpartition(".")[2] for w in select(model) for view in w.views if len(w.views) > 1]
    assert names == ["q", "k", "v"]
    joint = select(model, split={"attn.c_attn": 1})[0]
    assert [(v.rows, v.transposed) for v in joint.views] == [(None, True)]
    halves = select(model, split={"attn.c_attn": 2})[0]
    assert [tuple(v.of(halves.parameter).shape) for v in halves.views] == [(12, 8), (12, 8)]
    with pytest.raises(SelectionError, match="a divisor of its 24 rows"):
        select(model, split={"attn.c_attn": 5})


def test_a_subclass_counts_as_its_base_unless_it_standardises_the_weight():
    assert [w.reason for w in select(type("Mine", (Turned,), {})(4, 4))] == [""]
    model = nn.Sequential(nn.Linear(8, 8), Standardised(4, 4))
    assert "standardises" in select(model)[1].reason


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (Turned(12, 8), [(12, 8)]),
        (Turned(24, 8), [(8, 8)] * 3),
        (nn.Linear(8, 24), [(8, 8)] * 3),
        (nn.ConvTranspose2d(8, 12, 3), [(12, 8, 3, 3)]),
    ],
)
def test_a_weight_beside_low_rank_factors_keeps_its_axes_and_its_parts(layer, shapes):
    adapter = nn.Module()
    adapter.c_attn, adapter.lora_A, adapter.lora_B = layer, nn.Linear(8, 2), nn.Linear(2, 8)
    found = {w.name: w for w in select(adapter, include=("c_attn.weight",))}["c_attn.weight"]
    assert found.reason == ""
    assert [tuple(view.of(found.parameter).shape) for view in found.views] == shapes
    dense = {w.name: w.reason for w in select(nn.ModuleList([adapter, nn.Linear(4, 4)]))}
    assert dense["0.c_attn.weight"].startswith("adapted by low-rank factors")


@pytest.mark.parametrize("is_transposed", [False, True])
def test_each_expert_is_a_matrix_with_a_budget_of_its_own(is_transposed):
    weights = {w.name: w for w in select(Experts(is_transposed))}
    shapes = {name: {tuple(v.of(w.parameter).shape) for v in w.views} for name, w in weights.items() if not w.reason}
    assert shapes == {"up_proj": {(12, 8)}, "down_proj": {(8, 12)}}
    assert [v.name for v in weights["up_proj"].views] == ["up_proj.0", "up_proj.1", "up_proj.2"]
    assert "raw parameter" in weights["up_proj_bias"].reason
    masks = sparsified(Experts(is_transposed), Channel()).masks
    inputs = 1 if is_transposed else 2
    assert masks["up_proj"].any(dim=inputs).sum(dim=1).tolist() == [6] * 3, "half of the outputs of each expert"
    assert masks["down_proj"].any(dim=inputs).sum(dim=1).tolist() == [4] * 3
    fan_in = sparsified(Experts(is_transposed), FanIn()).masks["up_proj"]
    assert (fan_in.sum(dim=inputs) == 4).all()
    assert fan_in.sum(dim=inputs).shape == (3, 12)


def test_experts_take_the_number_that_they_are_and_no_other():
    model = Experts(False)
    assert len(select(model, split={"*_proj": 3})[0].views) == 3
    with pytest.raises(SelectionError, match="3 matrices by its making"):
        select(model, split={"up_proj": 2})
    with pytest.raises(SelectionError, match="none, as its axes are known, got 'e i o'"):
        select(model, axes={"up_proj": "e i o"})


def test_experts_change_their_masks_each_within_itself():
    model = Experts(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    method = replace(dstlib.RIGL, interval=1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=method, total_steps=12)
    before = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(step))
        torch.bmm(torch.bmm(x, model.up_proj).relu(), model.down_proj).square().sum().backward()
        optimizer.step()
    for name, mask in sparsifier.masks.items():
        assert not torch.equal(mask, before[name])
        assert mask.sum(dim=(1, 2)).tolist() == before[name].sum(dim=(1, 2)).tolist()
    assert_zero_outside(model, sparsifier.masks, optimizer)


def test_axes_that_nobody_knows_are_asked_for_where_they_matter():
    element = dstlib.sparsify(Stack(), sparsity=0.5, method="static", include=["*", "weights"])
    assert int(element.masks["weights"].sum()) > 0
    for granularity in (FanIn(), Channel(), NM(2, 4), Kernel(), Block(1, 4)):
        with pytest.raises(SettingError, match=r"of weights, \(3, 8, 12\).*axes=\{\"weights\": \"e o i\"\}"):
            sparsified(Stack(), granularity, include=["*", "weights"])
    for order, outputs in {"e o i": 1, "e i o": 2}.items():
        masks = sparsified(Stack(), FanIn(), include=["*", "weights"], axes={"weights": order}).masks
        per_output = masks["weights"].sum(dim=3 - outputs)
        assert per_output.unique().tolist() == [masks["weights"].shape[3 - outputs] // 2]


@pytest.mark.parametrize(
    "axes", ["", "o i", "e i i", "e o", "e  o  x", "e o i x", "... o i", "o ... i", "e o i x ...", "(e o) i k", 3]
)
def test_axes_that_do_not_fit_are_refused(axes):
    with pytest.raises(SelectionError, match="a name for each of its 3 axes: o, i, and others that count matrices"):
        select(Stack(), include=["*", "weights"], axes={"weights": axes})


def test_axes_that_were_given_as_a_split_are_sent_to_where_they_belong_now():
    with pytest.raises(SelectionError, match=r"State axes by axes=\{'weights': 'e o i'\}"):
        select(Stack(), include=["*", "weights"], split={"weights": "e o i"})
    with pytest.raises(SettingError, match="axes of sparsify"):
        dstlib.sparsify(Stack(), sparsity=0.5, axes="e o i")
    with pytest.raises(SelectionError, match=r"glob 'heads' of the sparse weights, by axes=.*no match"):
        select(Stack(), axes={"heads": "o i"})


def test_whose_axes_are_named_is_asked_for_by_that():
    by_axes = {w.name: (w.reason, w.views) for w in select(Stack(), axes={"w*": "e i o"})}
    by_name = {w.name: (w.reason, w.views) for w in select(Stack(), include=["*", "weights"], axes={"w*": "e i o"})}
    assert by_axes == by_name
    assert len(by_axes["weights"][1]) == 3
    assert not dstlib.sparsify(Stack(), sparsity=0.5, method="static", axes={"weights": "e i o"}).masks["weights"].all()
    (alone,) = select(nn.ParameterDict({"raw": torch.zeros(8, 6)}), axes={"raw": "i o"})
    assert not alone.reason


class Loralib(nn.Linear):
    """A layer with low-rank factors of its own."""

    def __init__(self):
        super().__init__(8, 4)
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(4, 2))


def with_dense():
    model = nn.ModuleDict({"stack": Stack(), "adapted": Loralib(), "table": nn.Embedding(4, 2)})
    model["stack"].frozen = nn.Parameter(torch.zeros(8, 4), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("glob", "settings", "said"),
    [
        ("stack.frozen", {}, r"stack\.frozen, which stays dense: frozen .*\. Take the glob out\."),
        ("stack.w*", {"exclude": "*.weights"}, r"stack\.weights, which stays dense: excluded\. .* narrow exclude="),
        ("stack.weights", {"include": "*.head"}, r"dense: not included\. .* add 'stack\.weights' to include="),
        ("adapted.weight", {}, r"dense: adapted by low-rank factors.* add 'adapted\.weight' to include="),
        ("adapted.lora_?", {}, r"lora_A, which stays dense: low-rank factor.* add 'adapted\.lora_A' to include="),
        ("table", {}, r"table\.weight, which stays dense: weight of Embedding.*\. Take the glob out\."),
    ],
)
@pytest.mark.parametrize("by", [{"axes": "o i"}, {"split": 2}, {"overrides": 0.5}])
def test_a_glob_of_what_stays_dense_is_refused_with_the_reason(glob, settings, said, by):
    ((key, value),) = by.items()
    with pytest.raises(SelectionError, match=rf"glob '{re.escape(glob)}' of the sparse weights.*{said}"):
        dstlib.sparsify(with_dense(), sparsity=0.5, method="static", **settings, **{key: {glob: value}})


@given(st.permutations(["o", "i", "e", "f"]), st.integers(2, 4), st.integers(0, 2), st.data())
def test_the_matrices_along_named_axes_hold_each_entry_once_at_its_output_and_input(order, num_axes, num_taps, data):
    """Whatever the order, as einops has it: the entry at (e, f, o, i, k) is that of matrix e.f at (o, i, k)."""
    names = [name for name in order if name in "oief"[:num_axes]]
    sizes = {name: data.draw(st.integers(1, 4)) for name in names}
    taps = [f"k{number}" for number in range(num_taps)]
    x = torch.arange(math.prod(sizes.values()) * 2**num_taps).view(*sizes.values(), *[2] * num_taps)
    layer = nn.ParameterDict({"raw": x.float()})
    (weight,) = select(layer, include=("raw",), axes={"raw": " ".join([*names, *["..."] * bool(num_taps)])})
    counting = [name for name in names if name in "ef"]
    turned = einops.rearrange(x, f"{' '.join(names + taps)} -> ({' '.join(counting)}) o i {' '.join(taps)}")
    assert len(weight.views) == len(turned)
    for view, matrix in zip(weight.views, turned, strict=True):
        assert torch.equal(view.of(x), matrix)
        assert view.of(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a mask is written through"


def test_named_axes_and_a_number_of_matrices_go_together():
    (weight,) = select(
        nn.ParameterDict({"raw": torch.zeros(8, 6)}), include=("raw",), axes={"raw": "i o"}, split={"raw": 2}
    )
    assert [tuple(view.of(weight.parameter).shape) for view in weight.views] == [(3, 8), (3, 8)]
    with pytest.raises(SelectionError, match="no split, as ParameterDict is 2 matrices by its making"):
        select(
            nn.ParameterDict({"raw": torch.zeros(2, 6, 4)}), include=("raw",), axes={"raw": "e o i"}, split={"raw": 3}
        )


def shapes_of(layer):
    """Outputs and inputs of each sparse matrix of a layer, by parameter."""
    weights = [w for w in select(layer) if not w.reason]
    return {w.name: {tuple(view.of(w.parameter).shape) for view in w.views} for w in weights}


# every size is another, so that the shape of a matrix tells its outputs from its inputs
EXPERTS = {"hidden_size": 24, "intermediate_size": 20, "num_local_experts": 3}
OUT_IN = {"gate_up_proj": {(40, 24)}, "down_proj": {(24, 20)}}


def test_the_layers_of_transformers_lie_as_the_table_says():
    transformers = pytest.importorskip("transformers")
    from transformers.models.convbert.modeling_convbert import GroupedLinearLayer
    from transformers.models.csm.modeling_csm import CsmCodebooksHead
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
    from transformers.models.kyutai_speech_to_text.modeling_kyutai_speech_to_text import (
        KyutaiSpeechToTextFlexibleLinear,
    )
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear
    from transformers.models.zamba.modeling_zamba import ZambaMambaMixer
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(6, 4)
    assert shapes_of(conv) == {"weight": {(6, 4)}}
    x = torch.randn(5, 4)
    torch.testing.assert_close(conv(x), x @ select(conv)[0].views[0].of(conv.weight).T + conv.bias)
    assert shapes_of(GroupedLinearLayer(8, 12, 2)) == {"weight": {(6, 4)}}
    assert shapes_of(JetMoeParallelExperts(3, 4, 6)) == {"weight": {(6, 4)}}
    assert shapes_of(MoshiFlexibleLinear(4, 6, 3)) == {"weight": {(6, 4)}}
    assert shapes_of(KyutaiSpeechToTextFlexibleLinear(4, 6, 3)) == {"weight": {(6, 4)}}
    assert shapes_of(CsmCodebooksHead(4, 3, 6)) == {"weight": {(6, 4)}}
    mixer = ZambaMambaMixer(transformers.ZambaConfig(hidden_size=20, mamba_d_state=3, mamba_dt_rank=5), 0)
    found = shapes_of(mixer)
    assert found["x_proj_weight"] == {(5 + 2 * 3, 20)}
    assert found["dt_proj_weight"] == {(20, 5)}
    assert shapes_of(MixtralExperts(transformers.MixtralConfig(**EXPERTS))) == OUT_IN
    assert shapes_of(GptOssExperts(transformers.GptOssConfig(**EXPERTS))) == OUT_IN
    assert shapes_of(Llama4TextExperts(transformers.Llama4TextConfig(**EXPERTS))) == OUT_IN
    assert len(select(MixtralExperts(transformers.MixtralConfig(**EXPERTS)))[0].views) == 3


def test_the_layers_of_torch_geometric_lie_as_the_table_says():
    geometric = pytest.importorskip("torch_geometric.nn")
    from torch_geometric.nn.conv.dna_conv import Linear

    assert shapes_of(geometric.Linear(4, 6)) == {"weight": {(6, 4)}}
    assert shapes_of(geometric.HeteroLinear(4, 6, 3)) == {"weight": {(6, 4)}}
    assert shapes_of(Linear(8, 12, 2)) == {"weight": {(6, 4)}}
    relations = {"weight": {(6, 4)}, "root": {(6, 4)}}
    assert shapes_of(geometric.RGCNConv(4, 6, 3)) == shapes_of(geometric.FastRGCNConv(4, 6, 3)) == relations
    assert shapes_of(geometric.RGCNConv(8, 12, 3, num_blocks=2)) == {"weight": {(6, 4)}, "root": {(12, 8)}}
    assert shapes_of(geometric.RGCNConv(4, 6, 3, num_bases=2)) == {"root": {(6, 4)}}
    bases = {w.name: w.reason for w in select(geometric.RGCNConv(4, 6, 3, num_bases=2))}
    assert bases["weight"] == "mixed by comp, where zeros of one stay dense: sparse only if included by name"
    arma = {"init_weight": {(6, 4)}, "root_weight": {(6, 4)}, "weight": {(6, 6)}}
    assert shapes_of(geometric.ARMAConv(4, 6, num_stacks=2, num_layers=2)) == arma
    attention = geometric.RGATConv(4, 6, 3, heads=2, dim=5, attention_mode="multiplicative-self-attention")
    assert shapes_of(attention) == {"weight": {(12, 4)}, "q": {(10, 12)}, "k": {(10, 12)}}


def test_a_linear_layer_whose_owner_multiplies_by_it_turned_is_turned():
    """MobileBERT's head puts the weight of a layer below the embedding's, as inputs × outputs."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "hidden_size": 24, "embedding_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 20, "intra_bottleneck_size": 12, "true_hidden_size": 12}
    model = transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**sizes)).eval()
    head = {w.name: w for w in select(model)}["cls.predictions.dense.weight"]
    assert head.views[0].of(head.parameter).shape == (30, 16)
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    with torch.no_grad():
        head.views[0].of(head.parameter)[3] += 1
    moved = (model(input_ids=ids).logits != before)[0].any(dim=0)
    assert moved.nonzero().flatten().tolist() == [3], "a row is an output, here a word"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # both classes are to go with diffusers 1.0
def test_low_rank_layers_of_diffusers_are_factors():
    lora = pytest.importorskip("diffusers.models.lora")
    plain = lora.LoRACompatibleLinear(8, 8)
    adapted = lora.LoRACompatibleLinear(8, 8, lora_layer=lora.LoRALinearLayer(8, 8, rank=2))
    assert [w.reason for w in select(plain)] == [""]
    found = {w.name: w.reason.split(",")[0] for w in select(nn.Sequential(adapted, nn.Linear(4, 4)))}
    assert found == {
        "0.weight": "adapted by low-rank factors",
        "0.lora_layer.down.weight": "low-rank factor",
        "0.lora_layer.up.weight": "low-rank factor",
        "1.weight": "",
    }


def test_every_class_of_the_table_exists_in_the_libraries_that_are_here():
    for name in _LAYOUTS:
        module, _, cls = name.rpartition(".")
        library = module.partition(".")[0]
        pytest.importorskip(library)
        assert isinstance(getattr(__import__(module, fromlist=[cls]), cls), type), name

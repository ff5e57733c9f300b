"""Which weights are selected, why the others are not, and how each is turned."""

import copy
import re
import warnings
from dataclasses import replace

import pytest
import torch
from models import assert_zero_outside
from torch import nn

import dstlib
from dstlib import NM, RIGL, Block, FanIn, Kernel, SelectionError, SettingError, uniform
from dstlib.methods import find_method
from dstlib.targets import plain_name, select


def reasons(model, **kwargs):
    return {w.name: w.reason for w in select(model, **kwargs)}


class Zoo(nn.Module):
    """One of each kind of weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.position = nn.Parameter(torch.zeros(1, 4, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
        self.conv = nn.Conv1d(8, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.up = nn.ConvTranspose3d(8, 4, 2)
        self.up_grouped = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(8, 4)
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 10)


def test_every_matrix_is_named_with_a_reason():
    assert reasons(Zoo()) == {
        "position": "raw parameter of Zoo: sparse only if included by name",
        "embed.weight": "weight of Embedding: no weight of Linear, Conv or attention",
        "attention.in_proj_weight": "",
        "attention.out_proj.weight": "",
        "cross.q_proj_weight": "",
        "cross.k_proj_weight": "",
        "cross.v_proj_weight": "",
        "cross.out_proj.weight": "",
        "conv.weight": "",
        "grouped.weight": "",
        "depthwise.weight": "depthwise: sparse only if included by name",
        "up.weight": "",
        "up_grouped.weight": "grouped transposed convolution: sparse only if included by name",
        "rnn.weight_ih_l0": "recurrent: sparse only if included by name",
        "rnn.weight_hh_l0": "recurrent: sparse only if included by name",
        "bilinear.weight": "bilinear: sparse only if included by name",
        "frozen.weight": "frozen (requires_grad is False)",
        "head.weight": "",
    }


def test_summary_shows_each_weight_the_reason_and_the_totals():
    sparsifier = dstlib.sparsify(Zoo(), sparsity=0.5, method="static", exclude="head")
    text = str(sparsifier.summary())
    assert re.search(r"embed\.weight +Embedding +10×8 +80 +1\.0000  dense: weight of Embedding", text)
    assert re.search(r"conv\.weight +Conv1d +8×8×3 +\d+ +0\.\d{4}  sparse", text)
    assert "dense: excluded" in text
    assert "dense: depthwise" in text
    rows = {row.name: row for row in sparsifier.summary().rows}
    assert rows["head.weight"].density == 1
    assert rows["up.weight"].shape == (8, 4, 2, 2, 2)
    summary = sparsifier.summary()
    assert summary.num_sparse == sum(m.numel() for m in sparsifier.masks.values())
    assert summary.num_active == sum(int(m.sum()) for m in sparsifier.masks.values())
    total = sum(p.numel() for p in Zoo().parameters())
    assert summary.params == total - summary.num_sparse + summary.num_active


def test_include_and_exclude_are_globs_over_weights_and_modules():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    assert reasons(model, include=("body.*",)) == {
        "body.0.weight": "",
        "body.1.weight": "",
        "head.weight": "not included",
    }
    assert reasons(model, include=("head",))["head.weight"] == ""
    assert reasons(model, exclude=("*.1", "head"))["body.0.weight"] == ""
    assert reasons(model, exclude=("*.1", "head"))["body.1.weight"] == "excluded"


def test_a_glob_that_matches_nothing_is_an_error_that_suggests():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    with pytest.raises(SelectionError, match=r"glob 'encode' of the model.*Names here: 'encoder\.0'"):
        select(model, include=("encode",))
    with pytest.raises(SelectionError, match=r"write 'encoder\.\*' for all below it"):
        select(model, include=("encoder",))
    with pytest.raises(SelectionError, match="Names here: 'head'"):
        select(model, exclude=("heads",))
    with pytest.raises(SelectionError, match="as an override"):
        dstlib.sparsify(model, sparsity=0.5, method="static", exclude="head", overrides={"head": 0.3})


def test_dense_by_default_becomes_sparse_when_asked_for_by_name_and_the_impossible_raises():
    assert reasons(Zoo(), include=("*", "depthwise", "rnn"))["depthwise.weight"] == ""
    assert reasons(Zoo(), include=("*", "depthwise", "rnn"))["rnn.weight_hh_l0"] == ""
    assert reasons(Zoo(), include=("*", "depthwise.weight"))["rnn.weight_hh_l0"] != ""
    with pytest.raises(SelectionError, match=r"embed.weight.*masked in place.*Embedding"):
        select(Zoo(), include=("embed",))


def test_a_model_without_candidates_says_why():
    with pytest.raises(SelectionError, match=r"none \(weight: weight of Embedding"):
        dstlib.sparsify(nn.Embedding(4, 4), sparsity=0.5)
    with pytest.raises(SelectionError, match="no parameter has two axes"):
        dstlib.sparsify(nn.BatchNorm1d(4), sparsity=0.5)
    with pytest.raises(SelectionError, match="lazy"):
        dstlib.sparsify(nn.Sequential(nn.LazyLinear(3)), sparsity=0.5)
    with pytest.raises(SelectionError, match="meta"):
        dstlib.sparsify(nn.Linear(4, 4, device="meta"), sparsity=0.5, method="static")


def test_tied_weights_count_once_and_stay_dense_with_an_embedding():
    tied = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    tied["b"].weight = tied["a"].weight
    sparsifier = dstlib.sparsify(tied, sparsity=0.5, method="static")
    assert list(sparsifier.masks) == ["a.weight"]
    assert sparsifier.summary().num_sparse == 36
    assert reasons(tied, include=("b",))["a.weight"] == "", "either name will do"

    language = nn.ModuleDict({"head": nn.Linear(4, 10), "embed": nn.Embedding(10, 4), "mlp": nn.Linear(4, 4)})
    language["head"].weight = language["embed"].weight
    assert reasons(language)["head.weight"].startswith("tied to embed.weight")


def test_transposed_convolutions_are_turned_and_in_proj_is_three_matrices():
    model = Zoo()
    method = replace(dstlib.STATIC, granularity=FanIn(), distribution=uniform)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method=method)
    per_output = sparsifier.masks["up.weight"].sum(dim=(0, 2, 3, 4))
    assert per_output.tolist() == [32] * 4, "each of 4 outputs keeps half of its 8·2·2·2 inputs"
    in_proj = sparsifier.masks["attention.in_proj_weight"]
    assert in_proj.view(3, 8, 8).sum(dim=(1, 2)).tolist() == [32] * 3

    unequal = nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        unequal.in_proj_weight[:8] *= 0.01
    by_size = replace(method, granularity=dstlib.Element(), init=dstlib.masking.magnitude)
    masks = dstlib.sparsify(unequal, sparsity=0.5, method=by_size).masks
    assert masks["in_proj_weight"].view(3, 64).sum(dim=1).tolist() == [32] * 3, "small queries are not starved"


def test_groups_of_a_transposed_convolution_are_matrices_of_inputs_of_their_own():
    grouped = nn.ModuleDict(
        {"up": nn.ConvTranspose2d(8, 6, 2, groups=2), "deep": nn.ConvTranspose2d(4, 4, 3, groups=4)}
    )
    assert reasons(grouped, include=("*", "up"))["deep.weight"] == "depthwise: sparse only if included by name"
    method = replace(dstlib.STATIC, granularity=FanIn(), distribution=uniform)
    mask = dstlib.sparsify(grouped, sparsity=0.5, method=method, include="up").masks["up.weight"]
    assert mask.shape == (8, 3, 2, 2)
    per_output = mask.view(2, 4, 3, 4).sum(dim=(1, 3))
    assert per_output.tolist() == [[8] * 3] * 2, "each of 3 outputs of each group keeps half of its 4·2·2 inputs"


def test_overrides_take_weights_out_of_the_budget():
    model = nn.ModuleDict({"a": nn.Linear(10, 10), "b": nn.Linear(10, 10), "head": nn.Linear(10, 10)})
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method="static", overrides={"*": 0.5, "head": 0.0})
    assert [row.density for row in sparsifier.summary().rows] == [0.5, 0.5, 1.0]
    sparsifier.detach()
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method="static", overrides={"head": 0.0})
    assert [row.density for row in sparsifier.summary().rows] == [0.2, 0.2, 1.0]


def centre(weight):
    return weight - weight.mean()


def test_weight_standardisation_is_left_dense():
    class StdConv(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean(dim=(1, 2, 3), keepdim=True)) / w.std(dim=(1, 2, 3), keepdim=True)
            return self._conv_forward(x, w, self.bias)

    class SamePadding(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    class ByHelper(StdConv):
        """Two calls away, as BitLinear does it."""

        def centred(self):
            return centre(self.weight)

        def forward(self, x):
            return self._conv_forward(x, self.centred(), self.bias)

    model = nn.ModuleDict({"std": StdConv(4, 4, 3), "same": SamePadding(4, 4, 3), "helper": ByHelper(4, 4, 3)})
    found = reasons(model)
    assert "standardises" in found["std.weight"]
    assert "standardises" in found["helper.weight"]
    assert found["same.weight"] == ""
    with pytest.raises(SelectionError, match="standardises"):
        select(model, include=("std",))


def test_names_are_those_of_the_user_under_compile_and_data_parallel():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert set(reasons(torch.compile(model))) == {"0.weight", "1.weight"}
    assert plain_name("block._checkpoint_wrapped_module.fc.weight") == "block.fc.weight"
    assert list(dstlib.sparsify(nn.DataParallel(model), sparsity=0.5, method="static").masks) == [
        "0.weight",
        "1.weight",
    ]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), True])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(SettingError, match=r"sparsity of sparsify\(\): expected a number in \[0, 1\), got"):
        dstlib.sparsify(nn.Linear(4, 4), sparsity=sparsity)


def test_settings_that_cannot_work_are_refused_with_a_remedy():
    model, linear = Zoo(), nn.Linear(10, 10)
    with pytest.raises(SettingError, match="Similar: 'rigl'"):
        dstlib.sparsify(model, sparsity=0.5, method="rig")
    with pytest.raises(SettingError, match=r"total_steps.*gmp.*Pass total_steps="):
        dstlib.sparsify(model, sparsity=0.5, method="gmp")
    with pytest.raises(SettingError, match=r"total_steps.*first 75% of the run, such as 267, got 120"):
        dstlib.sparsify(model, sparsity=0.5, method="rigl", total_steps=120)
    method = replace(dstlib.STATIC, granularity=NM(2, 4), distribution=uniform)
    with pytest.raises(SettingError, match=r"sparsity of weight: expected 0.5, as 2 of every 4"):
        dstlib.sparsify(nn.Linear(8, 8), sparsity=0.75, method=method)
    with pytest.raises(SelectionError, match="none of them"):
        dstlib.sparsify(linear, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.5, method="static")
    with pytest.raises(SettingError, match=r"torch optimizers, got 0\.9"):
        dstlib.sparsify(linear, 0.9, sparsity=0.5)
    with pytest.raises(SettingError, match="density of weight, by the distribution of method static"):
        dstlib.sparsify(linear, sparsity=0.5, method=replace(dstlib.STATIC, distribution=lambda shapes, d: {}))
    with pytest.raises(SettingError, match="stop of method rigl"):
        replace(RIGL, stop=1.5)


def test_a_granularity_that_does_not_divide_names_the_weight_and_its_shape():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3)})
    with pytest.raises(SettingError, match=r"stem\.weight.*\(8, 3, 3, 3\)"):
        dstlib.sparsify(model, sparsity=0.5, method=replace(dstlib.STATIC, granularity=Block(4, 4)))


def test_a_masked_model_is_not_masked_twice():
    model = nn.Linear(10, 10)
    first = dstlib.sparsify(model, sparsity=0.5, method="static")
    with pytest.raises(SelectionError, match="another sparsifier"):
        dstlib.sparsify(model, sparsity=0.5, method="static")
    first.detach()
    dstlib.sparsify(model, sparsity=0.5, method="static")


def test_a_forgotten_model_is_freed():
    import gc
    import weakref

    model = nn.Linear(10, 10)
    dstlib.sparsify(model, sparsity=0.5, method="static")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    alive = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_kernel_granularity_on_a_linear_layer_is_unstructured():
    method = replace(dstlib.STATIC, granularity=Kernel())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dstlib.sparsify(nn.Linear(10, 10), sparsity=0.8, method=method).density == 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": "0.9"}, r"sparsity of sparsify\(\): expected a number in \[0, 1\), got '0.9'"),
        ({"include": None}, "include of sparsify"),
        ({"exclude": [1]}, "exclude of sparsify"),
        ({"overrides": ["0"]}, "overrides of sparsify"),
        ({"seed": None}, "seed of sparsify"),
        ({"method": ["rigl"]}, "method of sparsify"),
        ({"method": "rigl", "total_steps": "1000"}, "total_steps of sparsify"),
        ({"method": "rigl", "total_steps": 1e4}, "total_steps of sparsify"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_one_message(settings, message):
    with pytest.raises(SettingError, match=message):
        dstlib.sparsify(nn.Linear(10, 10), **{"sparsity": 0.5, "method": "static", **settings})


def test_what_is_no_module_is_refused():
    with pytest.raises(SettingError, match="model of sparsify"):
        dstlib.sparsify(nn.Linear(4, 4).state_dict(), sparsity=0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"drop": "magnitude"},
        {"drop_fraction": 0.3},
        {"granularity": Kernel},
        {"granularity": "channel"},
        {"distribution": "erk"},
        {"interval": 2.5},
        {"interval": 0},
    ],
    ids=str,
)
def test_a_method_of_wrong_parts_is_refused_when_it_is_made(fields):
    with pytest.raises(SettingError, match=f"{next(iter(fields))} of method rigl"):
        replace(RIGL, **fields)


def test_a_ramp_beyond_its_ends_is_refused():
    method = replace(dstlib.GMP, ramp=lambda progress: 2.0)
    with pytest.raises(SettingError, match="ramp of method gmp"):
        dstlib.sparsify(nn.Linear(10, 10), sparsity=0.5, method=method, total_steps=1000)


def test_a_criterion_that_returns_no_tensor_is_named():
    method = replace(dstlib.STATIC, init=lambda site: None)
    with pytest.raises(dstlib.ScoreError, match=r"weight at step 0: scores .*tensor of shape \(10, 10\), got NoneType"):
        dstlib.sparsify(nn.Linear(10, 10), sparsity=0.5, method=method)


def test_gates_and_attention_parts_compete_for_themselves():
    method = replace(dstlib.STATIC, init=dstlib.masking.magnitude, distribution=uniform)
    lstm = nn.LSTM(6, 5)
    with torch.no_grad():
        lstm.weight_ih_l0[:5] *= 0.01
    masks = dstlib.sparsify(lstm, sparsity=0.5, method=method, include="weight_ih_l0").masks
    assert masks["weight_ih_l0"].view(4, 30).sum(dim=1).tolist() == [15] * 4


def parts(model, **kwargs):
    """Of each sparse weight that is several matrices: their names and rows."""
    weights = select(model, **kwargs)
    return {w.name: {s.name: s.rows for s in w.views} for w in weights if len(w.views) > 1 and not w.reason}


class Attention(nn.Module):
    """Of one head, with a fused projection of any name: (B, N, width) → (B, N, width)."""

    def __init__(self, name="qkv", width=8):
        super().__init__()
        self.fused = name
        self.add_module(name, nn.Linear(width, 3 * width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.get_submodule(self.fused)(x).chunk(3, dim=-1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("name", ["qkv", "to_qkv", "in_proj", "qkv_proj", "Wqkv", "c_attn", "W_pack"])
def test_fused_projections_are_three_matrices_by_themselves(name):
    found = parts(nn.Sequential(Attention(name)))
    rows = {"q": (0, 8), "k": (8, 16), "v": (16, 24)}
    assert found == {f"0.{name}.weight": {f"0.{name}.weight.{part}": span for part, span in rows.items()}}


def test_other_layers_stay_joint():
    model = nn.ModuleDict(
        {
            "grouped": nn.ModuleDict({"qkv": nn.Linear(8, 16)}),  # 8 queries, 4 keys, 4 values
            "mlp": nn.Linear(8, 24),
            "neox": Attention("query_key_value"),  # its rows alternate between the three, head by head
            "conv": nn.ModuleDict({"qkv": nn.Conv1d(8, 24, 1)}),
            "cross": nn.ModuleDict({"kv": nn.Linear(8, 16), "to_kv": nn.Linear(4, 16)}),
            "scores": nn.ModuleDict({"qk": nn.Linear(8, 16)}),
        }
    )
    found = parts(model)
    assert {name: [view.rpartition(".")[2] for view in views] for name, views in found.items()} == {
        "cross.kv.weight": ["k", "v"],
        "scores.qk.weight": ["q", "k"],
    }


class Heads(nn.Module):
    """Says of its heads what attention modules say, and holds one fused projection."""

    def __init__(self, num_rows, name="qkv_proj", width=8, **numbers):
        super().__init__()
        self.add_module(name, nn.Linear(width, num_rows))
        for key, number in numbers.items():
            setattr(self, key, number)


@pytest.mark.parametrize(
    ("owner", "heights"),
    [
        (Heads(16, head_dim=2, num_heads=4, num_kv_heads=2), [8, 4, 4]),
        (Heads(16, head_dim=2, num_key_value_heads=2), [8, 4, 4]),
        (Heads(12, head_dim=2, num_attention_heads=4, kv_heads=1), [8, 2, 2]),
        (Heads(36, head_dim=3, num_heads=4), [12, 12, 12]),
        (Heads(20, name="in_proj_qkv", key_dim=6, value_dim=8), [6, 6, 8]),
        (Heads(16, head_dim=2, num_heads=3, num_kv_heads=2), None),
        (Heads(16, head_dim=2), None),
        (Heads(17, head_dim=2, num_heads=4, num_kv_heads=2), None),
        (Heads(18, head_dim=2, num_kv_heads=2), None),
        (Heads(16, name="mlp", head_dim=2, num_heads=4, num_kv_heads=2), None),
    ],
)
def test_grouped_queries_keys_and_values_are_of_their_own_heights(owner, heights):
    (found,) = parts(owner).values() or [None]
    if heights is None:
        assert found is None
    else:
        assert [last - first for first, last in found.values()] == heights
        assert [first for first, _ in found.values()] == [0, heights[0], heights[0] + heights[1]]


def rows_of(owner):
    """Of each part of the only weight, the rows that it holds."""
    (weight,) = select(owner)
    numbers = torch.arange(weight.parameter.shape[0])[:, None].expand_as(weight.parameter)
    return {view.name.rpartition(".")[2]: view.of(numbers)[:, 0].tolist() for view in weight.views}


def owned(kind, *args, **numbers):
    return type(kind, (Heads,), {"__module__": "transformers.models.some.modeling_some"})(*args, **numbers)


def test_rows_that_alternate_head_by_head_are_of_the_part_that_they_feed():
    neox = owned("GPTNeoXAttention", 12, name="query_key_value", head_size=2)
    assert rows_of(neox) == {"q": [0, 1, 6, 7], "k": [2, 3, 8, 9], "v": [4, 5, 10, 11]}
    falcon = owned("FalconAttention", 16, name="query_key_value", head_dim=2, num_heads=4, num_kv_heads=2)
    assert rows_of(falcon) == {"q": [0, 1, 2, 3, 8, 9, 10, 11], "k": [4, 5, 12, 13], "v": [6, 7, 14, 15]}
    of_one = owned("FalconAttention", 12, name="query_key_value", head_dim=2, num_heads=4, num_kv_heads=1)
    assert rows_of(of_one) == {"q": list(range(8)), "k": [8, 9], "v": [10, 11]}
    code_gen = owned("CodeGenAttention", 24, num_attention_heads=8, head_dim=1)
    assert rows_of(code_gen)["v"] == [2, 3, 8, 9, 14, 15, 20, 21]
    delta = owned(
        "Qwen3NextGatedDeltaNet", 24, "in_proj_qkvz", head_k_dim=2, head_v_dim=1, num_k_heads=2, num_v_heads=8
    )
    assert rows_of(delta)["v"] == [4, 5, 6, 7, 16, 17, 18, 19]
    assert parts(nn.Sequential(torch.compile(Attention())))["0.qkv.weight"]


def test_a_matrix_of_alternating_rows_is_written_through():
    neox = owned("GPTNeoXAttention", 12, name="query_key_value", head_size=2)
    (weight,) = select(neox)
    whole = torch.zeros(12, 8)
    for number, view in enumerate(weight.views, start=1):
        view.write(whole, torch.full_like(view.of(whole), number))
    assert whole[:, 0].tolist() == [1, 1, 2, 2, 3, 3] * 2


def test_a_state_of_joint_parts_says_how_it_is_loaded():
    """As builds saved them that knew no alternating rows."""
    torch.manual_seed(0)
    joint, apart, again = (owned("GPTNeoXAttention", 24, name="query_key_value", head_size=2) for _ in range(3))
    asked = {"sparsity": 0.5, "method": "static"}
    saved = dstlib.sparsify(joint, **asked, split={"query_key_value": 1}).state_dict()
    sparsifier = dstlib.sparsify(apart, **asked)
    apart.load_state_dict(joint.state_dict())
    with pytest.raises(dstlib.StateError, match=r"one matrix then, with split=\{\"query_key_value.weight\": 1\}"):
        sparsifier.load_state_dict(saved)
    sparsifier = dstlib.sparsify(again, **asked, split={"query_key_value.weight": 1})
    again.load_state_dict(joint.state_dict())
    sparsifier.load_state_dict(saved)
    assert torch.equal(sparsifier.masks["query_key_value.weight"], saved_mask(saved))


def saved_mask(state):
    (weight,) = state["weights"].values()
    return weight["mask"]


def test_zeros_of_alternating_rows_are_kept():
    neox = owned("GPTNeoXAttention", 24, name="query_key_value", head_size=2)
    rest = torch.zeros(24, 8, dtype=torch.bool)
    rest[:, ::2] = True
    with torch.no_grad():
        neox.query_key_value.weight.mul_(rest)
    method = replace(dstlib.STATIC, distribution=uniform)
    assert torch.equal(next(iter(dstlib.sparsify(neox, sparsity=0.5, method=method).masks.values())), rest)


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rigl", "topkast", "srigl", "dsr", "mest", "srste"])
def test_alternating_parts_train_with_the_counts_of_parts_that_lie_one_above_the_other(method, optimizer):
    """The same numbers in another order: all that is chosen, and all that comes of it, is the same, row by row."""
    torch.manual_seed(0)
    order = torch.tensor([0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11])  # of the stacked rows, in the order of the heads
    alternating = owned("GPTNeoXAttention", 12, head_size=2)
    above = owned("Attention", 12, head_dim=2, num_heads=2)
    with torch.no_grad():
        for mine, theirs in zip(above.parameters(), alternating.parameters(), strict=True):
            mine.copy_(theirs[order])
    masks, weights = [], []
    for owner, rows in ((alternating, slice(None)), (above, order)):
        stepping = OPTIMIZERS[optimizer](owner.parameters())
        chosen = replace(find_method(method), interval=1, init=dstlib.masking.magnitude)
        sparsifier = dstlib.sparsify(owner, stepping, sparsity=0.5, method=chosen, total_steps=12)
        target = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))[:, rows]
        for step in range(6):
            stepping.zero_grad()
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
            (owner.qkv_proj(x) - target).square().sum().backward()
            stepping.step()
        masks.append(sparsifier.masks["qkv_proj.weight"].clone())
        weights.append(owner.qkv_proj.weight.detach())
    assert masks[0].any()
    assert not masks[0].all()
    assert torch.equal(masks[0][order], masks[1])
    assert torch.equal(weights[0][order], weights[1])


def test_a_budget_for_all_three_starves_the_queries_and_one_each_does_not():
    """Of three matrices of scales 1 : 3 : 9, the largest fifth of all entries lies almost wholly in the third."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(width=64))
    with torch.no_grad():
        model[0].qkv.weight.normal_().view(3, 64, 64).mul_(torch.tensor([1.0, 3.0, 9.0]).view(3, 1, 1))
    method = replace(dstlib.STATIC, init=dstlib.masking.magnitude, distribution=uniform)

    def densities(**kwargs):
        sparsifier = dstlib.sparsify(copy.deepcopy(model), sparsity=0.8, method=method, **kwargs)
        mask = sparsifier.masks["0.qkv.weight"]
        return [round(share, 2) for share in mask.view(3, -1).double().mean(dim=1).tolist()]

    starved = densities(split={"*.qkv": 1})
    assert starved[0] == 0.0
    assert starved[2] > 0.5
    assert densities() == densities(split={"*.qkv": 3}) == [0.2, 0.2, 0.2]


def test_each_part_keeps_its_density_over_updates():
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = replace(RIGL, interval=1, distribution=uniform)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=12, split={"1": 2})
    assert set(sparsifier.plan.densities) == {
        *(f"0.qkv.weight.{part}" for part in "qkv"),
        "0.proj.weight",
        "1.weight.0",
        "1.weight.1",
    }
    before = sparsifier.masks["0.qkv.weight"].clone()
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        assert sparsifier.masks["0.qkv.weight"].view(3, 64).sum(dim=1).tolist() == [32] * 3
        assert sparsifier.masks["1.weight"].sum(dim=1).tolist() == [4, 4]
    assert not torch.equal(before, sparsifier.masks["0.qkv.weight"])
    assert_zero_outside(model, sparsifier.masks, optimizer)


def test_split_by_globs_of_which_the_last_wins():
    model = nn.ModuleDict({"gate_up": nn.Linear(4, 6), "conv": nn.Conv2d(2, 6, 3), "attn": Attention()})
    assert parts(model, split={"gate_up": 2, "conv": 3}) == {
        "gate_up.weight": {"gate_up.weight.0": (0, 3), "gate_up.weight.1": (3, 6)},
        "conv.weight": {"conv.weight.0": (0, 2), "conv.weight.1": (2, 4), "conv.weight.2": (4, 6)},
        "attn.qkv.weight": {f"attn.qkv.weight.{part}": (8 * i, 8 * i + 8) for i, part in enumerate("qkv")},
    }
    assert parts(model, split={"attn.*": 2, "*.qkv": 1}).keys() == {"attn.proj.weight"}
    assert parts(model, split={"*.qkv": 6})["attn.qkv.weight"]["attn.qkv.weight.5"] == (20, 24)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"heads": 2}, r"glob 'heads' of the sparse weights, by split=: expected a match"),
        ({"embed": 2}, r"glob 'embed' of the sparse weights, by split="),
        ({"head": 3}, r"split 'head' of head\.weight: expected a divisor of its 10 rows, got 3"),
        ({"head": 0}, r"split 'head' of head\.weight: expected a divisor of its 10 rows, got 0"),
        ({"head": 20}, r"divisor of its 10 rows, got 20"),
        ({"head": 2.0}, r"divisor of its 10 rows, got 2\.0"),
        ({"head": True}, r"divisor of its 10 rows, got True"),
        ({"up": 2}, r"split 'up' of up\.weight: expected no split, as ConvTranspose3d is 1 matrix by its making"),
        ({"attention": 1}, r"expected no split, as MultiheadAttention is 3 matrices by its making, got 1"),
        ({"rnn": 2}, r"expected no split, as LSTM is 4 matrices by its making, got 2"),
    ],
    ids=str,
)
def test_a_split_that_cannot_be_is_refused(split, message):
    with pytest.raises(SelectionError, match=message):
        select(Zoo(), include=("*", "rnn"), split=split)


def test_overlapping_weights_are_left_dense():
    """As in autoencoders that tie by a view: a mask of the one would be written through to the other."""
    model = nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 6), "conv": nn.Conv2d(6, 4, 1)})
    model["decoder"].weight = nn.Parameter(model["encoder"].weight.data.t())
    model["head"] = nn.Linear(4, 2)
    found = reasons(model)
    assert found["decoder.weight"].startswith("a view of the memory of encoder.weight")
    assert found["encoder.weight"].startswith("a view of the memory of decoder.weight")
    assert found["conv.weight"] == found["head.weight"] == ""
    model["conv"].weight = nn.Parameter(model["encoder"].weight.data.view(4, 6, 1, 1))
    assert "a view of the memory" in reasons(model)["conv.weight"]
    with pytest.raises(SelectionError, match="a view of the memory"):
        select(model, include=("encoder",))


def test_neighbours_in_one_buffer_are_not_overlapping():
    flat = torch.zeros(40)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    for i, layer in enumerate(model):
        layer.weight = nn.Parameter(flat[20 * i : 20 * (i + 1)].view_as(layer.weight))
    assert reasons(model) == {"0.weight": "", "1.weight": ""}


def test_a_tied_weight_is_asked_for_by_any_of_its_names():
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1, groups=4), "b": nn.Linear(4, 4), "c": nn.Conv2d(4, 4, 1, groups=4)})
    model["c"].weight = model["a"].weight
    assert reasons(model, include=("b", "c"))["a.weight"] == ""
    model["table"] = nn.ParameterDict({"raw": model["b"].weight})
    assert reasons(model, include=("a",))["b.weight"] == "not included"
    assert reasons(model, include=("*", "a"))["b.weight"].startswith("tied to table.raw, raw parameter")
    assert reasons(model, include=("*", "table.raw"))["b.weight"] == ""


def test_a_module_or_a_parameter_under_two_names_counts_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert reasons(model) == {"a.weight": ""}
    assert reasons(model, include=("b.weight",)) == {"a.weight": ""}
    model["head"] = nn.Linear(4, 2)
    assert reasons(model, exclude=("b",)) == {"a.weight": "excluded", "head.weight": ""}


def test_raw_parameters_are_asked_for_by_their_own_name_only():
    model = nn.Sequential(Zoo())
    assert reasons(model, include=("*", "0.position"))["0.position"] == ""
    assert reasons(model, include=("*", "0.pos*"))["0.position"] != "", "a glob is no request"
    with pytest.raises(SelectionError, match=r"weight of 0\.position.*raw parameter of Zoo"):
        select(model, include=("*", "0"))


@pytest.mark.parametrize(("granularity", "expected"), [(FanIn(), (8, 18)), (Kernel(), (32, 9))], ids=str)
def test_grouped_convolutions_count_their_own_inputs(granularity, expected):
    """8 outputs of 4 inputs each, as 2 groups; taps 3×3."""
    conv = nn.Conv2d(8, 8, 3, groups=2)
    method = replace(dstlib.STATIC, granularity=granularity, distribution=uniform)
    mask = dstlib.sparsify(conv, sparsity=0.5, method=method).masks["weight"]
    assert mask.shape == (8, 4, 3, 3)
    if isinstance(granularity, FanIn):
        assert mask.sum(dim=(1, 2, 3)).tolist() == [expected[1]] * expected[0]
    else:
        assert set(mask.sum(dim=(2, 3)).flatten().tolist()) == {0, expected[1]}
        assert int(mask.any(dim=(2, 3)).sum()) == expected[0] // 2


def test_bilinear_is_a_matrix_for_each_output_on_request():
    model = nn.Bilinear(3, 4, 5)
    assert reasons(model, include=("weight",)) == {"weight": ""}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(RIGL, interval=1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, include="weight", total_steps=4)
    for _ in range(2):
        model(torch.ones(2, 3), torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert int(sparsifier.masks["weight"].sum()) == 30
    assert_zero_outside(model, sparsifier.masks, optimizer)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_are_refused_by_name(kind):
    model = nn.ModuleDict({"table": kind(10, 4), "head": nn.Linear(4, 2)})
    assert reasons(model)["table.weight"] == f"weight of {kind.__name__}: no weight of Linear, Conv or attention"
    with pytest.raises(SelectionError, match=kind.__name__):
        select(model, include=("table",))

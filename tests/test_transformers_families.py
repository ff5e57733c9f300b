"""Every family of the transformer library: sparse weights lie as its own forward multiplies by them, or stay dense.

What a forward does with a weight is read off its operators, entry by entry (``forward_roles``), so that a name, a type
or a flag that says otherwise is found out. What no forward here comes to is a layer of torch, of torch's own forward,
whose weight nothing else takes; or one of a kind that another family's forward came to.
"""

import inspect
import re
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from forward_roles import Roles, attention_rows, disagreement
from torch import nn

from dstlib import SelectionError
from dstlib.targets import select

transformers = pytest.importorskip("transformers")

import small_transformers  # noqa: E402  (it is the library that may be missing)

TORCH_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.MultiheadAttention,
)
REASONS = re.compile(
    r"(tied to [\w.]+, )?("
    r"(depthwise|recurrent|bilinear|grouped transposed convolution|raw parameter of \w+|low-rank factor, whose zeros "
    r"leave the product dense): sparse only if included by name"
    r"|[\w.]+ of \w+: no weight of Linear, Conv or attention"
    r"|\w+ is computed from it at each forward, by [\w ]+"
    r"|its forward standardises the weight, which would undo the zeros"
    r"|frozen \(requires_grad is False\)|empty)"
)
KEEP_ZEROS = {"div_", "mul_"}  # in place, as RWKV scales its layers for inference
MADE_BY = re.compile("init|reset|resize")
# Of a dozen families every weight is reached: one for each way in which matrices lie.
DOZEN = (
    *("bert", "convbert", "deberta", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "mixtral", "mobilebert"),
    *("phi3", "qwen3_next", "t5", "vit"),
)
SMALLEST = ((64, 2), (16, 2))
# Whose queries, keys and values are in one layer, and how they lie in it.
FUSED = ("bloom", "codegen", "deberta", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "modernbert", "persimmon", "phi3")
# Those whose models are not to be had here, and why.
NO_PACKAGE = "of a package that need not be here"
NO_DEFAULT = "its configuration leaves open what its model needs, or contradicts it"
NOT_BUILT = {
    **dict.fromkeys(["dinat", "higgs_audio_v2_tokenizer", "layoutlmv2", "layoutxlm"], NO_PACKAGE),
    **dict.fromkeys(
        [
            "aya_vision",
            "chameleon",
            "cohere_compass",
            "cohere_compass_text",
            "deepseek_ocr2",
            "deepseek_ocr2_text",
            "diffusion_gemma",
            "diffusion_gemma_text",
            "emu3",
            "gemma4_assistant",
            "granite4_vision",
            "moonshine_streaming",
            "perception_lm",
            "pp_ocrv5_server_det",
            "pp_ocrv6_medium_det",
            "qwen3_omni_moe",
            "qwen3_omni_moe_talker_text",
            "t5gemma2_decoder",
            "t5gemma2_encoder",
            "t5gemma2_text",
            "timm_backbone",
        ],
        NO_DEFAULT,
    ),
}


@dataclass
class Examined:
    """What one family's forward says of its sparse weights, by name: where it contradicts, and what it left alone.

    A ``kind`` is a layer's class, or that of its owner with its name in it: ``GPT2Attention.c_attn``.
    """

    wrong: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    unreached: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    is_whole: bool = False


def kind_of(model, name):
    layer, _, key = name.rpartition(".")
    owner, _, child = layer.rpartition(".")
    return f"{type(model.get_submodule(owner)).__name__}.{re.sub(r'^[0-9]+$', '*', child)}.{key}"


@cache
def source_of(cls):
    """The code of a class, but for what makes it, its first weights, and a larger vocabulary."""
    methods = {name: method for name, method in vars(cls).items() if inspect.isfunction(method)}
    code = "".join(inspect.getsource(method) for name, method in methods.items() if not MADE_BY.search(name))
    return re.sub(r"isinstance\(self\.\w+\.weight, torch\.Tensor\)", "", code)


def is_plain(model, name):
    """Whether a weight is one of torch's layers, which multiplies by it itself, and no owner of it takes it by name."""
    layer_name, _, _ = name.rpartition(".")
    owner_name, _, child = layer_name.rpartition(".")
    layer, owner = model.get_submodule(layer_name), model.get_submodule(owner_name)
    if type(layer).__module__.startswith("timm."):
        return True  # which tests/test_timm.py looks at
    is_torch = any(type(layer).forward is cls.forward for cls in TORCH_LAYERS) and isinstance(layer, TORCH_LAYERS)
    mine = [cls for cls in type(owner).__mro__ if cls.__module__.startswith("transformers.models")]
    taken = re.compile(rf"\.{re.escape(child)}\.weight\b(?!\.(dtype|device))")
    return is_torch and not any(taken.search(source_of(cls)) for cls in mine)


def call_alone(layer):
    """Calls a layer by itself, or stacked experts with what a router gives them, at the first width that it takes."""
    widths = {width for p in layer._parameters.values() if p is not None for width in p.shape}
    routed = torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.full((3, 2), 0.5)
    stacked = max(p.shape[0] for p in layer._parameters.values() if p is not None)
    for width in sorted(widths):
        rows = torch.randn(3, width)
        shapes = (2, 3, width), (2, stacked, width), (2, width, 9)
        for inputs in ((rows,), (rows, *routed), *((torch.randn(shape),) for shape in shapes)):
            try:
                layer(*inputs)
            except Exception:  # another width, or it is called otherwise
                continue
            return


def examine(name, *scales):
    """Examines the family at the first scale at which its forward runs to its end, or at all, or without data."""
    found = None
    for model in small_transformers.builds(name, *scales):
        try:
            weights = select(model)
        except SelectionError:
            weights = ()
        roles = Roles({n: p for n, p in model.named_parameters() if p.ndim >= 2 and not p.is_meta})
        here = Examined()
        if not next(model.parameters()).is_meta:
            try:
                with torch.no_grad(), roles:
                    model(**small_transformers.inputs(model))
                here.is_whole = True
            except Exception:  # the guessed inputs were not those: what ran until then counts
                here.is_whole = False
            left = [w.name for w in weights if not w.reason and w.name not in roles.uses]
            layers = {n.rpartition(".")[0] for n in left if not is_plain(model, n)}
            with torch.no_grad(), roles:
                for layer in layers:
                    call_alone(model.get_submodule(layer))
        for weight in weights:
            if weight.reason:
                here.unknown += [f"{weight.name}: {weight.reason}"] if not REASONS.fullmatch(weight.reason) else []
            elif uses := roles.uses.get(weight.name):
                here.reached.add(kind_of(model, weight.name))
                said = {said for use in uses if (said := disagreement(weight.views, weight.parameter, use))}
                said |= {f"taken by {operator}" for operator in roles.others.get(weight.name, set()) - KEEP_ZEROS}
                here.wrong |= {weight.name: "; ".join(sorted(said))} if said else {}
            elif not is_plain(model, weight.name):
                here.unreached[weight.name] = kind_of(model, weight.name)
        if found is None or len(here.reached) > len(found.reached):
            found = here
        if here.is_whole:
            return here
    return found


@pytest.mark.parametrize("name", DOZEN)
def test_sparse_weights_lie_as_the_forward_multiplies_by_them(name):
    found = examine(name, *SMALLEST)
    assert found.is_whole
    assert found.reached
    assert not found.wrong
    assert not found.unreached
    assert not found.unknown


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("gpt2", "transformer.h.0.attn.c_proj.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("bert", "bert.encoder.layer.0.attention.self.query.weight"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("mobilebert", "cls.predictions.dense.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight"),
    ],
)
def test_a_matrix_turned_the_wrong_way_is_found_out(name, weight):
    """Whether it is square or not, alone or one of several, wherever in it."""
    model = next(small_transformers.builds(name, *SMALLEST))
    (sparse,) = [w for w in select(model) if w.name == weight]
    roles = Roles({n: p for n, p in model.named_parameters() if p.ndim >= 2})
    with torch.no_grad(), roles:
        model(**small_transformers.inputs(model))
    uses = roles.uses[weight]
    assert uses
    assert not any(disagreement(sparse.views, sparse.parameter, use) for use in uses)
    turned = [replace(view, transposed=not view.transposed, rows=None, every=None) for view in sparse.views]
    if len({view.at for view in turned}) == 1:
        turned = turned[:1]
    assert any(disagreement(turned, sparse.parameter, use) for use in uses)
    if sparse.views[0].at:  # matrices taken along another axis
        moved = [replace(view, at=(None, *view.at[:2])) for view in sparse.views[: sparse.parameter.shape[1]]]
        assert any(disagreement(moved, sparse.parameter, use) for use in uses)


def falcon(**settings):
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_attention_heads": 12, "num_hidden_layers": 2}
    config = transformers.FalconConfig(**sizes, **settings)
    config._attn_implementation = "eager"
    return transformers.FalconForCausalLM(config).eval()


def big_code():
    sizes = {"vocab_size": 99, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 32}
    config = transformers.GPTBigCodeConfig(**sizes, multi_query=False, attn_implementation="eager")
    return transformers.GPTBigCodeForCausalLM(config).eval()


OTHERS = {
    "falcon, a key for each three queries": lambda: falcon(new_decoder_architecture=True, num_kv_heads=4),
    "falcon, a key for each query": lambda: falcon(multi_query=False),
    "big code, a key for each query": big_code,
}


@pytest.mark.parametrize("name", [*FUSED, *OTHERS])
def test_queries_keys_and_values_are_the_rows_that_attention_takes_for_them(name):
    model = OTHERS[name]() if name in OTHERS else next(small_transformers.builds(name))
    fused = {w.name.rpartition(".")[0]: w for w in select(model) if not w.reason and w.views[0].name.endswith(".q")}
    assert fused
    inputs = small_transformers.inputs(model)
    everywhere, values = (attention_rows(model, inputs, list(fused), softmax=softmax) for softmax in (True, False))
    for layer, weight in fused.items():
        rows = torch.arange(len(everywhere[layer]))
        outputs = 1 if weight.views[0].transposed else 0
        numbers = rows.view([-1 if axis == outputs else 1 for axis in range(2)]).expand(weight.parameter.shape)
        parts = {view.name.rpartition(".")[2]: view.of(numbers)[:, 0] for view in weight.views}
        assert set(parts) == {"q", "k", "v"}
        assert (everywhere[layer][parts["q"]] == 1).all(), layer
        assert (everywhere[layer][parts["k"]] > 1).all(), layer
        assert (values[layer][parts["v"]] > 1).all(), layer
        assert not values[layer][torch.cat([parts["q"], parts["k"]])].any(), layer


@pytest.mark.long
def test_every_family_is_selected_rightly_or_refused_with_the_reason():
    found = {name: examine(name) for name in small_transformers.families()}
    missing = {n for n, examined in found.items() if examined is None and small_transformers.classes(n)[1]}
    reached = set().union(*(examined.reached for examined in found.values() if examined))
    assert missing <= set(NOT_BUILT), "new ones: fill in what is left open"
    wrong = {name: examined.wrong for name, examined in found.items() if examined and examined.wrong}
    unknown = {name: examined.unknown for name, examined in found.items() if examined and examined.unknown}
    alone = {
        name: left
        for name, examined in found.items()
        if examined and (left := {n for n, kind in examined.unreached.items() if kind not in reached})
    }
    num_whole = sum(examined.is_whole for examined in found.values() if examined)
    assert (wrong, unknown, alone) == ({}, {}, {})
    assert num_whole >= 400

"""A decoder as large language models are: grouped queries, stacked experts; made sparse by each kind of method."""

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from models import assert_zero_outside

import dstlib
from dstlib import NM, Block, uniform
from dstlib.methods import find_method
from dstlib.schedules import Constant

transformers = pytest.importorskip("transformers")

DECODERS = {  # of the experts of the first, inputs are the last axis; of those of the second, outputs
    "Mixtral": ("e o i -> e o i", "o i -> 1 o i"),
    "GptOss": ("e i o -> e o i", "o i -> 1 o i"),
}
METHODS = {
    "rigl": (find_method("rigl"), 0.95),
    "srigl": (find_method("srigl"), 0.95),
    "2:4": (  # half of its two, as 0.3 of them would be none
        replace(find_method("rigl"), granularity=NM(2, 4), distribution=uniform, drop_fraction=Constant(0.5)),
        0.5,
    ),
    "2:4 of dense storage": (find_method("srste"), 0.5),
    "blocks": (replace(find_method("rigl"), granularity=Block(4, 8)), 0.95),
}


def decoder(kind, *, layers, width, experts, vocabulary):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=width // 8,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def train(model, method, sparsity, steps, vocabulary):
    """A user's loop; dstlib is two of its lines, the import and the call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=sparsity, method=method, total_steps=4 * steps)
    generator = torch.Generator().manual_seed(0)
    moved = [0]
    sparsifier.observers.append(lambda site, update: moved.append(int(update.grown.sum())))
    for _ in range(steps):
        tokens = torch.randint(vocabulary, (2, 16), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier, optimizer, sum(moved)


def assert_exact(sparsifier, method, orders):
    """Counts along the outputs and the inputs of each matrix, which are told here by the names of the library."""
    for name, mask in sparsifier.masks.items():
        matrices = rearrange(mask, orders[0] if mask.ndim == 3 else orders[1])
        for number, (view, matrix) in enumerate(zip(sparsifier_views(sparsifier, name), matrices, strict=True)):
            where = f"{name}, matrix {number}"
            planned = round(sparsifier.plan.densities[view.name] * matrix.numel())
            if isinstance(method.granularity, NM):
                assert (rearrange(matrix, "o (i m) -> o i m", m=4).sum(dim=-1) == 2).all(), where
            elif isinstance(method.granularity, Block):
                blocks = rearrange(matrix, "(o p) (i q) -> (o i) (p q)", p=4, q=8).sum(dim=1)
                assert set(blocks.tolist()) <= {0, 32}, where
                assert int((blocks > 0).sum()) == max(round(planned / 32), 1), where
            elif method.name == "srigl":
                fan_in = matrix.sum(dim=1)
                assert len(fan_in[fan_in > 0].unique()) == 1, where
                assert 0 < int(fan_in.sum()) <= planned + len(matrix) // 2, where
            else:
                assert int(matrix.sum()) == planned, where


def sparsifier_views(sparsifier, name):
    return next(weight.views for weight in sparsifier.weights if weight.name == name)


def check(kind, method, sparsity, *, steps, vocabulary, **sizes):
    method = replace(method, interval=max(steps // 3, 1)) if method.interval else method
    model = decoder(kind, vocabulary=vocabulary, **sizes)
    names = {name for name, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in name}
    sparsifier, optimizer, num_moved = train(model, method, sparsity, steps, vocabulary)
    assert set(sparsifier.masks) == {
        name for name in names if not name.endswith(("gate.weight", "router.weight", "_bias"))
    }
    assert num_moved > 0
    assert_exact(sparsifier, method, DECODERS[kind])
    assert_zero_outside(model, sparsifier.masks, *([optimizer] if method.storage is None else []))
    return sparsifier


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_small_decoder_keeps_its_counts_along_the_right_axes(kind, name):
    method, sparsity = METHODS[name]
    check(kind, method, sparsity, steps=4, vocabulary=32, layers=1, width=64, experts=3)


@pytest.mark.filterwarnings("error:.*nothing shows whether the model's outputs")
@pytest.mark.parametrize("kind", DECODERS)
def test_the_head_of_a_decoder_is_found_to_be_its_only_output(kind):
    model = decoder(kind, layers=2, width=64, vocabulary=300, experts=3)
    sparsifier, _, _ = train(model, replace(find_method("srigl"), interval=2), 0.9, 3, 300)
    assert [m.weight.name for m in sparsifier._masked if m.is_output] == ["lm_head.weight"]


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_of_ten_million_weights_keeps_its_counts_along_the_right_axes(kind, name):
    method, sparsity = METHODS[name]
    sparsifier = check(kind, method, sparsity, steps=6, vocabulary=1024, layers=12, width=128, experts=8)
    num_all = sum(mask.numel() for mask in sparsifier.masks.values())
    num_active = sum(int(mask.sum()) for mask in sparsifier.masks.values())
    assert num_all >= 10_000_000
    if name == "rigl":
        assert num_active == num_all - int(sparsity * num_all)

"""nnFormer against its published counts, and its window attention against what it is defined to be."""

import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dstlib
from dstlib.zoo.e2enet import AMOS
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.baselines.nnformer import DropPath, WindowAttention
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

SIZE = (12, 20, 36)


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    given = {"in_channels": 1, "num_classes": 3, "patch_size": SIZE, "config": AMOS, "width": 1 / 32} | changes
    return build_model("nnformer", **given)


# ---- counts ----


def test_parameters_are_the_published_ones() -> None:
    """150.14 M; for FLOPs see test_baselines."""
    with torch.device("meta"):
        network = tiny(num_classes=16, patch_size=(128, 128, 128), width=1)
    assert sum(p.numel() for p in network.parameters()) == 150_140_232


def test_exact_flops_are_those_of_the_layers_and_of_the_products_of_attention() -> None:
    with torch.device("meta"):
        network = tiny(num_classes=16, patch_size=(128, 128, 128), width=1)
    assert round(dstlib.profile(network, (1, 1, 128, 128, 128)).flops / 1e6) == 831_037 + 22_649


def test_parameters_do_not_depend_on_the_patch() -> None:
    """Windows are clipped, their table of biases is not: what was trained on one size runs on every other."""
    network, other = tiny(), tiny(patch_size=(40, 56, 40))
    network.load_state_dict(other.state_dict())


# ---- attention ----


def reference(layer: WindowAttention, x: Tensor, source: Tensor) -> Tensor:
    """Attention of all voxels to all, those of other windows left out: by the definition, one pair at a time."""
    size = x.shape[1:4]
    places = torch.cartesian_prod(*[torch.arange(extent) for extent in size]).view(-1, 3)
    windows = torch.tensor([min(layer.window, extent) for extent in size])
    is_shifted = layer.is_shifted & (windows < torch.tensor(size))
    cells = torch.floor_divide(places - is_shifted * (windows // 2), windows)
    together = (cells[:, None] == cells).all(dim=-1)
    apart = places[:, None] - places + layer.window - 1
    side = 2 * layer.window - 1
    inside = ((apart >= 0) & (apart < side)).all(dim=-1)
    number = (apart[..., 0] * side + apart[..., 1]) * side + apart[..., 2]
    bias = layer.bias_table[torch.where(inside, number, 0)].permute(2, 0, 1)
    flat, heads = x.flatten(1, 3), layer.num_heads
    parts = layer.inputs(flat if layer.has_queries else source.flatten(1, 3)).chunk(3 if layer.has_queries else 2, -1)
    query, key, value = (
        rearrange(part, "b n (heads c) -> b heads n c", heads=heads)
        for part in (parts if layer.has_queries else (flat, *parts))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
    attended = scores.masked_fill(~together, float("-inf")).softmax(dim=-1) @ value
    return layer.output(rearrange(attended, "b heads n c -> b n (heads c)")).unflatten(1, size)


@given(
    size=st.tuples(*[st.integers(1, 7)] * 3),
    window=st.integers(1, 4),
    is_shifted=st.booleans(),
    has_queries=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_voxels_attend_to_those_of_their_window(
    size: tuple[int, int, int], window: int, is_shifted: bool, has_queries: bool
) -> None:
    torch.manual_seed(0)
    layer = WindowAttention(4, heads=2, window=window, is_shifted=is_shifted, has_queries=has_queries)
    nn.init.normal_(layer.bias_table)
    x, source = torch.randn(2, 2, *size, 4)
    source = x if has_queries else source
    # the same sums in another order
    assert torch.allclose(layer(x, source), reference(layer, x, source), atol=1e-5)


def test_a_branch_is_left_out_for_some_images_and_kept_in_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 1, 1, 1)
    y = drop(x)
    assert torch.equal(y.unique(), torch.tensor([0, 4 / 3]))
    assert torch.equal(y[:, 0], y[:, 1])  # whole images
    assert float(y.mean()) == pytest.approx(1, abs=0.04)  # four standard errors of 4000 draws
    assert torch.equal(drop.eval()(x), x)


def test_rates_grow_along_encoder_and_decoder() -> None:
    host = tiny().host
    for levels in (host.encoder, reversed(host.decoder)):
        rates = [block.drop_path.rate for level in levels for block in level.blocks]
        assert rates == sorted(rates)
        assert (rates[0], rates[-1]) == (0, 0.2)


def test_the_first_block_of_the_decoder_takes_queries_from_below_and_values_of_the_skip_connection() -> None:
    host = tiny().host
    for level in host.decoder:
        first, second = (block.attention for block in level.blocks)
        assert (first.has_queries, second.has_queries) == (False, True)
        assert first.inputs.out_features * 3 == second.inputs.out_features * 2


# ---- in the loop ----


def test_some_steps_reduce_the_loss() -> None:
    network, labels = tiny(width=1 / 16), torch.zeros(1, 1, *SIZE, dtype=torch.long)
    labels[..., 8:24] = 1
    x = labels + 0.1 * torch.randn(1, 1, *SIZE)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = deep_supervision_loss(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_bfloat16_gives_nearly_the_same_logits() -> None:
    network = tiny().eval()
    x = torch.randn(1, 1, *SIZE)
    with torch.no_grad():
        exact = network(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(x)
    for a, b in zip(exact, rough, strict=True):
        # some sixty layers, each rounded to 8 bits: percents of what the logits are
        assert float((a - b.float()).norm()) < 0.1 * float(a.norm())


@pytest.mark.parametrize("size", [(5, 13, 22), (40, 56, 40)])
def test_any_patch_size_gives_heads_of_their_strides(size: tuple[int, int, int]) -> None:
    network = tiny(patch_size=size).eval()
    with torch.no_grad():
        heads = [tuple(logits.shape[2:]) for logits in network(torch.rand(1, 1, *size))]
    assert heads == [tuple(-(-n // s) for n in size) for s in (1, 2, 4)]


def test_linear_layers_and_convolutions_are_made_sparse_and_the_biases_of_places_are_not() -> None:
    network = tiny(width=1 / 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.9, method="static")
    weights = {name for name, p in network.named_parameters() if p.ndim > 1}
    assert {name.rpartition(".")[2] for name in weights - set(sparsifier.masks)} == {"bias_table"}
    # the "paper" convention leaves the products of attention out, which have no weights
    shape, kept = (1, 1, *SIZE), (sparsifier, None)
    sparse, dense = (dstlib.profile(network, shape, sparsifier=s, convention="paper") for s in kept)
    assert sparse.flops < 0.35 * dense.flops  # small layers are denser

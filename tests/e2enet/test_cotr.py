"""CoTr against its published counts, and its deformable attention against what it is defined to be."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dstlib
from dstlib.zoo.e2enet import AMOS
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.baselines.cotr import HEADS, POINTS, DeformableAttention, centres, sines
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

SIZE = (16, 16, 32)


def tiny(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    given = {"in_channels": 1, "num_classes": 3, "patch_size": SIZE, "config": AMOS, "width": 1 / 32} | changes
    return build_model("cotr", **given)


# ---- counts ----


def test_parameters_are_the_published_ones() -> None:
    """41.87 M with the background among the classes and without; for FLOPs see test_baselines."""
    for classes, params in ((16, 41_873_920), (15, 41_873_212)):
        with torch.device("meta"):
            network = tiny(num_classes=classes, patch_size=(128, 128, 128), width=1)
        assert sum(p.numel() for p in network.parameters()) == params


def test_exact_flops_are_those_of_the_layers_and_of_the_samples() -> None:
    with torch.device("meta"):
        network = tiny(num_classes=16, patch_size=(128, 128, 128), width=1)
    profile = dstlib.profile(network, (1, 1, 128, 128, 128))
    # 2,718 M the samples: 6 layers, 9,216 tokens, 48 samples of 64 channels and 8 taps each
    assert round(profile.flops / 1e6) == 1_335_501 + 2_718


# ---- attention ----


def attention(channels: int = HEADS, levels: int = 1) -> DeformableAttention:
    """Returns an attention whose value and output are the identity, and whose offsets and weights are all 0."""
    layer = DeformableAttention(channels, levels=levels)
    for linear in (layer.offsets, layer.weights, layer.value, layer.output):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    for linear in (layer.value, layer.output):
        nn.init.eye_(linear.weight)
    return layer


@given(size=st.tuples(*[st.integers(1, 4)] * 3), step=st.tuples(*[st.integers(-2, 2)] * 3))
@settings(deadline=None, max_examples=30)
def test_an_offset_is_in_voxels_along_its_axis_and_zero_lies_outside(
    size: tuple[int, int, int], step: tuple[int, int, int]
) -> None:
    layer = attention()
    with torch.no_grad():
        layer.offsets.bias.copy_(torch.tensor(step[::-1]).float().repeat(HEADS * POINTS))
    tokens = torch.rand(2, math.prod(size), HEADS)
    found = layer(tokens, tokens, centres(size), [size]).unflatten(1, size)
    volume = tokens.unflatten(1, size)
    for place in itertools.product(*map(range, size)):
        there = [p + s for p, s in zip(place, step, strict=True)]
        inside = all(0 <= t < extent for t, extent in zip(there, size, strict=True))
        expected = volume[(slice(None), *there)] if inside else torch.zeros(2, HEADS)
        # interpolation in float32 at coordinates that are rounded
        assert torch.allclose(found[(slice(None), *place)], expected, atol=1e-5)


def test_each_voxel_sees_its_own_place_in_every_scale_by_its_weights() -> None:
    layer = attention(levels=2)
    with torch.no_grad():
        # all points of the second scale three times as likely as all of the first
        layer.weights.bias.view(HEADS, 2, POINTS)[:, 1] = math.log(3)
    fine, coarse = torch.rand(1, 2 * 2 * 4, HEADS), torch.rand(1, 1 * 1 * 2, HEADS)
    sizes = [(2, 2, 4), (1, 1, 2)]
    tokens = torch.cat([fine, coarse], dim=1)
    places = torch.cat([centres(size) for size in sizes])
    found = layer(tokens, tokens, places, sizes)
    # the middle of a coarse voxel is the corner where its eight fine ones meet
    means = fine.view(1, 2, 2, 2, 2, HEADS).mean(dim=(1, 2, 4))
    assert torch.allclose(found[:, -2:], means / 4 + coarse * 3 / 4, atol=1e-6)  # rounding


def test_heads_look_in_directions_of_their_own_at_first() -> None:
    network = tiny()
    for layer in network.host.transformer.layers:
        offsets = layer.attention.offsets.bias.view(HEADS, 2, POINTS, 3)
        assert not layer.attention.offsets.weight.any()
        assert torch.allclose(offsets[:, :, 1], 2 * offsets[:, :, 0])
        assert len({tuple(direction.tolist()) for direction in offsets[:, 0, 0]}) == HEADS
        assert torch.allclose(offsets[:, 0, 0].abs().amax(dim=-1), torch.ones(HEADS))


@given(size=st.tuples(*[st.integers(1, 9)] * 3), channels=st.sampled_from([6, 12, 24]))
@settings(deadline=None, max_examples=20)
def test_every_place_has_an_embedding_of_its_own(size: tuple[int, int, int], channels: int) -> None:
    embeddings = sines(size, channels)
    assert embeddings.shape == (math.prod(size), channels)
    apart = torch.cdist(embeddings, embeddings) + torch.eye(len(embeddings))
    # neighbours are a ninth of a turn apart in their fastest sine and cosine: 2 sin(20°) = 0.68
    assert float(apart.min()) > 0.6


# ---- in the loop ----


def loss_of(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return deep_supervision_loss(network(x), labels)


def test_some_steps_reduce_the_loss() -> None:
    network, labels = tiny(width=1 / 16), torch.zeros(1, 1, *SIZE, dtype=torch.long)
    labels[..., 8:24] = 1
    x = labels + 0.1 * torch.randn(1, 1, *SIZE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(network, x, labels)
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
        # some forty layers, each rounded to 8 bits: percents of what the logits are
        assert float((a - b.float()).norm()) < 0.1 * float(a.norm())


@pytest.mark.parametrize("size", [(10, 14, 20), (40, 56, 40)])
def test_any_patch_size_gives_heads_of_their_strides(size: tuple[int, int, int]) -> None:
    network = tiny(patch_size=size).eval()
    with torch.no_grad():
        heads = [tuple(logits.shape[2:]) for logits in network(torch.rand(1, 1, *size))]
    strides = [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    assert heads == [tuple(-(-n // s) for n, s in zip(size, stride, strict=True)) for stride in strides]


def test_linear_layers_and_convolutions_are_made_sparse_and_the_embedding_is_not() -> None:
    network = tiny(width=1 / 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.9, method="static")
    weights = {name for name, p in network.named_parameters() if p.ndim > 1}
    assert weights - set(sparsifier.masks) == {"host.transformer.level_embedding"}
    sparse, dense = (dstlib.profile(network, (1, 1, *SIZE), sparsifier=s) for s in (sparsifier, None))
    assert sparse.flops < 0.35 * dense.flops  # small layers are denser

"""MedFormer: the published size, its attention by the definition, patches of any size, bf16."""

import math

import pytest
import torch
from torch import Tensor

import dstlib
from dstlib.errors import DataError
from dstlib.zoo.e2enet import E2ENetConfig
from dstlib.zoo.e2enet.baselines import Segmenter, build_model, medformer
from dstlib.zoo.e2enet.baselines.medformer import BidirectionalAttention, Merging, SemanticMap
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

CONFIG = E2ENetConfig(channels=(8, 16), strides=((2, 2, 2),), heads=1)


def tiny(*, width: float = 1 / 16, channels: int = 1, classes: int = 3) -> Segmenter:
    torch.manual_seed(0)
    patch_size = (17, 8, 12)
    network = build_model(
        "medformer", in_channels=channels, num_classes=classes, patch_size=patch_size, config=CONFIG, width=width
    )
    assert isinstance(network, Segmenter)
    return network


def test_size_is_the_published_one() -> None:
    """39.6 M; the FLOPs are overprinted in E2ENet's Table 5, and read as about 2,332.8 G."""
    with torch.device("meta"):
        network = tiny(width=1, classes=16)
    profile = dstlib.profile(network, (1, 1, 128, 128, 128), convention="paper")
    assert profile.params == 39_594_048
    assert round(profile.flops / 1e6) == 2_331_949
    assert profile.flops / 1e9 == pytest.approx(2332.8, rel=5e-4)  # three digits of the overprint are sure


def attended(attention: BidirectionalAttention, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' attention before the last projections, by one place and one head after the other."""
    features, semantic = attention.project(x).flatten(2)[0], attention.project_map(codes)[0]
    channels = len(features) // 2
    width = channels // attention.heads
    found, change = torch.zeros(channels, features.shape[1]), torch.zeros(channels, semantic.shape[1])
    for head in range(attention.heads):
        rows = slice(head * width, (head + 1) * width)
        query, value = features[:channels][rows], features[channels:][rows]
        map_query, map_value = semantic[:channels][rows], semantic[channels:][rows]
        for voxel in range(features.shape[1]):
            shares = (query[:, voxel] @ map_query / math.sqrt(width)).softmax(0)
            found[rows, voxel] = (shares * map_value).sum(1)
        for code in range(semantic.shape[1]):
            shares = (map_query[:, code] @ query / math.sqrt(width)).softmax(0)
            change[rows, code] = (shares * value).sum(1)
    return attention.out(found.view(1, channels, *x.shape[2:])), attention.out_map(change[None])


def test_attention_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    attention = BidirectionalAttention(5, 6, heads=3)
    x, codes = 3 * torch.randn(1, 5, 2, 3, 4), 3 * torch.randn(1, 6, 7)
    with torch.no_grad():
        for ours, defined in zip(attention(x, codes), attended(attention, x, codes), strict=True):
            torch.testing.assert_close(ours, defined)


def test_codes_are_means_of_values_over_voxels() -> None:
    """Where all voxels have the same value, every code is that value, whatever the weights."""
    torch.manual_seed(0)
    semantic_map = SemanticMap(3)
    torch.nn.init.zeros_(semantic_map.values.weight)
    with torch.no_grad():
        semantic_map.values.weight[:, :, 1, 1, 1] = torch.eye(3)
        x = torch.tensor([1.0, -2.0, 5.0]).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6)
        codes = semantic_map(x)
    torch.testing.assert_close(codes, x[:, :, 0, 0, 0, None].expand(1, 3, 64))


def test_merging_takes_every_voxel_once() -> None:
    torch.manual_seed(0)
    merging = Merging(1, 8)
    torch.nn.init.zeros_(merging.reduce[0].weight)
    with torch.no_grad():
        merging.reduce[0].weight[:, :, 1, 1, 1] = 1
        merging.reduce[1].weight.copy_(torch.eye(8).view(8, 8, 1, 1, 1))
    merging.norm = torch.nn.Identity()
    x = torch.arange(1.0, 3 * 4 * 5 + 1).view(1, 1, 3, 4, 5)
    cells = merging(x)
    assert cells.shape == (1, 8, 2, 2, 3)
    assert sorted(v for v in cells.flatten().tolist() if v) == x.flatten().tolist()
    assert set(cells[0, :, 0, 0, 0].tolist()) == set(x[0, 0, :2, :2, :2].flatten().tolist())


@pytest.mark.parametrize("size", [(17, 1, 1), (20, 28, 20), (3, 33, 10)])
def test_patches_of_any_size_above_16_along_an_axis(size: tuple[int, int, int]) -> None:
    network = tiny(width=1 / 32, channels=2).eval()
    with torch.no_grad():
        outputs = network(torch.rand(1, 2, *size))
    assert [tuple(logits.shape) for logits in outputs] == [(1, 3, *size)] * 2
    assert all(torch.isfinite(logits).all() for logits in outputs)


@pytest.mark.parametrize("size", [(16, 16, 16), (1, 2, 1)])
def test_smaller_patches_are_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="size of input of MedFormer: expected more than 16 along an axis, got"):
        tiny(width=1 / 32)(torch.rand(1, 1, *size))


def test_last_attention_makes_values_that_nothing_reads() -> None:
    """The queries get a gradient, the values none; everywhere else both do."""
    network = tiny()
    x, labels = torch.rand(1, 1, 17, 8, 12), torch.randint(0, 3, (1, 1, 17, 8, 12))
    deep_supervision_loss(network(x), labels).backward()
    silent = [
        name
        for name, module in network.named_modules()
        if isinstance(module, BidirectionalAttention)
        for gradient in [module.project[1].weight.grad]
        if not gradient[len(gradient) // 2 :].any()
    ]
    assert silent == ["host.decoder.1.blocks.0.attention"]


def test_bf16_autocast_stays_near_float32() -> None:
    """The attention; through a whole random network, norms over a few voxels make much of any rounding."""
    torch.manual_seed(0)
    attention = BidirectionalAttention(5, 6, heads=3)
    x, codes = torch.randn(1, 5, 2, 3, 4), torch.randn(1, 6, 7)
    network = tiny()
    with torch.no_grad():
        full = attention(x, codes)
        with torch.autocast("cpu", torch.bfloat16):
            half = attention(x, codes)
            logits = network(torch.rand(1, 1, 17, 8, 12))[0]
    for of_bf16, of_float32 in zip(half, full, strict=True):
        assert of_bf16.dtype == torch.bfloat16
        # five products in a row, each rounded to eight bits
        assert float((of_bf16 - of_float32).norm() / of_float32.norm()) < 5 * 2**-7
    assert torch.isfinite(logits).all()


def test_softmax_is_that_of_float32() -> None:
    """In bf16 the sum over more than 256 equal terms would stand still."""
    scores = torch.zeros(1, 1000, dtype=torch.bfloat16)
    assert torch.equal(medformer._shares(scores, dim=1), torch.full_like(scores, 1e-3))


def test_sparse_training_reduces_the_loss() -> None:
    network = tiny(width=1 / 8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.9, total_steps=1000)
    kinds = {type(network.get_submodule(name.rpartition(".")[0])).__name__ for name in sparsifier.masks}
    assert kinds == {"Conv3d", "Conv1d", "Linear"}
    x = torch.rand(1, 1, 17, 8, 12)
    labels = (x > 0.5).long()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = deep_supervision_loss(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]

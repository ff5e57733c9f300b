"""nnU-Net's residual encoder and MedNeXt: sizes by formula and as published, budgets of patches, any patch, bf16."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import dstlib
from dstlib.errors import SettingError
from dstlib.zoo.e2enet import AMOS, E2ENetConfig
from dstlib.zoo.e2enet.baselines import BASELINES, Segmenter, build_model
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

pytest.importorskip("monai")
pytest.importorskip("dynamic_network_architectures")

CONFIG = E2ENetConfig(channels=(8, 16, 24), strides=((1, 2, 2), (2, 2, 2)), heads=2)
NAMES = ["resenc_m", "resenc_l", "mednext_s", "mednext_b"]


def network_of(name: str, **changes: Any) -> Segmenter:
    settings = {"in_channels": 1, "num_classes": 15, "patch_size": (128, 128, 128), "config": AMOS}
    network = build_model(name, **(settings | changes))
    assert isinstance(network, Segmenter)
    return network


def tiny(name: str) -> Segmenter:
    torch.manual_seed(0)
    return network_of(name, num_classes=3, config=CONFIG, patch_size=(17, 20, 18), width=1 / 8)


# ---- counts


def residual_parameters(widths: tuple[int, ...], blocks: tuple[int, ...], channels: int, classes: int) -> int:
    """By hand: 3×3×3 and 1×1×1 convolutions with biases, norms of two numbers per channel."""

    def normed(inputs: int, outputs: int, taps: int = 27, bias: int = 1) -> int:
        return inputs * outputs * taps + bias * outputs + 2 * outputs

    total, before = normed(channels, widths[0]), widths[0]
    for width, num in zip(widths, blocks, strict=True):
        total += normed(before, width) + (2 * num - 1) * normed(width, width)
        total += normed(before, width, 1, bias=0) if before != width else 0  # of the shortcut
        before = width
    for lower, upper in zip(widths[:0:-1], widths[-2::-1], strict=True):
        total += 8 * lower * upper + upper + normed(2 * upper, upper) + upper * classes + classes
    return total


@pytest.mark.parametrize("name", ["resenc_m", "resenc_l"])
def test_residual_encoders_are_what_nnunet_plans(name: str) -> None:
    """558,319,104 is what the planner's own source gives of its network at 128³, of three classes."""
    with torch.device("meta"):
        network, three = network_of(name), network_of(name, num_classes=3)
    widths, blocks = (32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6)
    profile = dstlib.profile(network, (1, 1, 128, 128, 128))
    assert profile.params == residual_parameters(widths, blocks, 1, 15) == 102_360_235
    assert three.host.compute_conv_feature_map_size((128, 128, 128)) == 558_319_104
    on_64 = replace(AMOS, channels=AMOS.channels[:5], strides=AMOS.strides[:4])
    with torch.device("meta"):
        smaller = network_of(name, config=on_64, patch_size=(64, 64, 64))
    assert [len(stage.blocks) for stage in smaller.host.encoder.stages] == [1, 3, 4, 6, 6]


@pytest.mark.parametrize(
    ("name", "fits", "is_too_large"),
    [("resenc_m", (128, 128, 128), (160, 128, 128)), ("resenc_l", (192, 192, 192), (224, 192, 192))],
)
def test_a_preset_takes_the_patches_that_it_would_plan(
    name: str, fits: tuple[int, int, int], is_too_large: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        network_of(name, patch_size=fits)
        with pytest.raises(SettingError) as caught:
            network_of(name, patch_size=is_too_large)
    message = str(caught.value)
    assert message.startswith(f"patch_size of {name}: expected at most ")
    assert ("--model resenc_l" in message) == (name == "resenc_m")


@pytest.mark.parametrize(
    ("name", "params", "authors", "giga"),
    [("mednext_s", 5_563_809, 5_563_809, 258.84), ("mednext_b", 10_523_745, 10_539_201, 335.43)],
)
def test_mednext_has_the_published_size(name: str, params: int, authors: int, giga: float) -> None:
    """Parameters to the printed digit, here and as the authors' program widens; their multiply-adds within 1.5 %."""
    with torch.device("meta"):
        network = network_of(name, num_classes=13)
    profile = dstlib.profile(network, (1, 1, 128, 128, 128))
    (published,) = BASELINES[name].published
    assert published.params is not None
    assert published.flops is not None
    assert profile.params == params
    assert published.params == round(params / 1e6, 1) == round(authors / 1e6, 1)
    assert round(profile.flops / 1e9, 2) == giga
    assert profile.flops / 2e9 == pytest.approx(published.flops, rel=0.015)
    # blocks that halve, at 32 and 64 channels, are widened once more: a column and a row of both 1×1×1 convolutions
    widened = sum(c * c + c + c * 2 * c for c in (32, 64)) if name == "mednext_b" else 0
    assert authors - params == widened


# ---- at work


@pytest.mark.parametrize("name", NAMES)
def test_heads_come_finest_first_at_any_size(name: str) -> None:
    network = tiny(name).train()
    x = torch.rand(1, 1, 17, 20, 18)
    shapes = [tuple(logits.shape[2:]) for logits in network(x)]
    assert shapes[:2] == [(17, 20, 18), (17, 10, 9) if name.startswith("resenc") else (9, 10, 9)]
    assert len(shapes) == (2 if name.startswith("resenc") else 5)
    network.eval()
    network.deep_supervision = False
    with torch.no_grad():
        assert network(x).shape == (1, 3, 17, 20, 18)


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_reduce_the_loss_sparse_too(name: str) -> None:
    network = tiny(name).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.5, method="static")
    x = torch.rand(1, 1, 17, 20, 18)
    labels = (x > 0.5).long() + (x > 0.8).long()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = deep_supervision_loss(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    named = dict(network.named_parameters())
    assert all(not named[key][~mask].any() for key, mask in sparsifier.masks.items())


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name: str) -> None:
    network = tiny(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(1, 1, 17, 20, 18))
    deep_supervision_loss(logits, torch.ones(1, 1, 17, 20, 18)).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_the_coarsest_head_of_mednext_learns() -> None:
    network = tiny("mednext_s").train()
    assert isinstance(network.host.out_blocks, nn.ModuleList)
    network(torch.rand(1, 1, 17, 20, 18))[-1].sum().backward()
    assert network.host.out_blocks[0].conv_out.weight.grad is not None

"""Real models of timm: selected, trained and updated with exact densities."""

from dataclasses import replace

import pytest
import torch
from models import assert_zero_outside

import dstlib
from dstlib import RIGL

timm = pytest.importorskip("timm")

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "resnet18": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {},
    "nf_resnet26": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_mask_forward_backward_update(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **MODELS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=replace(RIGL, interval=1), total_steps=8)
    counts = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    num_all = sum(m.numel() for m in sparsifier.masks.values())
    assert sum(counts.values()) == num_all - int(0.8 * num_all)
    moved = []
    sparsifier.observers.append(lambda site, update: moved.append(int(update.grown.sum())))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert sum(moved) > 0
    assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == counts
    assert_zero_outside(model, sparsifier.masks, optimizer)


def test_weight_standardised_and_depthwise_convolutions_stay_dense_with_the_reason():
    model = timm.create_model("nf_resnet26", num_classes=4)
    reasons = {w.name: w.reason for w in dstlib.targets.select(model)}
    assert "standardises" in reasons["stem.conv.weight"]
    assert reasons["head.fc.weight"] == ""
    mobile = timm.create_model("mobilenetv3_small_050", num_classes=4)
    depthwise = [w for w in dstlib.targets.select(mobile) if "depthwise" in w.reason]
    assert len(depthwise) == sum(
        isinstance(m, torch.nn.Conv2d) and m.groups == m.in_channels > 1 for m in mobile.modules()
    )


def test_position_embeddings_and_tokens_stay_dense():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=4)
    dense = {w.name for w in dstlib.targets.select(model) if w.reason}
    assert {"pos_embed", "cls_token"} <= dense
    assert not any(name.endswith("weight") for name in dense)

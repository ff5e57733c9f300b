"""An AMP overflow moves nothing: neither masks nor weights nor the step counter (METHODS.md, trap 5)."""

from dataclasses import replace

import pytest
import torch
from models import assert_same, assert_zero_outside, backward, small

import dstlib
from dstlib import RIGL, ScoreError

FUSED = {"fused": True, "unfused": False}


def set_up(fused: bool):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(RIGL, interval=1), total_steps=40)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    return model, optimizer, sparsifier, scaler


def scaled_backward(model, scaler, step, overflow):
    backward(model, step, scale=float(scaler.get_scale()) if scaler._scale is not None else 1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale exist before the first step
    if overflow:
        model.head.weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
def test_overflow_changes_nothing(fused, clip):
    model, optimizer, sparsifier, scaler = set_up(fused)
    for step in range(6):
        # not at the first: torch's fused SGD leaves its momentum uninitialised there, with or without masks
        overflow = step in (1, 4)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        saved = sparsifier.state_dict()
        optimizer.zero_grad()
        scaled_backward(model, scaler, step, overflow)
        if clip:
            scaler.unscale_(optimizer)
            sparsifier.before_step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_same(before, model.state_dict())
            assert_same(saved, sparsifier.state_dict())
        assert_zero_outside(model, sparsifier.masks, optimizer)
    assert sparsifier.step == 4


def test_a_criterion_sees_the_unscaled_gradient_of_a_fused_optimizer():
    seen = []
    for fused in (False, True):
        model, optimizer, sparsifier, scaler = set_up(fused)
        sparsifier.observers.append(lambda site, update: seen.append(site.grad.clone()))
        scaled_backward(model, scaler, 0, overflow=False)
        scaler.step(optimizer)
    half = len(seen) // 2
    for unfused, fused in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(unfused, fused), "the scale is a power of two, so unscaling is exact"


def test_a_diverged_loss_without_amp_is_an_error_that_names_the_weight():
    model, optimizer, sparsifier, _ = set_up(fused=False)
    backward(model, 0)
    model.head.weight.grad[0, 0] = torch.nan
    before = sparsifier.masks["head.weight"].clone()
    with pytest.raises(ScoreError, match=r"head\.weight at step 1: .*1 that are NaN or infinite.*diverged"):
        optimizer.step()
    assert torch.equal(before, sparsifier.masks["head.weight"])

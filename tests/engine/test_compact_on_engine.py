"""E2ENet in compact storage on the engine: units and fusion nodes compute with the active kernels alone."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dstlib
from dstlib.engine.layers.compact_conv import ActiveConvKernels, CompactConv3d
from dstlib.engine.layers.conv_transpose import FastActiveUpward
from dstlib.engine.layers.fusion_node import FastFusionNode
from dstlib.export import save_plan
from dstlib.runtime import load_plan
from dstlib.targets import held_weights
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

CONFIG = E2ENetConfig(num_classes=3, channels=(8, 8, 16, 16), strides=((2, 2, 2),) * 3, heads=2)
SIZE = (1, 1, 16, 16, 16)


def begin(storage: str, name: str = "rigl", *, recompute: bool = False, sparsity: float = 0.6):
    torch.manual_seed(0)
    model = E2ENet(CONFIG)
    model.recompute = recompute
    method = replace(dstlib.METHODS[name], interval=2, stop=1.0, granularity=dstlib.Kernel())
    sparsifier = dstlib.sparsify(
        model, sparsity=sparsity, method=method, total_steps=100, storage=storage, include=E2ENet.FUSION, seed=1
    )
    return model, sparsifier, torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)


def image(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def on_engine(model, sparsifier, decisions=None):
    """The model on the engine, its fusion nodes and encoder, whatever was faster."""
    fast = sparsifier.accelerate(model, image(0), decisions=decisions)
    if decisions is None and not all(row.is_fast for row in fast.decisions.values() if row.fast_ms is not None):
        rows = [
            row if row.fast_ms is None else replace(row, plain_ms=1.0, fast_ms=0.5, spread=1.0)
            for row in fast.decisions.values()
        ]
        return on_engine(model, sparsifier, dstlib.engine.Decisions.of(rows, busy=False))
    assert sum(isinstance(layer, FastFusionNode) for layer in fast.modules()) == 6
    return fast


def train(fast, sparsifier, optimizer, steps: range):
    seen = []
    for step in steps:
        optimizer.zero_grad()
        loss = sum(y.square().mean() for y in fast(image(step)))
        loss.backward()
        optimizer.step()
        seen.append((loss.detach(), {name: mask.clone() for name, mask in sparsifier.masks.items()}))
    return seen


@pytest.mark.parametrize("name", ["rigl", "dsff"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_is_that_of_masked_storage_bit_for_bit(name, recompute):
    found, dense, decisions = [], [], None
    for storage in ("masked", "compact"):
        model, sparsifier, optimizer = begin(storage, name, recompute=recompute)
        fast = on_engine(model, sparsifier, decisions)
        found.append(train(fast, sparsifier, optimizer, range(7)))
        dense.append(sparsifier.dense_state_dict())
    for (loss, masks), (its_loss, its_masks) in zip(*found, strict=True):
        assert torch.equal(loss, its_loss)
        assert all(torch.equal(mask, its_masks[key]) for key, mask in masks.items())
    assert all(torch.equal(x, dense[1][key]) for key, x in dense[0].items())
    assert any(not torch.equal(mask, found[0][-1][1][key]) for key, mask in found[0][0][1].items())


def test_no_weight_is_whole_but_upward_ones_while_they_are_read():
    model, sparsifier, optimizer = begin("compact", "dsff", sparsity=0.9)
    fast = on_engine(model, sparsifier)
    train(fast, sparsifier, optimizer, range(2))  # the third step is none of an update
    optimizer.zero_grad()
    shapes = set()

    def note(x: Tensor) -> Tensor:
        shapes.add(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = sum(y.square().mean() for y in fast(image(0)))
    loss.backward()
    held = held_weights(model)
    whole = {tuple(each.dense_shape) for each in held.values() if isinstance(each, ActiveConvKernels)}
    dense = {tuple(p.shape) for name, p in model.named_parameters() if name not in held}
    assert whole - dense
    assert not shapes & (whole - dense)
    assert all(each.values.grad.shape == each.values.shape for each in held.values())


def test_gradients_of_all_kernels_come_of_noted_passes_and_of_those_alone():
    model, sparsifier, _ = begin("compact")
    twin, masked, _ = begin("masked")
    fast, plain = on_engine(model, sparsifier), twin
    plain.load_state_dict(sparsifier.dense_state_dict())
    held = held_weights(model)
    for _ in range(2):  # two passes add up
        for each in held.values():
            each.wants_passes = lambda: True
        sum(y.square().mean() for y in fast(image(0))).backward()
        for each in held.values():
            each.wants_passes = lambda: False
        sum(y.square().mean() for y in fast(image(1))).backward()
    masked.detach()
    for _ in range(2):
        sum(y.square().mean() for y in plain(image(0))).backward()
    for name, each in held.items():
        wanted = plain.get_parameter(name).grad
        outputs = wanted.shape[1] if "upward" in name else wanted.shape[0]
        rows = wanted.transpose(0, 1) if "upward" in name else wanted
        size = float(wanted.abs().max())
        # float32 through 9 norms, by other orders of sums
        torch.testing.assert_close(each.gradient_of_rows(1, outputs), rows[1:], rtol=1e-3, atol=1e-4 * size)
        of_active = wanted.flatten(0, 1)[each.places()]
        torch.testing.assert_close(each.gradient_of_active(), of_active, rtol=1e-3, atol=1e-4 * size)
        assert len(each.wholes) == 2
        assert not each.passes
        each.forget()
        assert not each.has_noted


def test_the_same_layers_read_their_values_through_updates_copies_and_modes(tmp_path: Path):
    model, sparsifier, optimizer = begin("compact")
    fast = on_engine(model, sparsifier)
    assert sum(isinstance(layer, CompactConv3d) for layer in fast.modules()) == 9
    assert sum(isinstance(layer, FastActiveUpward) for layer in fast.modules()) == 6
    for step in range(4):
        train(fast, sparsifier, optimizer, range(step, step + 1))
        for mode in (True, False):
            fast.train(mode)
            model.train(mode)
            with torch.no_grad():
                for y, wanted in zip(fast(image(9)), model(image(9)), strict=True):
                    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)  # float32 through 9 norms
        fast.train()
    assert fast.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        expected = fast(image(9))
        for again in (copy.deepcopy(fast), copy.deepcopy((fast, sparsifier))[0]):
            assert all(torch.equal(y, wanted) for y, wanted in zip(again(image(9)), expected, strict=True))
    save_plan(model, image(0), tmp_path / "a.plan")
    for y, wanted in zip(load_plan(tmp_path / "a.plan")(image(9).numpy()), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(y), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("is_copied", [False, True])
def test_outputs_are_found_where_the_plain_model_is_gone(storage, is_copied):
    model, sparsifier, optimizer = begin(storage, sparsity=0.95)
    fast = on_engine(model, sparsifier)
    if is_copied:
        fast, sparsifier, optimizer = copy.deepcopy((fast, sparsifier, optimizer))
    del model
    gc.collect()
    found = train(fast, sparsifier, optimizer, range(3))
    assert all(m.is_output is False for m in sparsifier._masked)  # heads follow
    assert len(found) == 3

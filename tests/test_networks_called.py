"""Networks of other libraries are profiled and accelerated with the very inputs that they are called with."""

import copy
import importlib
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn

import dstlib
from dstlib.engine import Decision, Decisions
from dstlib.engine.registry import obstacle
from dstlib.inputs import arguments, tensors_in

QUICK = {"GPT-2", "BERT"}
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in NETWORKS]
ACCELERATE = importlib.import_module("dstlib.engine.accelerate")  # the package has the function under this name


def called(name: str) -> tuple[nn.Module, Any]:
    pytest.importorskip(NETWORKS[name].library.partition(".")[0])
    model = NETWORKS[name].build().eval()
    torch.manual_seed(0)
    return model, NETWORKS[name].inputs()


def count_flops(model: nn.Module, inputs: Any) -> int:
    """Counts what layers with a matrix multiply and add, in a true pass: two for each weight at each position."""
    total = 0
    transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    linear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

    def note(layer: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        nonlocal total
        inputs, output = list(tensors_in([*args, kwargs])), next(tensors_in(returned), torch.empty(0))
        if isinstance(layer, transposed):
            positions = inputs[0].numel() // layer.in_channels
        elif type(layer).__name__ == "Conv1D":
            positions = output.numel() // layer.nf
        elif isinstance(layer, linear) or type(layer).__module__ == "torch_geometric.nn.dense.linear":
            positions = output.numel() // len(layer.weight)
        else:
            return
        total += 2 * positions * layer.weight.numel() + (0 if layer.bias is None else output.numel())

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in model.modules()]
    args, kwargs = arguments(inputs)
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("name", EACH)
@pytest.mark.filterwarnings("ignore:.*stay dense")
def test_it_is_profiled(name: str) -> None:
    model, inputs = called(name)
    dense = dstlib.profile(model, inputs)
    assert dense.flops == count_flops(model, inputs)
    assert dense.params == sum(p.numel() for p in model.parameters())
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method="static")
    sparse = dstlib.profile(model, inputs, sparsifier=sparsifier)
    if dense.flops:  # else all are in modules that use their parameters by themselves
        cost = dstlib.TrainingCost(dstlib.History(sparsifier), model, inputs)
        assert (cost.dense, round(cost.forward_share * cost.dense)) == (dense.flops, sparse.flops)
    inactive = sum(int((~mask).sum()) for mask in sparsifier.masks.values())
    assert sparse.params == dense.params - inactive


def forced(model: nn.Module) -> Decisions:
    """Decisions for the engine wherever it can."""
    return Decisions.of(
        Decision(name, type(layer).__name__, *((None, None) if obstacle(layer) else (2.0, 1.0)), None)
        for name, layer in ACCELERATE._candidates(model)
    )


def floats(output: Any) -> list[Tensor]:
    return [x for x in tensors_in(output) if x.is_floating_point()]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.filterwarnings("ignore:.*stay dense")
def test_it_is_accelerated(name: str) -> None:
    model, inputs = called(name)
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method="static")
    plain, (args, kwargs) = copy.deepcopy(model), arguments(inputs)
    fast = sparsifier.accelerate(model, inputs, decisions=forced(model))
    with torch.no_grad():
        for got, expected in zip(floats(fast(*args, **kwargs)), floats(plain(*args, **kwargs)), strict=True):
            # sums in another order, of float32, through some dozens of layers
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * max(float(expected.abs().max()), 1.0))
    measured = sparsifier.accelerate(model, inputs).decisions
    assert [row.name for row in measured.values() if row.is_fast and row.obstacle] == []

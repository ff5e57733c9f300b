"""Networks of other libraries are profiled and accelerated with the very inputs that they are called with."""

import copy
import importlib
from typing import Any

import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dstlib
from dstlib.engine import Decision, Decisions
from dstlib.engine.registry import obstacle
from dstlib.inputs import arguments, tensors_in
from dstlib.profile import UNPARAMETRISED

QUICK = {"GPT-2", "BERT"}
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in NETWORKS]
ACCELERATE = importlib.import_module("dstlib.engine.accelerate")  # the package has the function under this name


def called(name: str) -> tuple[nn.Module, Any]:
    pytest.importorskip(NETWORKS[name].library.partition(".")[0])
    model = NETWORKS[name].build().eval()
    torch.manual_seed(0)
    return model, NETWORKS[name].inputs()


def count_products(model: nn.Module, inputs: Any) -> int:
    """Counts matrix products and convolutions by torch's own counter, in a true pass."""
    args, kwargs = arguments(inputs)
    # of attention in one operator on a CPU, and of recurrent layers, that counter knows nothing
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args, **kwargs)
    return counter.get_total_flops()


ROUTED = {"Mixtral", "Qwen2-MoE", "DeepSeek-V3", "gpt-oss"}  # grouped products, which that counter does not know


@pytest.mark.parametrize("name", EACH)
@pytest.mark.filterwarnings("ignore:.*stay dense")
def test_it_is_profiled(name: str) -> None:
    model, inputs = called(name)
    dense = dstlib.profile(model, inputs)
    of_weights = sum(dense.flops_per_entry.get(name, 0) * p.numel() for name, p in model.named_parameters())
    of_activations = sum(row.flops or 0 for row in dense.layers if row.type in UNPARAMETRISED)
    if name not in ROUTED:
        assert of_weights + of_activations == count_products(model, inputs)
    biases = dense.flops - of_weights - of_activations  # one each per output
    assert 0 <= biases <= 0.05 * dense.flops
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

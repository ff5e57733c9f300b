"""Table 9: how long one image of 1×32³ takes on this machine's CPU, by E2ENet on the engine and by nnU-Net in torch."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

import dstlib
from dstlib.engine.accelerate import accelerate
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.baselines.architecture import Architecture
from dstlib.zoo.e2enet.config import AMOS, E2ENetConfig
from dstlib.zoo.e2enet.network import E2ENet
from dstlib.zoo.e2enet.paper.statistics import Estimate
from dstlib.zoo.e2enet.paper.systems import ONE_WIDTH, System

SIZE = (32, 32, 32)
FORMATS = (torch.contiguous_format, torch.channels_last_3d)
# At 32³ the first stride halves no depth, for all: E2ENet refuses a coarsest level of one voxel.
NETWORK = replace(AMOS, strides=((1, 2, 2), *((2, 2, 2),) * 4))
HOW = (
    "Ours: networks of random weights, one image at a time, medians over {rounds} rounds in which all take turns, "
    "on {threads}. E2ENet with masks runs on dstlib's engine, all else in torch, channels first or last in memory: "
    "whichever is faster. The first stride is (1, 2, 2): E2ENet refuses a coarsest level of one voxel. ratio: how many "
    "times as fast as nnU-Net."
)


@torch.no_grad()
def latencies(
    systems: Sequence[System],
    *,
    network: E2ENetConfig = NETWORK,
    width: float = 1.0,
    architecture: Architecture | None = None,
    rounds: int = 15,
) -> Mapping[str, float]:
    """Measures the milliseconds of one image through each system: medians over rounds in which all take turns.

    ``width`` multiplies the channels of baselines; ``architecture`` is that of the system that wants one.

    Raises:
        SettingError: A network cannot be built so.
    """
    x = torch.randn(1, 1, *SIZE)
    passes = {
        (system.name, n): run
        for system in systems
        for n, run in enumerate(_passes(_model(system, network, width, architecture), system.sparsity, x))
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
    for number in range(rounds + 1):
        for key, run in passes.items():
            start = time.perf_counter()
            run()
            if number:  # the first one warms up
                times[key].append(1000 * (time.perf_counter() - start))
    return {
        system.name: min(median(taken) for (name, _), taken in times.items() if name == system.name)
        for system in systems
    }


def _model(system: System, network: E2ENetConfig, width: float, architecture: Architecture | None) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(
        system.model,
        in_channels=1,
        num_classes=network.num_classes,
        patch_size=SIZE,
        config=system.changed(network),
        width=1.0 if system.model in ONE_WIDTH else width,
        architecture=architecture if system.search else None,
    ).eval()
    model.deep_supervision = False  # type: ignore[assignment]
    return model


def _passes(model: nn.Module, sparsity: float, x: Tensor) -> list[Callable[[], object]]:
    """Returns the ways in which a network computes: on the engine, where it is sparse, else in either layout."""
    if sparsity and isinstance(model, E2ENet):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DSFF would know for how long it trains: not at all
            dstlib.sparsify(model, sparsity=sparsity, method="dsff", include=E2ENet.FUSION, total_steps=10_000)
        fast = accelerate(model, x)
        return [lambda: fast(x)]
    return [_pass(model, x, layout) for layout in FORMATS]


def _pass(model: nn.Module, x: Tensor, layout: torch.memory_format) -> Callable[[], object]:
    laid_out = deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    image = x.contiguous(memory_format=layout)
    return lambda: laid_out(image)


def columns(found: Mapping[str, float]) -> Mapping[str, Mapping[str, Estimate]]:
    """Returns the columns of Table 9 by system, from milliseconds."""
    base = found.get("nnunet")
    numbers = {
        name: {"ms": taken, "items/s": 1000 / taken, **({"ratio": base / taken} if base else {})}
        for name, taken in found.items()
    }
    return {name: {column: Estimate(mean=value) for column, value in of.items()} for name, of in numbers.items()}

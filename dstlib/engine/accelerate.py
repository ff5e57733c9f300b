"""A model that computes the same, faster: each layer by what was measured faster on this machine."""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.decisions import Decision, Decisions
from dstlib.engine.eligible import CANDIDATES, fast_form, obstacle
from dstlib.engine.following import follow

REPEATS = 3


def _never(name: str) -> bool:
    return False


def accelerate(
    model: nn.Module,
    example_input: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    dense_gradient: Callable[[str], bool] = _never,
    decisions: Decisions | None = None,
) -> nn.Module:
    """A module with the outputs, parameters and ``state_dict`` of the model that runs on the engine where that pays.

    Every layer that the engine has kernels for is timed in the model and on the kernels, in whole forward passes of
    ``example_input`` (a tensor, or a tuple of arguments); it stays as it is where that was faster. What was decided,
    and why, is in ``decisions`` of the result: print it, save it, and pass it in to measure nothing the next time.

    The parameters are those of the model, not copies. Active are the weights under ``masks`` (by parameter name, as
    of :attr:`Sparsifier.masks`, followed as they change), else those that are not zero. With masks a training step
    gives the gradients of active weights, and those of the others where ``dense_gradient`` says so of a parameter:
    :meth:`Sparsifier.accelerate` passes both. Without masks it gives all.

    The result is for the CPU; its maps lie depth last in memory. Outputs differ from the plain ones by rounding,
    about 1e-5 of the largest.

    Errors: SettingError for decisions about other layers.

    >>> layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    >>> fast = accelerate(layer, torch.rand(1, 64, 16, 16))
    >>> list(fast.state_dict()) == list(layer.state_dict()), len(fast.decisions)
    (True, 1)
    """
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    fast = _sharing(model)
    candidates = dict(_candidates(fast))
    obstacles = {name: obstacle(layer) for name, layer in candidates.items()}
    able = [name for name, reason in obstacles.items() if reason is None]
    for name in able:
        fast.set_submodule(name, fast_form(candidates[name]))
    if decisions is None:
        plain_ms, fast_ms = _measure(model, fast, able, arguments)
        decisions = Decisions.of(
            Decision(name, type(layer).__name__, plain_ms.get(name), fast_ms.get(name), obstacles[name])
            for name, layer in candidates.items()
        )
    decisions.check(candidates)
    for name in able:
        if not decisions[name].is_fast:
            fast.set_submodule(name, candidates[name])
    follow(fast, masks or {}, dense_gradient)
    object.__setattr__(fast, "decisions", decisions)  # not a module, a parameter or a buffer
    return fast


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    kept = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def _candidates(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers to decide on, outermost first: what is inside of one that can run fast is decided with it."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, CANDIDATES):
            yield path, child
        if not isinstance(child, CANDIDATES) or obstacle(child):
            yield from _candidates(child, f"{path}.")


@torch.no_grad()
def _measure(
    model: nn.Module, fast: nn.Module, names: list[str], arguments: tuple[Any, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each layer in either model, medians of whole passes in turn."""
    modes = [(module, module.training) for module in model.modules()]
    seconds: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    try:
        for network in (model, fast):
            network.eval()  # norms that keep statistics must not learn from the example
        hooks = [hook for i, network in enumerate((model, fast)) for hook in _timed(network, names, seconds[i])]
        for _ in range(REPEATS + 1):  # the first warms up
            model(*arguments)
            fast(*arguments)
        for hook in hooks:
            hook.remove()
    finally:
        for module, training in modes:
            module.training = training
        fast.train(model.training)
    first, second = ({name: median(taken[1:]) * 1e3 for name, taken in each.items()} for each in seconds)
    return first, second


def _timed(network: nn.Module, names: list[str], seconds: dict[str, list[float]]) -> Iterator[Any]:
    for name in names:
        layer, began = network.get_submodule(name), [0.0]

        def start(*_: Any, began: list[float] = began) -> None:
            began[0] = time.perf_counter()

        def stop(*_: Any, name: str = name, began: list[float] = began) -> None:
            seconds[name].append(time.perf_counter() - began[0])

        yield layer.register_forward_pre_hook(start)
        yield layer.register_forward_hook(stop)

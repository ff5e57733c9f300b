"""A model that computes the same, faster: each layer by what was measured faster on this machine."""

import copy
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.cores import watch_crowd
from dstlib.engine.decisions import Decision, Decisions, Tries
from dstlib.engine.following import follow, never
from dstlib.engine.layers.fast_layer import FastLayer, give_out
from dstlib.engine.layers.watch import OTHERWISE, Told
from dstlib.engine.registry import find, obstacle
from dstlib.inputs import arguments
from dstlib.masking import Masks
from dstlib.targets import HoldsActive, find_masked, find_outside, held_weights, refuse_outside, unwrap
from dstlib.workers import one_thread

HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def accelerate(
    model: nn.Module,
    example_input: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    dense_gradient: Told = never,
    holds: Told = never,
    decisions: Decisions | None = None,
    layers: Sequence[FastLayer] = (),
) -> nn.Module:
    """Returns a module with the model's outputs, parameters and ``state_dict``, on the engine where that pays.

    Every layer that the engine has kernels for is timed on them and as it was, with the same inputs, in whole forward
    passes of ``example_input``, three or, of a short one, twenty; it stays as it is where its fastest call was faster.
    Where other programs take the cores meanwhile, it is timed how long a single thread runs, which they lengthen by
    little, and where the tries differ by more than the forms, few products are reason enough for the engine. A mapping
    is passed by name, ``model(**example_input)``, a tuple by place, and anything else, such as a tensor, as the only
    argument. What was decided, and why, is in ``decisions`` of the result: print it, save it, and pass it in to measure
    nothing the next time.

    The parameters are those of the model, not copies, and a fast layer is the layer that it replaces, with another
    class: it has its attributes, names, hooks and ``state_dict``. Active are the weights under ``masks`` (by parameter
    name, as of :attr:`Sparsifier.masks`, followed as they change), else those that are not zero. With masks a training
    step gives the gradients of active weights, and those of the others where ``dense_gradient`` says so of a parameter.
    Without masks it gives all.

    What is not zero outside the masks would be left out, so it is refused, here and in forward passes. It is counted
    when a mask or a weight has changed, unless ``holds`` says that a parameter is still as its mask left it;
    :meth:`Sparsifier.accelerate` passes masks and both of these.

    No layer computes by values that are gone: in each call it looks at which tensors it has, where they lie, their
    versions, and a sample of 4 KB of each weight. So it follows ``load_state_dict``, ``functional_call``, averages that
    are swapped in through ``weight.data``, and new parameters of the fast model. What a layer's sample may miss, a few
    values of a large weight that are written through ``weight.data``, it notices when its mode next changes, by
    ``train()`` or ``eval()``. On a GPU there is no sample: there all that is written so is noticed then. A layer, a
    parameter or a buffer of the ``state_dict`` that is replaced in the plain model is refused by name. Copies, by
    ``deepcopy``, ``pickle`` or in another process, watch their own layers; masks do not travel: a copy computes with
    all of its weights that are not zero.

    Under ``torch.jit.trace``, ``torch.export``, ``torch.func`` and torch's modes, and where something on a part of a
    layer asks for it, such as a hook, layers compute as the plain ones. ``torch.compile`` leaves them out of its
    graphs.

    On a CPU maps lie depth last inside of the result, and outputs differ from the plain ones by rounding, about 1e-5 of
    the largest. On a GPU maps lie channels last; kernels are of float16 and bfloat16, so call this, and the
    result, under autocast or with a model of that type. There blocks of 16 × 16 channels, trained by
    ``replace(DSFF, granularity=Block(16, 16))``, save products; other masks gain by fewer passes over memory alone.

    ``layers`` are further layer types with their fast forms, tried before those of the engine: see
    ``docs/your_own.md``.

    Raises:
        SettingError: The decisions are about other layers.
        SelectionError: A mask belongs to no parameter, or is not of its shape.
        StateError: Weights are not zero outside their masks; a later pass raises it too, if others were loaded since.

    >>> layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
    >>> fast = accelerate(layer, torch.rand(1, 64, 16, 16))
    >>> list(fast.state_dict()) == list(layer.state_dict()), len(fast.decisions)
    (True, 1)
    """
    is_crowded = watch_crowd()  # what comes before the first pass may tell already
    masks = _of_plain({} if masks is None else masks, held_weights(unwrap(model)))
    refuse_outside(find_outside(find_masked(model, masks, "accelerate()"), masks), "accelerate()", OTHERWISE)
    fast = _twin(model)
    candidates = dict(_candidates(fast, layers))
    obstacles = {name: obstacle(layer, layers) for name, layer in candidates.items()}
    able = [name for name, reason in obstacles.items() if reason is None]
    if decisions is None:
        trial = _twin(model)
        _make_fast(trial, able, layers)
        tries, busy = _measure(trial, {name: candidates[name] for name in able}, example_input, is_crowded)
        rows = (
            Decision.of(name, type(layer).__name__, tries[name], _active(layer))
            if name in tries
            else Decision(name, type(layer).__name__, None, None, obstacles[name])
            for name, layer in candidates.items()
        )
        decisions = Decisions.of(rows, busy=busy)
    decisions.check(candidates)
    _make_fast(fast, [name for name in able if decisions[name].is_fast], layers)
    follow(fast, model, masks, dense_gradient, holds)
    if any(row.is_fast for row in decisions.values()):
        fast.register_forward_hook(give_out, prepend=True)
    object.__setattr__(fast, "decisions", decisions)  # not a module, a parameter or a buffer
    return fast


def _of_plain(masks: Mapping[str, Tensor], held: Container[str]) -> Mapping[str, Tensor]:
    """Returns the masks of weights that have zeros; layers in compact storage have none, and stay as they are."""
    if isinstance(masks, Masks):
        return Masks({name: packed for name, packed in masks.packed.items() if name not in held})
    return {name: mask for name, mask in masks.items() if name not in held}


def _twin(model: nn.Module) -> nn.Module:
    """Returns other modules around the same parameters and buffers, with the same hooks."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    modules = {id(module) for module in model.modules()}
    for module in model.modules():
        kept |= {id(x): x for x in vars(module).values() if isinstance(x, Tensor)}  # such as a hook may compute
        if isinstance(module, HoldsActive):
            kept |= {id(held): held for held in module.held.values()}  # patterns move with their values
        for name in HOOKS:
            kept |= {id(x): x for hook in getattr(module, name).values() for x in _bound(hook) if id(x) not in modules}
    return copy.deepcopy(model, kept)


def _bound(hook: Any) -> Iterator[object]:
    """Yields what a hook works on, of which a copy would be of no use to whoever has put it there."""
    if isinstance(hook, partial):
        yield from (*hook.args, *hook.keywords.values())
        yield from _bound(hook.func)
    elif isinstance(hook, MethodType):
        yield hook.__self__
    elif type(hook).__module__.partition(".")[0] not in ("torch", "dstlib"):  # these are tied to their modules
        yield hook


def _make_fast(model: nn.Module, names: Sequence[str], layers: Sequence[FastLayer]) -> None:
    """Puts fast forms in the places of layers, with the hooks, the mode and the attributes of these."""
    for name in names:
        plain = model.get_submodule(name)
        found = find(plain, layers)
        assert found is not None, "it has no obstacle"
        if (made := found.make(plain)) is not plain:
            made.train(plain.training)
            for each, value in vars(plain).items():  # who asks a layer for its sizes gets them
                if not each.startswith("_") and not hasattr(made, each):
                    setattr(made, each, value)
            for each in HOOKS:
                getattr(made, each).update(getattr(plain, each))
            made._is_full_backward_hook = plain._is_full_backward_hook
            model.set_submodule(name, made)


def _candidates(model: nn.Module, layers: Sequence[FastLayer] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers to decide on, outermost first: what is inside of one that can run fast is decided with it."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if name and id(module) not in inside and find(module, layers) is not None:
            yield name, module
            if obstacle(module, layers) is None:
                inside |= {id(part) for part in module.modules()}


def _active(layer: nn.Module) -> float:
    """Returns the share of a layer's products that the engine computes: of its weights, those that are not zero."""
    sizes = {id(held.values): held.dense_shape.numel() for held in held_weights(layer).values()}
    weights = [p for p in layer.parameters() if p.ndim > 1 or id(p) in sizes]
    total = sum(sizes.get(id(weight), weight.numel()) for weight in weights)
    return sum(int(weight.detach().count_nonzero()) for weight in weights) / total if total else 1.0


def _measure(
    fast: nn.Module, plain: Mapping[str, nn.Module], example: Any, is_crowded: Callable[[], bool]
) -> tuple[dict[str, Tries], bool]:
    """Measures what each layer takes in both forms, and tells whether others took the cores meanwhile.

    Where they do, what a layer takes depends on whose turn it is, and on threads that wait for each other: torch's form
    of E2ENet took ten times as long, single layers anything. So there it is timed how long a single thread runs.
    """
    is_on_gpu = any(parameter.is_cuda for parameter in fast.parameters())
    tries = _tries(fast, plain, example, time.perf_counter, lambda: not is_on_gpu and is_crowded())
    if is_on_gpu or not is_crowded():
        return tries, False
    with one_thread():
        return _tries(fast, plain, example, time.thread_time, lambda: False), True


@torch.no_grad()
def _tries(
    fast: nn.Module,
    plain: Mapping[str, nn.Module],
    example: Any,
    clock: Callable[[], float],
    is_over: Callable[[], bool],
) -> dict[str, Tries]:
    """Times each layer in both forms in whole passes, until it is over; the plain form gets the maps of the fast one.

    A layer that stays plain has neighbours on the engine: what it takes to change the order of their maps is its cost.
    """
    args, kwargs = arguments(example)
    layers = [fast, *plain.values()]
    modes = [(module, module.training) for layer in layers for module in layer.modules()]
    tries, seconds = {name: Tries([], []) for name in plain}, {name: [0.0, 0.0] for name in plain}
    hooks = [hook for name in plain for hook in _timed(fast.get_submodule(name), plain[name], seconds[name], clock)]
    try:
        for layer in layers:
            layer.eval()  # norms that keep statistics must not learn from the example
        if not is_over():
            fast(*args, **kwargs)  # the first warms up
        began, passes = time.perf_counter(), 0
        while not is_over() and _is_to_go_on(passes, time.perf_counter() - began):
            for each in seconds.values():
                each[:] = 0.0, 0.0
            fast(*args, **kwargs)
            passes += 1
            for name, (was, now) in seconds.items():
                if was:
                    tries[name].plain.append(1e3 * was)
                    tries[name].fast.append(1e3 * now)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return tries


def _is_to_go_on(passes: int, seconds: float) -> bool:
    """Tells whether layers are to be timed in another pass: in three, in more of short ones, in one if that is long.

    >>> _is_to_go_on(2, 4.0), _is_to_go_on(3, 4.0), _is_to_go_on(3, 0.1), _is_to_go_on(20, 0.1), _is_to_go_on(1, 9.0)
    (True, False, True, False, False)
    """
    return passes < (20 if seconds < 0.2 else 3 if seconds < 5 else 1)


def _timed(layer: nn.Module, plain: nn.Module, seconds: list[float], clock: Callable[[], float]) -> Iterator[Any]:
    """Yields hooks that add what the calls of a layer take, in its plain form and as it is, to two numbers."""
    parameter, began = next(layer.parameters(), None), [0.0]

    def now() -> float:
        if parameter is not None and parameter.is_cuda:
            torch.cuda.synchronize(parameter.device)
        return clock()

    def start(*_: Any) -> None:
        began[0] = now()

    def stop(_: nn.Module, arguments: Any, named: dict[str, Any], __: Any) -> None:
        finished = now()
        plain.forward(*arguments, **named)  # the hooks of both are around these calls
        seconds[0] += max(now() - finished, 1e-9)
        seconds[1] += max(finished - began[0], 1e-9)

    yield layer.register_forward_pre_hook(start)
    yield layer.register_forward_hook(stop, with_kwargs=True, prepend=True)

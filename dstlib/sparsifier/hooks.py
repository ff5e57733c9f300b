"""Hooks around each step of every torch optimizer of the process.

Hooks on all optimizers rather than on one: a copied, replaced or second optimizer can never train zeros back
to life. Listeners are held weakly; the two hooks are registered once and cost nothing without a listener. What is
done around a step is in :class:`dstlib.sparsifier.sparsifier.Sparsifier`.
"""

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Listener(Protocol):
    """What is told of the steps of optimizers that it ``steps_with``."""

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer is of interest."""

    def opens_step(self, optimizer: Optimizer) -> None:
        """Acts when a step is called, before any closure is evaluated, which may be elsewhere."""

    def before_optimizer(self, optimizer: Optimizer) -> None:
        """Acts when the gradients of a step are complete and nothing has moved."""

    def after_optimizer(self, optimizer: Optimizer) -> None:
        """Acts when the step has been taken."""


# In the order of listening, not of addresses as a WeakSet: ranks compare masks one listener after the other.
_LISTENERS: WeakKeyDictionary[Listener, None] = WeakKeyDictionary()
# A listener whose return value nobody keeps lives as long as any module whose weights it masks.
_KEPT: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()
_HOOKS: list[Any] = []


def listen(listener: Listener) -> None:
    """Tells the listener of all steps from now on; once is enough."""
    if not _HOOKS:  # a compiled step must not trace into them: masks are no part of its graph
        _HOOKS.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before)))
        _HOOKS.append(register_optimizer_step_post_hook(torch.compiler.disable(_after)))
    _LISTENERS[listener] = None


def forget(listener: Listener) -> None:
    """Tells the listener no more, and keeps it no longer."""
    _LISTENERS.pop(listener, None)
    for module in [module for module, kept in _KEPT.items() if kept is listener]:
        del _KEPT[module]


def keep(listener: Listener, modules: Iterable[nn.Module]) -> None:
    """Keeps the listener alive as long as any of these modules."""
    _KEPT.update(dict.fromkeys(modules, listener))


def listeners() -> list[Listener]:
    """Returns all that listen, in the order in which they began to."""
    return list(_LISTENERS)


def is_next_to(optimizer: Optimizer) -> bool:
    """Whether nothing else is told between a listener and the step, before it or after, which could write anywhere."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    before, after = next(reversed(_global_optimizer_pre_hooks)), next(iter(_global_optimizer_post_hooks))
    return (before, after) == tuple(hook.id for hook in _HOOKS)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
    concerned = [listener for listener in listeners() if listener.steps_with(optimizer)]
    for listener in concerned:
        listener.opens_step(optimizer)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")

    def told(loss: Any = None) -> Any:
        for listener in concerned:
            listener.before_optimizer(optimizer)
        return loss

    if not concerned or not callable(closure):  # some optimizers' step takes something else
        told()
        return args, kwargs

    def evaluate() -> Any:
        return told(closure())  # only once it has run do the gradients exist

    return ((args[0], evaluate, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": evaluate})


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in listeners():
        if listener.steps_with(optimizer):
            listener.after_optimizer(optimizer)

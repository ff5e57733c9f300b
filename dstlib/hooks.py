"""Listening to every torch optimizer of the process, around each of its steps.

Hooks on all optimizers rather than on one: a copied, replaced or second optimizer can never train zeros back
to life. Listeners are held weakly; the two hooks are registered once and cost nothing without a listener.
"""

from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Listener(Protocol):
    """What is told of the steps of optimizers that it ``steps_with``."""

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer is of interest."""

    def before_optimizer(self, optimizer: Optimizer) -> None:
        """Called when the gradients of a step are complete and nothing has moved."""

    def after_optimizer(self, optimizer: Optimizer) -> None:
        """Called when the step has been taken."""


_LISTENERS: WeakSet[Listener] = WeakSet()
_HOOKS: list[Any] = []


def listen(listener: Listener) -> None:
    """Tells the listener of all steps from now on; once is enough."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before))
        _HOOKS.append(register_optimizer_step_post_hook(_after))
    _LISTENERS.add(listener)


def forget(listener: Listener) -> None:
    """Tells the listener no more."""
    _LISTENERS.discard(listener)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
    listeners = [listener for listener in list(_LISTENERS) if listener.steps_with(optimizer)]
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not listeners:
        return args, kwargs
    if closure is None:
        _tell(listeners, optimizer)
        return args, kwargs
    told = _told_after(closure, listeners, optimizer)
    return ((args[0], told, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": told})


def _told_after(closure: Callable[[], Any], listeners: list[Listener], optimizer: Optimizer) -> Any:
    """The closure, then the news: with a closure the gradients exist only once it has run."""

    def evaluate() -> Any:
        loss = closure()
        _tell(listeners, optimizer)
        return loss

    return evaluate


def _tell(listeners: list[Listener], optimizer: Optimizer) -> None:
    for listener in listeners:
        listener.before_optimizer(optimizer)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for listener in list(_LISTENERS):
        if listener.steps_with(optimizer):
            listener.after_optimizer(optimizer)

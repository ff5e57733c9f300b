"""The order of mask update and optimizer step: mask first where weights are sparse, step first under dense storage."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.optim import Optimizer

from dstlib.methods.method import Method
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight
from dstlib.sparsifier.update import pull_hidden

Weights = Sequence[MaskedWeight]
Update = Callable[[Weights, float], Weights]  # of the masks that are due, given the loss scale; returns their weights


@dataclass(frozen=True)
class Order:
    """What happens around an optimizer's step, beside what always does; both parts return what was updated.

    ``before_step`` is given the weights that have a gradient, perhaps twice for one step; ``after_step`` all weights
    of the optimizers that stepped, which are yet to be cleared.
    """

    before_step: Callable[[Weights, Plan, float, Update], Weights]
    after_step: Callable[[Weights, Sequence[Optimizer], Update], Weights]


def order_of(method: Method) -> Order:
    """Returns the order in which a method updates masks and lets the optimizer step."""
    return MASK_FIRST if method.storage is None else STEP_FIRST


def _update_now(ready: Weights, plan: Plan, scale: float, update: Update) -> Weights:
    return update(ready, scale)


def _nothing(weights: Weights, optimizers: Sequence[Optimizer], update: Update) -> Weights:
    return ()


def _reveal(ready: Weights, plan: Plan, scale: float, update: Update) -> Weights:
    """Lets hidden weights take the step, pulled towards zero."""
    for m in ready:
        if m.reveal():
            pull_hidden(m, plan, scale)
    return ()


def _update_after(weights: Weights, optimizers: Sequence[Optimizer], update: Update) -> Weights:
    """Chooses the masks by the weights as they are after the step."""
    stepped = [m for m in weights if m.is_revealed and m.is_stepping]
    for m in stepped:
        m.undo_out_of_reach()
        m.clear(optimizers)  # what comes within reach now must not bring what weight decay left in its momentum
    # a fused optimizer has divided the loss scale out in place by now
    return update([m for m in stepped if m.parameter.grad is not None], 1.0)


MASK_FIRST = Order(_update_now, _nothing)
STEP_FIRST = Order(_reveal, _update_after)

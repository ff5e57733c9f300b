"""What a torch optimizer, known or not, keeps for a weight; it is masked where the weight is, in ``state.py``."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from dstlib.errors import require

_MOMENTA = ("momentum_buffer", "exp_avg")  # SGD, RMSprop, Muon · Adam and its kin


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """Returns the identities of the parameters an optimizer steps on, as of now: groups may be added at any time."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def momentum_of(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> Tensor | None:
    """Returns the first moment of the gradient that the first of these keeps; None where none does (yet)."""
    states = (optimizer.state.get(parameter, {}) for optimizer in optimizers)
    return next((state[key] for state in states for key in _MOMENTA if state.get(key) is not None), None)


def same_shape_state(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[Tensor]:
    """Yields every floating tensor of the weight's shape that the optimizer keeps for it."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape:
            yield value


def reset_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    """Starts what an optimizer keeps for a weight afresh: zeros, and with them the steps that Adam corrects by."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor):
            value.fill_(1.0) if key == "mu_product" else value.zero_()  # NAdam's running product begins at 1


def overflowed(optimizer: Optimizer) -> bool:
    """Whether this step does nothing because of an AMP overflow.

    ``GradScaler`` does not call the step of an ordinary optimizer then; it does call that of a fused one and
    leaves word of the overflow in ``found_inf`` for the length of the call.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def takes_no_step(optimizer: Optimizer) -> bool:
    """Whether this call of ``step`` is none of the training: an AMP overflow, or a rehearsal.

    ``torch.distributed.checkpoint`` steps an optimizer to have its state made, with zero gradients and rates.
    """
    if overflowed(optimizer):
        return True
    rates = [group.get("lr") for group in optimizer.param_groups]
    # a rate on another device would have to be waited for at each step, and torch's rehearsal has none there
    if any(rate is None or (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate) for rate in rates):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(bool(grad.any()) for grad in grads)


def loss_scale(optimizer: Optimizer | None) -> float:
    """Returns the loss scale in the gradients, which a fused optimizer divides out only inside its step; else 1."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def refuse_unsupported(optimizer: Optimizer) -> None:
    """Refuses LBFGS: its line search moves the weights between the hooks, again and again.

    Raises:
        SettingError: The optimizer is one.
    """
    require(
        not isinstance(optimizer, LBFGS),
        "optimizer",
        "sparsify()",
        allowed="one that moves the weights once per step",
        given=type(optimizer).__name__,
        remedy="Use SGD or Adam, say; LBFGS evaluates several points per step, all of them dense.",
    )

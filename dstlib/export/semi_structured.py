"""Linear layers whose zeros are 2:4, handed to the sparse tensor cores of recent Nvidia GPUs.

Shapes: O outputs, I inputs.
"""

import torch
from torch import Tensor, nn

from dstlib.errors import SelectionError, require
from dstlib.targets import plain_name, unwrap

_TYPES = (torch.float16, torch.bfloat16)
_MULTIPLES = (32, 64)  # of outputs and inputs: what the stricter of torch's two backends, CUTLASS, asks for
_CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores


def to_semi_structured(model: nn.Module) -> tuple[str, ...]:
    """Compresses the weight of each ``nn.Linear`` of 2:4 zeros, in place, and names these layers.

    For inference: the weights keep half their memory, take no gradient, and ``state_dict`` holds them compressed, so
    save the model before. Layers with other zeros stay dense. Train by ``srste``, or any method with
    ``replace(method, granularity=NM(2, 4))``, to get such zeros.

    Raises:
        SelectionError: A layer of 2:4 zeros is not on a GPU of capability 8.0 or more, not of float16 or bfloat16, has
            outputs that are no multiple of 32 or inputs that are none of 64, or shares its weight; or no layer has
            such zeros. All of them are named, and nothing is changed then.
    """
    where = "to_semi_structured()"
    linears = {plain_name(name): m for name, m in unwrap(model).named_modules() if type(m) is nn.Linear}
    chosen = {name: linear for name, linear in linears.items() if is_two_of_four(linear.weight)}
    allowed = "an nn.Linear of which 2 of every 4 inputs are zero"
    given = "none, among " + (", ".join(linears) or "no nn.Linear at all")
    remedy = "Train by method='srste' or with granularity NM(2, 4)."
    require(bool(chosen), "layers", where, allowed=allowed, given=given, remedy=remedy, error=SelectionError)
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    reasons = {name: _reason(linear.weight, uses.count(id(linear.weight))) for name, linear in chosen.items()}
    given = "; ".join(f"{name} {reason}" for name, reason in reasons.items() if reason)
    allowed = "float16 or bfloat16 weights on a GPU of capability 8.0, outputs by 32, inputs by 64, none shared"
    remedy = "Say model.half().cuda() first; what cannot be compressed runs dense as it is."
    require(not given, "layers", where, allowed=allowed, given=given, remedy=remedy, error=SelectionError)
    for linear in chosen.values():
        compressed = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        linear.weight = nn.Parameter(compressed, requires_grad=False)
    return tuple(chosen)


def is_two_of_four(weight_OI: Tensor) -> bool:
    """Returns whether at most 2 of every 4 consecutive inputs of each output are not zero.

    >>> is_two_of_four(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), is_two_of_four(torch.tensor([[1.0, 3.0, 0.0, 2.0]]))
    (True, False)
    """
    outputs, inputs = weight_OI.shape
    if inputs % 4:
        return False
    return bool((weight_OI.detach().reshape(outputs, inputs // 4, 4) != 0).sum(dim=2).le(2).all())


def _reason(weight_OI: Tensor, num_uses: int) -> str:
    """Says what is in the way of compressing a weight; empty if nothing is."""
    if num_uses > 1:
        return "shares its weight"
    if weight_OI.device.type != "cuda":
        return f"is on the {weight_OI.device.type}"
    capability = torch.cuda.get_device_capability(weight_OI.device)
    if capability < _CAPABILITY:
        return f"is on a GPU of capability {capability[0]}.{capability[1]}"
    if weight_OI.dtype not in _TYPES:
        return f"is of {str(weight_OI.dtype).removeprefix('torch.')}"
    if any(size % multiple for size, multiple in zip(weight_OI.shape, _MULTIPLES, strict=True)):
        return f"has shape {tuple(weight_OI.shape)}"
    return ""

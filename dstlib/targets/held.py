"""Layers whose parameter is the active values of a weight alone, and the plain layers that they stand for."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.targets.compact_state import MASK
from dstlib.targets.wrappers import plain_name


class HoldsActive(nn.Module):
    """A layer in compact storage: its ``weight`` (A, *K) are the active values of one (O, I, *K) that does not exist.

    ``state_dict`` has their places beside it, as ``weight_mask``.
    """

    weight: Tensor
    dense_shape: torch.Size

    @property
    def mask(self) -> Tensor:
        """Which entries are active, (O, I, *K)."""
        raise NotImplementedError

    def places(self) -> Tensor:
        """Returns where in the flattened (O, I) matrix each of the values belongs, (A)."""
        raise NotImplementedError

    def spread(self, values: Tensor) -> Tensor:
        """Returns a weight (O, I, *K) of values (A, *K), zeros elsewhere."""
        raise NotImplementedError

    def become_plain(self) -> None:
        """Takes the plain layer's class, and a weight without data, of the whole shape."""
        raise NotImplementedError


def held_weights(model: nn.Module) -> dict[str, HoldsActive]:
    """Returns the layers in compact storage, by the names of their weights, any name of one that is shared."""
    named = model.named_modules(remove_duplicate=False)
    return {_key(plain_name(name), "weight"): m for name, m in named if isinstance(m, HoldsActive)}


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Returns the ``state_dict`` of a model as it is without compact storage."""
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, HoldsActive):
            state[_key(name, "weight")] = module.spread(module.weight.detach())
            del state[_key(name, MASK)]
    return state


def without_data(model: nn.Module) -> nn.Module:
    """Returns a copy of a model on the meta device, with plain layers in place of those in compact storage."""
    tensors = {
        id(x): x for m in model.modules() for x in (*m._parameters.values(), *m._buffers.values()) if x is not None
    }
    made = copy.deepcopy(model, {key: _bare(x) for key, x in tensors.items()})
    for module in made.modules():
        if isinstance(module, HoldsActive):
            module.become_plain()
    return made


def _bare(x: Tensor) -> Tensor:
    bare = torch.empty_like(x, device="meta", requires_grad=False)
    return nn.Parameter(bare, x.requires_grad) if isinstance(x, nn.Parameter) else bare


def _key(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key

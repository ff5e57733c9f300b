"""Weights of which the active values alone exist, the layers that hold them, and the plain layers these stand for."""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dstlib.targets.compact_state import mask_key
from dstlib.targets.wrappers import plain_name


class Held(Protocol):
    """A weight (O, I, *K) that does not exist, and its active values (A, *K), a parameter of a layer."""

    dense_shape: torch.Size

    @property
    def values(self) -> Tensor:
        """The parameter (A, *K)."""
        ...

    @property
    def mask(self) -> Tensor:
        """Which entries are active, (O, I, *K)."""
        ...

    def places(self) -> Tensor:
        """Returns where in the flattened (O, I) matrix each of the values belongs, (A)."""
        ...

    def spread(self, values: Tensor) -> Tensor:
        """Returns a weight (O, I, *K) of values (A, *K), zeros elsewhere."""
        ...


class HoldsActive(nn.Module):
    """A layer in compact storage: of the weights in ``held``, by their keys, it has the active values alone.

    ``state_dict`` has their places beside these, for ``weight`` as ``weight_mask``.
    """

    held: Mapping[str, Held]

    def become_plain(self) -> None:
        """Takes the plain layer's class, and weights without data, of the whole shapes."""
        raise NotImplementedError


def plain_kind(layer: nn.Module) -> type[nn.Module]:
    """Returns the class of a layer; of one in compact storage, that of the plain layer."""
    return next(
        kind for kind in type(layer).__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, HoldsActive)
    )


def held_weights(model: nn.Module) -> dict[str, Held]:
    """Returns the weights in compact storage, by their names, any name of one that is shared."""
    return {plain_name(name): held for name, held in _held(model)}


def plain_state(model: nn.Module) -> dict[str, Any]:
    """Returns the ``state_dict`` of a model as it is without compact storage."""
    state = model.state_dict()
    for name, held in _held(model):
        state[name] = held.spread(held.values.detach())
        del state[mask_key(name)]
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


def _held(model: nn.Module) -> list[tuple[str, Held]]:
    named = model.named_modules(remove_duplicate=False)
    layers = [(f"{name}." if name else "", module) for name, module in named if isinstance(module, HoldsActive)]
    return [(f"{prefix}{key}", held) for prefix, module in layers for key, held in module.held.items()]

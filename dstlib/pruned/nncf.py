"""NNCF 3.4: a hook at each weight, whose key in the state dict says which one, multiplies it by a mask."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dstlib.pruned.values import as_mask, both

# the name of the parameter with colons for dots; the port of the operation that it is; which of the hooks there
_KEY = re.compile(r"(?:.*\.)?__nncf_hooks\.post_hooks\.([^.]+)__\d+\.\d+\.(binary_mask|mask)")
_WHERE = "a state of NNCF"
_HOOKS = re.compile(r"(?:.*\.)?__nncf_hooks\..*")


def is_pruned(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is of a model that was pruned so."""
    return any(_KEY.fullmatch(name) for name in state)


def masks(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the masks by the names of their weights; of a weight with several hooks what all of them leave.

    Learned masks (``UNSTRUCTURED_REGULARIZATION_BASED``) are logits, of which a sigmoid above a half is active.

    >>> masks({"__nncf_hooks.post_hooks.block:0:weight__0.0.binary_mask": torch.tensor([True, False])})
    {'block.0.weight': tensor([ True, False])}
    """
    found: dict[str, Tensor] = {}
    for key, name, kind in _hooks(state):
        value = state[key]
        if kind == "mask" and isinstance(value, Tensor) and value.is_floating_point():
            value = torch.sigmoid(value) > 0.5
        found[name] = both(found[name], value, key, _WHERE) if name in found else as_mask(value, key, _WHERE)
    return found


def weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a plain model, with the weights as they are beneath their masks."""
    return {name: value for name, value in state.items() if not _HOOKS.fullmatch(name)}


def _hooks(state: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields the key of each mask, the name of its weight, and which kind it is."""
    for key in state:
        if match := _KEY.fullmatch(key):
            yield key, match[1].replace(":", "."), match[2]

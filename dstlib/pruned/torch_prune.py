"""``torch.nn.utils.prune``: a buffer ``weight_mask`` beside ``weight_orig``, of which a hook makes ``weight``."""

from collections.abc import Mapping
from typing import Any

_ORIG, _MASK = "_orig", "_mask"


def is_pruned(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is of a model with layers that are pruned so."""
    return any(_names(state))


def masks(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the masks by the names of what they make, weights or biases.

    >>> masks({"0.weight_orig": 2, "0.weight_mask": 1, "0.bias": 0})
    {'0.weight': 1}
    """
    return {name: state[name + _MASK] for name in _names(state)}


def weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of a plain model, with the weights as they are beneath their masks.

    >>> weights({"0.weight_orig": 2, "0.weight_mask": 0, "0.bias": 3})
    {'0.weight': 2, '0.bias': 3}
    """
    names = {name + _ORIG: name for name in _names(state)}
    ours = {name + _MASK for name in names.values()}
    return {names.get(key, key): value for key, value in state.items() if key not in ours}


def _names(state: Mapping[str, Any]) -> list[str]:
    names = (name.removesuffix(_MASK) for name in state if name.endswith(_MASK))
    return [name for name in names if name + _ORIG in state]

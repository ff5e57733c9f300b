"""rigl-torch 0.5.2: the state of its scheduler has a list of masks, in the order of the layers that it found."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dstlib.errors import StateError, shown
from dstlib.targets import plain_name, unwrap

_KEY, _SIZES = "backward_masks", "N"


def is_pruned(state: Mapping[str, Any]) -> bool:
    """Whether this is the state of its scheduler."""
    return isinstance(state.get(_KEY), list) and isinstance(state.get(_SIZES), list)


def masks(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns the masks by the names of their weights; a layer that it kept dense has none.

    Raises:
        StateError: Its layers are not those of the model.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm2d(1), nn.LayerNorm(2))
    >>> masks({"backward_masks": [None, torch.tensor([True, False])], "N": [2, 2]}, model)
    {'2.weight': tensor([ True, False])}
    """
    layers, given, sizes = list(_layers(unwrap(model), "")), state[_KEY], state[_SIZES]
    fits = len(given) == len(sizes) == len(layers) and all(type(size) is int for size in sizes)
    fits = fits and all(w.numel() == size for (_, w), size in zip(layers, sizes, strict=True))
    if not fits:
        raise StateError.of(
            _KEY,
            "a state of rigl-torch",
            allowed=f"masks for the {len(layers)} layers of this model that have a weight, but BatchNorm2d, of "
            f"{_listed([w.numel() for _, w in layers])} entries",
            given=f"{len(given)} for layers of {_listed(sizes)}",
            remedy="Its masks have no names, only an order: pass the model that they were made for.",
        )
    return {name: mask for (name, _), mask in zip(layers, given, strict=True) if mask is not None}


def _layers(module: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights in its order: of each module that has one, depth first, but of a BatchNorm2d."""
    if isinstance(weight := getattr(module, "weight", None), Tensor) and type(module) is not nn.BatchNorm2d:
        yield plain_name(f"{name}.weight" if name else "weight"), weight
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from _layers(child, f"{name}.{key}" if name else key)


def _listed(sizes: list[Any]) -> str:
    return ", ".join(map(shown, sizes[:8])) + (", ..." if len(sizes) > 8 else "")

"""The tools whose masks are read: a row for each, of functions of what they save."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dstlib.pruned import compressed_tensors, nncf, rigl_torch, torch_prune

State = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """How one tool saves masks.

    - ``is_pruned``: whether a state is one that it saved.
    - ``masks``: the masks in it by the names of weights, as they were saved, given the model that they are for.
    - ``weights``: the state of a plain model, the masks yet to be applied; None where it has no weights.
    """

    name: str
    is_pruned: Callable[[State], bool]
    masks: Callable[[State, nn.Module], Mapping[str, Any]]
    weights: Callable[[State], Mapping[str, Any]] | None = None


TOOLS = (
    Tool("torch.nn.utils.prune", torch_prune.is_pruned, lambda s, _: torch_prune.masks(s), torch_prune.weights),
    Tool("rigl-torch", rigl_torch.is_pruned, rigl_torch.masks),
    Tool("NNCF", nncf.is_pruned, lambda s, _: nncf.masks(s), nncf.weights),
    Tool(
        "compressed-tensors",
        compressed_tensors.is_pruned,
        lambda s, _: compressed_tensors.masks(s),
        compressed_tensors.weights,
    ),
)

"""Parts of a network whose maps are computed once more for the gradients instead of kept for them.

Shapes: B batch, C channels, D, H, W depth, height, width.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")


def recomputed(part: Callable[[list[Tensor]], T], maps: Sequence[Tensor]) -> T:
    """Computes a part of a network of maps (B, C, D, H, W), of which nothing but these is kept for the gradients.

    Where those are computed, the part runs again: it takes the memory of one part at a time, and the time of one more
    forward pass. The part must do the same both times, and draw no random numbers. Where no gradients are recorded it
    runs as it is.

    Reference: Chen et al., *Training Deep Nets with Sublinear Memory Cost* (2016).

    >>> x = torch.ones(2, requires_grad=True)
    >>> recomputed(lambda maps: maps[0].exp().exp().sum(), [x]).backward()
    >>> torch.equal(x.grad, torch.full((2,), torch.e).exp() * torch.e)
    True
    """
    if not torch.is_grad_enabled():
        return part(list(maps))
    given = [same_map(x) for x in maps]  # whatever becomes of the maps until the part runs again

    def run() -> T:
        return part([same_map(x) for x in given])  # of the same, both times

    found: T = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    return found


def same_map(x: Tensor) -> Tensor:
    """Returns a map by another name where its values may be written out in place, as those of the engine's maps are."""
    if has_torch_function_unary(x):
        found: Tensor = handle_torch_function(same_map, (x,), x)
        return found
    return x

"""Fast layers follow what is active: masks that change, or weights that become zero."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import FollowsMask


@dataclass(eq=False)
class _Followed:
    """A layer, its weight, and the mask it follows; without one, the zeros of the weight."""

    layer: FollowsMask
    weight: Tensor
    mask: Tensor | None
    wants_all: Callable[[], bool]
    seen: int | None = -1

    @property
    def watched(self) -> Tensor:
        """The tensor that tells by its version whether the pattern has changed."""
        return self.weight if self.mask is None else self.mask

    def refresh(self) -> None:
        """Tells the layer where the pattern has changed since, and which gradients this pass is to give."""
        self.layer.dense_gradient = self.wants_all()
        trains = self.mask is None and torch.is_grad_enabled() and self.weight.requires_grad
        state = None if trains else self.watched._version
        if state == self.seen:
            return
        if trains:
            self.layer.set_mask(torch.ones_like(self.weight, dtype=torch.bool))
        else:
            self.layer.set_mask(self.weight.detach() != 0 if self.mask is None else self.mask)
        self.seen = state


def follow(fast: nn.Module, masks: Mapping[str, Tensor], wants_all: Callable[[str], bool]) -> None:
    """Lets every fast layer look, before each forward pass, whether its pattern has changed.

    ``wants_all`` says of a parameter whether this pass is to give the gradients of its inactive weights too.
    """
    names = {id(parameter): name for name, parameter in fast.named_parameters()}
    followed = []
    for layer in fast.modules():
        if isinstance(layer, FollowsMask):
            name = names[id(layer.weight)]
            followed.append(_Followed(layer, layer.weight, masks.get(name), partial(wants_all, name)))

    watched = [each.watched for each in followed]
    seen: list[int] | None = None  # their versions at the last pass, if nobody recorded it

    def refresh(*_: Any) -> None:
        nonlocal seen
        versions, records = [tensor._version for tensor in watched], torch.is_grad_enabled()
        if records or versions != seen:
            for each in followed:
                each.refresh()
        seen = None if records else versions

    fast.register_forward_pre_hook(refresh)
    refresh()

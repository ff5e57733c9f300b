"""Fast layers follow what is active: masks that change, or weights that become zero."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.gpu.module import BlockConv
from dstlib.engine.layers.fast_layers import FastConv, FastUnit, FastUpsample
from dstlib.engine.layers.linear import SparseLinear


@dataclass(eq=False)
class _Followed:
    """A layer, its weight, and the mask it follows; without one, the zeros of the weight."""

    layer: Any  # has set_mask() and dense_gradient
    weight: Tensor
    mask: Tensor | None
    wants_all: Callable[[], bool]
    seen: tuple[object, ...] | None = None

    def refresh(self) -> None:
        """Tells the layer where the pattern has changed since, and which gradients this pass is to give."""
        self.layer.dense_gradient = self.wants_all()
        trains = self.mask is None and torch.is_grad_enabled() and self.weight.requires_grad
        watched = self.weight if self.mask is None else self.mask
        state = ("all", None) if trains else (id(watched), watched._version)
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
    pairs = [pair for module in fast.modules() for pair in _layer_and_weight(module)]
    followed = [
        _Followed(layer, weight, masks.get(names[id(weight)]), partial(wants_all, names[id(weight)]))
        for layer, weight in pairs
    ]

    def refresh(*_: Any) -> None:
        for each in followed:
            each.refresh()

    fast.register_forward_pre_hook(refresh)
    refresh()


def _layer_and_weight(module: nn.Module) -> list[tuple[Any, Tensor]]:
    if isinstance(module, SparseLinear | BlockConv):
        return [(module, module.weight)]
    return [(module.kernels, module.kernels.weight)] if isinstance(module, FastConv | FastUnit | FastUpsample) else []

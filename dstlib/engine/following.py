"""Fast layers follow what is active: masks that change, or weights that become zero."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.fast_layers import FastConv, FastUnit, FastUpsample
from dstlib.engine.linear import SparseLinear


@dataclass(eq=False)
class _Followed:
    """A layer, its weight, and the mask it follows; without one, the zeros of the weight."""

    layer: Any  # has set_mask() and dense_gradient
    weight: nn.Parameter
    mask: Tensor | None
    seen: tuple[object, ...] | None = None

    def refresh(self) -> None:
        """Tells the layer where the pattern has changed since."""
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


def follow(fast: nn.Module, model: nn.Module, masks: Mapping[str, Tensor] | None) -> None:
    """Lets every fast layer look, before each forward pass, whether its pattern has changed."""
    by_weight = {id(p): masks.get(name) for name, p in model.named_parameters()} if masks else {}
    pairs = [pair for module in fast.modules() for pair in _layer_and_weight(module)]
    followed = [_Followed(layer, weight, by_weight.get(id(weight))) for layer, weight in pairs]

    def refresh(*_: Any) -> None:
        for each in followed:
            each.refresh()

    fast.register_forward_pre_hook(refresh)
    refresh()


def _layer_and_weight(module: nn.Module) -> list[tuple[Any, nn.Parameter]]:
    if isinstance(module, SparseLinear):
        return [(module, module.weight)]
    return [(module.kernels, module.kernels.weight)] if isinstance(module, FastConv | FastUnit | FastUpsample) else []

"""The active kernels of a convolution, as the engine's layers compute with them.

Shapes: O output channels, C input channels, A active kernels. Of a transposed convolution (O, C, *taps) is
(C, O, *taps).
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dstlib.engine.layers.active_weight import ActiveWeight
from dstlib.engine.ops.patterns import Pattern, Weights


class ActiveKernels(ActiveWeight):
    """The active kernels (A, *taps) of a convolution, transposed or not.

    A layer of the engine that reads it gives the gradient of the whole weight in passes that are noted: what such a
    gradient is made of, a joined and normed input, exists nowhere. ``wholes`` are these gradients, (O, C, *taps).
    """

    is_spread: ClassVar[bool]
    """Whether what the engine reads is made of the values in each pass that autograd records."""
    is_transposed: ClassVar[bool]

    def __init__(self, layer: nn.Module, key: str, places: Tensor) -> None:
        super().__init__(layer, key, places)
        self.wholes: list[Tensor] = []

    @property
    def kernels(self) -> Pattern:
        """Which kernels (O, C) are active; the same object until others are."""
        raise NotImplementedError

    def weights(self, bias: Tensor | None) -> Weights:
        """Returns what the engine computes by, to be kept while the values stay, unless it ``is_spread``."""
        raise NotImplementedError

    def noted_weights(self, bias: Tensor | None) -> Weights:
        """Returns what the engine computes a pass by of which the gradient of all kernels is wanted.

        A weight with zeros (O, C, *taps) exists for as long as the pass does.
        """
        self.forget_discarded()
        weight, active = self.spread(self.values), self.active()
        if weight.requires_grad:
            weight.register_hook(lambda grad: self.wholes.append(grad.detach()))
        active = active.T if self.is_transposed else active
        return Weights(weight, bias, Pattern.of(active), Pattern.of(torch.ones_like(active)))

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, C, *taps) of all kernels of some outputs, active or not, over the passes."""
        wholes = (x.transpose(0, 1) if self.is_transposed else x for x in self.wholes)
        found = [x[first:last] for x in wholes]
        if self.passes:
            found.append(self.rows_of_passes(first, last))
        return torch.stack(found).sum(dim=0) if len(found) > 1 else found[0].clone()

    def gradient_of_active(self) -> Tensor:
        """Computes the gradient (A, *taps) of the active kernels, summed over the passes."""
        total = self.active_of_passes()
        for whole in self.wholes:
            total += whole.flatten(0, 1)[self.places()]
        return total

    def rows_of_passes(self, first: int, last: int) -> Tensor:
        """Computes ``gradient_of_rows`` over the passes of the layer itself, of which there are some."""
        raise NotImplementedError

    def active_of_passes(self) -> Tensor:
        """Computes ``gradient_of_active`` over the passes of the layer itself."""
        raise NotImplementedError

    @property
    def has_noted(self) -> bool:
        """Whether anything is known of the gradients of others."""
        return bool(self.passes or self.wholes)

    def most_of_passes(self) -> float:
        """Bounds the norm of the gradient over the passes: of what its rounding is a share."""
        return super().most_of_passes() + sum(float(whole.norm()) for whole in self.wholes)

    def forget(self) -> None:
        """Forgets what was noted."""
        super().forget()
        self.wholes.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what ties the weight to a training."""
        return {**super().__getstate__(), "wholes": []}

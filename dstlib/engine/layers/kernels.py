"""The part of a fast convolution that follows which of its kernels are active."""

from typing import Self

import torch
from torch import Tensor, nn

from dstlib.engine.ops.patterns import Pattern, Weights


class FollowsKernels(nn.Module):
    """A layer that knows the active kernels of its weight (O, C, ...), or (C, O, ...) if it is ``transposed``.

    At first these are all that are not 0.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        super().__init__()
        self._transposed = transposed
        self.dense_gradient = False  # whether backward passes are to give the gradients of inactive kernels too
        self._all = self._pattern(torch.ones_like(weight, dtype=torch.bool))
        self.set_mask(weight.detach() != 0)

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask of the weight's shape: a kernel is active where any of its taps is."""
        self.active = self._pattern(mask)
        self._weights: Weights | None = None

    def train(self, mode: bool = True) -> Self:
        """As of any module; forgets what was made of the weight, which ``weight.data`` may have changed unseen."""
        self._weights = None
        return super().train(mode)

    def weights(self, bias: Tensor | None) -> Weights:
        """Returns the weight, a bias and the active kernels, the same value until one of them is another."""
        kept, graded = self._weights, self._all if self.dense_gradient else self.active
        if kept is None or kept.bias is not bias or kept.graded is not graded:
            kept = self._weights = Weights(self.weight, bias, self.active, graded)
        return kept

    def _pattern(self, mask: Tensor) -> Pattern:
        pairs = mask.flatten(2).any(dim=2)
        return Pattern.of(pairs.T if self._transposed else pairs)

"""The kernels of a convolution that are active, for the layer that has the weight."""

import torch
from torch import Tensor

from dstlib.engine.ops.patterns import Pattern
from dstlib.engine.ops.weights import Weights


class ActiveKernels:
    """Which kernels of a weight (O, C, ...), or (C, O, ...) if it is ``transposed``, are active; all that are not 0."""

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        self.weight, self._transposed = weight, transposed
        self.dense_gradient = False  # whether backward passes are to give the gradients of inactive kernels too
        self._all = self._pattern(torch.ones_like(weight, dtype=torch.bool))
        self.set_mask(weight.detach() != 0)

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask of the weight's shape: a kernel is active where any of its taps is."""
        self.active = self._pattern(mask)
        self._weights: Weights | None = None

    def weights(self, bias: Tensor | None) -> Weights:
        """Returns the weight, a bias and the active kernels, the same value until one of them is another."""
        kept, graded = self._weights, self._all if self.dense_gradient else self.active
        if kept is None or kept.bias is not bias or kept.graded is not graded:
            kept = self._weights = Weights(self.weight, bias, self.active, graded)
        return kept

    def _pattern(self, mask: Tensor) -> Pattern:
        pairs = mask.flatten(2).any(dim=2)
        return Pattern.of(pairs.T if self._transposed else pairs)


class FollowsKernels:
    """The part of a fast layer that follows the mask of its ``kernels``."""

    kernels: ActiveKernels

    @property
    def dense_gradient(self) -> bool:
        """Whether backward passes are to give the gradients of inactive kernels too."""
        return self.kernels.dense_gradient

    @dense_gradient.setter
    def dense_gradient(self, wanted: bool) -> None:
        self.kernels.dense_gradient = wanted

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask of the weight's shape: a kernel is active where any of its taps is."""
        self.kernels.set_mask(mask)

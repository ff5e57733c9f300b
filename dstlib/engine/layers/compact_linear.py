"""Linear layers that hold their active weights only.

Shapes: O outputs, I inputs, N samples, A active weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.ops.compact_linear import CompactPattern, active_gradient, compact_linear


class CompactLinear(CompactLayer, nn.Linear):
    """An ``nn.Linear`` whose parameter ``weight`` (A) are its active values alone, made by ``make_compact()``."""

    pattern: CompactPattern

    def compute(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O), with the active values alone."""
        return compact_linear(input, self.weight, self.bias, self.pattern)

    def as_plain(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O), as the plain layer computes."""
        return functional.linear(input, self.spread(self.weight), self.bias)

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, I) of all weights of some outputs, active or not, summed over the passes."""
        total = None
        for x, grad in self.passes:
            x, grad = x.reshape(-1, self.in_features), grad.reshape(-1, self.out_features)[:, first:last]
            x, grad = x.to(self.weight.dtype), grad.to(self.weight.dtype)
            total = grad.t() @ x if total is None else total.addmm_(grad.t(), x)
        assert total is not None, "nobody asks before a pass"
        return total

    def gradient_of_active(self) -> Tensor:
        """Computes the gradient (A) of the active weights, summed over the passes."""
        total = torch.zeros_like(self.weight, requires_grad=False)
        for x, grad in self.passes:
            x, grad = x.reshape(-1, self.in_features), grad.reshape(-1, self.out_features)
            total += active_gradient(grad.to(total.dtype), x.to(total.dtype), self.pattern)
        return total

    def pattern_of(self, places: Tensor) -> CompactPattern:
        """Returns the pattern of other places of the flattened matrix, in rising order."""
        size = self.out_features, self.in_features
        return CompactPattern.of(places.cpu(), size).to(self.weight.device)

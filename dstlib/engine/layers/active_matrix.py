"""The active values of a matrix, and what is multiplied by them.

Shapes: O outputs, I inputs, N samples, A active weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.layers.active_weight import ActiveWeight
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.ops.compact_linear import CompactPattern, active_gradient, compact_linear


class ActiveMatrix(ActiveWeight):
    """The active values (A) of a matrix (O, I)."""

    pattern: CompactPattern

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., I) → (..., O), as ``F.linear``."""
        return self.run(
            lambda: compact_linear(x, self.values, bias, self.pattern),
            lambda: F.linear(x, self.spread(self.values), bias),
            x,
        )

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, I) of all weights of some outputs, active or not, summed over the passes."""
        inputs, dtype = self.dense_shape[1], self.values.dtype
        total = self.values.new_zeros(last - first, inputs, requires_grad=False)
        for x, grad, start in self.passes:
            begin, end = max(first, start), min(last, start + grad.shape[-1])
            if begin < end:
                grad = grad.reshape(-1, grad.shape[-1])[:, begin - start : end - start].to(dtype)
                total[begin - first : end - first].addmm_(grad.t(), x.reshape(-1, inputs).to(dtype))
        return total

    def gradient_of_active(self) -> Tensor:
        """Computes the gradient (A) of the active weights, summed over the passes."""
        total = torch.zeros_like(self.values, requires_grad=False)
        for x, grad, start in self.passes:
            x, grad = x.reshape(-1, self.dense_shape[1]), grad.reshape(-1, grad.shape[-1])
            values, pattern = self.part_from(total, start)
            values += active_gradient(grad.to(total.dtype), x.to(total.dtype), pattern)
        return total

    def part_from(self, values: Tensor, first: int) -> tuple[Tensor, CompactPattern]:
        """Returns those of the values, and their pattern, of the outputs that are computed together from one on."""
        return values, self.pattern

    def pattern_of(self, places: Tensor) -> CompactPattern:
        """Returns the pattern of other places of the flattened matrix, in rising order."""
        outputs, inputs = self.dense_shape
        return CompactPattern.of(places.cpu(), (outputs, inputs)).to(self.values.device)


def product(layer: CompactLayer, key: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """Computes ``F.linear`` (..., I) → (..., O) with a weight of a layer, one that it holds or a plain one."""
    if (held := layer.held.get(key)) is None:
        return F.linear(x, getattr(layer, key), bias)
    assert isinstance(held, ActiveMatrix)
    return held.multiply(x, bias)

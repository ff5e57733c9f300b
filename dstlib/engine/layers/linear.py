"""Sparse linear layers as modules.

Shapes: O outputs, I inputs.
"""

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import FastLayer
from dstlib.engine.ops.linear import PreparedLinear, sparse_linear
from dstlib.engine.ops.linear_patterns import LinearPattern
from dstlib.engine.ops.prepared import PreparedCalls
from dstlib.errors import require


class SparseLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies active weights only; made from a dense layer, whose parameters it takes over.

    ``mask`` (O, I) says which weights are active, by default those that are not 0. The ``state_dict`` is that of the
    dense layer. In evaluation mode without gradients the active weights are gathered once, and again when they have
    changed in place; a change through ``weight.data`` is seen after the next call of ``eval()`` or ``train()``.

    >>> dense = nn.Linear(64, 32)
    >>> sparse = SparseLinear(dense, torch.rand(32, 64) < 0.1)
    >>> sparse.weight is dense.weight, sparse(torch.zeros(5, 64)).shape
    (True, torch.Size([5, 32]))
    """

    def __init__(self, linear: nn.Linear, mask: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.dense_gradient = False  # whether backward passes are to give the gradients of inactive weights too
        self.set_mask(linear.weight.detach() != 0 if mask is None else mask)

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask (O, I) that has changed.

        Raises:
            SettingError: The mask is not boolean, or of another shape.
        """
        require(
            mask.dtype == torch.bool and mask.shape == self.weight.shape,
            "mask",
            "SparseLinear",
            allowed=f"bool of shape {tuple(self.weight.shape)}",
            given=f"{mask.dtype} of shape {tuple(mask.shape)}",
            remedy="Pass a mask of the weight, True = active.",
        )
        self.pattern = LinearPattern.of(mask)
        _ = self.pattern.transposed  # made now, since torch.compile cannot follow how
        self._calls: PreparedCalls[PreparedLinear] = PreparedCalls()

    def train(self, mode: bool = True) -> "SparseLinear":
        """As of any module; forgets the weights gathered so far."""
        self._calls = PreparedCalls()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        calls = None if self.training else self._calls
        weight, bias, pattern = self.weight, self.bias, self.pattern
        return sparse_linear(input, weight, bias, pattern, dense_gradient=self.dense_gradient, calls=calls)

    def extra_repr(self) -> str:
        """The size of the layer and how many of its weights are active."""
        return f"{super().extra_repr()}, active={self.pattern.num_active}"


def _obstacle(layer: nn.Linear) -> str | None:
    return None if type(layer) is nn.Linear else f"it is a {type(layer).__name__}"


LINEAR = FastLayer(nn.Linear, _obstacle, SparseLinear)

"""Sparse linear layers as modules.

Shapes: O outputs, I inputs.
"""

import torch
from torch import Tensor, nn

from dstlib.engine.ops.linear import can_multiply_gathered, multiply_gathered, sparse_linear
from dstlib.engine.ops.linear_patterns import LinearPattern
from dstlib.errors import SettingError


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

        Errors: SettingError for a mask that is not boolean or of another shape.
        """
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            allowed, given = f"bool of shape {tuple(self.weight.shape)}", f"{mask.dtype} of shape {tuple(mask.shape)}"
            remedy = "Pass a mask of the weight, True = active."
            raise SettingError.of("mask", "SparseLinear", allowed=allowed, given=given, remedy=remedy)
        self.pattern = LinearPattern.of(mask)
        _ = self.pattern.transposed  # made now, since torch.compile cannot follow how
        self._gathered: tuple[tuple[object, ...], Tensor] | None = None

    def train(self, mode: bool = True) -> "SparseLinear":
        """As of any module; forgets the weights gathered so far."""
        self._gathered = None
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        weight, bias, pattern = self.weight, self.bias, self.pattern
        if self.training or torch.is_grad_enabled() or not can_multiply_gathered(input, weight, bias):
            return sparse_linear(input, weight, bias, pattern, dense_gradient=self.dense_gradient)
        state = (weight.data_ptr(), weight._version, pattern)
        gathered = self._gathered
        if gathered is None or gathered[0] != state:
            self._gathered = gathered = (state, weight.flatten()[pattern.source])
        return multiply_gathered(input, gathered[1], bias, pattern)

    def extra_repr(self) -> str:
        """The size of the layer and how many of its weights are active."""
        return f"{super().extra_repr()}, active={self.pattern.num_active}"

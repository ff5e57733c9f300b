"""Sparse linear layers as modules.

Shapes: O outputs, I inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dstlib.engine.layers.fast_layer import FastLayer, Follows, become, obstacle_to_weight, state_of_parameters
from dstlib.engine.layers.watch import Watch
from dstlib.engine.ops.linear import sparse_linear
from dstlib.engine.ops.linear_patterns import LinearPattern
from dstlib.errors import require


class SparseLinear(Follows, nn.Linear):
    """An ``nn.Linear`` that multiplies active weights only; made from a dense layer, whose parameters it takes over.

    ``mask`` (O, I) says which weights are active, by default those that are not 0. The ``state_dict`` is that of the
    dense layer, and so are its hooks. In evaluation mode without gradients the active weights are gathered once, and
    again when they have changed: see :func:`dstlib.accelerate` for how that is noticed.

    >>> dense = nn.Linear(64, 32)
    >>> sparse = SparseLinear(dense, torch.rand(32, 64) < 0.1)
    >>> sparse.weight is dense.weight, sparse(torch.zeros(5, 64)).shape
    (True, torch.Size([5, 32]))
    """

    watch: Watch[LinearPattern]

    def __init__(self, linear: nn.Linear, mask: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        for name, value in vars(linear).items():  # what belongs to a module belongs to one of them alone
            self.__dict__[name] = value.copy() if name.startswith("_") and hasattr(value, "copy") else value
        self.watch = Watch(LinearPattern.of)
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
        with torch.inference_mode(False):
            self.watch.give(LinearPattern.of(mask))

    @property
    def pattern(self) -> LinearPattern | None:
        """The weights that the last call has computed with; None before the first, where no mask was given."""
        if self.watch.given is not None:
            return self.watch.given
        return None if self.watch.seen is None else self.watch.seen.active

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        if torch.compiler.is_dynamo_compiling() and self.watch.given is not None:
            return self.as_plain(input)
        y: Tensor = self.run(input)
        return y

    def takes(self, *inputs: Any) -> bool:
        """Tells whether the engine computes on an input with so many axes, as it does on any."""
        return True

    def compute(self, plan: bool, input: Tensor) -> Tensor:
        """Computes it on the engine."""
        parameters: dict[str, Any] = self._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        seen = self.watch.look(weight, training=self.training, wants_all=self.dense_gradient)
        grades_all = seen.graded is not seen.active
        return sparse_linear(input, weight, bias, seen.active, dense_gradient=grades_all, calls=seen.calls)

    def as_plain(self, input: Tensor) -> Tensor:
        """Computes by torch alone; a mask that was given may leave out what is not zero."""
        if (given := self.watch.given) is None:
            y: Tensor = super().as_plain(input)
            return y
        mask = torch.zeros(self.weight.numel(), dtype=torch.bool, device=self.weight.device)
        mask = mask.index_fill(0, given.index.long().to(mask.device), True).view_as(self.weight)
        weight = torch.where(mask, self.weight, 0)
        if self.dense_gradient:
            weight = self.weight + (weight - self.weight).detach()
        return linear(input, weight, self.bias)

    def state(self) -> tuple[object, ...]:
        """Returns what the plan depends on."""
        return state_of_parameters(self._parameters.get("weight"), self._parameters.get("bias"))

    def obstacle(self) -> str | None:
        """Tells why the engine cannot compute the layer as it is now; None where it can."""
        return obstacle_to_weight(self)

    def make_plan(self) -> bool:
        """Returns that there is one: the look at the weight is all that a linear layer needs."""
        return True

    def extra_repr(self) -> str:
        """The size of the layer, and how many of its weights are active, as far as that is known."""
        known = "" if self.pattern is None else f", active={self.pattern.num_active}"
        return super().extra_repr() + known


def _obstacle(layer: nn.Linear) -> str | None:
    return obstacle_to_weight(layer) if type(layer) is nn.Linear else f"it is a {type(layer).__name__}"


def _make(layer: nn.Linear) -> SparseLinear:
    made = become(layer, SparseLinear, Watch(LinearPattern.of))
    made.dense_gradient = False
    return made


LINEAR = FastLayer(nn.Linear, _obstacle, _make)

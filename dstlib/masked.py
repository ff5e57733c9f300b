"""A sparse weight in training: its mask, what has happened to it, and the module where it should be."""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ref

from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.errors import StateError, explain
from dstlib.masking.apply import zero_outside_
from dstlib.optimizer_state import parameter_ids, same_shape_state
from dstlib.targets import Weight


@dataclass(eq=False)
class Masked:
    """``step`` counts the steps that its optimizer took; ``updated_at`` is that of the last mask update."""

    weight: Weight
    mask: Tensor
    step: int = 0
    updated_at: int = 0
    is_stepping: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it was when it was made sparse."""
        return self.weight.parameter

    def held_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps on it."""
        return id(self.parameter) in parameter_ids(optimizer)

    def clear(self, optimizers: Iterable[Optimizer]) -> None:
        """Zeros outside the mask, in the weight and in what these optimizers keep for it."""
        zero_outside_(self.parameter, self.mask)
        for optimizer in optimizers:
            for state in same_shape_state(optimizer, self.parameter):
                zero_outside_(state, self.mask)


class Place:
    """A module that held a sparse weight, held weakly: the module decides how long it lives."""

    def __init__(self, module: nn.Module, masked: Masked) -> None:
        self._module = ref(module)
        self._masked = masked

    def is_lost_to(self, optimizer: Optimizer) -> bool:
        """Whether the module now has another parameter there, or one of another shape, on which the optimizer steps."""
        module, parameter = self._module(), self._masked.parameter
        if module is None:
            return False
        held = parameter_ids(optimizer)
        if any(p is parameter for p in module.parameters()):
            return id(parameter) in held and parameter.shape != self._masked.mask.shape
        return any(id(p) in held for p in module.parameters())

    def complain(self) -> None:
        """Raises the StateError for a lost place."""
        raise StateError(
            explain(
                "parameter",
                self._masked.weight.name,
                allowed="the one that was made sparse",
                given="another in its place, or of another shape, which no mask fits",
                remedy="Call sparsify() after load_state_dict(assign=True), weight_norm, add_depth_shift and the like.",
            )
        )


def places(modules: Iterable[nn.Module], masked: Iterable[Masked]) -> list[Place]:
    """Where the weights are now."""
    by_id = {id(m.parameter): m for m in masked}
    return [
        Place(module, by_id[id(parameter)])
        for module in modules
        for parameter in module._parameters.values()
        if id(parameter) in by_id
    ]

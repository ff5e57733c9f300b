"""A sparse weight in training: its mask, what has happened to it, and the module where it should be."""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.errors import StateError
from dstlib.masking.update import zero_outside_
from dstlib.sparsifier.optimizer_state import parameter_ids, same_shape_state
from dstlib.targets import Weight


@dataclass(eq=False)
class Masked:
    """``step`` counts the steps that its optimizer took; ``updated_at`` is that of the last mask update.

    ``trace`` is what the method's trace has gathered, ``traced_at`` the step it has come to. ``hidden`` are the
    values under the mask, zero inside it, and ``reach`` marks what receives gradients: both under dense storage
    only. While ``is_open``, the parameter itself holds the hidden values. ``ranked`` are the densities of the views
    that came of a look at the model, where the method's ``init`` takes one.
    """

    weight: Weight
    mask: Tensor
    step: int = 0
    updated_at: int = 0
    is_stepping: bool = False
    trace: Tensor | None = None
    traced_at: int = 0
    hidden: Tensor | None = None
    reach: Tensor | None = None
    is_open: bool = False
    ranked: tuple[float, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as it was when it was made sparse."""
        return self.weight.parameter

    @property
    def learns(self) -> Tensor | None:
        """What receives gradients: the mask, or what dense storage lets learn; None: everything."""
        return self.mask if self.hidden is None else self.reach

    def held_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps on it."""
        return id(self.parameter) in parameter_ids(optimizer)

    def clear(self, optimizers: Iterable[Optimizer]) -> None:
        """Zeros outside the mask, in the weight and in what these optimizers keep for it."""
        if not self.is_open:
            zero_outside_(self.parameter, self.mask)
        if self.learns is not None:
            for optimizer in optimizers:
                for state in same_shape_state(optimizer, self.parameter):
                    zero_outside_(state, self.learns)

    def follow(self) -> None:
        """Moves all that belongs to the weight to where it is now."""
        device = self.parameter.device
        self.mask = self.mask.to(device)
        for name in ("trace", "hidden", "reach"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    def open(self) -> bool:
        """Under dense storage, puts the hidden values back into the parameter; whether they were hidden."""
        if self.hidden is None or self.is_open:
            return False
        self.parameter.copy_(torch.where(self.mask, self.parameter, self.hidden))
        self.is_open = True
        return True

    def undo_out_of_reach(self) -> None:
        """Takes back what weight decay did to hidden values that were not to learn."""
        if self.hidden is not None and self.reach is not None and self.is_open:
            self.parameter.copy_(torch.where(self.reach, self.parameter, self.hidden))

    def close(self) -> None:
        """Under dense storage, puts what the mask covers aside."""
        if self.hidden is not None and self.is_open:
            self.hidden = zero_outside_(self.parameter.detach().clone(), ~self.mask)
            self.is_open = False


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
        raise StateError.of(
            "parameter",
            self._masked.weight.name,
            allowed="the one that was made sparse",
            given="another in its place, or of another shape, which no mask fits",
            remedy="Call sparsify() after load_state_dict(assign=True), weight_norm, add_depth_shift and the like.",
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

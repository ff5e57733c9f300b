"""A weight of which the active values alone exist: a layer's parameter, and the pattern that says where they belong.

Shapes: O outputs, I inputs, *K kernel taps, none of a matrix; A active entries of the (O, I) matrix, whole kernels.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import is_recorded
from dstlib.errors import StateError
from dstlib.targets.compact_state import unfit, unpack


class PlacedPattern(Protocol):
    """Where the values of a weight belong, in the order in which kernels read them."""

    def places(self) -> Tensor:
        """Returns where in the flattened (O, I) matrix each value lies, (A)."""
        ...

    def rising(self) -> tuple[Tensor, Tensor]:
        """Returns the places in rising order, (A), and where the value of each lies, (A), in int32."""
        ...

    def to(self, device: torch.device) -> Self:
        """Returns the pattern on a device."""
        ...

    @property
    def num_active(self) -> int:
        """A, the number of values."""
        ...


class Pass(NamedTuple):
    """What gradients of weights that do not exist are made of: an input, and the gradient of what came of it."""

    input: Tensor
    grad: Tensor
    first: int = 0  # of the outputs that came of it


class ActiveWeight:
    """The active values (A, *K) of a weight of a layer, its parameter ``key``, in the order of their ``pattern``.

    ``wants_passes`` is asked in each pass that autograd records: whether inputs and output gradients are to stay in
    ``passes`` until they are taken, for whoever wants to know the gradients of weights that do not exist.
    """

    pattern: Any
    left_at: int | None = None  # the values' version when what this is a copy of went to another pattern

    def __init__(self, layer: nn.Module, key: str, places: Tensor) -> None:
        """Takes of a plain layer's weight the values at ``places`` (A) alone, rising in the flattened (O, I) matrix.

        The parameter stays the same object.
        """
        self.layer, self.key = layer, key
        self.dense_shape = self.values.shape
        self.wants_passes: Callable[[], bool] | None = None
        self.passes: list[Pass] = []
        self.copies: WeakSet[ActiveWeight] = WeakSet()  # by copy.deepcopy, as moving averages are made
        pattern = self.pattern_of(places)
        self.hold(pattern, self.values.detach().flatten(0, 1)[pattern.places()])

    def pattern_of(self, places: Tensor) -> PlacedPattern:
        """Returns the pattern of other places of the flattened (O, I) matrix, in rising order."""
        raise NotImplementedError

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, I, *K) of all weights of some outputs, active or not, over the passes."""
        raise NotImplementedError

    def gradient_of_active(self) -> Tensor:
        """Computes the gradient (A, *K) of the active weights, summed over the passes."""
        raise NotImplementedError

    @property
    def values(self) -> nn.Parameter:
        """The parameter (A, *K)."""
        parameter = self.layer._parameters[self.key]
        assert parameter is not None
        return parameter

    @property
    def is_noted(self) -> bool:
        """Whether what the gradients of others are made of is wanted of the pass to come."""
        return torch.is_grad_enabled() and self.wants_passes is not None and self.wants_passes()

    @property
    def mask(self) -> Tensor:
        """Which weights are active, (O, I, *K), made when it is asked for."""
        active = self.active()
        return active.view(*active.shape, *(1 for _ in self.dense_shape[2:])).expand(self.dense_shape).contiguous()

    def active(self) -> Tensor:
        """Returns which values there are, (O, I)."""
        size = self.dense_shape[:2]
        active = torch.zeros(size.numel(), dtype=torch.bool, device=self.values.device)
        return active.index_fill_(0, self.places(), True).view(size)

    def places(self) -> Tensor:
        """Returns where in the flattened (O, I) matrix each of the values belongs, (A)."""
        places: Tensor = self.pattern.places()
        return places.long()

    def spread(self, values: Tensor) -> Tensor:
        """Returns a weight (O, I, *K) of values (A, *K), zeros elsewhere; of the parameter, the plain layer's."""
        size, taps = self.dense_shape[:2], self.dense_shape[2:]
        flat = values.new_zeros(size.numel(), *taps, requires_grad=False)
        return flat.index_copy_(0, self.places(), values).view(self.dense_shape)

    def hold(self, pattern: PlacedPattern, values: Tensor) -> None:
        """Holds other values (A, *K), in the order of another pattern; the parameter stays the same object."""
        own = self.values
        if values.shape == own.shape:
            with torch.no_grad():
                own.copy_(values)
        else:
            own.grad = None
            # a graph that is still alive holds the node that adds gradients up, which knows the old shape; torch lets
            # go of it where the type changes
            other = torch.float32 if values.dtype != torch.float32 else torch.float64
            own.data = values.new_empty(0, dtype=other)
            own.data = values
        self.pattern, self.left_at = pattern, None
        self._leave()

    def _leave(self) -> None:
        """Notes in copies, and in copies of these, that they are of another pattern from here on."""
        for each in self.copies:
            if each.left_at is None:
                each.left_at = each.values._version
            each._leave()

    def run(self, fast: Callable[[], Tensor], plain: Callable[[], Tensor], input: Tensor, first: int = 0) -> Tensor:
        """Returns the outputs from ``first`` on of an input; what records a pass sees how the plain layer computes.

        Their gradient stays in ``passes`` where that is wanted.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return plain()  # into a program, which knows no mask updates
        y = plain() if is_recorded() else fast()
        if y.requires_grad and self.is_noted:
            self.forget_discarded()
            if y._is_view():  # where something is written into it in place, autograd would let go of the hook
                y = torch.ops.aten._unsafe_view(y, list(y.shape))
            x, passes = input.detach(), self.passes
            y.register_hook(lambda grad: passes.append(Pass(x, grad.detach(), first)))
        return y

    def forget_discarded(self) -> None:
        """Forgets, before a pass, what belongs to a gradient that was thrown away: set to None, or to zeros."""
        if torch._C._current_graph_task_id() != -1:
            return  # the pass is recomputed for a backward pass
        grad = self.values.grad
        if grad is None:
            self.forget()
        elif self.has_noted and grad.numel() > 0 and not bool(grad.any()):
            with torch.no_grad():
                is_discarded = bool(self.gradient_of_active().any())  # else the passes have given these zeros
            if is_discarded:
                self.forget()

    @property
    def has_noted(self) -> bool:
        """Whether anything is known of the gradients of others."""
        return bool(self.passes)

    def most_of_passes(self) -> float:
        """Bounds the norm of the gradient over the passes: of what its rounding is a share."""
        return sum(float(x.norm()) * float(grad.norm()) for x, grad, _ in self.passes)

    def forget(self) -> None:
        """Forgets what was noted."""
        self.passes.clear()

    def check_order(self) -> None:
        """Checks that the values belong where the pattern says.

        Raises:
            StateError: The layer is a copy, what it was copied from has gone on to another mask since, and values were
                written to this one after that: an average of numbers that belong elsewhere.
        """
        if self.left_at is None or self.wants_passes is not None or self.values._version == self.left_at:
            return
        raise StateError.of(
            "values",
            f"a copy of {self.key} {tuple(self.dense_shape)} of a {type(self.layer).__name__}",
            allowed="ones that were averaged under one mask",
            given="others, written after a mask update of the layer it was copied from",
            remedy="Make a moving average anew after a mask update, or average sparsifier.dense_state_dict().",
        )

    def load(self, given: Tensor, bits: object, name: str) -> None:
        """Takes what a state dict has under a name: values and the bits of their mask, or a whole weight (O, I, *K).

        Raises:
            StateError: They fit neither each other nor the weight.
        """
        own, values = self.pattern.places().to(given.device).long(), given
        if given.shape == self.dense_shape:
            flat = given.flatten(0, 1)
            found = (flat != 0).flatten(1).any(dim=1) if flat.ndim > 1 else flat != 0
            if not bool(found.index_fill(0, own, False).any()):
                return self.hold(self.pattern, flat[own].to(self.values))
            missing = self.pattern.num_active - int(found.sum())
            if missing < 0:
                allowed = f"zeros outside of the {self.pattern.num_active:,} active weights, or as many elsewhere"
                raise unfit(name, allowed, f"{int(found.sum()):,} that are not zero")
            found[own[~found[own]][:missing]] = True  # active weights may be zero
            pattern = self.pattern_of(found.nonzero().flatten().cpu())
            values = flat[pattern.places().to(given.device)]
        else:
            places = unpack(bits, self.dense_shape[:2], name)
            if given.shape != (len(places), *self.dense_shape[2:]):
                raise unfit(name, f"{len(places):,} values, as its mask has it", f"the shape {tuple(given.shape)}")
            pattern = self.pattern_of(places)
        self.hold(pattern, values.to(self.values))

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what ties the weight to a training."""
        return {**vars(self), "wants_passes": None, "passes": [], "copies": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.copies = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies the weight, as part of its layer, and knows the copy."""
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.copies.add(made)
        return made

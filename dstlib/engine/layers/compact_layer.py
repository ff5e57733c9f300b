"""Layers that hold their active weights only: values, beside the pattern that says where they belong.

Shapes: O outputs, I inputs, *K kernel taps, none of a matrix; A active entries of the (O, I) matrix, whole kernels.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import is_compiled, is_recorded, uncompiled
from dstlib.errors import StateError
from dstlib.targets import HoldsActive
from dstlib.targets.compact_state import MASK, pack, unfit, unpack


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


class CompactLayer(HoldsActive):
    """A layer whose parameter ``weight`` (A, *K) are its active values alone, in the order of its ``pattern``.

    Its class stands before that of the plain layer. No dense weight, and no dense gradient of it, exists at any time.
    The ``state_dict`` has the values and, packed to bits, the mask; that of the plain layer can be loaded, too.

    ``wants_passes`` is asked in each pass that autograd records: whether inputs and output gradients are to stay in
    ``passes`` until they are taken, for whoever wants to know the gradients of weights that do not exist.
    """

    pattern: Any
    wants_passes: Callable[[], bool] | None
    passes: list[tuple[Tensor, Tensor]]
    copies: "WeakSet[CompactLayer]"  # by copy.deepcopy, as moving averages are made
    left_at: int | None = None  # the weight's version when the layer that this one is a copy of went to another pattern

    def forward(self, input: Tensor, *more: Any) -> Tensor:
        """As of the plain layer. What records a pass sees the plain layer's operation, on a weight with zeros."""
        if is_compiled():
            return uncompiled(self.forward, input, *more)
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return self.as_plain(input, *more)  # into a program, which knows no mask updates
        return self.noted(self.as_plain(input, *more) if is_recorded() else self.compute(input, *more), input)

    def compute(self, input: Tensor, *more: Any) -> Tensor:
        """Computes with the active values alone."""
        raise NotImplementedError

    def as_plain(self, input: Tensor, *more: Any) -> Tensor:
        """Computes as the plain layer does."""
        raise NotImplementedError

    def places(self) -> Tensor:
        """Returns where in the flattened (O, I) matrix each of the values belongs, (A)."""
        return self.pattern.places().long()

    def become_plain(self) -> None:
        """Takes the plain layer's class, and a weight without data, of the whole shape."""
        weight = torch.empty(self.dense_shape, dtype=self.weight.dtype, device="meta")
        self.__class__ = next(kind for kind in type(self).__mro__ if not issubclass(kind, HoldsActive))  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, self.weight.requires_grad)

    def _check_order(self) -> None:
        if self.left_at is None or self.wants_passes is not None or self.weight._version == self.left_at:
            return
        raise StateError.of(
            "values",
            f"a copy of a {type(self).__name__} of {tuple(self.dense_shape)}",
            allowed="ones that were averaged under one mask",
            given="others, written after a mask update of the layer it was copied from",
            remedy="Make a moving average anew after a mask update, or average sparsifier.dense_state_dict().",
        )

    @property
    def mask(self) -> Tensor:
        """Which weights are active, (O, I, *K), made when it is asked for."""
        active = self._active()
        return active.view(*active.shape, *(1 for _ in self.dense_shape[2:])).expand(self.dense_shape).contiguous()

    def _active(self) -> Tensor:
        """Returns which values there are, (O, I)."""
        size = self.dense_shape[:2]
        active = torch.zeros(size.numel(), dtype=torch.bool, device=self.weight.device)
        return active.index_fill_(0, self.pattern.places().long(), True).view(size)

    def pattern_of(self, places: Tensor) -> PlacedPattern:
        """Returns the pattern of other places of the flattened (O, I) matrix, in rising order."""
        raise NotImplementedError

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, I, *K) of all weights of some outputs, active or not, over the passes."""
        raise NotImplementedError

    def gradient_of_active(self) -> Tensor:
        """Computes the gradient (A, *K) of the active weights, summed over the passes."""
        raise NotImplementedError

    def noted(self, y: Tensor, input: Tensor) -> Tensor:
        """Returns the output of a pass, whose gradient stays in ``passes`` beside the input where that is wanted.

        Raises:
            StateError: The layer is a copy, what it was copied from has gone on to another mask since, and values were
                written to this one after that: an average of numbers that belong elsewhere.
        """
        self._check_order()
        if y.requires_grad and self.wants_passes is not None and self.wants_passes():
            if (
                self._has_no_gradient() and torch._C._current_graph_task_id() == -1
            ):  # not recomputed for a backward pass
                self.passes.clear()  # what gradients were thrown away belonged to
            x, passes = input.detach(), self.passes
            y.register_hook(lambda grad: passes.append((x, grad.detach())))
        return y

    def _has_no_gradient(self) -> bool:
        grad = self.weight.grad
        return grad is None or (grad.numel() > 0 and not bool(grad.any()))

    def spread(self, values: Tensor) -> Tensor:
        """Returns a weight (O, I, *K) of values (A, *K), zeros elsewhere; of the parameter, the plain layer's."""
        size, taps = self.dense_shape[:2], self.dense_shape[2:]
        flat = values.new_zeros(size.numel(), *taps, requires_grad=False)
        return flat.index_copy_(0, self.places(), values).view(self.dense_shape)

    def hold(self, pattern: PlacedPattern, values: Tensor) -> None:
        """Holds other values (A), in the order of another pattern; the parameter stays the same object."""
        if values.shape == self.weight.shape:
            with torch.no_grad():
                self.weight.copy_(values)
        else:
            self.weight.grad = None
            # a graph that is still alive holds the node that adds gradients up, which knows the old shape; torch lets
            # go of it where the type changes
            other = torch.float32 if values.dtype != torch.float32 else torch.float64
            self.weight.data = values.new_empty(0, dtype=other)
            self.weight.data = values
        self.pattern, self.left_at = pattern, None
        for each in self.copies:
            if each.left_at is None:
                each.left_at = each.weight._version

    def extra_repr(self) -> str:
        """The size of the layer, and how many of its weights are active."""
        return f"{super().extra_repr()}, active={self.pattern.num_active}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.pattern = self.pattern.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._check_order()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + MASK] = pack(self._active())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *more: Any
    ) -> None:
        """Takes values with the mask that they belong to, or the matrix of a plain layer."""
        *_, error_msgs = more
        given, bits = state_dict.get(prefix + "weight"), state_dict.get(prefix + MASK)
        if isinstance(given, Tensor):
            try:
                pattern, values = self._found(given, bits, prefix + "weight")
            except StateError as error:
                error_msgs.append(str(error))
            else:
                self.hold(pattern, values.to(self.weight))
            state_dict = {**state_dict, prefix + "weight": self.weight.detach()}
        own = {key: value for key, value in state_dict.items() if key != prefix + MASK}
        super()._load_from_state_dict(own, prefix, local_metadata, *more)

    def _found(self, given: Tensor, bits: object, name: str) -> tuple[PlacedPattern, Tensor]:
        """Returns the pattern and the values that a state dict has under a name."""
        if given.shape == self.dense_shape:
            flat = given.flatten(0, 1)
            found = (flat != 0).flatten(1).any(dim=1) if flat.ndim > 1 else flat != 0
            own = self.pattern.places().to(flat.device).long()
            if not bool(found.index_fill(0, own, False).any()):
                return self.pattern, flat[own]
            if int(found.sum()) != self.pattern.num_active:
                allowed = f"zeros outside of the {self.pattern.num_active:,} active weights, or as many elsewhere"
                raise unfit(name, allowed, f"{int(found.sum()):,} that are not zero")
            places = found.nonzero().flatten().cpu()
        else:
            places = unpack(bits, self.dense_shape[:2], name)
            if given.shape != (len(places), *self.dense_shape[2:]):
                raise unfit(name, f"{len(places):,} values, as its mask has it", f"the shape {tuple(given.shape)}")
        pattern = self.pattern_of(places)
        if given.shape == self.dense_shape:
            return pattern, given.flatten(0, 1)[pattern.places().to(given.device)]
        return pattern, given

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what ties the layer to a training."""
        return {**vars(self), "wants_passes": None, "passes": [], "copies": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.copies = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copies the layer, and knows the copy."""
        memo[id(self)] = made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        self.copies.add(made)
        return made


def settle(layer: CompactLayer, places: Tensor) -> None:
    """Gives a layer whose class has just changed its active values; ``places`` (A) are theirs, in rising order.

    The parameter ``weight`` stays the same object.
    """
    layer.wants_passes, layer.passes, layer.dense_shape = None, [], layer.weight.shape
    layer.copies = WeakSet()
    pattern = layer.pattern_of(places)
    values = layer.weight.detach().flatten(0, 1)[pattern.places()]
    layer.hold(pattern, values)

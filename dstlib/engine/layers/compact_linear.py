"""Linear layers that hold their active weights only.

Shapes: O outputs, I inputs, N samples, A active weights.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.layers.fast_layer import become
from dstlib.engine.ops.compact_linear import CompactPattern, active_gradient, compact_linear
from dstlib.errors import StateError

_MASK = "weight_mask"  # of a state dict: where the values belong, a bit for each entry of the matrix


class CompactLinear(nn.Linear):
    """An ``nn.Linear`` whose parameter ``weight`` (A) are its active values alone, in the order of its ``pattern``.

    Made of a plain layer by :func:`make_compact`. No dense weight, and no dense gradient of it, exists at any time. The
    ``state_dict`` has the values and, packed to bits, the mask; that of the plain layer can be loaded, too.

    ``wants_passes`` is asked in each pass that autograd records: whether inputs and output gradients are to stay in
    ``passes`` until they are taken, for whoever wants to know the gradients of weights that do not exist.

    >>> layer = make_compact(nn.Linear(64, 32), (torch.rand(32, 64) < 0.1).flatten().nonzero().flatten())
    >>> layer(torch.zeros(5, 64)).shape, layer.weight.numel() == layer.pattern.num_active
    (torch.Size([5, 32]), True)
    """

    pattern: CompactPattern
    wants_passes: Callable[[], bool] | None
    passes: list[tuple[Tensor, Tensor]]

    @property
    def dense_shape(self) -> torch.Size:
        """(O, I) of the matrix that the values are of."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def mask(self) -> Tensor:
        """Which weights are active, (O, I), made when it is asked for."""
        mask = torch.zeros(self.dense_shape.numel(), dtype=torch.bool, device=self.weight.device)
        return mask.index_fill_(0, self.pattern.places().long(), True).view(self.dense_shape)

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O)."""
        y = compact_linear(input, self.weight, self.bias, self.pattern)
        if y.requires_grad and self.wants_passes is not None and self.wants_passes():
            if self.weight.grad is None:
                self.passes.clear()  # what gradients were thrown away belonged to
            x, passes = input.detach(), self.passes
            y.register_hook(lambda grad: passes.append((x, grad.detach())))
        return y

    def spread(self, values: Tensor) -> Tensor:
        """Returns a matrix (O, I) of values (A), zeros elsewhere; of the parameter, the plain layer's weight."""
        flat = values.new_zeros(self.dense_shape.numel(), requires_grad=False)
        return flat.index_copy_(0, self.pattern.places().long(), values.detach()).view(self.dense_shape)

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """Computes the gradient (rows, I) of all weights of some outputs, active or not, summed over the passes."""
        flat = [(x.reshape(-1, self.in_features), grad.reshape(-1, self.out_features)) for x, grad in self.passes]
        total = self.weight.new_zeros(last - first, self.in_features, requires_grad=False)
        for x, grad in flat:
            total.addmm_(grad[:, first:last].t().to(total.dtype), x.to(total.dtype))
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

    def hold(self, pattern: CompactPattern, values: Tensor) -> None:
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
        self.pattern = pattern

    def extra_repr(self) -> str:
        """The size of the layer, and how many of its weights are active."""
        return f"{super().extra_repr()}, active={self.pattern.num_active}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompactLinear":
        super()._apply(fn, recurse)
        self.pattern = self.pattern.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _MASK] = _packed(self.mask)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *more: Any
    ) -> None:
        """Takes values with the mask that they belong to, or the matrix of a plain layer."""
        *_, error_msgs = more
        given, bits = state_dict.get(prefix + "weight"), state_dict.get(prefix + _MASK)
        if isinstance(given, Tensor):
            try:
                pattern, values = self._found(given, bits, prefix + "weight")
            except StateError as error:
                error_msgs.append(str(error))
            else:
                self.hold(pattern, values.to(self.weight))
            state_dict = {**state_dict, prefix + "weight": self.weight.detach()}
        own = {key: value for key, value in state_dict.items() if key != prefix + _MASK}
        super()._load_from_state_dict(own, prefix, local_metadata, *more)

    def _found(self, given: Tensor, bits: object, name: str) -> tuple[CompactPattern, Tensor]:
        """Returns the pattern and the values that a state dict has under a name."""
        if given.shape == self.dense_shape:
            mask = given != 0
            if not bool((mask & ~self.mask.to(mask.device)).any()):
                return self.pattern, given.flatten()[self.pattern.places().to(given.device)]
            if int(mask.sum()) != self.pattern.num_active:
                allowed = f"zeros outside of the {self.pattern.num_active:,} active weights, or as many elsewhere"
                raise _unfit(name, allowed, f"{int(mask.sum()):,} that are not zero")
            places = mask.flatten().nonzero().flatten().cpu()
        else:
            places = _unpacked(bits, self.dense_shape, name)
            if given.shape != places.shape:
                raise _unfit(name, f"{len(places):,} values, as its mask has it", f"the shape {tuple(given.shape)}")
        pattern = self.pattern_of(places)
        if given.shape == self.dense_shape:
            return pattern, given.flatten()[pattern.places().to(given.device)]
        return pattern, given

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but what ties the layer to a training."""
        return {**vars(self), "wants_passes": None, "passes": []}


def make_compact(layer: nn.Linear, places: Tensor) -> CompactLinear:
    """Gives a linear layer, in place, the form that holds its active weights alone.

    ``places`` (A) are where in the flattened matrix these lie, in rising order. The parameter ``weight`` stays the same
    object, its values become (A).
    """
    made = become(layer, CompactLinear)
    made.wants_passes, made.passes = None, []
    pattern = made.pattern_of(places)
    made.hold(pattern, made.weight.detach().flatten()[pattern.places()])
    return made


def _packed(mask: Tensor) -> Tensor:
    """Packs truth values to bits, the first of eight the highest."""
    flat = mask.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(dim=1, dtype=torch.uint8)


def _unpacked(bits: object, shape: torch.Size, name: str) -> Tensor:
    """Returns the places of the bits that are set, in rising order.

    Raises:
        StateError: It is no such mask.
    """
    num = -(-shape.numel() // 8)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (num,) or bits.is_meta:
        given = f"{bits.dtype} of shape {tuple(bits.shape)}" if isinstance(bits, Tensor) else "none"
        raise _unfit(name, f"a mask beside it, {num:,} bytes", given)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    flat = (bits.cpu()[:, None] >> shifts & 1).flatten().bool()
    if bool(flat[shape.numel() :].any()):
        raise _unfit(name, "no bit behind the last weight", "some")
    return flat.nonzero().flatten()


def _unfit(name: str, allowed: str, given: str) -> StateError:
    remedy = "Load what the same model saved, or the state_dict of the plain model with the zeros of its masks."
    return StateError.of("weight", name, allowed=allowed, given=given, remedy=remedy)

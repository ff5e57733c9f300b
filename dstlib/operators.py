"""What the operators of a forward pass multiply and add, whichever module or function calls them.

Shapes: M rows, K inputs, N outputs of a matrix product, of which there may be several at once.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from dstlib.inputs import tensors_in

Kind = Literal["weight", "bias", "products of activations", "sampling"]
Active = Tensor | float  # which entries are active, or a share of each


@dataclass(frozen=True, kw_only=True)
class Work:
    """The FLOPs of one operator: ``dense`` with all entries of its ``parameter``, ``flops`` with the active ones.

    ``sizes`` are the elements of each matrix or kernel that takes part: of the parameter, or else of all.
    """

    kind: Kind
    flops: int
    dense: int
    parameter: Tensor | None = None
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Held:
    """A parameter in memory as a tensor's: ``active`` lies as that does, or is the share of each entry."""

    parameter: Tensor
    tensor: Tensor
    active: Active


class EachOperator(TorchDispatchMode):
    """A mode that sees attention operator by operator, whose fused form would hide what its layers multiply."""

    def __enter__(self) -> Self:
        self._fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast_attention)
        super().__exit__(*exception)


class Operators(EachOperator):
    """Tells of the work of operators: matrix products, convolutions, attention, sampling, recurrent layers.

    Parameters are recognised by their memory, so in slices, transposes and copies too, and of them the entries count
    that ``active`` has by the parameter's identity. ``takes`` is told of all work and says whether it is taken; if not,
    neither is its bias. ``leaves_out`` hears the names of operators that multiply, but are not known here. Products
    that are written as multiplications by entry, and sums, are not seen. Transposed convolutions count at their input,
    ``at_output`` at their output.

    >>> told, weight = [], torch.ones(4, 3)
    >>> with Operators([weight], {}, takes=lambda work: told.append(work.flops) is None, leaves_out=print):
    ...     _ = torch.fft.fft(torch.ones(2, 5, 3) @ weight.T)
    aten::_fft_r2c
    >>> told == [2 * (2 * 5) * (3 * 4)]
    True
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        parameters: Iterable[Tensor],
        active: Mapping[int, Tensor],
        *,
        takes: Callable[[Work], bool],
        leaves_out: Callable[[str], None],
        at_output: bool = False,
    ) -> None:
        super().__init__()
        self._takes, self._leaves_out, self._at_output = takes, leaves_out, at_output
        self._held: dict[int, list[_Held]] = {}
        self._last: Tensor | None = None  # the output of the last work that was taken
        for parameter in parameters:
            self._hold(parameter, parameter, active.get(id(parameter), 1.0))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes an operator, and tells of its work."""
        kwargs = kwargs or {}
        name, role = _role(func)
        if role == "composite":  # as they arrive here under inference mode
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        if role == "unknown":
            self._leaves_out(name)
        elif role == "seen":
            self._see(name, args if not kwargs else _by_place(func, args, kwargs), output)
        return output

    def _see(self, name: str, args: Sequence[Any], output: Any) -> None:
        """Tells of the work of an operator that is known, or follows what it makes of a parameter."""
        if any(x.layout != torch.strided for x in tensors_in((*args, output))):
            if name in _PRODUCTS:
                self._leaves_out(f"aten::{name} of tensors that are not dense")
        elif name in _SUMS:
            self._add(args[0], args[1], output)
        elif name in _COPIES:
            self._follow([x for x in args if isinstance(x, Tensor)], output)
        elif name in _CHOICES:
            self._choose(args[0], output)
        elif next(tensors_in(output)).dtype != torch.int64:  # of indices
            works = list(self._work(name, args, output))
            if not works:
                self._leaves_out(f"aten::{name}")
            for work in works:
                if not self._takes(work):
                    self._last = None
                    break
                self._last = next(tensors_in(output))

    def _work(self, name: str, args: Sequence[Any], output: Any) -> Iterator[Work]:
        """Yields what an operator multiplies, then the bias that it adds."""
        if name in _ATTENTION:
            query, key, value = args[:3]
            yield _between_activations(2 * query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1]))
        elif name in _TAPS:
            mode = args[2] if len(args) > 2 else 0  # cuDNN's is linear, and does not say so
            flops = 2 * _TAPS[name][mode] * output.numel()
            yield Work(kind="sampling", flops=flops, dense=flops)
        elif name in _RECURRENT:
            rows = args[0].shape[:-1].numel()
            held = [(x, held) for x in tensors_in(args[1:]) if (held := self._find(x))]
            for x, (parameter, active) in held:
                yield _of(parameter, x, active, rows * 2) if x.ndim == 2 else _bias(rows * x.numel(), parameter)
        elif name == "convolution":
            yield from self._convolution(*args, output=output)
        elif name == "_grouped_mm":
            yield self._grouped(args[0], args[1])
        else:
            a, b = args[1:3] if name in _ADDED else args[:2]
            yield self._product(a[None] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b)
            if name in _ADDED and self._is_bias(args[0]):
                yield _bias(output.numel(), self._parameter(args[0]))

    def _product(self, a: Tensor, b: Tensor) -> Work:
        """Returns the work of a (..., M, K) times b (..., K, N), of which it is done where both entries are active."""
        left, right = self._find(a), self._find(b)
        dense = 2 * a.numel() * b.shape[-1]
        if left is None and right is None:
            return _between_activations(dense, a.shape[-2:].numel(), b.shape[-2:].numel())
        left_active, right_active = (1.0 if held is None else held[1] for held in (left, right))
        rows: Any = left_active.sum(-2, dtype=torch.float64) if isinstance(left_active, Tensor) else left_active
        columns: Any = right_active.sum(-1, dtype=torch.float64) if isinstance(right_active, Tensor) else right_active
        if not isinstance(rows, Tensor) and not isinstance(columns, Tensor):
            flops = dense * rows * columns
        else:
            rows = rows if isinstance(rows, Tensor) else rows * a.shape[-2]
            columns = columns if isinstance(columns, Tensor) else columns * b.shape[-1]
            flops = 2 * float((rows * columns).sum())
        parameter, weight = (right[0], b) if right is not None else (left[0], a)  # type: ignore[index]
        return Work(
            kind="weight", flops=round(flops), dense=dense, parameter=parameter, sizes=(weight.shape[-2:].numel(),)
        )

    def _grouped(self, a: Tensor, b: Tensor) -> Work:
        """Returns the work of rows that meet one of several matrices each; which, is not looked at."""
        if a.ndim == b.ndim == 3:
            return self._product(a, b)
        if a.ndim == b.ndim == 2:  # each of several products has its part of the inputs
            return _between_activations(2 * a.numel() * b.shape[-1])
        rows, stack, per_row = (a, b, a.shape[-1]) if b.ndim == 3 else (b, a, a.shape[-1])
        num_rows = rows.numel() // per_row
        held = self._find(stack)
        if held is None:
            return _between_activations(2 * num_rows * stack[0].numel(), stack[0].numel())
        return _of(held[0], stack, held[1], 2 * num_rows / len(stack))

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any, output: Tensor) -> Iterator[Work]:
        """Yields the work of a convolution."""
        *_, is_transposed, _, num_groups = how
        if is_transposed and not self._at_output:
            num_positions = x.numel() // x.shape[1]
        else:
            num_positions = output.numel() // (weight.shape[1] * num_groups if is_transposed else len(weight))
        held = self._find(weight)
        if held is None:
            yield _between_activations(2 * num_positions * weight.numel(), weight.numel())
        else:
            yield _of(held[0], weight, held[1], 2 * num_positions)
        if bias is not None:
            yield _bias(output.numel(), self._parameter(bias))

    def _add(self, a: Any, b: Any, output: Tensor) -> None:
        """Tells of a bias that is added to what the last work gave."""
        for x, added in ((a, b), (b, a)):
            is_after = isinstance(x, Tensor) and self._last is not None and _memory(x) == _memory(self._last)
            if is_after and isinstance(added, Tensor) and self._is_bias(added):
                self._takes(_bias(output.numel(), self._parameter(added)))

    def _is_bias(self, added: Tensor) -> bool:
        """Whether what is added is a parameter of one axis, or a vector to rows."""
        is_vector = added.ndim > 0 and added.numel() == max(added.shape)
        return is_vector and (added.ndim == 1 or self._find(added) is not None)

    # ---- where parameters are

    def _hold(self, tensor: Tensor, parameter: Tensor, active: Active) -> None:
        """Remembers that a tensor holds a parameter, and the tensor, so that no other is given its memory."""
        if tensor.layout != torch.strided:
            return
        if isinstance(active, Tensor):
            laid = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bool, device="cpu")
            active = laid.copy_(active)
        self._held.setdefault(_memory(tensor), []).append(_Held(parameter, tensor, active))

    def _find(self, x: Tensor) -> tuple[Tensor, Active] | None:
        """Returns the parameter of which a tensor holds all or a part, and what of that is active."""
        for held in self._held.get(_memory(x), ()):
            offset = int(x.storage_offset()) - int(held.tensor.storage_offset())
            if 0 <= offset <= _span(held.tensor) - _span(x):
                active = held.active
                in_part = active.as_strided(x.shape, x.stride(), offset) if isinstance(active, Tensor) else active
                return held.parameter, in_part
        return None

    def _parameter(self, x: Tensor) -> Tensor | None:
        found = self._find(x)
        return None if found is None else found[0]

    def _follow(self, given: Sequence[Tensor], output: Tensor) -> None:
        """Follows a parameter into what is made of its entries one by one, with single numbers at most."""
        for x in given:
            found = self._find(x)
            is_alone = all(y is x or y.numel() == 1 for y in given)
            if found is not None and is_alone and output.shape == x.shape and _memory(output) != _memory(x):
                self._hold(output, *found)

    def _choose(self, x: Tensor, output: Tensor) -> None:
        """Follows a parameter into parts that are chosen by values, of which the mean stands for each."""
        if (found := self._find(x)) is not None:
            parameter, active = found
            share = float(active.mean(dtype=torch.float64)) if isinstance(active, Tensor) else active
            self._hold(output, parameter, share)


def _between_activations(flops: int, *sizes: int) -> Work:
    return Work(kind="products of activations", flops=flops, dense=flops, sizes=sizes)


def _bias(flops: int, parameter: Tensor | None) -> Work:
    return Work(kind="bias", flops=flops, dense=flops, parameter=parameter)


def _of(parameter: Tensor, weight: Tensor, active: Active, per_entry: float) -> Work:
    """Returns the work of a weight each of whose active entries adds as much."""
    dense = round(per_entry * weight.numel())
    num_active = int(active.sum()) if isinstance(active, Tensor) else active * weight.numel()
    flops = round(per_entry * num_active)
    return Work(kind="weight", flops=flops, dense=dense, parameter=parameter, sizes=(weight.numel(),))


_ADDED = frozenset({"addmm", "addmv", "baddbmm"})
_ATTENTION = frozenset(
    {
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
        *("_scaled_dot_product_fused_attention_overrideable", "flex_attention"),
    }
)
# How many entries are mixed into one, by the number of the mode: linear, nearest (which only looks up), cubic.
_TAPS = {"grid_sampler_2d": (4, 0, 16), "grid_sampler_3d": (8, 0), "cudnn_grid_sampler": (4,)}
_RECURRENT = frozenset({"mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"})
_PRODUCTS = frozenset(
    {
        *("mm", "mv", "bmm", "dot", "_int_mm", "_grouped_mm", "convolution"),
        *(_ADDED | _ATTENTION | _TAPS.keys() | _RECURRENT),
    }
)
_COPIES = frozenset({"clone", "_to_copy", "mul", "div", "neg"})  # zeros stay zeros
_CHOICES = frozenset({"index", "index_select"})
_SUMS = frozenset({"add", "add_"})
# Of torch's other operators, those whose names say that they multiply; of other libraries' all.
_SAY_SO = re.compile(
    r"(?:^|_)(?:fft|linalg(?!_check)|cholesky|inverse|lu|qr|svd|solve|cdist|pdist|trilinear|\w*mm|linear|conv|convolution"
    r"|attention|attn|rnn|lstm|gru|scan)(?:_|$)"
)
_WITHOUT_WORK = frozenset({"prim", "prims", "profiler", "c10d", "_c10d_functional"})


@cache
def _role(func: Any) -> tuple[str, Literal["seen", "unknown", "composite", "free"]]:
    """Returns the name of an operator, torch's own without a prefix if it is seen, and what is to be done about it."""
    if not isinstance(func, OpOverload):
        name = str(func.name())
        return (name, "seen") if name in _ATTENTION else (f"{func.namespace}::{name}", "unknown")
    namespace, name = func.namespace, func._schema.name.partition("::")[2]
    if namespace == "aten" and name in _PRODUCTS | _COPIES | _CHOICES | _SUMS:
        return name, "seen"
    if namespace in _WITHOUT_WORK:
        return name, "free"
    if func._can_decompose():
        return name, "composite"
    is_unknown = namespace != "aten" or _SAY_SO.search(name) is not None
    return f"{namespace}::{name}", "unknown" if is_unknown else "free"


def _by_place(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Returns the arguments of a call in the order of the operator's schema."""
    rest = func._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(a.name, a.default_value if a.has_default_value() else None) for a in rest)]


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _span(x: Tensor) -> int:
    """Counts the elements of memory from a tensor's first to its last."""
    return 1 + sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True)) if x.numel() else 0

"""What the matrices of a model are multiplied by while it runs: their inputs, caught at the products themselves.

A product is recognised by the memory of what it multiplies by, so that it does not matter which module computes it:
linear layers, either way round, convolutions, attention, one of several stacked experts, a raw parameter of a user.

Shapes: O outputs, I inputs, *K kernel taps, N = I·K; T rows of inputs, one for each token or position; P parts of the
outputs that read inputs of their own, one but for grouped convolutions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from dstlib.errors import ScoreError, few
from dstlib.operators import EachOperator

Caught = Callable[
    [Sequence[str], Iterator[Tensor]], None
]  # of matrices that share inputs, and these in parts (P, T, N)

_aten = torch.ops.aten


class Products(EachOperator):
    """Tells of each product of inputs with one of these matrices (O, I, *K), where there are any rows of inputs.

    The matrices are views of the memory of their parameters, those of one parameter in its order; the outputs may be
    on several axes, as the memory of rows that alternate has no view with one.

    >>> weight = torch.ones(4, 3)
    >>> with Products({"fc": weight}, lambda names, inputs: print(names, [tuple(x.shape) for x in inputs])):
    ...     _ = torch.nn.functional.linear(torch.ones(2, 5, 3), weight)
    ['fc'] [(1, 10, 3)]
    """

    def __init__(self, matrices: Mapping[str, Tensor], caught: Caught) -> None:
        super().__init__()
        self._caught = caught
        self._by_memory: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, matrix in matrices.items():
            self._by_memory[_memory(matrix)].append((name, matrix))

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Looks at what an operation multiplies, and computes it."""
        kwargs, operation = kwargs or {}, func.overloadpacket
        if operation not in _OPERATIONS:
            with self:  # a composite one, as they arrive here under inference mode
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        if operation is _aten.convolution:
            self._tell_of_convolution(func, *args)
        else:
            for a, b in _pairs(operation, args, kwargs):
                self._tell_of_product(b.mT, a)
                self._tell_of_product(a, b.mT)
        return func(*args, **kwargs)

    def _tell_of_product(self, weight: Tensor, inputs: Tensor) -> None:
        """Tells of inputs (T, I) times the transpose of a weight (O, I), if that holds any of the matrices."""
        names = [name for name, matrix in self._by_memory.get(_memory(weight), ()) if _holds(weight, matrix)]
        if names and len(inputs):
            self._caught(names, iter([inputs[None]]))

    def _tell_of_convolution(self, func: OpOverload, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> None:
        """Tells of a convolution, whose inputs are what it returns when its weight is the identity."""
        *_, is_transposed, _, num_groups = how
        # the groups of a transposed convolution are matrices of their own; of any other, all are one
        num_matrices = num_groups if is_transposed else 1
        known = self._by_memory.get(_memory(weight), ())
        names = [n for n, m in known if num_groups == 1 or m.numel() * num_matrices == weight.numel()]
        if not names or not len(x):
            return
        num_in, taps = x.shape[1] // num_groups, weight.shape[2:]
        size = num_in * prod(taps)
        identity = torch.eye(size, dtype=x.dtype, device=x.device).view(size, num_in, *taps)
        identity = identity.transpose(0, 1) if is_transposed else identity
        identity = identity.repeat(num_groups, *(1 for _ in identity.shape[1:]))

        def patches(part: slice) -> Iterator[Tensor]:
            for sample in x.split(1):
                yield func(sample, identity, None, *how).view(num_groups, size, -1).mT[part]

        if num_matrices > 1:
            for i, name in enumerate(names):
                self._caught([name], patches(slice(i, i + 1)))
        else:
            self._caught(names, patches(slice(None)))


_OPERATIONS = {
    *(_aten.mm, _aten.addmm, _aten.mv, _aten.addmv, _aten.bmm, _aten.baddbmm, _aten._grouped_mm),
    _aten.convolution,
}


def _pairs(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the pairs of matrices that an operation multiplies."""
    a, b = args[1:3] if operation in (_aten.addmm, _aten.addmv, _aten.baddbmm) else args[:2]
    if b.ndim == 1:
        yield a, b[:, None]
    elif a.ndim == b.ndim == 2:
        yield a, b
    elif a.ndim == b.ndim:
        yield from zip(a, b, strict=True)
    elif a.ndim == 2:  # rows that are sorted by the one of several matrices that they meet
        ends = (args[2] if len(args) > 2 else kwargs["offs"]).tolist()
        yield from zip((a[i:j] for i, j in zip([0, *ends], ends, strict=False)), b, strict=True)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


def _holds(weight: Tensor, matrix: Tensor) -> bool:
    """Whether a matrix, its outputs on one axis or several, consists of rows of a weight, in its very memory."""
    if weight.dtype != matrix.dtype or weight.shape[1] != matrix.shape[-1] or not matrix.numel():
        return False
    step, rows = max(weight.stride(0), 1), matrix[..., 0]
    first = int(matrix.storage_offset()) - int(weight.storage_offset())
    last = first + sum(stride * (size - 1) for stride, size in zip(rows.stride(), rows.shape, strict=True))
    are_rows = all(stride % step == 0 for stride, size in zip(rows.stride(), rows.shape, strict=True) if size > 1)
    is_row_alike = weight.shape[1] == 1 or weight.stride(1) == matrix.stride(-1)
    return are_rows and is_row_alike and first % step == 0 and 0 <= first <= last <= step * (len(weight) - 1)


def moments_in_turn(
    run: Callable[[], None], weights: Mapping[str, Mapping[str, Tensor]], *, is_full: bool, where: str
) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
    """Yields the name of each weight with the second moments of the inputs of its matrices, in order of their products.

    ``run`` runs the model, once to see the order, and then once for each weight, so that it sees what has become of
    those before it. ``weights`` are the matrices by name of each weight by name, as :class:`Products` takes them.
    Moments are sums over all rows, Σ x·xᵀ (P, N, N), or only their diagonal (P, N), in single precision at least; None
    where no rows came any more. Held at a time are those of one weight.

    Raises:
        ScoreError: A matrix takes part in no product that can be seen; nothing was yielded then.
    """
    seen: dict[str, None] = {}
    with Products(_joined(weights), lambda names, _: seen.update(dict.fromkeys(names))):
        run()
    owner = {view: name for name, views in weights.items() for view in views}
    if unseen := [view for view in owner if view not in seen]:
        raise ScoreError.of(
            f"inputs of {few(unseen, most=3)}",
            where,
            allowed="rows that the forward multiplies by the weight itself, as it lies in memory",
            given="none",
            remedy="Run all of the model in forward=, uncompiled and without autocast, on batches that reach all of it "
            "(every expert, too); or leave these weights out by exclude=.",
        )
    for name in dict.fromkeys(owner[view] for view in seen):
        yield name, _moments(run, weights[name], is_full=is_full)


def _joined(weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {view: matrix for views in weights.values() for view, matrix in views.items()}


def _moments(run: Callable[[], None], views: Mapping[str, Tensor], *, is_full: bool) -> dict[str, Tensor | None]:
    """Runs the model and returns the second moments of the inputs of these matrices; shared ones are one tensor."""
    moments: dict[tuple[str, ...], Tensor] = {}

    def add(names: Sequence[str], inputs: Iterator[Tensor]) -> None:
        for x in inputs:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            moment = x.mT @ x if is_full else x.square().sum(dim=1)
            moments[tuple(names)] = moments[tuple(names)] + moment if tuple(names) in moments else moment

    with Products(views, add):
        run()
    found = {view: [moment for names, moment in moments.items() if view in names] for view in views}
    return {view: reduce(torch.add, parts) if parts else None for view, parts in found.items()}

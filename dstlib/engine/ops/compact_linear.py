"""``F.linear`` with a weight of which only the active values exist, and its gradients: nothing here is dense.

Shapes: O outputs, I inputs, N samples, A active weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.linear import (
    LINEAR_BACKWARD_INPUT,
    NUM_PATTERN,
    LinearProblem,
    call_kernel,
    matrix_of,
    rows_of,
    with_rows,
)
from dstlib.engine.ops.linear_patterns import PART, STRETCH, LinearPattern, are_alike, ordered
from dstlib.engine.ops.operator import Operator, Tensors, by_kernel, by_torch, groups
from dstlib.engine.ops.places import turned
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check, kernels
from dstlib.errors import InputError

_TILE = 2**22  # entries of the matrix that are looked at together


@dataclass(frozen=True, eq=False)
class CompactPattern:
    """Which weights of an (O, I) matrix are active, where their values lie in the order in which kernels read them.

    The order is a function of the mask alone. ``own`` has no ``index``, as the values are where they are read;
    ``transposed`` is the same matrix (I, O), whose ``index`` counts in the values.

    >>> blocks = torch.eye(2, dtype=torch.bool).repeat_interleave(4, 0).repeat_interleave(2, 1)
    >>> pattern = CompactPattern.of(blocks.flatten().nonzero().flatten(), (8, 4))
    >>> pattern.places()[:6].tolist()  # columns of four
    [0, 4, 8, 12, 1, 5]
    """

    own: LinearPattern
    transposed: LinearPattern

    @classmethod
    def of(cls, places: Tensor, size: tuple[int, int]) -> "CompactPattern":
        """Returns the pattern of active weights that lie at these places of the flattened matrix, in rising order.

        What it takes beside the result is two numbers for each, and by torch a few million more.
        """
        places = places.int()
        with torch.inference_mode(False):
            order = torch.empty_like(places)
            own = _ordered(places, size, order=order)
            turned_places, numbers = turned(places, order, size)
            del places, order  # of all that is as long as the weight, as little as can be at a time
            return cls(own, _ordered(turned_places, (size[1], size[0]), numbers=numbers))

    def places(self) -> Tensor:
        """Returns where in the flattened matrix (O · I) each of the values belongs, (A), in int32."""
        return _places(self.own)

    def rising(self) -> tuple[Tensor, Tensor]:
        """Returns the places in rising order, (A), and where the value of each lies, (A), in int32."""
        own = self.own
        found = kernels() if own.col_idx.is_cpu else None
        if found is None:
            places, order = self.places().sort()
            return places, order.int()
        places, order = (own.col_idx.new_empty(self.num_active) for _ in range(2))
        problem = structs.LinearOrder(
            places=places.data_ptr(),
            order=order.data_ptr(),
            col_idx=own.col_idx.data_ptr(),
            segments=own.segments.data_ptr(),
            part_ptr=own.part_ptr.data_ptr(),
            rows=own.size[0],
            cols=own.size[1],
            group=own.rows_per_group,
            num_segments=len(own.segments),
        )
        check(found.linear_places(problem, torch.get_num_threads()), "a linear pattern")
        return places, order

    def to(self, device: torch.device) -> "CompactPattern":
        """Returns the pattern on a device."""
        return CompactPattern(*(_on(each, device) for each in (self.own, self.transposed)))

    @property
    def num_active(self) -> int:
        """A, the number of active weights."""
        return self.own.col_idx.numel() * self.own.rows_per_group

    @property
    def tensors(self) -> list[Tensor]:
        """Those of both patterns."""
        return [*self.own.tensors, *self.transposed.tensors]


def _ordered(
    places: Tensor, size: tuple[int, int], *, numbers: Tensor | None = None, order: Tensor | None = None
) -> LinearPattern:
    """Orders weights at rising places of a matrix; ``numbers``: what the index is to say of each, without it none.

    ``order`` is written: where the value of each of the places lies.
    """
    found = kernels()
    if found is None:
        pattern = _by_tiles(places, numbers, size)
        if order is not None:
            order.copy_(_places(pattern).sort().indices)
        return pattern
    num, num_stretches = len(places), -(-size[1] // STRETCH)
    col_idx = torch.empty_like(places)
    index = None if numbers is None else torch.empty_like(places)
    segments = places.new_empty(min(num, size[0] * num_stretches), 3)  # as many as there can be
    part_ptr = places.new_empty(-(-size[0] // PART) + 1)
    pointers = (
        None if x is None else x.data_ptr() for x in (places, numbers, order, col_idx, index, segments, part_ptr)
    )
    problem = structs.LinearOrder(*pointers, *size, num)
    check(found.linear_order(problem, torch.get_num_threads()), "a linear pattern")
    alike = problem.group
    col_idx = col_idx if alike == 1 else col_idx[: num // alike].clone()
    index, segments = col_idx.new_empty(0) if index is None else index, segments[: problem.num_segments].clone()
    return LinearPattern(col_idx, index, segments, part_ptr, alike, size)


def _by_tiles(places: Tensor, numbers: Tensor | None, size: tuple[int, int]) -> LinearPattern:
    """Does it with torch."""
    rows, columns = size
    height = max(_TILE // columns // PART, 1) * PART
    starts = range(0, rows, height)
    bounds = torch.tensor([min(start + height, rows) * columns for start in starts], dtype=places.dtype)
    ends = torch.searchsorted(places, bounds).tolist()
    tiles = list(zip(starts, [0, *ends[:-1]], ends, strict=True))
    alike = next(n for n in (4, 3, 2, 1) if all(are_alike(_mask(places[i:j], s, height, size), n) for s, i, j in tiles))
    parts: list[LinearPattern] = []
    for start, i, j in tiles:
        mask, values = _mask(places[i:j], start, height, size), None
        if numbers is not None:
            values = torch.zeros(mask.shape, dtype=torch.int32)
            values.view(-1)[places[i:j] - start * columns] = numbers[i:j].int()
        parts.append(ordered(mask, values, rows=alike))
    return _joined(parts, alike, size, has_index=numbers is not None)


def _mask(places: Tensor, start: int, height: int, size: tuple[int, int]) -> Tensor:
    rows, columns = size
    mask = torch.zeros(min(height, rows - start), columns, dtype=torch.bool)
    mask.view(-1)[places - start * columns] = True
    return mask


def _joined(parts: Sequence[LinearPattern], rows: int, size: tuple[int, int], *, has_index: bool) -> LinearPattern:
    """Joins the patterns of neighbouring rows."""
    segments, ends, num_cols, num_segments, num_groups = [], [parts[0].part_ptr[:1]], 0, 0, 0
    for part in parts:
        offset = torch.tensor([num_groups, num_cols, num_cols], dtype=torch.int32)
        segments.append(part.segments + offset)
        ends.append(part.part_ptr[1:] + num_segments)
        num_cols += part.col_idx.numel()
        num_segments += len(part.segments)
        num_groups += part.size[0] // rows
    col_idx = torch.cat([part.col_idx for part in parts])
    index = torch.cat([part.index for part in parts]) if has_index else col_idx.new_empty(0)
    return LinearPattern(col_idx, index, torch.cat(segments), torch.cat(ends), rows, size)


def _places(pattern: LinearPattern) -> Tensor:
    row = rows_of(pattern.segments, pattern.rows_per_group)
    return row.mul_(pattern.size[1]).add_(pattern.col_idx[:, None]).flatten()


def _on(pattern: LinearPattern, device: torch.device) -> LinearPattern:
    col_idx, index, segments, part_ptr = (x.to(device) for x in pattern.tensors)
    return LinearPattern(col_idx, index, segments, part_ptr, pattern.rows_per_group, pattern.size)


@dataclass(frozen=True)
class CompactLinearProblem(LinearProblem):
    """A linear layer of tensors x (N, I), its values (A), bias where there is one, and both patterns."""

    def check(self, tensors: Tensors) -> None:
        """Refuses values that are not one for each active weight, and a bias that is not one for each output.

        Raises:
            InputError: They are not.
        """
        super().check(tensors)
        values, (col_idx, *_) = tensors[1], self.pattern(tensors)
        rows, left = divmod(values.numel(), max(col_idx.numel(), 1))
        if values.ndim != 1 or left or (col_idx.numel() and rows > 4) or (not col_idx.numel() and rows):
            allowed, given = "one number for each active weight", f"a tensor of shape {tuple(values.shape)}"
            remedy = "Load weights by load_state_dict, which knows where they belong."
            raise InputError.of("values", "compact_linear()", allowed=allowed, given=given, remedy=remedy)


def compact_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: CompactPattern) -> Tensor:
    """Computes ``F.linear`` (..., I) → (..., O) with active values (A) in the order of the pattern.

    Its gradients are those of x, of the values and of the bias. Under autocast it computes in the type of the values.

    Raises:
        InputError: x has not I features, or there are not A values.

    >>> pattern = CompactPattern.of(torch.tensor([0, 2, 3]), (2, 2))
    >>> compact_linear(torch.tensor([1.0, 10.0]), torch.tensor([1.0, 2.0, 3.0]), None, pattern)
    tensor([ 1., 32.])
    """
    outputs, inputs = pattern.own.size
    if x.shape[-1:] != (inputs,):
        given, remedy = f"the shape {tuple(x.shape)}", "Pass what the dense layer takes."
        raise InputError.of("x", "compact_linear()", allowed=f"(..., {inputs})", given=given, remedy=remedy)
    samples = x.shape[:-1]
    tensors = [x.reshape(samples.numel(), inputs), values, *([] if bias is None else [bias]), *pattern.tensors]
    return COMPACT_LINEAR(CompactLinearProblem(outputs, bias is not None), tensors)[0].view(*samples, outputs)


def active_gradient(grad: Tensor, x: Tensor, pattern: CompactPattern) -> Tensor:
    """Computes the gradient (A) of the active values alone, from that of the outputs (N, O) and the inputs (N, I)."""
    like = x.new_empty(pattern.num_active)
    problem = CompactLinearProblem(pattern.own.size[0])
    return COMPACT_LINEAR_BACKWARD_WEIGHTS(problem, [grad.to(x.dtype), x, like, *pattern.own.tensors])[0]


def _multiply(found: Kernels, problem: CompactLinearProblem, tensors: Tensors) -> list[Tensor]:
    x, values = with_rows(tensors[0]), tensors[1].contiguous()
    y = x.new_empty(x.shape[0], problem.outputs)
    call_kernel(found.linear_forward, (x, y), None, values, problem.bias(tensors), problem.pattern(tensors))
    return [y]


def _dense(problem: CompactLinearProblem, tensors: Tensors) -> Tensor:
    x, values = tensors[:2]
    matrix = matrix_of(values, problem.pattern(tensors), problem.outputs, x.shape[1])
    return F.linear(x, matrix, problem.bias(tensors))


def _backward_weights(found: Kernels, problem: CompactLinearProblem, tensors: Tensors) -> list[Tensor]:
    """Computes (N, O), (N, I) → the gradient (A) of the values."""
    grad, x, like, *pattern = tensors
    x, grad, values = with_rows(x), with_rows(grad), torch.empty_like(like)
    call_kernel(found.linear_backward_weights, (x, grad), None, values, None, pattern)
    return [values]


def _backward_weights_with_torch(problem: CompactLinearProblem, tensors: Tensors) -> list[Tensor]:
    grad, x, like, col_idx, _, segments, _ = tensors
    if not like.numel():
        return [torch.empty_like(like)]
    row = rows_of(segments, like.numel() // col_idx.numel())
    return [(grad.t() @ x)[row, col_idx[:, None]].flatten().to(like.dtype)]


def _backward(
    problem: CompactLinearProblem, kept: Tensors, grads: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    (x, values), _, pattern, transposed = groups(kept, 2, problem.has_bias, NUM_PATTERN)
    grad = grads[0]
    found: list[Tensor | None] = [None] * (2 + problem.has_bias)
    if wanted[0]:
        found[0] = LINEAR_BACKWARD_INPUT(LinearProblem(x.shape[1]), [grad, values, *transposed])[0]
    if wanted[1]:
        found[1] = COMPACT_LINEAR_BACKWARD_WEIGHTS(problem, [grad, x, values, *pattern])[0]
    if problem.has_bias and wanted[2]:
        found[2] = grad.sum(0)
    return found


COMPACT_LINEAR_BACKWARD_WEIGHTS = Operator(
    "compact_linear_backward_weights",
    CompactLinearProblem,
    (
        by_kernel("gathered", _backward_weights, reads=lambda problem, tensors: tensors[:3]),
        by_torch(_backward_weights_with_torch),
    ),
    fake=lambda problem, tensors: [torch.empty_like(tensors[2])],
)
COMPACT_LINEAR = Operator(
    "compact_linear",
    CompactLinearProblem,
    (
        by_kernel("gathered", _multiply, reads=lambda problem, tensors: tensors[: 2 + problem.has_bias]),
        by_torch(lambda problem, tensors: [_dense(problem, tensors)]),
    ),
    fake=lambda problem, tensors: [tensors[0].new_empty(tensors[0].shape[0], problem.outputs)],
    backward=_backward,
    keep=lambda problem, tensors, outputs: [*tensors],
    plain=_dense,
)

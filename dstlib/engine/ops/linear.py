"""``F.linear`` with active weights only, and its gradients.

Shapes: O outputs, I inputs, N samples, A active weights. Scattered weights, a constant number per output and blocks of
any size take the same way; blocks whose height is a multiple of 4 (or of 2 or 3) are the fastest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.linear_patterns import LinearPattern
from dstlib.engine.ops.operator import Operator, Problem, Tensors, by_kernel, by_torch, groups, in_type, kernels_for
from dstlib.engine.ops.prepared import PreparedCalls, state_of
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check
from dstlib.errors import InputError

NUM_PATTERN = 4  # tensors: col_idx, index, segments, part_ptr


@dataclass(frozen=True)
class LinearProblem(Problem):
    """A linear layer of tensors x (N, I), weights, bias where there is one, the pattern, and the pattern transposed.

    ``index`` of the pattern counts in the weights.
    """

    outputs: int
    has_bias: bool = False
    dense_gradient: bool = False

    def check(self, tensors: Tensors) -> None:
        """Refuses a bias that is not one number per output.

        Raises:
            InputError: It is not.
        """
        bias = self.bias(tensors)
        if bias is not None and bias.shape != (self.outputs,):
            given, remedy = f"{tuple(bias.shape)}", "Pass what the dense layer has."
            raise InputError.of("bias", "sparse_linear()", allowed=f"({self.outputs},)", given=given, remedy=remedy)

    def in_one_type(self, tensors: Tensors) -> Tensors:
        """Returns the tensors with x in the type of the weights."""
        return [in_type(tensors[0], tensors[1].dtype), *tensors[1:]]

    def bias(self, tensors: Tensors) -> Tensor | None:
        """Returns the bias."""
        return tensors[2] if self.has_bias else None

    def pattern(self, tensors: Tensors) -> Tensors:
        """Returns ``col_idx``, ``index``, ``segments`` and ``part_ptr``."""
        return tensors[2 + self.has_bias :][:NUM_PATTERN]


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: LinearPattern,
    *,
    dense_gradient: bool = False,
    calls: "PreparedCalls[PreparedLinear] | None" = None,
) -> Tensor:
    """Computes ``F.linear`` (..., I) → (..., O) with the active weights only; what lies elsewhere is not read.

    The gradient of ``weight`` is (O, I) with zeros outside the pattern; with ``dense_gradient`` it is that of every
    weight, which growth by gradient (RigL) wants to see. Under autocast it computes in the type of the weights. With
    ``calls`` (of this pattern) the active weights are gathered once while they stay as they are.

    Raises:
        InputError: x has not I features.

    >>> pattern = LinearPattern.of(torch.tensor([[True, False], [True, True]]))
    >>> sparse_linear(torch.tensor([1.0, 10.0]), torch.ones(2, 2), None, pattern)
    tensor([ 1., 11.])
    """
    outputs, inputs = pattern.size
    if x.shape[-1:] != (inputs,):
        given, remedy = f"the shape {tuple(x.shape)}", "Pass what the dense layer takes."
        raise InputError.of("x", "sparse_linear()", allowed=f"(..., {inputs})", given=given, remedy=remedy)
    samples = x.shape[:-1]
    x_NI = x.reshape(samples.numel(), inputs)
    state = None if calls is None else state_of([x], [weight], [bias])
    if calls and state and (found := kernels_for(x_NI, weight, bias)):
        known = calls.of(state)
        if pattern not in known:
            known[pattern] = PreparedLinear(found, weight, bias, pattern)
        y_NO = known[pattern](x_NI)
    else:
        problem = LinearProblem(outputs, bias is not None, dense_gradient)
        patterns = [*pattern.tensors, *pattern.transposed.tensors]
        y_NO = LINEAR(problem, [x_NI, weight, *([] if bias is None else [bias]), *patterns])[0]
    return y_NO.view(*samples, outputs)


class PreparedLinear:
    """The kernel of a layer whose active weights are gathered; records nothing."""

    def __init__(self, found: Kernels, weight: Tensor, bias: Tensor | None, pattern: LinearPattern) -> None:
        self._values = weight.detach().flatten()[pattern.index]
        self._bias, self._pattern, self._kernel = bias, pattern, found.linear_forward

    def __call__(self, x: Tensor) -> Tensor:
        """Computes (N, I) → (N, O)."""
        x, y = with_rows(x), x.new_empty(x.shape[0], self._pattern.size[0])
        call_kernel(self._kernel, (x, y), None, self._values, self._bias, self._pattern.tensors)
        return y


def _multiply(found: Kernels, problem: LinearProblem, tensors: Tensors) -> list[Tensor]:
    """Computes (N, I) → (N, O), and the weights (A) in the order of the pattern."""
    pattern = problem.pattern(tensors)
    x, given = with_rows(tensors[0]), tensors[1].contiguous()
    y, values = x.new_empty(x.shape[0], problem.outputs), x.new_empty(pattern[1].numel())
    call_kernel(found.linear_forward, (x, y), given, values, problem.bias(tensors), pattern)
    return [y, values]


def _multiply_with_torch(problem: LinearProblem, tensors: Tensors) -> list[Tensor]:
    (x, given, *_), pattern = tensors, problem.pattern(tensors)
    values = given.flatten()[pattern[1].to(given.device)]
    return [F.linear(x, matrix_of(values, pattern, problem.outputs, x.shape[1]), problem.bias(tensors)), values]


def _backward_weights(found: Kernels, problem: LinearProblem, tensors: Tensors) -> list[Tensor]:
    """Computes (N, O), (N, I) → the gradient (O, I) of the weights in the pattern, zeros elsewhere."""
    grad, x, *pattern = tensors
    x, grad = with_rows(x), with_rows(grad)
    out, values = x.new_empty(grad.shape[1], x.shape[1]), x.new_empty(pattern[1].numel())
    call_kernel(found.linear_backward_weights, (x, grad), out, values, None, pattern)
    return [out]


def _backward_weights_with_torch(problem: LinearProblem, tensors: Tensors) -> list[Tensor]:
    grad, x, *pattern = tensors
    index, everywhere = pattern[1].long().to(x.device), (grad.t() @ x).flatten()
    found = torch.zeros_like(everywhere).index_copy(0, index, everywhere[index])
    return [found.view(grad.shape[1], x.shape[1])]


def _plain(problem: LinearProblem, tensors: Tensors) -> Tensor:
    x, weight = tensors[:2]
    if not problem.dense_gradient:
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[problem.pattern(tensors)[1].to(weight.device)] = True
        weight = torch.where(mask.view(weight.shape), weight, 0)
    return F.linear(x, weight, problem.bias(tensors))


def _keep(problem: LinearProblem, tensors: Tensors, outputs: Tensors) -> list[Tensor]:
    return [outputs[1], *tensors]


def _backward(problem: LinearProblem, kept: Tensors, grads: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    (values,), (x,), _, pattern, transposed = groups(kept, 1, 1, 1 + problem.has_bias, NUM_PATTERN)
    grad = grads[0]
    found: list[Tensor | None] = [None] * (2 + problem.has_bias)
    if wanted[0]:
        found[0] = LINEAR_BACKWARD_INPUT(LinearProblem(x.shape[1]), [grad, values, *transposed])[0]
    if wanted[1] and problem.dense_gradient:
        found[1] = grad.t() @ x
    elif wanted[1]:
        found[1] = LINEAR_BACKWARD_WEIGHTS(LinearProblem(problem.outputs), [grad, x, *pattern])[0]
    if problem.has_bias and wanted[2]:
        found[2] = grad.sum(0)
    return found


def with_rows(x: Tensor) -> Tensor:
    """Returns a matrix whose rows the kernels can read: their elements side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def matrix_of(values: Tensor, pattern: Tensors, outputs: int, inputs: int) -> Tensor:
    """Returns the dense matrix (O, I) of values in the order of the pattern."""
    col_idx, _, segments, _ = (part.to(values.device) for part in pattern)
    matrix = values.new_zeros(outputs, inputs)
    if not col_idx.numel():
        return matrix
    rows = values.numel() // col_idx.numel()
    return matrix.index_put((rows_of(segments, rows), col_idx[:, None]), values.view(-1, rows))


def rows_of(segments: Tensor, rows: int) -> Tensor:
    """Returns the outputs that each column of a pattern has values of, (U, R), as ``segments`` (S, 3) say it.

    >>> rows_of(torch.tensor([[1, 0, 2]]), 2)
    tensor([[2, 3],
            [2, 3]])
    """
    group, begin, end = segments.unbind(dim=1)
    first = group.repeat_interleave(end - begin) * rows
    return first[:, None] + torch.arange(rows, dtype=first.dtype, device=first.device)


def call_kernel(
    kernel: Callable[[structs.Linear, int], int],
    matrices: tuple[Tensor, Tensor],
    weights: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    pattern: Tensors,
) -> None:
    """Calls a kernel of sparse linear layers on two matrices of as many rows, and ``values`` in the pattern's order."""
    (x, y), part_ptr, num_cols = matrices, pattern[3], pattern[0].numel()
    bias = None if bias is None else bias.contiguous()
    sizes = y.shape[1], x.shape[1], values.numel() // num_cols if num_cols else 1, num_cols, part_ptr.numel() - 1
    operands = (None if each is None else each.data_ptr() for each in (x, y, weights, values, bias))
    described = (*(each.data_ptr() for each in pattern), *sizes)
    job = structs.Linear(described, *operands, x.shape[0], x.stride(0), y.stride(0))
    check(kernel(job, torch.get_num_threads()), "sparse_linear()")


def _empty(problem: LinearProblem, tensors: Tensors) -> list[Tensor]:
    x, weight = tensors[:2]
    return [x.new_empty(x.shape[0], problem.outputs), weight.new_empty(problem.pattern(tensors)[1].shape[0])]


def _reads(problem: LinearProblem, tensors: Tensors) -> Tensors:
    return tensors[: 2 + problem.has_bias]


_MULTIPLY = (by_kernel("gathered", _multiply, reads=_reads), by_torch(_multiply_with_torch))
LINEAR_BACKWARD_INPUT = Operator("sparse_linear_backward_input", LinearProblem, _MULTIPLY, fake=_empty)
LINEAR_BACKWARD_WEIGHTS = Operator(
    "sparse_linear_backward_weights",
    LinearProblem,
    (
        by_kernel("gathered", _backward_weights, reads=lambda problem, tensors: tensors[:2]),
        by_torch(_backward_weights_with_torch),
    ),
    fake=lambda problem, tensors: [tensors[1].new_empty(tensors[0].shape[1], tensors[1].shape[1])],
)
LINEAR = Operator("sparse_linear", LinearProblem, _MULTIPLY, fake=_empty, backward=_backward, keep=_keep, plain=_plain)

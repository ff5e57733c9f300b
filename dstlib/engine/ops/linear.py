"""``F.linear`` with active weights only, and its gradients.

Shapes: O outputs, I inputs, N samples, A active weights. Scattered weights, a constant number per output and blocks of
any size take the same way; blocks whose height is a multiple of 4 (or of 2 or 3) are the fastest.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.linear_patterns import LinearPattern
from dstlib.engine.ops.operator import kernels_for
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.structs import Linear
from dstlib.errors import SettingError


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: LinearPattern, *, dense_gradient: bool = False
) -> Tensor:
    """``F.linear`` (..., I) → (..., O) with the active weights only; what lies elsewhere in ``weight`` is not read.

    The gradient of ``weight`` is (O, I) with zeros outside the pattern; with ``dense_gradient`` it is that of every
    weight, which growth by gradient (RigL) wants to see. Under autocast it computes in the type of the weights.

    Errors: SettingError where x has not I features.

    >>> pattern = LinearPattern.of(torch.tensor([[True, False], [True, True]]))
    >>> sparse_linear(torch.tensor([1.0, 10.0]), torch.ones(2, 2), None, pattern)
    tensor([ 1., 11.])
    """
    outputs, inputs = pattern.size
    if x.shape[-1:] != (inputs,):
        given, remedy = f"the shape {tuple(x.shape)}", "Pass what the dense layer takes."
        raise SettingError.of("x", "sparse_linear()", allowed=f"(..., {inputs})", given=given, remedy=remedy)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return sparse_linear(x.to(weight.dtype), weight, bias, pattern, dense_gradient=dense_gradient)
    samples = x.shape[:-1]
    x_NI = x.reshape(samples.numel(), inputs)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        back = pattern.transposed.tensors
        y_NO = _SparseLinear.apply(x_NI, weight, bias, dense_gradient, *pattern.tensors, *back)
    else:
        y_NO, _ = _multiply_any(x_NI, weight, bias, pattern.tensors, outputs)
    return y_NO.view(*samples, outputs)


def can_multiply_gathered(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`multiply_gathered` can stand for :func:`sparse_linear` where nothing is recorded."""
    plain = _holds_numbers(x, weight) and not weight.is_inference() and not torch.is_autocast_enabled(x.device.type)
    return plain and x.shape[-1:] == weight.shape[1:] and _kernels_for(x, weight, bias) is not None


def multiply_gathered(x: Tensor, values: Tensor, bias: Tensor | None, pattern: LinearPattern) -> Tensor:
    """:func:`sparse_linear` by the kernels, of weights (A) in the order of the pattern; records nothing."""
    outputs, inputs = pattern.size
    x_NI = _with_rows(x.reshape(-1, inputs))
    y_NO = x.new_empty(x_NI.shape[0], outputs)
    found = kernels_for(x)
    assert found, "can_multiply_gathered() says so"
    _call(found.linear_forward, x_NI, y_NO, None, values, bias, pattern.tensors)
    return y_NO.view(*x.shape[:-1], outputs)


def multiply(
    x: Tensor, given: Tensor, bias: Tensor | None, pattern: list[Tensor], outputs: int
) -> tuple[Tensor, Tensor]:
    """(N, I) → (N, O), and the weights (A) in the order of the pattern, whose source counts in ``given``."""
    found = _kernels_for(x, given, bias)
    if not found:
        values = given.flatten()[pattern[1].to(given.device)]
        return F.linear(x, _matrix(values, pattern, outputs, x.shape[1]), bias), values
    x, given = _with_rows(x), given.contiguous()
    y, values = x.new_empty(x.shape[0], outputs), x.new_empty(pattern[1].numel())
    _call(found.linear_forward, x, y, given, values, bias, pattern)
    return y, values


def weight_gradient(grad: Tensor, x: Tensor, pattern: list[Tensor]) -> Tensor:
    """(N, O), (N, I) → the gradient (O, I) of the weights in the pattern, zeros elsewhere."""
    found = _kernels_for(x, grad)
    if not found:
        source = pattern[1].long().to(x.device)
        everywhere = (grad.t() @ x).flatten()
        return torch.zeros_like(everywhere).index_copy(0, source, everywhere[source]).view(grad.shape[1], x.shape[1])
    x, grad = _with_rows(x), _with_rows(grad)
    out, values = x.new_empty(grad.shape[1], x.shape[1]), x.new_empty(pattern[1].numel())
    _call(found.linear_backward_weights, x, grad, out, values, None, pattern)
    return out


class _SparseLinear(torch.autograd.Function):
    """Goes past torch's dispatcher where it can: registered gradients of an operator take 0.1 ms a call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dense_gradient: bool, *patterns: Tensor
    ) -> Tensor:
        y, values = _multiply_any(x, weight, bias, list(patterns[:4]), weight.shape[0])
        ctx.dense_gradient = dense_gradient
        ctx.save_for_backward(x, values, *patterns)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *patterns = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_x = _multiply_any(grad, values, None, patterns[4:], x.shape[1])[0] if for_x else None
        grad_weight = None
        if for_weight:
            grad_weight = grad.t() @ x if ctx.dense_gradient else _weight_gradient_any(grad, x, patterns[:4])
        return grad_x, grad_weight, grad.sum(0) if for_bias else None, None, *[None] * len(patterns)


multiply_op = torch.library.custom_op("dstlib::sparse_linear", multiply, mutates_args=())
weight_gradient_op = torch.library.custom_op("dstlib::sparse_linear_weight_gradient", weight_gradient, mutates_args=())


@multiply_op.register_fake
def _(x: Tensor, given: Tensor, bias: Tensor | None, pattern: list[Tensor], outputs: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], outputs), given.new_empty(pattern[1].shape[0])


@weight_gradient_op.register_fake
def _(grad: Tensor, x: Tensor, pattern: list[Tensor]) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


def _multiply_any(
    x: Tensor, given: Tensor, bias: Tensor | None, pattern: list[Tensor], outputs: int
) -> tuple[Tensor, Tensor]:
    return (multiply if _holds_numbers(x, given) else multiply_op)(x, given, bias, pattern, outputs)


def _weight_gradient_any(grad: Tensor, x: Tensor, pattern: list[Tensor]) -> Tensor:
    return (weight_gradient if _holds_numbers(grad, x) else weight_gradient_op)(grad, x, pattern)


def _holds_numbers(*tensors: Tensor) -> bool:
    """Whether these are tensors proper, and not stand-ins by which a compiler learns what would be done to them."""
    return not torch.compiler.is_compiling() and all(type(x) in (Tensor, nn.Parameter) for x in tensors)


def _kernels_for(x: Tensor, other: Tensor, bias: Tensor | None = None) -> Kernels | None:
    """The kernels, where they can read these tensors and there is anything to compute."""
    return kernels_for(x, other, *(() if bias is None else (bias,))) if x.numel() and other.numel() else None


def _with_rows(x: Tensor) -> Tensor:
    """A matrix whose rows the kernels can read: their elements side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _matrix(values: Tensor, pattern: list[Tensor], outputs: int, inputs: int) -> Tensor:
    """The dense matrix (O, I) of values in the order of the pattern."""
    cols, _, segments, _ = (part.to(values.device) for part in pattern)
    matrix = values.new_zeros(outputs, inputs)
    if not cols.numel():
        return matrix
    rows = values.numel() // cols.numel()
    group = segments[:, 0].repeat_interleave(segments[:, 2] - segments[:, 1])
    row = group[:, None] * rows + torch.arange(rows, device=values.device)
    return matrix.index_put((row, cols[:, None]), values.view(-1, rows))


def _call(
    kernel: Callable[[Linear, int], int],
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    values: Tensor,
    bias: Tensor | None,
    pattern: list[Tensor],
) -> None:
    cols, source, segments, parts = pattern
    num_cols = cols.numel()
    bias = None if bias is None else bias.contiguous()
    layer = Linear(
        (
            cols.data_ptr(),
            source.data_ptr(),
            segments.data_ptr(),
            parts.data_ptr(),
            y.shape[1],
            x.shape[1],
            source.numel() // num_cols if num_cols else 1,
            num_cols,
            parts.numel() - 1,
        ),
        x.data_ptr(),
        y.data_ptr(),
        None if weights is None else weights.data_ptr(),
        values.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.shape[0],
        x.stride(0),
        y.stride(0),
    )
    check(kernel(layer, torch.get_num_threads()), "sparse_linear()")

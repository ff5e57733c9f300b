"""Convolution with sparse kernels on depth-last maps, and the unit made of it: shift → convolution → norm → activation.

Shapes: N batch, C input channels over all sources, O output channels, D, H, W depth, height, width, (kh, kw) kernel,
A active connections. A source is a map with the norm that its readers apply: (x, norm), see
:mod:`dstlib.engine.ops.feature_maps`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.ops.connections import Connections
from dstlib.engine.ops.conv_calls import Call, convolve, map_grad, output_size, parameter_grads
from dstlib.engine.ops.feature_maps import Mapped, empty_depth_last
from dstlib.engine.ops.norms import norm_backward


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a convolution does besides its weights: stride (d, h, w) and the shift (C) of each input channel.

    ``shifts`` (C) in int32: voxels towards higher depths, zeros flowing in. The padding is half the kernel.
    """

    shifts: Tensor
    stride: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True, eq=False)
class Weights:
    """The weight (O, C, kh, kw), contiguous, its bias (O) or None, and its active connections.

    ``graded`` are the connections whose gradient is wanted: the active ones, or all where a criterion reads them.
    """

    weight: Tensor
    bias: Tensor | None
    active: Connections
    graded: Connections

    @property
    def pattern(self) -> list[Tensor]:
        """The connections as operators take them: rows, cols, index of the active, the transposed and the graded."""
        each = (self.active, self.active.transposed, self.graded)
        return [tensor for c in each for tensor in (c.rows, c.cols, c.index)]


def conv(sources: Sequence[Mapped], weights: Weights, geometry: Geometry) -> Tensor:
    """The convolution of the concatenated, activated sources: (N, O, D / d, H / h, W / w), rounded up, depth last.

    Gradients are those of the activated sources; the weight's has zeros where no connection is graded.

    >>> full = Connections.of(torch.ones(1, 1, dtype=torch.bool))
    >>> moved = Geometry(torch.ones(1, dtype=torch.int32))  # depth 1 reads depth 0
    >>> x = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
    >>> conv([(x, None)], Weights(torch.ones(1, 1, 1, 1, 1), None, full, full), moved).flatten()
    tensor([0., 1.])
    """
    call = call_of(sources, weights, geometry)
    if _is_plain(*call.maps, *call.parameters):
        return convolve(call)[0]
    return _conv_op(call.maps, call.parameters, call.fixed, call.numbers)


def unit(
    sources: Sequence[Mapped], weights: Weights, geometry: Geometry, norm: nn.InstanceNorm3d, slope: float
) -> Mapped:
    """The convolution, then the affine instance norm and max(y, slope · y), which readers apply.

    Returns the convolution's output with its norm; its gradient is that of the activated map.
    """
    call, affine = call_of(sources, weights, geometry), [norm.weight, norm.bias]
    if _is_plain(*call.maps, *call.parameters, *affine):
        y, normed = convolve(call, (norm.weight, norm.bias, norm.eps))
    else:
        parameters, numbers = [*call.parameters, *affine], [norm.eps, slope, *call.numbers]
        y, normed = _unit_op(call.maps, parameters, call.fixed, numbers)
    return y, (normed[0], normed[1], slope)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nobody records what becomes of the tensors: the kernel then is called past torch's dispatcher."""
    if torch.compiler.is_compiling():
        return False
    records = torch.is_grad_enabled()
    return all(type(x) in (Tensor, nn.Parameter) and not (records and x.requires_grad) for x in tensors)


def call_of(sources: Sequence[Mapped], weights: Weights, geometry: Geometry) -> Call:
    """The convolution as operators take it."""
    maps = [x for x, _ in sources]
    empty = maps[0].new_empty(0)
    norms = [tensor for _, norm in sources for tensor in (norm[:2] if norm else (empty, empty))]
    parameters = [weights.weight] if weights.bias is None else [weights.weight, weights.bias]
    slopes = [norm[2] if norm else 1.0 for _, norm in sources]
    return Call(maps, parameters, [*norms, *weights.pattern, geometry.shifts], [*slopes, *map(float, geometry.stride)])


@torch.library.custom_op("dstlib::conv", mutates_args=())
def _conv_op(maps: list[Tensor], parameters: list[Tensor], fixed: list[Tensor], numbers: list[float]) -> Tensor:
    return convolve(Call(maps, parameters, fixed, numbers))[0]


@torch.library.custom_op("dstlib::unit", mutates_args=())
def _unit_op(
    maps: list[Tensor], parameters: list[Tensor], fixed: list[Tensor], numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """``parameters`` end with gamma and beta, ``numbers`` begin with eps and the slope."""
    *weights, gamma, beta = parameters
    return convolve(Call(maps, weights, fixed, numbers[2:]), (gamma, beta, numbers[0]))


@torch.library.custom_op("dstlib::conv_backward", mutates_args=())
def _backward_op(
    maps: list[Tensor], parameters: list[Tensor], fixed: list[Tensor], numbers: list[float], grad: Tensor, whole: bool
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the concatenated maps where the ``whole`` is wanted, else none, and those of the parameters."""
    call = Call(maps, parameters, fixed, numbers)
    return map_grad(call, grad) if whole else grad.new_empty(0), parameter_grads(call, grad)


@_conv_op.register_fake
def _(maps: list[Tensor], parameters: list[Tensor], fixed: list[Tensor], numbers: list[float]) -> Tensor:
    return _empty(Call(maps, parameters, fixed, numbers))


@_unit_op.register_fake
def _(maps: list[Tensor], parameters: list[Tensor], fixed: list[Tensor], numbers: list[float]) -> tuple[Tensor, Tensor]:
    y = _empty(Call(maps, parameters, fixed, numbers))
    return y, y.new_empty(4, *y.shape[:2])


@_backward_op.register_fake
def _(
    maps: list[Tensor], parameters: list[Tensor], fixed: list[Tensor], numbers: list[float], grad: Tensor, whole: bool
) -> tuple[Tensor, list[Tensor]]:
    batch, _, depth, height, width = maps[0].shape
    size = (batch, parameters[0].shape[1], depth, height, width)
    out = empty_depth_last(size, grad) if whole else grad.new_empty(0)
    return out, [torch.empty_like(x) for x in parameters]


def _empty(call: Call) -> Tensor:
    return empty_depth_last(output_size(call.maps[0], call.weight, call.stride), call.maps[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    maps, parameters, fixed, ctx.numbers = inputs
    ctx.counts = len(maps), len(parameters), len(fixed)
    computed = [] if isinstance(output, Tensor) else list(output)
    ctx.mark_non_differentiable(*computed[1:])
    ctx.save_for_backward(*maps, *parameters, *fixed, *computed)


def _backward(ctx: Any, tensors: Sequence[Tensor], numbers: list[float], grad: Tensor) -> tuple[Any, ...]:
    num_maps, _, num_fixed = ctx.counts
    maps, rest = list(tensors[:num_maps]), list(tensors[num_maps:])
    parameters, fixed = rest[:-num_fixed], rest[-num_fixed:]
    whole = any(ctx.needs_input_grad[0])
    joined, for_parameters = _backward_op(maps, parameters, fixed, numbers, grad, whole)
    grads = list(joined.split([x.shape[1] for x in maps], dim=1)) if whole else [None] * num_maps
    return grads, for_parameters, [None] * num_fixed, None


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _backward(ctx, ctx.saved_tensors, ctx.numbers, grad)


def _unit_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    num_maps, num_parameters, _ = ctx.counts
    *tensors, y, normed = ctx.saved_tensors
    scale, offset, mean, rstd = normed.unbind()
    gamma_at = num_maps + num_parameters - 2
    gamma = tensors[gamma_at]
    del tensors[gamma_at : gamma_at + 2]
    dy, dgamma, dbeta = norm_backward(y, (scale, offset, ctx.numbers[1]), grad, mean, rstd, gamma)
    maps, parameters, *others = _backward(ctx, tensors, ctx.numbers[2:], dy)
    return maps, [*parameters, dgamma, dbeta], *others


_conv_op.register_autograd(_conv_backward, setup_context=_keep)
_unit_op.register_autograd(_unit_backward, setup_context=_keep)

"""Convolution with sparse kernels on depth-last maps, and the unit made of it: shift → convolution → norm → activation.

Shapes: N batch, C input channels over all sources, O output channels, D, H, W depth, height, width, (kh, kw) kernel,
A active connections. A source is a map with the norm that its readers apply: (x, norm), see :mod:`dstlib.engine.maps`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.calls import is_plain
from dstlib.engine.connections import Connections
from dstlib.engine.conv_calls import Call, convolve, map_grad, output_size, parameter_grads
from dstlib.engine.maps import Norm, empty_depth_last
from dstlib.engine.norms import norm_backward

Mapped = tuple[Tensor, Norm | None]


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


def conv(
    sources: Sequence[Mapped], weights: Weights, geometry: Geometry, *, prepared: Tensor | None = None
) -> Tensor:
    """The convolution of the concatenated, activated sources: (N, O, D / d, H / h, W / w), rounded up, depth last.

    Gradients are those of the activated sources; the weight's has zeros where no connection is graded. ``prepared``
    is what :func:`~dstlib.engine.conv_calls.prepare` made of the weight, where it has not changed since.

    >>> full = Connections.of(torch.ones(1, 1, dtype=torch.bool))
    >>> moved = Geometry(torch.ones(1, dtype=torch.int32))  # depth 1 reads depth 0
    >>> x = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
    >>> conv([(x, None)], Weights(torch.ones(1, 1, 1, 1, 1), None, full, full), moved).flatten()
    tensor([0., 1.])
    """
    call = _call(sources, weights, geometry)
    if is_plain(*call.maps, *call.parameters):
        return convolve(call, with_sums=False, prepared=prepared)[0]
    return _conv_op(*call)


def unit(
    sources: Sequence[Mapped],
    weights: Weights,
    geometry: Geometry,
    norm: nn.InstanceNorm3d,
    slope: float,
    *,
    prepared: Tensor | None = None,
) -> Mapped:
    """The convolution, then the affine instance norm and max(y, slope · y), which readers apply.

    Returns the convolution's output with its norm; its gradient is that of the activated map.
    """
    call = _call(sources, weights, geometry)
    affine = [norm.weight, norm.bias]
    if is_plain(*call.maps, *call.parameters, *affine):
        y, scale, offset, _, _ = _unit(*call, affine, norm.eps, slope, prepared)
    else:
        y, scale, offset, _, _ = _unit_op(*call, affine, norm.eps, slope)
    return y, (scale, offset, slope)


def _call(sources: Sequence[Mapped], weights: Weights, geometry: Geometry) -> Call:
    maps = [x for x, _ in sources]
    empty = maps[0].new_empty(0)
    norms = [tensor for _, norm in sources for tensor in (norm[:2] if norm else (empty, empty))]
    slopes = [norm[2] if norm else 1.0 for _, norm in sources]
    parameters = [weights.weight] if weights.bias is None else [weights.weight, weights.bias]
    return Call(maps, norms, slopes, parameters, weights.pattern, geometry.shifts, list(geometry.stride))


def _conv(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
) -> Tensor:
    return convolve(Call(maps, norms, slopes, parameters, pattern, shifts, stride), with_sums=False)[0]


def _unit(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
    affine: list[Tensor],
    eps: float,
    slope: float,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and of each of its channels scale, offset, mean and 1 / √(variance + eps), all (N, O)."""
    call = Call(maps, norms, slopes, parameters, pattern, shifts, stride)
    y, sums = convolve(call, with_sums=True, prepared=prepared)
    mean, square = (sums / y[0, 0].numel()).unbind(dim=2)
    rstd = (torch.addcmul(square, mean, mean, value=-1).clamp_(min=0) + eps).rsqrt_().to(y.dtype)
    mean, (gamma, beta) = mean.to(y.dtype), affine
    scale = gamma * rstd
    return y, scale, torch.addcmul(beta, scale, mean, value=-1), mean, rstd


_conv_op = torch.library.custom_op("dstlib::conv", _conv, mutates_args=())


@torch.library.custom_op("dstlib::unit", mutates_args=())
def _unit_op(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
    affine: list[Tensor],
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _unit(maps, norms, slopes, parameters, pattern, shifts, stride, affine, eps, slope)


@torch.library.custom_op("dstlib::conv_backward", mutates_args=())
def _backward_op(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
    grad: Tensor,
    for_maps: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the concatenated maps, empty unless wanted, and those of the parameters."""
    call = Call(maps, norms, slopes, parameters, pattern, shifts, stride)
    return map_grad(call, grad) if for_maps else grad.new_empty(0), parameter_grads(call, grad)


@_conv_op.register_fake
def _(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
) -> Tensor:
    return empty_depth_last(output_size(maps[0], parameters[0], stride), maps[0])


@_unit_op.register_fake
def _(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
    affine: list[Tensor],
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = empty_depth_last(output_size(maps[0], parameters[0], stride), maps[0])
    each = [maps[0].new_empty(y.shape[:2]) for _ in range(4)]
    return y, each[0], each[1], each[2], each[3]


@_backward_op.register_fake
def _(
    maps: list[Tensor],
    norms: list[Tensor],
    slopes: list[float],
    parameters: list[Tensor],
    pattern: list[Tensor],
    shifts: Tensor,
    stride: list[int],
    grad: Tensor,
    for_maps: bool,
) -> tuple[Tensor, list[Tensor]]:
    batch, _, depth, height, width = maps[0].shape
    size = (batch, parameters[0].shape[1], depth, height, width)
    whole = empty_depth_last(size, grad) if for_maps else grad.new_empty(0)
    return whole, [torch.empty_like(x) for x in parameters]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    maps, norms, ctx.slopes, parameters, pattern, shifts, ctx.stride, *unit_only = inputs
    ctx.counts = [len(maps), len(norms), len(parameters), len(pattern), 1]
    kept = [*maps, *norms, *parameters, *pattern, shifts]
    if unit_only:
        affine, ctx.eps, ctx.slope = unit_only
        y, scale, offset, mean, rstd = output
        kept += [y, scale, offset, mean, rstd, affine[0]]
        ctx.mark_non_differentiable(scale, offset, mean, rstd)
    ctx.save_for_backward(*kept)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parts = iter(ctx.saved_tensors)
    maps, norms, parameters, pattern, (shifts,) = ([next(parts) for _ in range(n)] for n in ctx.counts)
    arguments = (maps, norms, ctx.slopes, parameters, pattern, shifts, ctx.stride)
    for_maps = any(ctx.needs_input_grad[0])
    whole, for_parameters = _backward_op(*arguments, grad, for_maps)
    grads = whole.split([x.shape[1] for x in maps], dim=1) if for_maps else [None] * len(maps)
    return list(grads), [None] * len(norms), None, for_parameters, [None] * len(pattern), None, None


def _unit_backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    y, scale, offset, mean, rstd, gamma = ctx.saved_tensors[-6:]
    dy, dgamma, dbeta = norm_backward(y, (scale, offset, ctx.slope), grad, mean, rstd, gamma)
    return *_conv_backward(ctx, dy), [dgamma, dbeta], None, None


_conv_op.register_autograd(_conv_backward, setup_context=_keep)
_unit_op.register_autograd(_unit_backward, setup_context=_keep)

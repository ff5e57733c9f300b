"""Transposed convolution whose kernel is its stride, with sparse kernels, on depth-last maps.

Shapes: N batch, C input channels, O output channels, D, H, W depth, height, width of the input, d, h, w the stride.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.connections import Connections
from dstlib.engine.ops.feature_maps import Mapped, Norm, activated, empty_depth_last, pattern, source, target
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, flat, kernels_for, norm_of
from dstlib.engine.ops.templates import Template, Templates
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.structs import ConvTranspose
from dstlib.errors import SettingError


def upsample(x: Tensor, norm: Norm | None, weight: Tensor, connections: Connections, stride: Sequence[int]) -> Tensor:
    """Transposed convolution of the activated map (N, C, D, H, W) → (N, O, D · d, H · h, W · w).

    ``weight`` (C, O, d, h, w) is that of an ``nn.ConvTranspose3d``; of it only the kernels of the connections, whose
    rows are output channels, are read. Its gradient has zeros at the others; that of x is of the activated map.

    Raises:
        SettingError: the norm, or the weight, is not of the shape that the other arguments ask for.

    >>> one = Connections.of(torch.tensor([[True, False]]))  # the second input is not connected
    >>> x, weight = torch.tensor([2.0, 5.0]).reshape(1, 2, 1, 1, 1), torch.ones(2, 1, 1, 2, 2)
    >>> upsample(x, None, weight, one, (1, 2, 2)).flatten()
    tensor([2., 2., 2., 2.])
    """
    expected = (x.shape[1], connections.size[0], *stride)
    if weight.shape != expected or connections.size[1] != x.shape[1]:
        given = f"{tuple(weight.shape)}, connections {connections.size}"
        remedy = "Connections are (O, C), the weight is that of an nn.ConvTranspose3d."
        raise SettingError.of("weight", "upsample()", allowed=f"{expected}", given=given, remedy=remedy)
    out: Tensor = UPSAMPLE(x, *flat(norm, x), weight, [connections.rows, connections.cols], stride)
    return out


def _upsample(
    x: Tensor, norm: list[Tensor], slope: float, weight: Tensor, connections: list[Tensor], stride: Sequence[int]
) -> Tensor:
    found = kernels_for(x, weight)
    out = _empty(x, weight, stride)
    if not found:
        z = activated(x, norm_of(norm, slope))
        return out.copy_(F.conv_transpose3d(z, _active(weight, connections), stride=tuple(stride)))
    x, weight = to_depth_last(x), weight.contiguous()
    call = _call(x, weight, connections, stride)
    call.input, call.out, call.weights = source(x, norm_of(norm, slope)), target(out), weight.data_ptr()
    check(found.conv_transpose_forward(call, torch.get_num_threads()), "upsample()")
    return out


class ReadyUpsample:
    """:func:`upsample` of a weight that nobody trains at the moment: its calls are described once for each shape.

    >>> one = Connections.of(torch.tensor([[True]]))
    >>> ready = ReadyUpsample(torch.ones(1, 1, 1, 1, 2), one, (1, 1, 2))
    >>> out = ready(torch.ones(1, 1, 1, 1, 1), None)  # None where there are no kernels
    >>> out is None or out.flatten().tolist() == [1, 1]
    True
    """

    def __init__(self, weight: Tensor, connections: Connections, stride: Sequence[int]) -> None:
        self.weight, self.connections, self.stride = weight.detach().contiguous(), connections, stride
        self._templates: Templates[ConvTranspose] = Templates("upsample()", self.weight)

    def __call__(self, x: Tensor, norm: Norm | None) -> Tensor | None:
        """The fine map; None for a map that kernels cannot read."""
        return self._templates.run([(x, norm)], self._describe)

    def _describe(self, found: Kernels, sources: Sequence[Mapped]) -> Template[ConvTranspose]:
        ((x, norm),) = sources
        out = _empty(x, self.weight, self.stride)
        call = _call(x, self.weight, [self.connections.rows, self.connections.cols], self.stride)
        call.input, call.out, call.weights = source(x, norm), target(out), self.weight.data_ptr()
        return Template.of(call, found.conv_transpose_forward, out)


def _input_grad(grad: Tensor, weight: Tensor, connections: list[Tensor], stride: Sequence[int]) -> Tensor:
    """The gradient (N, C, D, H, W) of the activated map."""
    found = kernels_for(grad, weight)
    out = _empty_input(grad, weight, stride)
    if not found:
        return out.copy_(F.conv3d(grad, _active(weight, connections), stride=tuple(stride)))
    grad, weight = to_depth_last(grad), weight.contiguous()
    call = _call(out, weight, connections, stride)
    call.grad, call.out, call.weights = source(grad), target(out), weight.data_ptr()
    check(found.conv_transpose_backward_input(call, torch.get_num_threads()), "gradient of upsample()")
    return out


def _weight_grad(
    x: Tensor, norm: list[Tensor], slope: float, grad: Tensor, connections: list[Tensor], stride: Sequence[int]
) -> Tensor:
    """The gradient (C, O, d, h, w) of the weight, zeros where there is no connection."""
    found = kernels_for(x, grad)
    out = x.new_zeros(x.shape[1], grad.shape[1], *stride)
    if not found:
        z = activated(x, norm_of(norm, slope))
        taps = grad.reshape(*grad.shape[:2], *(n for pair in zip(x.shape[2:], stride, strict=True) for n in pair))
        return out.copy_(_active(torch.einsum("ncdhw,nodihjwk->coijk", z, taps), connections))
    x, grad = to_depth_last(x), to_depth_last(grad)
    call = _call(x, out, connections, stride)
    call.input, call.grad, call.weights_grad = source(x, norm_of(norm, slope)), source(grad), out.data_ptr()
    check(found.conv_transpose_backward_weights(call, torch.get_num_threads()), "gradient of upsample()")
    return out


def _empty(x: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    n, _, d, h, w = x.shape
    return empty_depth_last((n, weight.shape[1], d * stride[0], h * stride[1], w * stride[2]), x)


def _empty_input(grad: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    n, _, d, h, w = grad.shape
    return empty_depth_last((n, weight.shape[0], d // stride[0], h // stride[1], w // stride[2]), grad)


def _call(coarse: Tensor, weight: Tensor, connections: list[Tensor], stride: Sequence[int]) -> ConvTranspose:
    """What all kernels are told: sizes, and where the connections of a weight, or of its gradient, lie."""
    n, channels, d, h, w = coarse.shape
    rows, cols = connections
    return ConvTranspose(
        pattern=pattern(rows, cols, channels),
        weight_strides=(weight.stride(1), weight.stride(0)),
        size=(n, d, h, w),
        stride=tuple(stride),
    )


def _active(weight: Tensor, connections: list[Tensor]) -> Tensor:
    """The weight (C, O, d, h, w) with zeros where there is no connection."""
    rows, cols = connections
    outputs = torch.arange(len(rows) - 1, device=rows.device).repeat_interleave(rows.diff())
    mask_CO = torch.zeros(weight.shape[:2], dtype=torch.bool, device=rows.device)
    mask_CO[cols, outputs] = True
    return torch.where(mask_CO[:, :, None, None, None], weight, 0)


def _empty_output(
    x: Tensor, norm: list[Tensor], slope: float, weight: Tensor, connections: list[Tensor], stride: Sequence[int]
) -> Tensor:
    return _empty(x, weight, stride)


def _empty_input_grad(grad: Tensor, weight: Tensor, connections: list[Tensor], stride: Sequence[int]) -> Tensor:
    return _empty_input(grad, weight, stride)


def _empty_weight_grad(
    x: Tensor, norm: list[Tensor], slope: float, grad: Tensor, connections: list[Tensor], stride: Sequence[int]
) -> Tensor:
    return x.new_empty(x.shape[1], grad.shape[1], *stride)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm, ctx.slope, weight, connections, ctx.stride = inputs
    ctx.save_for_backward(x, weight, *connections, *norm)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    connections, norm = rest[:2], rest[2:]
    for_x, _, _, for_weight, *_ = ctx.needs_input_grad
    grad_x = INPUT_GRAD(grad, weight, connections, ctx.stride) if for_x else None
    grad_weight = WEIGHT_GRAD(x, norm, ctx.slope, grad, connections, ctx.stride) if for_weight else None
    return grad_x, None, None, grad_weight, None, None


INPUT_GRAD = Operator("upsample_input_grad", _input_grad, _empty_input_grad)
WEIGHT_GRAD = Operator("upsample_weight_grad", _weight_grad, _empty_weight_grad)
UPSAMPLE = Operator("upsample", _upsample, _empty_output, _backward, _keep)

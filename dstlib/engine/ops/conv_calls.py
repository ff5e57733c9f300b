"""The calls of the convolution kernels, and what torch computes in their place.

Shapes: as in :mod:`dstlib.engine.ops.convolution`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.grad import conv3d_input, conv3d_weight

from dstlib.engine.ops.feature_maps import Norm, activated, empty_depth_last, pattern, source, target
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import kernels_for
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.structs import FORM_DIRECT, FORM_WINOGRAD, Conv, InstanceNorm, PackWeights

Affine = tuple[Tensor, Tensor, float]  # gamma (O), beta (O), eps


@dataclass(frozen=True, eq=False)
class Call:
    """A convolution as operators take it: lists of tensors and numbers."""

    maps: list[Tensor]
    parameters: list[Tensor]  # weight (O, C, kh, kw) or (O, C, 1, kh, kw); bias (O) where there is one
    fixed: list[Tensor]  # scale and offset of each map, empty without a norm; nine tensors of connections; the shifts
    numbers: list[float]  # the slope of each map; the stride (d, h, w)

    @property
    def weight(self) -> Tensor:
        """The weight."""
        return self.parameters[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias, or None."""
        return self.parameters[1] if len(self.parameters) > 1 else None

    def norm(self, i: int) -> Norm | None:
        """The norm of map i."""
        scale, offset = self.fixed[2 * i : 2 * i + 2]
        return (scale, offset, self.numbers[i]) if scale.numel() else None

    @property
    def pattern(self) -> list[Tensor]:
        """Rows, cols and index of the active connections, of these transposed, and of the graded ones."""
        return self.fixed[-10:-1]

    @property
    def shifts(self) -> Tensor:
        """The shift (C) of each input channel."""
        return self.fixed[-1]

    @property
    def stride(self) -> tuple[int, int, int]:
        """The stride (d, h, w)."""
        depth, height, width = map(int, self.numbers[-3:])
        return depth, height, width


def output_size(x: Tensor, weight: Tensor, stride: Sequence[int]) -> tuple[int, int, int, int, int]:
    """(N, O, D, H, W) of the convolution of a map."""
    batch, _, *size = x.shape
    depth, height, width = (-(-n // step) for n, step in zip(size, stride, strict=True))
    return batch, weight.shape[0], depth, height, width


def form_of(weight: Tensor, stride: Sequence[int], plane: Sequence[int]) -> int:
    """The form in which a convolution is computed for maps whose planes are (H, W).

    Of a plane of 2 x 2 most taps see nothing but zeros, and the transformed kernels are four times as much to read:
    there taps were measured 1.2 to 5 times as fast, at 3 x 3 half as fast for sparse kernels.
    """
    fits = tuple(weight.shape[-2:]) == (3, 3) and tuple(stride) == (1, 1, 1)
    return FORM_WINOGRAD if fits and plane[0] * plane[1] > 4 else FORM_DIRECT


def prepare(weight: Tensor, index: Tensor, form: int, *, reflected: bool = False) -> Tensor:
    """The active kernels of a weight as a form reads them; empty where there is no code to read them."""
    found = kernels_for(weight)
    if not found:
        return weight.new_empty(0)
    weight = weight.detach().contiguous()
    taps = weight.shape[-2] * weight.shape[-1]
    out = weight.new_empty(index.numel() * (36 if form == FORM_WINOGRAD else taps))
    job = PackWeights(weight.data_ptr(), index.data_ptr(), out.data_ptr(), index.numel(), taps, form, reflected)
    check(found.conv_pack_weights(job, torch.get_num_threads()), "prepare()")
    return out


def convolve(call: Call, affine: Affine | None = None) -> tuple[Tensor, Tensor]:
    """The output (N, O, D, H, W), and what the instance norm after it finds.

    That is (4, N, O): scale, offset, mean and 1 / √(variance + eps); empty without gamma, beta and eps of a norm.
    """
    found = kernels_for(*call.maps, *call.parameters)
    y = empty_depth_last(output_size(call.maps[0], call.weight, call.stride), call.maps[0])
    if not found:
        y.copy_(F.conv3d(_input(call), _active(call), call.bias, call.stride, _padding(call.weight)))
        return y, _norm_of(y, affine) if affine else y.new_empty(0)
    normed = y.new_empty(4, *y.shape[:2]) if affine else y.new_empty(0)
    form = form_of(call.weight, call.stride, y.shape[3:])
    prepared = prepare(call.weight, call.pattern[2], form)
    maps = [to_depth_last(x) for x in call.maps]
    run(found, describe(maps, call, prepared, y, (*affine, normed) if affine else None), form)
    return y, normed


def describe(
    maps: list[Tensor], call: Call, prepared: Tensor, y: Tensor, norm: tuple[Tensor, Tensor, float, Tensor] | None
) -> Conv:
    """The call as its kernel reads it, of maps that lie depth last; ``norm`` is gamma, beta, eps, and what it finds."""
    job = _job(maps, call, y)
    rows, cols = call.pattern[:2]
    job.pattern = pattern(rows, cols, call.weight.shape[1])
    job.weights, job.shifts = prepared.data_ptr(), call.shifts.data_ptr()
    if call.bias is not None:
        job.bias = call.bias.data_ptr()
    if norm:
        gamma, beta, eps, found = norm
        job.norm = InstanceNorm(gamma.data_ptr(), beta.data_ptr(), eps, found.data_ptr())
    return job


def _norm_of(y: Tensor, affine: Affine) -> Tensor:
    gamma, beta, eps = affine
    double = y.double()
    mean = double.mean((2, 3, 4))
    rstd = (double.var((2, 3, 4), correction=0) + eps).rsqrt()
    scale = gamma * rstd
    return torch.stack([scale, beta - scale * mean, mean, rstd]).to(y.dtype)


def map_grad(call: Call, grad: Tensor) -> Tensor:
    """The gradient (N, C, D, H, W) of the concatenated, activated maps, from that of the output.

    It is a convolution with the transposed, reflected kernels; with a stride torch does it.
    """
    batch, _, depth, height, width = call.maps[0].shape
    weight = call.weight.detach()
    size = (batch, weight.shape[1], depth, height, width)
    found = kernels_for(*call.maps, weight, grad)
    if not found or call.stride != (1, 1, 1):
        strided = conv3d_input(size, _active(call), grad, call.stride, _padding(weight))
        return shifted(strided, -call.shifts)
    grad = to_depth_last(grad)
    rows, cols, index = call.pattern[3:6]
    form = form_of(weight, call.stride, size[3:])
    prepared = prepare(weight, index, form, reflected=True)
    out = empty_depth_last(size, grad)
    still, back = torch.zeros(grad.shape[1], dtype=torch.int32), -call.shifts
    job = Conv(
        out=target(out),
        pattern=pattern(rows, cols, grad.shape[1]),
        weights=prepared.data_ptr(),
        shifts=still.data_ptr(),
        out_shifts=back.data_ptr(),
    )
    job.sources[0] = source(grad)
    _set_sizes(job, grad, out, weight, call.stride)
    run(found, job, form)
    return out


def parameter_grads(call: Call, grad: Tensor) -> list[Tensor]:
    """Gradients of weight and, where there is one, bias; the weight's with zeros where no connection is graded."""
    found = kernels_for(*call.maps, *call.parameters, grad)
    if not found:
        five = _five(call.weight).shape
        dense = conv3d_weight(_input(call), five, grad, call.stride, _padding(call.weight))
        weight = torch.where(_mask(call.pattern[6:9], call.weight), dense.reshape(call.weight.shape), 0)
        return [weight] if call.bias is None else [weight, grad.sum((0, 2, 3, 4))]
    grad = to_depth_last(grad)
    rows, cols, index = call.pattern[6:9]
    grads = [torch.zeros_like(call.weight, memory_format=torch.contiguous_format)]
    grads += [torch.empty_like(call.bias)] if call.bias is not None else []
    maps = [to_depth_last(x) for x in call.maps]
    job = _job(maps, call, grad)
    job.pattern = pattern(rows, cols, call.weight.shape[1])
    job.shifts, job.index, job.weights_grad = call.shifts.data_ptr(), index.data_ptr(), grads[0].data_ptr()
    if call.bias is not None:
        job.bias_grad = grads[1].data_ptr()
    check(found.conv_backward_weights(job, torch.get_num_threads()), "gradient of a convolution's weights")
    return grads


def _job(maps: list[Tensor], call: Call, y: Tensor) -> Conv:
    job = Conv(out=target(y))
    for i, x in enumerate(maps):
        job.sources[i] = source(x, call.norm(i))
    _set_sizes(job, maps[0], y, call.weight, call.stride)
    return job


def run(found: Kernels, job: Conv, form: int) -> None:
    """Computes a convolution in its form."""
    kernel = found.conv_winograd if form == FORM_WINOGRAD else found.conv_direct
    check(kernel(job, torch.get_num_threads()), "convolution")


def _set_sizes(job: Conv, x: Tensor, y: Tensor, weight: Tensor, stride: Sequence[int]) -> None:
    height, width = weight.shape[-2:]
    job.input_size = (x.shape[0], *x.shape[2:])
    job.output_size = tuple(y.shape[2:])
    job.kernel_size, job.padding = (height, width), (height // 2, width // 2)
    job.stride = tuple(stride)


def shifted(x: Tensor, shifts: Tensor) -> Tensor:
    """Each channel moved along depth by its own number of voxels, zeros flowing in: with torch alone.

    The map itself where no channel moves.
    """
    if not shifts.any():
        return x
    out, depth = torch.zeros_like(x), x.shape[2]
    for size in shifts.unique().tolist():
        channels = (shifts == size).nonzero().flatten()
        if abs(size) < depth:
            moved = x[:, channels].narrow(2, max(-size, 0), depth - abs(size))
            out[:, channels, max(size, 0) : depth + min(size, 0)] = moved
    return out


def _input(call: Call) -> Tensor:
    """What the convolution sees: the maps activated, concatenated and shifted."""
    return shifted(torch.cat([activated(x, call.norm(i)) for i, x in enumerate(call.maps)], dim=1), call.shifts)


def _active(call: Call) -> Tensor:
    """The weight (O, C, 1, kh, kw) with zeros where no connection is active."""
    return _five(torch.where(_mask(call.pattern[:3], call.weight), call.weight, 0))


def _five(weight: Tensor) -> Tensor:
    return weight.reshape(*weight.shape[:2], 1, *weight.shape[-2:])


def _padding(weight: Tensor) -> tuple[int, int, int]:
    return 0, weight.shape[-2] // 2, weight.shape[-1] // 2


def _mask(connections: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Which connections there are, (O, C, 1, ...)."""
    mask = torch.zeros(weight.shape[:2].numel(), dtype=torch.bool, device=weight.device)
    mask[connections[2]] = True
    return mask.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))

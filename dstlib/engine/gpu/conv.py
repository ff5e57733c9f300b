"""A convolution that computes only the blocks of channels that are connected, on the matrix units of a GPU.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv3d

import dstlib.engine.gpu.tiles as tiles
from dstlib.engine.calls import Operator
from dstlib.engine.gpu.blocks import Blocks
from dstlib.engine.gpu.form import Launch, Shape
from dstlib.engine.gpu.launch import convolve, input_gradient, interpreted, weight_gradient
from dstlib.engine.gpu.maps import channels_first, channels_last
from dstlib.engine.gpu.tables import Plan
from dstlib.errors import SettingError, explain
from dstlib.layers.shift import shift

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WHERE = "block_conv()"


def block_conv(
    x: Tensor,
    weight: Tensor,
    blocks: Blocks,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    shifts: Sequence[int] = (0,),
    launch: Launch | None = None,
) -> Tensor:
    """The convolution of x with the weights inside the active blocks, padded by half the kernel.

    Shapes: x (B, C, D, H, W) or (B, C, H, W), weight (O, C, \\*kernel), bias (O); the result (B, O, ...), each extent
    divided by its stride, rounded up (for odd kernels), channels last in memory. x is read channels last, too: in
    another layout it is copied first. In 3D, contiguous groups of input channels move by ``shifts`` voxels towards
    higher depths, as by :func:`dstlib.layers.shift.shift`, while they are read; one number per channel is allowed.

    Products are summed in float32. Under autocast, inputs are converted as for torch's own convolutions. The weight's
    gradient is that of the active blocks, and zero elsewhere; all gradients are the same in every run.
    ``launch`` overrides how the work of Triton's kernels is cut.

    On a GPU of capability 8.0 or more, kernels (1, 3, 3) without stride, in float16 or bfloat16 and blocks of multiples
    of 16, are computed in CUDA, where cuda-core is installed to compile it; everything else by Triton, more slowly.

    On a CPU, torch computes the same with a dense convolution.

    Raises:
        SettingError: something does not fit together, or x is on a GPU and Triton is not installed.

    >>> weight = torch.randn(32, 64, 1, 3, 3)
    >>> weight[:16, 16:] = 0
    >>> blocks = Blocks.of(weight != 0, (16, 16))
    >>> block_conv(torch.randn(1, 64, 5, 8, 8), weight, blocks, stride=(1, 2, 2), shifts=(-1, 0, 1)).shape
    torch.Size([1, 32, 5, 4, 4])
    """
    steps = (stride,) * (x.ndim - 2) if isinstance(stride, int) else tuple(stride)
    _check(x, weight, blocks, steps, shifts)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.ndim == 4:
        return block_conv(x[:, :, None], weight[:, :, None], blocks, bias, (1, *steps), (0,), launch)[:, :, 0]
    if not (x.is_cuda or interpreted()):
        return _dense(x, weight * blocks.cover.to(x.device)[:, :, None, None, None], bias, steps, shifts)
    _check_types(x, weight, bias)
    tiled = launch is None and tiles.suit(x, blocks.size, weight.shape, steps)
    tensors, numbers = blocks.plan(shifts, x.device, tiled=tiled).parts()
    # float32 tiles take twice the room
    chosen = launch or (Launch(tile=64, stages=2) if x.dtype == torch.float32 else Launch())
    y: Tensor = _block_conv(x, weight, bias, tensors, [*numbers, *steps, *chosen])
    return y


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], shifts: Sequence[int]) -> Tensor:
    moved = shift(x, shifts, axis=2) if any(shifts) else x
    return conv3d(moved, weight, bias, tuple(stride), tuple(extent // 2 for extent in weight.shape[2:]))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    plan, shape, launch = _settings(weight, tensors, numbers)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return channels_first(convolve(channels_last(x), weight, bias, plan, shape, launch))


def _convolve_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    shape = _shape(weight, numbers)
    return channels_first(x.new_empty((x.shape[0], *shape.of_output(x.shape[2:]), weight.shape[0])))


def _input_gradient(
    grad: Tensor, weight: Tensor, size: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    plan, shape, launch = _settings(weight, tensors, numbers)
    with torch.cuda.device_of(grad):
        return channels_first(input_gradient(channels_last(grad), weight, size, plan, shape, launch))


def _input_gradient_fake(
    grad: Tensor, weight: Tensor, size: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    return channels_first(grad.new_empty((grad.shape[0], *size, weight.shape[1])))


def _weight_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    plan, shape, launch = _settings(weight, tensors, numbers)
    with torch.cuda.device_of(x):
        return weight_gradient(channels_last(x), channels_last(grad), weight, plan, shape, launch)


def _weight_gradient_fake(
    x: Tensor, grad: Tensor, weight: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]
) -> Tensor:
    return weight.new_empty(weight.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, tensors, numbers = inputs
    ctx.save_for_backward(x, weight, *tensors)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *tensors = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
    return (
        _input_grad(grad, weight, x.shape[2:], tensors, ctx.numbers) if for_x else None,
        _weight_grad(x, grad, weight, tensors, ctx.numbers) if for_weight else None,
        grad.sum(dim=(0, 2, 3, 4)) if for_bias else None,
        None,
        None,
    )


_input_grad = Operator("block_conv_input_grad", _input_gradient, _input_gradient_fake)
_weight_grad = Operator("block_conv_weight_grad", _weight_gradient, _weight_gradient_fake)
_block_conv = Operator("block_conv", _convolve, _convolve_fake, _backward, _remember)


def _settings(weight: Tensor, tensors: Sequence[Tensor], numbers: Sequence[int]) -> tuple[Plan, Shape, Launch]:
    return Plan.of_parts(tensors, numbers[:3]), _shape(weight, numbers), Launch(*numbers[6:])


def _shape(weight: Tensor, numbers: Sequence[int]) -> Shape:
    depth, height, width = weight.shape[2:]
    return Shape((depth, height, width), (numbers[3], numbers[4], numbers[5]))


def _check(x: Tensor, weight: Tensor, blocks: Blocks, stride: tuple[int, ...], shifts: Sequence[int]) -> None:
    outputs, inputs = blocks.channels
    fits = x.ndim in (4, 5) and x.shape[1] == inputs
    checks = (
        ("x", fits, f"(B, {inputs}, [D,] H, W), as the blocks have it", tuple(x.shape)),
        ("weight", weight.shape[:2] == (outputs, inputs), f"({outputs}, {inputs}, *kernel)", tuple(weight.shape)),
        ("weight", weight.ndim == x.ndim, f"{x.ndim} axes, like x", weight.ndim),
        ("stride", len(stride) == x.ndim - 2 and min(stride) > 0, f"{x.ndim - 2} numbers from 1", stride),
        ("shifts", len(shifts) > 0 and (x.ndim == 5 or not any(shifts)), "one or more in 3D, none in 2D", shifts),
    )
    for what, holds, allowed, given in checks:
        if not holds:
            remedy = "Make the blocks of this weight's mask."
            raise SettingError(explain(what, _WHERE, allowed=allowed, given=given, remedy=remedy))


def _check_types(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    types = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    if len(types) > 1 or x.dtype not in DTYPES:
        allowed, given = "one of float16, bfloat16, float32 for all tensors", ", ".join(sorted(map(str, types)))
        remedy = "Use torch.autocast, or convert them."
        raise SettingError(explain("type", _WHERE, allowed=allowed, given=given, remedy=remedy))

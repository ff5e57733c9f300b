"""Calls of the kernels in tiles.cu: (1, 3, 3) convolutions without stride, in blocks of 16 × 16 channels.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width; K entries, T taps, M chunks.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

import dstlib.engine.gpu.cuda as cuda
from dstlib.engine.gpu.tables import NARROW, TAPS, Plan, Table

KERNEL = (1, 3, 3)
_SOURCE = "tiles.cu"
PROGRAMS = 2048  # of a weight gradient: they keep a large GPU busy, and more only write more partial sums
_TILE = (16, 32)  # rows and columns of what one program of `convolve` computes
_THREADS, _PACKED = 128, 256  # of a program of `convolve`, and of `pack`
_WEIGHTS_TILE, _WEIGHTS_WARPS = (16, 16), 2  # of `find_weights_grad`
_MOST = 2**31  # numbers of a plane, which the kernels count in 32 bits


def suit(x: Tensor, size: tuple[int, int], weight: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the kernels compute this: x (B, C, D, H, W), the blocks' size, the weight's shape (O, C, \\*kernel)."""
    outputs, inputs, *kernel = weight
    return (
        cuda.computes(x)
        and tuple(kernel) == KERNEL
        and max(stride) == 1
        and not any(extent % NARROW for extent in size)
        and not (outputs % 8 or inputs % 8)  # channels are copied by eights
        and max(outputs, inputs) * prod(x.shape[3:]) < _MOST
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """The convolution of x (B, D, H, W, C): (B, D, H, W, O)."""
    y = x.new_empty((*x.shape[:4], weight.shape[0]))
    _convolve(x, (_packed(weight, plan.order), bias), y, plan.forward, None)
    return y


def input_gradient(grad: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The gradient of the input (B, D, H, W, C), from the output's (B, D, H, W, O)."""
    x_grad = grad.new_empty((*grad.shape[:4], weight.shape[1]))
    _convolve(grad, (_packed(weight, plan.back_order), None), x_grad, plan.back, plan.moves if plan.shifted else None)
    return x_grad


def partial_weights(x: Tensor, grad: Tensor, plan: Plan) -> Tensor:
    """Gradients (S, K, T, 16) of the weights of each entry, from S parts of the map."""
    table, (batch, depth, height, width, channels) = plan.forward, x.shape
    planes = batch * depth
    tiles = planes * _count((height, width), _WEIGHTS_TILE)
    shares = max(1, min(PROGRAMS // len(plan.chunks), tiles // 2))
    parts = x.new_empty((_WEIGHTS_WARPS * shares, len(table.index), TAPS, NARROW), dtype=torch.float32)
    sizes = (len(table.index), channels, grad.shape[-1], planes, depth, height, width)
    tensors = (x, grad, parts, plan.chunks, table.channels, table.shifts)
    size = (len(plan.chunks), shares), 32 * _WEIGHTS_WARPS
    cuda.launch(_SOURCE, "find_weights_grad", size, x, (*tensors, *sizes))
    return parts


def _convolve(x: Tensor, operands: tuple[Tensor, Tensor | None], y: Tensor, table: Table, moves: Tensor | None) -> None:
    """Fills y from x and the packed weights and bias."""
    weights, bias = operands
    num_rows, (batch, depth, height, width, channels) = len(table.rows) - 1, x.shape
    programs = num_rows * batch * depth * _count((height, width), _TILE)
    tensors = (x, weights, None if bias is None else bias.float(), y, table.rows, table.channels, table.shifts, moves)
    if programs:
        sizes = (num_rows, channels, y.shape[-1], depth, height, width)
        cuda.launch(_SOURCE, "convolve", ((programs, 1), _THREADS), x, (*tensors, *sizes))


def _packed(weight: Tensor, order: Tensor) -> Tensor:
    """The weights (M, T, 256) as lanes read them."""
    packed = weight.new_empty(order.shape)
    if count := order.numel():
        arguments = (weight.contiguous(), order, packed, count, weight.numel())
        cuda.launch(_SOURCE, "pack", ((-(-count // _PACKED), 1), _PACKED), weight, arguments)
    return packed


def _count(plane: tuple[int, int], tile: tuple[int, int]) -> int:
    return prod(-(-extent // step) for extent, step in zip(plane, tile, strict=True))

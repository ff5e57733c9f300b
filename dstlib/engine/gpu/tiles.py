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
MOST_SOURCES = 3
_SOURCE = "tiles.cu"
PROGRAMS = 2048  # of a weight gradient: they keep a large GPU busy, and more only write more partial sums
_TILE = (16, 32)  # rows and columns of what one program of `convolve` computes
_THREADS, _PACKED = 128, 256  # of a program of `convolve`, and of `pack`
_WEIGHTS_TILE, _WEIGHTS_WARPS = (16, 16), 2  # of `find_weights_grad`
_MOST = 2**31  # numbers of a plane, which the kernels count in 32 bits


def suit(sources: Sequence[Tensor], size: tuple[int, int], weight: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the kernels compute this: maps (B, C, D, H, W), the blocks' size, the weight's shape (O, C, \\*kernel).

    No block of channels may be of two maps.
    """
    outputs, inputs, *kernel = weight
    return (
        all(map(cuda.computes, sources))
        and len(sources) <= MOST_SOURCES
        and not any(x.shape[1] % NARROW for x in sources[:-1])
        and tuple(kernel) == KERNEL
        and max(stride) == 1
        and not any(extent % NARROW for extent in size)
        and not (outputs % 8 or inputs % 8)  # channels are copied by eights
        and max(outputs, inputs) * prod(sources[0].shape[3:]) < _MOST
    )


def convolve(sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """The convolution of the concatenation of maps (B, D, H, W, C): (B, D, H, W, O)."""
    y = sources[0].new_empty((*sources[0].shape[:4], weight.shape[0]))
    _convolve(sources, (_packed(weight, plan.order), bias), [y], plan.forward, None)
    return y


def input_gradient(grad: Tensor, weight: Tensor, widths: Sequence[int], plan: Plan) -> list[Tensor]:
    """The gradients of maps (B, D, H, W, C), which have that many channels, from the output's (B, D, H, W, O)."""
    grads = [grad.new_empty((*grad.shape[:4], width)) for width in widths]
    operands = _packed(weight, plan.back_order), None
    _convolve([grad], operands, grads, plan.back, plan.moves if plan.shifted else None)
    return grads


def partial_weights(sources: Sequence[Tensor], grad: Tensor, plan: Plan) -> Tensor:
    """Gradients (S, K, T, 16) of the weights of each entry, from S parts of the map."""
    table, (batch, depth, height, width, outputs) = plan.forward, grad.shape
    planes = batch * depth
    tiles = planes * _count((height, width), _WEIGHTS_TILE)
    shares = max(1, min(PROGRAMS // len(plan.chunks), tiles // 2))
    parts = grad.new_empty((_WEIGHTS_WARPS * shares, len(table.index), TAPS, NARROW), dtype=torch.float32)
    sizes = (*_widths(sources), outputs, len(table.index), planes, depth, height, width)
    tensors = (*_pointers(sources), grad, parts, plan.chunks, table.channels, table.shifts)
    size = (len(plan.chunks), shares), 32 * _WEIGHTS_WARPS
    cuda.launch(_SOURCE, "find_weights_grad", size, grad, (*tensors, *sizes))
    return parts


def _convolve(
    sources: Sequence[Tensor],
    operands: tuple[Tensor, Tensor | None],
    results: Sequence[Tensor],
    table: Table,
    moves: Tensor | None,
) -> None:
    """Fills the results from maps and the packed weights and bias."""
    (weights, bias), x = operands, sources[0]
    num_rows, (batch, depth, height, width, _) = len(table.rows) - 1, x.shape
    programs = num_rows * batch * depth * _count((height, width), _TILE)
    if not programs:
        return
    tables = (table.rows, table.channels, table.shifts, moves)
    tensors = (*_pointers(sources), weights, None if bias is None else bias.float(), *_pointers(results), *tables)
    sizes = (*_widths(sources), *_widths(results), num_rows, depth, height, width)
    cuda.launch(_SOURCE, "convolve", ((programs, 1), _THREADS), x, (*tensors, *sizes))


def _pointers(maps: Sequence[Tensor]) -> list[Tensor | None]:
    return [*maps, None, None][:MOST_SOURCES]


def _widths(maps: Sequence[Tensor]) -> list[int]:
    return [*(each.shape[4] for each in maps), 0, 0][:MOST_SOURCES]


def _packed(weight: Tensor, order: Tensor) -> Tensor:
    """The weights (M, T, 256) as lanes read them."""
    packed = weight.new_empty(order.shape)
    if count := order.numel():
        arguments = (weight.contiguous(), order, packed, count, weight.numel())
        cuda.launch(_SOURCE, "pack", ((-(-count // _PACKED), 1), _PACKED), weight, arguments)
    return packed


def _count(plane: tuple[int, int], tile: tuple[int, int]) -> int:
    return prod(-(-extent // step) for extent, step in zip(plane, tile, strict=True))

"""Convolutions by blocks in CUDA, by the kernels in tiles.cu: (1, 3, 3) without stride, in blocks of 16 × 16 channels.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width; K entries, T taps, M chunks.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

import dstlib.engine.gpu.cuda as cuda
from dstlib.engine.gpu.blocks import NARROW, TAPS, Pair, Table
from dstlib.engine.gpu.problem import BlockConvProblem, channels_first, channels_last

KERNEL = (1, 3, 3)
MOST_SOURCES = 3
_SOURCE = "tiles.cu"
PROGRAMS = 2048  # of a weight's gradient: they keep a large GPU busy, and more only write more partial sums
_TILE = (16, 32)  # rows and columns of what one program of `conv` computes
_THREADS, _PACKED = 128, 256  # of a program of `conv`, and of `pack_weights`
_WEIGHTS_TILE, _WEIGHTS_WARPS = (16, 16), 2  # of `conv_backward_weights`
_MOST = 2**31  # numbers of a plane, which the kernels count in 32 bits


def accept(sources: Sequence[Tensor], block: Pair, weight: Sequence[int], stride: Sequence[int]) -> bool:
    """Returns whether the kernels compute this: maps (B, C, D, H, W), the blocks' size, the weight's shape (O, C, ...).

    No block of channels may be of two maps.
    """
    outputs, inputs, *kernel = weight
    return (
        all(map(cuda.computes, sources))
        and len(sources) <= MOST_SOURCES
        and not any(x.shape[1] % NARROW for x in sources[:-1])
        and tuple(kernel) == KERNEL
        and max(stride) == 1
        and not any(extent % NARROW for extent in block)
        and not (outputs % 8 or inputs % 8)  # channels are copied by eights
        and max(outputs, inputs) * prod(sources[0].shape[3:]) < _MOST
    )


def forward(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the convolution (B, O, D, H, W) of the concatenation of maps."""
    sources, weight, bias, plan = problem.split(tensors)
    maps = list(map(channels_last, sources))
    y = maps[0].new_empty((*maps[0].shape[:4], weight.shape[0]))
    _conv(maps, (_packed(weight, plan.order), bias), [y], plan.forward, None)
    return [channels_first(y)]


def backward_input(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the gradients (B, C, D, H, W) of the maps."""
    *given, grad = tensors
    sources, weight, _, plan = problem.split(given)
    grad, operands = channels_last(grad), (_packed(weight, plan.backward_order), None)
    grads = [grad.new_empty((*grad.shape[:4], each.shape[1])) for each in sources]
    _conv([grad], operands, grads, plan.backward_input, plan.moves if problem.shifted else None)
    return list(map(channels_first, grads))


def backward_weights(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the gradient of the weight, zero outside the active blocks: the sum of those of shares of the map."""
    *given, grad = tensors
    sources, weight, _, plan = problem.split(given)
    maps, grad, table = list(map(channels_last, sources)), channels_last(grad), plan.forward
    batch, depth, height, width, outputs = grad.shape
    num_chunks, num_entries, planes = len(plan.chunks), len(table.weight_idx), batch * depth
    if not num_chunks:
        return [torch.zeros_like(weight)]
    shares = max(1, min(PROGRAMS // num_chunks, planes * _count((height, width), _WEIGHTS_TILE) // 2))
    parts = grad.new_empty((_WEIGHTS_WARPS * shares, num_entries, TAPS, NARROW), dtype=torch.float32)
    sizes = (*_widths(maps), outputs, num_entries, planes, depth, height, width)
    arguments = (*_pointers(maps), grad, parts, plan.chunks, table.col_idx, table.shifts, *sizes)
    cuda.launch(_SOURCE, "conv_backward_weights", ((num_chunks, shares), 32 * _WEIGHTS_WARPS), grad, arguments)
    return [table.unpack(parts.sum(dim=0), weight)]


def _conv(
    sources: Sequence[Tensor],
    operands: tuple[Tensor, Tensor | None],
    results: Sequence[Tensor],
    table: Table,
    moves: Tensor | None,
) -> None:
    """Fills the results from maps and the packed weights and bias."""
    (weights, bias), x = operands, sources[0]
    batch, depth, height, width, _ = x.shape
    programs = table.num_rows * batch * depth * _count((height, width), _TILE)
    if not programs:
        return
    tables = (table.row_ptr, table.col_idx, table.shifts, moves)
    tensors = (*_pointers(sources), weights, None if bias is None else bias.float(), *_pointers(results), *tables)
    sizes = (*_widths(sources), *_widths(results), table.num_rows, depth, height, width)
    cuda.launch(_SOURCE, "conv", ((programs, 1), _THREADS), x, (*tensors, *sizes))


def _pointers(maps: Sequence[Tensor]) -> list[Tensor | None]:
    return [*maps, None, None][:MOST_SOURCES]


def _widths(maps: Sequence[Tensor]) -> list[int]:
    return [*(each.shape[4] for each in maps), 0, 0][:MOST_SOURCES]


def _packed(weight: Tensor, order: Tensor) -> Tensor:
    """Returns the weights (M, T, 256) as lanes read them."""
    packed = weight.new_empty(order.shape)
    if count := order.numel():
        arguments = (weight.contiguous(), order, packed, count, weight.numel())
        cuda.launch(_SOURCE, "pack_weights", ((-(-count // _PACKED), 1), _PACKED), weight, arguments)
    return packed


def _count(plane: Pair, tile: Pair) -> int:
    """Returns how many tiles cover a plane."""
    return prod(-(-extent // step) for extent, step in zip(plane, tile, strict=True))

"""Convolutions by blocks in Triton: from tensors and tables to a grid of programs, in each of the three directions.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width; K entries, T taps, N columns.
Maps are (B, D, H, W, channels), contiguous: a tensor (B, C, D, H, W) in channels-last format, seen so.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dstlib.engine.gpu.blocks import NARROW, Table
from dstlib.engine.gpu.problem import BlockConvProblem, Launch, Triple, channels_first, channels_last
from dstlib.errors import SettingError

PROGRAMS = 512  # of a weight's gradient: they keep a large GPU busy, and more only write more partial sums


class Size(NamedTuple):
    """How many voxels: of the map that is read, and of the positions that are computed."""

    depth: int
    height: int
    width: int
    out_depth: int
    out_height: int
    out_width: int
    positions: int


class Form(NamedTuple):
    """What a kernel is compiled for."""

    channels: int  # of the map that is read
    outputs: int  # channels of the map that is written, or of the output's gradient
    columns: int  # N, of a row
    lanes: int  # N, or more: at least 16 and a power of two
    tile: int  # positions of a program, or of one step
    chunk: int  # entries of one step
    run: bool  # the entries of a step are neighbouring channels
    kernel: Triple
    stride: Triple
    backward: bool  # reads at (position + padding - tap) / stride, not at position · stride + tap - padding
    shifted: bool
    ragged: bool  # the last run reaches beyond the channels
    precision: str  # of float32 products
    widen: bool  # multiplies in float32: Triton's interpreter takes bfloat16 for whole numbers


class Terms(NamedTuple):
    """What adding up partial sums is compiled for."""

    channels: int
    sums: int  # all partial sums of a position
    most: int  # terms of a channel
    tile: int = 64  # positions of a program
    lanes: int = 32  # channels of a program


def interpreted() -> bool:
    """Returns whether Triton's interpreter is to run the kernels on a CPU: slowly, as a check of them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def forward(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the convolution (B, O, D', H', W') of one map."""
    (x,), weight, bias, plan = problem.split(tensors)
    x = channels_last(x)
    y = x.new_empty((len(x), *problem.size_of_output(x.shape[1:4], weight), weight.shape[0]))
    form = _form(problem, plan.forward, x, y, weight)
    _gather_gemm((x, plan.forward.pack(weight), bias), y, plan.forward, plan.moves, form, Launch(*problem.launch))
    return [channels_first(y)]


def backward_input(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the gradient (B, C, D, H, W) of the map."""
    (*given, grad), launch = tensors, Launch(*problem.launch)
    (x,), weight, _, plan = problem.split(given)
    grad, table, by_sums = channels_last(grad), plan.backward_input, plan.terms.numel() > 0
    create = torch.zeros if problem.shifted else torch.empty  # voxels that left the map have no gradient
    dtype = torch.float32 if by_sums else grad.dtype
    columns = create((len(x), *x.shape[2:], len(plan.moves)), dtype=dtype, device=grad.device)
    form = _form(problem, table, grad, columns, weight, backward=True)
    _gather_gemm((grad, table.pack(weight), None), columns, table, plan.moves, form, launch)
    if not by_sums:
        return [channels_first(columns)]
    x_grad = grad.new_empty((*columns.shape[:4], x.shape[1]))
    positions = columns.shape[:-1].numel()
    terms = Terms(channels=x.shape[1], sums=len(plan.moves), most=plan.terms.shape[1])
    grid = (_cdiv(positions, terms.tile), _cdiv(terms.channels, terms.lanes))
    _kernels().add_terms[grid](columns, x_grad, plan.terms, positions, terms)
    return [channels_first(x_grad)]


def backward_weights(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the gradient of the weight, zero outside the active blocks: the sum of those of shares of the map."""
    (*given, grad), launch = tensors, Launch(*problem.launch)
    (x,), weight, _, plan = problem.split(given)
    x, grad, table, taps = channels_last(x), channels_last(grad), plan.forward, weight[0, 0].numel()
    programs = taps * len(plan.chunks)
    shares = max(1, min(PROGRAMS // max(programs, 1), _cdiv(grad.shape[:-1].numel(), launch.tile) // 2))
    parts = x.new_empty((shares, len(table.weight_idx), taps, table.weight_idx.shape[1]), dtype=torch.float32)
    form = _form(problem, table, x, grad, weight)
    tables = (table.row_ptr, table.col_idx, table.shifts, plan.chunks, len(table.weight_idx))
    warps = max(1, min(launch.warps, form.chunk * form.lanes // 256))  # more would compute the same
    if programs:
        _kernels().gather_gemm_weights[taps, len(plan.chunks), shares](
            x, grad, parts, tables, _size(x, grad), form, num_warps=warps, num_stages=launch.stages
        )
    return [table.unpack(parts.sum(dim=0), weight)]


def _gather_gemm(
    operands: tuple[Tensor, Tensor, Tensor | None], y: Tensor, table: Table, moves: Tensor, form: Form, launch: Launch
) -> None:
    """Fills y from a map, the packed weights and the bias."""
    tables = (table.row_ptr, table.col_idx, table.shifts, moves, table.num_rows)
    programs = table.num_rows * _cdiv(y.shape[:-1].numel(), launch.tile)
    if programs:
        _kernels().gather_gemm[(programs,)](
            *operands, y, tables, _size(operands[0], y), form, num_warps=launch.warps, num_stages=launch.stages
        )


def _form(
    problem: BlockConvProblem, table: Table, x: Tensor, y: Tensor, weight: Tensor, *, backward: bool = False
) -> Form:
    columns, channels = table.weight_idx.shape[1], x.shape[-1]
    depth, height, width = weight.shape[2:]
    return Form(
        channels=channels,
        outputs=y.shape[-1],
        columns=columns,
        lanes=max(columns, NARROW),
        tile=Launch(*problem.launch).tile,
        chunk=table.chunk,
        run=table.run > 1,
        kernel=(depth, height, width),
        stride=problem.stride,
        backward=backward,
        shifted=problem.shifted,
        ragged=channels % table.run > 0,
        precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        widen=interpreted() and x.dtype == torch.bfloat16,
    )


def _size(x: Tensor, y: Tensor) -> Size:
    (_, depth, height, width, _), (_, out_depth, out_height, out_width, _) = x.shape, y.shape
    return Size(depth, height, width, out_depth, out_height, out_width, positions=y.shape[:-1].numel())


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)


@cache
def _kernels() -> ModuleType:
    """Loads the kernels when first called: Triton is an extra, and heavy."""
    try:
        import_module("triton")
    except ImportError as error:
        allowed, remedy = "Triton, which compiles the kernels", 'pip install "dstlib[gpu]", or pip install triton.'
        raise SettingError.of("triton", "block_conv()", allowed=allowed, given=error, remedy=remedy) from error
    return import_module("dstlib.engine.gpu.triton_kernels")

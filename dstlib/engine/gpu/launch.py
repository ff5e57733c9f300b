"""Calls of the GPU kernels: from tensors and tables to a grid of programs.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width; K entries, T taps, N columns.
Maps are (B, D, H, W, channels), contiguous: a tensor (B, C, D, H, W) in channels-last format, seen so.
"""

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

import dstlib.engine.gpu.tiles as tiles
from dstlib.engine.gpu.form import Form, Launch, Shape, Size, Terms
from dstlib.engine.gpu.tables import NARROW, Plan, Table
from dstlib.errors import SettingError

PROGRAMS = 512  # of a weight gradient: they keep a large GPU busy, and more only write more partial sums


def convolve(
    sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None, plan: Plan, shape: Shape, launch: Launch
) -> Tensor:
    """The convolution of maps (B, D, H, W, C), of which only tiles read several: (B, D', H', W', O)."""
    if plan.tiled:
        return tiles.convolve(sources, weight, bias, plan)
    (x,) = sources
    y = x.new_empty((x.shape[0], *shape.of_output(x.shape[1:4]), weight.shape[0]))
    form = _form(x, y, plan.forward, shape, launch, back=False, shifted=plan.shifted)
    _gather_gemm(x, (_pack(weight, plan.forward), bias), y, plan.forward, plan.moves, form, launch)
    return y


def input_gradient(
    grad: Tensor, weight: Tensor, sizes: Sequence[int], plan: Plan, shape: Shape, launch: Launch
) -> list[Tensor]:
    """The gradients of maps, from the output's (B, D', H', W', O); ``sizes``: D, H, W, then the channels of each."""
    size, widths = sizes[:3], sizes[3:]
    if plan.tiled:
        return tiles.input_gradient(grad, weight, widths, plan)
    channels, by_slots = weight.shape[1], plan.terms.numel() > 0
    create = torch.zeros if plan.shifted else torch.empty  # voxels that left the map have no gradient
    dtype = torch.float32 if by_slots else grad.dtype
    columns = create((grad.shape[0], *size, len(plan.moves)), dtype=dtype, device=grad.device)
    form = _form(grad, columns, plan.back, shape, launch, back=True, shifted=plan.shifted)
    _gather_gemm(grad, (_pack(weight, plan.back), None), columns, plan.back, plan.moves, form, launch)
    if not by_slots:
        return [columns]
    x_grad = grad.new_empty((grad.shape[0], *size, channels))
    positions = columns.shape[:-1].numel()
    terms = Terms(channels=channels, slots=len(plan.moves), most=plan.terms.shape[1])
    grid = (_cdiv(positions, terms.tile), _cdiv(channels, terms.lanes))
    _kernels().add_terms[grid](columns, x_grad, plan.terms, positions, terms)
    return [x_grad]


def weight_gradient(
    sources: Sequence[Tensor], grad: Tensor, like: Tensor, plan: Plan, shape: Shape, launch: Launch
) -> Tensor:
    """The gradient of a weight, shaped ``like`` it: of its active blocks, and zero elsewhere."""
    if plan.tiled:
        parts = tiles.partial_weights(sources, grad, plan)
    else:
        parts = _partial_weights(sources[0], grad, like, plan, shape, launch)
    packed = parts.sum(dim=0).transpose(1, 2).flatten(0, 1)  # (K · N, T)
    connections = like.shape[0] * like.shape[1]
    unpacked = packed.new_zeros((connections + 1, packed.shape[1]))  # the last is where entries without a weight go
    unpacked[plan.forward.index.flatten()] = packed
    return unpacked[:connections].reshape(like.shape).to(like.dtype)


def _partial_weights(x: Tensor, grad: Tensor, like: Tensor, plan: Plan, shape: Shape, launch: Launch) -> Tensor:
    """Gradients (S, K, T, N) of the weights of each entry, from S parts of the map."""
    table, taps = plan.forward, like[0, 0].numel()
    programs = taps * len(plan.chunks)
    tiles = _cdiv(grad.shape[:-1].numel(), launch.tile)
    shares = max(1, min(PROGRAMS // max(programs, 1), tiles // 2))
    parts = x.new_empty((shares, len(table.index), taps, table.index.shape[1]), dtype=torch.float32)
    form = _form(x, grad, table, shape, launch, back=False, shifted=plan.shifted)
    tables = (table.rows, table.channels, table.shifts, plan.chunks, len(table.index))
    warps = max(1, min(launch.warps, form.chunk * form.lanes // 256))  # more would compute the same
    if programs:
        _kernels().gather_gemm_weight[taps, len(plan.chunks), shares](
            x, grad, parts, tables, _size(x, grad), form, num_warps=warps, num_stages=launch.stages
        )
    return parts


def interpreted() -> bool:
    """Whether Triton's interpreter is to run the kernels on a CPU: slowly, as a check of them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _pack(weight: Tensor, table: Table) -> Tensor:
    """The weights (K, T, N) of a table, zero where there is no connection."""
    by_connection = pad(weight.reshape(weight.shape[0] * weight.shape[1], -1), (0, 0, 0, 1))
    return by_connection[table.index].transpose(1, 2).contiguous()


def _gather_gemm(
    x: Tensor,
    operands: tuple[Tensor, Tensor | None],
    y: Tensor,
    table: Table,
    moves: Tensor,
    form: Form,
    launch: Launch,
) -> None:
    """Fills y from x and the packed weights and bias."""
    num_rows = len(table.rows) - 1
    tables = (table.rows, table.channels, table.shifts, moves, num_rows)
    programs = num_rows * _cdiv(y.shape[:-1].numel(), launch.tile)
    if programs:
        _kernels().gather_gemm[(programs,)](
            x, *operands, y, tables, _size(x, y), form, num_warps=launch.warps, num_stages=launch.stages
        )


def _form(x: Tensor, y: Tensor, table: Table, shape: Shape, launch: Launch, *, back: bool, shifted: bool) -> Form:
    columns, channels = table.index.shape[1], x.shape[-1]
    return Form(
        channels=channels,
        outputs=y.shape[-1],
        columns=columns,
        lanes=max(columns, NARROW),
        tile=launch.tile,
        chunk=table.chunk,
        run=table.run > 1,
        kernel=shape.kernel,
        stride=shape.stride,
        back=back,
        shifted=shifted,
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
    """The kernels, loaded when first called: Triton is an extra, and heavy."""
    try:
        import_module("triton")
    except ImportError as error:
        allowed, remedy = "Triton, which compiles the kernels", 'pip install "dstlib[gpu]", or pip install triton.'
        raise SettingError.of("triton", "block_conv()", allowed=allowed, given=error, remedy=remedy) from error
    return import_module("dstlib.engine.gpu.kernels")

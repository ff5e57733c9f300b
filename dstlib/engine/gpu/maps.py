"""Maps in one pass over memory: concatenated and shifted, normalised and activated; by the kernels in maps.cu.

Where those do not compute (on a CPU, in float32), torch does. Maps are (B, C, D, H, W), channels last in memory.

Shapes: B batch, C channels, D, H, W depth, height, width, S shares of the voxels of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import instance_norm, leaky_relu

import dstlib.engine.gpu.cuda as cuda
from dstlib.engine.ops.operator import Implementation, Operator, Problem
from dstlib.layers.shift import channel_groups, shift

_SOURCE = "maps.cu"
_THREADS, _PIECE = 256, 8  # of a program; numbers that a thread reads at once
_MOST = _THREADS * _PIECE  # channels of a map: each thread keeps to eight
_VISITS, _PROGRAMS = 8, 1024  # voxels that a thread visits at least; programs that keep a large GPU busy


def gather(sources: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The concatenation of one to three maps, whose groups of channels move by ``sizes`` voxels along depth.

    As of torch.cat and :func:`dstlib.layers.shift.shift`, whose groups and directions these are.
    """
    if len(sources) == 1 and not any(sizes):
        return sources[0]
    if len(sources) > 3 or not all(map(cuda.computes, sources)) or max(x.shape[1] for x in sources) > _MOST:
        return shift(torch.cat(list(sources), dim=1), sizes, axis=2)
    return _gather(GatherProblem(tuple(sizes)), sources)[0]


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """The instance norm of x with weights and biases (C), then a leaky ReLU.

    Sums, weights and biases are of float32, whatever the type of x.
    """
    channels = x.shape[1]
    if not cuda.computes(x) or channels % _PIECE or channels > _MOST or not x.numel():
        return leaky_relu(instance_norm(x, weight=weight, bias=bias, eps=eps), slope)
    return _normalise(NormaliseProblem(eps, slope), [x, weight, bias])[0]


def channels_last(x: Tensor) -> Tensor:
    """A map (B, D, H, W, C), contiguous: itself, where its channels lie last."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """A map (B, D, H, W, C) seen as (B, C, D, H, W)."""
    return x.permute(0, 4, 1, 2, 3)


@dataclass(frozen=True)
class GatherProblem(Problem):
    """How far groups of channels move along depth."""

    sizes: tuple[int, ...]


def _gather_now(problem: GatherProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    sources = list(map(channels_last, tensors))
    y = sources[0].new_empty((*sources[0].shape[:4], sum(each.shape[4] for each in sources)))
    first = 0
    for each in sources:
        _move((each, 0), (y, first), each.shape[4], _moves(problem.sizes, y.shape[4], y.device)[first:], sign=1)
        first += each.shape[4]
    return [channels_first(y)]


def _gather_fake(problem: GatherProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x = tensors[0]
    return [channels_first(x.new_empty((x.shape[0], *x.shape[2:], sum(each.shape[1] for each in tensors))))]


def _keep_maps(problem: GatherProblem, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    return [each.new_empty(0, each.shape[1]) for each in tensors]  # how many channels each has


def _gather_backward(
    problem: GatherProblem, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    return list(_split(problem, [*kept, grads[0]]))


def _split_now(problem: GatherProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    *sources, grad = tensors
    whole, first, parts = channels_last(grad), 0, []
    for width in (each.shape[1] for each in sources):
        part = grad.new_empty((*whole.shape[:4], width))
        _move((whole, first), (part, 0), width, _moves(problem.sizes, whole.shape[4], grad.device)[first:], sign=-1)
        parts.append(channels_first(part))
        first += width
    return parts


def _split_fake(problem: GatherProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    *sources, grad = tensors
    shape = (grad.shape[0], *grad.shape[2:])
    return [channels_first(grad.new_empty((*shape, each.shape[1]))) for each in sources]


_split = Operator("split_map", GatherProblem, (Implementation("cuda", lambda *_: True, _split_now),), _split_fake)
_gather = Operator(
    "gather_maps",
    GatherProblem,
    (Implementation("cuda", lambda *_: True, _gather_now),),
    _gather_fake,
    _gather_backward,
    _keep_maps,
)


@cache
def _moves(sizes: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    """By how many voxels each channel moves (C)."""
    moves = torch.zeros(1, channels, dtype=torch.int32)
    for group, size in zip(channel_groups(moves, len(sizes)), sizes, strict=False):  # as in layers.shift
        group.fill_(size)
    return moves[0].to(device)


def _move(source: tuple[Tensor, int], target: tuple[Tensor, int], count: int, moves: Tensor, *, sign: int) -> None:
    """Copies ``count`` channels from the first given one of a map (B, D, H, W, C) to that of another."""
    (x, x_first), (y, y_first) = source, target
    batch, depth, height, width, _ = x.shape
    voxels, pieces = height * width, -(-count // _PIECE)
    if not x.numel():
        return
    shares = -(-voxels // (_THREADS // pieces * _VISITS))
    numbers = (x.shape[4], x_first, y.shape[4], y_first, count, sign, depth, voxels)
    cuda.launch(_SOURCE, "move", ((shares, batch * depth), _THREADS), x, (x, y, moves, *numbers))


@dataclass(frozen=True)
class NormaliseProblem(Problem):
    """The eps of an instance norm, and the negative slope of the leaky ReLU behind it."""

    eps: float
    slope: float


def _normalise_now(problem: NormaliseProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x, weight, bias = tensors
    x = channels_last(x)
    grid, (voxels, channels) = _grid(x), (prod(x.shape[1:4]), x.shape[4])
    parts, stats = _sums(x, (grid[0], 2)), _sums(x, (4,))
    y = torch.empty_like(x)
    cuda.launch(_SOURCE, "sum_squares", (grid, _THREADS), x, (x, parts, voxels, channels))
    sums = (parts, x, weight.float(), bias.float(), stats)
    cuda.launch(_SOURCE, "finish_norm", _of_channels(x), x, (*sums, grid[0], voxels, channels, problem.eps))
    cuda.launch(_SOURCE, "apply_norm", (grid, _THREADS), x, (x, stats, y, voxels, channels, problem.slope))
    return [channels_first(y), stats]


def _normalise_fake(problem: NormaliseProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x = tensors[0]
    y = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))
    return [channels_first(y), _sums(y, (4,))]


def _keep_stats(problem: NormaliseProblem, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    x, weight, bias = tensors
    return [x, outputs[1], weight.new_empty(0), bias.new_empty(0)]  # the last two for their types


def _normalise_backward(
    problem: NormaliseProblem, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    x, stats, weight, bias = kept
    x_grad, sums = _norm_grads(problem, [x, grads[0], stats])
    whole = sums.sum(dim=0)
    return [x_grad, whole[1].to(weight.dtype), whole[0].to(bias.dtype)]


def _norm_grads_now(problem: NormaliseProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x, grad, stats = tensors
    x, grad = channels_last(x), channels_last(grad)
    grid, (voxels, channels) = _grid(x), (prod(x.shape[1:4]), x.shape[4])
    parts, sums = _sums(x, (grid[0], 2)), _sums(x, (2,))
    x_grad, leak = torch.empty_like(x), problem.slope
    cuda.launch(_SOURCE, "sum_grads", (grid, _THREADS), x, (x, grad, stats, parts, voxels, channels, leak))
    cuda.launch(_SOURCE, "finish_sums", _of_channels(x), x, (parts, sums, grid[0], channels))
    cuda.launch(_SOURCE, "apply_grads", (grid, _THREADS), x, (x, grad, stats, sums, x_grad, voxels, channels, leak))
    return [channels_first(x_grad), sums]


def _norm_grads_fake(problem: NormaliseProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x = tensors[0]
    x_grad = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]))
    return [channels_first(x_grad), _sums(x_grad, (2,))]


_norm_grads = Operator(
    "norm_grads", NormaliseProblem, (Implementation("cuda", lambda *_: True, _norm_grads_now),), _norm_grads_fake
)
_normalise = Operator(
    "normalise_map",
    NormaliseProblem,
    (Implementation("cuda", lambda *_: True, _normalise_now),),
    _normalise_fake,
    _normalise_backward,
    _keep_stats,
)


def _sums(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for sums (B, \\*shape, C) of a map (B, D, H, W, C)."""
    return x.new_empty((x.shape[0], *shape, x.shape[4]), dtype=torch.float32)


def _grid(x: Tensor) -> tuple[int, int]:
    """Shares and samples."""
    at_once = _THREADS // (x.shape[4] // _PIECE)
    shares = prod(x.shape[1:4]) // (at_once * _VISITS)
    return max(1, min(shares, _PROGRAMS // len(x))), len(x)


def _of_channels(x: Tensor) -> tuple[tuple[int, int], int]:
    """The size of a launch whose programs each add up eight channels of a sample."""
    return (x.shape[4] // _PIECE, len(x)), _THREADS

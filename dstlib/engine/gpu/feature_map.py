"""Feature maps in one pass over memory: concatenated and shifted, normalised and activated; by feature_map.cu.

Where those kernels do not compute (on a CPU, in float32), torch does. Maps (B, C, D, H, W) lie channels last.

Shapes: B batch, C channels, D, H, W depth, height, width, S shares of the voxels of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import instance_norm, leaky_relu

import dstlib.engine.gpu.cuda as cuda
from dstlib.engine.gpu.problem import new_map
from dstlib.engine.ops.operator import Implementation, Operator, Problem
from dstlib.layers.shift import channel_moves, shift

_SOURCE = "feature_map.cu"
_THREADS, _PIECE = 256, 8  # of a program; numbers that a thread reads at once
_MOST = _THREADS * _PIECE  # channels of a map: each thread keeps to eight
_VISITS, _PROGRAMS = 8, 1024  # voxels that a thread visits at least; programs that keep a large GPU busy


def gather(sources: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Concatenates maps, whose groups of channels move by ``sizes`` voxels along depth.

    As of torch.cat and :func:`dstlib.layers.shift.shift`, whose groups and directions these are.
    """
    if len(sources) == 1 and not any(sizes):
        return sources[0]
    if not all(map(cuda.computes, sources)) or max(x.shape[1] for x in sources) > _MOST:
        return shift(torch.cat(list(sources), dim=1), sizes, axis=2)
    return _gather(Gathering(tuple(sizes)), sources)[0]


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """Computes the instance norm of x with weights and biases (C), then a leaky ReLU.

    Sums, weights and biases are of float32, whatever the type of x.
    """
    channels = x.shape[1]
    if not cuda.computes(x) or channels % _PIECE or channels > _MOST or not x.numel():
        return leaky_relu(instance_norm(x, weight=weight, bias=bias, eps=eps), slope)
    return _normalise(Normalising(float(eps), float(slope)), [x, weight, bias])[0]


@dataclass(frozen=True)
class Gathering(Problem):
    """The concatenation of maps, by how many voxels its groups of channels move along depth."""

    sizes: tuple[int, ...]


def _gather_forward(problem: Gathering, sources: Sequence[Tensor]) -> list[Tensor]:
    y, first = _empty(sources[0], sum(each.shape[1] for each in sources)), 0
    moves = _moves(problem.sizes, y.shape[1], y.device)
    for each in sources:
        source = each.contiguous(memory_format=torch.channels_last_3d)
        _move((source, 0), (y, first), each.shape[1], moves[first:], sign=1)
        first += each.shape[1]
    return [y]


def _gather_backward(problem: Gathering, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cuts the gradient, the last of the tensors, into those of maps that have as many channels as the others."""
    *sources, grad = tensors
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    parts, first = [_empty(grad, each.shape[1]) for each in sources], 0
    moves = _moves(problem.sizes, grad.shape[1], grad.device)
    for part in parts:
        _move((grad, first), (part, 0), part.shape[1], moves[first:], sign=-1)
        first += part.shape[1]
    return parts


def _empty(x: Tensor, channels: int) -> Tensor:
    return new_map(x, x.shape[2:], channels)


_split = Operator(
    "split_map",
    Gathering,
    (Implementation("cuda", lambda problem, tensors: True, _gather_backward),),
    fake=lambda problem, tensors: [_empty(tensors[-1], each.shape[1]) for each in tensors[:-1]],
)
_gather = Operator(
    "gather_maps",
    Gathering,
    (Implementation("cuda", lambda problem, tensors: True, _gather_forward),),
    fake=lambda problem, tensors: [_empty(tensors[0], sum(each.shape[1] for each in tensors))],
    backward=lambda problem, kept, grads, wanted: _split(problem, [*kept, grads[0]]),
    # not the maps: empty ones, which say how many channels each had
    keep=lambda problem, tensors, outputs: [each.new_empty((0, each.shape[1])) for each in tensors],
)


@lru_cache(maxsize=1024)
def _moves(sizes: tuple[int, ...], channels: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first: it serves trainings, too
        return channel_moves(channels, sizes).to(device)


def _move(source: tuple[Tensor, int], target: tuple[Tensor, int], count: int, moves: Tensor, *, sign: int) -> None:
    """Copies ``count`` channels from the first given one of a map to that of another; both lie channels last."""
    (x, x_first), (y, y_first) = source, target
    batch, channels, depth, height, width = x.shape
    if not x.numel():
        return
    voxels = height * width
    shares = -(-voxels // (_THREADS // -(-count // _PIECE) * _VISITS))
    numbers = (channels, x_first, y.shape[1], y_first, count, sign, depth, voxels)
    cuda.launch(_SOURCE, "move", ((shares, batch * depth), _THREADS), x, (x, y, moves, *numbers))


@dataclass(frozen=True)
class Normalising(Problem):
    """An instance norm with its eps, and a leaky ReLU of this negative slope, of tensors x, weight and bias."""

    eps: float
    slope: float


def _normalise_forward(problem: Normalising, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the map, and statistics (B, 4, C) that the gradients need."""
    x, weight, bias = tensors
    x = x.contiguous(memory_format=torch.channels_last_3d)
    grid, voxels, channels = _grid(x), prod(x.shape[2:]), x.shape[1]
    parts = x.new_empty((len(x), grid[0], 2, channels), dtype=torch.float32)
    y, stats = _empty_with_sums(x, 4)
    cuda.launch(_SOURCE, "sum_squares", (grid, _THREADS), x, (x, parts, voxels, channels))
    read = (parts, x, weight.float(), bias.float(), stats)
    cuda.launch(_SOURCE, "finish_norm", _of_channels(x), x, (*read, grid[0], voxels, channels, problem.eps))
    cuda.launch(_SOURCE, "apply_norm", (grid, _THREADS), x, (x, stats, y, voxels, channels, problem.slope))
    return [y, stats]


def _normalise_backward(problem: Normalising, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Computes the gradient of the map, and sums (B, 2, C) that are the gradients of bias and weight of a sample."""
    x, stats, grad = tensors
    x, grad = (each.contiguous(memory_format=torch.channels_last_3d) for each in (x, grad))
    grid, voxels, channels, slope = _grid(x), prod(x.shape[2:]), x.shape[1], problem.slope
    parts = x.new_empty((len(x), grid[0], 2, channels), dtype=torch.float32)
    x_grad, sums = _empty_with_sums(x, 2)
    cuda.launch(_SOURCE, "sum_grads", (grid, _THREADS), x, (x, grad, stats, parts, voxels, channels, slope))
    cuda.launch(_SOURCE, "finish_sums", _of_channels(x), x, (parts, sums, grid[0], channels))
    cuda.launch(_SOURCE, "apply_grads", (grid, _THREADS), x, (x, grad, stats, sums, x_grad, voxels, channels, slope))
    return [x_grad, sums]


def _all_gradients(
    problem: Normalising, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    x, stats, weight, bias = kept
    x_grad, sums = _norm_grads(problem, [x, stats, grads[0]])
    bias_grad, weight_grad = sums.sum(dim=0)
    return [x_grad, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype)]


def _empty_with_sums(x: Tensor, count: int) -> list[Tensor]:
    """Returns room for a map like x, and for ``count`` sums of each channel of a sample."""
    return [_empty(x, x.shape[1]), x.new_empty((len(x), count, x.shape[1]), dtype=torch.float32)]


_norm_grads = Operator(
    "normalise_map_backward",
    Normalising,
    (Implementation("cuda", lambda problem, tensors: True, _normalise_backward),),
    fake=lambda problem, tensors: _empty_with_sums(tensors[0], 2),
)
_normalise = Operator(
    "normalise_map",
    Normalising,
    (Implementation("cuda", lambda problem, tensors: True, _normalise_forward),),
    fake=lambda problem, tensors: _empty_with_sums(tensors[0], 4),
    backward=_all_gradients,
    keep=lambda problem, tensors, outputs: [tensors[0], outputs[1], *tensors[1:]],
)


def _grid(x: Tensor) -> tuple[int, int]:
    """Returns shares and samples of a map."""
    at_once = _THREADS // (x.shape[1] // _PIECE)
    shares = prod(x.shape[2:]) // (at_once * _VISITS)
    return max(1, min(shares, _PROGRAMS // len(x))), len(x)


def _of_channels(x: Tensor) -> tuple[tuple[int, int], int]:
    """Returns the size of a launch whose programs each add up eight channels of a sample."""
    return (x.shape[1] // _PIECE, len(x)), _THREADS

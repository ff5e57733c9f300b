"""Convolution with sparse kernels on depth-last maps, and the unit made of it: shift → convolution → norm → activation.

Shapes: N batch, C input channels over all sources, O output channels, D, H, W depth, height, width, (kh, kw) kernel,
A active kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.grad import conv3d_input, conv3d_weight

from dstlib.engine.ops.feature_map import (
    FeatureMap,
    MapProblem,
    empty,
    empty_depth_last,
    empty_gradient,
    flat,
    pattern_of,
    source,
    target,
)
from dstlib.engine.ops.instance_norm import instance_norm_backward
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Implementation, Item, Operator, Tensors, by_kernel, by_torch, groups
from dstlib.engine.ops.patterns import Weights, rows_of
from dstlib.engine.ops.prepared import Places, PreparedCall, by_prepared, run, state_of
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.memory import zeros
from dstlib.engine.runtime.structs import FORM_DIRECT, FORM_WINOGRAD

Triple = tuple[int, int, int]
Accepts = Callable[["ConvProblem", Tensors], bool]
Affine = tuple[Tensor, Tensor, float]  # gamma (O), beta (O), eps
NUM_PATTERN = 9  # tensors: row_ptr, col_idx, index of the active kernels, of these transposed, and of the graded ones


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a convolution does besides its weights: stride (d, h, w) and the shift (C) of each input channel.

    ``shifts`` (C) in int32: voxels towards higher depths, zeros flowing in. The padding is half the kernel.
    """

    shifts: Tensor
    stride: Triple = (1, 1, 1)


class Given(NamedTuple):
    """The tensors of a convolution by name; patterns are row_ptr, col_idx and index of kernels."""

    maps: list[FeatureMap]
    weight: Tensor
    bias: Tensor | None
    affine: Tensors  # gamma and beta of the norm that follows, if one does
    active: Tensors
    transposed: Tensors  # the active kernels
    graded: Tensors
    shifts: Tensor  # of each input channel

    @property
    def input_size(self) -> tuple[int, ...]:
        """(N, C, D, H, W) of the concatenated maps."""
        x = self.maps[0].raw
        return x.shape[0], len(self.shifts), *x.shape[2:]


@dataclass(frozen=True)
class ConvProblem(MapProblem):
    """A convolution of maps; weight, bias, gamma, beta, patterns and shifts follow, in the backward directions dy."""

    name = "conv"
    stride: tuple[int, ...]
    has_bias: bool
    is_unit: bool = False  # whether a norm follows
    eps: float = 0.0  # of that norm
    slope: float = 1.0  # behind it
    compact: tuple[int, ...] = ()  # (O, C) of a weight (A, *taps) of the active kernels alone

    @property
    def is_read_later(self) -> bool:
        """Whether a norm follows, which readers apply."""
        return self.is_unit

    def check(self, tensors: Tensors) -> None:
        """Refuses maps that do not fit each other, the weight, or the norm that follows.

        Raises:
            InputError: They do not.
        """
        super().check(tensors)
        maps, (weight, *per_output), shifts = tensors[: len(self.normed)], self.parameters(tensors), tensors[-1]
        outputs, channels, *kernel = (*self.compact, *weight.shape[1:]) if self.compact else weight.shape
        if self.compact and len(tensors[-2]) != len(weight):  # the index of graded kernels, all that there are
            allowed = f"{len(tensors[-2])} kernels, those of its pattern"
            raise self.refusal("weight", allowed, f"{tuple(weight.shape)}")
        if sum(found := [x.shape[1] for x in maps]) != channels:  # all sizes would show a 2D layer's samples as depths
            raise self.refusal("maps", f"{channels} channels in all", " + ".join(map(str, found)))
        if len(kernel) not in (2, 3) or (len(kernel) == 3 and kernel[0] != 1):
            allowed = "(O, C, kh, kw) or (O, C, 1, kh, kw)"
            raise self.refusal("weight", allowed, f"{tuple(weight.shape)}")
        if any(x.shape != (outputs,) for x in per_output) or len(shifts) != channels:
            shapes = ", ".join(str(tuple(x.shape)) for x in (*per_output, shifts))
            raise self.refusal("bias, norm and shifts", f"({outputs},), shifts ({channels},)", shapes)
        if self.is_unit and prod(self.output_size(maps[0], weight)[2:]) == 1:
            size = f"one, of maps {tuple(maps[0].shape)}"
            raise self.refusal("norm", "more than one voxel of each channel", size)

    def in_one_type(self, tensors: Tensors) -> Tensors:
        """Returns the tensors with their maps in the type of the weight."""
        return self.in_type_of(self.parameters(tensors)[0], tensors)

    def parameters(self, tensors: Tensors) -> Tensors:
        """Returns the weight, and the bias, gamma and beta that there are."""
        first = len(self.normed) + 2 * sum(self.normed)
        return tensors[first : first + 1 + self.has_bias + 2 * self.is_unit]

    def named(self, tensors: Tensors) -> Given:
        """Returns what the tensors are."""
        maps, rest = self.split(tensors)
        sizes = 1 + self.has_bias, 2 * self.is_unit, 3, 3, 3
        (weight, *bias), affine, active, transposed, graded, (shifts, *_) = groups(rest, *sizes)
        return Given(maps, weight, bias[0] if bias else None, affine, active, transposed, graded, shifts)

    def by_map(self, given: Sequence[Item]) -> list[Sequence[Item]]:
        """Cuts what there is of each tensor into that of maps, norms, weight and bias, and what follows."""
        return groups(given, len(self.normed), 2 * sum(self.normed), 1 + self.has_bias)

    def reads(self, tensors: Tensors) -> Tensors:
        """Returns the tensors that have to be of float32 for the kernels, among them a gradient behind the others."""
        maps, norms, parameters, rest = self.by_map(tensors)
        return [*maps, *norms, *parameters, *rest[2 * self.is_unit + NUM_PATTERN + 1 :]]

    def output_size(self, x: Tensor, weight: Tensor) -> tuple[int, ...]:
        """Returns (N, O, D / d, H / h, W / w), rounded up."""
        coarser = (-(-n // step) for n, step in zip(x.shape[2:], self.stride, strict=True))
        return x.shape[0], (self.compact or weight.shape)[0], *coarser

    def result(self, outputs: Tensors) -> FeatureMap:
        """Returns the map, and as its norm the one that follows."""
        y, *statistics = outputs
        found = FeatureMap(y, (statistics[0][0], statistics[0][1], self.slope) if statistics else None)
        found.shown = statistics[1] if len(statistics) > 1 else None
        return found


def conv(sources: Sequence[FeatureMap], weights: Weights, geometry: Geometry) -> FeatureMap:
    """Computes the convolution of the concatenated, activated sources: (N, O, D / d, H / h, W / w), rounded up.

    Gradients are those of the activated sources; the weight's has zeros where no kernel is graded.

    Raises:
        InputError: The sources do not fit each other, or the weight.

    >>> from dstlib.engine.ops.patterns import Pattern
    >>> full = Pattern.of(torch.ones(1, 1, dtype=torch.bool))
    >>> moved = Geometry(torch.ones(1, dtype=torch.int32))  # depth 1 reads depth 0
    >>> x = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
    >>> conv([FeatureMap(x)], Weights(torch.ones(1, 1, 1, 1, 1), None, full, full), moved).raw.flatten()
    tensor([0., 1.])
    """
    state = state_of([x.tensor for x in sources], [weights.weight], [weights.bias])
    return run(CONV, weights.calls, state, sources, lambda: stated(sources, weights, geometry))


def unit(
    sources: Sequence[FeatureMap], weights: Weights, geometry: Geometry, affine: Affine, slope: float
) -> FeatureMap:
    """Computes the convolution; the affine instance norm and max(y, slope · y) after it are what its readers apply.

    ``affine`` is gamma (O), beta (O) and eps. The gradient of the result is that of the activated map.

    Raises:
        InputError: The sources do not fit each other, the weight, or the norm.
    """
    state = state_of([x.tensor for x in sources], [weights.weight], [weights.bias, *affine[:2]])
    state = state and (*state, affine[2], slope)
    return run(CONV, weights.calls, state, sources, lambda: stated(sources, weights, geometry, affine, slope))


def stated(
    sources: Sequence[FeatureMap],
    weights: Weights,
    geometry: Geometry,
    affine: Affine | None = None,
    slope: float = 1.0,
) -> tuple[ConvProblem, list[Tensor]]:
    """Returns a convolution, or a unit, as its operators take it."""
    maps, normed, slopes = flat(sources)
    parameters = [weights.weight] if weights.bias is None else [weights.weight, weights.bias]
    patterns = [*weights.active.tensors, *weights.active.transposed.tensors, *weights.graded.tensors]
    gamma_beta, eps = (affine[:2], affine[2]) if affine else ((), 0.0)
    has_bias = len(parameters) > 1
    problem = ConvProblem(normed, slopes, geometry.stride, has_bias, affine is not None, eps, slope, weights.size)
    return problem, [*maps, *parameters, *gamma_beta, *patterns, geometry.shifts]


def active_gradient(grad: Tensor, x: Tensor, weights: Weights, geometry: Geometry) -> Tensor:
    """Computes the gradient of a weight without bias, of graded kernels alone, from that of the outputs and the map."""
    problem, tensors = stated([FeatureMap(x)], weights, geometry)
    return CONV_BACKWARD_WEIGHTS(problem, [*tensors, grad])[0]


def pack_weights(found: Kernels, weight: Tensor, index: Tensor, form: int, *, reflected: bool = False) -> Tensor:
    """Returns the active kernels of a weight as a form reads them: (A · 36) for Winograd's, or (A · kh · kw)."""
    weight = weight.detach().contiguous()
    taps = weight.shape[-2] * weight.shape[-1]
    out = empty(index.numel() * (36 if form == FORM_WINOGRAD else taps), weight)
    job = structs.PackWeights(weight.data_ptr(), index.data_ptr(), out.data_ptr(), index.numel(), taps, form, reflected)
    check(found.conv_pack_weights(job, torch.get_num_threads()), "pack_weights()")
    return out


def _suits_winograd(problem: ConvProblem, tensors: Tensors) -> bool:
    """Tells whether Winograd's transform fits, and was measured faster.

    Of a plane of 2 x 2 most taps see nothing but zeros, and the transformed kernels are four times as much to read:
    there the direct form was measured 1.2 to 5 times as fast, at 3 x 3 half as fast for sparse kernels.
    """
    height, width = tensors[0].shape[3:]
    fits = tuple(problem.by_map(tensors)[2][0].shape[-2:]) == (3, 3) and problem.stride == (1, 1, 1)
    return fits and height * width > structs.DIRECT_PLANE


def _kernel(found: Kernels, form: int) -> Callable[..., int]:
    return found.conv_winograd if form == FORM_WINOGRAD else found.conv_direct


def _forward(name: str, form: int, accepts: Accepts) -> Implementation[ConvProblem]:
    """Returns the forward direction in a form."""

    def prepare(found: Kernels, problem: ConvProblem, maps: list[FeatureMap], tensors: Tensors) -> PreparedCall:
        given = problem.named(tensors)
        size = problem.output_size(tensors[0], given.weight)
        packed = pack_weights(found, given.weight, given.active[2], form)
        job = _job(problem, given.weight, given.active, given.input_size, size)
        job.weights, job.shifts = packed.data_ptr(), given.shifts.data_ptr()
        for i, x in enumerate(maps):
            job.sources[i] = source(x.raw, x.norm)
        if given.bias is not None:
            job.bias = given.bias.data_ptr()
        places = Places(job.sources[: len(maps)], job.out, size)
        if problem.is_unit:
            gamma, beta = given.affine
            job.norm = structs.InstanceNorm(gamma.data_ptr(), beta.data_ptr(), problem.eps)
            places = replace(places, norm=job.norm, slope=problem.slope)
        alive = (packed, given.bias, given.affine, given.active, given.shifts)  # no map, and no norm of one
        return PreparedCall("convolution", _kernel(found, form), job, places, alive)

    def accepted(problem: ConvProblem, tensors: Tensors) -> bool:
        pointed = problem.parameters(tensors)[1:]  # to read as it lies: it may change later
        return all(x.is_contiguous() for x in pointed) and accepts(problem, tensors)

    return by_prepared(name, prepare, accepted, reads=ConvProblem.reads)


def _forward_with_torch(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    given = problem.named(tensors)
    active = _spread(given, given.active).unsqueeze(2)
    found = F.conv3d(_input(given), active, given.bias, problem.stride, _padding(given.weight))
    y = empty_depth_last(found.shape, found).copy_(found)
    return [y, _statistics(y, given.affine, problem.eps)] if problem.is_unit else [y]


def _statistics(y: Tensor, affine: Tensors, eps: float) -> Tensor:
    """Returns scale, offset, mean and 1 / √(variance + eps), (4, N, O)."""
    (gamma, beta), double = affine, y.double()
    mean = double.mean((2, 3, 4))
    rstd = (double.var((2, 3, 4), correction=0) + eps).rsqrt()
    scale = gamma * rstd
    return torch.stack([scale, beta - scale * mean, mean, rstd]).to(y.dtype)


def _backward_input(name: str, form: int, accepts: Accepts, *, strided: bool = False) -> Implementation[ConvProblem]:
    """Returns the gradient (N, C, D, H, W) of each activated map, in a form.

    It is a convolution with the transposed, reflected kernels, whose rows are those of one map after the other; with a
    stride it is none, and has a kernel of its own.
    """

    def run(kernels: Kernels, problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
        given, grad = problem.named(tensors), to_depth_last(tensors[-1])
        packed = pack_weights(kernels, given.weight, given.transposed[2], form, reflected=not strided)
        found = [empty_gradient(x.raw.shape, grad) for x in given.maps]
        still, back = given.shifts.new_zeros(grad.shape[1]), -given.shifts
        job = _job(problem, given.weight, given.transposed, grad.shape, given.input_size)
        job.sources[0], job.out, job.weights = source(grad), target(found[0]), packed.data_ptr()
        job.shifts, job.out_shifts = still.data_ptr(), back.data_ptr()
        for i, first in enumerate(accumulate(x.shape[1] for x in found[:-1])):
            job.rest[i] = structs.Rows(target(found[i + 1]), first)
        kernel = kernels.conv_strided_backward_input if strided else _kernel(kernels, form)
        check(kernel(job, torch.get_num_threads()), "gradient of a convolution's input")
        return found

    return by_kernel(name, run, accepts, reads=ConvProblem.reads)


def _backward_input_with_torch(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    given, grad = problem.named(tensors), tensors[-1]
    active, padding = _spread(given, given.active).unsqueeze(2), _padding(given.weight)
    joined, (batch, _, *extents) = empty_gradient(given.input_size, grad), given.input_size
    for size in given.shifts.unique().tolist():  # one after the other, as each is put in torch's order, too
        channels = (given.shifts == size).nonzero().flatten()
        part = batch, len(channels), *extents
        _move(joined, channels, conv3d_input(part, active[:, channels], grad, problem.stride, padding), -size)
    return _apart(joined, given.maps)


def _apart(joined: Tensor, maps: Sequence[FeatureMap]) -> list[Tensor]:
    """Returns the part of each map, on memory of its own."""
    return [joined] if len(maps) == 1 else [x.clone() for x in joined.split([x.raw.shape[1] for x in maps], dim=1)]


def _backward_weights(found: Kernels, problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    """Computes the gradients of weight and, where there is one, bias; the weight's with zeros where none is graded."""
    given, grad = problem.named(tensors), to_depth_last(tensors[-1])
    grads = [zeros(given.weight.shape)]
    maps = [(to_depth_last(x.raw), x.norm) for x in given.maps]
    job = _job(problem, given.weight, given.graded, given.input_size, grad.shape)
    for i, (x, norm) in enumerate(maps):
        job.sources[i] = source(x, norm)
    job.out, job.shifts, job.index = target(grad), given.shifts.data_ptr(), given.graded[2].data_ptr()
    job.weights_grad = grads[0].data_ptr()
    if given.bias is not None:
        grads.append(torch.empty_like(given.bias))
        job.bias_grad = grads[1].data_ptr()
    check(found.conv_backward_weights(job, torch.get_num_threads()), "gradient of a convolution's weights")
    return grads


def _backward_weights_with_torch(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    given, grad = problem.named(tensors), tensors[-1]
    weight, padding = given.weight, _padding(given.weight)
    size = grad.shape[1], len(given.shifts), 1, *weight.shape[-2:]
    dense = conv3d_weight(_input(given), size, grad, problem.stride, padding).reshape(-1, *weight.shape[-2:])
    row_ptr, col_idx, index = given.graded
    graded = dense[rows_of(row_ptr, col_idx) * len(given.shifts) + col_idx]
    found = dense.new_zeros(weight.shape)
    found.view(-1, *weight.shape[-2:]).index_copy_(0, index, graded)
    return [found, grad.sum((0, 2, 3, 4))] if problem.has_bias else [found]


def _job(problem: ConvProblem, weight: Tensor, pattern: Tensors, x: Sequence[int], y: Sequence[int]) -> structs.Conv:
    """Describes a convolution with these kernels from maps of size x to those of size y, both (N, C, D, H, W)."""
    row_ptr, col_idx, _ = pattern
    return structs.Conv(
        pattern=pattern_of(row_ptr, col_idx, x[1]),
        input_size=(x[0], *x[2:]),
        output_size=tuple(y[2:]),
        kernel_size=tuple(weight.shape[-2:]),
        stride=problem.stride,
        padding=_padding(weight)[1:],
    )


def shifted(x: Tensor, shifts: Tensor) -> Tensor:
    """Moves each channel along depth by its own number of voxels, zeros flowing in: with torch alone.

    Returns the map itself where no channel moves.
    """
    if not shifts.any():
        return x
    out = torch.empty_like(x)
    for size in shifts.unique().tolist():
        channels = (shifts == size).nonzero().flatten()
        _move(out, channels, x[:, channels], size)
    return out


def _move(out: Tensor, channels: Tensor, x: Tensor, size: int) -> None:
    """Writes channels of a map, each ``size`` voxels further along depth than in x, zeros flowing in."""
    depth = x.shape[2]
    first, last = min(max(size, 0), depth), max(depth + min(size, 0), 0)
    out[:, channels, first:last] = x[:, :, max(-size, 0) : max(-size, 0) + max(last - first, 0)]
    out[:, channels, :first] = 0
    out[:, channels, last:] = 0


def _input(given: Given) -> Tensor:
    """Returns what the convolution sees: the maps activated, concatenated and shifted."""
    return shifted(torch.cat([x.activated() for x in given.maps], dim=1), given.shifts)


def _spread(given: Given, pattern: Tensors) -> Tensor:
    """Returns the weight (O, C, kh, kw) with zeros where a pattern has no kernel."""
    row_ptr, col_idx, index = pattern
    taps = given.weight.shape[-2:]
    size = len(row_ptr) - 1, len(given.shifts)
    at = rows_of(row_ptr, col_idx) * size[1] + col_idx
    values = given.weight.reshape(-1, *taps)[index]
    return values.new_zeros(prod(size), *taps).index_copy(0, at, values).view(*size, *taps)


def _padding(weight: Tensor) -> Triple:
    return 0, weight.shape[-2] // 2, weight.shape[-1] // 2


def plain_conv(problem: ConvProblem, tensors: Tensors) -> Tensor:
    """Computes the convolution, or the whole unit, by torch's operations; what is not graded is zero."""
    given = problem.named(tensors)
    x, weight = torch.cat(problem.values(tensors), dim=1), _spread(given, given.graded).unsqueeze(2)
    y = F.conv3d(shifted(x, given.shifts), weight, given.bias, problem.stride, _padding(given.weight))
    if not problem.is_unit:
        return y
    gamma, beta = given.affine
    return F.leaky_relu(F.instance_norm(y, weight=gamma, bias=beta, eps=problem.eps), problem.slope)


def _empty(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    weight = problem.named(tensors).weight
    y = empty_depth_last(problem.output_size(tensors[0], weight), weight)
    return [y, y.new_empty(4, *y.shape[:2])] if problem.is_unit else [y]


def _backward(problem: ConvProblem, kept: list[Tensor], grads: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    outputs = [kept.pop(0) for _ in range(2 * problem.is_unit)]
    given, grad, groups_wanted = problem.named(kept), grads[0], problem.by_map(wanted)
    found: list[Sequence[Tensor | None]] = [[None] * len(group) for group in groups_wanted]
    if problem.is_unit:
        grad, *found[3] = backward_of_norm(problem, outputs, given.affine[0], grad)
    if any(groups_wanted[0]):
        found[0] = CONV_BACKWARD_INPUT(problem, [*kept, grad])
    if any(groups_wanted[2]):
        found[2] = CONV_BACKWARD_WEIGHTS(problem, [*kept, grad])
    return [*chain.from_iterable(found)]


def backward_of_norm(
    problem: ConvProblem, outputs: list[Tensor], gamma: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes from what a unit has made, which is let go, and its gradient those of convolution, gamma and beta."""
    statistics, y = outputs.pop(), outputs.pop()
    scale, offset, mean, rstd = statistics.unbind()
    return instance_norm_backward(FeatureMap(y, (scale, offset, problem.slope)), grad, mean, rstd, gamma)


CONV_BACKWARD_INPUT = Operator(
    "conv_backward_input",
    ConvProblem,
    (
        _backward_input("winograd", FORM_WINOGRAD, _suits_winograd),
        _backward_input("direct", FORM_DIRECT, lambda problem, tensors: problem.stride == (1, 1, 1)),
        _backward_input("strided", FORM_DIRECT, lambda problem, tensors: True, strided=True),
        by_torch(_backward_input_with_torch),
    ),
    fake=lambda problem, tensors: [torch.empty_like(x) for x in tensors[: len(problem.normed)]],
)
CONV_BACKWARD_WEIGHTS = Operator(
    "conv_backward_weights",
    ConvProblem,
    (by_kernel("direct", _backward_weights, reads=ConvProblem.reads), by_torch(_backward_weights_with_torch)),
    fake=lambda problem, tensors: [torch.empty_like(x) for x in problem.by_map(tensors)[2]],
)
CONV = Operator(
    "conv",
    ConvProblem,
    (
        _forward("winograd", FORM_WINOGRAD, _suits_winograd),
        _forward("direct", FORM_DIRECT, lambda problem, tensors: True),
        by_torch(_forward_with_torch),
    ),
    fake=_empty,
    backward=_backward,
    keep=lambda problem, tensors, outputs: [*(outputs if problem.is_unit else []), *tensors],
    plain=plain_conv,
)

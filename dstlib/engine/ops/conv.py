"""Convolution with sparse kernels on depth-last maps, and the unit made of it: shift → convolution → norm → activation.

Shapes: N batch, C input channels over all sources, O output channels, D, H, W depth, height, width, (kh, kw) kernel,
A active kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.grad import conv3d_input, conv3d_weight

from dstlib.engine.ops.feature_map import (
    FeatureMap,
    Five,
    Layout,
    depth_last,
    empty_depth_last,
    flat,
    pattern_of,
    source,
    source_like,
    target,
    target_like,
    unflat,
)
from dstlib.engine.ops.instance_norm import instance_norm_backward
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Implementation, Operator, Tensors, by_kernel, by_torch
from dstlib.engine.ops.prepared import MapProblem, Places, PreparedCall, by_prepared, run_prepared, state_of
from dstlib.engine.ops.weights import Weights
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check
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


@dataclass(frozen=True)
class ConvProblem(MapProblem):
    """A convolution of tensors: maps, weight, bias, gamma and beta, scales and offsets, pattern, shifts.

    Bias, gamma and beta (of the norm that follows) and the scale and offset of each map are there where the problem
    says so.
    """

    stride: tuple[int, ...]
    normed: tuple[bool, ...]  # which maps have a norm to apply
    slopes: tuple[float, ...]  # of each map
    has_bias: bool
    is_unit: bool = False  # whether a norm follows
    eps: float = 0.0  # of that norm
    slope: float = 1.0  # behind it

    def maps(self, tensors: Tensors) -> list[FeatureMap]:
        """Returns the maps."""
        num = len(self.normed)
        first = num + 1 + self.has_bias + 2 * self.is_unit
        return unflat(tensors[:num], tensors[first:], self.normed, self.slopes)

    def weight(self, tensors: Tensors) -> Tensor:
        """Returns the weight."""
        return tensors[len(self.normed)]

    def bias(self, tensors: Tensors) -> Tensor | None:
        """Returns the bias."""
        return tensors[len(self.normed) + 1] if self.has_bias else None

    def affine(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Returns gamma and beta of the norm that follows."""
        first = len(self.normed) + 1 + self.has_bias
        return tensors[first], tensors[first + 1]

    def patterns(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Returns row_ptr, col_idx and index of the active kernels, of these transposed, and of the graded ones."""
        first = self.num_tensors - NUM_PATTERN - 1
        active, transposed, graded = (tensors[i : i + 3] for i in range(first, first + NUM_PATTERN, 3))
        return active, transposed, graded

    def shifts(self, tensors: Tensors) -> Tensor:
        """Returns the shift of each input channel."""
        return tensors[self.num_tensors - 1]

    @property
    def num_tensors(self) -> int:
        """How many tensors there are, of which a backward direction has the gradient besides."""
        return len(self.normed) + 1 + self.has_bias + 2 * self.is_unit + 2 * sum(self.normed) + NUM_PATTERN + 1

    def reads(self, tensors: Tensors) -> Tensors:
        """Returns the tensors that have to be of float32 for the kernels, among them a gradient behind the others."""
        return [*tensors[: len(self.normed) + 1 + self.has_bias], *tensors[self.num_tensors :]]

    def output_size(self, tensors: Tensors) -> Five:
        """Returns (N, O, D / d, H / h, W / w), rounded up."""
        batch, _, *size = tensors[0].shape
        depth, height, width = (-(-n // step) for n, step in zip(size, self.stride, strict=True))
        return batch, self.weight(tensors).shape[0], depth, height, width

    def input_size(self, tensors: Tensors) -> Five:
        """Returns (N, C, D, H, W) of the concatenated maps."""
        batch, _, depth, height, width = tensors[0].shape
        return batch, self.weight(tensors).shape[1], depth, height, width


def conv(sources: Sequence[FeatureMap], weights: Weights, geometry: Geometry) -> FeatureMap:
    """Computes the convolution of the concatenated, activated sources: (N, O, D / d, H / h, W / w), rounded up.

    Gradients are those of the activated sources; the weight's has zeros where no kernel is graded.

    >>> from dstlib.engine.ops.patterns import Pattern
    >>> full = Pattern.of(torch.ones(1, 1, dtype=torch.bool))
    >>> moved = Geometry(torch.ones(1, dtype=torch.int32))  # depth 1 reads depth 0
    >>> x = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1, 1)
    >>> conv([FeatureMap(x)], Weights(torch.ones(1, 1, 1, 1, 1), None, full, full), moved).raw.flatten()
    tensor([0., 1.])
    """
    state = state_of([x.tensor for x in sources], [weights.weight], [weights.bias])
    prepare = lambda: CONV.prepare(*stated(sources, weights, geometry))  # noqa: E731
    found = run_prepared(weights.calls, state, sources, prepare)
    return found or FeatureMap(CONV(*stated(sources, weights, geometry))[0])


def unit(
    sources: Sequence[FeatureMap], weights: Weights, geometry: Geometry, affine: Affine, slope: float
) -> FeatureMap:
    """Computes the convolution; the affine instance norm and max(y, slope · y) after it are what its readers apply.

    ``affine`` is gamma (O), beta (O) and eps. The gradient of the result is that of the activated map.
    """
    state = state_of([x.tensor for x in sources], [weights.weight], [weights.bias, *affine[:2]])
    prepare = lambda: CONV.prepare(*stated(sources, weights, geometry, affine, slope))  # noqa: E731
    found = run_prepared(weights.calls, state and (*state, affine[2], slope), sources, prepare)
    if found:
        return found
    y, statistics = CONV(*stated(sources, weights, geometry, affine, slope))
    return FeatureMap(y, (statistics[0], statistics[1], slope))


def stated(
    sources: Sequence[FeatureMap],
    weights: Weights,
    geometry: Geometry,
    affine: Affine | None = None,
    slope: float = 1.0,
) -> tuple[ConvProblem, list[Tensor]]:
    """Returns a convolution, or a unit, as its operators take it."""
    norms, normed, slopes = flat(sources)
    bias = [] if weights.bias is None else [weights.bias]
    patterns = (weights.active, weights.active.transposed, weights.graded)
    tensors = [*(x.raw for x in sources), weights.weight, *bias, *(affine[:2] if affine else []), *norms]
    tensors += [tensor for pattern in patterns for tensor in pattern.tensors]
    is_unit, eps = affine is not None, affine[2] if affine else 0.0
    problem = ConvProblem(geometry.stride, normed, slopes, bool(bias), is_unit, eps, slope)
    return problem, [*tensors, geometry.shifts]


def pack_weights(found: Kernels, weight: Tensor, index: Tensor, form: int, *, reflected: bool = False) -> Tensor:
    """Returns the active kernels of a weight as a form reads them: (A · 36) for Winograd's, or (A · kh · kw)."""
    weight = weight.detach().contiguous()
    taps = weight.shape[-2] * weight.shape[-1]
    out = weight.new_empty(index.numel() * (36 if form == FORM_WINOGRAD else taps))
    job = structs.PackWeights(weight.data_ptr(), index.data_ptr(), out.data_ptr(), index.numel(), taps, form, reflected)
    check(found.conv_pack_weights(job, torch.get_num_threads()), "pack_weights()")
    return out


def _suits_winograd(problem: ConvProblem, tensors: Tensors) -> bool:
    """Tells whether Winograd's transform fits, and was measured faster.

    Of a plane of 2 x 2 most taps see nothing but zeros, and the transformed kernels are four times as much to read:
    there the direct form was measured 1.2 to 5 times as fast, at 3 x 3 half as fast for sparse kernels.
    """
    height, width = tensors[0].shape[3:]
    fits = tuple(problem.weight(tensors).shape[-2:]) == (3, 3) and problem.stride == (1, 1, 1)
    return fits and height * width > 4


def _kernel(found: Kernels, form: int) -> Callable[..., int]:
    return found.conv_winograd if form == FORM_WINOGRAD else found.conv_direct


def _forward(name: str, form: int, accepts: Accepts) -> Implementation[ConvProblem]:
    """Returns the forward direction in a form."""

    def prepare(found: Kernels, problem: ConvProblem, maps: list[FeatureMap], tensors: Tensors) -> PreparedCall:
        weight, bias, ((row_ptr, col_idx, index), *_) = (
            problem.weight(tensors),
            problem.bias(tensors),
            problem.patterns(tensors),
        )
        layouts = [x.layout for x in maps if x.layout]
        size = problem.output_size(tensors)
        out = Layout.of(size, depth_last(size)[1], problem.slope if problem.is_unit else None)
        packed, shifts = pack_weights(found, weight, index, form), problem.shifts(tensors)
        job = structs.Conv(out=target_like(out), pattern=pattern_of(row_ptr, col_idx, weight.shape[1]))
        job.weights, job.shifts = packed.data_ptr(), shifts.data_ptr()
        for i, layout in enumerate(layouts):
            job.sources[i] = source_like(layout)
        _set_sizes(job, layouts[0].size, size, weight, problem.stride)
        if bias is not None:
            job.bias = bias.data_ptr()
        affine = problem.affine(tensors) if problem.is_unit else ()
        if affine:
            job.norm = structs.InstanceNorm(affine[0].data_ptr(), affine[1].data_ptr(), problem.eps)
        places = Places(job.sources[: len(maps)], job.out, job.norm if affine else None)
        alive = (packed, bias, *affine, row_ptr, col_idx, shifts)  # no map, and no norm of one
        return PreparedCall("convolution", _kernel(found, form), job, places, out, alive)

    return by_prepared(name, prepare, accepts, reads=ConvProblem.reads)


def _forward_with_torch(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    weight = problem.weight(tensors)
    y = empty_depth_last(problem.output_size(tensors), tensors[0])
    active = _active(problem, tensors)
    y.copy_(F.conv3d(_input(problem, tensors), active, problem.bias(tensors), problem.stride, _padding(weight)))
    return [y, _statistics(y, *problem.affine(tensors), problem.eps)] if problem.is_unit else [y]


def _statistics(y: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Returns scale, offset, mean and 1 / √(variance + eps), (4, N, O)."""
    double = y.double()
    mean = double.mean((2, 3, 4))
    rstd = (double.var((2, 3, 4), correction=0) + eps).rsqrt()
    scale = gamma * rstd
    return torch.stack([scale, beta - scale * mean, mean, rstd]).to(y.dtype)


def _backward_input(name: str, form: int, accepts: Accepts) -> Implementation[ConvProblem]:
    """Returns the gradient (N, C, D, H, W) of the concatenated, activated maps, in a form.

    It is a convolution with the transposed, reflected kernels.
    """

    def run(found: Kernels, problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
        grad, weight, size = to_depth_last(tensors[-1]), problem.weight(tensors), problem.input_size(tensors)
        row_ptr, col_idx, index = problem.patterns(tensors)[1]
        packed = pack_weights(found, weight, index, form, reflected=True)
        out = empty_depth_last(size, grad)
        still, back = torch.zeros(grad.shape[1], dtype=torch.int32), -problem.shifts(tensors)
        job = structs.Conv(
            out=target(out),
            pattern=pattern_of(row_ptr, col_idx, grad.shape[1]),
            weights=packed.data_ptr(),
            shifts=still.data_ptr(),
            out_shifts=back.data_ptr(),
        )
        job.sources[0] = source(grad)
        _set_sizes(job, grad.shape, size, weight, problem.stride)
        check(_kernel(found, form)(job, torch.get_num_threads()), "convolution")
        return [out]

    return by_kernel(name, run, accepts, reads=ConvProblem.reads)


def _backward_input_with_torch(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    weight, size = problem.weight(tensors), problem.input_size(tensors)
    strided = conv3d_input(size, _active(problem, tensors), tensors[-1], problem.stride, _padding(weight))
    return [shifted(strided, -problem.shifts(tensors))]


def _backward_weights(found: Kernels, problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    """Computes the gradients of weight and, where there is one, bias; the weight's with zeros where none is graded."""
    grad, weight, bias = to_depth_last(tensors[-1]), problem.weight(tensors), problem.bias(tensors)
    row_ptr, col_idx, index = problem.patterns(tensors)[2]
    grads = [torch.zeros_like(weight, memory_format=torch.contiguous_format)]
    maps = [(to_depth_last(x.raw), x.norm) for x in problem.maps(tensors)]
    job = structs.Conv(out=target(grad), pattern=pattern_of(row_ptr, col_idx, weight.shape[1]))
    for i, (x, norm) in enumerate(maps):
        job.sources[i] = source(x, norm)
    shifts = problem.shifts(tensors)
    job.shifts, job.index, job.weights_grad = shifts.data_ptr(), index.data_ptr(), grads[0].data_ptr()
    _set_sizes(job, maps[0][0].shape, grad.shape, weight, problem.stride)
    if bias is not None:
        grads.append(torch.empty_like(bias))
        job.bias_grad = grads[1].data_ptr()
    check(found.conv_backward_weights(job, torch.get_num_threads()), "gradient of a convolution's weights")
    return grads


def _backward_weights_with_torch(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    weight, grad = problem.weight(tensors), tensors[-1]
    five, padding = _five(weight).shape, _padding(weight)
    dense = conv3d_weight(_input(problem, tensors), five, grad, problem.stride, padding)
    found = torch.where(_mask(problem.patterns(tensors)[2], weight), dense.reshape(weight.shape), 0)
    return [found, grad.sum((0, 2, 3, 4))] if problem.has_bias else [found]


def _set_sizes(job: structs.Conv, x: Sequence[int], y: Sequence[int], weight: Tensor, stride: Sequence[int]) -> None:
    """Sets the sizes of a convolution from maps of size x to those of size y, both (N, C, D, H, W)."""
    height, width = weight.shape[-2:]
    job.input_size, job.output_size = (x[0], *x[2:]), tuple(y[2:])
    job.kernel_size, job.padding = (height, width), (height // 2, width // 2)
    job.stride = tuple(stride)


def shifted(x: Tensor, shifts: Tensor) -> Tensor:
    """Moves each channel along depth by its own number of voxels, zeros flowing in: with torch alone.

    Returns the map itself where no channel moves.
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


def _input(problem: ConvProblem, tensors: Tensors) -> Tensor:
    """Returns what the convolution sees: the maps activated, concatenated and shifted."""
    return shifted(torch.cat([x.activated() for x in problem.maps(tensors)], dim=1), problem.shifts(tensors))


def _active(problem: ConvProblem, tensors: Tensors) -> Tensor:
    """Returns the weight (O, C, 1, kh, kw) with zeros where no kernel is active."""
    weight = problem.weight(tensors)
    return _five(torch.where(_mask(problem.patterns(tensors)[0], weight), weight, 0))


def _five(weight: Tensor) -> Tensor:
    return weight.reshape(*weight.shape[:2], 1, *weight.shape[-2:])


def _padding(weight: Tensor) -> Triple:
    return 0, weight.shape[-2] // 2, weight.shape[-1] // 2


def _mask(pattern: Tensors, weight: Tensor) -> Tensor:
    """Returns which kernels a pattern has, (O, C, 1, ...)."""
    mask = torch.zeros(weight.shape[:2].numel(), dtype=torch.bool, device=weight.device)
    mask[pattern[2]] = True
    return mask.reshape(*weight.shape[:2], *(1,) * (weight.ndim - 2))


def _empty(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    y = empty_depth_last(problem.output_size(tensors), tensors[0])
    return [y, y.new_empty(4, *y.shape[:2])] if problem.is_unit else [y]


def _empty_parameters(problem: ConvProblem, tensors: Tensors) -> list[Tensor]:
    first = len(problem.normed)
    return [torch.empty_like(x) for x in tensors[first : first + 1 + problem.has_bias]]


def _keep(problem: ConvProblem, tensors: Tensors, outputs: Tensors) -> list[Tensor]:
    return [*tensors, *(outputs if problem.is_unit else [])]


def _backward(problem: ConvProblem, kept: Tensors, grads: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * problem.num_tensors
    num, tensors, grad = len(problem.normed), kept[: problem.num_tensors], grads[0]
    num_parameters = 1 + problem.has_bias
    if problem.is_unit:
        y, statistics = kept[problem.num_tensors :]
        scale, offset, mean, rstd = statistics.unbind()
        gamma, _ = problem.affine(tensors)
        normed = FeatureMap(y, (scale, offset, problem.slope))
        grad, dgamma, dbeta = instance_norm_backward(normed, grad, mean, rstd, gamma)
        found[num + num_parameters : num + num_parameters + 2] = dgamma, dbeta
    if any(wanted[:num]):
        joined = CONV_BACKWARD_INPUT(problem, [*tensors, grad])[0]
        found[:num] = joined.split([x.shape[1] for x in tensors[:num]], dim=1)
    if any(wanted[num : num + num_parameters]):
        found[num : num + num_parameters] = CONV_BACKWARD_WEIGHTS(problem, [*tensors, grad])
    return found


def _always(problem: ConvProblem, tensors: Tensors) -> bool:
    return True


def _unstrided(problem: ConvProblem, tensors: Tensors) -> bool:
    """Tells whether the gradient of the input is a convolution again; with a stride torch computes it."""
    return problem.stride == (1, 1, 1)


CONV_BACKWARD_INPUT = Operator(
    "conv_backward_input",
    ConvProblem,
    (
        _backward_input("winograd", FORM_WINOGRAD, _suits_winograd),
        _backward_input("direct", FORM_DIRECT, _unstrided),
        by_torch(_backward_input_with_torch),
    ),
    fake=lambda problem, tensors: [empty_depth_last(problem.input_size(tensors), tensors[-1])],
)
CONV_BACKWARD_WEIGHTS = Operator(
    "conv_backward_weights",
    ConvProblem,
    (by_kernel("direct", _backward_weights, reads=ConvProblem.reads), by_torch(_backward_weights_with_torch)),
    fake=_empty_parameters,
)
CONV = Operator(
    "conv",
    ConvProblem,
    (
        _forward("winograd", FORM_WINOGRAD, _suits_winograd),
        _forward("direct", FORM_DIRECT, _always),
        by_torch(_forward_with_torch),
    ),
    fake=_empty,
    backward=_backward,
    keep=_keep,
)

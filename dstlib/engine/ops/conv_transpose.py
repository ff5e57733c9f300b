"""Transposed convolution whose kernel is its stride, with sparse kernels, on depth-last maps.

Shapes: N batch, C input channels, O output channels, D, H, W depth, height, width of the input, d, h, w the stride.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.feature_map import (
    FeatureMap,
    MapProblem,
    empty_depth_last,
    empty_gradient,
    flat,
    pattern_of,
    source,
    target,
)
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, Tensors, by_kernel, by_torch
from dstlib.engine.ops.patterns import Weights
from dstlib.engine.ops.prepared import Places, PreparedCall, by_prepared, run, state_of
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.memory import zeros

NUM_PATTERN = 4  # tensors: row_ptr and col_idx of the active kernels, then of the graded ones


@dataclass(frozen=True)
class ConvTransposeProblem(MapProblem):
    """A transposed convolution of one map; its weight, row_ptr and col_idx of active and of graded kernels follow."""

    name = "conv_transpose"
    stride: tuple[int, ...]

    def check(self, tensors: Tensors) -> None:
        """Refuses a map that does not fit the weight, and a weight that does not fit the stride and the pattern.

        Raises:
            InputError: They do not.
        """
        super().check(tensors)
        _, (weight, row_ptr, *_) = self.split(tensors)
        if weight.shape[0] != tensors[0].shape[1]:
            raise self.refusal("map", f"{weight.shape[0]} channels", f"{tuple(tensors[0].shape)}")
        expected = (weight.shape[0], len(row_ptr) - 1, *self.stride)
        if weight.shape != expected:
            raise self.refusal("weight", f"{expected}, by channels, pattern and stride", f"{tuple(weight.shape)}")

    def in_one_type(self, tensors: Tensors) -> Tensors:
        """Returns the tensors with their map in the type of the weight."""
        return self.in_type_of(self.split(tensors)[1][0], tensors)


def conv_transpose(x: FeatureMap, weights: Weights, stride: tuple[int, int, int]) -> FeatureMap:
    """Computes the transposed convolution of the activated map (N, C, D, H, W): (N, O, D · d, H · h, W · w).

    The weight (C, O, d, h, w) is that of an ``nn.ConvTranspose3d`` with this stride, without bias; only its active
    kernels are read. Its gradient has zeros where no kernel is graded; that of x is of the activated map.

    Raises:
        InputError: The norm, or the weight, is not of the shape that the map, the pattern and the stride ask for.

    >>> from dstlib.engine.ops.patterns import Pattern
    >>> one = Pattern.of(torch.tensor([[True, False]]))  # the second input is not read
    >>> x, weight = torch.tensor([2.0, 5.0]).reshape(1, 2, 1, 1, 1), torch.ones(2, 1, 1, 2, 2)
    >>> conv_transpose(FeatureMap(x), Weights(weight, None, one, one), (1, 2, 2)).raw.flatten()
    tensor([2., 2., 2., 2.])
    """
    state = state_of([x.tensor], [weights.weight])
    return run(CONV_TRANSPOSE, weights.calls, state, [x], lambda: _stated(x, weights, stride))


def _stated(x: FeatureMap, weights: Weights, stride: tuple[int, int, int]) -> tuple[ConvTransposeProblem, list[Tensor]]:
    tensors, normed, slopes = flat([x])
    return ConvTransposeProblem(normed, slopes, stride), [*tensors, *parameters_of(weights)]


def parameters_of(weights: Weights) -> list[Tensor]:
    """Returns what the operators take besides a map: the weight, and row_ptr and col_idx of its patterns."""
    return [weights.weight, *weights.active.tensors[:2], *weights.graded.tensors[:2]]


def _prepare(found: Kernels, problem: ConvTransposeProblem, maps: list[FeatureMap], tensors: Tensors) -> PreparedCall:
    (x,), (_, (weight, row_ptr, col_idx, *_)) = maps, problem.split(tensors)
    weight = weight.detach().contiguous()
    job = _job(x.raw, weight, row_ptr, col_idx)
    job.input, job.weights = source(x.raw, x.norm), weight.data_ptr()
    alive, places = (weight, row_ptr, col_idx), Places([job.input], job.out, _output_size(x.raw, weight))
    return PreparedCall("conv_transpose()", found.conv_transpose_forward, job, places, alive)


def _with_torch(problem: ConvTransposeProblem, tensors: Tensors) -> list[Tensor]:
    (x,), (weight, row_ptr, col_idx, *_) = problem.split(tensors)
    y = F.conv_transpose3d(x.activated(), _active(weight, row_ptr, col_idx), stride=tuple(weight.shape[2:]))
    return [empty_depth_last(y.shape, y).copy_(y)]


def plain_conv_transpose(problem: ConvTransposeProblem, tensors: Tensors) -> Tensor:
    """Computes the transposed convolution by torch's operations; what is not graded is zero."""
    (x,), (_, (weight, _, _, *graded)) = problem.values(tensors), problem.split(tensors)
    return F.conv_transpose3d(x, _active(weight, *graded), stride=problem.stride)


def _backward_input(found: Kernels, problem: ConvTransposeProblem, tensors: Tensors) -> list[Tensor]:
    """Computes the gradient (N, C, D, H, W) of the activated map."""
    _, (weight, row_ptr, col_idx, *_, grad) = problem.split(tensors)
    grad, weight, out = to_depth_last(grad), weight.contiguous(), empty_gradient(tensors[0].shape, grad)
    job = _job(out, weight, row_ptr, col_idx)
    job.grad, job.out, job.weights = source(grad), target(out), weight.data_ptr()
    check(found.conv_transpose_backward_input(job, torch.get_num_threads()), "gradient of conv_transpose()")
    return [out]


def _backward_input_with_torch(problem: ConvTransposeProblem, tensors: Tensors) -> list[Tensor]:
    _, (weight, row_ptr, col_idx, *_, grad) = problem.split(tensors)
    found = F.conv3d(grad, _active(weight, row_ptr, col_idx), stride=tuple(weight.shape[2:]))
    return [empty_gradient(tensors[0].shape, tensors[0]).copy_(found)]


def _backward_weights(found: Kernels, problem: ConvTransposeProblem, tensors: Tensors) -> list[Tensor]:
    """Computes the gradient (C, O, d, h, w) of the weight, zeros where no kernel is graded."""
    (x,), (weight, _, _, row_ptr, col_idx, grad) = problem.split(tensors)
    raw, grad, out = to_depth_last(x.raw), to_depth_last(grad), zeros(weight.shape)
    job = _job(raw, out, row_ptr, col_idx)
    job.input, job.grad, job.weights_grad = source(raw, x.norm), source(grad), out.data_ptr()
    check(found.conv_transpose_backward_weights(job, torch.get_num_threads()), "gradient of conv_transpose()")
    return [out]


def _backward_weights_with_torch(problem: ConvTransposeProblem, tensors: Tensors) -> list[Tensor]:
    (x,), (weight, _, _, row_ptr, col_idx, grad) = problem.split(tensors)
    steps = [n for pair in zip(x.raw.shape[2:], weight.shape[2:], strict=True) for n in pair]
    found = torch.einsum("ncdhw,nodihjwk->coijk", x.activated(), grad.reshape(*grad.shape[:2], *steps))
    return [weight.new_zeros(weight.shape).copy_(_active(found, row_ptr, col_idx))]


def _job(x: Tensor, weight: Tensor, row_ptr: Tensor, col_idx: Tensor) -> structs.ConvTranspose:
    """Describes what all kernels are told: sizes, and where the kernels of a weight, or of its gradient, lie."""
    return structs.ConvTranspose(
        pattern=pattern_of(row_ptr, col_idx, x.shape[1]),
        weight_strides=(weight.stride(1), weight.stride(0)),
        size=(len(x), *x.shape[2:]),
        stride=tuple(weight.shape[2:]),
    )


def _active(weight: Tensor, row_ptr: Tensor, col_idx: Tensor) -> Tensor:
    """Returns the weight (C, O, d, h, w) with zeros where no kernel is active."""
    outputs = torch.arange(len(row_ptr) - 1, device=row_ptr.device).repeat_interleave(row_ptr.diff())
    mask_CO = torch.zeros(weight.shape[:2], dtype=torch.bool, device=row_ptr.device)
    mask_CO[col_idx, outputs] = True
    return torch.where(mask_CO[:, :, None, None, None], weight, 0)


def _output_size(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    finer = (extent * step for extent, step in zip(x.shape[2:], weight.shape[2:], strict=True))
    return x.shape[0], weight.shape[1], *finer


def _empty(problem: ConvTransposeProblem, tensors: Tensors) -> list[Tensor]:
    (x,), (weight, *_) = problem.split(tensors)
    return [empty_depth_last(_output_size(x.raw, weight), x.raw)]


def _read_backward(problem: ConvTransposeProblem, tensors: Tensors) -> Tensors:
    return [*tensors[: -NUM_PATTERN - 1], tensors[-1]]


def _backward(
    problem: ConvTransposeProblem, kept: list[Tensor], grads: Tensors, wanted: Sequence[bool]
) -> list[Tensor | None]:
    given, position = [*kept, grads[0]], len(kept) - NUM_PATTERN - 1
    grad_x = CONV_TRANSPOSE_BACKWARD_INPUT(problem, given)[0] if wanted[0] else None
    grad_weight = CONV_TRANSPOSE_BACKWARD_WEIGHTS(problem, given)[0] if wanted[position] else None
    return [grad_x, *[None] * (position - 1), grad_weight]


CONV_TRANSPOSE_BACKWARD_INPUT = Operator(
    "conv_transpose_backward_input",
    ConvTransposeProblem,
    (by_kernel("direct", _backward_input, reads=_read_backward), by_torch(_backward_input_with_torch)),
    fake=lambda problem, tensors: [empty_gradient(tensors[0].shape, tensors[0])],
)
CONV_TRANSPOSE_BACKWARD_WEIGHTS = Operator(
    "conv_transpose_backward_weights",
    ConvTransposeProblem,
    (by_kernel("direct", _backward_weights, reads=_read_backward), by_torch(_backward_weights_with_torch)),
    fake=lambda problem, tensors: [tensors[0].new_empty(tensors[-NUM_PATTERN - 2].shape)],
)
CONV_TRANSPOSE = Operator(
    "conv_transpose",
    ConvTransposeProblem,
    (by_prepared("direct", _prepare, reads=lambda problem, tensors: tensors[:-NUM_PATTERN]), by_torch(_with_torch)),
    fake=_empty,
    backward=_backward,
    keep=lambda problem, tensors, outputs: list(tensors),
    plain=plain_conv_transpose,
)

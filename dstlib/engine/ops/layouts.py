"""Maps written anew: in another order of memory, or with norm and activation applied.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.engine.ops.feature_map import FeatureMap, activated, empty_depth_last, flat, source, target
from dstlib.engine.ops.operator import Operator, Problem, Tensors, by_kernel, by_torch
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.memory import buffer
from dstlib.engine.runtime.structs import Activation, Reorder


@dataclass(frozen=True)
class LayoutProblem(Problem):
    """A map written in another order; there is but one way to."""


@dataclass(frozen=True)
class ActivationProblem(Problem):
    """A map, its scale and its offset, written with the norm and a leaky ReLU of this slope applied."""

    slope: float


def to_depth_last(x: Tensor) -> Tensor:
    """Returns the same map (N, C, D, H, W) with depths side by side in memory; x itself where they are.

    >>> to_depth_last(torch.zeros(1, 2, 3, 4, 5)).stride()
    (120, 60, 1, 15, 3)
    """
    if x.stride(2) == 1 or x.shape[2] == 1:
        return x
    return TO_DEPTH_LAST(LayoutProblem(), [x])[0]


def to_channels_first(x: Tensor) -> Tensor:
    """Returns the same map (N, C, D, H, W) in torch's default order of memory; x itself where it is.

    >>> to_channels_first(to_depth_last(torch.zeros(1, 2, 3, 4, 5))).is_contiguous()
    True
    """
    if x.is_contiguous():
        return x
    return TO_CHANNELS_FIRST(LayoutProblem(), [x])[0]


def materialise(x: FeatureMap) -> Tensor:
    """Writes out what readers of a map see, depth last; for autograd the map's value itself.

    >>> x = torch.tensor([-2.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> materialise(FeatureMap(x, (torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5))).flatten()
    tensor([-1.5000,  3.0000])
    """
    tensors, (is_normed,), (slope,) = flat([x])
    return ACTIVATION(ActivationProblem(slope), tensors)[0] if is_normed else to_depth_last(x.raw)


def _to_depth_last(found: Kernels, problem: LayoutProblem, tensors: Tensors) -> list[Tensor]:
    x, out = tensors[0], empty_depth_last(tensors[0].shape, tensors[0])
    check(found.reorder_to_depth_last(_reorder(x, out), torch.get_num_threads()), "to_depth_last()")
    return [out]


def _to_channels_first(found: Kernels, problem: LayoutProblem, tensors: Tensors) -> list[Tensor]:
    x, out = tensors[0], buffer(tensors[0].numel()).view(tensors[0].shape)
    check(found.reorder_to_channels_first(_reorder(x, out), torch.get_num_threads()), "to_channels_first()")
    return [out]


def _activation(found: Kernels, problem: ActivationProblem, tensors: Tensors) -> list[Tensor]:
    raw, scale, offset = tensors
    x = to_depth_last(raw)
    out = empty_depth_last(x.shape, x)
    call = Activation(source(x, (scale, offset, problem.slope)), target(out), (len(x), *x.shape[2:]))
    check(found.activation_forward(call, torch.get_num_threads()), "materialise()")
    return [out]


def _reorder(x: Tensor, out: Tensor) -> Reorder:
    return Reorder(x.data_ptr(), out.data_ptr(), x.stride(), out.stride(), tuple(x.shape))


def _depth_last(problem: Problem, tensors: Tensors) -> list[Tensor]:
    return [empty_depth_last(tensors[0].shape, tensors[0])]


def _channels_first(problem: Problem, tensors: Tensors) -> list[Tensor]:
    return [torch.empty_like(tensors[0], memory_format=torch.contiguous_format)]


def _pass_on(problem: Problem, kept: Tensors, grads: Tensors, wanted: object) -> list[Tensor]:
    return list(grads)


TO_DEPTH_LAST = Operator(
    "to_depth_last",
    LayoutProblem,
    (
        by_kernel("reorder", _to_depth_last, accepts=lambda problem, x: x[0].stride(4) == 1),
        by_torch(lambda problem, x: [_depth_last(problem, x)[0].copy_(x[0])]),
    ),
    _depth_last,
    _pass_on,
)
TO_CHANNELS_FIRST = Operator(
    "to_channels_first",
    LayoutProblem,
    (
        by_kernel("reorder", _to_channels_first, accepts=lambda problem, x: x[0].stride(2) == 1),
        by_torch(lambda problem, x: [_channels_first(problem, x)[0].copy_(x[0])]),
    ),
    _channels_first,
    _pass_on,
)
ACTIVATION = Operator(
    "activation",
    ActivationProblem,
    (
        by_kernel("direct", _activation),
        by_torch(lambda problem, x: [_depth_last(problem, x)[0].copy_(activated(x[0], (x[1], x[2], problem.slope)))]),
    ),
    _depth_last,
    _pass_on,
)

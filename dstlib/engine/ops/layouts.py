"""Maps written anew: in another order of memory, or with norm and activation applied.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.engine.ops.feature_map import FeatureMap, MapProblem, activated, empty_depth_last, flat, source, target
from dstlib.engine.ops.operator import Operator, Problem, Tensors, by_kernel, by_torch
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.memory import buffer
from dstlib.engine.runtime.structs import Activation, Reorder


@dataclass(frozen=True)
class LayoutProblem(MapProblem):
    """A map written in another order; there is but one way to."""

    name = "to_depth_last"
    normed: tuple[bool, ...] = (False,)
    slopes: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class ActivationProblem(MapProblem):
    """A map, its scale and its offset, written with the norm and a leaky ReLU of this slope applied."""

    name = "materialise"


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


def to_images(x: Tensor) -> Tensor:
    """Returns the depths of one sample (1, C, N, H, W) as images (N, C, H, W), in torch's default order of memory.

    >>> to_images(to_depth_last(torch.zeros(1, 2, 3, 4, 5))).stride()
    (40, 20, 5, 1)
    """
    if x.shape[2] == 1 and x.is_contiguous():
        return x.squeeze(2)
    return TO_IMAGES(LayoutProblem(), [x])[0]


def materialise(x: FeatureMap) -> Tensor:
    """Writes out what readers of a map see, depth last; for autograd the map's value itself.

    >>> x = torch.tensor([-2.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> materialise(FeatureMap(x, (torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5))).flatten()
    tensor([-1.5000,  3.0000])
    """
    tensors, normed, slopes = flat([x])
    return ACTIVATION(ActivationProblem(normed, slopes), tensors)[0] if any(normed) else to_depth_last(x.raw)


def written_out(x: FeatureMap) -> Tensor:
    """Writes out what readers of a map see in torch's default order, for a new tensor that nobody records.

    >>> x = torch.tensor([-2.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> written_out(FeatureMap(x, (torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5))).is_contiguous()
    True
    """
    with torch.no_grad(), torch._C._DisableFuncTorch():
        tensors, normed, slopes = flat([x])
        y = ACTIVATION.compute(ActivationProblem(normed, slopes), tensors)[0] if any(normed) else x.raw
        return TO_CHANNELS_FIRST.compute(LayoutProblem(), [y])[0]


def _to_depth_last(found: Kernels, problem: LayoutProblem, tensors: Tensors) -> list[Tensor]:
    x, out = tensors[0], empty_depth_last(tensors[0].shape, tensors[0])
    check(found.reorder_to_depth_last(_reorder(x, out), torch.get_num_threads()), "to_depth_last()")
    return [out]


def _to_channels_first(found: Kernels, problem: LayoutProblem, tensors: Tensors) -> list[Tensor]:
    x, out = tensors[0], buffer(tensors[0].numel()).resize_(tensors[0].shape)  # itself, no view: see placed()
    check(found.reorder_to_channels_first(_reorder(x, out), torch.get_num_threads()), "to_channels_first()")
    return [out]


def _to_images(found: Kernels, problem: LayoutProblem, tensors: Tensors) -> list[Tensor]:
    (x,) = tensors
    out = buffer(x.numel()).resize_(_images(x).shape)
    check(found.reorder_to_channels_first(_reorder(x, _volume(out)), torch.get_num_threads()), "to_images()")
    return [out]


def _images(x: Tensor) -> Tensor:
    return x.squeeze(0).transpose(0, 1)


def _volume(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def _activation(found: Kernels, problem: ActivationProblem, tensors: Tensors) -> list[Tensor]:
    raw, scale, offset = tensors
    x = to_depth_last(raw)
    out = empty_depth_last(x.shape, x)
    call = Activation(source(x, (scale, offset, problem.slopes[0])), target(out), (len(x), *x.shape[2:]))
    check(found.activation_forward(call, torch.get_num_threads()), "materialise()")
    return [out]


def _activation_with_torch(problem: ActivationProblem, tensors: Tensors) -> list[Tensor]:
    (raw, scale, offset), (slope,) = tensors, problem.slopes
    return [_depth_last(problem, tensors)[0].copy_(activated(raw, (scale, offset, slope)))]


def _reorder(x: Tensor, out: Tensor) -> Reorder:
    return Reorder(x.data_ptr(), out.data_ptr(), x.stride(), out.stride(), tuple(x.shape))


def _depth_last(problem: Problem, tensors: Tensors) -> list[Tensor]:
    return [empty_depth_last(tensors[0].shape, tensors[0])]


def _channels_first(problem: Problem, tensors: Tensors) -> list[Tensor]:
    return [torch.empty_like(tensors[0], memory_format=torch.contiguous_format)]


def _back_to_depth_last(problem: Problem, kept: list[Tensor], grads: Tensors, wanted: object) -> list[Tensor]:
    return [to_depth_last(grads[0])]


def _back_to_channels_first(problem: Problem, kept: list[Tensor], grads: Tensors, wanted: object) -> list[Tensor]:
    return [to_channels_first(grads[0])]


TO_DEPTH_LAST = Operator(
    "to_depth_last",
    LayoutProblem,
    (
        by_kernel("reorder", _to_depth_last, accepts=lambda problem, x: x[0].stride(4) == 1),
        by_torch(lambda problem, x: [_depth_last(problem, x)[0].copy_(x[0])]),
    ),
    _depth_last,
    _back_to_channels_first,
    plain=lambda problem, x: x[0],
)
TO_CHANNELS_FIRST = Operator(
    "to_channels_first",
    LayoutProblem,
    (
        by_kernel("reorder", _to_channels_first, accepts=lambda problem, x: x[0].stride(2) == 1),
        by_torch(lambda problem, x: [_channels_first(problem, x)[0].copy_(x[0])]),
    ),
    _channels_first,
    _back_to_depth_last,
    plain=lambda problem, x: x[0].contiguous(),
)
TO_IMAGES = Operator(
    "to_images",
    LayoutProblem,
    (
        by_kernel("reorder", _to_images, accepts=lambda problem, x: x[0].stride(2) == 1),
        by_torch(lambda problem, x: [_images(x[0]).contiguous()]),
    ),
    lambda problem, x: [x[0].new_empty(_images(x[0]).shape)],
    lambda problem, kept, grads, wanted: [to_depth_last(_volume(grads[0]))],
    plain=lambda problem, x: _images(x[0]).contiguous(),
)
ACTIVATION = Operator(
    "activation",
    ActivationProblem,
    (
        by_kernel("direct", _activation),
        by_torch(_activation_with_torch),
    ),
    _depth_last,
    _back_to_depth_last,
    plain=lambda problem, x: problem.values(x)[0],
)

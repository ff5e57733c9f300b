"""Gradient of an instance norm and the leaky ReLU behind it, on depth-last maps.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.engine.ops.feature_map import FeatureMap, empty_depth_last, source, target
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, Problem, Tensors, by_kernel, by_torch
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check


@dataclass(frozen=True)
class InstanceNormProblem(Problem):
    """The slope behind a norm of y; tensors are y, scale, offset, mean, rstd, gamma, and the gradient behind both."""

    slope: float


def instance_norm_backward(
    y: FeatureMap, dz: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes from the gradient of z = activation(scale · y + offset) those of y, gamma and beta.

    The norm of y is (scale, offset, slope) with scale = gamma · rstd and offset = beta - scale · mean, all (N, C),
    where ``mean`` and ``rstd`` = 1 / √(variance + eps) are those of each channel of y. The activation is
    max(x, slope · x); its gradient at 0 is the slope, as torch has it.

    Shapes: y, dz and the first result (N, C, D, H, W); mean, rstd (N, C); gamma and the other results (C).

    >>> y = torch.tensor([-1.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    >>> normed = FeatureMap(y, (one, zero, 0.5))
    >>> instance_norm_backward(normed, torch.ones_like(y), zero, one, one[0])[2]  # 0.5 + 1
    tensor([1.5000])
    """
    assert y.norm is not None, "the norm whose gradient is asked for"
    scale, offset, slope = y.norm
    dy, sums = INSTANCE_NORM_BACKWARD(InstanceNormProblem(slope), [y.raw, scale, offset, mean, rstd, gamma, dz])
    dbeta, dgamma = sums.sum(dim=0).to(gamma.dtype).unbind(dim=1)
    return dy, dgamma, dbeta


def _by_kernel(found: Kernels, problem: InstanceNormProblem, tensors: Tensors) -> list[Tensor]:
    """Computes the gradient of y, and (N, C, 2) in float64: sums over the voxels of g and of g · ŷ."""
    raw, *per_channel, gamma, grad = tensors
    scale, offset, mean, rstd, gamma = (x.contiguous() for x in (*per_channel, gamma))
    y, dz, out = to_depth_last(raw), to_depth_last(grad), empty_depth_last(raw.shape, raw)
    sums = y.new_empty(*y.shape[:2], 2, dtype=torch.float64)
    call = structs.InstanceNormBackward(
        input=source(y, (scale, offset, problem.slope)),
        grad=source(dz),
        out=target(out),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        gamma=gamma.data_ptr(),
        sums=sums.data_ptr(),
        size=(len(y), *y.shape[2:]),
    )
    check(found.instance_norm_backward(call, torch.get_num_threads()), "instance_norm_backward()")
    return [out, sums]


def _with_torch(problem: InstanceNormProblem, tensors: Tensors) -> list[Tensor]:
    y, *per_channel, gamma, dz = tensors
    scale, offset, mean, rstd = (x[:, :, None, None, None] for x in per_channel)
    g = torch.where(y * scale + offset > 0, dz, dz * problem.slope)
    normed = (y - mean) * rstd
    voxels = (2, 3, 4)
    dy = gamma[:, None, None, None] * rstd * (g - g.mean(voxels, True) - normed * (g * normed).mean(voxels, True))
    sums = torch.stack([g.sum(voxels, dtype=torch.float64), (g * normed).sum(voxels, dtype=torch.float64)], dim=2)
    return [empty_depth_last(y.shape, y).copy_(dy), sums]


def _empty(problem: InstanceNormProblem, tensors: Tensors) -> list[Tensor]:
    y = tensors[0]
    return [empty_depth_last(y.shape, y), y.new_empty(*y.shape[:2], 2, dtype=torch.float64)]


INSTANCE_NORM_BACKWARD = Operator(
    "instance_norm_backward",
    InstanceNormProblem,
    (by_kernel("direct", _by_kernel), by_torch(_with_torch)),
    fake=_empty,
)

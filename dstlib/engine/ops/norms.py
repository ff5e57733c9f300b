"""Gradient of an instance norm and the leaky ReLU behind it, on depth-last maps.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

import torch
from torch import Tensor

from dstlib.engine.ops.feature_maps import Norm, empty_depth_last, source, target
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, kernels_for
from dstlib.engine.runtime.library import check
from dstlib.engine.runtime.structs import InstanceNormBackward


def norm_backward(
    y: Tensor, norm: Norm, dz: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of z = activation(scale · y + offset) to those of y, gamma and beta.

    ``norm`` is (scale, offset, slope) with scale = gamma · rstd and offset = beta - scale · mean, all (N, C), where
    ``mean`` and ``rstd`` = 1 / √(variance + eps) are those of each channel of y. The activation is max(x, slope · x);
    its gradient at 0 is the slope, as torch has it.

    Shapes: y, dz and the first result (N, C, D, H, W); mean, rstd (N, C); gamma and the other results (C).

    >>> y = torch.tensor([-1.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    >>> norm_backward(y, (one, zero, 0.5), torch.ones_like(y), zero, one, one[0])[2]  # 0.5 + 1
    tensor([1.5000])
    """
    scale, offset, slope = norm
    dy, sums = NORM_BACKWARD(y, [scale, offset, mean, rstd], slope, dz, gamma)
    dbeta, dgamma = sums.sum(dim=0).to(gamma.dtype).unbind(dim=1)
    return dy, dgamma, dbeta


def _norm_backward(
    y: Tensor, per_channel: list[Tensor], slope: float, dz: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of y, and (N, C, 2) in float64: sums over the voxels of g and of g · ŷ."""
    scale, offset, mean, rstd = (x.contiguous() for x in per_channel)
    found = kernels_for(y, dz)
    out = _empty(y)
    if not found:
        return _with_torch(y, per_channel, slope, dz, gamma)
    y, dz = to_depth_last(y), to_depth_last(dz)
    n, c, d, h, w = y.shape
    sums = y.new_empty(n, c, 2, dtype=torch.float64)
    call = InstanceNormBackward(
        input=source(y, (scale, offset, slope)),
        grad=source(dz),
        out=target(out),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        gamma=gamma.data_ptr(),
        sums=sums.data_ptr(),
        size=(n, d, h, w),
    )
    check(found.instance_norm_backward(call, torch.get_num_threads()), "norm_backward()")
    return out, sums


def _with_torch(y: Tensor, per_channel: list[Tensor], slope: float, dz: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    scale, offset, mean, rstd = (x[:, :, None, None, None] for x in per_channel)
    g = torch.where(y * scale + offset > 0, dz, dz * slope)
    normed = (y - mean) * rstd
    voxels = (2, 3, 4)
    dy = gamma[:, None, None, None] * rstd * (g - g.mean(voxels, True) - normed * (g * normed).mean(voxels, True))
    sums = torch.stack([g.sum(voxels, dtype=torch.float64), (g * normed).sum(voxels, dtype=torch.float64)], dim=2)
    return _empty(y).copy_(dy), sums


def _empty(y: Tensor) -> Tensor:
    n, c, d, h, w = y.shape
    return empty_depth_last((n, c, d, h, w), y)


def _empty_outputs(
    y: Tensor, per_channel: list[Tensor], slope: float, dz: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty(y), y.new_empty(*y.shape[:2], 2, dtype=torch.float64)


NORM_BACKWARD = Operator("norm_backward", _norm_backward, _empty_outputs)

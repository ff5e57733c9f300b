"""Maps written anew: in another order of memory, or with norm and activation applied.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from typing import Any

import torch
from torch import Tensor

from dstlib.engine.ops.feature_maps import Norm, activated, empty_depth_last, source, target
from dstlib.engine.ops.operator import Operator, flat, kernels_for, norm_of
from dstlib.engine.runtime.library import check
from dstlib.engine.runtime.memory import buffer
from dstlib.engine.runtime.structs import Activation, Reorder


def to_depth_last(x: Tensor) -> Tensor:
    """The same map (N, C, D, H, W) with depths side by side in memory; x itself where they are.

    >>> to_depth_last(torch.zeros(1, 2, 3, 4, 5)).stride()
    (120, 60, 1, 15, 3)
    """
    if x.stride(2) == 1 or x.shape[2] == 1:
        return x
    out: Tensor = TO_DEPTH_LAST(x)
    return out


def to_channels_first(x: Tensor) -> Tensor:
    """The same map (N, C, D, H, W) in torch's default order of memory; x itself where it is.

    >>> to_channels_first(to_depth_last(torch.zeros(1, 2, 3, 4, 5))).is_contiguous()
    True
    """
    if x.is_contiguous():
        return x
    out: Tensor = TO_CHANNELS_FIRST(x)
    return out


def materialise(x: Tensor, norm: Norm | None) -> Tensor:
    """What readers of a map (N, C, D, H, W) see, written out, depth last; for autograd the map's value itself.

    >>> x = torch.tensor([-2.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> materialise(x, (torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5)).flatten()
    tensor([-1.5000,  3.0000])
    """
    if norm is None:
        return to_depth_last(x)
    out: Tensor = MATERIALISE(x, *flat(norm, x))
    return out


def _to_depth_last(x: Tensor) -> Tensor:
    out = _empty(x)
    found = kernels_for(x)
    if found and x.stride(4) == 1:
        check(found.reorder_to_depth_last(_relayout(x, out), torch.get_num_threads()), "to_depth_last()")
        return out
    return out.copy_(x)


def _to_channels_first(x: Tensor) -> Tensor:
    found = kernels_for(x)
    if found and x.stride(2) == 1:
        out = buffer(x.numel()).view(x.shape)
        check(found.reorder_to_channels_first(_relayout(x, out), torch.get_num_threads()), "to_channels_first()")
        return out
    return _empty_contiguous(x).copy_(x)


def _materialise(x: Tensor, norm: list[Tensor], slope: float) -> Tensor:
    found = kernels_for(x)
    if not found:
        return _empty(x).copy_(activated(x, norm_of(norm, slope)))
    x = to_depth_last(x)
    out = _empty(x)
    n, _, d, h, w = x.shape
    call = Activation(source(x, norm_of(norm, slope)), target(out), (n, d, h, w))
    check(found.activation_forward(call, torch.get_num_threads()), "materialise()")
    return out


def _empty(x: Tensor) -> Tensor:
    n, c, d, h, w = x.shape
    return empty_depth_last((n, c, d, h, w), x)


def _relayout(x: Tensor, out: Tensor) -> Reorder:
    return Reorder(x.data_ptr(), out.data_ptr(), x.stride(), out.stride(), tuple(x.shape))


def _empty_contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_like_input(x: Tensor, norm: list[Tensor], slope: float) -> Tensor:
    return _empty(x)


def _pass_on(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _pass_on_to_map(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad, None, None


TO_DEPTH_LAST = Operator("to_depth_last", _to_depth_last, _empty, _pass_on)
TO_CHANNELS_FIRST = Operator("to_channels_first", _to_channels_first, _empty_contiguous, _pass_on)
MATERIALISE = Operator("materialise", _materialise, _empty_like_input, _pass_on_to_map)

"""Max-pooling over windows that lie side by side, on depth-last maps.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.feature_maps import Mapped, Norm, activated, empty_depth_last, source, target
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, flat, kernels_for, norm_of
from dstlib.engine.ops.templates import Template, Templates
from dstlib.engine.runtime.library import Kernels, check
from dstlib.engine.runtime.structs import MaxPool


def max_pool(x: Tensor, norm: Norm | None, window: Sequence[int]) -> Tensor:
    """The maximum of the activated map (N, C, D, H, W) over each window (d, h, w): (N, C, D // d, H // h, W // w).

    As torch's max-pooling with stride = window: what is left at the end of an axis is in no window, a NaN stays, and
    of equal values the first has the gradient. That is the gradient of the activated map.

    >>> x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    >>> max_pool(x, None, (2, 2, 1)).flatten()
    tensor([6., 7.])
    """
    out: Tensor = MAX_POOL(x, *flat(norm, x), window)
    return out


def _max_pool(x: Tensor, norm: list[Tensor], slope: float, window: Sequence[int]) -> Tensor:
    found = kernels_for(x)
    out = _empty(x, window)
    if not found:
        return out.copy_(F.max_pool3d(activated(x, norm_of(norm, slope)), tuple(window)))
    x = to_depth_last(x)
    call = _call(x, norm, slope, window, out)
    check(found.max_pool_forward(call, torch.get_num_threads()), "max_pool()")
    return out


class ReadyPool:
    """:func:`max_pool` where nobody records it: its calls are described once for each shape.

    >>> out = ReadyPool((1, 1, 2))(torch.tensor([3.0, 7.0]).reshape(1, 1, 1, 1, 2), None)
    >>> out is None or out.item() == 7  # None where there are no kernels
    True
    """

    def __init__(self, window: Sequence[int]) -> None:
        self.window = window
        self._templates: Templates[MaxPool] = Templates("max_pool()")

    def __call__(self, x: Tensor, norm: Norm | None) -> Tensor | None:
        """The maxima; None for a map that kernels cannot read."""
        return self._templates.run([(x, norm)], self._describe)

    def _describe(self, found: Kernels, sources: Sequence[Mapped]) -> Template[MaxPool]:
        ((x, norm),) = sources
        out = _empty(x, self.window)
        return Template.of(_call(x, *flat(norm, x), self.window, out), found.max_pool_forward, out)


def _max_pool_grad(x: Tensor, norm: list[Tensor], slope: float, window: Sequence[int], grad: Tensor) -> Tensor:
    """The gradient of the activated map, of the shape of x."""
    found = kernels_for(x, grad)
    if not found:
        _, index = F.max_pool3d(activated(x, norm_of(norm, slope)), tuple(window), return_indices=True)
        flat_grad = grad.new_zeros(*x.shape[:2], x.shape[2:].numel())
        flat_grad.scatter_(2, index.flatten(2), grad.flatten(2))
        return _empty_input(x).copy_(flat_grad.view(x.shape))
    out = _empty_input(x)
    if any(extent % step for extent, step in zip(x.shape[2:], window, strict=True)):
        out.zero_()  # what is in no window is not written
    x, grad = to_depth_last(x), to_depth_last(grad)
    call = _call(x, norm, slope, window, out)
    call.grad = source(grad)
    check(found.max_pool_backward(call, torch.get_num_threads()), "gradient of max_pool()")
    return out


def _call(x: Tensor, norm: list[Tensor], slope: float, window: Sequence[int], out: Tensor) -> MaxPool:
    n, _, d, h, w = x.shape
    return MaxPool(input=source(x, norm_of(norm, slope)), out=target(out), size=(n, d, h, w), window=tuple(window))


def _empty(x: Tensor, window: Sequence[int]) -> Tensor:
    n, c, d, h, w = x.shape
    return empty_depth_last((n, c, d // window[0], h // window[1], w // window[2]), x)


def _empty_input(x: Tensor) -> Tensor:
    n, c, d, h, w = x.shape
    return empty_depth_last((n, c, d, h, w), x)


def _empty_output(x: Tensor, norm: list[Tensor], slope: float, window: Sequence[int]) -> Tensor:
    return _empty(x, window)


def _empty_grad(x: Tensor, norm: list[Tensor], slope: float, window: Sequence[int], grad: Tensor) -> Tensor:
    return _empty_input(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, norm, ctx.slope, ctx.window = inputs
    ctx.save_for_backward(x, *norm)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *norm = ctx.saved_tensors
    return MAX_POOL_GRAD(x, norm, ctx.slope, ctx.window, grad), None, None, None


MAX_POOL_GRAD = Operator("max_pool_grad", _max_pool_grad, _empty_grad)
MAX_POOL = Operator("max_pool", _max_pool, _empty_output, _backward, _keep)

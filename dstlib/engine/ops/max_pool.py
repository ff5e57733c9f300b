"""Max-pooling over windows that lie side by side, on depth-last maps.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.feature_map import (
    FeatureMap,
    Five,
    Layout,
    depth_last,
    empty_depth_last,
    empty_like_depth_last,
    flat,
    source,
    source_like,
    target,
    target_like,
    unflat,
)
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, Tensors, by_kernel, by_torch
from dstlib.engine.ops.prepared import (
    MapProblem,
    Places,
    PreparedCall,
    PreparedCalls,
    by_prepared,
    run_prepared,
    state_of,
)
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check


@dataclass(frozen=True)
class MaxPoolProblem(MapProblem):
    """A max-pooling over windows (d, h, w) of a map, with the scale and offset of its norm where it has one."""

    window: tuple[int, ...]
    normed: tuple[bool, ...]
    slopes: tuple[float, ...]

    def maps(self, tensors: Tensors) -> list[FeatureMap]:
        """Returns the one map."""
        return unflat(tensors[:1], tensors[1:], self.normed, self.slopes)

    def output_size(self, size: Sequence[int]) -> Five:
        """Returns (N, C, D // d, H // h, W // w)."""
        n, c, d, h, w = size
        return n, c, d // self.window[0], h // self.window[1], w // self.window[2]


def max_pool(x: FeatureMap, window: tuple[int, int, int]) -> FeatureMap:
    """Computes the maximum of the activated map over each window (d, h, w): (N, C, D // d, H // h, W // w).

    As torch's max-pooling with stride = window: what is left at the end of an axis is in no window, a NaN stays, and
    of equal values the first has the gradient. That is the gradient of the activated map.

    >>> x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    >>> max_pool(FeatureMap(x), (2, 2, 1)).raw.flatten()
    tensor([6., 7.])
    """
    state = state_of([x.tensor])
    prepare = lambda: MAX_POOL.prepare(*_stated(x, window))  # noqa: E731
    found = run_prepared(_calls(window), state, [x], prepare) if state else None
    return found or FeatureMap(MAX_POOL(*_stated(x, window))[0])


@lru_cache(maxsize=64)
def _calls(window: tuple[int, int, int]) -> PreparedCalls[PreparedCall]:
    """Returns the prepared calls of a window: there are no parameters that they could belong to."""
    return PreparedCalls()


def _stated(x: FeatureMap, window: tuple[int, int, int]) -> tuple[MaxPoolProblem, list[Tensor]]:
    norms, normed, slopes = flat([x])
    return MaxPoolProblem(window, normed, slopes), [x.raw, *norms]


def _prepare(found: Kernels, problem: MaxPoolProblem, maps: list[FeatureMap], tensors: Tensors) -> PreparedCall:
    layout = maps[0].layout
    assert layout is not None
    n, _, d, h, w = layout.size
    size = problem.output_size(layout.size)
    out = Layout.of(size, depth_last(size)[1], None)
    job = structs.MaxPool(input=source_like(layout), out=target_like(out), size=(n, d, h, w), window=problem.window)
    return PreparedCall("max_pool()", found.max_pool_forward, job, Places([job.input], job.out), out, ())


def _with_torch(problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    (x,) = problem.maps(tensors)
    return [_empty(problem, tensors)[0].copy_(F.max_pool3d(x.activated(), problem.window))]


def _backward_by_kernel(found: Kernels, problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    (x,) = problem.maps(tensors[:-1])
    raw, grad, out = to_depth_last(x.raw), to_depth_last(tensors[-1]), empty_like_depth_last(x.raw)
    if any(extent % step for extent, step in zip(raw.shape[2:], problem.window, strict=True)):
        out.zero_()  # what is in no window is not written
    n, _, d, h, w = out.shape
    call = structs.MaxPool(
        input=source(raw, x.norm),
        grad=source(grad),
        out=target(out),
        size=(n, d, h, w),
        window=problem.window,
    )
    check(found.max_pool_backward(call, torch.get_num_threads()), "gradient of max_pool()")
    return [out]


def _backward_with_torch(problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    (x,), grad = problem.maps(tensors[:-1]), tensors[-1]
    _, index = F.max_pool3d(x.activated(), problem.window, return_indices=True)
    flat_grad = grad.new_zeros(*x.raw.shape[:2], x.raw.shape[2:].numel())
    flat_grad.scatter_(2, index.flatten(2), grad.flatten(2))
    return [empty_like_depth_last(x.raw).copy_(flat_grad.view(x.raw.shape))]


def _empty(problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    return [empty_depth_last(problem.output_size(tensors[0].shape), tensors[0])]


def _backward(problem: MaxPoolProblem, kept: Tensors, grads: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Returns the gradient of the activated map."""
    return [MAX_POOL_BACKWARD(problem, [*kept, grads[0]])[0], *[None] * (len(kept) - 1)]


MAX_POOL_BACKWARD = Operator(
    "max_pool_backward",
    MaxPoolProblem,
    (
        by_kernel("direct", _backward_by_kernel, reads=lambda problem, tensors: [tensors[0], tensors[-1]]),
        by_torch(_backward_with_torch),
    ),
    fake=lambda problem, tensors: [empty_like_depth_last(tensors[0])],
)
MAX_POOL = Operator(
    "max_pool",
    MaxPoolProblem,
    (by_prepared("direct", _prepare, reads=lambda problem, tensors: tensors[:1]), by_torch(_with_torch)),
    fake=_empty,
    backward=_backward,
    keep=lambda problem, tensors, outputs: list(tensors),
)

"""Max-pooling over windows that lie side by side, on depth-last maps.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops.feature_map import FeatureMap, MapProblem, empty_depth_last, empty_gradient, flat, source, target
from dstlib.engine.ops.layouts import to_depth_last
from dstlib.engine.ops.operator import Operator, Tensors, by_kernel, by_torch
from dstlib.engine.ops.prepared import Places, PreparedCall, PreparedCalls, by_prepared, run, state_of
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check


@dataclass(frozen=True)
class MaxPoolProblem(MapProblem):
    """A max-pooling over windows (d, h, w) of one map."""

    name = "max_pool"
    window: tuple[int, ...]

    def check(self, tensors: Tensors) -> None:
        """Refuses a map that is smaller than a window.

        Raises:
            InputError: It is, or has not five axes.
        """
        super().check(tensors)
        if any(extent < step for extent, step in zip(tensors[0].shape[2:], self.window, strict=True)):
            allowed, given = f"extents of {self.window} at least", f"{tuple(tensors[0].shape)}"
            raise self.refusal("map", allowed, given)

    def output_size(self, x: Tensor) -> tuple[int, ...]:
        """Returns (N, C, D // d, H // h, W // w)."""
        return *x.shape[:2], *(extent // step for extent, step in zip(x.shape[2:], self.window, strict=True))


def max_pool(x: FeatureMap, window: tuple[int, int, int]) -> FeatureMap:
    """Computes the maximum of the activated map over each window (d, h, w): (N, C, D // d, H // h, W // w).

    As torch's max-pooling with stride = window: what is left at the end of an axis is in no window, a NaN stays, and
    of equal values the first has the gradient. That is the gradient of the activated map.

    Raises:
        InputError: The map is smaller than a window.

    >>> x = torch.arange(8.0).reshape(1, 1, 2, 2, 2)
    >>> max_pool(FeatureMap(x), (2, 2, 1)).raw.flatten()
    tensor([6., 7.])
    """
    state = state_of([x.tensor])
    return run(MAX_POOL, _calls(window) if state else None, state, [x], lambda: _stated(x, window))


@lru_cache(maxsize=64)
def _calls(window: tuple[int, int, int]) -> PreparedCalls[PreparedCall | None]:
    """Returns the prepared calls of a window: there are no parameters that they could belong to."""
    return PreparedCalls()


def _stated(x: FeatureMap, window: tuple[int, int, int]) -> tuple[MaxPoolProblem, list[Tensor]]:
    tensors, normed, slopes = flat([x])
    return MaxPoolProblem(normed, slopes, window), tensors


def _prepare(found: Kernels, problem: MaxPoolProblem, maps: list[FeatureMap], tensors: Tensors) -> PreparedCall:
    (x,), (n, _, *extents) = maps, tensors[0].shape
    size = problem.output_size(x.raw)
    job = structs.MaxPool(input=source(x.raw, x.norm), size=(n, *extents), window=problem.window)
    return PreparedCall("max_pool()", found.max_pool_forward, job, Places([job.input], job.out, size), ())


def _with_torch(problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    (x,), _ = problem.split(tensors)
    return [_empty(problem, tensors)[0].copy_(F.max_pool3d(x.activated(), problem.window))]


def _backward_by_kernel(found: Kernels, problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    (x,), (grad,) = problem.split(tensors)
    raw, grad, out = to_depth_last(x.raw), to_depth_last(grad), empty_gradient(x.raw.shape, x.raw)
    if any(extent % step for extent, step in zip(raw.shape[2:], problem.window, strict=True)):
        out.zero_()  # what is in no window is not written
    job = structs.MaxPool(source(raw, x.norm), source(grad), target(out), (len(out), *out.shape[2:]), problem.window)
    check(found.max_pool_backward(job, torch.get_num_threads()), "gradient of max_pool()")
    return [out]


def _backward_with_torch(problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    (x,), (grad,) = problem.split(tensors)
    _, index = F.max_pool3d(x.activated(), problem.window, return_indices=True)
    flat_grad = grad.new_zeros(*x.raw.shape[:2], x.raw.shape[2:].numel())
    flat_grad.scatter_(2, index.flatten(2), grad.flatten(2))
    return [empty_gradient(x.raw.shape, x.raw).copy_(flat_grad.view(x.raw.shape))]


def plain_max_pool(problem: MaxPoolProblem, tensors: Tensors) -> Tensor:
    """Computes the maxima by torch's operations."""
    return F.max_pool3d(problem.values(tensors)[0], problem.window)


def _empty(problem: MaxPoolProblem, tensors: Tensors) -> list[Tensor]:
    return [empty_depth_last(problem.output_size(tensors[0]), tensors[0])]


MAX_POOL_BACKWARD = Operator(
    "max_pool_backward",
    MaxPoolProblem,
    (by_kernel("direct", _backward_by_kernel), by_torch(_backward_with_torch)),
    fake=lambda problem, tensors: [empty_gradient(tensors[0].shape, tensors[0])],
)
MAX_POOL = Operator(
    "max_pool",
    MaxPoolProblem,
    (by_prepared("direct", _prepare), by_torch(_with_torch)),
    fake=_empty,
    backward=lambda problem, kept, grads, wanted: MAX_POOL_BACKWARD(problem, [*kept, grads[0]]),
    keep=lambda problem, tensors, outputs: list(tensors),
    plain=plain_max_pool,
)

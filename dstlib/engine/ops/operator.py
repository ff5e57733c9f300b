"""Operators: one kernel, and the three ways to call it.

The value of a map with a norm is, for autograd, what its readers see: gradients are those of the activated map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.engine.ops.feature_maps import Norm
from dstlib.engine.runtime.library import Kernels, kernels
from dstlib.errors import SettingError


class Operator:
    """A function of tensors that torch's compilers know as ``dstlib::name``, called as directly as can be.

    Torch's dispatcher takes longer than a small map. So where nobody records, ``kernel`` is called as it is, and where
    autograd alone does, as its function; only compilers and tensors without values go through ``torch.library``.

    ``kernel`` is annotated, lists hold tensors without gradients or integers, and the result is new. ``fake`` takes the
    same arguments and makes empty tensors alike. ``keep`` and ``backward`` are those of ``torch.autograd.Function``,
    with None as gradient of a list.

    >>> def kernel(x: Tensor) -> Tensor:
    ...     return x + x
    >>> double = Operator("doctest_double", kernel, torch.empty_like, lambda ctx, grad: grad + grad)
    >>> x = torch.ones(1, requires_grad=True)
    >>> double(x).backward()
    >>> x.grad
    tensor([2.])
    """

    def __init__(
        self,
        name: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        keep: Callable[..., None] | None = None,
    ) -> None:
        self.kernel = kernel
        definition = torch.library.custom_op(f"dstlib::{name}", kernel, mutates_args=())
        definition.register_fake(fake)
        self.registered = getattr(torch.ops.dstlib, name)
        self.function: Any = None
        if backward:
            keep = keep or _keep_nothing
            methods = {"forward": staticmethod(_keeping(kernel, keep)), "backward": staticmethod(backward)}
            self.function = type(name, (torch.autograd.Function,), methods)
            arguments = self.registered.default._schema.arguments
            lists = [i for i, argument in enumerate(arguments) if str(argument.type) == "List[Tensor]"]
            keep, backward = _spell_out(lists, keep, backward)
            definition.register_autograd(backward, setup_context=keep)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if any(type(x) is not Tensor and type(x) is not nn.Parameter for x in tensors):
            return self.registered(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self.function.apply(*args) if self.function else self.registered(*args)
        return self.kernel(*args)


def _keeping(kernel: Callable[..., Any], keep: Callable[..., None]) -> Callable[..., Any]:
    """Both as one ``forward``: apart, as ``setup_context``, torch would look at their signatures in every call."""

    def forward(ctx: Any, *args: Any) -> Any:
        result = kernel(*args)
        keep(ctx, args, result)
        return result

    return forward


def _spell_out(
    lists: Sequence[int], keep: Callable[..., None], backward: Callable[..., Any]
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """The same two functions as torch.library wants them: with a list of Nones as gradient of a list of tensors."""

    def keep_lengths(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths = {i: len(inputs[i]) for i in lists}
        keep(ctx, inputs, output)

    def fill(ctx: Any, *grads: Tensor) -> Any:
        results = backward(ctx, *grads)
        if not lists:
            return results
        return tuple([None] * ctx.lengths[i] if i in ctx.lengths else result for i, result in enumerate(results))

    return keep_lengths, fill


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The kernels, where there are any and they can read these tensors; None where torch has to do.

    That is for another type, another device, and where there is nothing to compute.

    >>> kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    True
    """
    found = kernels()
    readable = all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 for x in tensors)
    return found if readable else None


def flat(norm: Norm | None, x: Tensor) -> tuple[list[Tensor], float]:
    """The norm of a map (N, C, ...) as operators take it: [scale, offset] or nothing, and the slope.

    >>> flat(None, torch.zeros(1, 2, 3))
    ([], 1.0)
    """
    if norm is None:
        return [], 1.0
    scale, offset, slope = norm
    if scale.shape != x.shape[:2] or offset.shape != x.shape[:2]:
        given = f"scale {tuple(scale.shape)}, offset {tuple(offset.shape)}"
        allowed, remedy = f"both (N, C) = {tuple(x.shape[:2])}", "Each channel of each sample has its own."
        raise SettingError.of("norm", "a map", allowed=allowed, given=given, remedy=remedy)
    return [scale.contiguous(), offset.contiguous()], slope


def norm_of(tensors: Sequence[Tensor], slope: float) -> Norm | None:
    """The reverse of :func:`flat`."""
    return (tensors[0], tensors[1], slope) if tensors else None

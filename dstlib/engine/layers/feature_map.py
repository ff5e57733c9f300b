"""Maps whose norm and activation are still to be applied, by whoever reads them."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import materialise, to_channels_first, written_out
from dstlib.layers.recompute import same_map

_PROPERTIES = ("shape", "ndim", "dtype", "device", "layout", "requires_grad")
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_ABOUT |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__}  # what needs no value
_lock = threading.RLock()  # held while values are written out: threads may read the same map


class Pending(Tensor):
    """A map (N, C, D, H, W) on its way from one layer of the engine to the next, as the tensor that it stands for.

    The engine's layers read the raw values and the norm. Any other operation first makes of it, and not of a copy, the
    tensor that it stands for: the same object then has the values written out, and is a plain tensor from there on.
    The few that torch does not let a class know of, such as ``torch.tensor(z)`` and what ``torch.jit`` has scripted,
    find NaN.

    >>> x = torch.tensor([-2.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> z = Pending.of(FeatureMap(x, (torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5)))
    >>> type(z).__name__, z.shape
    ('Pending', torch.Size([1, 1, 2, 1, 1]))
    >>> z.add_(1).flatten(), type(z).__name__
    (tensor([-0.5000,  4.0000]), 'Tensor')
    """

    feature_map: FeatureMap
    recorded: Any  # what autograd knew it to be made by when it was

    @staticmethod
    def of(x: FeatureMap) -> Tensor:
        """Returns a map as the tensor that its readers see, pending where a norm is still to be applied."""
        if not x.is_normed:
            return x.raw
        is_made_otherwise = x.tensor is not None and x.shown is None  # not by a prepared call, nor recorded
        if is_made_otherwise and (torch.compiler.is_compiling() or type(x.raw) is not Tensor or x.raw.requires_grad):
            return to_channels_first(materialise(x))  # for a compiler, or a tensor of another kind
        return Pending._of(x.stand_in(), x)

    @staticmethod
    def _of(shown: Tensor, x: FeatureMap) -> Tensor:
        grad_fn = shown.grad_fn
        shown.__class__ = Pending
        shown.feature_map, shown.recorded = x, grad_fn  # type: ignore[attr-defined]
        return shown

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Writes the values out for every operation that asks for them."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is same_map and type(args[0]) is Pending:
            with torch._C.DisableTorchFunctionSubclass():
                return Pending._of(args[0].view_as(args[0]).as_subclass(Tensor), args[0].feature_map)
        write_out((args, kwargs))
        return func(*args, **kwargs)

    @property
    def set_(self) -> Any:
        """Writes the values out first, as torch tells a class of every other operation that changes a tensor."""
        write_out(self)
        return self.set_  # a plain tensor's by now


def feature_map(x: Tensor) -> FeatureMap:
    """Returns a map as the engine reads it: raw values and norm of what is pending, any other tensor as it is."""
    found: FeatureMap | None = x.__dict__.get("feature_map") if type(x) is Pending else None
    if found is None:
        return FeatureMap(x)
    if torch.is_grad_enabled():
        with torch._C.DisableTorchFunctionSubclass():
            is_known = x.grad_fn is x.__dict__["recorded"]
        if not is_known:  # a function of autograd has given the tensor out as its own, as checkpoints do
            write_out(x)
            return FeatureMap(x)
    return found


def write_out(given: Any) -> None:
    """Makes plain tensors of all that are pending among tensors in any containers.

    Their values lie in torch's default order then, as those that the plain layer makes.
    """
    for x in tree_iter(given):
        if type(x) is Pending:
            with _lock, torch._C.DisableTorchFunctionSubclass():
                if type(x) is Pending:  # still: another thread may have been faster
                    _write_out(x)


def _begin_anew() -> None:
    """Makes a lock that nobody holds: in a forked process whoever held it at that moment does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _write_out(x: Pending) -> None:
    with torch.inference_mode(x.is_inference()):
        x.data = written_out(x.feature_map)
    del x.feature_map, x.recorded
    x.__class__ = Tensor  # type: ignore[assignment]

"""Maps whose norm and activation are still to be applied, by whoever reads them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import materialise

_PROPERTIES = ("shape", "ndim", "dtype", "device", "requires_grad", "grad_fn", "layout")
_ABOUT = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_ABOUT |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__}  # what needs no value


class Pending(Tensor):
    """A map (N, C, D, H, W) on its way from one layer of the engine to the next, as the tensor that it stands for.

    The engine's layers read the raw values and the norm; any other operation writes the values out first.

    >>> x = torch.tensor([-2.0, 1.0]).reshape(1, 1, 2, 1, 1)
    >>> z = Pending.of(FeatureMap(x, (torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5)))
    >>> z.shape, (z + 0).flatten()
    (torch.Size([1, 1, 2, 1, 1]), tensor([-1.5000,  3.0000]))
    """

    feature_map: FeatureMap

    @staticmethod
    def of(x: FeatureMap) -> "Pending":
        """Returns the map as a tensor."""
        pending = x.raw.as_subclass(Pending)
        pending.feature_map = x
        return pending

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Writes the values out for every operation that asks for them."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ABOUT:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map(_written, (tuple(args), dict(kwargs or {})))
            return func(*args, **kwargs)


def feature_map(x: Tensor) -> FeatureMap:
    """Returns a map as the engine reads it: raw values and norm of what is pending, any other tensor as it is."""
    return x.feature_map if type(x) is Pending else FeatureMap(x)


def _written(x: Any) -> Any:
    return materialise(x.feature_map) if isinstance(x, Pending) else x

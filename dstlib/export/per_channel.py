"""What modules and functions do with channels: mix them all, treat each by itself, join them, or something unknown.

Exact types only: a subclass may do anything, as may a module of which a parameter is computed anew each time. All in
eval mode.
"""

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dstlib.layers.shift import Shift

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*_BATCH_NORMS, *_INSTANCE_NORMS)
_POINTWISE_MODULES = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
}
_SUMS = {
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    *(operator.mul, operator.imul, torch.mul, "mul", "mul_"),
}
_ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish"),
    *("sigmoid", "tanh", "softplus"),
)
_POINTWISE = {
    *_SUMS,
    *(getattr(functional, name) for name in _ACTIVATIONS),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh"),
    *(operator.truediv, operator.itruediv, operator.neg, operator.pow, "contiguous"),
}
_WINDOWS = {
    getattr(nn, f"{kind}Pool{n}d"): n for n in (1, 2, 3) for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
}
_KINDS = ("max", "avg", "adaptive_avg", "adaptive_max")
_WINDOW_FUNCTIONS = {getattr(functional, f"{kind}_pool{n}d"): n for n in (1, 2, 3) for kind in _KINDS}


def live_connections(module: nn.Module) -> Tensor | None:
    """Where (outputs, inputs) any weight of a layer is not zero; None for what is no layer that mixes all channels.

    >>> live_connections(nn.ConvTranspose2d(3, 2, 2)).shape, live_connections(nn.Conv2d(4, 4, 3, groups=2))
    (torch.Size([2, 3]), None)
    """
    kind, layer = type(module), cast(Any, module)
    if kind is nn.Linear:
        return layer.weight.detach().cpu().ne(0)
    if kind in (*_CONVOLUTIONS, *TRANSPOSED) and layer.groups == 1:
        live = layer.weight.detach().cpu().ne(0).flatten(2).any(dim=2)
        return live.t() if kind in TRANSPOSED else live
    return None


def channel_axis(layer: nn.Module, ndim: int) -> int:
    """Along which axis of a value of so many axes a layer reads, and makes, its channels."""
    return ndim - 1 if type(layer) is nn.Linear else ndim - 1 - _num_axes(type(layer))


def carries(node: fx.Node, module: nn.Module | None, ndim: int, axis: int) -> bool:
    """Whether a node with one input, of so many axes, keeps channels along this axis, each made of itself alone."""
    kind: Any = type(module)
    if kind in NORMS:
        return axis == 1 and (kind in _BATCH_NORMS or ndim == 2 + _num_axes(kind))
    if kind in _WINDOWS:
        return axis == ndim - 1 - _WINDOWS[kind]
    if kind in (nn.Upsample, Shift) or node.target is functional.interpolate:
        return axis == 1 and ndim > 2
    if node.op == "call_function" and node.target in _WINDOW_FUNCTIONS:
        return axis == ndim - 1 - _WINDOW_FUNCTIONS[node.target]
    if module is None and node.target in ("mean", torch.mean):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims
        return isinstance(dims, list | tuple) and all(isinstance(d, int) and d % ndim > axis for d in dims)
    return is_pointwise(node, module)


def is_pointwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether entries are made of themselves alone, so that a constant stays one whatever the size of the input."""
    if type(module) in _BATCH_NORMS:
        return getattr(module, "running_mean", None) is not None
    if module is not None:
        return type(module) in _POINTWISE_MODULES
    is_idle = node.target is functional.dropout and node.kwargs.get("training") is False
    return is_idle or node.target in _POINTWISE


def is_sum(node: fx.Node) -> bool:
    """Whether it adds, subtracts or multiplies, entry by entry."""
    return node.op in ("call_function", "call_method") and node.target in _SUMS


def cat_axis(node: fx.Node, ndim: int) -> int | None:
    """Along which axis a node concatenates, None if it does not."""
    if node.target not in (torch.cat, torch.concat):
        return None
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return axis % ndim if isinstance(axis, int) else None


def flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether it makes (B, features) of (B, ...)."""
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return node.target in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs


def has_channels(module: nn.Module | None) -> bool:
    """Whether it holds something for each channel, or counts them."""
    return type(module) in (*NORMS, Shift)


def _num_axes(kind: type) -> int:
    """Of a Conv2d and its like: 2."""
    return int(kind.__name__[-2])

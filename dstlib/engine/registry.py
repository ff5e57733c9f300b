"""Which layers the engine has kernels for, and why not."""

from torch import nn

from dstlib.engine.gpu.eligible import gpu_form, gpu_obstacle
from dstlib.engine.gpu.module import obstacle_to_blocks
from dstlib.engine.layers.fast_layers import FastConv, FastFusionNode, FastUnit
from dstlib.engine.layers.linear import SparseLinear
from dstlib.layers.blocks import Unit
from dstlib.layers.fusion import FusionNode
from dstlib.layers.shift import Shift

CANDIDATES = (FusionNode, Unit, nn.Conv2d, nn.Conv3d, nn.Linear)


def fast_form(layer: nn.Module) -> nn.Module:
    """The layer on the kernels of its device, sharing its parameters; for one without :func:`obstacle` alone."""
    if _on_gpu(layer):
        return gpu_form(layer)
    if isinstance(layer, FusionNode):
        return FastFusionNode(layer)
    if isinstance(layer, Unit):
        return FastUnit(layer)
    if isinstance(layer, nn.Linear):
        return SparseLinear(layer)
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    return FastConv(layer)


def obstacle(layer: nn.Module) -> str | None:
    """Why the engine cannot compute a layer; None where it can.

    >>> obstacle(nn.Conv2d(4, 4, 3, padding=1)), obstacle(nn.Conv2d(4, 4, 3))
    (None, 'its padding is not half its kernel')
    """
    if any(parameter.is_inference() for parameter in layer.parameters()):
        return "its parameters were made in inference mode, in which changes go unnoticed"
    if isinstance(layer, FusionNode):
        return _node(layer)
    if isinstance(layer, Unit):
        return _unit(layer)
    if _on_gpu(layer):
        return gpu_obstacle(layer)
    if isinstance(layer, nn.Conv2d | nn.Conv3d):
        return _conv(layer)
    return None if type(layer) is nn.Linear else f"it is a {type(layer).__name__}"


def _on_gpu(layer: nn.Module) -> bool:
    return next(layer.parameters()).is_cuda


def _node(node: FusionNode) -> str | None:
    if _on_gpu(node):
        return next(filter(None, map(_unit, node.units)), None)
    up, down = node.upward, node.downward
    if type(up) is not nn.ConvTranspose3d or up.bias is not None or up.kernel_size != up.stride:
        return "its upward flow is not a transposed convolution by its stride"
    if down is not None and (down.stride != down.kernel_size or down.padding != 0 or down.ceil_mode):
        return "its pooling windows overlap"
    return next(filter(None, map(_unit, node.units)), None)


def _unit(unit: nn.Module) -> str | None:
    if not isinstance(unit, Unit):
        return f"it has a {type(unit).__name__} for a unit"
    norm, slope = unit.norm, getattr(unit.activation, "negative_slope", None)
    if not isinstance(unit.norm, nn.InstanceNorm3d) or not norm.affine or norm.track_running_stats:
        return "its norm is not an affine instance norm"
    if not isinstance(unit.activation, nn.LeakyReLU) or slope is None or not 0 <= slope <= 1:
        return "its activation is not a leaky ReLU with a slope from 0 to 1"
    if unit.shift is not None and not (isinstance(unit.shift, Shift) and unit.shift.axis in (2, -3)):
        return "its shift is learned, or not along depth"
    return obstacle_to_blocks(unit.conv) if _on_gpu(unit) else _conv(unit.conv)


def _conv(conv: nn.Conv2d | nn.Conv3d) -> str | None:
    if type(conv) not in (nn.Conv2d, nn.Conv3d):
        return f"it is a {type(conv).__name__}"
    *depth, height, width = conv.kernel_size
    half = tuple(n // 2 for n in conv.kernel_size)
    if any(n != 1 for n in depth) or (height, width) not in ((1, 1), (3, 3)):
        return f"its kernel is {conv.kernel_size}"
    if conv.groups != 1 or any(n != 1 for n in conv.dilation) or conv.padding_mode != "zeros":
        return "it has groups, dilation or a padding other than zeros"
    return None if conv.padding == half else "its padding is not half its kernel"

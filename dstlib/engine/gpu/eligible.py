"""Which layers are computed otherwise on a GPU, and why not."""

from torch import nn

from dstlib.engine.gpu.module import BlockConv, obstacle_to_blocks
from dstlib.engine.gpu.tiles import KERNEL
from dstlib.engine.gpu.units import BLOCK, GPUFusionNode, GPUUnit
from dstlib.layers.blocks import Unit
from dstlib.layers.fusion import FusionNode


def gpu_form(layer: nn.Module) -> nn.Module:
    """The layer on the GPU's kernels, sharing its parameters; for one without :func:`gpu_obstacle` alone."""
    if isinstance(layer, FusionNode):
        return GPUFusionNode(layer)
    if isinstance(layer, Unit):
        return GPUUnit(layer)
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    return BlockConv.of(layer, size=BLOCK)


def gpu_obstacle(layer: nn.Module) -> str | None:
    """Why the GPU's kernels cannot compute a convolution by itself, or a linear layer; None where they can.

    >>> gpu_obstacle(nn.Conv2d(16, 16, 3, padding=1)), gpu_obstacle(nn.Conv2d(16, 16, 1))
    (None, 'its kernel is (1, 1), which cuDNN computes')
    """
    if isinstance(layer, nn.Linear):
        return "it is a linear layer, which a GPU computes dense: see to_semi_structured()"
    if reason := obstacle_to_blocks(layer):
        return reason
    assert isinstance(layer, nn.Conv2d | nn.Conv3d)
    if tuple(layer.kernel_size) not in (KERNEL, KERNEL[1:]) or max(layer.stride) > 1:
        strided = f" with a stride of {layer.stride}" if max(layer.stride) > 1 else ""
        return f"its kernel is {layer.kernel_size}{strided}, which cuDNN computes"
    return None

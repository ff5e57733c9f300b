"""Which layers are computed otherwise on a GPU, and why not."""

from torch import nn

from dstlib.engine.gpu.module import BlockConv, obstacle_to_blocks
from dstlib.engine.gpu.tiles import KERNEL
from dstlib.engine.gpu.units import BLOCK, GPUFusionNode, GPUUnit
from dstlib.engine.layers.fast_layer import FastLayer
from dstlib.engine.layers.unit import obstacle_around_conv
from dstlib.layers.blocks import Unit
from dstlib.layers.fusion import FusionNode


def gpu_obstacle(layer: nn.Module) -> str | None:
    """Tells why the GPU's kernels cannot compute a convolution by itself, or a linear layer; None where they can.

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


def _unit(unit: nn.Module) -> str | None:
    return obstacle_around_conv(unit) or obstacle_to_blocks(unit.get_submodule("conv"))


def _fusion_node(node: FusionNode) -> str | None:
    return next(filter(None, map(_unit, node.units)), None)


def _block_conv(conv: nn.Conv2d | nn.Conv3d) -> BlockConv:
    return BlockConv.of(conv, size=BLOCK)


GPU_LAYERS = (
    FastLayer(FusionNode, _fusion_node, GPUFusionNode),
    FastLayer(Unit, _unit, GPUUnit),
    FastLayer(nn.Conv2d | nn.Conv3d | nn.Linear, gpu_obstacle, _block_conv),
)

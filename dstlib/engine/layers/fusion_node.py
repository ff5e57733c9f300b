"""Fusion nodes on the engine."""

from typing import Any

from torch import Tensor, nn

from dstlib.engine.layers.conv_transpose import FastConvTranspose
from dstlib.engine.layers.fast_layer import FastLayer, three
from dstlib.engine.layers.feature_map import Pending, feature_map
from dstlib.engine.layers.unit import FastUnit, obstacle_to_unit
from dstlib.engine.ops.max_pool import max_pool
from dstlib.layers.blocks import FusionNode, Unit


class FastFusionNode(nn.Module):
    """A :class:`~dstlib.layers.FusionNode` that neither concatenates nor shifts in memory."""

    def __init__(self, plain: FusionNode) -> None:
        super().__init__()
        self.upward = FastConvTranspose(plain.upward)
        self.downward = plain.downward
        self.window = three(plain.downward.kernel_size) if plain.downward is not None else None
        self.units = nn.Sequential(*(FastUnit(each) for each in plain.units if isinstance(each, Unit)))

    def forward(self, same: Tensor, coarser: Tensor, finer: Tensor | None = None) -> Tensor:
        """Computes from the maps of this level, the coarser and the finer one, as the plain node does."""
        parts: dict[str, Any] = self._modules  # where attributes that are modules are found at once
        sources = [feature_map(same), parts["upward"].refine(feature_map(coarser))]
        if finer is not None and self.window is not None:
            sources.append(max_pool(feature_map(finer), self.window))
        for each in parts["units"]:
            sources = [each.fuse(sources)]  # whose memory serves again from here on
        return Pending.of(sources[0])


def obstacle_to_fusion_node(node: FusionNode) -> str | None:
    """Tells why the engine cannot compute a fusion node; None where it can."""
    up, down = node.upward, node.downward
    if type(up) is not nn.ConvTranspose3d or up.bias is not None or up.kernel_size != up.stride:
        return "its upward flow is not a transposed convolution by its stride"
    if down is not None and (down.stride != down.kernel_size or down.padding != 0 or down.ceil_mode):
        return "its pooling windows overlap"
    return next(filter(None, map(obstacle_to_unit, node.units)), None)


FUSION_NODE = FastLayer(FusionNode, obstacle_to_fusion_node, FastFusionNode)

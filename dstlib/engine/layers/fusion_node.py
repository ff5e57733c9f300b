"""Fusion nodes on the engine."""

from typing import Any

from torch import Tensor, nn

from dstlib.engine.layers.compact_conv_transpose import CompactConvTranspose3d
from dstlib.engine.layers.conv_transpose import (
    FastActiveUpward,
    FastConvTranspose,
    make_upward,
    obstacle_to_upward,
)
from dstlib.engine.layers.fast_layer import Fast, FastLayer, become, obstacle_of_parts, three
from dstlib.engine.layers.feature_map import Pending, feature_map
from dstlib.engine.layers.unit import FastUnit, make_unit, obstacle_to_unit
from dstlib.engine.ops.conv import Triple
from dstlib.engine.ops.fusion_node import fusion_node
from dstlib.layers.blocks import FusionNode, Unit


class FastFusionNode(Fast, FusionNode):
    """A :class:`~dstlib.layers.FusionNode` that neither concatenates nor shifts in memory."""

    def forward(self, same: Tensor, coarser: Tensor, finer: Tensor | None = None) -> Tensor:
        """Computes from the maps of this level, the coarser and the finer one, as the plain node does."""
        y: Tensor = self.run(same, coarser, finer)
        return y

    def compute(self, plan: tuple[Triple | None], same: Tensor, coarser: Tensor, finer: Tensor | None) -> Tensor:
        """Computes it on the engine, if all of its parts can be."""
        parts: dict[str, Any] = self._modules  # where attributes that are modules are found at once
        upward, (first, *others), (window,) = parts["upward"], parts["units"]._modules.values(), plan
        plans = [upward.plan(), first.plan(), *(each.plan() for each in others)]
        if coarser is None or None in plans or (window is not None and finer is None):
            y: Tensor = self.as_plain(same, coarser, finer)
            return y
        maps = [feature_map(same), feature_map(coarser)]
        if finer is not None and window is not None:
            maps.append(feature_map(finer))
        x = fusion_node(maps, (upward.weights(upward), plans[0]), window, *first.settings(plans[1]))
        for each, of_unit in zip(others, plans[2:], strict=True):
            x = each.fuse(of_unit, [x])
        return Pending.of(x)

    def state(self) -> tuple[object, ...]:
        """Returns what the plan depends on."""
        parts: dict[str, Any] = self._modules
        upward, downward, units = (parts.get(name) for name in ("upward", "downward", "units"))
        if upward is None or units is None:
            return (None,)
        pool = downward is None or (downward.__class__, *(getattr(downward, name, None) for name in _POOLING))
        made_of = [each.__class__ for each in units._modules.values()]
        hooked = obstacle_of_parts(upward, downward, units, *units._modules.values())
        return pool, upward.__class__, made_of, units.__class__, hooked

    def obstacle(self) -> str | None:
        """Tells why the engine cannot compute the node as it is now; None where it can."""
        kinds = {type(each) for each in self.units}
        if type(self.upward) not in (FastConvTranspose, FastActiveUpward) or kinds != {FastUnit}:
            return "its parts were replaced"
        return _obstacle_to_parts(self)

    def make_plan(self) -> tuple[Triple | None]:
        """Returns the window of the pooling, None where there is none."""
        return (None if self.downward is None else three(self.downward.kernel_size),)


_POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def obstacle_to_fusion_node(node: FusionNode) -> str | None:
    """Tells why the engine cannot compute a fusion node; None where it can."""
    if type(node) is not FusionNode:
        return f"it is a {type(node).__name__}"
    kinds = nn.ConvTranspose3d, CompactConvTranspose3d
    if type(node.upward) not in kinds or obstacle_to_upward(node.upward):  # type: ignore[arg-type]
        return "its upward flow is not a transposed convolution by its stride"
    return _obstacle_to_parts(node) or next(filter(None, map(obstacle_to_unit, node.units)), None)


def _obstacle_to_parts(node: FusionNode) -> str | None:
    """Tells what of the parts of a node, and of what is between them, is not as the engine has it."""
    down = node.downward
    if down is not None and type(down) is not nn.MaxPool3d:
        return f"it pools by a {type(down).__name__}"
    if down is not None:
        sizes = [three(size) for size in (down.kernel_size, down.stride, down.padding, down.dilation)]
        apart = sizes == [sizes[0], sizes[0], (0, 0, 0), (1, 1, 1)] and not (down.ceil_mode or down.return_indices)
        if not apart:
            return "its pooling windows overlap"
    if type(node.units) is not nn.Sequential:
        return f"its units are in a {type(node.units).__name__}"
    return obstacle_of_parts(node.upward, down, node.units, *node.units)


def _make(node: FusionNode) -> FastFusionNode:
    make_upward(node.upward)
    for each in node.units:
        assert isinstance(each, Unit)
        make_unit(each)
    return become(node, FastFusionNode)


FUSION_NODE = FastLayer(FusionNode, obstacle_to_fusion_node, _make)

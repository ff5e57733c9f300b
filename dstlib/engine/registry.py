"""Which layers have a fast form, on which device, and why others have none."""

from collections.abc import Sequence

from torch import nn

from dstlib.engine.gpu.layers import GPU_LAYERS
from dstlib.engine.layers.conv import CONV
from dstlib.engine.layers.fast_layer import FastLayer, obstacle_of_its_own
from dstlib.engine.layers.fusion_node import FUSION_NODE
from dstlib.engine.layers.linear import LINEAR
from dstlib.engine.layers.unit import UNIT

CPU_LAYERS = (FUSION_NODE, UNIT, CONV, LINEAR)  # the first that is of a layer's type counts


def find(layer: nn.Module, layers: Sequence[FastLayer] = ()) -> FastLayer | None:
    """Returns the first fast layer of this layer's type: of ``layers``, then of those of its device; None of others."""
    known = GPU_LAYERS if any(parameter.is_cuda for parameter in layer.parameters()) else CPU_LAYERS
    return next((each for each in (*layers, *known) if isinstance(layer, each.kind)), None)


def obstacle(layer: nn.Module, layers: Sequence[FastLayer] = ()) -> str | None:
    """Tells why a layer has no fast form; None where it has one.

    >>> obstacle(nn.Conv2d(4, 4, 3, padding=1)), obstacle(nn.Conv2d(4, 4, 3))
    (None, 'its padding is not half its kernel')
    """
    if any(parameter.is_inference() for parameter in layer.parameters()):
        return "its parameters were made in inference mode, in which changes go unnoticed"
    if (found := find(layer, layers)) is None:
        return f"it is a {type(layer).__name__}"
    return obstacle_of_its_own(layer) or found.obstacle(layer)

"""Which layers can hold their active weights only, and how a plain layer becomes one that does."""

from torch import Tensor, nn

from dstlib.engine.layers.compact_conv import CompactConv2d, CompactConv3d
from dstlib.engine.layers.compact_conv_transpose import (
    CompactConvTranspose2d,
    CompactConvTranspose3d,
    obstacle_to_compact_upward,
)
from dstlib.engine.layers.compact_layer import CompactLayer, settle
from dstlib.engine.layers.compact_linear import CompactLinear
from dstlib.engine.layers.conv import obstacle_to_conv
from dstlib.engine.layers.fast_layer import become
from dstlib.engine.ops.linear_patterns import MOST_WEIGHTS

FORMS: dict[type[nn.Module], type[CompactLayer]] = {
    nn.Linear: CompactLinear,
    nn.Conv2d: CompactConv2d,
    nn.Conv3d: CompactConv3d,
    nn.ConvTranspose2d: CompactConvTranspose2d,
    nn.ConvTranspose3d: CompactConvTranspose3d,
}
UPWARD = nn.ConvTranspose2d | nn.ConvTranspose3d  # whose weights are (C, O, *taps)


def obstacle_to_compact(layer: nn.Module) -> str | None:
    """Tells why a layer cannot hold the active values of its weight alone; None where it can."""
    if type(layer) not in FORMS:
        return f"it belongs to a {type(layer).__name__}"
    if layer.weight.numel() > MOST_WEIGHTS:  # type: ignore[union-attr, operator]
        return f"it has more than {MOST_WEIGHTS:,} weights, which places in 32 bits cannot number"
    if isinstance(layer, UPWARD):
        return obstacle_to_compact_upward(layer)
    return obstacle_to_conv(layer) if isinstance(layer, nn.Conv2d | nn.Conv3d) else None


def make_compact(layer: nn.Module, places: Tensor) -> CompactLayer:
    """Gives a layer, in place, the form that holds its active weights alone.

    ``places`` (A) are where in the flattened matrix (O, I) these lie, of a convolution the kernels, in rising order; of
    a transposed one, where in (I, O).
    The parameter ``weight`` stays the same object, its values become (A), or (A, *taps).

    >>> import torch
    >>> layer = make_compact(nn.Conv2d(4, 2, 3, padding=1), torch.tensor([1, 6]))
    >>> layer.weight.shape, layer(torch.zeros(5, 4, 8, 8)).shape
    (torch.Size([2, 3, 3]), torch.Size([5, 2, 8, 8]))
    """
    made: CompactLayer = become(layer, FORMS[type(layer)])
    settle(made, places)
    return made

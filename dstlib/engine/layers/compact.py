"""Which layers can hold their active weights only, and how a plain layer becomes one that does."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dstlib.engine.layers.active_weight import ActiveWeight
from dstlib.engine.layers.compact_attention import ActiveProjections, CompactMultiheadAttention
from dstlib.engine.layers.compact_conv import CompactConv2d, CompactConv3d
from dstlib.engine.layers.compact_conv_transpose import (
    CompactConvTranspose2d,
    CompactConvTranspose3d,
    obstacle_to_compact_upward,
)
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.layers.compact_linear import CompactLinear, CompactOutProjection
from dstlib.engine.layers.compact_recurrent import (
    CompactGRU,
    CompactGRUCell,
    CompactLSTM,
    CompactLSTMCell,
    CompactRNN,
    CompactRNNCell,
)
from dstlib.engine.layers.conv import obstacle_to_conv
from dstlib.engine.layers.fast_layer import become
from dstlib.engine.ops.linear_patterns import MOST_WEIGHTS

FORMS: dict[type[nn.Module], type[CompactLayer]] = {
    nn.Linear: CompactLinear,
    nn.Conv2d: CompactConv2d,
    nn.Conv3d: CompactConv3d,
    nn.ConvTranspose2d: CompactConvTranspose2d,
    nn.ConvTranspose3d: CompactConvTranspose3d,
    nn.MultiheadAttention: CompactMultiheadAttention,
    NonDynamicallyQuantizableLinear: CompactOutProjection,
    nn.LSTM: CompactLSTM,
    nn.GRU: CompactGRU,
    nn.RNN: CompactRNN,
    nn.LSTMCell: CompactLSTMCell,
    nn.GRUCell: CompactGRUCell,
    nn.RNNCell: CompactRNNCell,
}
UPWARD = nn.ConvTranspose2d | nn.ConvTranspose3d  # whose weights are (C, O, *taps)
_READERS = nn.MultiheadAttention | nn.TransformerEncoderLayer  # of the weights of layers that they do not call


def obstacle_to_compact(layer: nn.Module, key: str = "weight") -> str | None:
    """Tells why a layer cannot hold the active values of a weight alone; None where it can."""
    if type(layer) not in {*FORMS, *FORMS.values()}:
        return f"it belongs to a {type(layer).__name__}"
    if layer._parameters[key].numel() > MOST_WEIGHTS:  # type: ignore[union-attr]
        return f"it has more than {MOST_WEIGHTS:,} weights, which places in 32 bits cannot number"
    if isinstance(layer, UPWARD):
        return obstacle_to_compact_upward(layer)
    return obstacle_to_conv(layer) if isinstance(layer, nn.Conv2d | nn.Conv3d) else None


def obstacle_around(ancestors: Iterable[nn.Module]) -> str | None:
    """Tells which of the modules around a layer may read its weight without calling it; None where none does."""
    for each in ancestors:
        attention = each.self_attn if isinstance(each, nn.TransformerEncoderLayer) else each
        if isinstance(each, _READERS) and type(attention) not in (nn.MultiheadAttention, CompactMultiheadAttention):
            return f"its {type(each).__name__} reads the weight by itself"
    return None


def make_compact(
    layer: nn.Module, places: Tensor, key: str = "weight", ancestors: Iterable[nn.Module] = ()
) -> ActiveWeight:
    """Gives a layer, in place, the form that holds the active values of a weight alone, and returns these.

    ``places`` (A) are where in the flattened matrix (O, I) they lie, of a convolution the kernels, in rising order; of
    a transposed one, where in (I, O). The parameter stays the same object, its values become (A), or (A, *taps).
    ``ancestors`` are the modules around the layer, which call it from now on, and read no weight without.

    >>> import torch
    >>> layer = nn.Conv2d(4, 2, 3, padding=1)
    >>> active = make_compact(layer, torch.tensor([1, 6]))
    >>> layer.weight.shape, active.places().tolist(), layer(torch.zeros(5, 4, 8, 8)).shape
    (torch.Size([2, 3, 3]), [1, 6], torch.Size([5, 2, 8, 8]))
    """
    for each in ancestors:
        if isinstance(each, nn.TransformerEncoder):
            each.use_nested_tensor = False  # which its fused kernels alone take
        elif isinstance(each, _READERS):
            _compact_form(each.self_attn if isinstance(each, nn.TransformerEncoderLayer) else each)
    made = _compact_form(layer)
    kind = ActiveProjections if key == "in_proj_weight" else made.kind
    made.held[key] = active = kind(made, key, places)
    return active


def _compact_form(layer: nn.Module) -> CompactLayer:
    if isinstance(layer, CompactLayer):
        return layer
    made: CompactLayer = become(layer, FORMS[type(layer)])
    made.held = {}
    return made

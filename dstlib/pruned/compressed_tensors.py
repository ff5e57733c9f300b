"""compressed-tensors 0.12: the non-zeros of a weight, a bit for each of its entries, and its shape.

Later releases do not know the formats ``sparse-bitmask`` and ``sparse-24-bitmask`` any more, and what loads a model by
them leaves such weights as they were drawn (``findings/``): so they are unpacked here.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstlib.bounds import require_memory
from dstlib.errors import StateError

FORMATS = ("sparse-bitmask", "sparse-24-bitmask", "dense")
_PARTS = ("compressed", "bitmask", "shape")
_WHERE = "a checkpoint of compressed-tensors"
_REMEDY = "Copy the file again from where it was written."
_MAX_AXES = 64  # of torch


def is_pruned(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds weights in one of these formats."""
    return any(_layers(state))


def masks(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the masks by the names of their weights: what is stored is active, zeros that are stored too.

    Under ``sparse-24-bitmask`` that is two of every four; under ``sparse-bitmask`` what is not zero.

    Raises:
        StateError: A part is missing, or parts do not fit each other.

    >>> parts = {"compressed": torch.ones(3), "bitmask": torch.tensor([[1], [6]]).byte(), "shape": torch.tensor([2, 4])}
    >>> masks({f"up.{part}": x for part, x in parts.items()})
    {'up.weight': tensor([[ True, False, False, False],
            [False,  True,  True, False]])}
    """
    return {f"{layer}.weight": _mask(state, layer) for layer in _layers(state)}


def weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state of the model with each weight as large as it is.

    Raises:
        StateError: As :func:`masks`; or a weight was quantized as well.
    """
    found = {}
    for layer in _layers(state):
        if scale := next((name for name in state if name.startswith(f"{layer}.weight_")), None):
            given, remedy = f"{scale} beside it", "Its masks can be read; unpack its weights by what quantized them."
            allowed = "a weight that is sparse alone"
            raise StateError.of(f"{layer}.compressed", _WHERE, allowed=allowed, given=given, remedy=remedy)
        mask, values = _mask(state, layer), state[f"{layer}.compressed"]
        weight = torch.zeros(mask.shape, dtype=values.dtype)
        # bytes, as not all types can be indexed
        rows = weight.view(-1, 1).view(torch.uint8)
        rows[mask.flatten()] = values.contiguous().view(-1, 1).view(torch.uint8)
        found[f"{layer}.weight"] = weight
    parts = {f"{layer}.{part}" for layer in _layers(state) for part in (*_PARTS, "row_offsets")}
    return {**{name: value for name, value in state.items() if name not in parts}, **found}


def _layers(state: Mapping[str, Any]) -> Iterator[str]:
    names = (name.removesuffix(".bitmask") for name in state if name.endswith(".bitmask"))
    return (name for name in names if f"{name}.compressed" in state)


def _mask(state: Mapping[str, Any], layer: str) -> Tensor:
    """Unpacks the bits of a layer, whose parts are checked before anything is allocated."""
    values, bits, shape = (state.get(f"{layer}.{part}") for part in _PARTS)
    if not (isinstance(values, Tensor) and isinstance(bits, Tensor) and isinstance(shape, Tensor)):
        raise _misfit(layer, "a tensor each of " + ", ".join(_PARTS), "less")
    sizes = shape.flatten().tolist() if shape.numel() <= _MAX_AXES else []
    if shape.dtype != torch.int64 or not sizes or min(sizes) < 1:
        raise _misfit(layer, "a shape", f"{shape.dtype} of {sizes[:8]}")
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (*sizes[:-1], -(-sizes[-1] // 8)):
        raise _misfit(layer, f"bits for the shape {tuple(sizes)}", f"{bits.dtype} of shape {tuple(bits.shape)}")
    num_bytes = prod(sizes) * (1 + values.element_size())
    require_memory(num_bytes, f"{layer}.weight", _WHERE, remedy="Load it where there is more memory.")
    all_bits = np.unpackbits(bits.contiguous().numpy(), axis=-1, bitorder="little")
    mask = torch.from_numpy(np.ascontiguousarray(all_bits[..., : sizes[-1]]).astype(bool))
    num_active, num_bits = int(mask.sum()), int(all_bits.sum(dtype=np.int64))
    if num_bits != num_active:
        raise _misfit(layer, f"no bit beyond the {sizes[-1]} of a row", f"{num_bits - num_active}")
    if values.numel() != num_active:
        raise _misfit(layer, f"{num_active} values, as there are bits", f"{values.numel()}")
    if values.ndim == 2 and not _is_two_of_four(mask):
        raise _misfit(layer, "two bits in every four", "others")
    offsets = state.get(f"{layer}.row_offsets")
    counts = mask.sum(dim=-1)
    if isinstance(offsets, Tensor) and not torch.equal(offsets, counts.cumsum(0) - counts):
        raise _misfit(layer, "row_offsets that count its bits", "others")
    return mask


def _is_two_of_four(mask: Tensor) -> bool:
    return mask.numel() % 4 == 0 and bool((mask.view(-1, 4).sum(dim=1) == 2).all())


def _misfit(layer: str, allowed: str, given: str) -> StateError:
    return StateError.of(f"weight {layer}", _WHERE, allowed=allowed, given=given, remedy=_REMEDY)

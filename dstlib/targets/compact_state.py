"""How a ``state_dict`` has layers in compact storage: their values, and beside these a mask of a bit for each entry.

Shapes: O outputs, I inputs, *K kernel taps, none of a matrix; an entry of the (O, I) matrix is a whole kernel.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dstlib.errors import StateError

_MASK = "_mask"  # where the values belong


def mask_key(key: str) -> str:
    """Returns under which key the mask stands of a weight under this one.

    >>> mask_key("fc.weight")
    'fc.weight_mask'
    """
    return key + _MASK


def is_compact(state: Mapping[str, Any]) -> bool:
    """Whether a ``state_dict`` is of a model with layers in compact storage."""
    return any(_masked_names(state))


def masks_of(state: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns the masks (O, I, *K) in a ``state_dict`` of such a model, given the shapes of the plain model's weights.

    Raises:
        StateError: A mask is of a weight that has no shape, or is none for a weight of its shape.
    """
    found = {}
    for name in _masked_names(state):
        if name not in shapes:
            raise unfit(name, "the name of a weight of the plain model", "one that it does not have")
        size, taps = shapes[name][:2], shapes[name][2:]
        flat = torch.zeros(size.numel(), dtype=torch.bool)
        flat[unpack(state[mask_key(name)], size, name)] = True
        found[name] = flat.view(*size, *(1 for _ in taps)).expand(shapes[name]).contiguous()
    return found


def _masked_names(state: Mapping[str, Any]) -> Iterator[str]:
    """Yields the names of the weights that have packed masks beside them."""
    for name, bits in state.items():
        if name.endswith(_MASK) and isinstance(bits, Tensor) and bits.dtype == torch.uint8 and bits.ndim == 1:
            weight = name.removesuffix(_MASK)
            if weight in state and "weight" in weight.rpartition(".")[2]:
                yield weight


def pack(mask: Tensor) -> Tensor:
    """Packs truth values to bits, the first of eight the highest."""
    flat = mask.flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return (flat * weights).sum(dim=1, dtype=torch.uint8)


def unpack(bits: object, shape: torch.Size, name: str) -> Tensor:
    """Returns the places of the bits that are set, in rising order.

    Raises:
        StateError: It is no such mask.
    """
    num = -(-shape.numel() // 8)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (num,) or bits.is_meta:
        given = f"{bits.dtype} of shape {tuple(bits.shape)}" if isinstance(bits, Tensor) else "none"
        raise unfit(name, f"a mask beside it, {num:,} bytes", given)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    flat = (bits.cpu()[:, None] >> shifts & 1).flatten().bool()
    if bool(flat[shape.numel() :].any()):
        raise unfit(name, "no bit behind the last weight", "some")
    return flat.nonzero().flatten()


def unfit(name: str, allowed: str, given: str) -> StateError:
    """Makes an error of a weight that a ``state_dict`` has otherwise than its layer can take it."""
    remedy = "Load what the same model saved, or the state_dict of the plain model with the zeros of its masks."
    return StateError.of("weight", name, allowed=allowed, given=given, remedy=remedy)

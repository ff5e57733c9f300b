"""Masks as truth values, whatever numbers they were saved as."""

from typing import Any

import torch
from torch import Tensor

from dstlib.errors import SelectionError
from dstlib.masking.update import is_mask

_REMEDY = 'True, or 1, is active. Where a file holds weights, pass its path; for zeros that are loaded, "from-zeros".'


def as_mask(value: Any, name: str, where: str) -> Tensor:
    """Returns a mask of truth values, or of numbers that are 0 and 1, of any type and device, as truth values.

    Raises:
        SelectionError: It holds anything else.

    >>> as_mask(torch.tensor([1.0, 0.0]), "head.weight", "masks")
    tensor([ True, False])
    """
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not is_dense or (value.dtype == torch.bool and not is_mask(value)):
        given = (
            f"{value.dtype} ({value.layout}, on {value.device})" if isinstance(value, Tensor) else type(value).__name__
        )
        allowed = "a dense tensor of truth values, or of 0 and 1"
        raise SelectionError.of(f"mask {name}", where, allowed=allowed, given=given, remedy=_REMEDY)
    mask = value.detach() != 0
    if value.dtype != torch.bool and (num_odd := int((mask & (value.detach() != 1)).sum())):
        given = f"{num_odd:,} others in {value.dtype}"
        raise SelectionError.of(f"mask {name}", where, allowed="0 and 1", given=given, remedy=_REMEDY)
    return mask


def both(mask: Tensor, value: Any, name: str, where: str) -> Tensor:
    """Returns what a mask and another one of the same shape leave active.

    Raises:
        SelectionError: The other is none, or of another shape.
    """
    other = as_mask(value, name, where)
    if other.shape != mask.shape:
        allowed, remedy = f"the shape of the other mask of its weight, {tuple(mask.shape)}", "Pass one of the two."
        raise SelectionError.of(f"mask {name}", where, allowed=allowed, given=tuple(other.shape), remedy=remedy)
    return mask & other.to(mask.device)

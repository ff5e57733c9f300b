"""The soft threshold: weights shown less than they are by what their best hidden rival is, so that none jumps.

Where a hard threshold would let a weight come in at full size, the soft one lets it come in at zero.

Shapes: O out, I in, *K kernel taps; G groups, U units per group, E elements per unit.

>>> from dstlib.masking.granularity import NM
>>> weight = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
>>> soften(weight, weight.abs() > 1, NM(2, 4))
tensor([[ 2.,  0.,  0., -1.]])
"""

import torch
from torch import Tensor

from dstlib.masking.granularity import Granularity


def soften(weight: Tensor, mask: Tensor, granularity: Granularity) -> Tensor:
    """Shrinks each active unit by the mean size of the largest hidden one of its group, to no less than zero.

    Reference: Hu et al. 2024, S-STE: continuous pruning function for efficient 2:4 sparse pre-training, NeurIPS, where
    of four weights the two largest are shown less the size of the third.
    """
    size_GU, rival_G1 = _sizes(weight, mask, weight, granularity)
    return _times(weight, (size_GU - rival_G1).clamp(min=0), size_GU, granularity).masked_fill(~mask, 0.0)


def harden(shown: Tensor, mask: Tensor, hidden: Tensor, granularity: Granularity) -> Tensor:
    """Returns the active weights whose soft threshold is ``shown``, beside these hidden ones; units of zeros stay zero.

    >>> from dstlib.masking.granularity import NM
    >>> weight = torch.tensor([[3.0, -1.0, 0.5, -2.0]])
    >>> mask = weight.abs() > 1
    >>> harden(soften(weight, mask, NM(2, 4)), mask, weight, NM(2, 4))
    tensor([[ 3.,  0.,  0., -2.]])
    """
    size_GU, rival_G1 = _sizes(shown, mask, hidden, granularity)
    return _times(shown, size_GU + rival_G1, size_GU, granularity).masked_fill(~mask, 0.0)


def best_scale(weight: Tensor, soft: Tensor) -> float:
    """Returns the number that brings a softened weight nearest to the weight, in the sum of squares; 1 for zeros.

    Reference: Hu et al. 2024 (S-STE), who compute it once, at the start, for each weight.
    """
    square = float(soft.double().square().sum())
    return float((weight.double() * soft.double()).sum()) / square if square > 0 else 1.0


def _sizes(weight: Tensor, mask: Tensor, hidden: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Returns the mean size of each unit, and of the largest hidden one of its group; 0 where none is hidden."""
    active_GU = granularity.fold(mask)[..., 0]
    size_GU, hidden_GU = (granularity.fold(x.abs()).mean(dim=-1) for x in (weight, hidden))
    return size_GU, hidden_GU.masked_fill(active_GU, 0.0).amax(dim=1, keepdim=True)


def _times(weight: Tensor, above_GU: Tensor, below_GU: Tensor, granularity: Granularity) -> Tensor:
    """Multiplies each unit by a fraction, 0 where that is over 0."""
    factor_GU = torch.where(below_GU > 0, above_GU / below_GU, 0.0)
    num_elements = weight.numel() // max(factor_GU.numel(), 1)
    return weight * granularity.unfold(factor_GU[..., None].repeat(1, 1, num_elements), weight.shape)

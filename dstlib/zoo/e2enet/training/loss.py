"""The loss of the recipes: Dice plus cross-entropy, with deep supervision.

Shapes: B batch, K classes with the background, D, H, W depth, height, width in voxels, s stride of a head.
"""

from collections.abc import Sequence

from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn import functional

# Dice over the foreground plus cross-entropy over all classes, as in nnU-Net's and E2ENet's published code.
_dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)


def deep_supervision_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Computes Dice plus cross-entropy at each head, the weights halving per head and summing to 1.

    Shapes: logits (B, K, D / s, H / s, W / s), each with its own stride s; labels (B, 1, D, H, W).

    Reference: Wu et al., *E2ENet* (NeurIPS 2024): (8/15, 4/15, 2/15, 1/15) of four heads, (4/7, 2/7, 1/7) of three.

    >>> import torch
    >>> labels = torch.ones(1, 1, 2, 2, 2, dtype=torch.long)
    >>> sure = 20 * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1)
    >>> round(float(deep_supervision_loss((sure.expand(1, 2, 2, 2, 2), sure), labels)), 6)
    0.0
    """
    # "nearest" takes voxels 0, s, 2s, ..., the ones that a strided convolution is centred on.
    losses = [_dice_ce(x.float(), functional.interpolate(labels.float(), x.shape[2:], mode="nearest")) for x in logits]
    weights = [0.5**i for i in range(len(losses))]
    total: Tensor = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    return total

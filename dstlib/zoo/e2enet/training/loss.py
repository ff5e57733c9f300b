"""The loss of the recipes: Dice plus cross-entropy, with deep supervision; over classes, or regions that overlap.

Shapes: B batch, K outputs: the background and the classes, or the regions; D, H, W depth, height, width in voxels, s
stride of a head.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
from monai.losses import DiceCELoss
from torch import Tensor
from torch.nn import functional

from dstlib.zoo.e2enet.data.layouts.labels import ORDINARY, Labels

# Dice over the foreground plus cross-entropy over all classes, as in nnU-Net's and E2ENet's published code.
_dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)
_SMOOTH = 1e-5


def deep_supervision_loss(logits: Sequence[Tensor], labels: Tensor, meaning: Labels = ORDINARY) -> Tensor:
    """Computes Dice plus cross-entropy at each head, the weights halving per head and summing to 1.

    Of regions, each is one output, and the cross-entropy is binary. Voxels that are ignored count nowhere.

    Shapes: logits (B, K, D / s, H / s, W / s), each with its own stride s; labels (B, 1, D, H, W), by the numbers of
    ``meaning`` in memory.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024): (8/15, 4/15, 2/15, 1/15) of four heads, (4/7, 2/7, 1/7) of three.
    nnU-Net's losses, to which 1 is added: a perfect answer costs nothing.

    >>> labels = torch.ones(1, 1, 2, 2, 2, dtype=torch.long)
    >>> sure = 20 * torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1, 1)
    >>> round(float(deep_supervision_loss((sure.expand(1, 2, 2, 2, 2), sure), labels)), 6)
    0.0
    """
    loss = _loss_of(meaning)
    # "nearest" takes voxels 0, s, 2s, ..., the ones that a strided convolution is centred on.
    losses = [loss(x.float(), functional.interpolate(labels.float(), x.shape[2:], mode="nearest")) for x in logits]
    weights = [0.5**i for i in range(len(losses))]
    return reduce(torch.add, (w * loss for w, loss in zip(weights, losses, strict=True))) / sum(weights)


def belonging(labels: Tensor, meaning: Labels) -> Tensor:
    """Returns which voxels (B, K, D, H, W) of labels (B, 1, D, H, W) belong to each of K classes or regions.

    >>> core_and_all = Labels(values=(1, 2), regions=((2,), (1, 2)), written=(2, 1))
    >>> belonging(torch.tensor([0, 1, 2]).view(1, 1, 1, 1, 3), core_and_all).flatten(2).tolist()
    [[[False, False, True], [False, True, True]]]
    """
    return torch.cat([reduce(torch.logical_or, (labels == number for number in of)) for of in meaning.members], dim=1)


def _loss_of(meaning: Labels) -> Callable[[Tensor, Tensor], Tensor]:
    if meaning.regions is not None:
        return partial(_loss_of_regions, meaning=meaning)
    return _dice_ce if meaning.ignored is None else partial(_loss_of_classes, meaning=meaning)


def _loss_of_classes(logits: Tensor, labels: Tensor, *, meaning: Labels) -> Tensor:
    """Computes Dice over the foreground plus cross-entropy over all classes, both where nothing is ignored."""
    ignored = meaning.ignored_number
    assert ignored is not None
    counts, numbers = (labels != ignored).float(), labels[:, 0].long()
    entropy = functional.cross_entropy(logits, numbers, ignore_index=ignored, reduction="sum") / counts.sum().clamp(1)
    return _dice_loss(logits.softmax(dim=1)[:, 1:], belonging(labels, meaning).float(), counts) + entropy


def _loss_of_regions(logits: Tensor, labels: Tensor, *, meaning: Labels) -> Tensor:
    """Computes Dice plus binary cross-entropy over the regions, both where nothing is ignored."""
    truth = belonging(labels, meaning).float()
    if meaning.ignored_number is None:
        return _dice_loss(logits.sigmoid(), truth, None) + functional.binary_cross_entropy_with_logits(logits, truth)
    counts = (labels != meaning.ignored_number).float()
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, counts.expand_as(truth), reduction="sum")
    # Over the voxels, where the mean above is over voxels and regions: nnU-Net weighs it so.
    return _dice_loss(logits.sigmoid(), truth, counts) + entropy / counts.sum().clamp(1)


def _dice_loss(answer: Tensor, truth: Tensor, counts: Tensor | None) -> Tensor:
    """Computes 1 minus the mean Dice over patches and classes, of probabilities (B, K, ...); ``counts`` is 0 or 1."""
    axes = tuple(range(2, answer.ndim))
    answer, truth = (x if counts is None else x * counts for x in (answer, truth))
    sizes = answer.sum(axes) + truth.sum(axes)
    return 1 - ((2 * (answer * truth).sum(axes) + _SMOOTH) / (sizes + _SMOOTH)).mean()

"""Which classes gain by postprocessing, judged by their Dice over the validation cases."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dstlib.zoo.e2enet.evaluation.metrics import dice_per_class
from dstlib.zoo.e2enet.inference.postprocessing import keep_largest


def choose_postprocessing(
    predictions: Iterable[NDArray[np.uint8]], labels: Iterable[NDArray[np.uint8]], *, num_classes: int
) -> tuple[int, ...]:
    """Returns the classes whose mean Dice over the validation cases rises by :func:`keep_largest`.

    No other class can lose by it, as what is removed becomes background. Both may be generators: one case is
    held at a time.

    Reference: nnU-Net's choice of postprocessing, class by class; it also tries all foreground as one, first.
    """
    before, after = [], []
    everything = range(1, num_classes + 1)
    for prediction, label in zip(predictions, labels, strict=True):
        before.append(dice_per_class(label, prediction, num_classes=num_classes))
        after.append(dice_per_class(label, keep_largest(prediction, everything), num_classes=num_classes))
    gains = np.nansum(np.subtract(after, before), axis=0) if before else np.zeros(num_classes)
    return tuple(k for k, gain in zip(everything, gains, strict=True) if gain > 0)

"""How the challenges of BTCV and BraTS score what this package scores class by class.

AMOS has no entry: it ranks by Dice and NSD of each class, which every evaluation has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dstlib.zoo.e2enet.data.layouts.btcv import BTCV_ORGANS
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.regions import BRATS_REGIONS, brats_regions
from dstlib.zoo.e2enet.evaluation.metrics import Scoring
from dstlib.zoo.e2enet.evaluation.scores import Evaluation

BRATS_PENALTY = math.hypot(240, 240, 155)  # mm, the diagonal of its scans: 373.13


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """How a challenge scores: ``scoring`` of ``classes``, of which ``labels`` says what values make each."""

    name: str
    scoring: Scoring
    classes: tuple[str, ...]
    labels: Labels

    def told(self, scores: Evaluation) -> str:
        """Returns the table of its scores under a heading."""
        return f"As the challenge {self.name} scores:\n{scores.table()}"


def challenge_of(classes: Sequence[str], labels: Labels) -> Challenge | None:
    """Returns the challenge whose classes, or regions, these are; None if it is none that scores in a way of its own.

    - BTCV: Dice, mean surface distance and Hausdorff distance of each of its 13 organs.
    - BraTS: Dice and HD95 of whole tumour, tumour core and enhancing tumour, whether the network was trained on these
      or on the three classes. A region absent from label and prediction counts as found, and one absent from one of
      them with the longest distance that a scan of 240×240×155 mm has.

    Reference: Landman et al., *Multi-Atlas Labeling Beyond the Cranial Vault* (MICCAI 2015); Bakas et al.
    (arXiv:1811.02629) for BraTS, whose treatment of empty regions is that of nnU-Net's evaluation of BraTS 2020. Later
    years of BraTS score lesion by lesion instead.

    >>> found = challenge_of(("edema", "non-enhancing tumor", "enhancing tumour"), Labels.consecutive(3))
    >>> (found.name, found.classes) if found else None
    ('BraTS', ('whole tumour', 'tumour core', 'enhancing tumour'))
    """
    if tuple(classes) == BTCV_ORGANS and labels.regions is None:
        scoring = Scoring(metrics=("dice", "msd", "hd"))
        return Challenge(name="BTCV", scoring=scoring, classes=BTCV_ORGANS, labels=labels)
    are_regions = tuple(classes) == BRATS_REGIONS and labels.regions is not None
    regions = labels if are_regions else brats_regions(classes, labels)
    if regions is None:
        return None
    scoring = Scoring(metrics=("dice", "hd95"), penalty=BRATS_PENALTY)
    return Challenge(name="BraTS", scoring=scoring, classes=BRATS_REGIONS, labels=regions)

"""Prediction by a sliding window, and Dice per class.

Shapes: N cases, K foreground classes, C channels, D, H, W depth, height, width in voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from tqdm import tqdm

from dstlib.report import align
from dstlib.zoo.e2enet.data.cases import Cases
from dstlib.zoo.e2enet.network import E2ENet

DEFINITION = """\
Dice = 2 |label ∩ prediction| / (|label| + |prediction|) per class and case, then the mean over the cases.
A class absent from both has no Dice in that case and is left out; absent from one of them, its Dice is 0.
mDice is the mean over the foreground classes."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Dice of N cases and K foreground classes: ``dice`` (N, K), NaN where a class is in neither volume.

    >>> scores = Evaluation(("a", "b"), ("liver", "spleen"), np.array([[0.5, 1.0], [0.7, np.nan]]))
    >>> scores.class_dice.tolist(), scores.num_cases.tolist(), scores.mean
    ([0.6, 1.0], [2, 1], 0.8)
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    dice: NDArray[np.float64]

    @property
    def num_cases(self) -> NDArray[np.int64]:
        """(K,): how many cases have a Dice of each class."""
        return np.isfinite(self.dice).sum(axis=0)

    @property
    def class_dice(self) -> NDArray[np.float64]:
        """(K,): the mean over the cases; NaN for a class that no case has."""
        counts = self.num_cases
        return np.divide(np.nansum(self.dice, axis=0), counts, out=np.full(len(counts), np.nan), where=counts > 0)

    @property
    def mean(self) -> float:
        """mDice: the mean over the classes that some case has; NaN if there is none."""
        present = self.class_dice[self.num_cases > 0]
        return float(present.mean()) if len(present) else float("nan")

    def case_mean(self, index: int) -> float:
        """The mean over the classes that one case has; 0 if it has none."""
        present = self.dice[index][np.isfinite(self.dice[index])]
        return float(present.mean()) if len(present) else 0.0

    def table(self) -> str:
        """Class, Dice and number of cases, with the definition below."""
        rows = zip(self.classes, self.class_dice, self.num_cases, strict=True)
        cells = [(name, _number(dice), str(count)) for name, dice, count in rows]
        total = ("mDice", _number(self.mean), str(len(self.cases)))
        lines = align([("class", "Dice", "cases"), *cells, total], left=(0,))
        lines.insert(-1, lines[1])  # a rule above the total
        if absent := int(np.isnan(self.dice).sum()):
            lines.append(f"{absent} of {self.dice.size} (class, case) pairs left out: absent from both.")
        return "\n".join([*lines, DEFINITION])

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, with the value of every case; None for NaN."""
        return {
            "mean_dice": _or_none(self.mean),
            "class_dice": dict(zip(self.classes, map(_or_none, self.class_dice), strict=True)),
            "num_cases": dict(zip(self.classes, self.num_cases.tolist(), strict=True)),
            "num_left_out": int(np.isnan(self.dice).sum()),
            "cases": {
                case: dict(zip(self.classes, map(_or_none, row), strict=True))
                for case, row in zip(self.cases, self.dice, strict=True)
            },
            "definition": DEFINITION.replace("\n", " "),
        }


def dice_per_class(label: NDArray[Any], prediction: NDArray[Any], *, num_classes: int) -> NDArray[np.float64]:
    """(K,): Dice of the classes 1..``num_classes``; NaN where a class is in neither volume.

    Shapes: label and prediction alike, integers.

    >>> dice_per_class(np.array([0, 1, 1, 2]), np.array([1, 1, 1, 0]), num_classes=3)
    array([0.8, 0. , nan])
    """
    counts = [np.bincount(x.ravel(), minlength=num_classes + 1) for x in (label, prediction)]
    common = np.bincount(label[label == prediction].ravel(), minlength=num_classes + 1)
    sizes = (counts[0] + counts[1])[1 : num_classes + 1]
    overlap = 2.0 * common[1 : num_classes + 1]
    return np.divide(overlap, sizes, out=np.full(num_classes, np.nan), where=sizes > 0)


def predict(
    model: E2ENet, image_CDHW: NDArray[np.float32], *, patch_size: Sequence[int], overlap: float = 0.5
) -> NDArray[np.uint8]:
    """(D, H, W): the label of every voxel, from windows of the training patch with Gaussian weights.

    A smaller image is padded with zeros, its mean after normalisation. The model is left as it was.

    Reference: nnU-Net's and E2ENet's inference, but without mirroring; σ = patch / 8.
    """
    was_training, was_deep = model.training, model.deep_supervision
    device = next(model.parameters()).device
    model.eval()
    model.deep_supervision = False
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
            logits = sliding_window_inference(
                torch.from_numpy(image_CDHW)[None].to(device),
                roi_size=tuple(patch_size),
                sw_batch_size=2,
                predictor=model,
                overlap=overlap,
                mode="gaussian",
            )
    finally:
        model.train(was_training)
        model.deep_supervision = was_deep
    labels: NDArray[np.uint8] = logits[0].argmax(dim=0).byte().cpu().numpy()
    return labels


def evaluate(model: E2ENet, cases: Cases, *, patch_size: Sequence[int], overlap: float = 0.5) -> Evaluation:
    """Predicts every case and scores it."""
    rows = [
        dice_per_class(
            case.label,
            predict(model, case.image, patch_size=patch_size, overlap=overlap),
            num_classes=len(cases.classes),
        )
        for case in tqdm(cases.cases, desc="evaluate", unit="case")
    ]
    return Evaluation(tuple(case.name for case in cases.cases), cases.classes, np.stack(rows))


def _number(dice: float) -> str:
    return f"{dice:.3f}" if np.isfinite(dice) else "-"


def _or_none(dice: float) -> float | None:
    return float(dice) if np.isfinite(dice) else None

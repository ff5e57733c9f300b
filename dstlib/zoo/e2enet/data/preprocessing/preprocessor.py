"""From a scan as stored to what a network is trained on, and from its answer back to the scan.

A scan is turned to canonical order, cropped to what is not 0, normalised and resampled to one spacing. Shapes: C
channels, K classes with the background, D depth, H height, W width.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dstlib.bounds import require_memory
from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.data.cases import Case, Shape, Spacing, three
from dstlib.zoo.e2enet.data.preprocessing.normalization import Normalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.resampling import (
    most_probable,
    new_shape,
    resample_intensities,
    resample_slices,
)
from dstlib.zoo.e2enet.data.scans.geometry import ORIENTATION, Placement, box_around, box_shape, nonzero, uncropped
from dstlib.zoo.e2enet.data.scans.nifti import Scan


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How every scan of a data set is prepared: one value, to be saved with what was trained on it.

    - ``spacing``: in mm along the canonical (D, H, W); None keeps each scan's own.
    - ``normalization``: one per channel.
    - ``crop``: to the box around the voxels that are not 0 in every channel.

    Raises:
        SettingError: A setting is out of range.
    """

    spacing: Spacing | None
    normalization: tuple[Normalization, ...]
    crop: bool = True

    def __post_init__(self) -> None:
        sizes, where = (1.0, 1.0, 1.0) if self.spacing is None else self.spacing, "Preparation"
        holds = len(sizes) == 3 and all(math.isfinite(size) and size > 0 for size in sizes)
        allowed, remedy = "three finite numbers above 0, or None", "Pass mm along depth, height and width."
        require(holds, "spacing", where, allowed=allowed, given=self.spacing, remedy=remedy)
        allowed, remedy = "one per channel", "They are measured on the scans to train on: prepare these anew."
        require(bool(self.normalization), "normalization", where, allowed=allowed, given="none", remedy=remedy)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON reads it; :mod:`dstlib.typed_json` leads back."""
        return {
            "spacing": None if self.spacing is None else list(self.spacing),
            "normalization": [asdict(each) for each in self.normalization],
            "crop": self.crop,
        }


def prepare_image(
    image_CDHW: NDArray[np.float32], affine: NDArray[np.float64], preparation: Preparation
) -> tuple[NDArray[np.float32], Placement]:
    """Prepares a stored image as the network sees it, and says how it got there.

    The memory it takes is that of the stored image and the prepared one, and of some copies of one channel: it is
    compared with what is left before it is taken.

    Raises:
        DataError: The image has another number of channels than the preparation, the affine no direction, or the
            image asks for more memory than is left.

    Reference: nnU-Net v2's order: crop, normalise, resample. It stays in stored order, where we turn to RAS.
    """
    rules = preparation.normalization
    if image_CDHW.ndim != 4 or len(image_CDHW) != len(rules):
        allowed, given = f"({len(rules)}, D, H, W)", f"shape {image_CDHW.shape}"
        remedy = "Pass the channels that the network was trained on, in that order."
        raise DataError.of("image", "a scan", allowed=allowed, given=given, remedy=remedy)
    placement = uncropped(three(image_CDHW.shape[1:]), affine)
    is_masked = any(isinstance(rule, ZScoreNormalization) and rule.inside_mask for rule in rules)
    found = placement.turn(nonzero(image_CDHW)) if preparation.crop or is_masked else None
    box = box_around(found) if found is not None and preparation.crop else placement.box
    spacing = preparation.spacing or placement.stored_spacing
    shape = new_shape(box_shape(box), placement.stored_spacing, spacing)
    placement = replace(placement, box=box, spacing=spacing, shape=shape)
    _require_memory(placement, len(rules))
    mask = None
    if is_masked and found is not None:
        mask = ndimage.binary_fill_holes(placement.crop(found))  # a dark voxel inside the patient is of the patient
    out = np.empty((len(rules), *placement.shape), np.float32)
    for index, rule in enumerate(rules):
        # Nested: a name would keep the channel as stored alive while the normalised one is resampled.
        channel = rule.apply(np.ascontiguousarray(placement.crop(placement.turn(image_CDHW[index]))), mask)
        out[index] = resample_intensities(channel, placement.shape, placement.coarse)
    return out, placement


def _require_memory(placement: Placement, num_channels: int) -> None:
    """Refuses an image whose voxels, as they are resampled, do not fit into memory."""
    stored, box, shape = placement.stored_shape, box_shape(placement.box), placement.shape
    # Of a channel: as it is normalised, and as it goes axis by axis from one shape to the other, a coarse axis last.
    late = [
        max(old, new) if axis == placement.coarse else new
        for axis, (old, new) in enumerate(zip(box, shape, strict=True))
    ]
    copies = 2 * math.prod(box) + 3 * max(math.prod(box), math.prod(late))
    masks = math.prod(stored) + 2 * math.prod(box)
    size, voxels = "×".join(map(str, shape)), "×".join(f"{mm:.3g}" for mm in placement.stored_spacing)
    require_memory(
        4 * (num_channels * math.prod(shape) + copies) + masks,
        "memory",
        f"an image of {size} voxels",
        remedy=f"Its file says that its voxels are {voxels} mm: is that right? Else prepare it where there is more.",
        error=DataError,
    )


def prepare_label(label_DHW: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
    """Brings a stored label to the grid of its prepared image: at each voxel the class that is linearly the largest.

    Raises:
        DataError: The label has another shape than the image.

    Reference: nnU-Net resamples each class likewise, but leaves voxels to the background where none reaches one half.
    """
    if label_DHW.shape != placement.stored_shape:
        allowed, remedy = f"the shape {placement.stored_shape} of its image", "Pass the label of this very scan."
        raise DataError.of("label", "a scan", allowed=allowed, given=label_DHW.shape, remedy=remedy)
    label = np.ascontiguousarray(placement.crop(placement.turn(label_DHW)))
    if label.shape == placement.shape:
        return label
    classes = np.flatnonzero(np.bincount(label.ravel())).astype(np.uint8)
    slices = ((plane == classes[:, None, None]).astype(np.float32) for plane in label)
    out = np.empty(placement.shape, np.uint8)
    for index, values in enumerate(resample_slices(slices, three(label.shape), placement.shape, placement.coarse)):
        out[index] = classes[most_probable(values)]
    return out


def place_back(
    slices_KPQ: Iterable[NDArray[np.float32]],
    placement: Placement,
    *,
    axis: int = 0,
    decide: Callable[[NDArray[np.float32]], NDArray[np.uint8]] = most_probable,
) -> NDArray[np.uint8]:
    """Turns the class probabilities of a prepared image into a label in stored order and shape.

    They come slice by slice along an ``axis``, from its first voxel on, with the other two (P, Q) in order. They are
    resampled to the scan's own spacing, linearly as nnU-Net does, and decided upon at once, by ``decide``: so what is
    held beside the label is some slices. What was cropped away becomes background.

    Raises:
        DataError: The probabilities have another shape than the prepared image.
    """
    order = (axis, *(other for other in range(3) if other != axis))
    prepared, box = (three(sizes[i] for i in order) for sizes in (placement.shape, box_shape(placement.box)))
    coarse = None if placement.coarse is None else order.index(placement.coarse)
    canonical = np.zeros([placement.stored_shape[i] for i in placement.axes], np.uint8)
    found = resample_slices(_slices_of(prepared, slices_KPQ), prepared, box, coarse)
    for plane, values in zip(placement.crop(canonical).transpose(order), found, strict=True):
        plane[...] = decide(values)
    return np.ascontiguousarray(placement.turn_back(canonical))


def _slices_of(shape: Shape, slices_KHW: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Yields the slices of a volume (D, H, W), and refuses those of another one."""
    num = 0
    for num, values in enumerate(slices_KHW, start=1):
        if values.shape[1:] != shape[1:] or num > shape[0]:
            _refuse_slices(shape, f"{num} slices, the last one {values.shape}")
        yield values
    if num < shape[0]:
        _refuse_slices(shape, f"{num} slices")


def _refuse_slices(shape: Shape, given: str) -> NoReturn:
    allowed, remedy = f"{shape[0]} slices (K, {shape[1]}, {shape[2]})", "Pass the placement of this very image."
    raise DataError.of("probabilities", "a scan", allowed=allowed, given=given, remedy=remedy)


def prepare_scan(scan: Scan, preparation: Preparation) -> Case:
    """Prepares a labelled scan as a case to train on.

    Raises:
        DataError: The scan has no label, or other channels than the preparation.
    """
    if scan.label is None:
        remedy = "Give it one, or prepare its image alone, to predict."
        raise DataError.of("scan", f"case {scan.name!r}", allowed="one with a label", given="none", remedy=remedy)
    image, placement = prepare_image(scan.image, scan.affine, preparation)
    label = prepare_label(scan.label, placement)
    return Case(scan.name, image, label, placement.spacing, ORIENTATION)

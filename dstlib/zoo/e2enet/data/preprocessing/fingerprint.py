"""What a data set is like, measured scan after scan, and the preparation that follows from it.

Shapes: D depth, H height, W width in canonical order.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.data.cases import Shape, Spacing, three
from dstlib.zoo.e2enet.data.layouts.channels import Scheme
from dstlib.zoo.e2enet.data.preprocessing.intensities import Intensities, count_intensities, describe
from dstlib.zoo.e2enet.data.preprocessing.normalization import (
    CtNormalization,
    Normalization,
    RangeNormalization,
    ZScoreNormalization,
)
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.data.scans.geometry import MAX_ANISOTROPY, box_around, box_shape, nonzero, uncropped
from dstlib.zoo.e2enet.data.scans.nifti import Scan

MASKED_BELOW = 3 / 4  # of the image that the box takes: less, and MRI is normalised inside the patient's mask


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a data set is like, one entry per scan in the order of their names, and all intensities together.

    - ``spacings``, ``shapes``: in mm and voxels along the canonical (D, H, W), the shape within the box.
    - ``kept``: the share of the scan that the box around its non-zero voxels takes.
    - ``intensities``: of the foreground, by which a CT is normalised: 0.5 and 99.5 percentiles, mean and standard
      deviation, in which scans count alike, one entry per channel; none, if no scan has foreground.
    """

    num_channels: int
    spacings: tuple[Spacing, ...]
    shapes: tuple[Shape, ...]
    kept: tuple[float, ...]
    intensities: tuple[CtNormalization, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanFingerprint:
    """What one scan is like; ``intensities`` are those of its foreground, one entry per channel."""

    name: str
    spacing: Spacing
    shape: Shape
    kept: float
    intensities: tuple[Intensities, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what :meth:`from_json` reads."""
        return {**vars(self), "intensities": [channel.to_json() for channel in self.intensities]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ScanFingerprint":
        """Reads the fingerprint that :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: The content is damaged or foreign.
        """
        return cls(
            name=content["name"],
            spacing=three(content["spacing"]),
            shape=three(content["shape"]),
            kept=float(content["kept"]),
            intensities=tuple(map(Intensities.from_json, content["intensities"])),
        )


def scan_fingerprint(scan: Scan) -> ScanFingerprint:
    """Measures one labelled scan, within the box of its voxels that are not 0; those drawn depend on its name alone.

    Raises:
        DataError: The scan has no label, or its affine no direction.

    Reference: nnU-Net's fingerprint, which crops likewise.
    """
    if scan.label is None:
        remedy = "Measure the scans to train on."
        raise DataError.of("scan", f"case {scan.name!r}", allowed="one with a label", given="none", remedy=remedy)
    placement = uncropped(three(scan.label.shape), scan.affine)
    box = box_around(placement.turn(nonzero(scan.image)))
    inside, shape = tuple(slice(*edges) for edges in box), box_shape(box)
    foreground = placement.turn(scan.label)[inside] > 0
    seed = zlib.crc32(scan.name.encode())
    return ScanFingerprint(
        name=scan.name,
        spacing=placement.stored_spacing,
        shape=shape,
        kept=float(np.prod(shape) / scan.label.size),
        intensities=tuple(
            count_intensities(placement.turn(channel)[inside][foreground], seed=seed) for channel in scan.image
        ),
    )


def join(scans: Iterable[ScanFingerprint]) -> Fingerprint:
    """Joins the fingerprints of scans, in whichever order they come, to that of their data set.

    Raises:
        DataError: There is none.
    """
    ordered = sorted(scans, key=lambda scan: scan.name)
    allowed, remedy = "at least one", "Name the labelled scans to train on."
    require(len(ordered) > 0, "scans", "the fingerprint", allowed=allowed, given="none", remedy=remedy, error=DataError)
    channels = zip(*(scan.intensities for scan in ordered), strict=True)
    described = [describe(channel) for channel in channels]
    return Fingerprint(
        num_channels=len(described),
        spacings=tuple(scan.spacing for scan in ordered),
        shapes=tuple(scan.shape for scan in ordered),
        kept=tuple(scan.kept for scan in ordered),
        intensities=tuple(each for each in described if each is not None),
    )


def plan_preparation(fingerprint: Fingerprint, *, schemes: Sequence[Scheme]) -> Preparation:
    """Plans the preparation of a data set as nnU-Net does: spacing, cropping and, by channel, normalisation.

    A channel of CT is normalised by the foreground of the set, one by z-score by each scan, inside the patient's mask
    if the box around it takes under 3/4 of the median scan; see
    :func:`~dstlib.zoo.e2enet.data.layouts.channels.schemes_of`.

    Raises:
        DataError: CT without any foreground to measure.

    Reference: Isensee et al., *nnU-Net* (Nature Methods 2021), and its version 2 for the anisotropic rule.
    """
    assert len(schemes) == fingerprint.num_channels, schemes
    if "ct" in schemes and not fingerprint.intensities:
        given = f"none in {len(fingerprint.kept)} case(s)"
        remedy = "Check that the labels belong to these images, or pass --modality mri."
        raise DataError.of("foreground", "the training cases", allowed="a labelled voxel", given=given, remedy=remedy)
    inside_mask = bool(np.median(fingerprint.kept) < MASKED_BELOW)

    def rule(channel: int, scheme: Scheme) -> Normalization:
        if scheme == "ct":
            return fingerprint.intensities[channel]
        return ZScoreNormalization(inside_mask=inside_mask) if scheme == "zscore" else RangeNormalization(kind=scheme)

    normalization = tuple(rule(channel, scheme) for channel, scheme in enumerate(schemes))
    return Preparation(spacing=target_spacing(fingerprint), normalization=normalization)


def target_spacing(fingerprint: Fingerprint) -> Spacing:
    """Chooses the median spacing, but finer along an axis over three times as coarse, and as short, as the others.

    There it is the 10th percentile, though no finer than the other axes.

    >>> scans = dict(num_channels=1, kept=(1.0, 1.0), intensities=())
    >>> target_spacing(Fingerprint(spacings=((5.0, 1.0, 1.0), (7.0, 1.0, 1.0)), shapes=((9, 99, 99),) * 2, **scans))
    (5.2, 1.0, 1.0)
    """
    spacings = np.array(fingerprint.spacings)
    target, shape = np.median(spacings, axis=0), np.median(fingerprint.shapes, axis=0)
    coarsest = int(target.argmax())
    others = [axis for axis in range(3) if axis != coarsest]
    is_coarse = target[coarsest] > MAX_ANISOTROPY * target[others].max()
    is_short = shape[coarsest] * MAX_ANISOTROPY < shape[others].min()
    if is_coarse and is_short:
        target[coarsest] = max(np.percentile(spacings[:, coarsest], 10), target[others].max())
    return three(target.tolist())

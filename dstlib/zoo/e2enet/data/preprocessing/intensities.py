"""The intensities of a foreground: which values a channel of a scan has there, and by which a CT is normalised then.

A CT is made of whole numbers, of which some thousands tell all; of other voxels some thousands are drawn.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization

NUM_VOXELS = 1_000_000  # of one scan that are looked at
NUM_VALUES = 10_000  # that are kept of a channel of one scan
_SHARES = (0.005, 0.995)  # nnU-Net clips a CT to these


@dataclass(frozen=True, eq=False)
class Intensities:
    """Intensities of one channel of one scan: different ``values`` (N,), ascending, and how many voxels have each."""

    values: NDArray[np.float32]
    counts: NDArray[np.int32]

    def to_json(self) -> dict[str, str]:
        """Returns what :meth:`from_json` reads: base64 of the bytes, so that nothing is rounded."""
        arrays = {"values": self.values.astype("<f4"), "counts": self.counts.astype("<i4")}
        return {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Intensities":
        """Reads what :meth:`to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: The content is damaged or foreign.
        """
        values, counts = (base64.b64decode(content[name], validate=True) for name in ("values", "counts"))
        if len(values) != len(counts):
            raise ValueError(f"{len(values)} bytes of values for {len(counts)} of counts")
        return cls(
            np.frombuffer(values, "<f4").astype(np.float32, copy=False),
            np.frombuffer(counts, "<i4").astype(np.int32, copy=False),
        )


def count_intensities(voxels: NDArray[np.float32], *, seed: int) -> Intensities:
    """Counts the values of voxels (N,), or of some that are drawn where they are very many, or nearly all different.

    >>> found = count_intensities(np.array([7, -1, 7], np.float32), seed=0)
    >>> found.values.tolist(), found.counts.tolist()
    ([-1.0, 7.0], [1, 2])
    """
    for most in (NUM_VOXELS, NUM_VALUES):
        if len(voxels) > most:
            voxels = np.random.default_rng(seed).choice(voxels, most, replace=False, shuffle=False)
        values, counts = np.unique(voxels, return_counts=True)
        if len(values) <= NUM_VALUES:
            break
    return Intensities(values, counts.astype(np.int32))


def describe(scans: Sequence[Intensities]) -> CtNormalization | None:
    """Computes by what nnU-Net normalises a channel of CT, from scans that count alike; None where none has a voxel.

    Reference: nnU-Net's fingerprint, which draws as many voxels of each scan, with replacement, 10⁸ of a set: these are
    the numbers that its own come the nearer to, the more it draws.

    >>> one, other = (count_intensities(np.array(v, np.float32), seed=0) for v in ([0.0], [8.0] * 3))
    >>> describe([one, other])
    CtNormalization(low=0.0, high=8.0, mean=4.0, std=4.0)
    """
    scans = [scan for scan in scans if len(scan.values)]
    if not scans:
        return None
    values = np.concatenate([scan.values for scan in scans]).astype(np.float64)
    weights = np.concatenate([scan.counts / scan.counts.sum() for scan in scans]) / len(scans)
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    low, high = values[order][np.searchsorted(below, np.multiply(_SHARES, below[-1]))].tolist()
    mean = float(weights @ values)
    return CtNormalization(low=low, high=high, mean=mean, std=float(np.sqrt(weights @ (values - mean) ** 2)))

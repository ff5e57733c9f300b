"""Prepared cases in memory, or in memory-mapped files: what networks are trained and validated on.

Shapes: C channels, D depth (slices), H height, W width.
"""

import errno
import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import DataError, few
from dstlib.files import CONTINUE
from dstlib.zoo.e2enet.data.layouts.labels import ORDINARY, Labels
from dstlib.zoo.e2enet.data.layouts.names import refuse_repeated

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]  # mm
T = TypeVar("T")

MAX_VOXELS = 10_000  # per class that a case remembers: enough to draw from, and little to keep


def three(values: Iterable[T]) -> tuple[T, T, T]:
    """Returns three values, those along D, H and W, as a tuple that is known to have three."""
    d, h, w = values
    return d, h, w


def read_box(volume: NDArray[Any], box: Sequence[slice]) -> NDArray[Any]:
    """Returns a box of a volume (C, D, H, W).

    Of a memory-mapped one it is read from the file: a map of a file that shrinks would end the process by a signal.

    Raises:
        DataError: The file is not there any more, or has another length.

    >>> read_box(np.arange(8).reshape(1, 2, 2, 2), (slice(0, 1), slice(1, 2), slice(None), slice(1, 2))).tolist()
    [[[[5], [7]]]]
    """
    if not isinstance(volume, np.memmap):
        return volume[tuple(box)]
    channels, slices, rows, columns = (range(*b.indices(n)) for b, n in zip(box, volume.shape, strict=True))
    out = np.empty((len(channels), len(slices), len(rows), len(columns)), volume.dtype)
    if out.size == 0:
        return out
    whole_rows = np.empty((len(rows), volume.shape[3]), volume.dtype)
    try:
        with open(str(volume.filename), "rb", buffering=0) as file:
            if (given := os.fstat(file.fileno()).st_size) != volume.offset + volume.nbytes:
                raise OSError(errno.EIO, f"{given} bytes in the place of {volume.offset + volume.nbytes}")
            for c, d in np.ndindex(out.shape[:2]):
                first = np.ravel_multi_index((channels[c], slices[d], rows.start, 0), volume.shape)
                file.seek(volume.offset + int(first) * volume.itemsize)
                if file.readinto(whole_rows.data) != whole_rows.nbytes:
                    raise OSError(errno.EIO, "fewer bytes than a moment before")
                out[c, d] = whole_rows[:, columns.start : columns.stop]
    except OSError as error:
        where, allowed = f"prepared scan {volume.filename}", "what was there when it was opened"
        remedy = f"Look at the disk, then {CONTINUE}."
        raise DataError.of("file", where, allowed=allowed, given=error.strerror, remedy=remedy) from error
    return out


@dataclass(frozen=True, eq=False)
class Case:
    """One labelled volume: image (C, D, H, W), label (D, H, W), spacing in mm along (D, H, W).

    ``orientation`` names where D, H and W lead in the patient: S(uperior) or I, P(osterior) or A, L(eft) or R.
    ``labels`` says which numbers of the label make a region, and which is ignored; by default each is a class.

    Two cases are equal only if they are the same object, as arrays have no single truth value.

    Raises:
        DataError: The arrays have another type or do not fit each other.

    >>> image, label = np.zeros((1, 2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint8)
    >>> Case("a", image, label, spacing=(5.0, 0.8, 0.8)).label.shape
    (2, 3, 4)
    """

    name: str
    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    spacing: Spacing
    orientation: str = "SPL"
    labels: Labels = ORDINARY

    def __post_init__(self) -> None:
        image, label = self.image, self.label
        fits = image.ndim == 4 and image.shape[1:] == label.shape
        if not (fits and image.dtype == np.float32 and label.dtype == np.uint8):
            where, allowed = f"case {self.name!r}", "a float32 image (C, D, H, W) with a uint8 label (D, H, W)"
            given = f"{image.dtype} {image.shape} with {label.dtype} {label.shape}"
            remedy = "Convert the arrays, and give an image of one channel a leading axis."
            raise DataError.of("image and label", where, allowed=allowed, given=given, remedy=remedy)

    @cached_property
    def class_voxels(self) -> dict[int, NDArray[np.unsignedinteger]]:
        """Flat indices of the voxels of each class, or region, that the label has, ascending; at most 10,000 of one.

        Of more they are drawn at random, always the same ones. A region counts from 1, in the order of the labels.

        >>> label, labels = np.array([[[0, 2, 1, 2]]], np.uint8), Labels(values=(1, 2), ignored=3)
        >>> Case("a", np.zeros((1, 1, 1, 4), np.float32), label, (1.0,) * 3, labels=labels).class_voxels[2].tolist()
        [1, 3]
        """
        flat = self._flat_label()
        # Most voxels are background: after this one pass the classes share the few that are left.
        indices = np.flatnonzero(flat)
        numbers = flat[indices]
        present = {*np.flatnonzero(np.bincount(numbers)).tolist()} - {self.labels.ignored_number}
        found = {}
        for name, members in self._members(present).items():
            mine = np.isin(np.arange(256), members)[numbers]
            found[name] = _some(indices[mine], flat.size, seed=name)
        return found

    @cached_property
    def labelled_voxels(self) -> NDArray[np.unsignedinteger] | None:
        """Flat indices of voxels, 10,000 at most, that are not ignored; None where the set has none to ignore."""
        if self.labels.ignored_number is None:
            return None
        flat = self._flat_label()
        return _some(np.flatnonzero(flat != self.labels.ignored_number), flat.size, seed=0)

    def _flat_label(self) -> NDArray[np.uint8]:
        return read_box(self.label[None], (slice(None),) * 4).ravel()

    def _members(self, present: Collection[int]) -> dict[int, tuple[int, ...]]:
        """Returns, of each class or region that is present, the numbers that make it."""
        if self.labels.regions is None:
            return {number: (number,) for number in sorted(present)}
        regions = enumerate(self.labels.members, start=1)
        return {name: numbers for name, numbers in regions if not {*numbers}.isdisjoint(present)}


def _some(indices: NDArray[np.intp], size: int, *, seed: int) -> NDArray[np.unsignedinteger]:
    """Returns 10,000 of the indices of an array of that size, ascending, or all where there are no more."""
    if len(indices) > MAX_VOXELS:
        indices = np.sort(np.random.default_rng(seed).choice(indices, MAX_VOXELS, replace=False, shuffle=False))
    return indices.astype(np.min_scalar_type(size))


def same_images(cases: Sequence[Case]) -> tuple[tuple[str, ...], ...]:
    """Lists the names of cases that hold the same image, voxel for voxel, whatever their labels.

    Of each case one slice is read, and the others only where that is the same.

    >>> image, label = np.zeros((1, 2, 3, 4), np.float32), np.zeros((2, 3, 4), np.uint8)
    >>> cases = [Case(name, image + (name == "b"), label, (5.0, 0.8, 0.8)) for name in "abc"]
    >>> same_images(cases)
    (('a', 'c'),)
    """
    alike: dict[Any, list[Case]] = {}
    for case in cases:
        middle = case.image.shape[1] // 2
        voxels = read_box(case.image, (slice(None), slice(middle, middle + 1), slice(None), slice(None)))
        alike.setdefault((case.image.shape, hashlib.sha256(voxels.tobytes()).digest()), []).append(case)
    return tuple(names for group in alike.values() if len(group) > 1 for names in _same(group))


def _same(cases: Sequence[Case]) -> list[tuple[str, ...]]:
    """Parts cases, of one shape, into those that hold the same image; leaves out those that are alone."""
    found: dict[bytes, list[str]] = {}
    for case in cases:
        digest = hashlib.sha256()
        for d in range(case.image.shape[1]):
            digest.update(read_box(case.image, (slice(None), slice(d, d + 1), slice(None), slice(None))).tobytes())
        found.setdefault(digest.digest(), []).append(case.name)
    return [tuple(sorted(names)) for names in found.values() if len(names) > 1]


@dataclass(frozen=True, eq=False)
class Cases:
    """A data set: its cases, what its channels show, and its foreground classes, or regions.

    Raises:
        DataError: Two cases share a name, or a case has another number of channels than the set.
    """

    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        where = f"data set {self.name!r}"
        names, remedy = [case.name for case in self.cases], "Rename or remove the copies: folds are drawn over names."
        refuse_repeated(names, "case names", where, allowed="one case per name", remedy=remedy)
        num_channels = len(self.channels)
        if odd := [f"{len(case.image)} in {case.name}" for case in self.cases if len(case.image) != num_channels]:
            allowed = f"{num_channels} per case ({', '.join(self.channels)})"
            remedy = "Give every case the same channels in the same order."
            raise DataError.of("channels", where, allowed=allowed, given=few(odd), remedy=remedy)

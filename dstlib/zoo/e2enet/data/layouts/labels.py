"""What the values of label files mean: classes, regions that overlap, and what is ignored.

A file has whatever values its data set chose: BraTS has 1, 2 and 4. In memory they are numbered 1 to V without gaps, 0
is the background, and V + 1 what is ignored. Files are written in the values of the set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dstlib.errors import DataError, require

MAX_VALUE = 255  # a label is a byte

Values = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What the values of label files mean.

    - ``values``: those of the foreground, ascending.
    - ``regions``: what a network predicts, each a set of values, and scores are kept of; None where each value is a
      class of its own. Regions may overlap, as a tumour's core and the whole of it do.
    - ``written``: the value that each region is written as, in this order: later regions on top of earlier ones.
    - ``ignored``: the value of voxels that nobody has labelled; no network predicts it.

    Raises:
        DataError: A value is none of a byte, two mean the same, or a region is written as a value that is none of its.

    Reference: nnU-Net's ``labels`` and ``regions_class_order``.

    >>> brats = Labels(values=(1, 2, 4), regions=((1, 2, 4), (1, 4), (4,)), written=(2, 1, 4))
    >>> brats.num_classes, brats.num_outputs, brats.members
    (3, 3, ((1, 2, 3), (1, 3), (3,)))
    >>> brats.to_values(np.array([0, 3], np.uint8)).tolist()
    [0, 4]
    """

    values: Values
    regions: tuple[Values, ...] | None = None
    written: Values = ()
    ignored: int | None = None

    def __post_init__(self) -> None:
        where, values = "labels of a data set", self.values
        known = (*values, *(() if self.ignored is None else (self.ignored,)))
        holds = values == tuple(sorted(set(values))) and len(set(known)) == len(known)
        holds = holds and all(type(value) is int and 1 <= value <= MAX_VALUE for value in known)
        allowed = f"different whole numbers from 1 to {MAX_VALUE}, ascending, and another one to ignore"
        given, remedy = f"{values}, and {self.ignored} to ignore", "Number the values of the label files so."
        require(holds, "values", where, allowed=allowed, given=given, remedy=remedy, error=DataError)
        regions, written = self.regions or (), self.written
        holds = self.regions != () and len(written) == len(regions) and {*values}.issuperset(sum(regions, ()))
        holds = holds and all(value in region for value, region in zip(written, regions, strict=True))
        allowed = f"sets of the values {', '.join(map(str, values))}, and one value of each to write it as"
        given = f"{self.regions}, written as {written}"
        remedy = "Give 'regions_class_order' a value for each region, in the order of 'labels'."
        require(holds, "regions", where, allowed=allowed, given=given, remedy=remedy, error=DataError)

    @staticmethod
    def consecutive(num_classes: int) -> "Labels":
        """Returns the labels of an ordinary set: each of the values 1 to ``num_classes`` is a class.

        >>> Labels.consecutive(2)
        Labels(values=(1, 2), regions=None, written=(), ignored=None)
        """
        return Labels(values=tuple(range(1, num_classes + 1)))

    @property
    def is_plain(self) -> bool:
        """Whether each value is a class of its own, and none is ignored."""
        return self.regions is None and self.ignored is None

    @property
    def num_classes(self) -> int:
        """How many classes, or regions, scores are kept of."""
        return len(self.values) if self.regions is None else len(self.regions)

    @property
    def num_outputs(self) -> int:
        """How many channels a network answers with: one per region, or the background and one per class."""
        return len(self.values) + 1 if self.regions is None else len(self.regions)

    @property
    def members(self) -> tuple[Values, ...]:
        """The numbers, in memory, that make each class or region."""
        regions = [(value,) for value in self.values] if self.regions is None else self.regions
        return tuple(tuple(sorted(self.values.index(value) + 1 for value in set(region))) for region in regions)

    @property
    def ignored_number(self) -> int | None:
        """The number, in memory, of what is ignored: one above the highest of the others, as nnU-Net has it."""
        return None if self.ignored is None else len(self.values) + 1

    @cached_property
    def in_files(self) -> NDArray[np.uint8]:
        """The values that label files may have, by their numbers: 0, the foreground's, what is ignored."""
        return np.array([0, *self.values, *(() if self.ignored is None else (self.ignored,))], np.uint8)

    @property
    def written_numbers(self) -> Values:
        """The number, in memory, that each region is written as."""
        return tuple(self.values.index(value) + 1 for value in self.written)

    def to_values(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turns numbers in memory into the values of files; the same array where they are the same."""
        return label if self._is_numbered else self.in_files[label]

    def to_numbers(self, voxels: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """Turns values of files into numbers in memory; None where one of them means nothing.

        >>> Labels(values=(1, 2, 4)).to_numbers(np.array([0, 4], np.uint8)).tolist()
        [0, 3]
        """
        if self._is_numbered:
            return voxels if voxels.max(initial=0) < len(self.in_files) else None
        numbers, known = np.zeros(MAX_VALUE + 1, np.uint8), np.zeros(MAX_VALUE + 1, bool)
        numbers[self.in_files], known[self.in_files] = np.arange(len(self.in_files)), True
        return numbers[voxels] if known[voxels].all() else None

    def unsaid(self) -> list[tuple[int, Values, Values]]:
        """Lists values that no prediction writes for their regions, these, and those of the value that it writes.

        Regions count from 0.

        >>> Labels(values=(1, 2, 3), regions=((1, 3), (2, 3)), written=(1, 2)).unsaid()
        [(3, (0, 1), (1,))]
        """
        regions, found = self.regions or (), []
        of = {value: tuple(k for k, region in enumerate(regions) if value in region) for value in self.values}
        for value, wanted in of.items():
            said = of[self.written[wanted[-1]]] if wanted else ()
            if said != wanted:
                found.append((value, wanted, said))
        return found

    def notes(self, names: Sequence[str]) -> list[str]:
        """Says what is predicted and what is ignored, where it is not each value as a class of its own.

        >>> Labels(values=(1, 2), regions=((1, 2), (2,)), written=(1, 2), ignored=3).notes(["all", "core"])
        ['regions are predicted: all (1, 2) and core (2), later ones on top', 'voxels of value 3 are ignored']
        """
        regions = zip(names, self.regions or (), strict=self.regions is not None)
        listed = " and ".join(f"{name} ({', '.join(map(str, region))})" for name, region in regions)
        said = [f"regions are predicted: {listed}, later ones on top"] if self.regions else []
        return said if self.ignored is None else [*said, f"voxels of value {self.ignored} are ignored"]

    def told(self) -> str:
        """Lists the values that label files may have.

        >>> Labels.consecutive(15).told(), Labels(values=(1, 2, 4), ignored=255).told()
        ('0 to 15', '0, 1, 2, 4, and 255 to ignore')
        """
        values = [0, *self.values]
        has_gaps = values[-1] != len(self.values)
        text = ", ".join(map(str, values)) if has_gaps else f"0 to {values[-1]}"
        return text if self.ignored is None else f"{text}, and {self.ignored} to ignore"

    @property
    def _is_numbered(self) -> bool:
        """Whether the values of files are the numbers in memory."""
        return bool((self.in_files == np.arange(len(self.in_files))).all())


ORDINARY = Labels(values=())
"""Labels of which nothing was said: each number is a class of its own, and nothing is ignored."""

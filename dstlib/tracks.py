"""One layer's past: integers per mask update, and what has ever been active. Knows tensors, no controller."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dstlib.masking import MaskUpdate

_FIRST = 3  # a mark: 0 never active, 1 was active at some time, 3 also in the first mask


class Change(NamedTuple):
    """One mask update of one layer in whole numbers, entries of the mask; the first is the mask at attachment.

    ``explored`` entries have been active at some time, ``from_first`` are active now and were in the first
    mask. ``dead_outputs`` have no active input, ``dead_inputs`` are read by no output.
    """

    step: int
    active: int
    dropped: int
    grown: int
    explored: int
    from_first: int
    dead_outputs: int
    dead_inputs: int


@dataclass(frozen=True, eq=False)
class DeadChannels:
    """Outputs without an active input, (O,), and inputs that no output reads, (I,); True = dead.

    Of a grouped convolution, inputs are places within a group, shared by all groups, as its weight has them.
    """

    outputs: Tensor
    inputs: Tensor


def dead_channels(mask_OIK: Tensor) -> DeadChannels:
    """The dead channels of one mask, (O, I, *K).

    >>> dead = dead_channels(torch.tensor([[True, False], [False, False]]))
    >>> dead.outputs, dead.inputs
    (tensor([False,  True]), tensor([False,  True]))
    """
    live_OI = mask_OIK.flatten(2).any(dim=2) if mask_OIK.dim() > 2 else mask_OIK
    return DeadChannels(outputs=~live_OI.any(dim=1), inputs=~live_OI.any(dim=0))


def explored_by_chance(density: float, drop_fractions: Iterable[float]) -> float:
    """The explored share of a layer to expect of random growth, for one drop fraction per update.

    Of n entries A = d·n are active, and an update grows k = f·A of the n - A + k that it did not keep, all
    alike. An entry that was never active is one of them, so it stays unseen with probability 1 - q for
    q = k / (n - A + k) = f·d / (1 - d + f·d), whatever the drop criterion is and whatever came before. Exact
    for whole k: as an update drops floor(f·A), pass floor(f·A) / A where the difference matters.

    Reference: the share is R_s of Liu et al. 2021 (ITOP); the closed form is ours, and benchmarks/explored.py
    measures it.

    >>> round(explored_by_chance(0.1, [0.3] * 10), 4)
    0.3516
    """
    unseen = 1 - density
    for fraction in drop_fractions if unseen else ():
        unseen *= (1 - density) / (1 - density + fraction * density)
    return 1 - unseen


class Track:
    """What is kept of one layer: integers per update, and one byte per weight."""

    def __init__(self, mask: Tensor, step: int) -> None:
        self.marks = mask.to(torch.uint8) * _FIRST
        self._numbers = array("q")  # a change after the other
        self._note(mask, torch.zeros_like(mask), torch.zeros_like(mask), step)

    def record(self, update: MaskUpdate, step: int) -> None:
        """Adds a mask update."""
        self.marks = self.marks.to(update.mask.device)
        # also what was dropped: a mask that was loaded in between counts as seen; True is the mark 1
        self.marks |= update.mask | update.dropped
        self._note(update.mask, update.dropped, update.grown, max(step, self.last.step))

    @property
    def changes(self) -> NDArray[np.int64]:
        """(updates + 1, fields of :class:`Change`)."""
        return np.array(self._numbers, dtype=np.int64).reshape(-1, len(Change._fields))

    @property
    def last(self) -> Change:
        """The latest."""
        return Change(*self._numbers[-len(Change._fields) :])

    def replace(self, changes: Tensor, marks: Tensor) -> None:
        """Takes what another track has kept."""
        self._numbers = array("q", changes.flatten().tolist())
        self.marks = marks.to(self.marks.device, copy=True)

    def _note(self, mask: Tensor, dropped: Tensor, grown: Tensor, step: int) -> None:
        dead = dead_channels(mask)
        from_first = mask & (self.marks == _FIRST)
        counted = (mask, dropped, grown, self.marks != 0, from_first, dead.outputs, dead.inputs)
        self._numbers.extend(
            [step, *torch.stack([x.count_nonzero() for x in counted]).tolist()]
        )  # one wait for the device

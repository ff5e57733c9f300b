"""Which connections of a layer exist, in the order in which the kernels walk them.

Shapes: O output channels, C input channels, A active connections.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Connections:
    """The active connections of an (O, C) mask, row by row.

    ``rows`` (O + 1) and ``cols`` (A) are compressed rows in int32; ``index`` (A) in int64 says which connection of
    the flattened (O, C) matrix each one is, so ``weight.reshape(O * C, -1)[index]`` are the weights to hand over.

    >>> both = Connections.of(torch.tensor([[True, False, True], [False, False, False]]))
    >>> both.rows.tolist(), both.cols.tolist(), both.index.tolist()
    ([0, 2, 2], [0, 2], [0, 2])
    >>> both.transposed.rows.tolist(), both.transposed.cols.tolist(), both.transposed.index.tolist()
    ([0, 1, 1, 2], [0, 0], [0, 2])
    """

    rows: Tensor
    cols: Tensor
    index: Tensor
    size: tuple[int, int]  # O, C

    @classmethod
    def of(cls, mask_OC: Tensor) -> "Connections":
        """The connections where the mask (O, C) is True."""
        outputs, inputs = mask_OC.shape
        index = mask_OC.flatten().nonzero().flatten()
        return cls(_rows(mask_OC.sum(dim=1)), (index % inputs).int(), index, (outputs, inputs))

    @cached_property
    def transposed(self) -> "Connections":
        """The same connections column by column; ``index`` still counts in the (O, C) matrix, row by row."""
        outputs, inputs = self.size
        row, col = self.index // inputs, self.index % inputs
        order = (col * outputs + row).argsort()
        rows = _rows(torch.bincount(col, minlength=inputs))
        return Connections(rows, row[order].int(), self.index[order], (inputs, outputs))

    @property
    def num_active(self) -> int:
        """A, the number of active connections."""
        return self.index.numel()


def _rows(counts: Tensor) -> Tensor:
    """Where each row begins, and where the last one ends, from how many connections each has."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()

"""The active weights of a linear layer in the order in which the kernels take them.

Shapes: O outputs, I inputs of the layer; A active weights; R neighbouring rows that have the same active columns, found
by looking at the mask (4 for blocks of 16 × 16, 1 for scattered weights); U = A / R columns of such groups of rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dstlib.errors import require

PART = 96  # outputs that are computed together: their sums stay in the first cache. LINEAR_PART of csrc/linear.h
STRETCH = 160  # inputs that are read together: for 64 samples about as large as the first cache. LINEAR_STRETCH there
MOST_WEIGHTS = 2**31 - 1  # what an int32 can number


@dataclass(frozen=True, eq=False)
class LinearPattern:
    """Which weights of an (O, I) matrix are active.

    ``col_idx`` (U) are their inputs and ``index`` (A) says where each of them lies in the flattened matrix.
    ``segments`` (S, 3) are the stretches of ``col_idx`` that belong to one group of rows: group, begin, end. They are
    ordered by ``part_ptr`` (P + 1) of the outputs, then by stretches of the inputs, then by length.

    >>> diagonal = LinearPattern.of(torch.eye(3, dtype=torch.bool))
    >>> diagonal.col_idx.tolist(), diagonal.index.tolist(), diagonal.segments.tolist()
    ([0, 1, 2], [0, 4, 8], [[0, 0, 1], [1, 1, 2], [2, 2, 3]])
    >>> blocks = LinearPattern.of(torch.eye(2, dtype=torch.bool).repeat_interleave(4, 0).repeat_interleave(4, 1))
    >>> blocks.rows_per_group, blocks.segments.tolist()
    (4, [[0, 0, 4], [1, 4, 8]])
    """

    col_idx: Tensor
    index: Tensor
    segments: Tensor
    part_ptr: Tensor
    rows_per_group: int
    size: tuple[int, int]  # O, I

    @classmethod
    def of(cls, mask_OI: Tensor) -> "LinearPattern":
        """Returns the pattern of a mask (O, I).

        Raises:
            SettingError: The matrix has 2³¹ entries or more.
        """
        require(
            mask_OI.numel() <= MOST_WEIGHTS,
            "weights",
            "a sparse linear layer",
            allowed=f"≤ {MOST_WEIGHTS}",
            given=mask_OI.numel(),
            remedy="Split the layer, or leave it dense.",
        )
        with torch.inference_mode(False):  # it may be made there, and serve a training later
            return ordered(mask_OI.cpu())

    @cached_property
    def transposed(self) -> "LinearPattern":
        """The same weights as a matrix (I, O); its ``index`` counts in the values ordered as this pattern says."""
        with torch.inference_mode(False):
            numbers = torch.full((self.size[0] * self.size[1],), -1, dtype=torch.int32)
            numbers[self.index] = torch.arange(self.index.numel(), dtype=torch.int32)
            numbers_IO = numbers.view(self.size).t().contiguous()
            return ordered(numbers_IO >= 0, numbers_IO)

    @property
    def tensors(self) -> list[Tensor]:
        """``col_idx``, ``index``, ``segments`` and ``part_ptr``."""
        return [self.col_idx, self.index, self.segments, self.part_ptr]

    @property
    def num_active(self) -> int:
        """A, the number of active weights."""
        return self.index.numel()


def ordered(mask_OI: Tensor, numbers_OI: Tensor | None = None, rows: int | None = None) -> LinearPattern:
    """Orders the weights; ``numbers`` says where each lies, by default in the flattened matrix.

    ``rows`` are those that are taken together, which have to be alike; by default as many as are.
    """
    outputs, inputs = mask_OI.shape
    rows = rows or next(rows for rows in (4, 3, 2, 1) if are_alike(mask_OI, rows))
    group, col = mask_OI[::rows].nonzero(as_tuple=True)
    num_stretches = -(-inputs // STRETCH)
    lengths = (group * num_stretches + col // STRETCH).bincount(minlength=outputs // rows * num_stretches)
    begins = lengths.cumsum(0) - lengths
    filled = lengths.nonzero().flatten()
    part, stretch = filled // num_stretches * rows // PART, filled % num_stretches
    filled = filled[((part * num_stretches + stretch) * (STRETCH + 1) + lengths[filled]).argsort(stable=True)]
    lengths = lengths[filled]
    ends = lengths.cumsum(0)
    order = torch.arange(col.numel()) + (begins[filled] - ends + lengths).repeat_interleave(lengths)
    group, col = group[order], col[order]
    source = ((group[:, None] * rows + torch.arange(rows)) * inputs + col[:, None]).flatten()
    if numbers_OI is not None:
        source = numbers_OI.flatten()[source]
    segments = torch.stack([filled // num_stretches, ends - lengths, ends], dim=1)
    parts = torch.searchsorted(part, torch.arange(-(-outputs // PART) + 1))
    return LinearPattern(col.int(), source.int(), segments.int(), parts.int(), rows, (outputs, inputs))


def are_alike(mask_OI: Tensor, rows: int) -> bool:
    """Whether so many neighbouring rows are alike throughout the mask, to be computed together."""
    outputs, inputs = mask_OI.shape
    if outputs % rows:
        return False
    mask_GRI = mask_OI.reshape(outputs // rows, rows, inputs)
    return torch.equal(mask_GRI[:, 1:], mask_GRI[:, :-1])

"""Which kernels of a layer are active, in the order in which the engine walks them; the weight that has them.

Shapes: O output channels, C input channels, A active kernels.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dstlib.engine.ops.prepared import PreparedCall, PreparedCalls


@dataclass(frozen=True, eq=False)
class Pattern:
    """The active kernels of an (O, C) mask as a sparse matrix, row by row.

    ``row_ptr`` (O + 1) and ``col_idx`` (A) are compressed rows in int32; ``index`` (A) in int64 says which kernel of
    the flattened (O, C) matrix each one is, so ``weight.reshape(O * C, -1)[index]`` are the values.

    >>> both = Pattern.of(torch.tensor([[True, False, True], [False, False, False]]))
    >>> both.row_ptr.tolist(), both.col_idx.tolist(), both.index.tolist()
    ([0, 2, 2], [0, 2], [0, 2])
    >>> both.transposed.row_ptr.tolist(), both.transposed.col_idx.tolist(), both.transposed.index.tolist()
    ([0, 1, 1, 2], [0, 0], [0, 2])
    """

    row_ptr: Tensor
    col_idx: Tensor
    index: Tensor
    size: tuple[int, int]  # O, C

    @classmethod
    def of(cls, mask_OC: Tensor) -> "Pattern":
        """Returns the pattern of a mask (O, C)."""
        with torch.inference_mode(False):  # it may be made there, and serve a training later
            return cls._of(mask_OC)

    @classmethod
    def of_compact(cls, places: Tensor, size: tuple[int, int]) -> "Pattern":
        """Returns the pattern of a weight (A, *taps) that holds its active kernels alone, row by row.

        They lie at these places of the flattened (O, C) matrix, in rising order; ``index`` counts in them.

        >>> pattern = Pattern.of_compact(torch.tensor([1, 2, 3]), (2, 2))
        >>> pattern.index.tolist(), pattern.transposed.index.tolist(), pattern.places().tolist()
        ([0, 1, 2], [1, 0, 2], [1, 2, 3])
        """
        outputs, inputs = size
        with torch.inference_mode(False):
            row_ptr = _row_ptr(torch.bincount(places // inputs, minlength=outputs))
            return cls(row_ptr, (places % inputs).int(), torch.arange(len(places), device=places.device), size)

    @classmethod
    def _of(cls, mask_OC: Tensor) -> "Pattern":
        outputs, inputs = mask_OC.shape
        index = mask_OC.flatten().nonzero().flatten()
        return cls(_row_ptr(mask_OC.sum(dim=1)), (index % inputs).int(), index, (outputs, inputs))

    @cached_property
    def transposed(self) -> "Pattern":
        """The same kernels column by column; ``index`` still counts in the (O, C) matrix, row by row."""
        outputs, inputs = self.size
        with torch.inference_mode(False):
            row, col = rows_of(self.row_ptr, self.col_idx), self.col_idx.long()
            order = (col * outputs + row).argsort()
            row_ptr = _row_ptr(torch.bincount(col, minlength=inputs))
            return Pattern(row_ptr, row[order].int(), self.index[order], (inputs, outputs))

    def places(self) -> Tensor:
        """Returns where in the flattened (O, C) matrix each active kernel lies, (A)."""
        return rows_of(self.row_ptr, self.col_idx) * self.size[1] + self.col_idx

    def rising(self) -> tuple[Tensor, Tensor]:
        """Returns the places, which are in rising order, (A), and where the value of each lies, (A), in int32."""
        places = self.places().int()
        return places, torch.arange(len(places), dtype=torch.int32, device=places.device)

    def to(self, device: torch.device) -> "Pattern":
        """Returns the pattern on a device."""
        row_ptr, col_idx, index = (x.to(device) for x in self.tensors)
        return Pattern(row_ptr, col_idx, index, self.size)

    @property
    def tensors(self) -> list[Tensor]:
        """``row_ptr``, ``col_idx`` and ``index``."""
        return [self.row_ptr, self.col_idx, self.index]

    @property
    def num_active(self) -> int:
        """A, the number of active kernels."""
        return self.index.numel()


@dataclass(frozen=True, eq=False)
class Weights:
    """The weight of a convolution, contiguous, its bias (O) or None, and which of its kernels are active.

    Shapes: O output channels, C input channels; the weight is (O, C, kh, kw) or (O, C, 1, kh, kw), of a transposed
    convolution (C, O, d, h, w); patterns are (O, C). One that ``is_compact`` is (A, *taps), see
    :meth:`Pattern.of_compact`. ``graded`` are the kernels whose gradient is wanted: the active
    ones, or all where a criterion reads them. Keep this value for as long as these stay the same: it knows prepared
    calls.
    """

    weight: Tensor
    bias: Tensor | None
    active: Pattern
    graded: Pattern
    calls: PreparedCalls[PreparedCall | None] = field(default_factory=PreparedCalls, repr=False)
    is_compact: bool = False

    @property
    def size(self) -> tuple[int, ...]:
        """(O, C) where the shape of the weight does not tell them."""
        return self.active.size if self.is_compact else ()


def rows_of(row_ptr: Tensor, col_idx: Tensor) -> Tensor:
    """Returns the row of each entry of compressed rows, (A) in int64."""
    rows = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    return rows.repeat_interleave(row_ptr.diff(), output_size=len(col_idx))


def _row_ptr(counts: Tensor) -> Tensor:
    """Returns where each row begins, and where the last one ends, from how many kernels each has."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()

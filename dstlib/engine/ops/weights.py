"""The weight of a sparse convolution, as a layer hands it over."""

from dataclasses import dataclass, field

from torch import Tensor

from dstlib.engine.ops.patterns import Pattern
from dstlib.engine.ops.prepared import PreparedCall, PreparedCalls


@dataclass(frozen=True, eq=False)
class Weights:
    """The weight of a convolution, contiguous, its bias (O) or None, and which of its kernels are active.

    Shapes: O output channels, C input channels; the weight is (O, C, kh, kw) or (O, C, 1, kh, kw), of a transposed
    convolution (C, O, d, h, w); patterns are (O, C). ``graded`` are the kernels whose gradient is wanted: the active
    ones, or all where a criterion reads them. Keep this value for as long as these stay the same: it knows prepared
    calls.
    """

    weight: Tensor
    bias: Tensor | None
    active: Pattern
    graded: Pattern
    calls: PreparedCalls[PreparedCall | None] = field(default_factory=PreparedCalls, repr=False)

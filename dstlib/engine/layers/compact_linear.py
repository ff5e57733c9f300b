"""Linear layers that hold their active weights only."""

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dstlib.engine.layers.active_matrix import ActiveMatrix, product
from dstlib.engine.layers.compact_layer import CompactLayer


class CompactLinear(CompactLayer, nn.Linear):
    """An ``nn.Linear`` whose parameter ``weight`` (A) are its active values alone, made by ``make_compact()``."""

    kind = ActiveMatrix

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) → (..., O). What records a pass sees the plain layer's operation, on a weight with zeros."""
        return self.alone(product, self, "weight", input, self.bias)


class CompactOutProjection(CompactLinear, NonDynamicallyQuantizableLinear):
    """The ``out_proj`` of an attention in compact storage, whose weights torch's attention would read by itself."""

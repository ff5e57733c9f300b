"""Everything behind :func:`dstlib.sparsify`: the only room that changes a model or an optimizer."""

from dstlib.sparsifier.api import sparsify
from dstlib.sparsifier.parameter_groups import density_groups
from dstlib.sparsifier.sparsifier import Sparsifier

__all__ = ["Sparsifier", "density_groups", "sparsify"]

"""Matrix views: the matrices within a parameter, each to compete for itself, so that no neighbour starves it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from torch import Size, Tensor, nn

# Linear layers that hold several projections one above the other, by the last part of their name, lower case.
# Not "query_key_value" (GPT-NeoX, BLOOM, Falcon, Persimmon): its rows alternate between the three, head by head.
_FUSED = {
    "qkv": ("qkv", "to_qkv", "qkv_proj", "in_proj", "in_proj_qkv", "wqkv", "c_attn", "w_pack"),
    "kv": ("kv", "to_kv", "kv_proj", "wkv", "c_attn"),
    "qk": ("qk", "to_qk", "qk_proj", "wqk"),
}
# Owners of a layer of such a name whose rows alternate head by head all the same: no range of rows is the queries.
_ALTERNATING = (
    "timm.models.tiny_vit.Attention",
    "timm.models.maxxvit.AttentionCl",
    "lightglue.SelfBlock",
    ".CodeGenAttention",
    ".DisentangledSelfAttention",
    ".GPTBigCodeAttention",
)


@dataclass(frozen=True)
class MatrixView:
    """A matrix within a parameter, turned to (O, I, *K): outputs, inputs, kernel taps.

    ``at`` says which of several that lie behind one another along the first axes; ``rows`` are its outputs and
    ``columns`` its inputs, from and up to, after it was turned; None: all of them.
    """

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    at: tuple[int, ...] = ()
    columns: tuple[int, int] | None = None

    def of(self, x: Tensor) -> Tensor:
        """Returns this matrix of ``x``, a tensor of the parameter's shape, sharing its memory."""
        matrix = x[self.at] if self.at else x
        matrix = matrix.transpose(0, 1) if self.transposed else matrix
        matrix = matrix if self.rows is None else matrix[slice(*self.rows)]
        return matrix if self.columns is None else matrix[:, slice(*self.columns)]


def stacked(name: str, shape: Size, *, transposed: bool) -> tuple[MatrixView, ...]:
    """Returns the views of matrices that lie behind one another, (*, O, I), or (*, I, O) where they are transposed.

    >>> [(view.name, view.at) for view in stacked("experts.up", Size((2, 4, 8)), transposed=False)]
    [('experts.up.0', (0,)), ('experts.up.1', (1,))]
    """
    places = product(*map(range, shape[:-2]))
    return tuple(MatrixView(".".join((name, *map(str, at))), transposed=transposed, at=at) for at in places)


def chunks(name: str, parts: Iterable[object], num_rows: int, *, transposed: bool = False) -> tuple[MatrixView, ...]:
    """Returns the views of matrices of equal height that are stacked in one parameter, or side by side if transposed.

    >>> [view.rows for view in chunks("qkv.weight", "qkv", 12)]
    [(0, 4), (4, 8), (8, 12)]
    """
    names = [f"{name}.{part}" for part in parts]
    height = num_rows // len(names)
    assert height * len(names) == num_rows, "rows left over"
    return tuple(MatrixView(n, (i * height, (i + 1) * height), transposed) for i, n in enumerate(names))


def transposed_groups(name: str, num_groups: int, num_in: int) -> tuple[MatrixView, ...]:
    """Returns the views of the groups of a transposed convolution, each of inputs of its own, or of its only one.

    >>> [(view.name, view.columns) for view in transposed_groups("up.weight", 2, 8)]
    [('up.weight.0', (0, 4)), ('up.weight.1', (4, 8))]
    """
    if num_groups == 1:
        return (MatrixView(name, transposed=True),)
    size = num_in // num_groups
    spans = ((i * size, (i + 1) * size) for i in range(num_groups))
    return tuple(MatrixView(f"{name}.{i}", transposed=True, columns=span) for i, span in enumerate(spans))


def fused_parts(module_name: str, weight: Tensor, owner: nn.Module | None) -> str:
    """Returns the projections that a linear layer of this name holds, a letter each, or "" where it holds one.

    ``weight`` is (O, I). Only those of equal height, each as high as the layer is wide: grouped queries, which are
    higher than their keys, stay joint, and so do layers whose rows alternate between the projections.

    >>> import torch
    >>> fused_parts("blocks.0.attn.qkv", torch.empty(24, 8), None), fused_parts("attn.qkv", torch.empty(16, 8), None)
    ('qkv', '')
    """
    cls = type(owner)
    if f"{cls.__module__}.{cls.__qualname__}".endswith(_ALTERNATING):
        return ""
    last = module_name.rpartition(".")[2].lower()
    fits = (parts for parts, names in _FUSED.items() if last in names and len(weight) == len(parts) * weight.shape[1])
    return next(fits, "")

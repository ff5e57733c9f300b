"""Matrix views: the matrices within a parameter, each to compete for itself, so that no neighbour starves it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from torch import Size, Tensor


@dataclass(frozen=True)
class MatrixView:
    """A matrix within a parameter, turned to (O, I, *K): outputs, inputs, kernel taps.

    ``at`` says which of several it is that lie along other axes: a place on each of those, None on its own two and
    those of the taps; axes at the end may be left out. ``rows`` are its outputs and ``columns`` its inputs, from and
    up to, after it was turned; None: all of them. Where outputs alternate, ``rows`` are those of each ``every``.
    """

    name: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    at: tuple[int | None, ...] = ()
    columns: tuple[int, int] | None = None
    every: int | None = None

    def of(self, x: Tensor) -> Tensor:
        """Returns this matrix of ``x``, a tensor of the parameter's shape, to be read.

        A copy where rows alternate, a view elsewhere: what is to change goes by ``write``.
        """
        return self.parts(x).flatten(0, 1) if self.every else self.parts(x)

    def write(self, x: Tensor, matrix: Tensor) -> None:
        """Writes this matrix into ``x``, a tensor of the parameter's shape."""
        parts = self.parts(x)
        parts.copy_(matrix.unflatten(0, parts.shape[:2]) if self.every else matrix)

    def write_where(self, x: Tensor, where: Tensor, matrix: Tensor) -> None:
        """Writes those entries of this matrix into ``x`` at which a boolean matrix is True."""
        parts = self.parts(x)
        if self.every:
            where, matrix = where.unflatten(0, parts.shape[:2]), matrix.unflatten(0, parts.shape[:2])
        parts[where] = matrix[where]

    def parts(self, x: Tensor) -> Tensor:
        """Returns the matrix, where rows alternate as (H, O / H, I, *K), sharing the memory of ``x``."""
        matrix = x[tuple(slice(None) if place is None else place for place in self.at)] if self.at else x
        matrix = matrix.transpose(0, 1) if self.transposed else matrix
        matrix = matrix if self.columns is None else matrix[:, slice(*self.columns)]
        if self.every:
            assert self.rows is not None
            return matrix.unflatten(0, (-1, self.every))[:, slice(*self.rows)]
        return matrix if self.rows is None else matrix[slice(*self.rows)]


def along_axes(name: str, shape: Size, axes: Sequence[str]) -> tuple[MatrixView, ...]:
    """Returns the views of the matrices in a parameter whose axes have these names: o, i, and others that count them.

    Axes that are left out at the end are kernel taps.

    >>> [(view.name, view.at, view.transposed) for view in along_axes("up", Size((2, 4, 8)), ("e", "i", "o"))]
    [('up.0', (0, None, None), True), ('up.1', (1, None, None), True)]
    """
    counting = [number for number, axis in enumerate(axes) if axis not in ("o", "i")]
    is_turned = axes.index("i") < axes.index("o")
    if not counting:
        return (MatrixView(name, transposed=is_turned),)
    views = []
    for places in product(*(range(shape[number]) for number in counting)):
        at = tuple(dict(zip(counting, places, strict=True)).get(number) for number in range(len(axes)))
        views.append(MatrixView(".".join((name, *map(str, places))), transposed=is_turned, at=at))
    return tuple(views)


def stacked(name: str, shape: Size, *, transposed: bool) -> tuple[MatrixView, ...]:
    """Returns the views of matrices that lie behind one another, (*, O, I), or (*, I, O) where they are transposed.

    >>> [view.name for view in stacked("experts.up", Size((2, 4, 8)), transposed=False)]
    ['experts.up.0', 'experts.up.1']
    """
    return along_axes(name, shape, (*("e",) * (len(shape) - 2), *("io" if transposed else "oi")))


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

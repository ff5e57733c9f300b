"""An architecture of DiNTS as a value, and the files that it is read from.

Shapes: N blocks, L depths (levels of resolution), P = 3 L - 2 paths between the nodes of two columns.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from dstlib.errors import SettingError, StateError, few, require, shown
from dstlib.typed_json import read_json
from dstlib.zoo.e2enet.config import are_counts

ARCHITECTURE = "architecture.json"
OPERATIONS = ("skip", "3×3×3", "3×3×1", "3×1×3", "1×3×3")  # by their codes
REMEDY = "Pass the run of a finished --model dints_search, its architecture.json, or a .pt of MONAI's search."

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a search through DiNTS's space has found: which paths there are, and the operation on each.

    Columns of L nodes, one for each resolution, are joined by N blocks of P paths. A path leads to the same
    resolution or to a neighbouring one. The names are MONAI's.

    - ``space``: the space that the codes belong to; there is one so far.
    - ``node_a``: (N + 1, L), whether a node is in use.
    - ``arch_code_a``: (N, P), whether a path is; :func:`paths` lists them.
    - ``arch_code_c``: (N, P), the operation on it, a place in :data:`OPERATIONS`; without meaning where there is none.

    Raises:
        SettingError: The sizes differ from what the counts say, a code is unknown, or the topology is infeasible:
            paths come from a node that none leads to, or lead to one that none leaves.

    Reference: He et al., *DiNTS* (CVPR 2021, arXiv:2103.15954); MONAI's ``TopologyInstance``.

    >>> Architecture.of([[1, 0, 0, 1]], [[1, 0, 0, 0]]).node_a
    ((1, 1), (1, 1))
    >>> Architecture.of([[1, 0, 0, 0], [0, 0, 0, 1]], [[0] * 4] * 2)
    Traceback (most recent call last):
        ...
    dstlib.errors.SettingError: arch_code_a of the architecture: expected paths of block 1 from the nodes that block \
0 leads to, [1, 0], got [0, 1]. Pass the run of a finished --model dints_search, its architecture.json, or a .pt of \
MONAI's search.
    """

    space: Literal["monai-dints-3d"] = "monai-dints-3d"
    num_blocks: int
    num_depths: int
    node_a: Rows
    arch_code_a: Rows
    arch_code_c: Rows

    def __post_init__(self) -> None:
        blocks, depths = self.num_blocks, self.num_depths
        for name in ("num_blocks", "num_depths"):
            given = getattr(self, name)
            _require(are_counts([given]), name, "a whole number from 1 up", given)
        widths = {"node_a": (blocks + 1, depths, 2), "arch_code_a": (blocks, 3 * depths - 2, 2)}
        widths["arch_code_c"] = (blocks, 3 * depths - 2, len(OPERATIONS))
        for name, (height, width, codes) in widths.items():
            rows = getattr(self, name)
            sizes = {len(row) for row in rows}
            _require((len(rows), sizes) == (height, {width}), name, f"{height} × {width}", f"{len(rows)} × {sizes}")
            odd = [code for row in rows for code in row if type(code) is not int or not 0 <= code < codes]
            _require(not odd, name, f"whole numbers from 0 to {codes - 1}", odd[:1])
        ends = [nodes(row, depths) for row in self.arch_code_a]
        for block, (before, after) in enumerate(ends):
            reached = ends[block - 1][1] if block else before
            of = f"paths of block {block} from the nodes that block {block - 1} leads to, {list(reached)}"
            _require(any(before), "arch_code_a", "a path in each block", f"none in block {block}")
            _require(before == reached, "arch_code_a", of, list(before))
            own, expected = (self.node_a[block], self.node_a[block + 1]), (before, after)
            _require(own == expected, f"node_a, rows {block} and {block + 1},", str(expected), own)

    @classmethod
    def of(cls, arch_code_a: Sequence[Sequence[Any]], arch_code_c: Sequence[Sequence[Any]]) -> Self:
        """Makes one from its codes, whole numbers in any type, that say which nodes are in use."""
        a, c = (tuple(tuple(map(int, row)) for row in rows) for rows in (arch_code_a, arch_code_c))
        depths = (len(a[0]) + 2) // 3 if a else 0
        first = [nodes(a[0], depths)[0]] if a else []
        node_a = (*first, *(nodes(row, depths)[1] for row in a))
        return cls(num_blocks=len(a), num_depths=depths, node_a=node_a, arch_code_a=a, arch_code_c=c)


def paths(num_depths: int) -> list[tuple[int, int]]:
    """Returns, of each path between two columns, the depth that it comes from and the one that it leads to.

    >>> paths(2)
    [(0, 0), (1, 0), (0, 1), (1, 1)]
    """
    near = ((start, end) for end in range(num_depths) for start in (end - 1, end, end + 1))
    return [(start, end) for start, end in near if 0 <= start < num_depths]


def nodes(row: Sequence[int], num_depths: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which nodes the paths of one block come from, and which they lead to.

    >>> nodes([0, 0, 1, 1], 2)
    ((1, 1), (0, 1))
    """
    used = [ends for ends, code in zip(paths(num_depths), row, strict=True) if code]
    before, after = ({ends[side] for ends in used} for side in (0, 1))
    return tuple(int(d in before) for d in range(num_depths)), tuple(int(d in after) for d in range(num_depths))


def read_architecture(path: Path) -> Architecture:
    """Reads an architecture: from its file of JSON, from the folder of the run that has searched it, or MONAI's .pt.

    Raises:
        StateError: There is none, or it is damaged, infeasible or of something else.
    """
    file = path / ARCHITECTURE if path.is_dir() else path
    if file.suffix in (".pt", ".pth"):
        return _of_monai(file)
    return read_json(file, Architecture, where=f"architecture {file}", remedy=REMEDY, error=StateError)


def _of_monai(file: Path) -> Architecture:
    """Reads what MONAI's searches save by ``torch.save``: a dictionary with NumPy arrays of codes.

    The names are those of its model zoo's search, or of Auto3DSeg's, which shortens them.
    """
    import numpy as np  # these two on demand: command lines are parsed by this file

    from dstlib.torch_files import read_torch

    where, allowed = f"architecture {file}", "the arch_code_a and arch_code_c of MONAI's search"
    # what a pickle of arrays of numbers is made of, by the names of NumPy 1 and 2; none of it runs code of the file
    makers = [(np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    scalars = [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("?", "i1", "u1", "i4", "i8", "f4", "f8")]
    names = [*makers, *scalars, np.ndarray, np.dtype, *kinds, codecs.encode]
    saved = read_torch(file, where=where, allowed=allowed, remedy=REMEDY, safe_globals=names)
    table = saved if type(saved) is dict else {}
    codes: list[Any] = [table.get(f"arch_{name}", table.get(name)) for name in ("code_a", "code_c")]
    if not all(isinstance(code, np.ndarray) and code.ndim == 2 for code in codes):
        given = few([*map(str, table)]) or shown(saved)
        raise StateError.of("content", where, allowed=allowed, given=given, remedy=REMEDY)
    try:
        return Architecture.of(*codes)
    except SettingError as error:
        raise StateError(f"{file}: {error}") from error


def _require(holds: bool, name: str, allowed: str, given: object) -> None:
    require(holds, name, "the architecture", allowed=allowed, given=given, remedy=REMEDY)

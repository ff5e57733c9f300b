"""What a forward pass does with each entry of a parameter: an oracle of axes that knows no names and no types.

Every tensor that holds entries of a parameter and nothing else (a view, a copy, a cut, a gather of experts) carries
the places of those entries along, as operators move them. Where such a tensor is multiplied as a matrix, the entries
along its contracted axis meet inputs, those along the other one make outputs: read from the operator, entry by entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_flatten, tree_map

aten = torch.ops.aten
NOWHERE = -1  # the place of an entry that is no parameter's, as padding
MOVES = {
    aten.view,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.t,
    aten.transpose,
    aten.permute,
    aten.expand,
    aten.slice,
    aten.select,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
    aten.unsqueeze,
    aten.squeeze,
    aten.clone,
    aten.detach,
    aten.alias,
    aten._to_copy,
    aten.index,
    aten.index_select,
    aten.gather,
    aten.as_strided,
    aten.unfold,
    aten.repeat,
    aten.roll,
    aten.flip,
    aten.cat,
    aten.stack,
    aten.lift_fresh,
    aten.diagonal,
}
LOOKS = {aten.sym_size, aten.is_same_size, aten.empty_like, aten.zeros_like, aten.ones_like, aten.rand_like}


@dataclass(frozen=True)
class Use:
    """A product that entries of a parameter take part in: their places as (batch, output, input, *taps)."""

    operator: str
    places: Tensor


@dataclass
class Roles(TorchDispatchMode):
    """Follows the parameters of a model through what runs within it; ``uses`` and ``others`` are by name.

    ``others`` are the operators that take entries of a parameter and neither move them nor multiply by a matrix.
    """

    parameters: Mapping[str, nn.Parameter]
    uses: dict[str, list[Use]] = field(default_factory=dict)
    others: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()
        self._names, self._starts, start = [], [], 0
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        for name, p in self.parameters.items():
            self._names.append(name)
            self._starts.append(start)
            self._places[id(p)] = p, torch.arange(start, start + p.numel()).view(p.shape)
            start += p.numel()
        self._ends = torch.tensor([*self._starts[1:], start])

    def places(self, x):
        known = self._places.get(id(x)) if isinstance(x, Tensor) else None
        return None if known is None or known[0] is not x else known[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in LOOKS or not tree_any(lambda x: self.places(x) is not None, (args, kwargs)):
            return out
        if packet in MOVES and (moved := self._move(func, args, kwargs)) is not None:
            for x, places in zip(tree_flatten(out)[0], tree_flatten(moved)[0], strict=True):
                self._places[id(x)] = x, places
        elif not self._multiply(packet, args):
            for x in tree_flatten((args, kwargs))[0]:
                if (places := self.places(x)) is not None:
                    for name, _ in self._named(places):
                        self.others.setdefault(name, set()).add(str(packet).removeprefix("aten."))
        return out

    def _move(self, func, args, kwargs):
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.clone, aten.detach, aten.alias, aten.lift_fresh):
            return self.places(args[0])
        if packet in (aten.cat, aten.stack) and any(self.places(x) is None for x in args[0]):
            return None
        if packet in (aten.index, aten.index_select, aten.gather) and self.places(args[0]) is None:
            return None
        return func(*tree_map(self._or_self, args), **tree_map(self._or_self, kwargs))

    def _or_self(self, x):
        places = self.places(x)
        return x if places is None else places

    def _multiply(self, packet, args):
        operands = {aten.addmm: args[1:3], aten.baddbmm: args[1:3], aten.addmv: args[1:3]}.get(packet, args[:2])
        left, right = (self.places(x) for x in operands) if len(operands) == 2 else (None, None)
        if packet in (aten.addmm, aten.baddbmm, aten.addmv) and (bias := self.places(args[0])) is not None:
            for name, _ in self._named(bias):
                self.others.setdefault(name, set()).add("bias")
        if packet in (aten.mm, aten.addmm, aten.mv, aten.addmv, aten.bmm, aten.baddbmm, aten._grouped_mm, aten.dot):
            if left is not None:
                matrix = left if left.ndim > 1 else left[None]
                self._note(packet, matrix if matrix.ndim == 3 else matrix[None])
            if right is not None:
                matrix = right if right.ndim > 1 else right[:, None]
                self._note(packet, (matrix if matrix.ndim == 3 else matrix[None]).transpose(1, 2))
            return left is not None or right is not None or packet in (aten.addmm, aten.baddbmm, aten.addmv)
        if packet is aten.linear and right is not None:
            self._note(packet, right[None])
            return True
        if packet is aten.convolution and right is not None and left is None:
            is_transposed, groups = args[6], args[8]
            grouped = right.unflatten(0, (groups, right.shape[0] // groups))
            self._note(packet, grouped.transpose(1, 2) if is_transposed else grouped)
            return True
        return False

    def _note(self, packet, places):
        for name, start in self._named(places):
            self.uses.setdefault(name, []).append(Use(str(packet).removeprefix("aten."), places - start))

    def _named(self, places):
        """Yields the names of the parameters whose entries are here, with their first place."""
        for which in torch.bucketize(places.unique(), self._ends, right=True).unique().tolist():
            yield self._names[which], self._starts[which]


def disagreement(views, parameter, use):
    """Says how the matrix views of a parameter contradict a use of it, "" where they agree.

    They agree if what a use takes as one output is one row of one view, and another row for each output; and if what
    it contracts with one input is, within a view, one column.
    """
    size = parameter.numel()
    view, row, column, tap = (torch.full((size,), NOWHERE) for _ in range(4))
    for number, matrix in enumerate(views):
        at = matrix.of(torch.arange(size).view(parameter.shape))
        at = at.reshape(*at.shape[:2], -1)
        o, i, k = (torch.arange(n) for n in at.shape)
        view[at] = number
        row[at] = (o[:, None, None] + 1_000_000 * number).expand_as(at)
        column[at], tap[at] = i[None, :, None].expand_as(at), k.expand_as(at)
    for places in use.places.reshape(*use.places.shape[:3], -1):  # (output, input, taps)
        is_here = ((places >= 0) & (places < size)).flatten(1).all(dim=1)
        places = places[is_here]
        if not len(places):
            continue
        rows = row[places].flatten(1)
        if (rows == NOWHERE).any():
            return f"{use.operator}: entries in no view"
        if (rows != rows[:, :1]).any():
            return f"{use.operator}: one output has entries in several rows"
        if len(rows[:, 0].unique()) < len(rows):
            return f"{use.operator}: several outputs have entries in one row"
        for number in view[places[:, 0, 0]].unique().tolist():
            columns = column[places[view[places[:, 0, 0]] == number]]
            if (columns != columns[:1, :, :1]).any():
                return f"{use.operator}: one input meets entries of several columns"
            if len(columns[0, :, 0].unique()) < columns.shape[1]:
                return f"{use.operator}: several inputs meet entries of one column"
    return ""

"""What a forward pass does with each entry of a parameter: an oracle of axes that knows no names and no types.

Every tensor that holds entries of a parameter and nothing else (a view, a copy, a cut, a gather of experts) carries
the places of those entries along, as operators move them. Where such a tensor is multiplied as a matrix, the entries
along its contracted axis meet inputs, those along the other one make outputs: read from the operator, entry by entry.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_flatten, tree_map

aten = torch.ops.aten
NOWHERE = -1  # of an entry of another parameter
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
        if packet in MOVES and (moved := self._move(func, args, kwargs, out)) is not None:
            for x, places in zip(tree_flatten(out)[0], tree_flatten(moved)[0], strict=True):
                self._places[id(x)] = x, places
        elif not self._multiply(packet, args):
            for x in tree_flatten((args, kwargs))[0]:
                if (places := self.places(x)) is not None:
                    for name, _ in self._named(places):
                        self.others.setdefault(name, set()).add(str(packet).removeprefix("aten."))
        return out

    def _move(self, func, args, kwargs, out):
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.clone):  # which may lay the entries out anew
            return torch.empty_strided(out.shape, out.stride(), dtype=torch.int64).copy_(self.places(args[0]))
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
    view, row, column = (torch.full((size + 1,), NOWHERE) for _ in range(3))
    for number, matrix in enumerate(views):
        at = matrix.of(torch.arange(size).view(parameter.shape))
        at = at.reshape(*at.shape[:2], -1)
        num_rows, num_columns, _ = at.shape
        view[at] = number
        row[at] = (int(row.max()) + 1 + torch.arange(num_rows))[:, None, None].expand_as(at)
        column[at] = torch.arange(num_columns)[None, :, None].expand_as(at)
    for places in use.places.reshape(*use.places.shape[:3], -1):  # (output, input, taps)
        is_mine = (places >= 0) & (places < size)
        places = torch.where(is_mine, places, size)
        if (row[places][is_mine] == NOWHERE).any():
            return f"{use.operator}: entries in no view"
        rows = _the_one(row[places].flatten(1))
        if rows is None:
            return f"{use.operator}: one output has entries in several rows"
        if len(rows[rows != NOWHERE].unique()) < int((rows != NOWHERE).sum()):
            return f"{use.operator}: several outputs have entries in one row"
        for number in view[places].unique().tolist():
            columns = torch.where(view[places] == number, column[places], NOWHERE)
            columns = _the_one(columns.transpose(0, 1).flatten(1))
            if columns is None:
                return f"{use.operator}: one input meets entries of several columns"
            if len(columns[columns != NOWHERE].unique()) < int((columns != NOWHERE).sum()):
                return f"{use.operator}: several inputs meet entries of one column"
    return ""


def _the_one(numbers):
    """Returns the only number in each line but ``NOWHERE``, which it is where there is none; None if there are two."""
    most = numbers.max(dim=1).values
    is_same = (numbers == most[:, None]) | (numbers == NOWHERE)
    return most if bool(is_same.all()) else None


class _WithoutSoftmax(TorchFunctionMode):
    """Lets no gradient through a softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.detach() if getattr(func, "__name__", "") == "softmax" else out


def attention_rows(model, inputs, layers, *, softmax=True):
    """Returns, of each linear layer of an attention by name, at how many positions each of its outputs has a say.

    In what the module that owns the layer returns at one position in the middle: queries have it at that one alone,
    keys and values at others too, and only values where the softmax lets no gradient through.
    """
    projected, attended, hooks = {}, {}, []
    for name in layers:

        def cut(_, args, out, name=name):
            if name in projected:
                return None
            projected[name] = out.detach().requires_grad_()
            return projected[name]

        def keep(_, args, out, name=name):
            attended.setdefault(name, tree_flatten(out)[0][0])

        owner = model.get_submodule(name.rpartition(".")[0])
        hooks += [model.get_submodule(name).register_forward_hook(cut), owner.register_forward_hook(keep)]
    with nullcontext() if softmax else _WithoutSoftmax():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, out in attended.items():
        at = out.flatten(0, -2)[out.flatten(0, -2).shape[0] // 2]
        loss = (at * torch.randn(at.shape, generator=torch.Generator().manual_seed(0))).sum()
        (grad,) = torch.autograd.grad(loss, projected[name], retain_graph=True)
        found[name] = (grad.flatten(0, -2) != 0).sum(dim=0)
    return found

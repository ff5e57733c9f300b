"""Which weights a model's outputs come from: those from which autograd's graph ends without another weight.

Names and the order of registration tell nothing of it. What modules return in a pass that autograd records leads back
through every operation, and each operation shows which parameters it read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

# operations on entries one by one, or that only put tensors together: behind one, a parameter is still to be used
_BY_ENTRY = frozenset(("Add", "Sub", "Mul", "Div", "Where", "Lerp", "Cat", "Stack", "WeightNormInterface"))
# operations that put values into a tensor: of one without a gradient, such as zeros, nothing enters but the values
_PLACED = frozenset(("IndexCopy", "IndexPut", "Scatter"))
# what a table gives is no weight any more, but the activations of tokens, though nothing else enters
_LOOKUPS = frozenset(("Embedding", "EmbeddingBag"))

# Looked up by the hook, so that it holds nothing itself.
_WATCHES: WeakKeyDictionary[nn.Module, "WeakSet[PassWatch]"] = WeakKeyDictionary()
# What a pickled hook becomes: a method of the standard library that takes whatever a hook is given, and does nothing.
_NOTHING = nullcontext.__exit__


class PassWatch:
    """Notes what a model and its modules return in the first pass that autograd records, until it is told to stop.

    ``twins`` are other models that compute with its parameters; whoever uses these may have let go of the model itself,
    which is None then. Of a pass of a whole model no more is kept than what it
    tells; of passes of its parts, as where a user calls them one by one, the nodes of autograd's graph are, but not
    what these have saved for a backward pass that has run.

    >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    >>> watch = PassWatch(net, [net[0].weight, net[2].weight])
    >>> _ = net(torch.ones(1, 2))
    >>> names = {id(p): n for n, p in net.named_parameters()}
    >>> sorted((names[key], is_output) for key, is_output in watch.outputs().items())
    [('0.weight', False), ('2.weight', True)]
    >>> watch.stop()
    """

    def __init__(self, model: nn.Module | None, parameters: Iterable[Tensor], twins: Iterable[nn.Module] = ()) -> None:
        wholes = [*([] if model is None else [model]), *twins]
        self._model, self._parameters = None if model is None else ref(model), list(parameters)
        self._whole: WeakSet[nn.Module] = WeakSet(wholes)
        self._modules: WeakSet[nn.Module] = WeakSet([*(() if model is None else model.modules()), *wholes])
        self._seen: dict[int, list[Node]] = {}
        self._found: dict[int, bool | None] = {}
        for module in self._modules:
            _WATCHES.setdefault(module, WeakSet()).add(self)
            if note_pass not in module._forward_hooks.values():
                module.register_forward_hook(note_pass)

    def note(self, module: nn.Module, output: object) -> None:
        """Takes what a module returned, if it is the first such time."""
        if id(module) not in self._seen and (nodes := list(_nodes_of(output))):
            self._seen[id(module)] = nodes
            if module in self._whole:
                self._found = _merged(self._found, find_outputs(self._nodes(), self._parameters))
                self._seen = {key: [] for key in self._seen}

    def stop(self) -> None:
        """Lets go of all."""
        self._seen.clear()
        for module in self._modules:
            if watches := _WATCHES.get(module):
                watches.discard(self)
            if not watches:
                for key in [key for key, hook in module._forward_hooks.items() if _is_note(hook)]:
                    del module._forward_hooks[key]
        self._modules.clear()

    def outputs(self, optimized: Sequence[Set[int]] = ()) -> dict[int, bool | None]:
        """Tells of the parameters, by identity, whether outputs come from them; those that were not seen are left out.

        None where one operation read several that none follows, so that nothing tells which of them comes last: one
        that was compiled as a whole. ``optimized`` has the identities of the parameters that each optimizer steps on:
        what a part of the model returns is an output, too, where another optimizer has all that follows, as has that of
        the discriminator what a generator draws.
        """
        nodes = self._nodes()
        found = _merged(self._found, find_outputs(nodes, self._parameters))
        if len(optimized) > 1:
            last: dict[int, bool | None] = {}
            for mine in optimized:
                last |= find_outputs(nodes, [p for p in self._parameters if id(p) in mine])
            for of_part in self._parts():
                ends = find_outputs(of_part, self._parameters)
                found |= {key: True for key, is_output in ends.items() if is_output and last.get(key)}
        return found

    def _nodes(self) -> list[Node]:
        return [node for nodes in self._seen.values() for node in nodes]

    def _parts(self) -> Iterator[list[Node]]:
        """Yields what each module returned that was called by itself, not by another one."""
        model = None if self._model is None else self._model()
        waiting = [] if model is None else [model]
        while waiting:
            module = waiting.pop()
            if nodes := self._seen.get(id(module)):
                yield nodes
            else:
                waiting += module.children()


class _Note:
    """A forward hook that tells those who watch a module what it returned; a saved module takes nothing of it along."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return  # a checkpoint that is computed again, within a backward pass, shows a piece without what follows
        for watch in _WATCHES.get(module, ()):
            watch.note(module, output)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Names what unpickles without this library."""
        return getattr, (nullcontext(), "__exit__")


note_pass = _Note()


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks of others."""
    hooks = module._forward_hooks
    return bool(hooks) and not all(map(_is_note, hooks.values()))


def _is_note(hook: object) -> bool:
    """Whether a hook is ours, or what is left of it in a copy or a file."""
    return hook is note_pass or getattr(hook, "__func__", None) is _NOTHING


def _merged(first: Mapping[int, bool | None], second: Mapping[int, bool | None]) -> dict[int, bool | None]:
    """Joins what two passes tell: what is an output in one is one, and so is what may be."""
    order = (False, None, True)
    both = {key: max(first[key], second[key], key=order.index) for key in first.keys() & second.keys()}
    return {**first, **second, **both}


def find_outputs(roots: Iterable[Node], parameters: Iterable[Tensor]) -> dict[int, bool | None]:
    """Tells of each parameter that the graph above some nodes reads whether outputs come from it, by identity."""
    wanted = {id(p) for p in parameters}
    users, leaves = _reversed(roots, wanted)
    uses = {key: dict(_operations(leaf, users)) for key, leaf in leaves.items()}
    followed = _above(source for nodes in uses.values() for node in nodes for source, _ in node.next_functions)
    return {
        key: _is_output(nodes, followed, [uses[other] for other in uses if other != key])
        for key, nodes in uses.items()
        if nodes
    }


def _is_output(uses: Mapping[Node, bool], followed: set[Node], others: list[dict[Node, bool]]) -> bool | None:
    """Tells it of the operations that use one parameter and others, each with whether it reads the parameter itself."""
    ends = uses.keys() - followed
    # What was added to activations, as a bias or a position, goes along with them as far as the next weight.
    is_alone = any(not any(node in used and (used[node] or not uses[node]) for used in others) for node in ends)
    return is_alone or (None if ends else False)


def _nodes_of(output: object) -> Iterator[Node]:
    """Yields the nodes of the tensors in what a module returned, whatever it is made of."""
    found = tree_leaves(output)
    for each in found:
        parts = [each] if isinstance(each, Tensor) else tree_leaves(dict(getattr(each, "__dict__", {})))
        yield from (x.grad_fn for x in parts if isinstance(x, Tensor) and x.grad_fn is not None)


def _reversed(roots: Iterable[Node], wanted: set[int]) -> tuple[dict[Node, list[Node]], dict[int, Node]]:
    """Returns who reads what each node of a graph gives, and the nodes of parameters, by identity."""
    users: dict[Node, list[Node]] = {}
    leaves: dict[int, Node] = {}
    waiting, seen = list(roots), set(roots)
    while waiting:
        node = waiting.pop()
        if id(variable := getattr(node, "variable", None)) in wanted and isinstance(variable, Tensor):
            leaves[id(variable)] = node
        for source, _ in node.next_functions:
            if source is not None:
                users.setdefault(source, []).append(node)
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
    return users, leaves


def _operations(leaf: Node, users: Mapping[Node, list[Node]]) -> Iterator[tuple[Node, bool]]:
    """Yields the operations that use a parameter, each with whether it is read itself, behind casts and views only.

    Those are lookups in it, and what it enters together with others, be it behind sums and products by entry.
    """
    waiting, seen = [(node, True) for node in users.get(leaf, ())], {(leaf, True)}
    while waiting:
        node, is_itself = waiting.pop()
        if (node, is_itself) in seen or (node, True) in seen:
            continue
        seen.add((node, is_itself))
        kind, sources = node.name().partition("Backward")[0], node.next_functions
        is_joint = len(sources) > 1 and not (kind in _PLACED and sources[0][0] is None)
        if kind in _LOOKUPS or (is_joint and kind not in _BY_ENTRY):
            yield node, is_itself
        else:
            waiting += [(user, is_itself and not is_joint) for user in users.get(node, ())]


def _above(nodes: Iterable[Node | None]) -> set[Node]:
    """Returns nodes and all that they come from."""
    waiting = [node for node in nodes if node is not None]
    found: set[Node] = set(waiting)
    while waiting:
        for source, _ in waiting.pop().next_functions:
            if source is not None and source not in found:
                found.add(source)
                waiting.append(source)
    return found

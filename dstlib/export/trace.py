"""The operations of one forward pass as a torch.fx graph, with the value of each at an example input."""

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dstlib.layers.shift import LearnedShift, Shift
from dstlib.targets import is_hooked


@dataclass(frozen=True)
class Trace:
    """A forward pass as a graph; ``values`` has the example's value of every node but the output.

    ``shape_read`` are the nodes of which the forward knows sizes: numbers made from them would be others in a smaller
    network, and no node shows where they went.
    """

    root: nn.Module
    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    shape_read: frozenset[fx.Node]


SHIFTS = (Shift, LearnedShift)


def trace(model: nn.Module, examples: Sequence[Tensor], leaves: tuple[type[nn.Module], ...] = SHIFTS) -> Trace:
    """Follows a forward by symbols that know their shape, so that code that checks shapes, or splits by them, goes on.

    torch's own modules, and the ``leaves``, are nodes; all others are followed inside. Where the forward asks for
    the *values* of an activation, the tracing fails with whatever error that makes. The model may be left with
    additional attributes: pass a copy.

    >>> graph = trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), [torch.ones(1, 3)]).graph
    >>> [node.op for node in graph.nodes]
    ['placeholder', 'call_module', 'call_module', 'output']
    """
    tracer = _Tracer(examples, leaves)
    with torch.no_grad():
        graph = tracer.trace(model)
    return Trace(model, graph, tracer.interpreter.env, frozenset(tracer.shape_read))


def own_modules(trace: Trace) -> set[str]:
    """Names the modules of which nothing is known, or changed, by two places, and that have no hooks."""
    calls = Counter(str(node.target) for node in trace.graph.nodes if node.op == "call_module")
    read = [str(node.target) for node in trace.graph.nodes if node.op == "get_attr"]
    uses = Counter(id(p) for module in trace.root.modules() for p in module._parameters.values())
    own = set()
    for name, times in calls.items():
        module = trace.root.get_submodule(name)
        has_state = isinstance(module, Shift) or any(True for _ in (*module.parameters(), *module.buffers()))
        has_hooks = is_hooked(module) or module._forward_pre_hooks
        is_shared = any(uses[id(p)] > 1 for p in module.parameters())
        is_read = any(other.startswith(f"{name}.") for other in read)
        if not (has_hooks or is_shared or is_read or (has_state and times > 1)):
            own.add(name)
    return own


class _Tracer(fx.Tracer):
    def __init__(self, examples: Sequence[Tensor], leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = leaves
        self.shape_read: set[fx.Node] = set()
        self._examples = examples
        self._is_computing = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.interpreter = interpreter(root, {})
        self.interpreter.args_iter = iter([x.clone() for x in self._examples])
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def create_node(  # all nodes come through here, those of buffers too, which have no symbol
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind != "output":
            self._is_computing = True  # modules are themselves meanwhile, not nodes of the graph
            try:
                self.interpreter.env[node] = self.interpreter.run_node(node)
            finally:
                self._is_computing = False
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._is_computing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._is_computing else super().getattr(attr, attr_val, parameter_proxy_cache)


def interpreter(root: nn.Module, values: Mapping[fx.Node, Any]) -> fx.Interpreter:
    """Makes what computes single nodes of a graph, from these values of the nodes before them."""
    made = fx.Interpreter(root, garbage_collect_values=False, graph=fx.Graph())
    made.env = dict(values)
    return made


class _Proxy(fx.Proxy):
    """A symbol whose shape and type are known."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("shape", "size", "ndim", "dim", "dtype", "device"):
            return super().__getattr__(name)
        assert isinstance(self.tracer, _Tracer), "made by its proxy()"
        if name in ("shape", "size"):
            self.tracer.shape_read.add(self.node)
        return getattr(self.tracer.interpreter.env[self.node], name)

    def __len__(self) -> int:
        return self.size(0)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])  # type: ignore[call-overload]


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """Notes ``x += y`` as what it is; Proxy would note ``x = x + y``, which leaves other names of x as they were."""
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    setattr(_Proxy, f"__i{_name}__", _in_place(f"i{_name}"))

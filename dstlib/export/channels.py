"""Which channels of a network anyone reads: where each one is made, what carries it on, and who looks at it.

A channel has a number, which it keeps through norms, activations, pooling, concatenation and flattening; where two maps
are added, channels are tied, to stay or go together. Convolutions and linear layers read channels and make new ones.
What else a network does is not looked into: all that it reads stays. So it is with subclasses of torch's modules, which
may do anything, and with modules of which a parameter is computed anew each time. All in eval mode.

Shapes: C channels of a value, N channels of the network, O outputs, I inputs.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dstlib.export.trace import Trace, interpreter, own_modules
from dstlib.layers.shift import Shift

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (*_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_SUMS = {
    *(operator.add, operator.iadd, torch.add, "add", "add_"),
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    *(operator.mul, operator.imul, torch.mul, "mul", "mul_"),
}
_POINTWISE = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *_SUMS,
    *(functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu, functional.silu),
    *(functional.mish, functional.hardswish, functional.sigmoid, functional.tanh, functional.softplus),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh"),
    *(operator.truediv, operator.itruediv, operator.neg, operator.pow, "contiguous"),
}
_POOLING = {  # over so many axes
    pool: n
    for n in (1, 2, 3)
    for kind, name in (("Max", "max"), ("Avg", "avg"), ("AdaptiveMax", "adaptive_max"), ("AdaptiveAvg", "adaptive_avg"))
    for pool in (getattr(nn, f"{kind}Pool{n}d"), getattr(functional, f"{name}_pool{n}d"))
}
_NAN = float("nan")


@dataclass
class Channels:
    """The channels of one value: their numbers (C), along which axis they lie, and what each is.

    ``constant`` (C) is the one number that a channel holds everywhere, for every input; NaN where it varies.
    """

    ids: Tensor
    axis: int
    constant: Tensor


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: what it reads, what it makes, and which of its weights carry anything.

    ``live_OI`` is False where a weight is zero, or its input always is.
    """

    name: str
    inputs: Tensor
    outputs: Tensor
    live_OI: Tensor
    constant: Tensor


class ChannelFlow:
    """The channels of a traced network, in eval mode.

    ``followers`` are modules that have something for each channel, norms and shifts: their names, and these channels.
    ``kept`` (N) says which are read, by number; ``pins`` are the channels that have to stay whoever reads them, and
    why; ``left`` says by name why a module with parameters is not looked into.
    """

    def __init__(self, trace: Trace) -> None:
        self.layers: list[Layer] = []
        self.followers: list[tuple[str, Tensor]] = []
        self.pins: list[tuple[Tensor, str]] = []
        self.left: dict[str, str] = {}
        self._trace = trace
        self._channels: dict[fx.Node, Channels] = {}
        self._num_channels = 0
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._own = own_modules(trace)
        for node in trace.graph.nodes:
            self._visit(node)
        for node in trace.shape_read & self._channels.keys():
            self._pin(node, "the forward reads their number")
        self.kept = self._find_kept()

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        module = self._module(node)
        kind: Any = node.target if module is None else type(module)
        if node.op == "output":
            for source in node.all_input_nodes:
                self._pin(source, "")
        elif module is not None and node.target not in self._own:
            self._leave(node, "it is called twice, shares parameters, or has hooks")
        elif module is not None and (live_OI := live_weights(module)) is not None:
            self._layer(node, module, live_OI)
        elif not isinstance(self._trace.values.get(node), Tensor) or not (
            self._carry(node, kind) or self._sum(node, kind) or self._cat(node, kind) or self._flatten(node, kind)
        ):
            self._leave(node, "what it does with each channel is not known")

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._trace.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _layer(self, node: fx.Node, module: Any, live_OI: Tensor) -> None:
        source = node.all_input_nodes[0]
        num_axes = 0 if type(module) is nn.Linear else _num_axes(type(module))
        seen = self._seen(source, self._trace.values[source].ndim - 1 - num_axes)
        live_OI = live_OI & (seen.constant != 0)
        ids = self._new_ids(len(live_OI))
        bias = torch.zeros(len(ids)) if module.bias is None else module.bias.detach().cpu()
        constant = bias.double().masked_fill(live_OI.any(dim=1), _NAN)
        self._channels[node] = Channels(ids, seen.axis, constant)
        self.layers.append(Layer(str(node.target), seen.ids, ids, live_OI, constant))

    def _carry(self, node: fx.Node, kind: Any) -> bool:
        """Follows what treats each channel by itself, and changes its place at most."""
        source, channels = self._only_source(node)
        if channels is None or not _keeps_channels(kind, node, self._trace.values[source].ndim, channels.axis):
            return False
        if kind in (*NORMS, Shift):
            self.followers.append((str(node.target), channels.ids))
        has_statistics = kind in _BATCH_NORMS and getattr(self._module(node), "running_mean", None) is not None
        varies = channels.constant.isnan()
        if not has_statistics and not _is_pointwise(kind, node):
            varies = channels.constant != 0  # a mean of equal numbers may differ from them in the last bit
        self._put(node, {source: channels}, channels.ids, varies)
        return True

    def _sum(self, node: fx.Node, kind: Any) -> bool:
        """Follows what adds, subtracts or multiplies two maps, channel by channel."""
        sources = {source: self._channels[source] for source in node.all_input_nodes if source in self._channels}
        if kind not in _SUMS or len(sources) != 2 or len(node.all_input_nodes) != 2:
            return False
        one, other = sources.values()
        same_ndim = len({self._trace.values[source].ndim for source in sources}) == 1
        if not same_ndim or one.axis != other.axis or len(one.ids) != len(other.ids):
            return False
        self._ties.append((one.ids, other.ids))
        self._put(node, sources, one.ids, one.constant.isnan() | other.constant.isnan())
        return True

    def _cat(self, node: fx.Node, kind: Any) -> bool:
        """Follows a concatenation along any axis."""
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        parts: Any = node.args[0] if node.args else None
        if kind not in (torch.cat, torch.concat) or not isinstance(axis, int) or not isinstance(parts, list | tuple):
            return False
        seen = {part: self._seen(part, axis % self._trace.values[node].ndim) for part in parts}
        ids = torch.cat([seen[part].ids for part in parts])
        self._put(node, seen, ids, torch.cat([seen[part].constant.isnan() for part in parts]))
        return True

    def _flatten(self, node: fx.Node, kind: Any) -> bool:
        """Follows (B, C, ...) → (B, C · ...): as many features for each channel as it has positions."""
        source, channels = self._only_source(node)
        module: Any = self._module(node)
        flattens = (
            (module.start_dim, module.end_dim) == (1, -1)
            if kind is nn.Flatten
            else kind in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs
        )
        if channels is None or channels.axis != 1 or not flattens:
            return False
        times = self._trace.values[node].shape[1] // len(channels.ids)
        ids, constant = channels.ids.repeat_interleave(times), channels.constant.repeat_interleave(times)
        self._put(node, {source: channels}, ids, constant.isnan())
        return True

    def _put(self, node: fx.Node, sources: Mapping[fx.Node, Channels], ids: Tensor, varies: Tensor) -> None:
        """Notes the channels of a node, and what it makes of constants, by letting it make it."""
        computing = interpreter(self._trace.root, self._trace.values)
        axis = next(iter(sources.values())).axis
        for source, channels in sources.items():
            x = self._trace.values[source]
            shape = [-1 if a == axis else 1 for a in range(x.ndim)]
            filling = channels.constant.masked_fill(channels.constant.isnan(), 0.0)
            computing.env[source] = filling.to(x).reshape(shape).expand_as(x).clone()
        with torch.no_grad():
            result = computing.run_node(node).movedim(axis, 0).reshape(len(ids), -1).double().cpu()
        constant = result[:, 0].masked_fill(varies | (result != result[:, :1]).any(dim=1), _NAN)
        made, *read = (self._trace.values[each].untyped_storage().data_ptr() for each in (node, *sources))
        if made in read:
            self._overwrite(ids, constant)
        self._channels[node] = Channels(ids, axis, constant)

    def _overwrite(self, ids: Tensor, constant: Tensor) -> None:
        """Marks values under other names, perhaps in the same memory, as no longer known to be what they were."""
        now = _varying(self._num_channels)
        now[ids] = constant
        touched = torch.zeros(self._num_channels, dtype=torch.bool)
        touched[ids] = True
        for channels in self._channels.values():
            differs = touched[channels.ids] & (channels.constant != now[channels.ids])
            channels.constant = channels.constant.masked_fill(differs, _NAN)

    def _only_source(self, node: fx.Node) -> tuple[fx.Node, Channels | None]:
        """Returns what a node reads, and its channels; None where they are unknown, or it reads more."""
        sources = node.all_input_nodes
        return (sources[0], self._channels.get(sources[0])) if len(sources) == 1 else (node, None)

    def _seen(self, source: fx.Node, axis: int) -> Channels:
        """Returns the channels of a value as its reader sees them; where they are unknown, new ones that stay."""
        channels = self._channels.get(source)
        if channels is not None and channels.axis == axis:
            return channels
        self._pin(source, "they are read along another axis")
        ids = self._new_ids(self._trace.values[source].shape[axis])
        self.pins.append((ids, ""))
        return Channels(ids, axis, _varying(len(ids)))

    def _leave(self, node: fx.Node, why: str) -> None:
        name = str(getattr(node.target, "__name__", node.target))
        module = self._module(node)
        if module is not None and any(True for _ in module.parameters()):
            self.left[name] = f"{type(module).__name__}: {why}"
        for source in node.all_input_nodes:
            self._pin(source, f"{name} reads them" + (f", a {type(module).__name__}" if module else ""))

    def _pin(self, node: fx.Node, reason: str) -> None:
        """Lets the channels of a node stay, if it has any."""
        if (channels := self._channels.get(node)) is not None:
            self.pins.append((channels.ids, reason))
            self._overwrite(channels.ids, _varying(len(channels.ids)))

    def _new_ids(self, count: int) -> Tensor:
        self._num_channels += count
        return torch.arange(self._num_channels - count, self._num_channels)

    def _find_kept(self) -> Tensor:
        """Finds what is pinned, what a kept output reads, what is tied to that, and one output of each layer."""
        kept = torch.zeros(self._num_channels, dtype=torch.bool)
        for ids, _ in self.pins:
            kept[ids] = True
        while True:
            before = int(kept.sum())
            for layer in reversed(self.layers):
                kept[layer.inputs[layer.live_OI[kept[layer.outputs]].any(dim=0)]] = True
            for one, other in self._ties:
                kept[one[kept[other]]] = True
                kept[other[kept[one]]] = True
            if int(kept.sum()) > before:
                continue
            empty = [layer for layer in self.layers if not kept[layer.outputs].any()]
            if not empty:
                return kept
            kept[empty[0].outputs[0]] = True


def live_weights(layer: Any) -> Tensor | None:
    """Returns where (O, I) any weight of a layer is not zero; None for what is no layer that mixes all channels.

    >>> live_weights(nn.ConvTranspose2d(3, 2, 2)).shape, live_weights(nn.Conv2d(4, 4, 3, groups=2))
    (torch.Size([2, 3]), None)
    """
    kind = type(layer)
    if kind is not nn.Linear and (kind not in (*_CONVOLUTIONS, *TRANSPOSED) or layer.groups > 1):
        return None
    live = layer.weight.detach().cpu().ne(0)
    live = live if live.ndim == 2 else live.flatten(2).any(dim=2)
    return live.t() if kind in TRANSPOSED else live


def _keeps_channels(kind: Any, node: fx.Node, ndim: int, axis: int) -> bool:
    """Returns whether a node with one input (of ``ndim`` axes) makes each channel along this axis of itself alone."""
    if kind in NORMS:
        return axis == 1 and (kind in _BATCH_NORMS or ndim == 2 + _num_axes(kind))
    if kind in _POOLING:
        return axis == ndim - 1 - _POOLING[kind]
    if kind in (nn.Upsample, Shift, functional.interpolate):
        return axis == 1 and ndim > 2
    if kind in ("mean", torch.mean):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims
        return isinstance(dims, list | tuple) and all(isinstance(d, int) and d % ndim > axis for d in dims)
    return _is_pointwise(kind, node)


def _is_pointwise(kind: Any, node: fx.Node) -> bool:
    """Returns whether entries are made of themselves alone: then a constant stays one, whatever the input's size."""
    return kind in _POINTWISE or (kind is functional.dropout and node.kwargs.get("training") is False)


def _num_axes(kind: type) -> int:
    """Returns the 2 of a Conv2d and its like."""
    return int(kind.__name__[-2])


def _varying(count: int) -> Tensor:
    return torch.full((count,), _NAN, dtype=torch.float64)

"""Which channels of a network anyone reads: where each one is made, what carries it on, and who looks at it.

A channel has a number, which it keeps through norms, activations, pooling, concatenation and flattening; where two maps
are added, channels are tied, to stay or go together. Convolutions and linear layers read channels and make new ones.
What else a network does is not looked into: all that it reads stays.

Shapes: C channels of a value, N channels of the network, O outputs, I inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dstlib.export.channel_trace import Trace, compute, own_modules
from dstlib.export.per_channel import (
    carries,
    cat_axis,
    channel_axis,
    flattens,
    has_channels,
    is_pointwise,
    is_sum,
    live_connections,
)

_NAN = float("nan")


@dataclass
class Channels:
    """Of one value: the numbers of its channels (C), along which axis they lie, and what each is.

    ``constant`` (C) is the one number that a channel holds everywhere, for every input; NaN where it varies.
    """

    ids: Tensor
    axis: int
    constant: Tensor


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer: what it reads, what it makes, and which connections carry anything.

    ``live_OI`` is False where a weight is zero, or its input always is.
    """

    name: str
    inputs: Tensor
    outputs: Tensor
    live_OI: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Follower:
    """A module that has something for each channel: a norm or a shift."""

    name: str
    ids: Tensor


class ChannelFlow:
    """The channels of a traced network, in eval mode.

    ``kept`` (N) says which are read, by number; ``pins`` are the channels that have to stay whoever reads them, and
    why; ``left`` says by name why a module with parameters is not looked into.
    """

    def __init__(self, trace: Trace) -> None:
        self.layers: list[Layer] = []
        self.followers: list[Follower] = []
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
        module, value = self._module(node), self._trace.values.get(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                self._pin(source, "")
        elif module is not None and node.target not in self._own:
            self._leave(node, "it is called twice, shares parameters, or has hooks")
        elif module is not None and (live_OI := live_connections(module)) is not None:
            self._layer(node, module, live_OI)
        elif not isinstance(value, Tensor) or not (
            self._carry(node) or self._sum(node) or self._cat(node) or self._flatten(node)
        ):
            self._leave(node, "what it does with each channel is not known")

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._trace.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _layer(self, node: fx.Node, module: nn.Module, live_OI: Tensor) -> None:
        source = node.all_input_nodes[0]
        axis = channel_axis(module, self._trace.values[source].ndim)
        seen = self._seen(source, axis)
        live_OI = live_OI & (seen.constant != 0)
        ids = self._new_ids(len(live_OI))
        bias = getattr(module, "bias", None)
        at_rest = torch.zeros(len(ids), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
        constant = at_rest.masked_fill(live_OI.any(dim=1), _NAN)
        self._channels[node] = Channels(ids, axis, constant)
        self.layers.append(Layer(str(node.target), seen.ids, ids, live_OI, constant.clone()))

    def _carry(self, node: fx.Node) -> bool:
        """What treats each channel by itself, and changes its place at most."""
        source, channels = self._only_source(node)
        module = self._module(node)
        if channels is None or not carries(node, module, self._trace.values[source].ndim, channels.axis):
            return False
        if has_channels(module):
            self.followers.append(Follower(str(node.target), channels.ids))
        varies = channels.constant.isnan()
        if not is_pointwise(node, module):
            varies = channels.constant != 0  # a mean of equal numbers may differ from them in the last bit
        self._put(node, {source: channels}, channels.ids, varies)
        return True

    def _sum(self, node: fx.Node) -> bool:
        """Adds, subtracts or multiplies maps channel by channel."""
        sources = {source: self._channels[source] for source in node.all_input_nodes if source in self._channels}
        if not is_sum(node) or len(sources) != 2 or len(node.all_input_nodes) != 2:
            return False
        one, other = sources.values()
        same_rank = len({self._trace.values[source].ndim for source in sources}) == 1
        if not same_rank or one.axis != other.axis or len(one.ids) != len(other.ids):
            return False
        self._ties.append((one.ids, other.ids))
        self._put(node, sources, one.ids, one.constant.isnan() | other.constant.isnan())
        return True

    def _cat(self, node: fx.Node) -> bool:
        axis = cat_axis(node, self._trace.values[node].ndim)
        parts: Any = node.args[0] if node.args else None
        if axis is None or not isinstance(parts, list | tuple):
            return False
        seen = {part: self._seen(part, axis) for part in parts}
        ids = torch.cat([seen[part].ids for part in parts])
        self._put(node, seen, ids, torch.cat([seen[part].constant.isnan() for part in parts]))
        return True

    def _flatten(self, node: fx.Node) -> bool:
        """(B, C, ...) → (B, C · ...): as many features for each channel as it has positions."""
        source, channels = self._only_source(node)
        if channels is None or channels.axis != 1 or not flattens(node, self._module(node)):
            return False
        times = self._trace.values[node].shape[1] // len(channels.ids)
        ids, constant = channels.ids.repeat_interleave(times), channels.constant.repeat_interleave(times)
        self._put(node, {source: channels}, ids, constant.isnan())
        return True

    def _put(self, node: fx.Node, sources: Mapping[fx.Node, Channels], ids: Tensor, varies: Tensor) -> None:
        """Notes the channels of a node, and what it makes of constants, by letting it make it."""
        values = dict(self._trace.values)
        axis = next(iter(sources.values())).axis
        for source, channels in sources.items():
            x = values[source]
            shape = [-1 if a == axis else 1 for a in range(x.ndim)]
            filling = channels.constant.masked_fill(channels.constant.isnan(), 0.0)
            values[source] = filling.to(x).reshape(shape).expand_as(x).clone()
        with torch.no_grad():
            result = compute(self._trace.root, node, values).movedim(axis, 0).reshape(len(ids), -1).double().cpu()
        constant = result[:, 0].masked_fill(varies | (result != result[:, :1]).any(dim=1), _NAN)
        if any(_memory(self._trace.values[source]) == _memory(self._trace.values[node]) for source in sources):
            self._overwrite(ids, constant)
        self._channels[node] = Channels(ids, axis, constant)

    def _overwrite(self, ids: Tensor, constant: Tensor) -> None:
        """Values under other names, perhaps in the same memory, are no longer known to be what they were."""
        now = torch.full((self._num_channels,), _NAN, dtype=torch.float64)
        now[ids] = constant
        touched = torch.zeros(self._num_channels, dtype=torch.bool)
        touched[ids] = True
        for channels in self._channels.values():
            differs = touched[channels.ids] & (channels.constant != now[channels.ids])
            channels.constant = channels.constant.masked_fill(differs, _NAN)

    def _only_source(self, node: fx.Node) -> tuple[fx.Node, Channels | None]:
        """What a node reads, and its channels; None where they are unknown, or it reads more."""
        sources = node.all_input_nodes
        return (sources[0], self._channels.get(sources[0])) if len(sources) == 1 else (node, None)

    def _seen(self, source: fx.Node, axis: int) -> Channels:
        """The channels of a value as its reader sees them, or some that have to stay, where they are not known."""
        channels = self._channels.get(source)
        if channels is not None and channels.axis == axis:
            return channels
        if channels is not None:
            self._pin(source, "they are read along another axis")
        ids = self._new_ids(self._trace.values[source].shape[axis])
        self.pins.append((ids, ""))
        return Channels(ids, axis, torch.full((len(ids),), _NAN, dtype=torch.float64))

    def _leave(self, node: fx.Node, why: str) -> None:
        name = str(getattr(node.target, "__name__", node.target))
        module = self._module(node)
        if module is not None and any(True for _ in module.parameters()):
            self.left[name] = f"{type(module).__name__}: {why}"
        for source in node.all_input_nodes:
            self._pin(source, f"{name} reads them" + (f", a {type(module).__name__}" if module else ""))

    def _pin(self, node: fx.Node, reason: str) -> None:
        channels = self._channels.get(node)
        if channels is not None:
            self.pins.append((channels.ids, reason))
            self._overwrite(channels.ids, torch.full((len(channels.ids),), _NAN, dtype=torch.float64))

    def _new_ids(self, count: int) -> Tensor:
        self._num_channels += count
        return torch.arange(self._num_channels - count, self._num_channels)

    def _find_kept(self) -> Tensor:
        """What is pinned, what a kept output of a layer reads, what is tied to that, and one output of each layer."""
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


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()

"""The forward pass of a network as the steps of a plan: convolutions, transposed ones, and poolings.

Norms and activations are no steps: whoever reads a map applies them. Shapes: C channels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, fx, nn

from dstlib.axes import Triple
from dstlib.errors import SettingError
from dstlib.export.dead_channels import ShiftedGroups
from dstlib.export.trace import SHIFTS, trace
from dstlib.layers.shift import Shift, channel_moves
from dstlib.targets import HoldsActive, is_hooked, plain_kind, unwrap, without_data

MOST_MAPS = 3  # that one convolution reads
MOST_STRIDE = 16
_HOLDS = "layers that a plan holds, see docs/export.md"
_REMEDY = "Pass the plain model, not one of accelerate(); remove or replace this layer, or export by torch.export."


@dataclass(frozen=True)
class View:
    """A map as it is read: with the norm that was found of it, if any, then max(x, slope · x)."""

    map: int  # 0 is the image, i + 1 what step i makes
    is_normed: bool = False
    slope: float = 1.0


@dataclass(frozen=True, eq=False)
class Step:
    """An operation on maps, which makes one; ``stride`` is also the window of a pooling.

    ``norm`` is the affine instance norm that is found of what a convolution makes: gamma, beta (None: 1 and 0), eps.
    """

    kind: Literal["conv", "conv_transpose", "max_pool"]
    views: tuple[View, ...]
    outputs: int
    stride: Triple
    weight: Tensor | None = None
    bias: Tensor | None = None
    shifts: tuple[int, ...] = ()  # of each channel that is read; () where none moves
    norm: tuple[Tensor | None, Tensor | None, float] | None = None


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a forward pass from images of so many channels to its outputs."""

    channels: int
    steps: tuple[Step, ...]
    outputs: tuple[View, ...]


@dataclass(frozen=True)
class _Part:
    """Some of the channels that a layer sees: those of a map, each moved along depth."""

    view: View
    shifts: tuple[int, ...]


_Value = tuple[_Part, ...]  # concatenated


def steps_of(model: nn.Module, example: Tensor) -> Steps:
    """Returns the steps of the forward pass of a model, followed at an example (N, C, D, H, W) of float32.

    Raises:
        SettingError: Something in it is none of a plan's; the first such layer is named, with the reason.

    >>> network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.InstanceNorm3d(4), nn.LeakyReLU(), nn.MaxPool3d(2))
    >>> found = steps_of(network, torch.rand(1, 1, 2, 2, 2))
    >>> [step.kind for step in found.steps], found.steps[1].views
    (['conv', 'max_pool'], (View(map=1, is_normed=True, slope=0.01),))
    """
    original = unwrap(model)
    if example.ndim != 5 or example.dtype != torch.float32:
        allowed, given = "(N, C, D, H, W) of float32", f"{tuple(example.shape)} of {example.dtype}"
        raise SettingError.of(
            "example", "save_plan()", allowed=allowed, given=given, remedy="Pass what the model takes."
        )
    for name, module in original.named_modules():
        if is_hooked(module) or module._forward_pre_hooks:
            _refuse(name or "(model)", "hooks, which a plan does not call")
    for name, tensor in original.named_parameters():
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            _refuse(name, f"{tensor.dtype} on {tensor.device.type}, where a plan has float32 of a CPU")
    root = original
    if type(root).__module__.startswith("torch.nn.") and not isinstance(root, nn.Sequential):
        root = nn.Sequential(root)  # whose forward is followed, where that of a layer would be taken apart
    try:
        traced = trace(without_data(root), [example.to("meta")], (*SHIFTS, ShiftedGroups))
    except Exception as error:  # the forward is anyone's code, which a symbol may break in any way
        _refuse(
            "(model)", f"a forward that cannot be traced: {type(error).__name__}: {error}".partition("\n")[0], error
        )
    reader = _Reader(root)
    for node in traced.graph.nodes:
        reader.follow(node, traced.values.get(node))
    return Steps(example.shape[1], tuple(reader.steps), reader.outputs)


class _Reader:
    """Follows the nodes of a graph, one after the other, and notes the steps."""

    def __init__(self, root: nn.Module) -> None:
        self.steps: list[Step] = []
        self.outputs: tuple[View, ...] = ()
        self._root = root
        self._values: dict[fx.Node, _Value] = {}
        self._layers: dict[type[nn.Module], Callable[[fx.Node, Any, _Value], _Value]] = {
            nn.Conv3d: self._conv,
            nn.ConvTranspose3d: self._conv_transpose,
            nn.MaxPool3d: self._max_pool,
            nn.InstanceNorm3d: self._norm,
            nn.LeakyReLU: self._activation,
            nn.ReLU: self._activation,
            Shift: self._shift,
            ShiftedGroups: self._shift,
            nn.Identity: lambda node, layer, value: value,
        }

    def follow(self, node: fx.Node, example: Any) -> None:
        if node.op == "placeholder":
            if self._values:
                _refuse(node.name, "another input beside the image")
            self._values[node] = (_Part(View(0), (0,) * example.shape[1]),)
        elif node.op == "output":
            given = node.args[0]
            self.outputs = tuple(self._output(each) for each in (given if isinstance(given, list | tuple) else [given]))
        elif node.op == "call_module":
            layer = self._root.get_submodule(str(node.target))
            if (kind := plain_kind(layer)) not in self._layers:
                _refuse(_name(node), f"a {kind.__name__}")
            self._values[node] = self._layers[kind](node, layer, self._values[node.args[0]])  # type: ignore[index]
        elif node.op == "call_function" and node.target is torch.cat:
            self._values[node] = self._concatenated(node, *node.args, **node.kwargs)
        else:
            _refuse(_name(node), f"{getattr(node.target, '__name__', node.target)}()")

    def _output(self, node: Any) -> View:
        value = self._values.get(node) if isinstance(node, fx.Node) else None
        if value is None:
            _refuse("(model)", f"{type(node).__name__} as output, where a plan gives a tensor, or a tuple of some")
        return self._alone(node, value).view

    def _concatenated(self, node: fx.Node, tensors: Any, dim: Any = 0) -> _Value:
        if dim not in (1, -4):
            _refuse(_name(node), f"a concatenation along axis {dim}")
        return tuple(chain.from_iterable(self._values[each] for each in tensors))

    def _make(self, step: Step) -> _Value:
        self.steps.append(step)
        return (_Part(View(len(self.steps)), (0,) * step.outputs),)

    def _conv(self, node: fx.Node, conv: nn.Conv3d, value: _Value) -> _Value:
        *depth, height, width = conv.kernel_size
        if depth != [1] or (height, width) not in ((1, 1), (3, 3)):
            _refuse(_name(node), f"a convolution with the kernel {conv.kernel_size}")
        if conv.groups != 1 or conv.dilation != (1, 1, 1) or conv.padding_mode != "zeros":
            _refuse(_name(node), "a convolution with groups, dilation or a padding other than zeros")
        if conv.padding != (0, height // 2, width // 2):
            _refuse(_name(node), f"a convolution whose padding {conv.padding} is not half its kernel")
        if len(value) > MOST_MAPS:
            _refuse(_name(node), f"a convolution of {len(value)} maps, of which it may read {MOST_MAPS}")
        shifts = tuple(chain.from_iterable(part.shifts for part in value))
        views, stride = tuple(part.view for part in value), _strides(node, conv.stride)
        step = Step("conv", views, conv.out_channels, stride, _weight(conv), conv.bias, shifts if any(shifts) else ())
        return self._make(step)

    def _conv_transpose(self, node: fx.Node, layer: nn.ConvTranspose3d, value: _Value) -> _Value:
        is_plain = (
            layer.groups == 1 and layer.dilation == (1, 1, 1) and not any((*layer.padding, *layer.output_padding))
        )
        if layer.bias is not None or layer.kernel_size != layer.stride or not is_plain or len(node.args) > 1:
            _refuse(_name(node), "a transposed convolution whose kernel is not its stride, or with a bias")
        view, stride = self._alone(node, value).view, _strides(node, layer.stride)
        return self._make(Step("conv_transpose", (view,), layer.out_channels, stride, _weight(layer)))

    def _max_pool(self, node: fx.Node, pool: nn.MaxPool3d, value: _Value) -> _Value:
        window, stride = _strides(node, pool.kernel_size), _strides(node, pool.stride)
        padding, dilation = ({*_three(each)} for each in (pool.padding, pool.dilation))
        if window != stride or (padding, dilation) != ({0}, {1}) or pool.ceil_mode or pool.return_indices:
            _refuse(_name(node), "a pooling whose windows do not lie side by side")
        part = self._alone(node, value)
        return self._make(Step("max_pool", (part.view,), len(part.shifts), window))

    def _norm(self, node: fx.Node, norm: nn.InstanceNorm3d, value: _Value) -> _Value:
        part = self._alone(node, value)
        number, view = part.view.map - 1, part.view
        if number < 0 or self.steps[number].kind != "conv" or self.steps[number].norm or view != View(view.map):
            _refuse(_name(node), "an instance norm of something else than what a convolution makes")
        if norm.track_running_stats:
            _refuse(_name(node), "an instance norm with running statistics")
        self.steps[number] = replace(self.steps[number], norm=(norm.weight, norm.bias, norm.eps))
        return (replace(part, view=replace(view, is_normed=True)),)

    def _activation(self, node: fx.Node, layer: nn.LeakyReLU | nn.ReLU, value: _Value) -> _Value:
        slope = layer.negative_slope if isinstance(layer, nn.LeakyReLU) else 0.0
        if not 0 <= slope <= 1:
            _refuse(_name(node), f"a leaky ReLU with the slope {slope}")
        before = node.args[0]
        assert isinstance(before, fx.Node), "of which there is a value"
        is_its_own = (
            before.op == "call_module" and type(self._root.get_submodule(str(before.target))) is not nn.Identity
        )
        if layer.inplace and not (is_its_own and len(before.users) == 1):
            _refuse(_name(node), "an activation in place of what others read")
        return tuple(replace(part, view=replace(part.view, slope=slope * part.view.slope)) for part in value)

    def _shift(self, node: fx.Node, shift: Shift | ShiftedGroups, value: _Value) -> _Value:
        if shift.axis not in (2, -3) or any(any(part.shifts) for part in value):
            _refuse(_name(node), "a shift along another axis than depth, or of what was shifted before")
        if isinstance(shift, ShiftedGroups):
            each = torch.tensor(shift.sizes).repeat_interleave(torch.tensor(shift.counts))
        else:
            each = channel_moves(sum(len(part.shifts) for part in value), shift.sizes)
        moves = iter(each.tolist())
        return tuple(replace(part, shifts=tuple(next(moves) for _ in part.shifts)) for part in value)

    def _alone(self, node: fx.Node, value: _Value) -> _Part:
        """Returns the one map that a value is, as it lies."""
        if len(value) > 1 or any(value[0].shifts):
            _refuse(_name(node), "a concatenated or shifted map, which only a convolution reads")
        return value[0]


def _weight(layer: nn.Conv3d | nn.ConvTranspose3d) -> Tensor:
    """Returns the weight of a layer, whole."""
    if isinstance(layer, HoldsActive):
        held = layer.held["weight"]
        return held.spread(held.values.detach())
    return layer.weight


def _name(node: fx.Node) -> str:
    """Returns the name of a layer, or of the one in whose forward an operation stands."""
    if node.op == "call_module":
        return str(node.target)
    inside = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return inside[-1] if inside else "(model)"


def _strides(node: fx.Node, sizes: int | Sequence[int]) -> Triple:
    found = _three(sizes)
    if max(found) > MOST_STRIDE:
        _refuse(_name(node), f"a stride or a window of {found}, of which none may be above {MOST_STRIDE}")
    return found


def _three(sizes: int | Iterable[int]) -> Triple:
    depth, height, width = (sizes,) * 3 if isinstance(sizes, int) else sizes
    return depth, height, width


def _refuse(name: str, given: str, cause: Exception | None = None) -> NoReturn:
    raise SettingError.of(f"layer {name!r}", "save_plan()", allowed=_HOLDS, given=given, remedy=_REMEDY) from cause

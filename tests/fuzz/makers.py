"""Random networks: a table of layers and of what is done with them, of which a chain is drawn.

A layer joins by one line of ``MAKERS``: the numbers of axes that it takes, with the batch, and how it is made from a
random source and an example of its input. What does not fit the example is left out of the chain.

Shapes: N batch, C channels, D, H, W depth, height, width; rows are (N, F) or (N, T, F).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from dstlib.layers import FusionNode, LearnedShift, Shift, ShiftedConv3d, Unit
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

Step = tuple[str, int]  # a maker, and the seed of what it draws
LAYERS = (nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose3d, Unit)  # what events look for in a network


@dataclass(frozen=True)
class Maker:
    """How a layer is made for an example of its input, of one of these numbers of axes, and how often."""

    axes: Sequence[int]
    make: Callable[[Random, Tensor], nn.Module]
    often: int = 1


class Does(nn.Module):
    """What a network does between its layers: a function of this file, by name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.function.__name__


class Around(nn.Module):
    """A layer, and what a function of this file does with it and its input."""

    def __init__(self, inner: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x)

    def extra_repr(self) -> str:
        return self.function.__name__


class Times:
    """A hook that multiplies: of what goes in, of what comes out, or of its gradient; it can be pickled."""

    def __init__(self, factor: float, kind: str) -> None:
        self.factor, self.kind = factor, kind

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        match self.kind:
            case "before":
                return tuple(x * self.factor for x in given[0])
            case "behind":
                return given[1] * self.factor
            case "in place":
                given[1].mul_(self.factor)
                return None
            case "backward":
                return tuple(None if x is None else x * self.factor for x in given[0])
        raise AssertionError(self.kind)

    def register(self, module: nn.Module) -> Any:
        match self.kind:
            case "before":
                return module.register_forward_pre_hook(self)
            case "backward":
                return module.register_full_backward_hook(self)
        return module.register_forward_hook(self)


HOOKS = ("before", "behind", "in place", "backward")


class ScaledConv(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class ScaledLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


class ScaledUnit(Unit):
    """A unit with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Fuse(nn.Module):
    """A fusion node and the three maps that it joins, made of one."""

    def __init__(self, node: FusionNode, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.node, self.stride = node, stride

    def forward(self, x: Tensor) -> Tensor:
        maps = [x, F.max_pool3d(x, self.stride)]
        if self.node.downward is not None:
            maps.append(F.interpolate(x, scale_factor=tuple(map(float, self.stride))))
        y: Tensor = self.node(*maps)
        return y


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        second.weight = first.weight
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class TwoNames(nn.Module):
    """One layer under two names, in containers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.all = nn.ModuleDict({"a": nn.ModuleList([layer]), "b": nn.ModuleList([layer, nn.Identity()])})

    def forward(self, x: Tensor) -> Tensor:
        return self.all["b"][0](self.all["a"][0](x))


# What is done around a layer. Functions of this file, so that networks can be pickled.


def residual(layer: nn.Module, x: Tensor) -> Tensor:
    return x + layer(x)


def residual_in_place(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    y += x
    return y


def concatenated(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x, layer(x)], dim=1)


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(layer(x))


def two_sizes(layer: nn.Module, x: Tensor) -> Tensor:
    y, part = layer(x), layer(x[:1])
    return y + part


def read_then_written(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    z = y.clone()
    y.relu_()
    return y - z


def written_through_a_view(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    y[:, :1] = 0.5
    return y


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(layer, x, use_reentrant=False)
    return y


def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = layer(x)
    return layer(x) + y


def by_keyword(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(input=x)
    return y


def by_its_attributes(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    size = layer.out_features if hasattr(layer, "out_features") else layer.out_channels * layer.stride[0]
    return y / size


def by_its_weight(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x) * layer.weight.abs().mean()


def contiguous_before(layer: nn.Module, x: Tensor) -> Tensor:
    """As torch's group norm ends the process in the backward pass of an image that lies channels last and is a leaf."""
    return layer(x.contiguous())


def split(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, dim=1)[::-1], dim=1)


def half(x: Tensor) -> Tensor:
    return x[:, : max(1, x.shape[1] // 2)]


def swapped(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def turned(x: Tensor) -> Tensor:
    return x.flip(-1)


def viewed(x: Tensor) -> Tensor:
    """As a vector of each sample, which asks that they lie so in memory."""
    return x.view(x.shape[0], -1).view(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x.mean(1, keepdim=True).expand_as(x)


def every_second(x: Tensor) -> Tensor:
    return x[..., ::2]


def to_volume(x: Tensor) -> Tensor:
    return x.unsqueeze(2)


def to_image(x: Tensor) -> Tensor:
    return x.mean(2)


def pooled(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def behind(layer: nn.Module, x: Tensor) -> Tensor:
    """Channels last, as a linear layer sees the voxels of an image."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


def _width(r: Random) -> int:
    return r.choice((1, 2, 3, 4, 5, 8, 9, 16, 17))


def _flip(r: Random) -> bool:
    return r.random() < 0.5


def _conv(r: Random, x: Tensor, **settings: Any) -> nn.Module:
    size = r.choice((1, 3, 3))
    kind, kernel = (nn.Conv2d, (size, size)) if x.ndim == 4 else (nn.Conv3d, (1, size, size))
    padding = tuple(n // 2 for n in kernel)
    return kind(x.shape[1], settings.pop("out", None) or _width(r), kernel, padding=padding, bias=_flip(r), **settings)


def _conv_strided(r: Random, x: Tensor) -> nn.Module:
    return _conv(r, x, stride=tuple(r.choice((1, 2)) for _ in range(x.ndim - 2)))


def _conv_otherwise(r: Random, x: Tensor) -> nn.Module:
    """A convolution that the engine leaves to torch."""
    kind = nn.Conv2d if x.ndim == 4 else nn.Conv3d
    channels = x.shape[1]
    settings = r.choice(
        (
            {"kernel_size": 3, "padding": "same"},
            {"kernel_size": 3, "padding": 1, "groups": channels},
            {"kernel_size": 3, "padding": 2, "dilation": 2},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
            {"kernel_size": 1, "padding": 0, "groups": channels},
            {"kernel_size": 2},
        )
    )
    return kind(channels, channels, **settings)


def _unit(r: Random, x: Tensor, kind: type[Unit] = Unit, out: int | None = None) -> Unit:
    size, stride = r.choice((1, 3, 3)), tuple(r.choice((1, 1, 2)) for _ in range(3)) if out is None else (1, 1, 1)
    shift = r.choice((None, Shift((-1, 0, 1), axis=2), Shift((2, -1), axis=-3), Shift((0,), axis=2)))
    return kind(x.shape[1], out or _width(r), kernel_size=(1, size, size), stride=stride, shift=shift)


def _unit_otherwise(r: Random, x: Tensor) -> Unit:
    """A unit that is not as the engine's, in one part."""
    unit = _unit(r, x)
    channels = unit.conv.out_channels
    match r.randrange(7):
        case 0:
            unit.norm = nn.BatchNorm3d(channels)
        case 1:
            unit.norm = nn.InstanceNorm3d(channels, affine=True, track_running_stats=True)
        case 2:
            unit.activation = nn.ReLU()
        case 3:
            unit.activation = nn.LeakyReLU(r.choice((0.0, 0.3, 1.0, 1.5)))
        case 4:
            unit.shift = LearnedShift((-1.0, 0.5), axis=2)
        case 5:
            unit.shift = Shift((-1, 1), axis=r.choice((3, 4)))
        case 6:
            unit.norm = nn.InstanceNorm3d(channels, affine=True, eps=1e-3)
    return unit


def _node(r: Random, x: Tensor) -> nn.Module:
    stride = r.choice(((2, 2, 2), (1, 2, 2), (2, 1, 1)))
    channels, size = x.shape[1], r.choice((1, 3))
    node = FusionNode(
        channels,
        coarser=(channels, stride),
        finer=(channels, stride) if _flip(r) else None,
        kernel_size=(1, size, size),
        shift=Shift((-1, 0, 1), axis=2) if _flip(r) else None,
        num_units=r.choice((1, 1, 2)),
    )
    return Fuse(node, stride)


def _units(r: Random, x: Tensor) -> nn.Module:
    """Units that hand maps with a pending norm to each other."""
    width = _width(r)
    return nn.Sequential(_unit(r, x, out=width), *(_unit(r, x.new_zeros(1, width), out=width) for _ in range(2)))


def _transposed(r: Random, x: Tensor) -> nn.Module:
    kind = nn.ConvTranspose2d if x.ndim == 4 else nn.ConvTranspose3d
    return kind(x.shape[1], _width(r), 2, stride=2, bias=_flip(r))


def _norm(r: Random, x: Tensor) -> nn.Module:
    channels, affine = x.shape[1], _flip(r)
    if x.ndim in (2, 3):
        return r.choice((nn.LayerNorm(x.shape[-1]), nn.BatchNorm1d(channels)))
    group = Around(nn.GroupNorm(1, channels), contiguous_before)
    batch, instance = (nn.BatchNorm2d, nn.InstanceNorm2d) if x.ndim == 4 else (nn.BatchNorm3d, nn.InstanceNorm3d)
    return r.choice((batch(channels), instance(channels, affine=affine), group))


def _activation(r: Random, x: Tensor) -> nn.Module:
    kinds = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.ELU)
    return r.choice((*(kind(inplace=inplace) for kind in kinds for inplace in (True, False)), nn.GELU(), nn.Tanh()))


def _pool(r: Random, x: Tensor) -> nn.Module:
    two = x.ndim == 4
    most, mean = (nn.MaxPool2d, nn.AvgPool2d) if two else (nn.MaxPool3d, nn.AvgPool3d)
    return r.choice(
        (most(2), most(3, stride=1, padding=1), mean(2), most(2, ceil_mode=True), nn.Upsample(scale_factor=2))
    )


def _same_width(r: Random, x: Tensor) -> nn.Module:
    """A layer on the engine that keeps the shape of its input."""
    if x.ndim == 5 and _flip(r):
        return _unit(r, x, out=x.shape[1])
    return nn.Linear(x.shape[-1], x.shape[-1], bias=_flip(r)) if x.ndim < 4 else _conv(r, x, out=x.shape[1])


def _inner(r: Random, x: Tensor) -> nn.Module:
    """One to three layers."""
    most = r.randint(1, 3)
    return build(draw_steps(r, 3 * most), x, most)


def _around(function: Callable[[nn.Module, Tensor], Tensor], inner: Any = _same_width) -> Any:
    return lambda r, x: Around(inner(r, x), function)


def _does(function: Callable[[Tensor], Tensor]) -> Any:
    return lambda r, x: Does(function)


def _hooked(r: Random, x: Tensor) -> nn.Module:
    layer = _same_width(r, x)
    inside = r.choice(list(layer.modules()))
    Times(r.choice((0.5, 2.0)), r.choice(HOOKS)).register(inside)
    return layer


def _normed(r: Random, x: Tensor) -> nn.Module:
    """A weight that is computed; not by spectral_norm, whose power iteration multiplies rounding where it is slow."""
    layer = _same_width(r, x)
    target = layer.conv if isinstance(layer, Unit) else layer
    r.choice((nn.utils.parametrizations.weight_norm, nn.utils.weight_norm))(target)
    return layer


def _linear(r: Random, x: Tensor) -> nn.Module:
    return nn.Linear(x.shape[-1], _width(r), bias=_flip(r))


def _linear_of_channels(r: Random, x: Tensor) -> nn.Module:
    return nn.Linear(x.shape[1], _width(r), bias=_flip(r))


def _head(r: Random, x: Tensor) -> nn.Module:
    flat = nn.Flatten()
    return nn.Sequential(flat, nn.Linear(flat(x).shape[1], _width(r), bias=_flip(r)))


def _e2enet(r: Random, x: Tensor) -> nn.Module:
    config = E2ENetConfig(
        in_channels=x.shape[1], channels=(4, 5, 8), strides=((2, 2, 2), (1, 2, 2)), heads=2, num_classes=3
    )
    return E2ENet(config)


MAPS = (4, 5)
ROWS = (2, 3)
ANY = (2, 3, 4, 5)
MAKERS = {
    "conv": Maker(MAPS, _conv, 12),
    "strided conv": Maker(MAPS, _conv_strided, 4),
    "another conv": Maker(MAPS, _conv_otherwise, 2),
    "unit": Maker((5,), _unit, 12),
    "units": Maker((5,), _units, 4),
    "another unit": Maker((5,), _unit_otherwise, 3),
    "fusion node": Maker((5,), _node, 6),
    "transposed conv": Maker(MAPS, _transposed, 2),
    "linear": Maker(ROWS, _linear, 12),
    "linear over the width": Maker(MAPS, _linear),
    "linear over channels": Maker(MAPS, _around(behind, _linear_of_channels), 2),
    "norm": Maker(ANY, _norm, 6),
    "activation": Maker(ANY, _activation, 8),
    "pool": Maker(MAPS, _pool, 3),
    "dropout": Maker(ANY, lambda r, x: nn.Dropout(0.0)),
    "residual": Maker(ANY, _around(residual), 3),
    "residual in place": Maker(ANY, _around(residual_in_place), 2),
    "concatenated": Maker(MAPS, _around(concatenated, _conv), 2),
    "twice": Maker(ANY, _around(twice), 2),
    "two sizes": Maker(ANY, _around(two_sizes)),
    "read, then written": Maker(ANY, _around(read_then_written), 2),
    "written through a view": Maker(ANY, _around(written_through_a_view), 2),
    "checkpointed": Maker(ANY, _around(checkpointed)),
    "without gradient": Maker(ANY, _around(without_gradient)),
    "by keyword": Maker((*ROWS, 4), _around(by_keyword)),
    "by its attributes": Maker((*ROWS, 4), _around(by_its_attributes)),
    "by its weight": Maker((*ROWS, 4), _around(by_its_weight)),
    "container": Maker(ANY, _inner, 2),
    "tied": Maker(ANY, lambda r, x: Tied(_twin(r, x), _twin(r, x)), 2),
    "two names": Maker(ANY, lambda r, x: TwoNames(_same_width(r, x)), 2),
    "hooked": Maker(ANY, _hooked, 2),
    "weight norm": Maker(ANY, _normed),
    "own conv": Maker((4,), lambda r, x: ScaledConv(x.shape[1], _width(r), 3, padding=1)),
    "own linear": Maker(ROWS, lambda r, x: ScaledLinear(x.shape[-1], _width(r))),
    "own unit": Maker((5,), lambda r, x: _unit(r, x, ScaledUnit)),
    "shifted conv": Maker((5,), lambda r, x: ShiftedConv3d(x.shape[1], 4, (1, 3, 3), padding=(0, 1, 1), sizes=(-1, 1))),
    "split": Maker(ANY, _does(split)),
    "half": Maker(ANY, _does(half)),
    "swapped": Maker((3, 4, 5), _does(swapped)),
    "turned": Maker(ANY, _does(turned)),
    "viewed": Maker(ANY, _does(viewed), 2),
    "expanded": Maker(ANY, _does(expanded)),
    "every second": Maker(ANY, _does(every_second)),
    "channels last": Maker(MAPS, _does(channels_last)),
    "to a volume": Maker((4,), _does(to_volume)),
    "to an image": Maker((5,), _does(to_image)),
    "pooled": Maker(MAPS, _does(pooled), 2),
    "head": Maker(MAPS, _head),
    "E2ENet": Maker((5,), _e2enet),
}


def _twin(r: Random, x: Tensor) -> nn.Module:
    """Layers of one size, whatever the random source says."""
    if x.ndim < 4:
        return nn.Linear(x.shape[-1], x.shape[-1])
    return _conv(Random(0), x, out=x.shape[1])


def draw_steps(r: Random, number: int, without: Sequence[str] = ()) -> list[Step]:
    """Draws the makers of a chain; which fit is seen as it is built."""
    names = [name for name, maker in MAKERS.items() for _ in range(maker.often) if name not in without]
    return [(r.choice(names), r.randrange(2**31)) for _ in range(number)]


def build(steps: Sequence[Step], x: Tensor, most: int = 99) -> nn.Sequential:
    """Returns the chain of at most so many of the steps that fit, one after another, beginning with an example."""
    layers: list[nn.Module] = []
    x = x.clone()  # which layers may change in place
    for name, seed in steps:
        maker = MAKERS[name]
        if x.ndim not in maker.axes or len(layers) >= most:
            continue
        torch.manual_seed(seed)
        try:
            layer = maker.make(Random(seed), x)
            with torch.no_grad():
                y = copy.deepcopy(layer)(x)  # a copy, as norms learn
        except (RuntimeError, ValueError, TypeError, IndexError):
            continue
        if not isinstance(y, Tensor):
            layers.append(layer)
            break
        if y.ndim not in ANY or y.numel() > 20_000 or not y.numel() or not y.isfinite().all():
            continue
        layers.append(layer)
        x = y
    network = nn.Sequential(*layers)
    for unit in network.modules():
        if isinstance(unit, Unit) and isinstance(unit.activation, nn.LeakyReLU):
            # else torch refuses that outputs are changed in place before the backward pass; the engine's units do not
            unit.activation.inplace = False
    return network

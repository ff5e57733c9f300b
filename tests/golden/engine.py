"""Layers on the engine: what its kernels compute, and gradients, for each instruction set.

Inputs and weights are drawn uniformly, which torch does alike everywhere. Gradients are those towards whole numbers,
whose sums are exact: torch adds up the gradients of biases in an order of its own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dstlib
from dstlib.engine import Decision, Decisions, info
from dstlib.layers import FusionNode, Shift, Unit
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig
from golden.files import HERE, checksum, write

Size = tuple[int, ...]

SETS = ("avx512", "avx2", "generic")  # a processor that has one has those after it
FLAT, DEPTH = (1, 3, 3), Shift((-1, 0, 1), axis=2)
SIZES = ((1, 8, 12, 16), (2, 5, 7, 9), (1, 33, 6, 13), (1, 16, 2, 2), (1, 1, 3, 1))  # batch, depth, height, width


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer, and the sizes of the maps of each call.

    Such a share of its connections is active, by blocks of output and input channels. ``grads`` says whose gradients
    the engine computes: of the inputs, of the active parameters, of all of them.
    """

    make: Callable[[], nn.Module]
    calls: tuple[tuple[Size, ...], ...]
    density: float = 0.3
    block: tuple[int, int] = (1, 1)
    grads: tuple[str, ...] = ("inputs", "active", "all")


def _conv(inputs: int, outputs: int, stride: int | Size = 1, *, bias: bool = True) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, FLAT, stride, padding=(0, 1, 1), bias=bias)


def _unit(inputs: int, outputs: int, *, stride: Any = (1, 1, 1), shift: nn.Module | None = None) -> Unit:
    return Unit(inputs, outputs, kernel_size=FLAT, stride=stride, shift=shift)


def _each(channels: int, sizes: Sequence[Size]) -> tuple[tuple[Size], ...]:
    """Calls with one map."""
    return tuple(((batch, channels, *size),) for batch, *size in sizes)


def _node(up: Any, down: Any, coarse: Sequence[Size], *, shift: nn.Module | None = None) -> Layer:
    """A fusion node of 9 channels between levels of 12 and 8, called with such coarse maps."""

    def make() -> nn.Module:
        finer, num_units = (8, down) if down else None, 1 if down else 2
        return FusionNode(9, coarser=(12, up), finer=finer, kernel_size=FLAT, shift=shift, num_units=num_units)

    calls = []
    for batch, *size in coarse:
        same = [n * step for n, step in zip(size, up, strict=True)]
        finer = [(batch, 8, *(n * step for n, step in zip(same, down, strict=True)))] if down else []
        calls.append(((batch, 9, *same), (batch, 12, *size), *finer))
    return Layer(make=make, calls=tuple(calls))


def _linear(outputs: int, *, density: float, block: tuple[int, int] = (1, 1), bias: bool = True) -> Layer:
    """A linear layer of 202 inputs; the gradients of all its weights are torch's."""
    calls = tuple(((batch, 202),) for batch in (1, 16, 65))
    grads = ("inputs", "active")
    return Layer(
        make=lambda: nn.Linear(202, outputs, bias=bias), calls=calls, density=density, block=block, grads=grads
    )


def _e2enet(channels: Size, stride: Any) -> E2ENet:
    return E2ENet(E2ENetConfig(channels=channels, strides=(stride, stride), heads=2, num_classes=3))


STRIDED = ("active", "all")  # the gradients of their inputs are torch's
LAYERS = {
    "3x3": Layer(make=lambda: _conv(9, 14), calls=_each(9, SIZES)),
    "3x3 without bias": Layer(make=lambda: _conv(9, 14, bias=False), calls=_each(9, SIZES[:3])),
    "3x3 dense": Layer(make=lambda: _conv(9, 14), calls=_each(9, SIZES[:2]), density=1.0),
    "3x3 blocks": Layer(make=lambda: _conv(16, 24), calls=_each(16, SIZES[:2]), block=(4, 4)),
    "3x3 wide": Layer(make=lambda: _conv(96, 80), calls=_each(96, SIZES[:2]), density=0.15),
    "3x3 strided": Layer(make=lambda: _conv(9, 14, 2), calls=_each(9, SIZES[:3]), grads=STRIDED),
    "3x3 strided in plane": Layer(
        make=lambda: _conv(9, 14, (1, 2, 2), bias=False), calls=_each(9, SIZES[:3]), grads=STRIDED
    ),
    "3x3 of images": Layer(make=lambda: nn.Conv2d(5, 7, 3, padding=1), calls=(((1, 5, 9, 8),), ((17, 5, 6, 7),))),
    "1x1": Layer(make=lambda: nn.Conv3d(9, 14, 1), calls=_each(9, SIZES)),
    "1x1 dense, without bias": Layer(
        make=lambda: nn.Conv3d(12, 3, 1, bias=False), calls=_each(12, SIZES[:3]), density=1.0
    ),
    "1x1 strided": Layer(make=lambda: nn.Conv3d(9, 14, 1, 2), calls=_each(9, SIZES[:3]), grads=STRIDED),
    "unit": Layer(make=lambda: _unit(9, 14), calls=_each(9, SIZES[:4])),
    "unit with shift": Layer(make=lambda: _unit(10, 14, shift=DEPTH), calls=_each(10, SIZES[:4])),
    "unit with shift, 1x1": Layer(
        make=lambda: Unit(10, 14, kernel_size=(1, 1, 1), shift=Shift((-2, 0, 3, 1), axis=-3)),
        calls=_each(10, SIZES[:3]),
    ),
    "unit with shift, strided": Layer(
        make=lambda: _unit(10, 14, stride=(2, 2, 2), shift=DEPTH), calls=_each(10, SIZES[:3]), grads=STRIDED
    ),
    "two units and a head": Layer(
        make=lambda: nn.Sequential(_unit(7, 12), _unit(12, 10, shift=DEPTH), nn.Conv3d(10, 4, 1, bias=False)),
        calls=_each(7, SIZES[:3]),
    ),
    "node": _node((2, 2, 2), (2, 2, 2), ((1, 4, 6, 8), (2, 3, 5, 4)), shift=DEPTH),
    "node of odd strides": _node((1, 3, 2), (2, 1, 3), ((1, 5, 3, 4), (1, 9, 1, 7))),
    "node of the finest level": _node((1, 2, 2), None, ((1, 8, 6, 8), (2, 17, 3, 5)), shift=DEPTH),
    "node of large maps": _node((2, 2, 2), None, ((1, 16, 48, 48),), shift=DEPTH),  # written past the caches
    "linear, scattered": _linear(130, density=0.1),
    "linear, blocks": _linear(128, density=0.2, block=(16, 2), bias=False),
    "linear, rows in threes": _linear(39, density=0.2, block=(3, 1)),
    "E2ENet": Layer(
        make=lambda: _e2enet((8, 12, 20), (2, 2, 2)), calls=_each(1, ((1, 8, 16, 12), (2, 12, 8, 8))), grads=()
    ),
    "E2ENet without strides": Layer(make=lambda: _e2enet((6, 9, 11), (1, 1, 1)), calls=_each(1, ((1, 9, 10, 7),))),
}
CASES = {
    f"{name}: {', '.join('x'.join(map(str, size)) for size in call)}": (layer, call)
    for name, layer in LAYERS.items()
    for call in layer.calls
}


class _Alone(nn.Module):
    """A layer as a part of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *maps: Tensor) -> Any:
        return self.layer(*maps)


def computed(layer: Layer, call: Sequence[Size]) -> dict[str, str]:
    """Checksums of the outputs of a call, where the layer is ready and where it is recorded, and of gradients."""
    generator = torch.Generator().manual_seed(0)
    model = _Alone(layer.make())
    masks = _fill(model, layer, generator)
    maps = [(2 * torch.rand(size, generator=generator) - 1).requires_grad_() for size in call]
    found = {}
    for graded in ("active", "all"):
        fast = _on_engine(model, maps, masks, all_graded=graded == "all")
        with torch.no_grad():
            first, again = (checksum(_outputs(fast, maps)) for _ in range(2))  # described, then run as described
        assert first == again
        outputs = _outputs(fast, maps)
        towards = [torch.randint(-2, 3, y.shape, generator=generator).float() for y in outputs]
        grads = torch.autograd.grad(outputs, [*maps, *model.parameters()], towards)
        found |= {"ready": first, "recorded": checksum(outputs)}
        if graded in layer.grads:
            found[f"gradients, {graded}"] = checksum(grads[len(maps) :])
        if "inputs" in layer.grads:
            found[f"gradients of inputs, {graded}"] = checksum(grads[: len(maps)])
    return found


def _fill(model: nn.Module, layer: Layer, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws the parameters, and masks outside of which they are zero."""
    masks = {}
    for name, parameter in model.named_parameters():
        values = torch.rand(parameter.shape, generator=generator) - 0.4
        if parameter.ndim > 1:
            height, width = layer.block
            size = (parameter.shape[0] // height, parameter.shape[1] // width)
            pairs = torch.rand(size, generator=generator) < layer.density
            pairs = pairs.repeat_interleave(height, 0).repeat_interleave(width, 1)
            masks[name] = pairs.reshape(*pairs.shape, *[1] * (parameter.ndim - 2)).expand_as(parameter).contiguous()
            values *= masks[name]
        parameter.data = values
    return masks


def _on_engine(model: nn.Module, maps: Sequence[Tensor], masks: dict[str, Tensor], *, all_graded: bool) -> nn.Module:
    """The model with all its layers on the engine, whatever that takes."""
    rows: list[Decision] = []
    for name, module in model.named_modules():
        is_candidate = isinstance(module, FusionNode | Unit | nn.Conv2d | nn.Conv3d | nn.Linear)
        if is_candidate and not any(name.startswith(f"{row.name}.") for row in rows):
            rows.append(Decision(name, type(module).__name__, 2.0, 1.0, None))
    fast = dstlib.accelerate(
        model, tuple(maps), masks=masks, dense_gradient=lambda name: all_graded, decisions=Decisions.of(rows)
    )
    for row in rows:
        assert type(fast.get_submodule(row.name)) is not type(model.get_submodule(row.name)), f"{row.name} is plain"
    return fast


def _outputs(model: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Written out: + 0 is what no layer waits for."""
    found = model(*maps)
    return [y + 0 for y in (found if isinstance(found, tuple) else (found,))]


def print_engine() -> None:
    """Prints the checksums of all cases by the kernels of this process, which $DSTLIB_ENGINE chooses."""
    print(json.dumps({name: computed(*case) for name, case in CASES.items()}))


def by_instruction_set(name: str) -> dict[str, dict[str, str]]:
    """The checksums of all cases by the kernels of an instruction set, from a process of its own."""
    root = str(Path(dstlib.__file__).parents[1])  # the dstlib that is looked at, whichever is installed
    environment = {**os.environ, "DSTLIB_ENGINE": name, "PYTHONPATH": root}
    command = [sys.executable, str(HERE / "write.py"), "print-engine"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, dict[str, str]] = json.loads(output)
    return found


def instruction_sets() -> tuple[str, ...]:
    """Those of this machine; none where there are no kernels."""
    best = info().path
    return SETS[SETS.index(best) :] if best in SETS else ()


def compiler() -> str:
    """What made the kernels, as it says in them."""
    (library,) = Path(dstlib.__file__).parent.rglob("_kernels*.so")
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes())
    return found[0].decode() if found else "unknown"


def write_engine() -> None:
    """engine.json."""
    sets = {name: by_instruction_set(name) for name in instruction_sets()}
    write("engine.json", {"compiler": compiler(), "sets": sets})

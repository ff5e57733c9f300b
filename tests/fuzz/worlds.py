"""One life of one network in three worlds: on the engine, in plain torch, and in float64, which is the reference.

Every event befalls all three alike; then what they gave, and all that they hold, has to be the same, or all refuse. The
references then take over the engine's parameters to the bit, so that rounding does not add up over a life. Where asked
for, more worlds of float64, whose layers are off by a little, show how far rounding may take a network.
"""

import copy
import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from fuzz.makers import LAYERS, Step, build, draw_steps
from torch import Tensor, nn

import dstlib
from dstlib.engine import Decision, Decisions, accelerate
from dstlib.engine.registry import obstacle
from dstlib.errors import DstlibError, SelectionError
from dstlib.inputs import tensors_in

CLOSE = 1e-4  # of the largest number of a tensor
CANCELLED = 3e-4  # rounding, 1e-6, by 1 / √1e-5, which norms multiply gradients by before their sums cancel
# What torch takes and the engine refuses, in these words
REFUSALS = {
    "other parameters": r"expected the layers, parameters and buffers that it was accelerated with",
    "weights outside masks": r"expected zeros outside their masks",
}
ORDER = "view size is not compatible"  # of what torch keeps in the order of an input, as channels last
KINDS_OF_REFUSAL = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
MODULE = importlib.import_module("dstlib.engine.accelerate")  # the package has the function under this name
Event = Callable[["World", Random], Any]


class FaultError(AssertionError):
    """The engine did otherwise than torch."""


@dataclass(frozen=True)
class Case:
    """A network and its life, of which all is said by names and seeds."""

    seed: int
    axes: int
    steps: tuple[Step, ...]
    most: int
    masked: str | None  # the method of a sparsifier, if there is one
    threads: int
    events: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, r: Random, events: Sequence[str], number: int, without: Sequence[str] = ()) -> "Case":
        """Draws a network, without some of the makers, and so many events of its life."""
        return cls(
            seed=r.randrange(2**31),
            axes=r.choice((2, 3, 4, 4, 5, 5, 5)),
            steps=tuple(draw_steps(r, 18, without)),
            most=r.randint(1, 6),
            masked=r.choice((None, None, "set", "rigl", "dsff")) if number else None,
            threads=r.choice((1, 1, 1, 2)),
            events=tuple((r.choice(events), r.randrange(2**31)) for _ in range(number)),
        )


@dataclass(eq=False)
class World:
    """A model that is called, the plain one from which it was made, and what else a life needs.

    In the reference worlds ``home`` is the model itself; on the engine, too, once the life goes on with a copy.
    """

    dtype: torch.dtype
    model: nn.Module
    home: nn.Module
    shapes: Sequence[tuple[int, ...]]
    layers: dict[str, tuple[int, ...]]  # names, and what they took
    facts: dict[str, dict[str, Any]]  # what these say of themselves
    is_doubled: bool  # a module has two names: torch's functional_call leaves the other parameters in it
    sparsifier: Any = None
    on_engine: bool = False
    handles: list[Any] = field(default_factory=list)
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # outputs, and their values when they were given

    def draw(self, r: Random, shape: Sequence[int]) -> Tensor:
        """Returns random numbers, the same in all worlds."""
        generator = torch.Generator().manual_seed(r.getrandbits(32))
        return torch.randn(tuple(shape), generator=generator).to(self.dtype)

    def input(self, r: Random) -> Tensor:
        """Returns an input of one of the sizes that this life knows."""
        return self.draw(r, r.choice(self.shapes))

    def keep(self, y: Any) -> Any:
        """Notes an output that its caller holds for the rest of the life, and that nobody may write to."""
        for each in tensors_in(y):
            self.kept.append((each, each.detach().clone()))
        return y

    def accelerate(self) -> None:
        """Puts the plain model on the engine again, as an error has asked for; it goes on in the mode it was in."""
        if self.on_engine:
            self.copy_modes()
            self.model = on_engine(self.home, self.draw(Random(0), self.shapes[0]), self.sparsifier)

    def copy_modes(self) -> None:
        """Gives the modules of the plain model the modes of those that are called, which need not be the same."""
        modes = {name: module.training for name, module in self.model.named_modules(remove_duplicate=False)}
        for name, module in self.home.named_modules(remove_duplicate=False):
            module.training = modes.get(name, module.training)

    def named(self) -> dict[str, Tensor]:
        """Returns parameters and buffers by name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


@dataclass(frozen=True)
class Shaken:
    """A hook that changes the output of a layer by up to a share of its largest, as another order of sums does."""

    share: float

    def __call__(self, layer: nn.Module, args: Any, y: Tensor) -> Tensor:
        if not y.numel():
            return y
        signs = torch.sin(1e3 * torch.arange(1.0, 1.0 + y.numel(), dtype=y.dtype)).reshape(y.shape)
        return y + self.share * y.detach().abs().max() * signs


def forced(model: nn.Module) -> Decisions:
    """Returns decisions for the engine wherever it can compute a layer."""
    found = ((name, layer, obstacle(layer)) for name, layer in MODULE._candidates(model))
    return Decisions.of(
        Decision(name, type(layer).__name__, *((None, None) if reason else (2.0, 1.0)), reason)
        for name, layer, reason in found
    )


def on_engine(model: nn.Module, example: Tensor, sparsifier: Any) -> nn.Module:
    """Returns the model with all that can run on the engine there."""
    make = sparsifier.accelerate if sparsifier else accelerate
    fast: nn.Module = make(model, example, decisions=forced(model))
    return fast


def _shape(r: Random, axes: int) -> tuple[int, ...]:
    sizes = {2: 0, 3: 1, 4: 2, 5: 3}[axes]
    most = 12 if axes == 4 else 9
    return r.randint(1, 3), r.choice((1, 2, 3, 4, 6, 8, 13)), *(r.randint(1, most) for _ in range(sizes))


def _sizes(r: Random, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the shapes that a life knows: the example's, with another batch, and with other extents."""
    batch, channels, *extents = shape
    return [
        shape,
        (batch + r.randint(1, 2), *shape[1:]),
        (batch, channels, *(n + r.choice((0, 1, 4)) for n in extents)),
    ]


def _make_sparse(r: Random, model: nn.Module) -> None:
    """Writes zeros in one of many patterns into each weight."""
    for parameter in dict.fromkeys(model.parameters()):
        with torch.no_grad():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # norms that are more than 1 and 0
                continue
            out, into = parameter.shape[:2]
            shares = torch.rand(out, into)
            match r.choice(("dense", "dense", "weights", "kernels", "kernels", "rows", "blocks", "nothing")):
                case "weights":
                    parameter[torch.rand_like(parameter) < r.choice((0.5, 0.9))] = 0
                case "kernels":
                    parameter[shares < r.choice((0.5, 0.9))] = 0
                case "rows":
                    parameter[shares[:, 0] < 0.5] = 0
                case "blocks":
                    few = torch.rand(-(-out // 4), -(-into // 4)) < 0.6
                    parameter[few.repeat_interleave(4, 0).repeat_interleave(4, 1)[:out, :into]] = 0
                case "nothing":
                    parameter.zero_()


def begin(case: Case, shares: Sequence[float] = ()) -> list[World]:
    """Returns the worlds of a case: on the engine, in plain torch, in float64, and shaken by each of these shares."""
    r = Random(case.seed)
    shape = _shape(r, case.axes)
    torch.manual_seed(case.seed)
    example = torch.randn(shape)
    network = build(case.steps, example, case.most)
    torch.manual_seed(case.seed)
    _make_sparse(r, network)
    network.train(r.random() < 0.5)
    shapes = _sizes(r, shape)
    layers = _seen(network, example)
    facts = {name: _facts(network.get_submodule(name)) for name in layers}
    is_doubled = len([*network.modules()]) < len([*network.named_modules(remove_duplicate=False)])
    worlds = []
    for index, dtype in enumerate((torch.float32, torch.float32, torch.float64, *(torch.float64 for _ in shares))):
        model = copy.deepcopy(network).to(dtype)
        world = World(dtype, model, model, shapes, layers, facts, is_doubled)
        if case.masked:
            method = getattr(dstlib, case.masked.upper())
            with suppress(SelectionError):  # there is no weight to make sparse
                world.sparsifier = dstlib.sparsify(
                    model, sparsity=0.6, method=replace(method, interval=2), total_steps=100, seed=case.seed
                )
        if index == 0:
            world.on_engine = True
            world.accelerate()
        for module in model.modules() if index > 2 else ():
            if isinstance(module, LAYERS):
                module.register_forward_hook(Shaken(shares[index - 3]))
        worlds.append(world)
    return worlds


def _seen(network: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Returns the layers of a network by name, and the shape that each was called with."""
    trial, found = copy.deepcopy(network), {}

    def note(name: str) -> Any:
        return lambda module, args: found.update({name: tuple(args[0].shape)}) if args else None

    for name, module in trial.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        trial(example.clone())
    return found


def _facts(layer: nn.Module) -> dict[str, Any]:
    """Returns what a layer says of itself: numbers and words that are its attributes."""
    kinds = int | float | str | tuple
    return {k: v for k, v in vars(layer).items() if isinstance(v, kinds) and k[0] != "_" and k != "training"}


def live(case: Case, events: dict[str, Event], shares: Sequence[float] = ()) -> Iterator[str]:
    """Lives a life, and yields what each event came to; numbers may be off by what worlds shaken by ``shares`` are.

    Raises:
        FaultError: The engine did otherwise than torch.
    """
    torch.set_num_threads(case.threads)
    worlds = begin(case, shares)
    yield f"{_num_fast(worlds[0])} layers on the engine"
    for index, (name, seed) in enumerate(case.events):
        given = []
        for world in worlds:
            torch.manual_seed(seed)
            try:
                given.append(events[name](world, Random(seed)))
            except KINDS_OF_REFUSAL as error:
                given.append(error)
        where = f"event {index}, {name}"
        outcome = _compared(where, worlds, given)
        yield f"{where}: {outcome}"
        if outcome == "the sparsifier refuses":
            return
        if outcome in REFUSALS:
            if worlds[0].home is worlds[0].model or worlds[0].handles or worlds[0].sparsifier:
                return  # nothing is left to begin anew with, or another sparsifier would have to
            worlds[0].accelerate()
        elif outcome == "the same":
            if not _have_same_masks(where, worlds):
                return  # float32 and float64 chose other weights, of nearly the same size: no life alike is left
            _compare_held(where, worlds)
        for world in worlds[1:]:
            _take_over(where, world, worlds[0])


def _num_fast(world: World) -> int:
    return sum(row.is_fast for row in world.model.decisions.values()) if world.on_engine else 0


def _compared(where: str, worlds: Sequence[World], given: Sequence[Any]) -> str:
    """Compares what an event gave, and returns what it came to.

    Raises:
        FaultError: They are not the same.
    """
    got, plain, exact, *shaken = given
    if isinstance(got, DstlibError) and not isinstance(plain, DstlibError):
        for name, pattern in REFUSALS.items():
            if re.search(pattern, str(got)):
                return name
    if isinstance(plain, DstlibError):
        return "the sparsifier refuses"  # parameters that are not those that it made sparse
    if isinstance(plain, Exception):
        if ORDER in str(plain):
            return "torch does not view"
        if not isinstance(got, Exception):
            raise FaultError(f"{where}: torch refuses ({plain!r}), the engine does not") from plain
        return "both refuse"
    if isinstance(got, Exception):
        raise FaultError(f"{where}: the engine refuses what torch takes: {got!r}") from got
    if isinstance(exact, Exception):
        return "no reference"
    ours, theirs, reference = (list(tensors_in(each)) for each in given[:3])
    others = [list(tensors_in(each)) for each in shaken if not isinstance(each, Exception)]
    if not len(ours) == len(theirs) == len(reference):
        raise FaultError(f"{where}: {len(ours)} tensors, not {len(theirs)}")
    for index, each in enumerate(zip(ours, theirs, reference, *others, strict=True)):
        _compare(f"{where}, result {index}", *each)
    return "the same"


def _compare(where: str, got: Tensor, plain: Tensor, exact: Tensor, *shaken: Tensor, floor: float = 1e-6) -> None:
    """Compares a tensor with the exact one: within a share of its largest, or 30 times what torch's own is off.

    Or within what shaken ones are off.
    """
    if got.shape != plain.shape or (got.dtype != plain.dtype and got.dtype != exact.dtype):
        raise FaultError(f"{where}: {got.dtype} {tuple(got.shape)}, not {plain.dtype} {tuple(plain.shape)}")
    got, plain, exact = ((x.detach() + 0).double() for x in (got, plain, exact))
    if not exact.isfinite().all() or not plain.isfinite().all():
        return
    if not got.numel():
        return
    off, theirs, largest = ((got - exact).abs().max(), (plain - exact).abs().max(), exact.abs().max())
    moved = max(((x.detach() - exact).abs().max().nan_to_num(torch.inf) for x in shaken), default=0.0)
    if not off <= CLOSE * largest + 30 * theirs + moved + floor:
        raise FaultError(f"{where}: off by {off:.1e}, torch by {theirs:.1e}, of {largest:.1e}")


def _largest(x: Tensor | None) -> float:
    return 0.0 if x is None or not x.numel() else float(x.abs().max())


def _have_same_masks(where: str, worlds: Sequence[World]) -> bool:
    """Tells whether the masks are the same in all worlds.

    Raises:
        FaultError: The engine's are others than torch's, which are those of all other worlds.
    """
    if not worlds[0].sparsifier:
        return True
    for name, mask in worlds[0].sparsifier.masks.items():
        plain, *others = (world.sparsifier.masks[name] for world in worlds[1:])
        if not all(torch.equal(plain, each) for each in others):
            return False
        if not torch.equal(mask, plain):
            raise FaultError(f"{where}: another mask of {name}")
    return True


def _compare_held(where: str, worlds: Sequence[World]) -> None:
    """Compares parameters, buffers, gradients, modes, and outputs that are still held."""
    held = [world.named() for world in worlds]
    if held[0].keys() != held[1].keys():
        raise FaultError(f"{where}: holds {sorted(held[0].keys() ^ held[1].keys())} or not")
    masks = worlds[0].sparsifier.masks if worlds[0].sparsifier else {}
    largest = max([0.0, *(_largest(x.grad) for x in held[2].values())])
    # gradients that are zero but for rounding, such as that of a bias before a norm: as exact as torch's are together
    lost = [name for name, x in held[2].items() if x.grad is not None and _largest(x.grad) < 1e-10 * largest]
    pairs = [(held[1][name], held[2][name]) for name in lost if held[1][name].grad is not None]
    noise = 30 * max([0.0, *(_largest(y.detach() - z.detach()) for y, z in pairs)])
    noise_of_grads = 30 * max([0.0, *(_largest(y.grad - z.grad) for y, z in pairs)])
    for name in held[0]:
        tensors = [each[name] for each in held]
        _compare(f"{where}, {name}", *tensors, floor=1e-6 + noise * (name in lost))
        given = [x.grad for x in tensors]
        if any(g is None for g in given):
            if not all(g is None for g in given):
                raise FaultError(f"{where}, gradient of {name}: {[g is not None for g in given]}")
            continue
        shown = [g * masks[name] for g in given] if name in masks else given
        floor = CANCELLED * largest + noise_of_grads if name in lost else 1e-5 * largest
        _compare(f"{where}, gradient of {name}", *shown, floor=floor + 1e-9)
    if [m.training for _, m in worlds[0].model.named_modules()][:1] != [worlds[1].model.training]:
        raise FaultError(f"{where}: another mode")
    for each, value in worlds[0].kept:
        if not torch.allclose(each.detach() + 0, value, rtol=0, atol=0, equal_nan=True):
            raise FaultError(f"{where}: an output of before has changed")


@torch.no_grad()
def _take_over(where: str, world: World, source: World) -> None:
    ours, theirs = source.named(), world.named()
    if ours.keys() != theirs.keys():
        raise FaultError(f"{where}: holds {sorted(ours.keys() ^ theirs.keys())} or not")
    for name, tensor in theirs.items():
        if tensor.is_inference() or tensor._is_view():
            continue
        tensor.copy_(ours[name])
        grad = ours[name].grad
        tensor.grad = None if grad is None else grad.to(tensor.dtype, copy=True)

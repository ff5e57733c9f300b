"""Small random nets whose gradients are dictated, so that each step of a run can be computed beside the library."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

import dstlib

from .counts import Shapes, nearest

RATE, MOMENTUM = 0.1, 0.9
LAST_BIT = 1e-12  # torch may fuse a product and a sum, which changes the last bit of weights of size 1 to 10
SPARSITIES = (0.5, 0.6, 0.75, 0.8, 0.9, 0.95)


@dataclass
class Layer:
    """A weight as a paper sees it; ``grad`` is that of all weights."""

    w: np.ndarray
    mask: np.ndarray
    start: float  # how many are active where its ramp begins, and
    final: float  # where the run ends, before both are rounded
    grad: np.ndarray = field(init=False)
    velocity: np.ndarray = field(init=False)
    past: list[np.ndarray] = field(default_factory=list)  # the gradients of all steps, the present one last

    def __post_init__(self) -> None:
        self.velocity, self.dense = np.zeros_like(self.w), self.w  # as it was at first

    def trace(self, decay: float, steps: int) -> np.ndarray:
        """A momentum that inactive weights have too, of the last steps."""
        return sum(decay**age * grad for age, grad in enumerate(self.past[: -steps - 1 : -1]))

    @property
    def size(self) -> np.ndarray:
        return np.abs(self.w)

    @property
    def num(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True)
class Outcome:
    """What an update comes to: those that stay whatever grows, and how many there are then.

    ``mask`` is the whole of it; None where chance has a part: ``check`` then says what else the mask must be, and
    ``odds`` of one place how likely it is to be active.
    """

    kept: np.ndarray
    num: int
    mask: np.ndarray | None = None
    odds: tuple[int, float] | None = None
    check: Callable[[np.ndarray], None] = lambda mask: None


@dataclass(frozen=True)
class Moment:
    """An update: ``end`` is T_end of the papers, ``last`` the last step that updates, ``seen`` what the library has."""

    step: int
    total: int
    end: float
    last: int
    layers: Mapping[str, Layer]
    memory: dict[str, float]
    seen: Mapping[str, int]


def learn(layer: Layer, density: float) -> None:
    """One step of SGD on the active weights: what is not active has neither value nor momentum."""
    layer.velocity = MOMENTUM * layer.velocity + np.where(layer.mask, layer.grad, 0.0)
    layer.w = layer.w - RATE * layer.velocity


def active(layer: Layer) -> np.ndarray:
    return layer.w * layer.mask


def start_at_zero(layer: Layer, mask: np.ndarray) -> None:
    """Grown weights start from zero, without momentum; what comes back at once keeps both."""
    layer.w, layer.velocity = (np.where(mask & layer.mask, x, 0.0) for x in (layer.w, layer.velocity))


@dataclass(frozen=True)
class Reference:
    """A preset by its definition; ``every`` and ``until`` are its interval and its share of the run."""

    counts: Callable[[Shapes, float], Mapping[str, float]]
    update: Callable[[Moment], Mapping[str, Outcome]] | None
    every: float | None = 100
    until: float = 0.75
    start: Callable[[Shapes, float], Mapping[str, float]] | None = None  # where its ramp begins, if not there
    first: Callable[[Shapes, float], Mapping[str, float]] | None = None  # in the first mask, if not ``start``
    interval: int = 2  # of the tests, which make ``updates`` of them
    updates: int = 6
    layers: int = 2
    check_first: Callable[[np.ndarray], None] = lambda mask: None
    sparsities: tuple[float, ...] = SPARSITIES
    learn: Callable[[Layer, float], None] = learn
    resets: bool = False  # momentum begins afresh where a layer has more weights than before
    shows: Callable[[Layer], np.ndarray] = active  # what the model computes with
    stored: bool = False  # weights live on under the mask, which follows them after each step


@dataclass
class Chance:
    """How often places were active that chance decides on, and how often they should be."""

    active: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def see(self, outcome: Outcome, mask: np.ndarray) -> None:
        if outcome.odds is not None:
            place, p = outcome.odds
            self.active += int(mask.ravel()[place])
            self.expected += p
            self.variance += p * (1 - p)


def random_net(rng: np.random.Generator, layers: int) -> nn.Module:
    """Some layers, or one more, which are never called; in double precision, with inputs by fours, as for N:M."""
    net = nn.Module()
    for i in range(layers + (rng.random() < 0.2)):
        out, fours = int(rng.integers(2, 9)), int(rng.integers(1, 5))
        if rng.random() < 0.6:
            net.add_module(f"l{i}", nn.Linear(4 * fours, out, bias=False))
        else:
            kernel = tuple(int(n) for n in rng.integers(1, 4, 2))
            net.add_module(f"l{i}", nn.Conv2d(4 * (1 + fours // 4), out, kernel, bias=False))
    net.double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.from_numpy(rng.standard_normal(tuple(p.shape))))
    return net


class Run:
    """A preset on a net of its own, and beside it what the definition makes of the same gradients."""

    def __init__(self, method: dstlib.Method, reference: Reference, seed: int, chance: Chance) -> None:
        self.rng = np.random.default_rng(seed)
        self.reference, self.where, self.chance = reference, f"{method.name}, seed {seed}", chance
        net, self.sparsity = random_net(self.rng, reference.layers), float(self.rng.choice(reference.sparsities))
        self.weights = dict(net.named_parameters())
        dense = {n: p.detach().numpy().copy() for n, p in self.weights.items()}
        shapes = {n: w.shape for n, w in dense.items()}
        self.total = math.ceil(reference.interval * reference.updates / reference.until)
        assert method.interval == reference.every, f"{method.name}: an update each {method.interval} steps"
        assert reference.every is None or method.stop == reference.until, f"{method.name}: until {method.stop}"
        if reference.every is not None:
            method = replace(method, interval=reference.interval)
        self.optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=MOMENTUM)
        self.sparsifier = dstlib.sparsify(
            net,
            self.optimizer,
            sparsity=self.sparsity,
            method=method,
            total_steps=self.total,
            seed=seed,
            keep_neurons=(),  # no layer is an output of a net that is never called
        )
        final = reference.counts(shapes, self.sparsity)
        start = (reference.start or reference.counts)(shapes, self.sparsity)
        first = reference.first(shapes, self.sparsity) if reference.first else start
        self.layers = {
            n: Layer(w=dense[n], mask=mask, start=start[n], final=final[n]) for n, mask in self.masks().items()
        }
        for n, layer in self.layers.items():
            assert layer.num == nearest(first[n]), f"{self.where}, {n}: {layer.num} active at first, not {first[n]}"
            if not reference.stored:
                layer.w = layer.w * layer.mask
        self.memory: dict[str, float] = {}
        self.compare()

    def masks(self) -> dict[str, np.ndarray]:
        return {n: mask.numpy().copy() for n, mask in self.sparsifier.masks.items()}

    def follow(self) -> None:
        for step in range(1, self.total + 1):
            for n, layer in self.layers.items():
                layer.grad = self.rng.standard_normal(layer.w.shape)
                layer.past.append(layer.grad)
                self.weights[n].grad = torch.from_numpy(layer.grad.copy())
            self.optimizer.step()
            every, end = self.reference.interval, self.reference.until * self.total
            due = self.reference.every is not None and step % every == 0 and step <= end
            if due and not self.reference.stored:
                self.update(step, end)
            for layer in self.layers.values():
                self.reference.learn(layer, 1 - self.sparsity)
            if due and self.reference.stored:
                self.update(step, end)
            self.compare()

    def update(self, step: int, end: float) -> None:
        every, new = self.reference.interval, self.masks()
        seen = {n: int(mask.sum()) for n, mask in new.items()}
        at = Moment(step, self.total, end, int(end) // every * every, self.layers, self.memory, seen)
        for n, outcome in self.reference.update(at).items():
            layer, where = self.layers[n], f"{self.where}, step {step}, {n} {self.layers[n].w.shape}"
            assert new[n][outcome.kept].all(), f"{where}: not all were kept that should be"
            assert seen[n] == outcome.num, f"{where}: {seen[n]} active, not {outcome.num}"
            assert outcome.mask is None or (new[n] == outcome.mask).all(), f"{where}: others were grown"
            outcome.check(new[n])
            self.chance.see(outcome, new[n])
            if not self.reference.stored:
                start_at_zero(layer, new[n])
            if self.reference.resets and seen[n] > layer.num:
                layer.velocity = np.zeros_like(layer.w)
            layer.mask = new[n]

    def compare(self) -> None:
        for n, mask in self.masks().items():
            layer, weight = self.layers[n], self.weights[n]
            assert (mask == layer.mask).all(), f"{self.where}, {n}: the mask moved"
            assert not weight.detach().numpy()[~mask].any(), f"{self.where}, {n}: not zero outside the mask"
            off = np.abs(weight.detach().numpy() - self.reference.shows(layer)).max()
            assert off < LAST_BIT, f"{self.where}, {n}: weights are off by {off}"
            if state := self.optimizer.state.get(weight):
                off = np.abs(state["momentum_buffer"].numpy() - layer.velocity).max()
                assert off < LAST_BIT, f"{self.where}, {n}: the momentum is off by {off}"

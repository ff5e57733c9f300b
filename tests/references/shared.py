"""Methods whose layers share one number of weights."""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from .bench import Layer, Moment, Outcome
from .counts import best, best_of_all, cosine, cubic, nearest, round_up
from .exchange import drop_and_grow, per_layer

Counts = Mapping[str, int]


def whole(real: Mapping[str, float], at: Moment) -> Mapping[str, int]:
    """The whole numbers taken for real ones: each next to its own, together exactly as many."""
    assert all(abs(at.seen[name] - x) < 1 for name, x in real.items()), (at.seen, real)
    assert sum(at.seen.values()) == round(sum(real.values())), (at.seen, real)
    return at.seen


def share(amount: int, worth: Mapping[str, float], least: Counts, room: Counts) -> dict[str, float]:
    """Splits an amount in proportion to what all are worth, between bounds, by the factor at which they add up."""
    low, high = 0.0, max(room.values()) / min(worth.values())
    for _ in range(200):  # halvings
        factor = (low + high) / 2
        given = {name: min(max(factor * worth[name], least[name]), room[name]) for name in worth}
        low, high = (factor, high) if sum(given.values()) < amount else (low, factor)
    return given


def regrow(
    at: Moment, drop: Mapping[str, int], worth: Mapping[str, float], grow: Mapping[str, np.ndarray | None]
) -> dict[str, Outcome]:
    """Drops a number in each layer by magnitude, and grows as many together, by what the layers are worth.

    Each then has one weight at least.
    """
    kept = {name: layer.num - drop[name] for name, layer in at.layers.items()}
    least = {name: max(1 - num, 0) for name, num in kept.items()}
    room = {name: layer.w.size - kept[name] for name, layer in at.layers.items()}
    grown = share(sum(drop.values()), worth, least, room)
    num = whole({name: kept[name] + grown[name] for name in kept}, at)
    return {n: drop_and_grow(layer, layer.size, kept[n], grow[n], num[n]) for n, layer in at.layers.items()}


def snfs(at: Moment) -> dict[str, Outcome]:
    """Dettmers & Zettlemoyer 2019: layers whose active weights have more momentum take more of what goes.

    By the authors' program one that is nearly dense, and is to grow, drops no larger share than it has zeros.
    """
    f = cosine(0.5, at.step / at.end, 0.005)
    momentum = {name: np.abs(layer.trace(0.9, at.step)) for name, layer in at.layers.items()}
    worth = {name: float(momentum[name][layer.mask].mean()) for name, layer in at.layers.items()}
    drop = {}
    for name, layer in at.layers.items():
        zeros = 1 - layer.num / layer.w.size
        grows = worth[name] > sum(worth.values()) / len(worth)
        drop[name] = round_up((min(zeros, f) if zeros < 0.2 and grows else f) * layer.num)
    return regrow(at, drop, worth, momentum)


def dsr(at: Moment) -> dict[str, Outcome]:
    """Mostafa & Wang 2019, Algorithm 1: all below H goes, comes back in proportion to what stayed, and H adapts."""
    H = at.memory.get("H", 0.001)
    stays = {name: max(int((layer.mask & (layer.size >= H)).sum()), 1) for name, layer in at.layers.items()}
    drop = {name: layer.num - stays[name] for name, layer in at.layers.items()}
    missed = sum(drop.values()) / (0.1 * sum(layer.num for layer in at.layers.values()))
    at.memory["H"] = H * 2 if missed < 0.9 else H / 2 if missed > 1.1 else H
    return regrow(at, drop, stays, dict.fromkeys(drop))


def planned(at: Moment, ramp: float) -> dict[str, int]:
    """The number of each layer on its way from the first to the final one."""
    return {name: nearest((1 - ramp) * layer.start + ramp * layer.final) for name, layer in at.layers.items()}


@per_layer
def gmp(layer: Layer, at: Moment) -> Outcome:
    ramp = cubic(at.step / at.last)
    num = nearest((1 - ramp) * layer.start + ramp * layer.final)
    kept = best(layer.size, num, layer.mask)
    return Outcome(kept, num, kept)


def largest_of_all(at: Moment, ramp: float) -> dict[str, np.ndarray]:
    """The largest active weights of all layers, as many as are planned for all."""
    sizes, masks = ({n: getattr(layer, x) for n, layer in at.layers.items()} for x in ("size", "mask"))
    return best_of_all(sizes, sum(planned(at, ramp).values()), masks)


def gmp_global(at: Moment) -> dict[str, Outcome]:
    return {
        name: Outcome(kept, int(kept.sum()), kept)
        for name, kept in largest_of_all(at, cubic(at.step / at.last)).items()
    }


def granet(at: Moment) -> dict[str, Outcome]:
    """Liu et al. 2021, Algorithm 1: all layers are pruned together, then each exchanges half of what it has left.

    As in the authors' program pruning ends early, here half-way, and exchange goes on.
    """
    f, pruned = cosine(0.5, at.step / at.end, 0.005), largest_of_all(at, cubic(2 * at.step / at.last))
    result = {}
    for name, layer in at.layers.items():
        left = int(pruned[name].sum())
        kept = best(layer.size, left - round_up(f * left), pruned[name])
        result[name] = Outcome(kept, left, kept | best(np.abs(layer.grad), left - int(kept.sum()), ~kept))
    return result


def is_sparse(done: Fraction) -> bool:
    """AC/DC's 100 epochs of ImageNet: from 10 sparse and dense by fives, from 75 dense, from 85 sparse."""
    return done >= Fraction(85, 100) or (Fraction(10, 100) <= done < Fraction(75, 100) and int(done * 20) % 2 == 0)


def acdc(at: Moment) -> dict[str, Outcome]:
    """Peste et al. 2021, Algorithm 1: all weights, or the largest of all layers, in turn."""
    mask = {name: np.ones_like(layer.mask) for name, layer in at.layers.items()}
    if is_sparse(Fraction(at.step, at.total)):
        mask = largest_of_all(at, 1.0)
    return {name: Outcome(new & at.layers[name].mask, int(new.sum()), new) for name, new in mask.items()}

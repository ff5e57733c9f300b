"""Methods by which each layer exchanges weights for itself."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from .bench import Layer, Moment, Outcome
from .counts import best, cosine, nearest, round_down, round_up

Update = Callable[[Moment], Mapping[str, Outcome]]


def per_layer(rule: Callable[[Layer, Moment], Outcome]) -> Update:
    """Makes what happens to a layer what happens to all."""

    def update(at: Moment) -> dict[str, Outcome]:
        return {name: rule(layer, at) for name, layer in at.layers.items()}

    return update


def drop_and_grow(
    layer: Layer, score: np.ndarray, num_kept: int, grow: np.ndarray | None = None, num: int | None = None
) -> Outcome:
    """Keeps the best by a score and fills up, by another or by chance; what was dropped may come back at once."""
    kept, num = best(score, num_kept, layer.mask), layer.num if num is None else num
    if grow is None:
        return Outcome(kept, num, odds=odds_of_return(layer, kept, score, num))
    return Outcome(kept, num, kept | best(grow, num - num_kept, ~kept))


def odds_of_return(layer: Layer, kept: np.ndarray, score: np.ndarray, num: int) -> tuple[int, float] | None:
    """The best of those that were dropped, and how likely it grows by chance: had it been kept, it would be 1."""
    dropped = layer.mask & ~kept
    if not dropped.any():
        return None
    return int(np.argmax(np.where(dropped, score, -np.inf))), (num - int(kept.sum())) / int((~kept).sum())


@per_layer
def rigl(layer: Layer, at: Moment) -> Outcome:
    """Evci et al. 2020, Algorithm 1: the smallest weights go, those of the largest gradients come."""
    f = cosine(0.3, at.step / at.end)
    return drop_and_grow(layer, layer.size, layer.num - round_down(f * layer.num), np.abs(layer.grad))


def itop(grow: Callable[[Layer], np.ndarray | None]) -> Update:
    """Liu et al. 2021: half of the weights at first, rounded up as in the authors' program."""

    @per_layer
    def update(layer: Layer, at: Moment) -> Outcome:
        f = cosine(0.5, at.step / at.end, 0.005)
        return drop_and_grow(layer, layer.size, layer.num - round_up(f * layer.num), grow(layer))

    return update


set_itop, rigl_itop = itop(lambda layer: None), itop(lambda layer: np.abs(layer.grad))


@per_layer
def set_(layer: Layer, at: Moment) -> Outcome:
    """Mocanu et al. 2018: the same share of the positive and of the negative weights goes, those next to zero."""
    rank = np.zeros(layer.w.shape)
    for side in (layer.mask & (layer.w > 0), layer.mask & (layer.w < 0)):
        rank[side] = (layer.size[side].argsort().argsort() + 1) / max(side.sum(), 1)
    return drop_and_grow(layer, rank, layer.num - round_down(0.3 * layer.num))


def stage(done: float, first: float, second: float) -> float:
    """Yuan et al. 2021: the first until 9/16 of the run, the second until 12/16, when updates end."""
    return first if done < 0.75 else second if done < 1 else 0.0


@per_layer
def mest(layer: Layer, at: Moment) -> Outcome:
    drop = round_down(stage(at.step / at.end, 0.2, 0.1) * layer.num)
    return drop_and_grow(layer, layer.size + 0.01 * np.abs(layer.grad), layer.num - drop)


@per_layer
def mest_soft(layer: Layer, at: Moment) -> Outcome:
    """EM&S: the weakest go until the target is met, then others come on top of it until the next update."""
    num = min(nearest((1 + stage(at.step / at.last, 0.5, 0.25)) * layer.final), layer.w.size)
    return drop_and_grow(layer, layer.size + 0.01 * np.abs(layer.grad), nearest(layer.final), num=num)


@per_layer
def gse(layer: Layer, at: Moment) -> Outcome:
    """Heddes et al. 2024: as many of the inactive weights as there are active ones compete to grow, by gradient."""
    grown, inactive, grad = round_down(cosine(0.2, at.step / at.end) * layer.num), ~layer.mask, np.abs(layer.grad)
    kept = best(layer.size, layer.num - grown, layer.mask)
    if layer.num >= inactive.sum():  # all of them
        mask = kept | best(grad, grown, inactive)
        return Outcome(kept, layer.num, mask | best(grad, layer.num - int(mask.sum()), ~mask))

    def none_comes_back(mask: np.ndarray) -> None:
        assert not (mask & layer.mask & ~kept).any()

    highest = int(np.argmax(np.where(inactive, grad, -1.0)))
    odds = (highest, layer.num / int(inactive.sum())) if grown else None
    return Outcome(kept, layer.num, odds=odds, check=none_comes_back)


@per_layer
def seft(layer: Layer, at: Moment) -> Outcome:
    """Xiao et al. 2025: what matters least to the loss goes, the largest gradient of five steps comes."""
    kept = layer.num - round_down(0.2 * (1 - at.step / at.end) * layer.num)
    return drop_and_grow(layer, np.abs(layer.w * layer.grad), kept, np.abs(layer.trace(1.0, 5)))


@per_layer
def cyclic(layer: Layer, at: Moment) -> Outcome:
    """EAST (Li et al. 2024): the density swings to its threefold and back, twice in two fifths of the run."""
    done = at.step / at.last
    swing = (1 - math.cos(2 * math.pi * done / 0.2)) / 2 if done < 0.4 else 0.0
    num = nearest(layer.final + (layer.start - layer.final) * swing)
    stay = layer.num - round_up(cosine(0.5, at.step / at.end, 0.005) * layer.num)
    return drop_and_grow(layer, layer.size, min(stay, num), np.abs(layer.grad), num)

"""Methods with a structure: kernels, constant fan-in, links predicted from the topology, patterns of N:M."""

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from .bench import MOMENTUM, RATE, Layer, Moment, Outcome
from .counts import Shapes, best, cosine, erk, nearest, round_down, uniform
from .exchange import odds_of_return, per_layer

Degrees = tuple[np.ndarray, np.ndarray]
SAME = 1e-6  # scores are sums in another order, rounded to single precision by the library


def kernels(shapes: Shapes, sparsity: float) -> dict[str, float]:
    taps = {name: math.prod(shape[2:]) for name, shape in shapes.items()}
    return {name: taps[name] * nearest(num / taps[name]) for name, num in uniform(shapes, sparsity).items()}


@per_layer
def dsff(layer: Layer, at: Moment) -> Outcome:
    """Wu et al. 2024: whole kernels go by their L1 norm, floor(f·A) of A, and come by chance."""
    f, taps = cosine(0.5, at.step / at.end, 0.001), tuple(range(2, layer.w.ndim))
    norm, active = layer.size.sum(taps), layer.mask.any(taps)
    num = int(active.sum())
    kept, score = (
        np.broadcast_to(np.expand_dims(x, taps), layer.w.shape)
        for x in (best(norm, num - round_down(f * num), active), norm)
    )

    def kernels_are_whole(mask: np.ndarray) -> None:
        assert (mask.any(taps) == mask.all(taps)).all()

    return Outcome(kept, layer.num, odds=odds_of_return(layer, kept, score, layer.num), check=kernels_are_whole)


def outputs_are_alike(mask: np.ndarray) -> None:
    """Each has as many weights as any other, but for one where they do not divide."""
    num = mask.sum(tuple(range(1, mask.ndim)))
    assert num.max() - num.min() <= (num.sum() % num.size > 0), num


def constant_fan_in(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return {name: shapes[name][0] * nearest(num / shapes[name][0]) for name, num in erk(shapes, sparsity).items()}


def srigl(layer: Layer, at: Moment, gamma: float = 0.3) -> Outcome:
    """Lasby et al. 2024, section 3: neurons with few salient weights are ablated, the others have equally many."""
    w, g, m = (x.reshape(len(x), -1) for x in (layer.size, np.abs(layer.grad), layer.mask))
    total, K = round(layer.final), round_down(cosine(0.3, at.step / at.end) * layer.num)
    salient = (best(w, layer.num - K, m) | best(g, K, ~m)).sum(1)
    enough = np.sort(salient)[::-1][min(-(-total // m.shape[1]), len(m) - 1)]  # more stay than hold the weights
    alive = salient >= max(min(round_down(gamma * (total // len(m))), enough), 1)
    fan_in = min(total // alive.sum(), m.shape[1])
    kept = best(w, layer.num - K, m & alive[:, None])
    kept = np.array([best(w[i], fan_in, row) for i, row in enumerate(kept)])
    mask = np.array([row | best(g[i], (fan_in - row.sum()) * alive[i], ~row) for i, row in enumerate(kept)])
    kept, mask = kept.reshape(layer.w.shape), mask.reshape(layer.w.shape)
    return Outcome(kept, int(mask.sum()), mask)


def communities(m: np.ndarray) -> Iterator[tuple[tuple[int, int], np.ndarray, tuple[Degrees, Degrees]]]:
    """Yields each missing link, the links between its community, and of each side's nodes inner and outer links."""
    for u, v in zip(*np.nonzero(~m), strict=True):
        within = m & m[:, [v]] & m[[u]]  # those of the inputs that u has to the outputs that v has
        inner = tuple(within.sum(axis) for axis in (0, 1))
        yield (
            (u, v),
            within,
            tuple((i, np.maximum(m.sum(axis) - i - 1, 0)) for axis, i in enumerate(inner)),
        )  # - to u, v


def ch2_l3n(m: np.ndarray) -> np.ndarray:
    """Σ (1 + inner links) / (1 + outer links) over the nodes of the community of each missing link."""
    score = np.zeros(m.shape)
    for link, _, sides in communities(m):
        score[link] = sum(((1 + inner) / (1 + outer))[inner > 0].sum() for inner, outer in sides)
    return score


def ch3_l3p(m: np.ndarray) -> np.ndarray:
    """Σ 1/√((1 + outer links of a)·(1 + those of b)) over the paths u - a - b - v of each missing link."""
    score = np.zeros(m.shape)
    for link, within, ((_, of_inputs), (_, of_outputs)) in communities(m):
        score[link] = (within / np.sqrt(np.outer(1 + of_outputs, 1 + of_inputs))).sum()
    return score


@per_layer
def cht(layer: Layer, at: Moment) -> Outcome:
    """Zhang et al. 2024: the smallest weights go, then links are predicted from those that are left, ties by chance."""
    kept = best(layer.size, layer.num - round_down(0.3 * layer.num), layer.mask)
    if (grown := layer.num - int(kept.sum())) == 0:
        return Outcome(kept, layer.num, kept)
    score = ch3_l3p(kept.reshape(len(kept), -1)).reshape(kept.shape)
    lowest = np.sort(score[~kept])[-grown]
    above = kept | (score > lowest * (1 + SAME))
    alike = np.flatnonzero(~above & (score >= lowest * (1 - SAME)))

    def others_are_alike(mask: np.ndarray) -> None:
        assert above.sum() + mask.ravel()[alike].sum() == layer.num

    return Outcome(above, layer.num, odds=(alike[0], (layer.num - above.sum()) / alike.size), check=others_are_alike)


@per_layer
def chts(layer: Layer, at: Moment) -> Outcome:
    """Zhang et al. 2025: chance has a say in both; ``chts_law`` says how often what happens."""

    def enough_stay(mask: np.ndarray) -> None:
        assert (mask & layer.mask).sum() >= layer.num - round_down(0.3 * layer.num)

    return Outcome(np.zeros_like(layer.mask), layer.num, check=enough_stay)


def relative_importance(w: np.ndarray) -> np.ndarray:
    """CHTs, equation 1: the share of a weight of its output, plus that of its input."""
    size = np.abs(w).reshape(len(w), -1)
    sums = (np.broadcast_to(size.sum(axis, keepdims=True), size.shape) for axis in (0, 1))
    return sum(np.divide(size, total, out=np.zeros_like(size), where=total > 0) for total in sums).reshape(w.shape)


@per_layer
def chtss(layer: Layer, at: Moment) -> Outcome:
    """CHTss: the density falls along an S of steepness 6, by relative importance; the rest is exchanged as in CHTs."""
    low, here = (1 / (1 + math.exp(-6 * (2 * p - 1))) for p in (0.0, at.step / at.last))
    ramp = (here - low) / (1 - 2 * low)
    num = nearest((1 - ramp) * layer.start + ramp * layer.final)
    pruned = best(relative_importance(layer.w), num, layer.mask)

    def enough_stay(mask: np.ndarray) -> None:
        assert (mask & pruned).sum() >= num - round_down(cosine(0.3, at.step / at.end) * num)

    return Outcome(np.zeros_like(layer.mask), num, check=enough_stay)


def draws(worth: np.ndarray, num: int) -> dict[frozenset[int], float]:
    """The probability of each set that ``num`` draws without replacement give; what is worth nothing comes last."""
    sets: dict[frozenset[int], float] = {frozenset(): 1.0}
    for _ in range(num):
        further: dict[frozenset[int], float] = defaultdict(float)
        for chosen, p in sets.items():
            rest = np.array([x * (i not in chosen) for i, x in enumerate(worth)])
            if not rest.any():
                rest = np.array([float(i not in chosen) for i in range(len(worth))])
            for i in np.flatnonzero(rest):
                further[chosen | {int(i)}] += p * rest[i] / rest.sum()
        sets = further
    return sets


def chts_law(
    w: np.ndarray, mask: np.ndarray, exponent: float, pruned: int, dropped: int
) -> dict[frozenset[int], float]:
    """Zhang et al. 2025, section 3: which sets of links are active after an update, and how likely each is.

    The least important go first; of the others those that stay are drawn by magnitude, those that come by CH2-L3n.
    """
    active = np.flatnonzero(best(relative_importance(w), int(mask.sum()) - pruned, mask))
    law: dict[frozenset[int], float] = defaultdict(float)
    for stays, p in draws(np.abs(w.ravel()[active]) ** exponent, len(active) - dropped).items():
        kept = np.zeros(mask.size, bool)
        kept[active[list(stays)]] = True
        missing = np.flatnonzero(~kept)
        score = ch2_l3n(kept.reshape(mask.shape)).ravel()[missing]
        for grown, q in draws(score, dropped).items():
            law[frozenset(np.flatnonzero(kept).tolist()) | set(missing[list(grown)].tolist())] += p * q
    return law


def topkast_learns(layer: Layer, density: float) -> None:
    """Jayakumar et al. 2020: the active weights learn, and a further tenth, which is pulled to zero."""

    def learns() -> np.ndarray:
        return best(layer.size, layer.num + nearest(0.1 * layer.w.size), np.ones_like(layer.mask))

    grad = layer.grad + np.where(layer.mask, 0.0, 1e-4 / density * layer.w)
    layer.velocity = np.where(learns(), MOMENTUM * layer.velocity + grad, 0.0)
    layer.w = layer.w - RATE * layer.velocity
    layer.velocity = np.where(learns(), layer.velocity, 0.0)  # what rests from now on does not come back with speed


@per_layer
def topkast(layer: Layer, at: Moment) -> Outcome:
    mask = best(layer.size, nearest(layer.final), np.ones_like(layer.mask))
    return Outcome(mask & layer.mask, int(mask.sum()), mask)


def srste_learns(layer: Layer, density: float) -> None:
    """Zhou et al. 2021, equation 9: all weights learn; those outside the mask are pulled to zero."""
    layer.velocity = MOMENTUM * layer.velocity + layer.grad + np.where(layer.mask, 0.0, 2e-4 * layer.w)
    layer.w = layer.w - RATE * layer.velocity


def by_rank_of_four(size: np.ndarray) -> np.ndarray:
    """The place of each weight among four inputs side by side, 0 the largest."""
    fours = np.moveaxis(size, 1, -1)
    rank = (-fours.reshape(-1, 4)).argsort(-1, kind="stable").argsort(-1, kind="stable")
    return np.moveaxis(rank.reshape(fours.shape), -1, 1)


@per_layer
def two_of_four(layer: Layer, at: Moment) -> Outcome:
    mask = by_rank_of_four(layer.size) < 2
    return Outcome(mask & layer.mask, int(mask.sum()), mask)


def sste_learns(layer: Layer, density: float) -> None:
    layer.velocity = MOMENTUM * layer.velocity + layer.grad
    layer.w = layer.w - RATE * layer.velocity


def soft(w: np.ndarray) -> np.ndarray:
    """Hu et al. 2024: of four weights each less the third in size, where that leaves anything."""
    rank = np.moveaxis(by_rank_of_four(np.abs(w)), 1, -1)
    third = np.moveaxis(np.abs(w), 1, -1)[rank == 2]  # one of each four, in their order
    less = np.moveaxis(np.repeat(third, 4).reshape(rank.shape), -1, 1)
    return np.sign(w) * np.maximum(np.abs(w) - less, 0.0)


def sste_shows(layer: Layer) -> np.ndarray:
    """Times the number that brought the first weights nearest to the dense ones, in the mean square."""
    first = soft(layer.dense)
    return soft(layer.w) * (first * layer.dense).sum() / (first**2).sum()

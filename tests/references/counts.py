"""How many weights are active, and when: whole numbers, from the formulas of the papers."""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
DECIMAL = 1e-9  # 0.29 · 100 is 28.999999999999996 as a float: whole numbers are meant where a share is decimal


def nearest(x: float) -> int:
    """The nearest whole number, halves up, and at least one: no layer is without a weight."""
    return max(math.floor(x + 0.5 + DECIMAL), 1)


def round_down(x: float) -> int:
    return math.floor(x + DECIMAL)


def round_up(x: float) -> int:
    return math.ceil(x - DECIMAL)


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return {name: (1 - sparsity) * math.prod(shape) for name, shape in shapes.items()}


def uniform_but_for_ends(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """MEST: the first and the last layer are dense, for which the others make up, as long as they have half of it."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ends = {next(iter(shapes)), list(shapes)[-1]}
    num, of_ends = (1 - sparsity) * sum(sizes.values()), sum(sizes[name] for name in ends)
    if len(shapes) == len(ends) or of_ends > num / 2:
        return uniform(shapes, sparsity)
    density = (num - of_ends) / (sum(sizes.values()) - of_ends)
    return {name: float(size) if name in ends else density * size for name, size in sizes.items()}


def dense(shapes: Shapes, sparsity: float) -> dict[str, float]:
    return uniform(shapes, 0.0)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Evci et al. 2020: a layer has ε·Σ(extents), full ones excepted; together n - floor(S·n), S as a decimal.

    What whole numbers leave of the total goes to those that lost the most by them.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values()) - math.floor(Fraction(str(sparsity)) * sum(sizes.values()))
    full: set[str] = set()
    while len(full) < len(shapes):
        rest = [name for name in shapes if name not in full]
        epsilon = Fraction(total - sum(sizes[name] for name in full), sum(sum(shapes[name]) for name in rest))
        density = {name: epsilon * Fraction(sum(shapes[name]), sizes[name]) for name in rest}
        highest = max(density.values())
        if highest <= 1:
            break
        full |= {name for name in rest if density[name] == highest}
    real = {name: sizes[name] if name in full else density[name] * sizes[name] for name in shapes}
    num = {name: max(math.floor(x), 1) for name, x in real.items()}
    for name in sorted(real, key=lambda name: num[name] - real[name])[: max(total - sum(num.values()), 0)]:
        num[name] += 1
    return num


def cosine(start: float, done: float, end: float = 0.0) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))


def cubic(done: float) -> float:
    """Zhu & Gupta 2017, equation 1: how far a sparsity has come."""
    return 1 - (1 - min(done, 1.0)) ** 3


def best(score: np.ndarray, num: int, among: np.ndarray) -> np.ndarray:
    """Marks the ``num`` highest among some entries; of equal ones the first."""
    places = np.flatnonzero(among)
    places = places[np.argsort(-score.ravel()[places], kind="stable")][:num]
    marks = np.zeros(score.size, bool)
    marks[places] = True
    return marks.reshape(score.shape)


def best_of_all(scores: Mapping[str, np.ndarray], num: int, among: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Marks the ``num`` highest of all layers together, the best of each layer among them."""
    marks = {name: best(score, 1, among[name]) for name, score in scores.items()}
    others = np.concatenate([(among[name] & ~marks[name]).ravel() for name in scores])
    chosen = best(np.concatenate([score.ravel() for score in scores.values()]), num - len(scores), others)
    ends = np.cumsum([score.size for score in scores.values()])[:-1]
    for name, part in zip(scores, np.split(chosen, ends), strict=True):
        marks[name] |= part.reshape(marks[name].shape)
    return marks

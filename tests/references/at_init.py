"""Masks at initialisation: derivatives of small nets by hand, and of those by differences."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .counts import best, best_of_all, erk, nearest

Weights = dict[str, np.ndarray]


def random_net(rng: np.random.Generator, activation: type[nn.Module]) -> nn.Sequential:
    """A convolution and two linear layers, or three linear ones, for inputs of 2 × 5 × 4."""
    a, b = (int(n) for n in rng.integers(3, 8, 2))
    if rng.random() < 0.5:
        kernel = tuple(int(n) for n in rng.integers(1, 4, 2))
        first = [nn.Conv2d(2, a, kernel), activation(), nn.Flatten()]
        wide = a * (6 - kernel[0]) * (5 - kernel[1])
    else:
        first, wide = [nn.Flatten(), nn.Linear(40, 3 * a), activation()], 3 * a
    net = nn.Sequential(*first, nn.Linear(wide, b), activation(), nn.Linear(b, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.from_numpy(rng.standard_normal(tuple(p.shape)) * 0.5))
    return net


def layers_of(net: nn.Sequential) -> tuple[Weights, Weights]:
    """The weights, and the biases under their weights' names."""
    found = {n: m for n, m in net.named_children() if isinstance(m, nn.Linear | nn.Conv2d)}
    return tuple(
        {f"{n}.weight": getattr(m, kind).detach().numpy().copy() for n, m in found.items()}
        for kind in ("weight", "bias")
    )


def gradients(
    weights: Weights,
    biases: Weights,
    x: np.ndarray,
    of_output: Callable[[np.ndarray], np.ndarray],
    act: Callable[[np.ndarray], np.ndarray],
    slope: Callable[[np.ndarray], np.ndarray],
) -> Weights:
    """Goes through a net and back; ``slope`` is the derivative of the activation, by its value."""
    inputs, last = [], list(weights)[-1]
    for name, w in weights.items():
        inputs.append(x)
        z = product(x, w, biases[name])
        x = z if name == last else act(z)
    found, back = {}, of_output(x)
    for (name, w), x in zip(reversed(weights.items()), reversed(inputs), strict=True):
        if w.ndim == 4:  # the first layer: nothing lies before it
            found[name] = np.einsum("bohw,bihwkl->oikl", back, _windows(x, w))
        else:
            found[name] = back.T @ x.reshape(len(x), -1)
            back = (back @ w).reshape(x.shape) * slope(x)
    return {name: found[name] for name in weights}


def product(x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> np.ndarray:
    if w.ndim == 4:
        return np.einsum("bihwkl,oikl->bohw", _windows(x, w), w) + bias[:, None, None]
    return x.reshape(len(x), -1) @ w.T + bias


def _windows(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=(2, 3))  # (batch, in, *out, *kernel)


def of_loss(weights: Weights, biases: Weights, x: np.ndarray, y: np.ndarray) -> Weights:
    """The gradients of the mean square error of a net of tanh layers."""
    return gradients(weights, biases, x, lambda out: 2 * (out - y) / y.size, np.tanh, lambda h: 1 - h**2)


def snip(weights: Weights, biases: Weights, x: np.ndarray, y: np.ndarray) -> Weights:
    """Lee et al. 2019: |w · g|."""
    g = of_loss(weights, biases, x, y)
    return {n: np.abs(w * g[n]) for n, w in weights.items()}


def grasp(weights: Weights, biases: Weights, x: np.ndarray, y: np.ndarray) -> Weights:
    """Wang et al. 2020: w · Hg; the curvature along g by a difference of fourth order."""
    g, score = of_loss(weights, biases, x, y), {n: np.zeros_like(w) for n, w in weights.items()}
    for at, factor in ((-2, 1), (-1, -8), (1, 8), (2, -1)):
        moved = of_loss({n: w + 1e-3 * at * g[n] for n, w in weights.items()}, biases, x, y)
        score = {n: score[n] + factor / 12e-3 * moved[n] for n in weights}
    return {n: w * score[n] for n, w in weights.items()}


def synflow(weights: Weights, x: np.ndarray) -> Weights:
    """Tanaka et al. 2020: w · ∂R/∂w, R the output on ones of the net of positive weights, without biases."""
    positive, none = {n: np.abs(w) for n, w in weights.items()}, {n: np.zeros(len(w)) for n, w in weights.items()}
    flow = gradients(positive, none, np.ones((1, *x.shape[1:])), np.ones_like, lambda z: z, np.ones_like)
    return {n: np.abs(w) * flow[n] for n, w in weights.items()}


def highest(scores: Weights, num: int) -> Weights:
    return best_of_all(scores, num, {n: np.ones(s.shape, bool) for n, s in scores.items()})


def total(weights: Weights, sparsity: float) -> int:
    return round(sum(erk({n: w.shape for n, w in weights.items()}, sparsity).values()))


def in_rounds(weights: Weights, x: np.ndarray, sparsity: float, rounds: int) -> Weights:
    """SynFlow's rounds: the number left falls geometrically, and flow is measured anew each time."""
    n, num = sum(w.size for w in weights.values()), total(weights, sparsity)
    mask = {name: np.ones(w.shape, bool) for name, w in weights.items()}
    for i in range(1, rounds + 1):
        left = {name: w * mask[name] for name, w in weights.items()}
        mask = best_of_all(synflow(left, x), round(n * (num / n) ** (i / rounds)), mask)
    return mask


def wanda(size: np.ndarray, norm: np.ndarray, density: float) -> np.ndarray:
    """Sun et al. 2024, equation 1: |w| · ‖x‖, compared within each output. Both are (out, in) and (in)."""
    each, more = divmod(nearest(density * size.size), len(size))
    return np.array([best(row * norm, each + (i < more), row >= 0) for i, row in enumerate(size)])


def ria(size: np.ndarray, norm: np.ndarray, density: float) -> np.ndarray:
    """Zhang et al. 2024, equation 4: the share of its output plus that of its input, · √‖x‖, over the layer."""
    score = (size / size.sum(0) + size / size.sum(1, keepdims=True)) * np.sqrt(norm)
    return best(score, nearest(density * size.size), size >= 0)


def in_turn(
    weights: Weights,
    biases: Weights,
    x: np.ndarray,
    density: float,
    choose: Callable[[np.ndarray, np.ndarray, float], np.ndarray],
) -> Weights:
    """One layer after the other, each by what comes out of those before it once they are pruned."""
    masks = {}
    for name, w in weights.items():
        seen = np.moveaxis(_windows(x, w), 1, 3) if w.ndim == 4 else x.reshape(len(x), -1)
        norm = np.sqrt((seen.reshape(-1, w[0].size) ** 2).sum(0))
        masks[name] = choose(np.abs(w).reshape(len(w), -1), norm, density).reshape(w.shape)
        x = np.tanh(product(x, w * masks[name], biases[name]))
    return masks

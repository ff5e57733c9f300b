"""Every preset equals its reference in NumPy: masks where they are determined, what stays and how many where not."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from references import REFERENCES, TRANSFORMERS, Chance, Reference, Run, at_init
from references.structured import chts_law
from torch import nn

import dstlib
from dstlib.at_init import grasp, ria, snip, synflow, wanda
from dstlib.masking import NeuronAblation

NETS, MANY_NETS = range(20), range(20, 120)


def check(method: dstlib.Method, reference: Reference, seeds: range) -> None:
    chance = Chance()
    for seed in seeds:
        Run(method, reference, seed, chance).follow()
    assert abs(chance.active - chance.expected) <= 5 * math.sqrt(chance.variance), chance  # five standard deviations


def test_every_preset_has_its_reference() -> None:
    assert set(dstlib.METHODS) == set(REFERENCES), "write what it does once more in tests/references, not by its code"


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_preset(name: str) -> None:
    check(dstlib.METHODS[name], REFERENCES[name], NETS)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_preset_on_many_nets(name: str) -> None:
    check(dstlib.METHODS[name], REFERENCES[name], MANY_NETS)


def test_srigl_of_transformers() -> None:
    check(replace(dstlib.METHODS["srigl"], allocate=NeuronAblation(0.95)), TRANSFORMERS, NETS)


@pytest.mark.parametrize(
    ("name", "sparsity", "exponent", "pruned", "dropped"),
    [
        ("chts", 0.45, 1 + 2 / 6, 0, 2),  # the first of six updates: T is on its way from 1 to 3, or to 9
        ("chtss", 0.6, 1 + 8 / 6, 1, 1),
    ],
)
def test_law_of_links(name: str, sparsity: float, exponent: float, pruned: int, dropped: int) -> None:
    """Layers that are alike change to each of their possible masks as often as draws do."""
    alike = 200
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 1, 1]], bool)
    w = mask * np.array([[0.5, -2, 1, 0, 0], [1.5, 0, 0, 0.3, 0], [0, 0.8, 0, -0.6, 1.2]])
    net = nn.ModuleList(nn.Linear(5, 3, bias=False).double() for _ in range(alike))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.from_numpy(w))  # whose zeros become the first mask
            layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    method = replace(dstlib.METHODS[name], interval=1)
    sparsifier = dstlib.sparsify(net, optimizer, sparsity=sparsity, method=method, total_steps=8)
    optimizer.step()
    seen = Counter(frozenset(np.flatnonzero(mask.numpy())) for mask in sparsifier.masks.values())
    law = chts_law(w, mask, exponent, pruned, dropped)
    assert set(seen) <= set(law)
    often = {links: alike * p for links, p in law.items() if alike * p >= 5}  # as chi-square wants them
    terms = [(seen[links] - num) ** 2 / num for links, num in often.items()]
    rare = alike - sum(often.values())
    terms.append((alike - sum(seen[links] for links in often) - rare) ** 2 / rare)
    free = len(terms) - 1
    assert sum(terms) < free + 5 * math.sqrt(2 * free), (sum(terms), free)  # its mean, and its deviation


def check_at_init(make: str, seed: int, rounds: int) -> None:
    rng = np.random.default_rng(seed)
    net = at_init.random_net(rng, nn.ReLU if make == "synflow" else nn.Tanh)
    weights, biases = at_init.layers_of(net)
    x, y, sparsity = rng.standard_normal((4, 2, 5, 4)), rng.standard_normal((4, 3)), float(rng.choice([0.5, 0.8, 0.95]))
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    if make == "synflow":
        init, expected = synflow(net, inputs, rounds=rounds), at_init.in_rounds(weights, x, sparsity, rounds)
    elif make in ("wanda", "ria"):
        init = {"wanda": wanda, "ria": ria}[make](net, [inputs])
        expected = at_init.in_turn(weights, biases, x, 1 - sparsity, getattr(at_init, make))
    else:
        init = {"snip": snip, "grasp": grasp}[make](net, lambda: ((net(inputs) - targets) ** 2).mean())
        scores = getattr(at_init, make)(weights, biases, x, y)
        expected = at_init.highest(scores, at_init.total(weights, sparsity))
    spread = dstlib.uniform if make in ("wanda", "ria") else dstlib.erk
    method = replace(dstlib.STATIC, init=init, distribution=spread)
    sparsifier = dstlib.sparsify(net, sparsity=sparsity, method=method)
    for name, mask in sparsifier.masks.items():
        assert (mask.numpy() == expected[name]).all(), f"{make}, seed {seed}, {name}"


AT_INIT = ("snip", "grasp", "synflow", "wanda", "ria")


@pytest.mark.parametrize("make", AT_INIT)
def test_mask_at_initialisation(make: str) -> None:
    for seed in NETS:
        check_at_init(make, seed, rounds=10)


@pytest.mark.long
@pytest.mark.parametrize("make", AT_INIT)
def test_mask_at_initialisation_of_many_nets(make: str) -> None:
    for seed in MANY_NETS:
        check_at_init(make, seed, rounds=100)

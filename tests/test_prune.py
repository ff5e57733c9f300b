"""What a falling density takes first, by a score of its own; then the rest is exchanged."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import dstlib
from dstlib import SettingError, Site
from dstlib.masking import global_units, gradient, magnitude, relative_importance
from dstlib.masking.counts import num_units
from dstlib.schedules import Constant, Linear, Sigmoid

CHTSS = dstlib.METHODS["chtss"]


def best(score: Tensor, num: int, among: Tensor) -> Tensor:
    """The highest, whose scores are distinct."""
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[score.masked_fill(~among, -torch.inf).flatten().argsort(descending=True)[:num]] = True
    return chosen.view(score.shape)


def shares(weight: Tensor, mask: Tensor) -> Tensor:
    """Relative importance as it is defined: |w| over its row, plus |w| over its column, of the active ones."""
    size = weight.abs() * mask
    rows, columns = size.sum(dim=1, keepdim=True), size.sum(dim=0, keepdim=True)
    return torch.where(mask, size / rows.clamp_min(1e-30) + size / columns.clamp_min(1e-30), 0.0)


@given(
    shape=st.tuples(st.integers(3, 8), st.integers(3, 9)), fraction=st.sampled_from([0.0, 0.3, 0.5, 0.9]), seed=seeds
)
def test_pruned_first_then_dropped_from_what_is_left(shape: tuple[int, int], fraction: float, seed: int) -> None:
    """Of A weights T are left by relative importance, floor(f·T) of those go by magnitude, and as many grow."""
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    method = replace(
        CHTSS,
        drop=magnitude,
        grow=gradient,
        drop_fraction=Constant(fraction),
        ramp=Linear(0.0, 1.0),
        interval=1,
        stop=1.0,
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    options = {"sparsity": 0.8, "method": method, "total_steps": 4, "seed": seed}
    sparsifier = dstlib.sparsify(layer, optimizer, **options, keep_neurons=())  # no head: an output may be left bare
    for step in range(1, 5):
        before, weight = sparsifier.masks["weight"].clone(), layer.weight.detach().clone()
        optimizer.zero_grad()
        layer(torch.randn(5, shape[1])).square().sum().backward()
        assert layer.weight.grad is not None
        grad = layer.weight.grad.clone()
        optimizer.step()
        num_target = num_units(weight.numel(), (1 - step / 4) * 0.5 + step / 4 * (1 - 0.8))
        left = best(shares(weight, before), num_target, before)
        kept = best(weight.abs(), num_target - math.floor(fraction * num_target + 1e-9), left)
        grown = best(grad.abs(), num_target - int(kept.sum()), ~kept)
        assert torch.equal(sparsifier.masks["weight"], kept | grown)
    sparsifier.detach()


def test_drop_sees_what_is_left() -> None:
    """And growth what is kept of that."""
    torch.manual_seed(0)
    seen: list[tuple[str, int]] = []

    def note(what: str, site: Site) -> Tensor:
        seen.append((what, int(site.mask.sum())))
        return site.weight.abs() + site.rand()

    method = replace(
        CHTSS,
        prune=lambda site: note("prune", site),
        drop=lambda site: note("drop", site),
        grow=lambda site: note("grow", site),
        drop_fraction=Constant(0.25),
        interval=1,
    )
    layer = nn.Linear(20, 10, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    dstlib.sparsify(layer, optimizer, sparsity=0.9, method=method, total_steps=4)
    for _ in range(3):
        layer(torch.ones(1, 20)).sum().backward()
        optimizer.step()
    densities = [(1 - Sigmoid(0.0, 1.0)(k / 3)) * 0.5 + Sigmoid(0.0, 1.0)(k / 3) * 0.1 for k in range(4)]
    a, b, c, d = (num_units(200, density) for density in densities)
    numbers = [n for before, after in ((a, b), (b, c), (c, d)) for n in (before, after, after - after // 4)]
    assert seen[-9:] == list(zip(["prune", "drop", "grow"] * 3, numbers, strict=True))


def test_a_constant_density_has_nothing_to_prune() -> None:
    torch.manual_seed(0)
    masks = []
    for prune in (None, relative_importance):
        torch.manual_seed(0)
        layer = nn.Linear(20, 10, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        method = replace(dstlib.RIGL, prune=prune, interval=1)
        sparsifier = dstlib.sparsify(layer, optimizer, sparsity=0.8, method=method, total_steps=4)
        for step in range(4):
            layer(torch.randn(5, 20, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        masks.append(sparsifier.masks["weight"])
    assert torch.equal(*masks)


def test_an_allocator_prunes_by_itself() -> None:
    with pytest.raises(SettingError, match=r"^prune of method granet: expected none, with an allocator"):
        replace(dstlib.METHODS["granet"], prune=relative_importance, allocate=global_units)

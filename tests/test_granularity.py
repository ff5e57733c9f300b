"""Granularities: two exact inverses, and units made of the right elements.

Shapes: O out, I in, K kernel taps; G groups, U units per group, E elements per unit.
"""

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import drawn, folds, grid, seeds, units
from torch import nn

import dstlib
from dstlib import SettingError
from dstlib.masking import (
    NM,
    Block,
    Channel,
    Diagonal,
    Element,
    FanIn,
    Granularity,
    Kernel,
    SharedFanIn,
    gradient,
    magnitude,
    magnitude_l2,
    unit_mask,
)
from dstlib.schedules import Constant, Cosine

ALL = [Element(), Kernel(), Channel(), Block(2, 4), FanIn(), SharedFanIn(2), Diagonal(), NM(2, 4)]


@pytest.mark.parametrize(
    ("granularity", "shape", "folded"),
    [
        (Element(), (6, 8), (1, 48, 1)),
        (Element(), (6, 8, 3, 3), (1, 432, 1)),
        (Kernel(), (6, 8), (1, 48, 1)),
        (Kernel(), (6, 8, 5), (1, 48, 5)),
        (Kernel(), (6, 8, 1, 3, 3), (1, 48, 9)),
        (Channel(), (6, 8), (1, 6, 8)),
        (Channel(), (6, 8, 3, 3), (1, 6, 72)),
        (Block(2, 4), (6, 8), (1, 6, 8)),
        (Block(3, 8), (6, 8, 3, 3), (1, 2, 216)),
        (FanIn(), (6, 8), (6, 8, 1)),
        (FanIn(), (6, 8, 3, 3), (6, 72, 1)),
        (SharedFanIn(3), (6, 8), (2, 8, 3)),
        (SharedFanIn(3), (6, 8, 3, 3), (2, 72, 3)),
        (Diagonal(), (6, 8), (1, 8, 6)),
        (Diagonal(), (8, 6, 3, 3), (1, 8, 54)),
        (NM(2, 4), (6, 8), (12, 4, 1)),
        (NM(1, 2), (6, 8, 1, 3, 3), (216, 2, 1)),
    ],
)
def test_folded_shapes(granularity: Granularity, shape: tuple[int, ...], folded: tuple[int, int, int]) -> None:
    assert granularity.fold(torch.zeros(shape)).shape == folded


# A linear layer of 2 outputs and 4 inputs; entry 10·o + i. Each row below is a unit.
LINEAR = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        (Element(), [[[0], [1], [2], [3], [10], [11], [12], [13]]]),
        (Kernel(), [[[0], [1], [2], [3], [10], [11], [12], [13]]]),
        (Channel(), [[[0, 1, 2, 3], [10, 11, 12, 13]]]),
        (Block(1, 2), [[[0, 1], [2, 3], [10, 11], [12, 13]]]),
        (Block(2, 1), [[[0, 10], [1, 11], [2, 12], [3, 13]]]),
        (Block(2, 2), [[[0, 1, 10, 11], [2, 3, 12, 13]]]),
        (FanIn(), [[[0], [1], [2], [3]], [[10], [11], [12], [13]]]),
        (SharedFanIn(2), [[[0, 10], [1, 11], [2, 12], [3, 13]]]),
        (SharedFanIn(1), [[[0], [1], [2], [3]], [[10], [11], [12], [13]]]),
        (Diagonal(), [[[0, 11], [1, 12], [2, 13], [3, 10]]]),
        (NM(1, 2), [[[0], [1]], [[2], [3]], [[10], [11]], [[12], [13]]]),
    ],
)
def test_units_of_a_linear_layer(granularity: Granularity, groups: list[list[list[int]]]) -> None:
    assert granularity.fold(LINEAR).tolist() == groups


# A convolution of 2 outputs, 2 inputs and 2 taps; entry 100·o + 10·i + k.
CONVOLUTION = torch.tensor([[[0, 1], [10, 11]], [[100, 101], [110, 111]]])


@pytest.mark.parametrize(
    ("granularity", "groups"),
    [
        (Kernel(), [[[0, 1], [10, 11], [100, 101], [110, 111]]]),  # all taps of one (o, i)
        (Channel(), [[[0, 1, 10, 11], [100, 101, 110, 111]]]),
        (Block(2, 1), [[[0, 1, 100, 101], [10, 11, 110, 111]]]),
        (FanIn(), [[[0], [1], [10], [11]], [[100], [101], [110], [111]]]),
        (SharedFanIn(2), [[[0, 100], [1, 101], [10, 110], [11, 111]]]),  # each tap for itself, as in constant fan-in
        (Diagonal(), [[[0, 1, 110, 111], [100, 101, 10, 11]]]),  # all taps of it
        # neighbouring inputs at the same output and tap, as the hardware wants them
        (NM(1, 2), [[[0], [10]], [[1], [11]], [[100], [110]], [[101], [111]]]),
    ],
)
def test_units_of_a_convolution(granularity: Granularity, groups: list[list[list[int]]]) -> None:
    assert granularity.fold(CONVOLUTION).tolist() == groups


@given(folds(), seeds)
def test_unfold_undoes_fold(case: tuple[Granularity, torch.Size], seed: int) -> None:
    granularity, shape = case
    x = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(seed)).view(shape)
    folded = granularity.fold(x)
    assert folded.ndim == 3
    assert folded.numel() == x.numel()
    assert torch.equal(granularity.unfold(folded, shape), x)


@given(folds(), seeds)
def test_fold_undoes_unfold(case: tuple[Granularity, torch.Size], seed: int) -> None:
    granularity, shape = case
    folded_shape = granularity.fold(torch.zeros(shape)).shape
    x = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(seed)).view(folded_shape)
    unfolded = granularity.unfold(x, shape)
    assert unfolded.shape == shape
    assert torch.equal(granularity.fold(unfolded), x)


@given(folds())
def test_memory_layout_does_not_matter(case: tuple[Granularity, torch.Size]) -> None:
    granularity, shape = case
    x = torch.arange(shape.numel()).view(shape)
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last
    assert torch.equal(granularity.fold(turned), granularity.fold(x))


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (Block(4, 2), (6, 8), r"output channels for Block\(out=4, into=2\) .* multiple of 4, got 6"),
        (SharedFanIn(4), (6, 8), r"output channels for SharedFanIn\(out=4\) .* multiple of 4, got 6"),
        (Block(2, 3), (6, 8, 3, 3), r"input channels for Block\(out=2, into=3\) .* multiple of 3, got 8"),
        (NM(2, 4), (6, 10), r"input channels for NM\(n=2, m=4\) .* multiple of 4, got 10"),
        (NM(2, 4), (8, 3, 4), r"input channels for NM\(n=2, m=4\) .* multiple of 4, got 3"),  # taps do not count
    ],
)
def test_shapes_that_do_not_divide_are_named(granularity: Granularity, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        granularity.fold(torch.zeros(shape))


@pytest.mark.parametrize(("out", "into"), [(0, 2), (2, 0), (-1, 1)])
def test_blocks_have_a_size(out: int, into: int) -> None:
    with pytest.raises(SettingError, match=rf"out and into of Block: expected 1 or more, got \({out}, {into}\)"):
        Block(out, into)


def test_a_group_has_an_output():
    with pytest.raises(SettingError, match="out of SharedFanIn: expected 1 or more, got 0"):
        SharedFanIn(0)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 8))
def test_diagonals_are_those_of_dynadiag(num_out, num_in, unit):
    """As its program places them: down the rows, or down the columns where there are more rows, modulo the other."""
    num_long, num_short = max(num_out, num_in), min(num_out, num_in)
    unit %= num_long
    decisions = torch.arange(num_long)[None] == unit
    mask = torch.zeros(num_out, num_in, dtype=torch.bool)
    for k in range(num_short):
        mask[((k + unit) % num_out, k) if num_out >= num_in else (k, (k + unit) % num_in)] = True
    assert torch.equal(unit_mask(decisions, Diagonal(), mask.shape), mask)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (12, 12)])
def test_diagonals_move_as_a_whole_and_reach_all_alike(shape):
    """Each diagonal has one weight of each channel on the shorter side."""
    torch.manual_seed(0)
    model = nn.Linear(*shape[::-1], bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    method = replace(dstlib.RIGL, granularity=Diagonal(), drop_fraction=Constant(0.5), interval=2, regrow=False)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.75, method=method, total_steps=20)
    first = sparsifier.masks["weight"].clone()
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, shape[1])).square().sum().backward()
        optimizer.step()
    mask = sparsifier.masks["weight"]
    assert not torch.equal(mask, first)
    assert int(mask.sum()) == 3 * min(shape)
    short_side = mask if shape[0] <= shape[1] else mask.T
    assert short_side.sum(dim=1).tolist() == [3] * min(shape)


def test_groups_of_outputs_read_the_same_inputs():
    """HASTE: each group drops the inputs of the smallest mean size, and draws others."""
    torch.manual_seed(0)
    model = nn.Linear(20, 12, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    haste = replace(dstlib.SET, drop=magnitude, drop_fraction=Constant(0.25), granularity=SharedFanIn(4))
    method = replace(haste, distribution=dstlib.uniform, interval=1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=4)
    patterns = sparsifier.masks["weight"].view(3, 4, 20)
    sizes = model.weight.detach().abs().view(3, 4, 20).mean(dim=1).masked_fill(~patterns[:, 0], torch.inf)
    smallest = sizes.argsort(dim=1)[:, :2]
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    after = sparsifier.masks["weight"].view(3, 4, 20)
    for group in range(3):
        assert torch.equal(after[group], after[group, :1].expand(4, 20))
        stays = patterns[group, 0].clone()
        stays[smallest[group]] = False
        assert int(after[group, 0].sum()) == 8
        assert after[group, 0][stays].all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_n_of_m_must_be_possible(n: int, m: int) -> None:
    with pytest.raises(SettingError, match=rf"1 ≤ n ≤ m, got \({n}, {m}\)"):
        NM(n, m)


@pytest.mark.parametrize(
    ("granularity", "decisions", "mask"),
    [
        (Channel(), "x.", "xxxx ...."),
        (Block(1, 2), "x..x", "xx.. ..xx"),
        (Block(2, 2), ".x", "..xx ..xx"),
        (Kernel(), "x.x....x", "x.x. ...x"),
        (FanIn(), "x..x .xx.", "x..x .xx."),
        (NM(1, 2), "x. .x .x .x", "x..x .x.x"),
    ],
    ids=repr,
)
def test_a_decision_per_unit_becomes_a_mask(granularity: Granularity, decisions: str, mask: str) -> None:
    assert drawn(unit_mask(grid(decisions), granularity, torch.Size((2, 4)))) == mask


def test_a_decision_on_a_kernel_covers_its_taps() -> None:
    mask = unit_mask(grid("x..x"), Kernel(), torch.Size((2, 2, 1, 3, 3)))
    assert mask.sum(dim=(2, 3, 4)).tolist() == [[9, 0], [0, 9]]


@given(folds(), seeds)
def test_a_mask_remembers_its_decisions(case: tuple[Granularity, torch.Size], seed: int) -> None:
    granularity, shape = case
    num_groups, num_units, num_elements = granularity.fold(torch.zeros(shape)).shape
    decisions_GU = torch.rand(num_groups, num_units, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = unit_mask(decisions_GU, granularity, shape)
    assert torch.equal(units(granularity, mask), decisions_GU)
    assert int(mask.sum()) == int(decisions_GU.sum()) * num_elements


@pytest.mark.parametrize("granularity", ALL, ids=repr)
def test_a_granularity_is_a_value(granularity: Granularity) -> None:
    assert isinstance(granularity, Granularity)
    assert pickle.loads(pickle.dumps(granularity)) == granularity
    assert len({granularity, *ALL}) == len(ALL)


@pytest.mark.parametrize(
    "method",
    [
        replace(dstlib.RIGL, granularity=Diagonal(), distribution=dstlib.uniform),
        replace(dstlib.SET, granularity=SharedFanIn(16), drop=magnitude, drop_fraction=Constant(0.25)),
        replace(
            dstlib.GMP, granularity=Block(16, 16), prune=magnitude_l2, drop=magnitude_l2, grow=gradient,
            drop_fraction=Cosine(0.3),
        ),
    ],
    ids=["DynaDiag", "HASTE", "BLaST"],
)  # fmt: skip
def test_structures_of_papers_move_and_keep_their_counts(method):
    torch.manual_seed(0)
    model = nn.Linear(128, 96, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    method = replace(method, distribution=dstlib.uniform, interval=2)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.75, method=method, total_steps=16)
    moved = []
    sparsifier.observers.append(lambda site, update: moved.append(int(update.grown.sum())))
    for _ in range(16):
        optimizer.zero_grad()
        model(torch.randn(8, 128)).square().sum().backward()
        optimizer.step()
    assert any(moved)
    units_GU = units(method.granularity, sparsifier.masks["weight"])
    assert units_GU.sum(dim=1).tolist() == [units_GU.shape[1] // 4] * len(units_GU)

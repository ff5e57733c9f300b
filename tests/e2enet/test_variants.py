"""The paper's variants from the config alone: what each costs in closed form, and the shift that is learned."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor, prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dstlib
from dstlib.errors import SettingError
from dstlib.layers import LearnedShift, Shift
from dstlib.zoo.e2enet import AMOS, E2ENet, E2ENetConfig

TINY = E2ENetConfig(channels=(4, 6, 8), strides=((2, 2, 2),) * 2, heads=2, num_classes=3)
KINDS = ("fixed", "interpolated", "rounded")
LEARNED = KINDS[1:]

# ---- what any config costs, without building it ----


@dataclass(frozen=True)
class Row:
    """A convolution on paper; ``cells`` are the positions of its output grid, ``repeats`` those per input one."""

    connections: int
    taps: int
    out: int
    cells: int
    sparse: bool
    bias: bool = True
    repeats: int = 1  # of a transposed convolution: its kernel volume
    others: int = 0  # parameters of norm and offsets


def rows(config: E2ENetConfig, size: tuple[int, int, int]) -> Iterator[Row]:
    """Every convolution of the network, from the table of the paper, for an input of this size."""
    c, num_levels = config.channels, len(config.channels)
    inner, outer = config.kernel_size, config.outer_kernel_size or config.kernel_size
    num_offsets = len(config.shift) if config.shift and config.shift_kind != "fixed" else 0
    cells = [prod(size)]
    for stride in config.strides:
        cells.append(cells[-1] // prod(stride))

    def unit(i: int, o: int, *, level: int, at_rim: bool, sparse: bool) -> Row:
        learned = 0 if at_rim and config.outer_kernel_size else num_offsets
        taps = prod(outer if at_rim else inner)
        return Row(i * o, taps, o, cells[level], sparse, others=2 * o + learned)

    for level, width in enumerate(c):
        into = c[level - 1] if level else config.in_channels
        yield unit(into, width, level=level, at_rim=True, sparse=False)
        yield unit(width, width, level=level, at_rim=True, sparse=False)
        for stage in range(1, num_levels - level):
            volume = prod(config.strides[level])
            yield Row(c[level + 1] * width, volume, width, cells[level], True, bias=False, repeats=volume)
            last = stage + level == num_levels - 1
            joined = 2 * width + (c[level - 1] if level else 0)
            yield unit(joined, width, level=level, at_rim=last, sparse=True)
            if last:
                yield unit(width, width, level=level, at_rim=True, sparse=True)
        if level < config.heads:
            yield Row(width * config.num_classes, 1, config.num_classes, cells[level], False, bias=False)


def cost(config: E2ENetConfig, size: tuple[int, int, int], sparsity: Fraction, *, convention: str) -> tuple[int, int]:
    """Parameters and FLOPs: of each sparse tensor the nearest whole number of kernels is kept, halves up."""
    params = flops = 0
    for row in rows(config, size):
        nearest = floor(row.connections * (1 - sparsity) + Fraction(1, 2))
        kept = max(nearest, 1) if row.sparse else row.connections
        params += kept * row.taps + row.out * row.bias + row.others
        positions = row.cells if convention == "paper" else row.cells // row.repeats
        flops += 2 * kept * row.taps * positions + row.out * row.bias * row.cells
    return params, flops


@pytest.mark.parametrize(
    ("sparsity", "params", "flops"),
    [
        ("0", 23_898_432, 3_069_548_339_200),
        ("0.7", 11_251_369, 1_064_825_364_480),
        ("0.8", 9_444_695, 778_741_981_184),
        ("0.9", 7_637_959, 492_285_239_296),
    ],
)
def test_the_closed_form_gives_the_published_counts(sparsity: str, params: int, flops: int) -> None:
    assert cost(AMOS, (128, 128, 128), Fraction(sparsity), convention="paper") == (params, flops)


@st.composite
def configs(draw: st.DrawFn) -> E2ENetConfig:
    num_levels = draw(st.integers(2, 3))
    steps, extents = (st.tuples(*[st.sampled_from(values)] * 3) for values in ([1, 2], [1, 3]))
    shift = draw(st.none() | st.lists(st.integers(-7, 7), min_size=1, max_size=4).map(tuple))
    return E2ENetConfig(
        in_channels=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(1, 4)),
        channels=tuple(draw(st.lists(st.integers(1, 6), min_size=num_levels, max_size=num_levels))),
        strides=tuple(draw(st.lists(steps, min_size=num_levels - 1, max_size=num_levels - 1))),
        kernel_size=draw(extents),
        outer_kernel_size=draw(st.none() | extents),
        shift=shift,
        shift_axis=draw(st.sampled_from(["depth", "height", "width"])),
        shift_kind=draw(st.sampled_from(KINDS)) if shift else "fixed",
        heads=draw(st.integers(1, num_levels - 1)),
    )


def assert_costs(config: E2ENetConfig, percent: int, more: tuple[int, int, int] = (2, 1, 1)) -> None:
    """The network as built, made sparse and profiled, costs what the closed form says."""
    depth, height, width = (a * b for a, b in zip(config.divisor, more, strict=True))
    size, network, sparsifier = (depth, height, width), E2ENet(config), None
    if percent:
        sparsifier = dstlib.sparsify(
            network, sparsity=percent / 100, method="dsff", total_steps=4800, include=E2ENet.FUSION
        )
        assert all("offsets" not in name for name in sparsifier.masks)
    for convention in ("exact", "paper"):
        counted = dstlib.profile(network, (1, config.in_channels, *size), sparsifier=sparsifier, convention=convention)
        assert (counted.params, counted.flops) == cost(config, size, Fraction(percent, 100), convention=convention), (
            convention
        )


@given(configs(), st.integers(0, 99), st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(1, 3)))
@settings(max_examples=10)
def test_the_count_holds_for_any_config(config: E2ENetConfig, percent: int, more: tuple[int, int, int]) -> None:
    assert_costs(config, percent, more)


NARROW = replace(AMOS, channels=(6, 12, 24, 40, 40, 40))  # an eighth of the paper's widths: the same table
VARIANTS = {
    "1×3×3": NARROW,
    "3×1×3, shifted along height": replace(NARROW, kernel_size=(3, 1, 3), shift_axis="height"),
    "3×3×1, shifted along width": replace(NARROW, kernel_size=(3, 3, 1), shift_axis="width"),
    "3×3×3 in encoder and last diagonal": replace(NARROW, outer_kernel_size=(3, 3, 3)),
    "3×3×3 everywhere": replace(NARROW, kernel_size=(3, 3, 3), shift=None),
    "not shifted": replace(NARROW, shift=None),
    **{f"shifted by {n}": replace(NARROW, shift=(-n, 0, n)) for n in (2, 3, 7)},
    "wider": replace(NARROW, channels=(7, 14, 28, 40, 40, 40)),
    "(1, 2, 2) first": replace(NARROW, strides=((1, 2, 2), *NARROW.strides[1:])),
    "3 heads": replace(NARROW, heads=3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_paper_cost_what_they_should(name: str) -> None:
    assert_costs(VARIANTS[name], 80)


def test_base_width_58_has_the_parameters_of_the_closed_form() -> None:
    wide = replace(AMOS, channels=(58, 116, 232, 320, 320, 320))
    with torch.device("meta"):
        params = sum(p.numel() for p in E2ENet(wide).parameters())
    assert params == cost(wide, (128, 128, 128), Fraction(0), convention="paper")[0]


def test_e2enet_plus_has_the_published_flops() -> None:
    """1119.17 G, of Table 8. Its printed 10.37 M are 0.3 % less, and do not go with these FLOPs."""
    wide = replace(AMOS, channels=(58, 116, 232, 320, 320, 320))
    found = cost(wide, (128, 128, 128), Fraction(4, 5), convention="paper")
    assert found == (10_401_335, 1_119_174_762_496)


# ---- the shift that is learned ----


@pytest.mark.parametrize(("axis", "index"), [("depth", 2), ("height", 3), ("width", 4)])
@pytest.mark.parametrize("kind", LEARNED)
def test_every_convolution_learns_offsets_of_its_own(kind: Any, axis: Any, index: int) -> None:
    network = E2ENet(replace(TINY, shift=(-2, 0, 3), shift_kind=kind, shift_axis=axis))
    shifts = [m for m in network.modules() if isinstance(m, LearnedShift)]
    assert len(shifts) == 2 * 3 + 3 + 2  # two Units per level, one per node, one more on the last diagonal
    assert {(m.axis, m.rounded) for m in shifts} == {(index, kind == "rounded")}
    assert all(m.offsets.tolist() == [-2, 0, 3] for m in shifts)
    sum(y.square().sum() for y in network(torch.rand(2, 1, 8, 8, 8))).backward()
    assert all(m.offsets.grad.isfinite().all() for m in shifts)
    assert sum(bool(m.offsets.grad.any()) for m in shifts) == len(shifts)
    assert not any(isinstance(m, Shift) for m in network.modules())


@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_shift_starts_as_the_fixed_one(kind: Any) -> None:
    fixed, learned = E2ENet(TINY), E2ENet(replace(TINY, shift_kind=kind))
    offsets = {name for name in learned.state_dict() if name.endswith(".shift.offsets")}
    assert learned.state_dict().keys() - fixed.state_dict().keys() == offsets
    learned.load_state_dict(fixed.state_dict(), strict=False)
    x = torch.rand(1, 1, 8, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(fixed(x), learned(x), strict=True))


@pytest.mark.parametrize("kind", LEARNED)
def test_outer_kernels_are_not_shifted_by_a_learned_shift_either(kind: Any) -> None:
    network = E2ENet(replace(TINY, shift_kind=kind, outer_kernel_size=(3, 3, 3)))
    names = [name for name, m in network.named_modules() if isinstance(m, LearnedShift)]
    assert names == ["fusion.stage1_level1.units.0.shift"]


@pytest.mark.parametrize("kind", LEARNED)
def test_offsets_are_trained_dense_and_decay_like_any_parameter(kind: Any) -> None:
    network = E2ENet(replace(TINY, shift_kind=kind))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.5)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.5, method="static", include=E2ENet.FUSION)
    vectors = sum(p.numel() for p in network.parameters() if p.ndim == 1)
    assert f"{vectors:,} in biases, norms and other vectors" in str(sparsifier.summary())
    offsets = {n: p for n, p in network.named_parameters() if n.endswith("offsets")}
    sum(y.square().sum() for y in network(torch.rand(2, 1, 8, 8, 8))).backward()
    steps = {n: p.detach() - 0.1 * (p.grad + 0.5 * p.detach()) for n, p in offsets.items()}
    optimizer.step()
    for n, p in offsets.items():
        # float32: the optimizer may fuse the multiplications
        torch.testing.assert_close(p.detach(), steps[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LEARNED)
def test_each_kind_is_one_graph_and_exports(kind: Any) -> None:
    network = E2ENet(replace(TINY, channels=(3, 3), strides=((2, 2, 2),), heads=1, shift_kind=kind)).eval()
    x = torch.rand(1, 1, 4, 4, 4)
    (expected,) = network(x)
    (compiled,) = torch.compile(network, backend="eager", fullgraph=True)(x)
    (exported,) = torch.export.export(network, (x,)).module()(x)
    assert torch.equal(compiled, expected)
    assert torch.equal(exported, expected)


@pytest.mark.parametrize(
    "wrong",
    [{"shift_kind": "learned"}, {"shift_kind": None}, {"shift": None, "shift_kind": "rounded"}],
)
def test_kinds_that_are_none_are_refused(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(SettingError) as caught:
        replace(TINY, **wrong)
    assert "shift_kind of E2ENetConfig: expected fixed or interpolated or rounded, and fixed where shift is" in str(
        caught.value
    )


def test_a_config_without_the_new_setting_is_the_published_network() -> None:
    assert AMOS.shift_kind == "fixed"
    network = E2ENet(TINY)
    assert not any(name.endswith("offsets") for name in network.state_dict())
    assert isinstance(network.encoder[0][0].shift, Shift)

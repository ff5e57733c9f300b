"""E2ENet against the published counts, its own table of layers, and every variant of the paper."""

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import nn

from dstlib.errors import DataError, SettingError
from dstlib.layers import Shift
from dstlib.zoo.e2enet import AMOS, BRATS, BTCV, E2ENet, E2ENetConfig

CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)
TINY = E2ENetConfig(channels=(4, 6, 8), strides=((2, 2, 2),) * 2, heads=2, num_classes=3)


def on_meta(config: E2ENetConfig) -> E2ENet:
    with torch.device("meta"):
        return E2ENet(config)


def num_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def params_by_table(config: E2ENetConfig) -> dict[str, int]:
    """Parameters from the table of layers, in plain arithmetic, without building anything."""
    c, num_levels = config.channels, len(config.channels)
    inner = math.prod(config.kernel_size)
    outer = math.prod(config.outer_kernel_size or config.kernel_size)

    def unit(i: int, o: int, taps: int) -> int:
        return i * o * taps + 3 * o  # bias, and the norm's weight and bias

    total = dict.fromkeys(("encoder", "fusion", "heads"), 0)
    for level, width in enumerate(c):
        total["encoder"] += unit(c[level - 1] if level else config.in_channels, width, outer) + unit(
            width, width, outer
        )
        for stage in range(1, num_levels - level):
            last = stage + level + 1 == num_levels
            total["fusion"] += c[level + 1] * width * math.prod(config.strides[level])
            total["fusion"] += unit(2 * width + (c[level - 1] if level else 0), width, outer if last else inner)
            total["fusion"] += unit(width, width, outer) if last else 0
    total["heads"] = config.num_classes * sum(c[: config.heads])
    return total


@pytest.mark.parametrize(("config", "params"), [(AMOS, 23_898_432), (BRATS, 23_891_856)])
def test_published_parameters(config: E2ENetConfig, params: int) -> None:
    assert num_params(on_meta(config)) == params


def test_composition_of_amos() -> None:
    parts = dict.fromkeys(("encoder", "fusion", "upward", "heads", "bias", "norm"), 0)
    for name, p in on_meta(AMOS).named_parameters():
        part = "norm" if ".norm." in name else "bias" if name.endswith(".bias") else name.split(".")[0]
        parts["upward" if ".upward." in name else part] += p.numel()
    assert parts == {
        "encoder": 5_804_208,
        "fusion": 13_360_896,
        "upward": 4_706_304,
        "heads": 9_840,
        "bias": 5_728,
        "norm": 11_456,
    }


def test_fusion_glob_selects_the_35_dsff_tensors() -> None:
    network = on_meta(AMOS)
    convolutions = {
        f"{name}.weight": m.weight.shape for name, m in network.named_modules() if isinstance(m, CONVOLUTIONS)
    }
    selected = {name for name in convolutions if fnmatchcase(name, E2ENet.FUSION)}
    assert len(selected) == 35
    assert sum(math.prod(convolutions[name][:2]) for name in selected) == 2_072_832
    assert {name.split(".")[0] for name in convolutions.keys() - selected} == {"encoder", "heads"}
    assert sum("upward" in name for name in selected) == 15


def test_shapes_of_amos_are_the_papers_table() -> None:
    shapes = {name: tuple(m.weight.shape) for name, m in on_meta(AMOS).named_modules() if isinstance(m, CONVOLUTIONS)}
    c = {1: 48, 2: 96, 3: 192, 4: 320, 5: 320, 6: 320}
    joined = {1: 96, 2: 240, 3: 480, 4: 832, 5: 960}
    expected: dict[str, tuple[int, ...]] = {}
    for level in range(1, 7):
        expected[f"encoder.{level - 1}.0.conv"] = (c[level], c.get(level - 1, 1), 1, 3, 3)
        expected[f"encoder.{level - 1}.1.conv"] = (c[level], c[level], 1, 3, 3)
        for stage in range(1, 7 - level):
            node = f"fusion.stage{stage}_level{level}"
            expected[f"{node}.upward"] = (c[level + 1], c[level], 2, 2, 2)
            expected[f"{node}.units.0.conv"] = (c[level], joined[level], 1, 3, 3)
        if level < 6:
            expected[f"fusion.stage{6 - level}_level{level}.units.1.conv"] = (c[level], c[level], 1, 3, 3)
        if level < 5:
            expected[f"heads.{level - 1}"] = (15, c[level], 1, 1, 1)
    assert shapes == expected


@pytest.mark.parametrize(
    "config",
    [
        AMOS,
        BRATS,
        BTCV,
        replace(AMOS, num_classes=16),
        replace(AMOS, kernel_size=(3, 3, 3), shift=None),
        replace(AMOS, outer_kernel_size=(3, 3, 3)),
        replace(AMOS, kernel_size=(3, 1, 3), shift_axis="height"),
        replace(AMOS, kernel_size=(3, 3, 1), shift_axis="width", shift=(-7, 0, 7)),
        replace(AMOS, channels=(58, 116, 232, 320, 320, 320)),
        replace(AMOS, strides=((1, 2, 2), *AMOS.strides[1:])),
        replace(AMOS, channels=(48, 96), strides=((2, 2, 2),), heads=1),
        replace(AMOS, channels=(32,) * 7, strides=((2, 2, 2),) * 6, heads=6),
    ],
)
def test_variants_have_the_parameters_of_the_table(config: E2ENetConfig) -> None:
    network = on_meta(config)
    assert {name: num_params(part) for name, part in network.named_children()} == params_by_table(config)
    with torch.device("meta"):
        logits = network(torch.empty(1, config.in_channels, 128, 128, 128))
    assert len(logits) == config.heads


@st.composite
def configs(draw: st.DrawFn) -> E2ENetConfig:
    num_levels = draw(st.integers(2, 4))
    steps = st.tuples(*[st.integers(1, 2)] * 3)
    extents = st.tuples(*[st.sampled_from([1, 3])] * 3)
    return E2ENetConfig(
        in_channels=draw(st.integers(1, 3)),
        num_classes=draw(st.integers(1, 3)),
        channels=tuple(draw(st.lists(st.integers(1, 5), min_size=num_levels, max_size=num_levels))),
        strides=tuple(draw(st.lists(steps, min_size=num_levels - 1, max_size=num_levels - 1))),
        kernel_size=draw(extents),
        outer_kernel_size=draw(st.none() | extents),
        shift=draw(st.none() | st.lists(st.integers(-3, 3), min_size=1, max_size=4).map(tuple)),
        shift_axis=draw(st.sampled_from(["depth", "height", "width"])),
        heads=draw(st.integers(1, num_levels - 1)),
    )


@given(configs())
@examples(15, 40)
def test_any_config_builds_and_keeps_its_shapes(config: E2ENetConfig) -> None:
    network = E2ENet(config)
    assert {name: num_params(part) for name, part in network.named_children()} == params_by_table(config)
    size = [2 * step for step in config.divisor]
    expected = [(1, config.num_classes, *size)]
    for stride in config.strides[: config.heads - 1]:
        size = [extent // step for extent, step in zip(size, stride, strict=True)]
        expected.append((1, config.num_classes, *size))
    logits = network(torch.rand(1, config.in_channels, *(2 * step for step in config.divisor)))
    assert [tuple(x.shape) for x in logits] == expected
    sum(x.square().sum() for x in logits).backward()
    unreached = [name for name, p in network.named_parameters() if p.grad is None]
    assert unreached == []


def test_forward_is_the_triangle_written_out() -> None:
    """L = 3 by hand: x[j, l] of every node from the three it is said to come from."""
    network = E2ENet(TINY)
    image = torch.rand(1, 1, 8, 8, 8)
    x = {}
    x[0, 1] = network.encoder[0](image)
    x[0, 2] = network.encoder[1](x[0, 1])
    x[0, 3] = network.encoder[2](x[0, 2])
    fusion = network.fusion
    x[1, 1] = fusion["stage1_level1"](x[0, 1], x[0, 2])
    x[1, 2] = fusion["stage1_level2"](x[0, 2], x[0, 3], x[0, 1])
    x[2, 1] = fusion["stage2_level1"](x[1, 1], x[1, 2])
    logits = network(image)
    assert torch.equal(logits[0], network.heads[0](x[2, 1]))
    assert torch.equal(logits[1], network.heads[1](x[1, 2]))


@pytest.mark.parametrize("training", [True, False])
def test_deep_supervision_off_gives_the_finest_logits_alone(training: bool) -> None:
    network = E2ENet(TINY).train(training)
    image = torch.rand(2, 1, 8, 8, 8)
    everything = network(image)
    network.deep_supervision = False
    prediction = network(image)
    assert isinstance(everything, tuple)
    assert len(everything) == 2
    assert torch.equal(prediction, everything[0])


def test_initialisation_is_kaiming_normal_with_zero_biases() -> None:
    torch.manual_seed(0)
    network = E2ENet(replace(TINY, channels=(24, 48, 96)))
    for name, module in network.named_modules():
        if isinstance(module, CONVOLUTIONS):
            # torch's fan-in: the second axis times the taps, for a transposed convolution too
            std = math.sqrt(2 / (1 + 0.01**2) / module.weight[0].numel())
            # the standard error of a sample deviation is std / sqrt(2 n); five of them
            tolerance = 5 * std / math.sqrt(2 * module.weight.numel())
            assert abs(float(module.weight.detach().std()) - std) < tolerance, name
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.InstanceNorm3d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert not module.bias.any()


@pytest.mark.parametrize(("name", "axis"), [("depth", 2), ("height", 3), ("width", 4)])
def test_shift_goes_before_every_kernel_but_the_outer_ones(name: Any, axis: int) -> None:
    def shifts(config: E2ENetConfig) -> list[str]:
        modules = on_meta(config).named_modules(remove_duplicate=False)  # the Units of a node share theirs
        found = {name: m for name, m in modules if isinstance(m, Shift)}
        assert all((m.sizes, m.axis) == ((-2, 0, 2), axis) for m in found.values())
        return list(found)

    config = replace(TINY, shift=(-2, 0, 2), shift_axis=name)
    num_units = 2 * 3 + 3 + 2
    assert len(shifts(config)) == num_units
    assert shifts(replace(config, outer_kernel_size=(3, 3, 3))) == ["fusion.stage1_level1.units.0.shift"]
    assert shifts(replace(config, shift=None)) == []


def test_maps_that_are_computed_once_more_give_the_same_bit_for_bit() -> None:
    config = replace(TINY, channels=(3, 4, 5, 6), strides=((2, 2, 2),) * 3)
    network, image = E2ENet(config), torch.rand(1, 1, 16, 16, 16)
    found = []
    for recompute in (False, True):
        network.recompute = recompute
        network.zero_grad()
        state = torch.get_rng_state()
        outputs = network(image)
        sum(y.square().mean() for y in outputs).backward()
        assert torch.equal(torch.get_rng_state(), state)
        found.append([*(y.detach() for y in outputs), *(p.grad for p in network.parameters())])
    assert all(map(torch.equal, *found))


def test_network_traces_without_a_graph_break() -> None:
    network = E2ENet(TINY)
    image = torch.rand(1, 1, 8, 8, 8)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for traced, eager in zip(compiled(image), network(image), strict=True):
        assert torch.equal(traced, eager)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 8, 8, 8), "shape of input of E2ENet: expected (B, 1, D, H, W), got (1, 2, 8, 8, 8)"),
        ((1, 8, 8, 8), "got (1, 8, 8, 8)"),
        ((1, 1, 8, 8, 6), "size of input of E2ENet: expected D, H, W in multiples of (4, 4, 4)"),
        ((1, 1, 4, 4, 4), "got (4, 4, 4)"),
    ],
)
def test_input_that_does_not_fit_is_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        E2ENet(TINY)(torch.rand(shape))
    assert message in str(caught.value)


def test_smallest_input_runs() -> None:
    assert E2ENet(TINY)(torch.rand(1, 1, 4, 4, 8))[0].shape == (1, 3, 4, 4, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_channels": 0},
        {"num_classes": True},
        {"channels": (8,)},
        {"channels": (8, 0, 8)},
        {"strides": ((2, 2, 2),)},
        {"strides": ((2, 2), (2, 2))},
        {"strides": (2, 2)},
        {"strides": ((2, 2, 2), (2, 0, 2))},
        {"kernel_size": (1, 2, 3)},
        {"kernel_size": (3, 3)},
        {"kernel_size": 3},
        {"outer_kernel_size": (2, 2, 2)},
        {"shift": ()},
        {"shift": (0.5,)},
        {"shift_axis": "time"},
        {"heads": 0},
        {"heads": 3},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(SettingError, match=f"^{name} of E2ENetConfig: expected "):
        replace(TINY, **wrong)


def test_configs_are_values() -> None:
    assert E2ENetConfig() == AMOS
    assert len({AMOS, BRATS, BTCV, replace(BRATS, in_channels=1, num_classes=15)}) == 3
    assert AMOS.divisor == (32, 32, 32)

"""Params and FLOPs against hand-worked layers, torch's own counter, and the published tables."""

import copy
import math
import warnings
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dstlib.errors import DataError, SelectionError, SettingError
from dstlib.masking.distribution import Distribution, er, erk, uniform, uniform_dense_first
from dstlib.profile import Convention, profile
from dstlib.zoo.e2enet import AMOS, BRATS, E2ENet, E2ENetConfig


@dataclass(frozen=True)
class Masks:
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def mask(shape: tuple[int, ...], num_active: int) -> Tensor:
    return (torch.arange(math.prod(shape)) < num_active).view(shape)


# One row per layer: input shape, output grid, params and FLOPs worked by hand.
@pytest.mark.parametrize(
    ("layer", "shape", "params", "exact", "paper"),
    [
        (nn.Linear(3, 2), (5, 3), 8, 5 * (2 * 6 + 2), 5 * (2 * 6 + 2)),
        (nn.Linear(3, 2, bias=False), (5, 7, 3), 6, 35 * 12, 35 * 12),
        (nn.Conv1d(2, 4, 3, padding=1), (1, 2, 10), 28, 10 * (2 * 24 + 4), 10 * (2 * 24 + 4)),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 114, 2 * 4 * (2 * 108 + 6), 2 * 4 * (2 * 108 + 6)),
        (nn.Conv3d(1, 2, (1, 3, 3), bias=False), (1, 1, 4, 5, 5), 18, 36 * 36, 36 * 36),
        # a transposed convolution scatters from the input grid: 27 positions there, 216 at the output
        (nn.ConvTranspose3d(4, 2, 2, 2, bias=False), (1, 4, 3, 3, 3), 64, 27 * 2 * 64, 216 * 2 * 64),
        (nn.ConvTranspose3d(4, 2, 2, 2), (1, 4, 3, 3, 3), 66, 27 * 128 + 216 * 2, 216 * (128 + 2)),
        (nn.ConvTranspose2d(4, 6, 2, 2, groups=2, bias=False), (1, 4, 3, 3), 48, 9 * 96, 36 * 96),
        (nn.ConvTranspose1d(2, 3, 4, 2, 1), (3, 2, 5), 27, 3 * (5 * 48 + 10 * 3), 3 * 10 * (48 + 3)),
    ],
)
def test_layers_worked_by_hand(layer: nn.Module, shape: tuple[int, ...], params: int, exact: int, paper: int) -> None:
    assert (profile(layer, shape).params, profile(layer, shape).flops) == (params, exact)
    assert profile(layer, shape, convention="paper").flops == paper


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    kind = draw(st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]))
    dims = int(kind.__name__[4])
    if transposed := draw(st.booleans()):
        kind = getattr(nn, f"ConvTranspose{dims}d")
    groups = draw(st.integers(1, 2))
    small = st.integers(1, 3)
    channels_in, channels_out = groups * draw(small), groups * draw(small)
    stride, kernel = draw(st.integers(1, 2)), draw(small)
    padding = 0 if transposed else draw(st.integers(0, 1))
    layer = kind(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False)
    return layer, (draw(small), channels_in, *(draw(st.integers(3, 5)) for _ in range(dims)))


@given(layers())
@settings(deadline=None)
def test_exact_convention_is_torchs_own_counter(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    with FlopCounterMode(display=False) as counter:
        layer(torch.rand(shape))
    assert profile(layer, shape).flops == counter.get_total_flops()


@given(layers(), st.floats(0, 1))
@settings(deadline=None)
def test_masked_flops_and_params_count_active_weights(case: tuple[nn.Module, tuple[int, ...]], density: float) -> None:
    layer, shape = case
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.to("meta")  # where the masks alone count
    active = mask(tuple(weight.shape), round(density * weight.numel()))
    dense = profile(layer, shape)
    sparse = profile(layer, shape, sparsifier=Masks({"weight": active}))
    assert sparse.params == int(active.sum())
    # dense FLOPs are a whole number per weight, so this division is exact
    assert sparse.flops * weight.numel() == dense.flops * int(active.sum())


def test_rows_add_up_and_the_batch_multiplies() -> None:
    network = E2ENet(E2ENetConfig(channels=(4, 6, 8), strides=((2, 2, 2),) * 2, heads=2))
    one, three = profile(network, (1, 1, 8, 8, 8)), profile(network, (3, 1, 8, 8, 8))
    assert three.flops == 3 * one.flops
    assert three.params == one.params == sum(p.numel() for p in network.parameters())
    assert one.params == sum(row.params for row in one.layers)
    assert one.flops == sum(row.flops for row in one.layers if row.flops is not None)
    (row,) = (row for row in one.layers if row.name == "encoder.1.0.conv")
    assert (row.type, row.weights, row.active, row.params, row.calls) == ("Conv3d", 216, 216, 222, 1)
    assert row.output_shape == (1, 6, 4, 4, 4)
    assert one.uncounted == ("InstanceNorm3d",)


def test_turning_deep_supervision_off_saves_the_other_heads() -> None:
    network = E2ENet(E2ENetConfig(channels=(4, 6, 8), strides=((2, 2, 2),) * 2, heads=2, num_classes=3))
    with_heads = profile(network, (1, 1, 8, 8, 8))
    network.deep_supervision = False
    without = profile(network, (1, 1, 8, 8, 8))
    assert with_heads.flops - without.flops == 2 * 6 * 3 * 4**3
    assert with_heads.params == without.params
    assert "Conv3d (not called)" in without.uncounted


def test_table_names_every_layer() -> None:
    model = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50)).to("meta")
    halved = Masks({"0.weight": mask((50, 40), 1000)})
    assert str(profile(model, (1, 40), sparsifier=halved)).splitlines() == [
        "layer  type         output  params  density  FLOPs",
        "-" * 50,
        "0      Linear       1×50     1,050     0.50  2,050",
        "1      BatchNorm1d  1×50       100        -      -",
        "total                        1,150           2,050",
        "FLOPs by the exact convention, without those of: BatchNorm1d.",
    ]
    assert str(profile(nn.Linear(2, 2), (1, 2))).splitlines()[-1] == "FLOPs by the exact convention."


class Twice(nn.Module):
    """One module called twice, and a second one tied to its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.inner(self.inner(x)))


def test_shared_modules_cost_flops_per_call_and_params_once() -> None:
    result = profile(Twice(), (1, 4))
    assert result.params == 16 + 4
    assert result.flops == 2 * (32 + 4) + 32
    assert [(row.name, row.calls, row.params, row.flops) for row in result.layers] == [
        ("inner", 2, 20, 72),
        ("tied", 1, 0, 32),
    ]


@pytest.mark.parametrize("name", ["inner.weight", "tied.weight"])
def test_a_mask_of_a_tied_weight_holds_under_either_name(name: str) -> None:
    with torch.device("meta"):
        model = Twice()
    result = profile(model, (1, 4), sparsifier=Masks({name: mask((4, 4), 5)}))
    assert (result.params, result.flops) == (5 + 4, 2 * (10 + 4) + 10)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Bilinear(2, 3, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        moved = y + torch.arange(3.0)  # made inside: must land where the copy lives
        return self.left(input=x), self.right(self.left(x), moved)


def test_several_inputs_keyword_calls_and_tensors_made_inside() -> None:
    result = profile(Two(), ((5, 3), (5, 3)))
    assert result.flops == 2 * 5 * (2 * 6 + 2)
    assert result.params == 8 + 28
    assert result.uncounted == ("Bilinear",)


class Reader(nn.Module):
    """As a language model is: token ids, a mask made of them, a flag, and a nest for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.Linear(6, 9)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, *, scales: Any = None, last: bool = False
    ) -> dict[str, Any]:
        hidden = self.body(self.table(ids)) * (ids != 0)[..., None]
        if mask is not None:
            hidden = hidden * mask[..., None]
        for scale in scales or ():
            hidden = hidden * scale
        return {"logits": self.head(hidden[:, -1:] if last else hidden), "states": (hidden, None)}


IDS = torch.arange(10).view(2, 5).remainder(9)
PER_POSITION = 2 * 4 * 6 + 6, 2 * 6 * 9 + 9


@pytest.mark.parametrize(
    ("inputs", "num_positions"),
    [
        (IDS, (10, 10)),
        ((IDS, None), (10, 10)),
        ((IDS, (2, 5)), (10, 10)),
        ({"ids": IDS, "last": True}, (10, 2)),
        (UserDict(ids=IDS, mask=IDS != 1, last=False), (10, 10)),
        ({"ids": IDS.to("meta"), "scales": [(2, 5, 6), (6,), 2.0]}, (10, 10)),
        ({"ids": IDS[:1], "scales": (torch.ones(6), [1])}, (5, 5)),
    ],
    ids=["ids", "a tuple", "with a shape", "by name", "no dict", "shapes in a list", "tensors in a tuple"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_token_ids_names_and_nests(inputs: Any, num_positions: tuple[int, int], device: str) -> None:
    result = profile(Reader().to(device), inputs)
    assert [row.flops for row in result.layers] == [
        None,
        *(n * each for n, each in zip(num_positions, PER_POSITION, strict=True)),
    ]


class Choosing(Reader):
    """Reads values, as a forward without storage cannot, and keeps some."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(9))

    def forward(self, ids: Tensor, mask: Tensor | None = None, **more: Any) -> dict[str, Any]:
        self.seen[ids[ids.sum(dim=1) > 10]] += torch.rand(())
        ids *= 1
        assert not self.training
        return super().forward(ids[:, ids.sum(dim=0) > 7], mask, **more)


def test_a_forward_that_reads_values_runs_on_example_tensors_and_leaves_no_trace() -> None:
    model, ids = Choosing().train(), IDS.clone()
    before, version = copy.deepcopy(model.state_dict()), ids._version
    rng = torch.get_rng_state()
    result = profile(model, {"ids": ids})
    num = 2 * int((IDS.sum(dim=0) > 7).sum())
    assert [row.flops for row in result.layers[1:]] == [num * each for each in PER_POSITION]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert ids._version == version


@pytest.mark.parametrize("inputs", [{"ids": IDS, "mask": (2, 5)}, {"ids": IDS.to("meta")}], ids=["shape", "meta"])
def test_without_values_such_a_forward_is_refused(inputs: Any) -> None:
    with pytest.raises(DataError) as caught:
        profile(Choosing(), inputs)
    message = str(caught.value)
    assert "forward of profile(): expected one that runs without storage on inputs of (2, 5) of torch.int64" in message
    assert "A forward that reads values (.item()) or names a device needs example tensors" in message


def test_a_shape_for_token_ids_is_refused_and_told_why() -> None:
    with pytest.raises(DataError, match="whole numbers, such as token ids, are given as a tensor of them"):
        profile(Reader(), (2, 5))


@pytest.mark.parametrize("turned", [True, False])
def test_layers_that_stand_for_a_linear_one_count_as_it(turned: bool) -> None:
    """Of a square weight too, of which the shape does not tell the outputs."""

    class Foreign(nn.Module):
        def __init__(self, num_in: int, num_out: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((num_in, num_out) if turned else (num_out, num_in)))
            self.bias = nn.Parameter(torch.ones(num_out))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight if turned else self.weight.T) + self.bias

    Foreign.__module__, Foreign.__qualname__ = (
        ("transformers.pytorch_utils", "Conv1D") if turned else ("torch_geometric.nn.dense.linear", "Linear")
    )
    model = nn.Sequential(Foreign(4, 6), Foreign(6, 6))
    linear = profile(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)), (3, 5, 4))
    result = profile(model, (3, 5, 4))
    assert [row.flops for row in result.layers] == [row.flops for row in linear.layers]
    assert result.flops_per_entry == linear.flops_per_entry == {"0.weight": 30, "1.weight": 30}
    assert result.uncounted == ()


@given(layers(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_what_is_outside_the_masks_counts_and_is_warned_of(
    case: tuple[nn.Module, tuple[int, ...]], density: float, filled: float
) -> None:
    layer, shape = case
    weight = layer.weight
    assert isinstance(weight, Tensor)
    active = mask(tuple(weight.shape), round(density * weight.numel()))
    with torch.no_grad():
        weight.copy_(active | mask(tuple(weight.shape), round(filled * weight.numel())))
    num_outside = int((weight.bool() & ~active).sum())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = profile(layer, shape, sparsifier=Masks({"weight": active}))
    (row,) = result.layers
    assert row.active == int(weight.count_nonzero())
    assert result.flops == row.active * result.flops_per_entry["weight"]
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == (num_outside > 0)
    if said:
        assert f"weights of profile(): {num_outside} that are not zero, in weight outside their masks" in said[0]
        assert "sparsifier.load_state_dict(state)" in said[0]


def test_attention_is_counted_and_what_is_not_is_named() -> None:
    """Attention uses the weight of out_proj without calling it; the two feed-forward layers are called."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    result = profile(layer, (1, 5, 8))
    assert result.uncounted == ("LayerNorm",)
    assert [(row.name, row.type, row.calls, row.flops) for row in result.layers if row.flops is not None] == [
        ("self_attn", "MultiheadAttention", 1, 5 * (2 * 3 * 64 + 24)),
        ("self_attn", "products of activations", 2, 2 * 2 * 5 * 5 * 8),
        ("self_attn.out_proj", "NonDynamicallyQuantizableLinear", 0, 5 * (2 * 64 + 8)),
        ("linear1", "Linear", 1, 5 * (2 * 128 + 16)),
        ("linear2", "Linear", 1, 5 * (2 * 128 + 8)),
    ]
    assert result.params == sum(p.numel() for p in layer.parameters())
    paper = profile(layer, (1, 5, 8), convention="paper")
    assert result.flops - paper.flops == 2 * 2 * 5 * 5 * 8
    assert paper.uncounted == ("LayerNorm", "products of activations")


def test_parameters_of_the_model_itself_count() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.scale = nn.Parameter(torch.ones(7))

    assert profile(Scaled(), (1, 3)).params == 9 + 3 + 7
    lstm = nn.LSTM(3, 4)
    assert profile(lstm, (2, 1, 3)).params == sum(p.numel() for p in lstm.parameters())


def test_model_is_not_touched() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).double().train()
    model(torch.rand(2, 1, 4, 4, dtype=torch.float64)).sum().backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (id(t), t.data_ptr(), t.detach().clone()) for name, t in tensors.items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    rng = torch.get_rng_state()
    profile(model, (2, 1, 4, 4))
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, (identity, pointer, values) in before.items():
        assert (id(after[name]), after[name].data_ptr()) == (identity, pointer)
        assert torch.equal(after[name], values)
        assert after[name].device.type == "cpu"
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True) if p.grad is not None)
    assert model.training
    assert model[1].training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_wrapped_models_are_profiled_under_their_plain_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to("meta")
    masks = Masks({"0.weight": mask((4, 4), 3)})
    plain = profile(model, (1, 4), sparsifier=masks)
    assert profile(torch.compile(model), (1, 4), sparsifier=masks).layers == plain.layers
    assert profile(nn.DataParallel(model), (1, 4), sparsifier=masks).layers == plain.layers


def test_parametrised_and_frozen_layers_count() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).requires_grad_(False)
    assert profile(layer, (1, 4)).flops == 2 * 12 + 3
    assert profile(layer, (1, 4)).params == 12 + 3 + 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"convention": "honest"}, SettingError, "convention of profile(): expected exact or paper, got 'honest'."),
        ({"input_shape": (1, None)}, DataError, "forward of profile(): expected one that runs on inputs of tuple, got"),
        ({"input_shape": (1, 5)}, DataError, "expected one that runs without storage on inputs of (1, 5) of torch.f"),
        ({"input_shape": torch.ones(1, 5)}, DataError, "forward of profile(): expected one that runs on inputs of (1"),
        ({"input_shape": {"x": (1, 3)}}, DataError, "TypeError: Linear.forward() got an unexpected keyword"),
        ({"sparsifier": Masks({"wight": mask((2, 3), 1)})}, SelectionError, "Similar: 'weight'."),
        ({"sparsifier": Masks({"weight": mask((3, 2), 1)})}, SelectionError, "expected shape (2, 3), got (3, 2)."),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        profile(nn.Linear(3, 2), **{"input_shape": (1, 3), **change})
    assert message in str(caught.value)


class Picky(nn.Linear):
    """A network that says in dstlib's words what it does not take."""

    def forward(self, x: Tensor) -> Tensor:
        raise DataError.of("size", "input of Picky", allowed="another", given=tuple(x.shape), remedy="Pass another.")


@pytest.mark.parametrize("inputs", [(1, 3), torch.ones(1, 3)], ids=["shape", "tensor"])
def test_what_a_network_says_itself_is_all_that_is_said(inputs: Any) -> None:
    with pytest.raises(DataError, match=r"^size of input of Picky: expected another, got \(1, 3\)\. Pass another\.$"):
        profile(Picky(3, 2), inputs)


# ---- the published table of E2ENet ----


def fusion_masks(network: E2ENet, density: float, level_1: float) -> dict[str, Tensor]:
    """round(in · out · density) whole kernels per DSFF tensor; another density for the convs of level 1."""
    masks = {}
    for name, module in network.fusion.named_modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            first = "_level1" in name and isinstance(module, nn.Conv3d)
            connections = module.weight.shape[:2]
            kept = mask(connections, round(math.prod(connections) * (level_1 if first else density)))
            masks[f"fusion.{name}.weight"] = kept[..., None, None, None].expand(module.weight.shape)
    return masks


@pytest.mark.parametrize(
    ("config", "density", "level_1", "kept", "params", "flops"),
    [
        (AMOS, 1.0, 1.0, 2_072_832, 23_898_432, 3_069_548_339_200),
        (AMOS, 0.3, 0.3, 621_847, 11_251_369, 1_064_825_364_480),
        (AMOS, 0.3, 0.2, None, 11_228_599, 969_321_062_400),  # "as printed"
        (AMOS, 0.2, 0.2, 414_569, 9_444_695, 778_741_981_184),
        (AMOS, 0.1, 0.1, 207_284, 7_637_959, 492_285_239_296),
        (BRATS, 1.0, 1.0, 2_072_832, 23_891_856, 3_071_781_806_080),
        (BRATS, 0.3, 0.3, 621_847, 11_244_793, 1_067_058_831_360),
        (BRATS, 0.2, 0.2, 414_569, 9_438_119, 780_975_448_064),
        (BRATS, 0.1, 0.1, 207_284, 7_631_383, 494_518_706_176),
    ],
)
def test_published_rows_of_e2enet(
    config: E2ENetConfig, density: float, level_1: float, kept: int | None, params: int, flops: int
) -> None:
    with torch.device("meta"):
        network = E2ENet(config)
    masks = fusion_masks(network, density, level_1)
    shape = (1, config.in_channels, 128, 128, 128)
    result = profile(network, shape, sparsifier=Masks(masks), convention="paper")
    assert (result.params, result.flops) == (params, flops)
    assert kept is None or sum(int(m[:, :, 0, 0, 0].sum()) for m in masks.values()) == kept


def test_exact_convention_takes_the_excess_of_the_transposed_convolutions() -> None:
    """Published counts put a (2, 2, 2) transposed convolution at the output grid: 8 times what it does."""
    with torch.device("meta"):
        network = E2ENet(AMOS)
    by: dict[Convention, dict[str, int | None]] = {
        convention: {r.name: r.flops for r in profile(network, (1, 1, 128, 128, 128), convention=convention).layers}
        for convention in ("exact", "paper")
    }
    for name, flops in by["paper"].items():
        exact = by["exact"][name]
        assert flops == (8 * exact if exact is not None and name.endswith("upward") else exact)


# ---- RigL's ResNet-50 ----


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride, 1×1; a projection where the shape changes. No norm: it is free here."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)
        changes = stride > 1 or channels != 4 * width
        self.downsample = nn.Conv2d(channels, 4 * width, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(self.conv2(self.conv1(x))) + self.downsample(x)
        return y


def resnet50() -> nn.Sequential:
    """As RigL's published counts see it.

    Every layer has a bias, so that it costs outputs · (2 · fan-in · density + 1). The first layer has 115×115
    outputs, not 112×112: its published count pads the image to 230 and then assumes "same" padding again.
    """
    network = nn.Sequential()
    network.add_module("conv1", nn.Conv2d(3, 64, 7, 2, padding=6))
    network.add_module("pool", nn.AdaptiveMaxPool2d(56))
    channels = 64
    for stage, (width, num_blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], 1):
        blocks = []
        for block in range(num_blocks):
            blocks.append(Bottleneck(channels, width, 2 if stage > 1 and block == 0 else 1))
            channels = 4 * width
        network.add_module(f"layer{stage}", nn.Sequential(*blocks))
    network.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network.add_module("fc", nn.Linear(channels, 1000))
    return network


@pytest.fixture(scope="module")
def resnet() -> SimpleNamespace:
    with torch.device("meta"):
        network = resnet50()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.ndim > 1}
    return SimpleNamespace(network=network, shapes=shapes, dense=profile(network, (1, 3, 224, 224)))


def test_resnet50_is_the_papers(resnet: SimpleNamespace) -> None:
    assert len(resnet.shapes) == 54
    assert sum(math.prod(shape) for shape in resnet.shapes.values()) == 25_502_912
    assert round(resnet.dense.flops / 1e9, 1) == 8.2


@pytest.mark.parametrize(
    ("distribution", "density", "fraction", "num_dense"),
    [
        (erk, 0.2, 0.4153, 8),
        (uniform_dense_first, 0.2, 0.2254, 1),
        (er, 0.2, 0.4546, None),
        (erk, 0.1, 0.2431, 1),
        (uniform_dense_first, 0.1, 0.1285, 1),
        (uniform, 0.1, 0.1012, 0),  # what RigL's table prints as 0.10
    ],
)
def test_flops_of_sparse_resnet50(
    resnet: SimpleNamespace, distribution: Distribution, density: float, fraction: float, num_dense: int | None
) -> None:
    densities = distribution(resnet.shapes, density)
    masks = {name: mask(shape, round(densities[name] * math.prod(shape))) for name, shape in resnet.shapes.items()}
    sparse = profile(resnet.network, (1, 3, 224, 224), sparsifier=Masks(masks))
    assert round(sparse.flops / resnet.dense.flops, 4) == fraction
    dense = [name for name, d in densities.items() if d == 1]
    assert num_dense is None or len(dense) == num_dense


def test_erk_densities_of_resnet50(resnet: SimpleNamespace) -> None:
    densities = erk(resnet.shapes, 0.1)
    assert [name for name, d in densities.items() if d == 1] == ["layer1.0.conv1.weight"]
    layers = ("conv1", "layer1.0.conv2", "layer4.2.conv2", "fc")
    assert [round(densities[f"{name}.weight"], 4) for name in layers] == [0.4200, 0.1773, 0.0213, 0.0726]

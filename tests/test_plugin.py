"""The shift in other people's networks: exact against the masked original, every alias, every refusal by name."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_zero_outside
from monai.networks.nets import BasicUNet, DynUNet, UNet
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

import dstlib
from dstlib.errors import SelectionError, SettingError
from dstlib.layers import ShiftedConv3d, add_depth_shift, shift

unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")

KERNELS = {"depth": (1, 3, 3), "height": (3, 1, 3), "width": (3, 3, 1)}
AXES = tuple(KERNELS)


def plain_conv_unet() -> nn.Module:
    """The network of nnU-Net, of which each convolution stands in two places, and the encoder in two more."""
    return unet.PlainConvUNet(
        1,
        3,
        (4, 6, 8),
        nn.Conv3d,
        [(1, 3, 3), (3, 3, 3), (3, 3, 3)],
        [1, (1, 2, 2), 2],
        2,
        3,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def dynunet() -> nn.Module:
    return DynUNet(3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=(4, 6, 8), deep_supervision=True, deep_supr_num=1)


NETWORKS = {
    "PlainConvUNet": plain_conv_unet,
    "UNet": lambda: UNet(3, 1, 3, (4, 6, 8), (2, 2), num_res_units=2),
    "DynUNet": dynunet,
    "BasicUNet": lambda: BasicUNet(3, 1, 3, (4, 4, 6, 8, 8, 4)),
}
SHAPE = (1, 1, 32, 32, 32)


def in_place_of(conv: nn.Conv3d, sizes: tuple[int, ...], at: int) -> Tensor:
    """By definition: all taps but one along the axis at zero, for input channel c the one at half - its size."""
    taps = conv.kernel_size[at]
    weight = torch.zeros_like(conv.weight)
    per_group = -(-conv.in_channels // len(sizes))
    for c in range(conv.in_channels):
        tap = taps // 2 - min(max(sizes[c // per_group], -(taps // 2)), taps // 2)
        weight[:, c].select(1 + at, tap).copy_(conv.weight[:, c].select(1 + at, tap))
    return weight * taps**0.5


@given(
    in_channels=st.integers(3, 7),
    taps=st.sampled_from([3, 5]),
    stride=st.tuples(*[st.integers(1, 2)] * 3),
    axis=st.sampled_from(AXES),
    sizes=st.sampled_from([(-1, 0, 1), (1, -1), (0,)]),
)
@settings(max_examples=40)
def test_a_flattened_layer_is_the_original_with_the_other_taps_at_zero(
    in_channels: int, taps: int, stride: tuple[int, ...], axis: Any, sizes: tuple[int, ...]
) -> None:
    at = AXES.index(axis)
    model = nn.Sequential(nn.Conv3d(in_channels, 2, taps, stride, taps // 2, dtype=torch.float64))
    x = torch.randn(2, in_channels, 5, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        weight = in_place_of(model[0], sizes, at)
        expected = functional.conv3d(x, weight, model[0].bias, stride, taps // 2)
        add_depth_shift(model, sizes, axis=axis)
        # double precision: the same products, added up in another order
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(model(x[0]), model(x)[0])  # without a batch


def test_taps_worked_by_hand() -> None:
    """Along depth 1, 2, 3. A group that moves by -1 brings voxel i + 1: what tap 3 saw. Then √3."""
    model = nn.Sequential(nn.Conv3d(3, 1, 3, padding=1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1, 1).expand(1, 3, 3, 3, 3))
    add_depth_shift(model)
    assert torch.allclose(model[0].weight[0, :, 0, 1, 1], 3**0.5 * torch.tensor([3.0, 2.0, 1.0]))  # float32
    assert model[0].weight.shape == (1, 3, 1, 3, 3)


def test_sizes_beyond_the_kernel_take_its_nearest_tap() -> None:
    model, near = (nn.Sequential(nn.Conv3d(3, 2, 3, padding=1)) for _ in range(2))
    near.load_state_dict(model.state_dict())
    add_depth_shift(model, (-7, 0, 7))
    add_depth_shift(near, (-1, 0, 1))
    assert torch.equal(model[0].weight, near[0].weight)
    assert model[0].sizes == (-7, 0, 7)


def test_fresh_weights_keep_the_variance_of_the_output() -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(48, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    x = torch.randn(1, 48, 12, 12, 12)
    inner = (..., slice(1, -1), slice(1, -1), slice(1, -1))  # at the border zeros take a part of it
    before = float(conv(x)[inner].var().detach())
    add_depth_shift(nn.Sequential(conv))
    # both estimate 1 from 64 random filters of some 400 weights each: a few percent
    assert before == pytest.approx(1, abs=0.05)
    assert float(conv(x)[inner].var().detach()) == pytest.approx(before, abs=0.05)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 3)])
def test_what_is_flat_or_to_stay_keeps_its_weight_and_is_shifted(kernel: tuple[int, ...], flatten: bool) -> None:
    conv = nn.Conv3d(6, 2, kernel, (1, 2, 1), [extent // 2 for extent in kernel])
    model, weight, before = nn.Sequential(conv), conv.weight, conv.weight.detach().clone()
    report = add_depth_shift(model, flatten=flatten)
    assert model[0] is conv
    assert conv.weight is weight
    if kernel == (1, 3, 3) or not flatten:
        assert torch.equal(weight, before)
        x = torch.rand(1, 6, 4, 4, 4)
        padding = [extent // 2 for extent in kernel]
        expected = functional.conv3d(shift(x, (-1, 0, 1), axis=2), before, conv.bias, (1, 2, 1), padding)
        assert torch.equal(model(x), expected)
        assert report.shifted == {"0": "×".join(map(str, kernel))}
    else:
        assert report.shifted == {"0": "3×3×3 → 1×3×3"}


@pytest.mark.parametrize("axis", AXES)
def test_kernels_become_flat_along_the_axis(axis: Any) -> None:
    model = nn.Sequential(nn.Conv3d(3, 3, 3, padding=1), nn.Conv3d(3, 3, 3, padding="same"))
    add_depth_shift(model, axis=axis)
    assert [tuple(conv.kernel_size) for conv in model] == [KERNELS[axis]] * 2
    assert [tuple(conv.weight.shape[2:]) for conv in model] == [KERNELS[axis]] * 2
    assert model(torch.rand(1, 3, 4, 5, 6)).shape == (1, 3, 4, 5, 6)


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    x = torch.rand(SHAPE)
    keys, shapes = list(model.state_dict()), [y.shape for y in outputs(model, x)]
    plain = {n for n, m in model.named_modules() if type(m) is nn.Conv3d}
    convolutions = {n for n, m in model.named_modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)}
    report = add_depth_shift(model)
    assert convolutions == report.shifted.keys() | report.left.keys()
    assert all(text in {"3×3×3 → 1×3×3", "1×3×3"} for text in report.shifted.values())
    pointwise = {n for n in plain if model.get_submodule(n).kernel_size == (1, 1, 1)}
    stems = {n for n in plain - pointwise if model.get_submodule(n).in_channels == 1}
    assert stems
    assert report.shifted.keys() == plain - pointwise - stems
    assert list(model.state_dict()) == keys
    assert [y.shape for y in outputs(model, x)] == shapes
    for module_name, module in model.named_modules(remove_duplicate=False):  # under every alias
        if isinstance(module, nn.Conv3d) and type(module) is nn.Conv3d:
            assert module in {model.get_submodule(n) for n in report.left}, module_name
    sum(y.square().sum() for y in outputs(model, x)).backward()
    for n in report.shifted:
        assert model.get_submodule(n).weight.grad.any(), n


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y] if isinstance(y, Tensor) else list(y)


def test_state_dict_and_deep_copy_carry_the_shift() -> None:
    first, second = plain_conv_unet(), plain_conv_unet()
    add_depth_shift(first)
    add_depth_shift(second)
    x = torch.rand(1, 1, 8, 8, 8)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))


def test_a_second_call_shifts_nothing_twice() -> None:
    model = plain_conv_unet()
    first = add_depth_shift(model)
    x = torch.rand(1, 1, 8, 8, 8)
    before = model(x)
    second = add_depth_shift(model, (-2, 0, 2), axis="width")
    assert torch.equal(model(x), before)
    assert second.shifted == {}
    reasons = {second.left[name] for name in first.shifted}
    assert reasons == {"shifted already, by (-1, 0, 1) along depth"}


def test_include_takes_any_name_of_a_convolution() -> None:
    model = plain_conv_unet()
    alias = "encoder.stages.1.0.convs.1.all_modules.0"
    report = add_depth_shift(model, include=alias)
    assert list(report.shifted) == [alias.replace("all_modules.0", "conv")]
    assert set(report.left.values()) == {"not included"}
    assert add_depth_shift(model, include=("decoder.*", "encoder.stages.2.*")).shifted


def test_report_prints_every_convolution() -> None:
    model = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), nn.ConvTranspose3d(6, 3, 2, 2))
    assert str(add_depth_shift(model)).splitlines() == [
        "shifted: 1",
        "  0  3×3×3 → 1×3×3",
        "left as they are: 1",
        "  1  transposed",
    ]
    assert "(model)" in str(add_depth_shift(nn.Conv3d(3, 6, 3, padding=1)))


class Special(nn.Conv3d):
    """A convolution with an idea of its own."""


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv3d(6, 6, 1), "1×1×1: no reach across the depth"),
        (nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0)), "3×1×1: no reach across the depth"),
        (nn.ConvTranspose3d(6, 6, 2, 2), "transposed"),
        (nn.Conv3d(6, 6, 3, padding=1, groups=2), "grouped: 2 groups of channels that do not meet"),
        (nn.Conv3d(6, 6, 3, padding=1, groups=6), "grouped: 6 groups of channels that do not meet"),
        (nn.Conv3d(6, 6, 3, padding=2, dilation=2), "dilated: by 2×2×2"),
        (nn.Conv3d(6, 6, 3, padding=1, padding_mode="reflect"), "padded by 'reflect', where a shift lets zeros in"),
        (nn.Conv3d(6, 6, 3), "3×3×3, padded by 0 along depth: not half an odd kernel"),
        (nn.Conv3d(6, 6, 3, padding="valid"), "3×3×3, padded by 0 along depth: not half an odd kernel"),
        (nn.Conv3d(6, 6, 4, padding=2), "4×4×4, padded by 2 along depth: not half an odd kernel"),
        (nn.Conv3d(1, 6, 3, padding=1), "1 input channel for 3 sizes"),
        (nn.Conv3d(2, 6, 3, padding=1), "2 input channels for 3 sizes"),
        (nn.Conv2d(6, 6, 3), "a Conv2d, not a plain Conv3d"),
        (Special(6, 6, 3, padding=1), "a Special, not a plain Conv3d"),
        (nn.LazyConv3d(6, 3, padding=1), "a LazyConv3d, not a plain Conv3d"),
        (
            parametrizations.weight_norm(nn.Conv3d(6, 6, 3, padding=1)),
            "a ParametrizedConv3d, not a plain Conv3d",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_says_why_and_is_untouched(conv: nn.Module, reason: str) -> None:
    kind, model = type(conv), nn.ModuleDict({"odd": conv, "good": nn.Conv3d(6, 6, 3, padding=1)})
    report = add_depth_shift(model)
    assert report.left == {"odd": reason}
    assert list(report.shifted) == ["good"]
    assert type(model["odd"]) is kind
    with pytest.raises(SelectionError) as caught:
        add_depth_shift(nn.Sequential(conv))
    assert f"expected a model with a convolution that can be shifted, got none (0: {reason}" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_computed_and_shared_weights_are_left() -> None:
    computed = weight_norm(nn.Conv3d(6, 6, 3, padding=1))
    one, other = nn.Conv3d(6, 6, 3, padding=1), nn.Conv3d(6, 6, 3, padding=1)
    other.weight = one.weight
    good = nn.Conv3d(6, 6, 3, padding=1)
    report = add_depth_shift(nn.Sequential(computed, one, other, good))
    assert report.left == {
        "0": "its weight is computed from other parameters",
        "1": "its weight belongs to another module too",
        "2": "its weight belongs to another module too",
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": ()}, SettingError, "sizes of add_depth_shift(): expected one whole number of voxels or more"),
        ({"sizes": (0.5,)}, SettingError, "got (0.5,)"),
        ({"axis": "time"}, SettingError, "axis of add_depth_shift(): expected depth or height or width, got 'time'"),
        ({"include": "nothing.*"}, SelectionError, "glob 'nothing.*' of add_depth_shift(): expected a match"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Conv3d(3, 3, 3, padding=1))
    with pytest.raises(error) as caught:
        add_depth_shift(model, **arguments)
    assert message in str(caught.value)
    assert type(model[0]) is nn.Conv3d


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"got none \(no convolution\)"):
        add_depth_shift(nn.Linear(3, 3))


def test_an_optimizer_made_before_trains_what_is_there_after() -> None:
    model = nn.Sequential(nn.Conv3d(3, 3, 3, padding=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(1, 3, 4, 4, 4)).sum().backward()
    add_depth_shift(model)
    assert model[0].weight.grad is None
    before = model[0].weight.detach().clone()
    model(torch.rand(1, 3, 4, 4, 4)).sum().backward()
    optimizer.step()
    assert (model[0].weight != before).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_dsff_on_the_result_is_exact(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    dense = dstlib.profile(model, SHAPE)
    report = add_depth_shift(model)
    flat = dstlib.profile(model, SHAPE)
    deep = [n for n, text in report.shifted.items() if text.startswith("3×3×3")]
    assert dense.params - flat.params == 2 * sum(model.get_submodule(n).weight.numel() for n in deep)
    assert flat.flops < dense.flops
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    names = [f"{n}.weight" for n in report.shifted]
    method = replace(dstlib.DSFF, interval=1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=method, include=names, total_steps=8)
    sparse = dstlib.profile(model, SHAPE, sparsifier=sparsifier)
    assert sparse.params == flat.params - sum(int((~mask).sum()) for mask in sparsifier.masks.values())
    grown = []
    sparsifier.observers.append(lambda site, update: grown.append(int(update.grown.sum())))
    for _ in range(2):
        optimizer.zero_grad()
        sum(y.square().sum() for y in outputs(model, torch.rand(SHAPE))).backward()
        optimizer.step()
    assert sum(grown) > 0
    assert sparsifier.masks.keys() == set(names)
    for n, mask in sparsifier.masks.items():
        kernels = mask.flatten(2)
        assert torch.equal(kernels.all(-1), kernels.any(-1)), n  # whole kernels
        num_all = kernels.shape[0] * kernels.shape[1]
        assert int(kernels.all(-1).sum()) == max((2 * num_all + 5) // 10, 1), n  # a fifth, halves up
    assert_zero_outside(model, sparsifier.masks, optimizer)
    sparsifier.detach()


def test_a_sparse_flat_model_may_be_shifted_and_a_sparse_deep_one_fails_loudly() -> None:
    def step(kernel: tuple[int, ...]) -> tuple[nn.Module, dstlib.Sparsifier]:
        model = nn.Sequential(nn.Conv3d(6, 6, kernel, padding=[k // 2 for k in kernel]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method="static")
        add_depth_shift(model)
        model(torch.rand(1, 6, 4, 4, 4)).sum().backward()
        optimizer.step()
        return model, sparsifier

    model, sparsifier = step((1, 3, 3))
    assert not model[0].weight[~sparsifier.masks["0.weight"]].any()
    assert int(sparsifier.masks["0.weight"].sum()) == 6 * 6 * 9 // 2
    with pytest.raises(dstlib.StateError, match=r"got another shape, which no mask fits.*add_depth_shift"):
        step((3, 3, 3))


def test_compiles_as_one_graph() -> None:
    model = plain_conv_unet().eval()
    add_depth_shift(model)
    x = torch.rand(1, 1, 8, 8, 8)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_exports() -> None:
    model = nn.Sequential(nn.Conv3d(6, 6, 3, padding=1), nn.Conv3d(6, 6, 3, stride=2, padding=1))
    add_depth_shift(model)
    x = torch.rand(1, 6, 8, 8, 8)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_a_shifted_convolution_of_ones_own() -> None:
    conv = ShiftedConv3d(4, 2, (3, 1, 3), stride=(2, 1, 1), padding=(1, 0, 1), sizes=(-2, 2), axis="height")
    x = torch.rand(1, 4, 6, 6, 6)
    expected = functional.conv3d(shift(x, (-2, 2), axis=3), conv.weight, conv.bias, (2, 1, 1), (1, 0, 1))
    assert torch.equal(conv(x), expected)

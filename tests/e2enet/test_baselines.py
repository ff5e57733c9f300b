"""The baselines against published counts, and all of them in the one loop: trained, predicting, made sparse."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dstlib
from dstlib.errors import DataError, SettingError
from dstlib.zoo.e2enet import AMOS, E2ENet, E2ENetConfig
from dstlib.zoo.e2enet.baselines import BASELINES, Baseline, Published, Segmenter, build_model
from dstlib.zoo.e2enet.baselines.architecture import Architecture
from dstlib.zoo.e2enet.baselines.deeplab import Pyramid
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

UnetResBlock = pytest.importorskip("monai.networks.blocks").UnetResBlock
pytest.importorskip("dynamic_network_architectures")

TINY = E2ENetConfig(channels=(8, 16, 24), strides=((2, 2, 2),) * 2, heads=2)
# the narrowest and smallest of each that still has every part; V-Net has one width
SMALL: dict[str, dict[str, Any]] = {
    "e2enet": {"patch_size": (8, 8, 8)},
    "e2enet_plus": {"patch_size": (8, 8, 8)},
    "nnunet": {"patch_size": (8, 8, 8), "width": 0.25},
    "nnunet_minus": {"patch_size": (8, 8, 8), "width": 0.25},
    "unetr": {"patch_size": (16, 16, 32), "width": 0.1},
    "swin_unetr": {"patch_size": (32, 32, 64), "width": 0.25},
    "vnet": {"patch_size": (16, 16, 32)},
    "unet_plus_plus": {"patch_size": (16, 16, 32), "width": 0.125},
    "deeplabv3": {"patch_size": (16, 16, 32), "width": 0.125},
    "medformer": {"patch_size": (17, 8, 12), "width": 0.0625},
    "cotr": {"patch_size": (16, 16, 32), "width": 1 / 32},
    "nnformer": {"patch_size": (6, 12, 20), "width": 1 / 32},
    "dints": {
        "patch_size": (8, 8, 12),
        "width": 0.125,
        "architecture": Architecture.of([[1] * 4] * 2, [[1, 2, 3, 4]] * 2),
    },
    "dints_search": {"patch_size": (16, 16, 32), "width": 1 / 16},
    "umamba": {"patch_size": (8, 8, 12), "width": 0.125},
    "resenc_m": {"patch_size": (8, 7, 12), "width": 0.125},
    "resenc_l": {"patch_size": (8, 7, 12), "width": 0.125},
    "mednext_s": {"patch_size": (16, 15, 32), "width": 0.125},
    "mednext_b": {"patch_size": (16, 15, 32), "width": 0.125},
}
SLOW = ("swin_unetr", "vnet", "dints_search")  # windows of 7³; 45 million parameters; 600 operations
NAMES = [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in SMALL]


def small(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, **({"in_channels": 2, "num_classes": 3, "config": TINY} | SMALL[name] | changes))


def num_params(module: nn.Module) -> int:
    return sum(p.numel() for _, p in module.named_parameters())


# ---- published counts ----


def published_size(name: str, *, channels: int, classes: int, extent: int = 128) -> nn.Module:
    config = replace(AMOS, in_channels=channels, num_classes=classes)
    return build_model(name, in_channels=channels, num_classes=classes, patch_size=(extent,) * 3, config=config)


SETTINGS = {
    "AMOS": (1, 15, 128),
    "AMOS, 16 classes": (1, 16, 128),
    "BraTS": (4, 3, 128),
    "BTCV": (1, 13, 96),
    "96³": (1, 15, 96),
}


def in_setting(name: str, setting: str, **changes: Any) -> nn.Module:
    channels, classes, extent = SETTINGS[setting]
    config = replace(AMOS, in_channels=channels, num_classes=classes, **changes)
    with torch.device("meta") if name != "swin_unetr" else nullcontext():  # which reads values while it is built
        network = build_model(name, in_channels=channels, num_classes=classes, patch_size=(extent,) * 3, config=config)
    return network.to("meta")


def printed(name: str, setting: str) -> Published:
    (row,) = (p for p in BASELINES[name].published if p.setting == setting)
    return row


def published_flops(network: nn.Module, setting: str) -> int:
    """Counts as the paper does.

    Beyond the "paper" convention of profile(): no bias in a Linear, whose sum of n products takes n - 1 additions, four
    FLOPs for each element of a batch norm, and one for each of a ReLU. Other norms, activations and attention are free.
    """
    channels, _, extent = SETTINGS[setting]
    shape, more = (1, channels, extent, extent, extent), 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal more
        if isinstance(module, nn.BatchNorm3d):
            more += 4 * output.numel()
        elif isinstance(module, nn.ReLU):
            more += output.numel()
        elif isinstance(module, nn.Linear):
            more -= output.numel() * (1 if module.bias is None else 2)

    counted = nn.BatchNorm3d | nn.ReLU | nn.Linear
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, counted)]
    with torch.no_grad(), torch.device("meta"):
        network.eval()(torch.empty(shape))
    for hook in hooks:
        hook.remove()
    return dstlib.profile(network, shape, convention="paper").flops + more


def flatten(*stages: nn.Module) -> None:
    """Makes the 3×3×3 kernels of nnU-Net's stages 1×3×3."""
    for stage in stages:
        for conv in stage.modules():
            if isinstance(conv, nn.Conv3d) and conv.kernel_size == (3, 3, 3):
                conv.kernel_size, conv.padding = (1, 3, 3), (0, 1, 1)
                conv.weight = nn.Parameter(conv.weight[:, :, :1])


def unused_in_older_monai(network: nn.Module) -> int:
    """Counts a 1×1×1 convolution of each residual block that needs none: MONAI built them all until version 0.9 or so.

    Without the norms of cross-attention that its newer transformers have, and do not use either.
    """
    blocks = [m for m in network.modules() if isinstance(m, UnetResBlock) and not m.downsample]
    norms = sum(p.numel() for key, p in network.named_parameters() if ".norm_cross_attn." in key)
    return sum(block.conv1.conv.in_channels**2 for block in blocks) - norms


@pytest.mark.parametrize(
    ("name", "setting", "params", "flops"),
    [
        ("e2enet", "AMOS", 23_898_432, 3_069_548_339_200),
        ("e2enet", "BraTS", 23_891_856, 3_071_781_806_080),
        ("nnunet", "BraTS", 31_198_176, 1_076_617_650_176),
        ("nnunet_minus", "AMOS", 12_961_434, 755_793_133_568),
        ("vnet", "AMOS", 45_650_158, 1_737_574_318_080),
    ],
)
def test_parameters_and_flops_are_the_published_ones_to_the_printed_digit(
    name: str, setting: str, params: int, flops: int
) -> None:
    network, row = in_setting(name, setting), printed(name, setting)
    assert (num_params(network), published_flops(network, setting)) == (params, flops)
    assert (round(params / 1e6, 2), round(flops / 1e9, 2)) == (row.params, row.flops)


@pytest.mark.parametrize(
    ("name", "setting", "params", "unused", "flops"),
    [
        ("unetr", "AMOS", 93_029_823, 6_144 - 18_432, 391_032_733_696),
        ("unetr", "BTCV", 92_802_461, 6_144 - 18_432, 164_908_541_952),
        pytest.param("swin_unetr", "AMOS", 62_187_345, 638_208, 1_562_985_602_304, marks=pytest.mark.long),
    ],
)
def test_monais_transformers_are_the_published_ones_but_for_what_another_version_builds_and_never_uses(
    name: str, setting: str, params: int, unused: int, flops: int
) -> None:
    network, row = in_setting(name, setting), printed(name, setting)
    assert (num_params(network), published_flops(network, setting)) == (params, flops)
    assert unused_in_older_monai(network) == unused
    assert (round((params + unused) / 1e6, 2), round(flops / 1e9, 2)) == (row.params, row.flops)


def test_nnformer_is_the_published_one_with_the_head_that_predicts() -> None:
    setting = "AMOS, 16 classes"
    network, row = in_setting("nnformer", setting), printed("nnformer", setting)
    assert num_params(network) == 150_140_232
    layers = dstlib.profile(network, (1, 1, 128, 128, 128), convention="paper").layers
    others = sum(layer.flops or 0 for layer in layers if layer.name in ("host.heads.1", "host.heads.2"))
    flops = published_flops(network, setting) - others
    assert flops == 1_343_654_789_120
    assert round(flops / 1e9, 2) == row.flops


def test_nnunet_for_btcv_is_the_published_one_once_the_encoder_begins_flat() -> None:
    """nnU-Net's first version takes the kernels of the decoder from one level further down: there they stay whole."""
    network, row = in_setting("nnunet", "BTCV"), printed("nnunet", "BTCV")
    assert num_params(network) == 31_203_584
    flatten(network.host.encoder.stages[0])
    params, flops = num_params(network), published_flops(network, "BTCV")
    assert (params, flops) == (31_184_576, 416_730_883_968)
    assert (round(params / 1e6, 2), round(flops / 1e9, 2)) == (row.params, row.flops)


def test_nnunet_for_amos_has_the_published_flops_and_in_another_plan_the_published_parameters() -> None:
    """The paper's row mixes two networks: its FLOPs need all strides 2, its parameters flat kernels and strides."""
    row = printed("nnunet", "AMOS")
    network = in_setting("nnunet", "AMOS")
    params, flops = num_params(network), published_flops(network, "AMOS")
    assert (params, flops) == (31_205_184, 1_067_889_041_408)
    assert round(flops / 1e9, 2) == row.flops
    flat = in_setting("nnunet", "AMOS", strides=((1, 2, 2),) * 2 + ((2, 2, 2),) * 3)
    flatten(*flat.host.encoder.stages[:2], *flat.host.decoder.stages[-2:])
    params = num_params(flat)
    assert params == 30_758_144
    assert round(params / 1e6, 2) == row.params


@pytest.mark.parametrize(
    ("setting", "params", "flops"),
    [("AMOS", 41_873_212, 1_510_529_228_800), ("BTCV", 41_871_796, 636_942_586_752)],
)
def test_cotr_has_the_published_flops_with_the_norms_and_activations_that_its_program_defaults_to(
    setting: str, params: int, flops: int
) -> None:
    """Its paper has instance norm and leaky ReLU, as ours has: they are free, and have as many parameters."""
    network, row = in_setting("cotr", setting), printed("cotr", setting)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm3d):
                setattr(module, name, nn.BatchNorm3d(child.num_features, device="meta"))
            elif isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.ReLU())
    assert (num_params(network), published_flops(network, setting)) == (params, flops)
    assert (round(params / 1e6, 2), round(flops / 1e9, 2)) == (row.params, row.flops)


def test_nnformer_has_the_published_parameters_and_the_published_flops_with_the_one_head_that_predicts() -> None:
    setting = "AMOS, 16 classes"
    network, row = in_setting("nnformer", setting), printed("nnformer", setting)
    params, flops = num_params(network), published_flops(network, setting)
    assert params == 150_140_232
    for level in (1, 2):  # transposed convolutions from a voxel to 2×4×4, at their output grid
        flops -= 16 * (2 * 192 * 2**level * 32 + 1) * 128**3 // 8**level
    assert (round(params / 1e6, 2), round(flops / 1e9, 2)) == (row.params, row.flops)


def test_medformer_has_the_flops_that_are_overprinted() -> None:
    setting = "AMOS, 16 classes"
    row = printed("medformer", setting)
    flops = published_flops(in_setting("medformer", setting), setting)
    assert round(flops / 1e9, 1) == row.flops


def test_e2enet_plus_is_wider_up_to_the_cap() -> None:
    """Its counts are in test_variants: a sparse network on the meta device has no masks to count."""
    network = in_setting("e2enet_plus", "AMOS")
    assert isinstance(network, E2ENet)
    assert network.config == replace(AMOS, channels=(58, 116, 232, 320, 320, 320))


def test_deeplabv3_has_the_published_parameters_and_a_tenth_of_the_published_flops() -> None:
    """No strides of this network give 1546.25 G; a decimal point out of place does, to 0.014 %."""
    network, row = in_setting("deeplabv3", "AMOS"), printed("deeplabv3", "AMOS")
    params, flops = num_params(network), published_flops(network, "AMOS")
    assert (params, flops) == (74_684_111, 154_646_618_880)
    assert round(params / 1e6, 2) == row.params
    assert row.flops is not None
    assert flops / 1e9 == pytest.approx(row.flops / 10, rel=1.5e-4)  # what was seen; a printed digit is 6e-6 of it
    # the public program: functional ReLUs but for the stem's, no bias in shortcuts, but one in each unit of the pyramid
    functional, shortcuts, pyramid = 20_578_560, 917_504, 655_616
    assert str(flops - functional - shortcuts + pyramid).startswith(str(row.flops).replace(".", ""))


def test_unet_plus_plus_is_another_than_the_published_one() -> None:
    assert num_params(in_setting("unet_plus_plus", "BraTS")) == 26_384_780  # not 58.38 M: docs/baselines.md says so


def test_the_count_of_others_is_half_the_papers_convention() -> None:
    """82.6 G of UNETR at 96³: multiply-adds, transposed convolutions at the output grid, attention left out."""
    flops = dstlib.profile(in_setting("unetr", "96³"), (1, 1, 96, 96, 96), convention="paper").flops
    row = printed("unetr", "96³")
    assert row.flops is not None
    assert flops / 2e9 == pytest.approx(row.flops, rel=0.005)  # theirs has other classes, hence another head


@pytest.mark.parametrize("extent", [2**44 + 1, 2**63 - 1])
def test_a_network_that_no_memory_holds_is_refused_in_words(extent: int) -> None:
    config = replace(TINY, kernel_size=(extent, 3, 3))
    with pytest.raises(SettingError, match=r"size of the network: expected one whose weights fit into memory"):
        small("e2enet", config=config)


def test_nnunet_follows_levels_and_strides_but_keeps_its_own_widths() -> None:
    """The plan for the hippocampus: 4 stages of 32, 64, 128, 256."""
    config = E2ENetConfig(channels=(16, 32, 64, 96), strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)), heads=3)
    with torch.device("meta"):
        network = build_model("nnunet", in_channels=1, num_classes=3, patch_size=(40, 56, 40), config=config)
        logits = network(torch.empty(1, 1, 40, 56, 40))
    widths = [p.shape[0] for name, p in network.named_parameters() if name.endswith("convs.0.conv.weight")]
    assert widths[:4] == [32, 64, 128, 256]
    assert [tuple(x.shape[2:]) for x in logits] == [(40, 56, 40), (40, 28, 20), (20, 14, 10)]


# ---- one loop for all ----


@pytest.mark.parametrize("name", SMALL)
def test_segmenters_answer_alike(name: str) -> None:
    network = small(name).eval()
    size = SMALL[name]["patch_size"]
    x = torch.rand(1, 2, *size)
    with torch.no_grad():
        several = network(x)
        network.deep_supervision = False
        one = network(x)
    assert isinstance(several, tuple)
    assert one.shape == (1, 3, *size)
    assert torch.equal(one, several[0])
    extents = [math.prod(logits.shape[2:]) for logits in several]
    assert extents == sorted(extents, reverse=True)


@pytest.mark.parametrize("name", NAMES)
def test_density_holds_through_sparse_training(name: str) -> None:
    network = small(name).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.8, method=rigl_each_step(), total_steps=10)
    active = {key: int(mask.sum()) for key, mask in sparsifier.masks.items()}
    total = sum(mask.numel() for mask in sparsifier.masks.values())
    assert sum(active.values()) / total == pytest.approx(0.2, abs=1e-3)  # rounded to whole weights in each layer
    first = {key: mask.clone() for key, mask in sparsifier.masks.items()}
    size = SMALL[name]["patch_size"]
    for _ in range(2):
        optimizer.zero_grad()
        deep_supervision_loss(network(torch.rand(2, 2, *size)), torch.randint(0, 3, (2, 1, *size))).backward()
        optimizer.step()
    parameters = dict(network.named_parameters())
    assert any(not torch.equal(mask, first[key]) for key, mask in sparsifier.masks.items())
    for key, mask in sparsifier.masks.items():
        assert int(mask.sum()) == active[key], key
        assert not parameters[key].detach()[~mask].any(), key
        assert torch.isfinite(parameters[key]).all(), key


def rigl_each_step() -> dstlib.Method:
    return replace(dstlib.RIGL, interval=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    """But UNETR's norm for cross-attention, which nothing calls, and the logits of a search, whose turn it is not."""
    network = small(name).train()
    size = SMALL[name]["patch_size"]
    deep_supervision_loss(network(torch.rand(2, 2, *size)), torch.randint(0, 3, (2, 1, *size))).backward()
    unreached = {key for key, p in network.named_parameters() if p.grad is None}
    if name == "unetr":
        unreached = {key for key in unreached if ".norm_cross_attn." not in key}
    if name == "dints_search":
        unreached = {key for key in unreached if ".log_alpha_" not in key}
    assert unreached == set()


def test_unet_plus_plus_puts_the_whole_nest_first() -> None:
    network = small("unet_plus_plus").eval()
    x = torch.rand(1, 2, 16, 16, 32)
    with torch.no_grad():
        logits, raw = network(x), network.host(x)
    assert [torch.equal(a, b) for a, b in zip(logits, reversed(raw), strict=True)] == [True] * 4


@pytest.mark.parametrize("name", ["unetr", "unet_plus_plus", "deeplabv3"])
def test_sizes_that_fit_no_stride_are_padded_and_cut_back(name: str) -> None:
    network = small(name, patch_size=(10, 14, 20)).eval()
    with torch.no_grad():
        assert {tuple(logits.shape) for logits in network(torch.rand(1, 2, 10, 14, 20))} == {(1, 3, 10, 14, 20)}


def test_deepcopy_and_state_round_trip() -> None:
    network = small("nnunet").eval()
    other = small("nnunet").eval()
    nn.init.ones_(next(other.parameters()))
    other.load_state_dict(network.state_dict())
    x = torch.rand(1, 2, 8, 8, 8)
    for twin in (other, copy.deepcopy(network)):
        assert all(torch.equal(a, b) for a, b in zip(network(x), twin(x), strict=True))


# ---- the adapter ----


class Identity(nn.Module):
    """A host that returns its input, and notes its size."""

    def forward(self, x: Tensor) -> Tensor:
        self.size = tuple(x.shape[2:])
        return x


@given(
    size=st.tuples(*[st.integers(1, 7)] * 3),
    multiple=st.tuples(*[st.integers(1, 3)] * 3),
)
@settings(deadline=None, max_examples=50)
def test_padding_is_undone(size: tuple[int, int, int], multiple: tuple[int, int, int]) -> None:
    segmenter = Segmenter(Identity(), in_channels=1, multiple=multiple)
    x = torch.rand(1, 1, *size)
    padded = tuple(math.ceil(n / m) * m for n, m in zip(size, multiple, strict=True))
    if padded == multiple:
        with pytest.raises(DataError, match="expected more than"):
            segmenter(x)
    else:
        assert torch.equal(segmenter(x)[0], x)
        assert segmenter.host.size == padded


@given(size=st.tuples(*[st.integers(3, 20)] * 3), stride=st.tuples(*[st.sampled_from([1, 2, 4])] * 3))
@settings(deadline=None, max_examples=30)
def test_heads_of_lower_resolution_are_cut_to_the_part_that_the_image_has(
    size: tuple[int, int, int], stride: tuple[int, int, int]
) -> None:
    """As long as the voxels 0, stride, 2 · stride, ... of the image: the ones that the loss compares them with."""
    step = tuple(slice(None, None, s) for s in stride)
    segmenter = Segmenter(Identity(), in_channels=1, multiple=(4, 4, 4), read=lambda x: (x, x[(..., *step)]))
    x = torch.rand(1, 1, *size)
    if max(size) > 4:
        assert torch.equal(segmenter(x)[1], x[(..., *step)])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("nnunet", (1, 1, 8, 8, 8), "shape of input of PlainConvUNet: expected (B, 2, D, H, W), got (1, 1, 8, 8, 8)"),
        ("nnunet", (1, 2, 8, 8, 6), "size of input of PlainConvUNet: expected D, H, W in multiples of (4, 4, 4)"),
        ("nnunet", (1, 2, 4, 4, 4), "expected more than (4, 4, 4) along an axis, got (4, 4, 4)"),
        ("unetr", (1, 2, 32, 32, 32), "expected a size that pads to (16, 16, 32), got (32, 32, 32)"),
        ("swin_unetr", (1, 2, 20, 32, 32), "expected more than (32, 32, 32) along an axis, got (20, 32, 32)"),
    ],
)
def test_input_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        small(name)(torch.rand(shape))
    assert message in str(caught.value)


def test_deeplabv3_refuses_to_train_on_one_image() -> None:
    network = small("deeplabv3").train()
    with pytest.raises(DataError, match="batch of DeepLabv3: expected at least 2 in training, got 1"):
        network(torch.rand(1, 2, 16, 16, 32))


def test_pyramid_sees_the_whole_image() -> None:
    """One voxel far away changes every output, through the image's mean alone."""
    torch.manual_seed(0)
    pyramid = Pyramid(2, 3).eval()
    x = torch.rand(1, 2, 1, 1, 40)
    other = x.clone()
    other[..., 39] += 1
    # voxel 0 is 39 away: no atrous tap of rate 6, 12 or 18 reaches that far
    assert not torch.equal(pyramid.image(x.mean((2, 3, 4), True)), pyramid.image(other.mean((2, 3, 4), True)))
    branches = [torch.equal(b(x)[..., 0], b(other)[..., 0]) for b in pyramid.branches]
    assert branches == [True] * 4


def test_deeplabv3_has_output_stride_16() -> None:
    network = small("deeplabv3").eval()
    with torch.no_grad():
        assert network.host.trunk(torch.rand(1, 2, 32, 32, 48)).shape == (1, 64, 2, 2, 3)


# ---- the table ----


def test_e2enet_is_among_them_as_it_is() -> None:
    network = small("e2enet")
    assert isinstance(network, E2ENet)
    assert network.config == replace(TINY, in_channels=2, num_classes=3)


def test_table_names_every_network_of_the_comparison() -> None:
    assert [name for name, baseline in BASELINES.items() if baseline.build] == list(SMALL)
    assert not [name for name, baseline in BASELINES.items() if baseline.reason]
    assert all(name == baseline.name for name, baseline in BASELINES.items())
    with pytest.raises(AssertionError, match="ours"):
        Baseline(name="ours", implementation="-", published=(Published(setting="AMOS", source="-"),))


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in SMALL])
def test_what_is_not_runnable_says_why(name: str) -> None:
    with pytest.raises(SettingError) as caught:
        build_model(name, in_channels=1, num_classes=3, patch_size=(8, 8, 8), config=TINY)
    message = str(caught.value)
    assert message.startswith("name of the network: expected one of e2enet, e2enet_plus, nnunet, ")
    assert f"Not runnable: {BASELINES[name].reason}" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "nnunnet"},
            "name of the network: expected the name of a baseline, got 'nnunnet'. Similar: 'nnunet'",
        ),
        ({"in_channels": 0}, "in_channels of the network: expected a whole number from 1 up, got 0."),
        ({"num_classes": True}, "num_classes of the network"),
        ({"patch_size": (8, 8)}, "patch_size of the network: expected three whole numbers from 1 up, got (8, 8)."),
        ({"patch_size": 8}, "patch_size of the network"),
        ({"config": None}, "config of the network: expected an E2ENetConfig, got None."),
        ({"width": 0}, "width of the network: expected a number above 0, got 0."),
        ({"width": math.nan}, "width of the network"),
        ({"name": "e2enet", "width": 0.5}, "width of e2enet: expected 1, got 0.5. Leave --width out"),
        (
            {"name": "vnet", "width": 2},
            "width of vnet: expected 1, got 2. MONAI builds V-Net in one width: leave --width out.",
        ),
        ({"name": "vnet", "in_channels": 3}, "in_channels of vnet: expected a divisor of 16, got 3."),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {"name": "nnunet", "in_channels": 1, "num_classes": 3, "patch_size": (8, 8, 8), "config": TINY} | changes
    with pytest.raises(SettingError) as caught:
        build_model(**given)
    assert message in str(caught.value)

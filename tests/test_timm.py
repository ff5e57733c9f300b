"""Real models of timm: every family selected from, many of them trained and updated with exact densities."""

import copy
import re
from dataclasses import dataclass, field, replace

import pytest
import torch
from models import assert_zero_outside
from torch import nn

import dstlib
from dstlib import RIGL, SelectionError, uniform
from dstlib.targets import select

timm = pytest.importorskip("timm")


@dataclass(frozen=True)
class Family:
    """One model for each of timm's modules: ``settings`` make it small enough to train on images of ``size``.

    All are selected from on the meta device as their authors publish them; those that are not ``quick`` are trained
    by the long tests only, those without a size not at all.
    """

    model: str
    size: int | None = 32
    quick: bool = True
    settings: dict[str, object] = field(default_factory=dict)


FAMILIES = {
    "beit": Family("beit_base_patch16_224", settings={"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}),
    "byoanet": Family("halonet26t", size=256, quick=False),
    "byobnet": Family("test_byobnet"),
    "cait": Family("cait_xxs24_224", settings={"img_size": 32, "depth": 2}),
    "coat": Family("coat_tiny", settings={"img_size": 32, "serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "convit": Family("convit_tiny", settings={"img_size": 32, "depth": 3, "local_up_to_layer": 2}),
    "convmixer": Family("convmixer_768_32", quick=False),
    "convnext": Family("test_convnext"),
    "cpubone": Family("cpubone_nano", quick=False),
    "crossvit": Family("crossvit_tiny_240", quick=False),
    "csatv2": Family("csatv2", size=64, quick=False),
    "cspnet": Family("cs3darknet_s", quick=False),
    "cspnext": Family("cspnext_tiny", quick=False),
    "davit": Family("davit_tiny", quick=False),
    "deepseek_vit": Family(
        "deepseek_vit_412m", size=28, quick=False, settings={"embed_dim": 48, "depth": 2, "num_heads": 2}
    ),
    "deit": Family("deit_tiny_patch16_224", settings={"img_size": 32, "depth": 2}),
    "densenet": Family("densenet121", settings={"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "dla": Family("dla34", quick=False),
    "dpn": Family("dpn68", quick=False),
    "edgenext": Family("edgenext_xx_small"),
    "efficientformer": Family("efficientformer_l1", size=224, quick=False),
    "efficientformer_v2": Family("efficientformerv2_s0", quick=False, settings={"img_size": 32}),
    "efficientnet": Family("test_efficientnet"),
    "efficientvim": Family("efficientvim_m1", quick=False),
    "efficientvit_mit": Family("efficientvit_b0", quick=False),
    "efficientvit_msra": Family("efficientvit_m0", quick=False),
    "eva": Family("eva02_tiny_patch14_224", size=28, settings={"img_size": 28, "depth": 2}),
    "fasternet": Family("fasternet_s", quick=False),
    "fastvit": Family("fastvit_s12", quick=False),
    "focalnet": Family("focalnet_tiny_srf", quick=False),
    "gcvit": Family("gcvit_xxtiny", quick=False, settings={"img_size": 32}),
    "gemma4_vit": Family(
        "gemma4_vit_167m", size=48, quick=False, settings={"embed_dim": 48, "depth": 2, "num_heads": 2}
    ),
    "ghostnet": Family("ghostnet_050", quick=False),
    "hardcorenas": Family("hardcorenas_a", quick=False),
    "hgnet": Family("hgnet_tiny", quick=False),
    "hiera": Family("hiera_tiny_224", quick=False, settings={"img_size": 32, "stages": (1, 1, 1, 1)}),
    "hieradet_sam2": Family("sam2_hiera_tiny", quick=False),
    "hrnet": Family("hrnet_w18_small", quick=False),
    "iformer": Family("iformer_s", quick=False),
    "inception_next": Family("inception_next_atto", quick=False),
    "inception_resnet_v2": Family("inception_resnet_v2", size=299, quick=False),
    "inception_v3": Family("inception_v3", size=299, quick=False),
    "inception_v4": Family("inception_v4", size=299, quick=False),
    "lcnetv2": Family("lcnetv2_small", quick=False),
    "levit": Family("levit_128s", quick=False, settings={"img_size": 32}),
    "lowformer": Family("lowformer_b0", quick=False),
    "mambaout": Family("test_mambaout"),
    "maxxvit": Family("test_maxvit", settings={"img_size": 32}),
    "metaformer": Family("caformer_s18", quick=False),
    "mlp_mixer": Family("mixer_s32_224", quick=False, settings={"img_size": 32}),
    "mobilenetv3": Family("mobilenetv3_small_050"),
    "mobilenetv5": Family("mobilenetv5_300m", size=None, quick=False),
    "mobilevit": Family("mobilevit_xxs"),
    "mvitv2": Family("mvitv2_tiny", quick=False),
    "naflexvit": Family("naflexvit_base_patch16_map", settings={"embed_dim": 48, "depth": 2, "num_heads": 2}),
    "nasnet": Family("nasnetalarge", quick=False),
    "nest": Family("nest_tiny", quick=False, settings={"img_size": 32}),
    "nextvit": Family("nextvit_small", quick=False),
    "nfnet": Family("test_nfnet"),
    "pit": Family("pit_xs_224", quick=False, settings={"img_size": 32}),
    "pnasnet": Family("pnasnet5large", quick=False),
    "pvt_v2": Family("pvt_v2_b0", quick=False),
    "qwen3_vit": Family("qwen3_vit_88m", settings={"embed_dim": 48, "depth": 2, "num_heads": 2}),
    "rdnet": Family("rdnet_tiny", quick=False),
    "regnet": Family("regnetx_002"),
    "repghost": Family("repghostnet_050", quick=False),
    "repvit": Family("repvit_m0_9", quick=False),
    "res2net": Family("res2net50d", quick=False),
    "resnest": Family("resnest14d", quick=False),
    "resnet": Family("test_resnet"),
    "resnetv2": Family("resnetv2_18", quick=False),
    "rexnet": Family("rexnet_100", quick=False),
    "selecsls": Family("selecsls42", quick=False),
    "senet": Family("legacy_seresnet18", quick=False),
    "sequencer": Family(
        "sequencer2d_s", settings={"layers": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 32), "hidden_sizes": (8, 8, 8, 8)}
    ),
    "shvit": Family("shvit_s1", quick=False),
    "sknet": Family("skresnet18", quick=False),
    "starnet": Family("starnet_s1", settings={"depths": (1, 1, 1, 1)}),
    "swiftformer": Family("swiftformer_xs", quick=False),
    "swin_transformer": Family(
        "swin_tiny_patch4_window7_224",
        settings={"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)},
    ),
    "swin_transformer_v2": Family(
        "swinv2_tiny_window8_256", settings={"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    ),
    "swin_transformer_v2_cr": Family(
        "swinv2_cr_tiny_224", settings={"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}
    ),
    "tiny_vit": Family("tiny_vit_5m_224", quick=False, settings={"depths": (1, 1, 1, 1)}),
    "tnt": Family("tnt_s_patch16_224", quick=False, settings={"img_size": 32, "depth": 2}),
    "tresnet": Family("tresnet_m", quick=False),
    "twins": Family(
        "twins_svt_small", settings={"embed_dims": (16, 32, 48, 64), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
    ),
    "vgg": Family("vgg11", quick=False, settings={"mlp_ratio": 0.02}),
    "visformer": Family("visformer_tiny", quick=False, settings={"img_size": 32}),
    "vision_transformer": Family("test_vit"),
    "vision_transformer_hybrid": Family("vit_tiny_r_s16_p8_224", settings={"img_size": 32, "depth": 2}),
    "vision_transformer_relpos": Family("test_vit_relpos", quick=False, settings={"img_size": 32}),
    "vision_transformer_sam": Family(
        "samvit_base_patch16",
        settings={"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_attn_indexes": (1,)},
    ),
    "vitamin": Family("vitamin_small_224", quick=False, settings={"img_size": 32}),
    "volo": Family("volo_d1_224", quick=False, settings={"img_size": 32}),
    "vovnet": Family("ese_vovnet19b_slim", quick=False),
    "xception": Family("legacy_xception", quick=False),
    "xception_aligned": Family("xception41", quick=False),
    "xcit": Family("xcit_nano_12_p8_224", settings={"depth": 2}),
}
# Where q, k and v are stacked evenly in one Linear layer: which matrices they become.
FUSED = {
    "beit": ("qkv",),
    "cait": ("qkv",),
    "coat": ("qkv",),
    "convit": ("qk", "qkv"),
    "crossvit": ("qkv",),
    "csatv2": ("qkv",),
    "davit": ("qkv",),
    "deepseek_vit": ("qkv",),
    "deit": ("qkv",),
    "edgenext": ("qkv",),
    "eva": ("qkv",),
    "gcvit": ("qkv",),
    "hiera": ("qkv",),
    "hieradet_sam2": ("qkv",),
    "metaformer": ("qkv",),
    "mobilevit": ("qkv",),
    "mvitv2": ("qkv",),
    "naflexvit": ("qkv", "kv"),
    "nest": ("qkv",),
    "pit": ("qkv",),
    "pvt_v2": ("kv",),
    "qwen3_vit": ("qkv",),
    "swin_transformer": ("qkv",),
    "swin_transformer_v2": ("qkv",),
    "swin_transformer_v2_cr": ("qkv",),
    "tnt": ("qk",),
    "twins": ("qkv", "kv"),
    "vision_transformer": ("qkv",),
    "vision_transformer_hybrid": ("qkv",),
    "vision_transformer_relpos": ("qkv",),
    "vision_transformer_sam": ("qkv",),
    "vitamin": ("qkv",),
    "volo": ("qkv", "kv"),
    "xcit": ("qkv",),
}
# All the reasons there are for a weight with two axes or more to stay dense.
REASONS = re.compile(
    "depthwise: sparse only if included by name|recurrent: sparse only if included by name"
    r"|raw parameter of \w+: sparse only if included by name"
    "|its forward standardises the weight, which would undo the zeros"
    r"|\w+ of (Embedding|LayerNorm\w*): no weight of Linear, Conv or attention"
)


def existing(families):
    return [family for family in families if family in timm.list_modules()]  # older timm has fewer


TRAINED = [
    pytest.param(name, marks=() if FAMILIES[name].quick else pytest.mark.long)
    for name in existing(FAMILIES)
    if FAMILIES[name].size
]


def tiny(name):
    torch.manual_seed(0)
    family = FAMILIES[name]
    return timm.create_model(family.model, num_classes=4, **family.settings)


def on_meta(model):
    with torch.device("meta"):
        return timm.create_model(model)


def logits(model, size, step=0):
    y = model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(step)))
    return y if isinstance(y, torch.Tensor) else y[0]


def test_the_table_holds_every_family_of_timm():
    assert set(timm.list_modules()) <= set(FAMILIES), "a new one: add a row"


@pytest.mark.parametrize("name", existing(FAMILIES))
def test_every_weight_of_every_family_is_named_with_a_reason(name):
    model = on_meta(FAMILIES[name].model)
    weights = select(model)
    assert {id(w.parameter) for w in weights} == {id(p) for p in model.parameters() if p.ndim >= 2}
    views = [view for w in weights for view in w.views]
    assert len({w.name for w in weights}) == len(weights)
    assert len({view.name for view in views}) == len(views)
    for w in weights:
        assert model.get_parameter(w.name) is w.parameter
        assert not w.reason or REASONS.fullmatch(w.reason), w
        rows = [view.rows or (0, len(view.of(w.parameter))) for view in w.views]
        if not w.views[0].transposed:
            assert [i for span in rows for i in range(*span)] == list(range(len(w.parameter))), w.name
        owner, _, key = w.name.rpartition(".")
        is_matrix = isinstance(model.get_submodule(owner), (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d))
        if not w.reason:  # position embeddings, bias tables, tokens, norms and layer scales are none of these
            assert is_matrix, w.name
            assert key == "weight"
        elif is_matrix and key == "weight":
            assert "depthwise" in w.reason or "standardises" in w.reason, w.name
    fused = {"".join(view.name[-1] for view in w.views) for w in weights if len(w.views) > 1 and not w.reason}
    assert fused == set(FUSED.get(name, ())), "other fused projections than in the table"


@pytest.mark.parametrize("name", TRAINED)
def test_mask_forward_backward_update(name):
    model, size = tiny(name), FAMILIES[name].size
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=replace(RIGL, interval=1), total_steps=8)
    counts = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    num_all = sum(m.numel() for m in sparsifier.masks.values())
    assert sum(counts.values()) == num_all - int(0.8 * num_all)
    targets = {s.name: sparsifier.plan.densities[s.name] for w in sparsifier.weights for s in w.views}
    moved = []
    sparsifier.observers.append(lambda site, update: moved.append(int(update.grown.sum())))
    for step in range(2):
        optimizer.zero_grad()
        (logits(model, size, step) - 1).square().sum().backward()  # heads begin at zero, and zero must not be right
        optimizer.step()
    assert sum(moved) > 0
    assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == counts
    for w in sparsifier.weights:
        for view in w.views:
            part = view.of(sparsifier.masks[w.name])
            assert int(part.sum()) == max(round(targets[view.name] * part.numel()), 1), view.name
    assert_zero_outside(model, sparsifier.masks, optimizer)


@pytest.mark.parametrize("name", existing(name for name in FUSED if FAMILIES[name].quick))
def test_the_part_called_v_is_what_attention_passes_on(name):
    """With v at zero, nothing of q gets through: rows that alternated head by head would let some of it."""
    model, size = tiny(name).eval(), FAMILIES[name].size
    fused = [w for w in select(model) if len(w.views) > 1 and w.views[-1].name.endswith(".v") and not w.reason]
    for w in fused:
        with torch.no_grad():
            w.views[-1].of(w.parameter).zero_()
            bias = model.get_submodule(w.name.rpartition(".")[0]).bias
            if bias is not None:
                bias.zero_()
    before = logits(model, size)
    for w in fused:
        with torch.no_grad():
            w.views[0].of(w.parameter).normal_()
    assert torch.equal(logits(model, size), before)


def test_weight_standardised_convolutions_stay_dense_with_the_reason_and_are_refused_by_name():
    model = timm.create_model("nf_resnet26", num_classes=4)
    reasons = {w.name: w.reason for w in select(model)}
    standardised = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n for n, reason in reasons.items() if "standardises" in reason} == {f"{n}.weight" for n in standardised}
    assert reasons["head.fc.weight"] == ""
    with pytest.raises(SelectionError, match=r"weight of stem\.conv\.weight.*standardises the weight"):
        select(model, include=("stem.conv",))
    table = str(dstlib.sparsify(model, sparsity=0.5, method="static").summary())
    assert "dense: its forward standardises the weight, which would undo the zeros" in table


@pytest.mark.parametrize("kind", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_what_the_reason_says_is_true_of_each_standardised_kind(kind, monkeypatch):
    """Zeros in the stored weight, and none in what the convolution is given."""
    conv = getattr(timm.layers, kind)(4, 4, kernel_size=3)
    with torch.no_grad():
        conv.weight[:, :2] = 0
    given, real = [], nn.functional.conv2d

    def conv2d(x, weight, *args):
        given.append(weight)
        return real(x, weight, *args)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    conv(torch.randn(1, 4, 8, 8))
    assert (given[0] != 0).all()
    with pytest.raises(SelectionError, match="standardises"):
        select(conv)


def test_depthwise_convolutions_stay_dense():
    model = on_meta("mobilenetv3_small_050")
    depthwise = [w for w in select(model) if "depthwise" in w.reason]
    assert len(depthwise) == sum(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())


def test_position_embeddings_and_tokens_stay_dense():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=4)
    dense = {w.name for w in select(model) if w.reason}
    assert {"pos_embed", "cls_token"} <= dense
    assert not any(name.endswith("weight") for name in dense)


def test_mixed_kernels_are_opt_in():
    model = on_meta("tf_efficientnet_cc_b0_4e")
    mixed = [w for w in select(model) if w.kind == "CondConv2d"]
    assert mixed
    assert {w.reason for w in mixed} == {"raw parameter of CondConv2d: sparse only if included by name"}
    name = mixed[0].name
    chosen = {w.name: w for w in select(model, include=("*", name), split={name: 4})}[name]
    assert [view.rows for view in chosen.views] == [(0, 1), (1, 2), (2, 3), (3, 4)], "one for each expert"


def test_tied_layers_of_coat_count_once():
    model = on_meta("coat_tiny")
    by_every_name = [p for _, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    weights = select(model)
    assert len(weights) < len(by_every_name)
    assert sum(w.parameter.numel() for w in weights) == sum(p.numel() for p in model.parameters() if p.ndim >= 2)


def test_projections_whose_rows_alternate_head_by_head_stay_joint():
    """By name and shape they look like the others; checked against the forward of timm."""
    for name, expected in (("tiny_vit_5m_224", 1), ("coatnet_pico_rw_224", 1), ("test_vit", 3)):
        qkv = [w for w in select(on_meta(name)) if w.name.endswith("qkv.weight")]
        assert {len(w.views) for w in qkv} == {expected}, name


@pytest.mark.parametrize("wrapper", ["ModelEmaV2", "ModelEmaV3"])
def test_an_average_is_masked_before_it_is_read(wrapper):
    model = tiny("vision_transformer")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = replace(RIGL, interval=1, distribution=uniform)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=method, total_steps=16)
    average = getattr(timm.utils, wrapper)(model, decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        logits(model, 32, step).square().sum().backward()
        optimizer.step()
        average.update(model)

    def density():
        parts = [average.module.get_parameter(n) for n in sparsifier.masks]
        return sum(int(p.count_nonzero()) for p in parts) / sum(p.numel() for p in parts)

    assert density() > 0.25
    sparsifier.mask_model(average)
    assert density() == pytest.approx(0.2, abs=1e-3)
    assert_zero_outside(average.module, sparsifier.masks)
    assert_zero_outside(copy.deepcopy(average.module), sparsifier.masks)

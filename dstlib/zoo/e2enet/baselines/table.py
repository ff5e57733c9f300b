"""The table of baselines: how each is built, what was published of it, and why some cannot be built here.

Nothing heavy is imported until a network is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from torch import nn

from dstlib.errors import SettingError, require, similar
from dstlib.layers.blocks import Triple
from dstlib.zoo.e2enet.baselines.deeplab import deeplabv3
from dstlib.zoo.e2enet.baselines.monai_nets import swin_unetr, unet_plus_plus, unetr, vnet
from dstlib.zoo.e2enet.baselines.nnunet import nnunet
from dstlib.zoo.e2enet.baselines.segmenter import Request, refuse_width
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.network import E2ENet

E2ENET = "E2ENet (arXiv:2312.04727)"
QUOTED = "E2ENet (arXiv:2312.04727), at second hand: its table was not at hand"
UX_NET = "README of MASILab/3DUX-Net, FeTA 2021"
UNEST = "README of MASILab/UNesT, whole brain"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row of somebody's table: parameters in millions, FLOPs in billions, as printed; None where not seen."""

    setting: str
    params: float | None = None
    flops: float | None = None
    source: str


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A network of the comparison; ``reason`` says why it is not runnable where ``build`` is None."""

    name: str
    implementation: str
    published: tuple[Published, ...] = ()
    build: Callable[[Request], nn.Module] | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        assert (self.build is None) == (self.reason is not None), self.name


def build_model(
    name: str,
    *,
    in_channels: int,
    num_classes: int,
    patch_size: Triple,
    config: E2ENetConfig,
    width: float = 1.0,
) -> nn.Module:
    """Builds a network of :data:`BASELINES` as a segmenter: all of them train and predict in the same loop.

    Its attribute ``deep_supervision`` decides whether forward gives a tuple of logits, finest first, or the
    finest alone. ``num_classes`` are the channels of the logits. ``config`` is that of the E2ENet under
    comparison; "nnunet" takes its levels and strides from it, the others have theirs from their papers.
    ``width`` multiplies the channels of the published networks; "e2enet" and "vnet" allow only 1.

    Raises:
        SettingError: No such baseline, one that cannot be built, or a setting that it does not allow.

    >>> tiny = E2ENetConfig(channels=(8, 16), strides=((2, 2, 2),), heads=1)
    >>> net = build_model("nnunet", in_channels=1, num_classes=3, patch_size=(8, 8, 8), config=tiny)
    >>> sum(p.numel() for p in net.parameters())
    294592
    """
    where, given, alike = "build_model()", repr(name), f"Similar: {similar(name, BASELINES)}."
    require(name in BASELINES, "name", where, allowed="the name of a baseline", given=given, remedy=alike)
    build, reason = BASELINES[name].build, BASELINES[name].reason
    if build is None:
        runnable = ", ".join(key for key, baseline in BASELINES.items() if baseline.build)
        remedy = f"Not runnable: {reason}"
        raise SettingError.of("name", where, allowed=f"one of {runnable}", given=given, remedy=remedy)
    return build(
        Request(in_channels=in_channels, num_classes=num_classes, patch_size=patch_size, config=config, width=width)
    )


def _e2enet(request: Request) -> E2ENet:
    refuse_width(request, "e2enet", "The channels of config say how wide it is.")
    return E2ENet(replace(request.config, in_channels=request.in_channels, num_classes=request.num_classes))


_ROWS = (
    Baseline(
        name="e2enet",
        implementation="dstlib",
        published=(
            Published(setting="AMOS", params=23.90, flops=3069.55, source=E2ENET),
            Published(setting="BraTS", params=23.89, flops=3071.78, source=E2ENET),
        ),
        build=_e2enet,
    ),
    Baseline(
        name="nnunet",
        implementation="dynamic-network-architectures, PlainConvUNet",
        published=(
            Published(setting="AMOS", params=31.2, flops=1067.89, source=E2ENET),
            Published(setting="BraTS", params=31.20, flops=1076.62, source=E2ENET),
        ),
        build=nnunet,
    ),
    Baseline(
        name="unetr",
        implementation="MONAI, UNETR",
        published=(
            Published(setting="AMOS", params=93.03, source=QUOTED),
            Published(setting="96³", params=92.8, flops=82.6, source=UX_NET),
        ),
        build=unetr,
    ),
    Baseline(
        name="swin_unetr",
        implementation="MONAI, SwinUNETR",
        published=(Published(setting="96³", params=62.2, flops=328.4, source=UX_NET),),
        build=swin_unetr,
    ),
    Baseline(
        name="vnet",
        implementation="MONAI, VNet",
        published=(Published(setting="AMOS", params=45.65, source=QUOTED),),
        build=vnet,
    ),
    Baseline(
        name="unet_plus_plus",
        implementation="MONAI, BasicUNetPlusPlus",
        published=(Published(setting="BraTS", params=58.38, flops=3938.25, source=E2ENET),),
        build=unet_plus_plus,
    ),
    Baseline(
        name="deeplabv3",
        implementation="dstlib, on MONAI's ResNet-34",
        published=(Published(setting="AMOS", params=74.68, source=QUOTED),),
        build=deeplabv3,
    ),
    Baseline(
        name="cotr",
        implementation="-",
        published=(Published(setting="whole brain", params=42.0, flops=328.0, source=UNEST),),
        reason="no package of that name; its authors' code is tied to torch 1.7 and a copy of nnU-Net's first version.",
    ),
    Baseline(
        name="nnformer",
        implementation="-",
        published=(Published(setting="96³", params=149.3, flops=240.2, source=UX_NET),),
        reason="no package of that name; its authors' code is a copy of nnU-Net's first version, changed.",
    ),
    Baseline(
        name="medformer",
        implementation="-",
        reason="no package of it; its authors' code is a set of scripts to run in place, not to install.",
    ),
    Baseline(
        name="dints",
        implementation="-",
        reason=(
            "MONAI has the network, but its architecture is found by a search over the data set, and no result "
            "of that for AMOS, BraTS or BTCV was found; a made-up one would not be DiNTS."
        ),
    ),
)

BASELINES: Mapping[str, Baseline] = MappingProxyType({row.name: row for row in _ROWS})
"""Every network of the comparison by name, the runnable ones first."""

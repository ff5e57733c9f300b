"""The table of baselines: how each is built, what was published of it, and why some cannot be built here.

Nothing heavy is imported until a network is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import nn

from dstlib.axes import Triple
from dstlib.bounds import is_out_of_memory
from dstlib.errors import SettingError, require, similar
from dstlib.zoo.e2enet.baselines.architecture import REMEDY, Architecture
from dstlib.zoo.e2enet.baselines.cotr import cotr
from dstlib.zoo.e2enet.baselines.deeplab import deeplabv3
from dstlib.zoo.e2enet.baselines.dints import dints, dints_search
from dstlib.zoo.e2enet.baselines.medformer import medformer
from dstlib.zoo.e2enet.baselines.monai_nets import mednext_b, mednext_s, swin_unetr, unet_plus_plus, unetr, vnet
from dstlib.zoo.e2enet.baselines.nnformer import nnformer
from dstlib.zoo.e2enet.baselines.nnunet import nnunet, nnunet_minus, resenc_l, resenc_m
from dstlib.zoo.e2enet.baselines.segmenter import Request
from dstlib.zoo.e2enet.baselines.umamba import umamba
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.network import E2ENet

E2ENET = "E2ENet (arXiv:2312.04727)"
OVERPRINTED = "E2ENet (arXiv:2312.04727), Table 5, where the row is overprinted: its last digits are not sure"
UMAMBA = "U-Mamba (arXiv:2401.04722) and its repository, neither of which gives a number"
MEDNEXT = "README of MIC-DKFZ/MedNeXt, multiply-adds on an input and with classes that it does not name"
RESENC = "nnU-Net Revisited (arXiv:2404.09556) and nnunetv2 2.8.1, neither of which gives a number"
UX_NET = "README of MASILab/3DUX-Net, FeTA 2021"
PLAIN_UNET = "dynamic-network-architectures, PlainConvUNet"
RESIDUAL_UNET = "dynamic-network-architectures, ResidualEncoderUNet"


@dataclass(frozen=True)
class Published:
    """A row of somebody's table: parameters in millions, FLOPs in billions, as printed; None where not seen."""

    setting: str
    params: float | None = None
    flops: float | None = None
    source: str = field(kw_only=True)


@dataclass(frozen=True)
class Baseline:
    """A network of the comparison; ``reason`` says why it is not runnable where ``build`` is None.

    ``is_found``: whether its architecture is the result of a search, and must be given.
    """

    name: str
    implementation: str
    published: tuple[Published, ...] = ()
    build: Callable[[Request], nn.Module] | None = None
    reason: str | None = None
    is_found: bool = False

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
    architecture: Architecture | None = None,
) -> nn.Module:
    """Builds a network of :data:`BASELINES` as a segmenter: all of them train and predict in the same loop.

    Its attribute ``deep_supervision`` decides whether forward gives a tuple of logits, finest first, or the
    finest alone. ``num_classes`` are the channels of the logits. ``config`` is that of the E2ENet under
    comparison; "nnunet", "nnunet_minus", "resenc_m" and "resenc_l" take their levels and strides from it, "e2enet_plus"
    all but its channels; the others have theirs from their papers. ``width`` multiplies the channels of the published
    networks; "e2enet", "e2enet_plus" and "vnet" allow only 1. ``architecture`` is what "dints" is built by, and
    no other takes one.

    Raises:
        SettingError: No such baseline, one that cannot be built, or a setting that it does not allow, or its weights
            do not fit into memory.

    >>> tiny = E2ENetConfig(channels=(8, 16), strides=((2, 2, 2),), heads=1)
    >>> net = build_model("nnunet", in_channels=1, num_classes=3, patch_size=(8, 8, 8), config=tiny)
    >>> sum(p.numel() for p in net.parameters())
    294592
    """
    build = check_name(name, architecture)
    asked = Request(
        in_channels=in_channels,
        num_classes=num_classes,
        patch_size=patch_size,
        config=config,
        width=width,
        architecture=architecture,
    )
    try:
        return build(asked)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        allowed, remedy = "one whose weights fit into memory", "Choose smaller kernels, or fewer channels."
        raise SettingError.of("size", "the network", allowed=allowed, given=error, remedy=remedy) from error


def check_name(name: str, architecture: Architecture | None = None) -> Callable[[Request], nn.Module]:
    """Returns what builds a network of :data:`BASELINES`, or refuses its name before anything is built.

    Raises:
        SettingError: No such baseline, one that cannot be built, or one that is built by an ``architecture`` without
            any, or another with one.
    """
    where, given, alike = "the network", repr(name), f"Similar: {similar(name, BASELINES)}."
    require(name in BASELINES, "name", where, allowed="the name of a baseline", given=given, remedy=alike)
    build = BASELINES[name].build
    if build is None:
        allowed = f"one of {', '.join(key for key, baseline in BASELINES.items() if baseline.build)}"
        remedy = f"Not runnable: {BASELINES[name].reason}"
        raise SettingError.of("name", where, allowed=allowed, given=given, remedy=remedy)
    if BASELINES[name].is_found != (architecture is not None):
        allowed = "the result of a search" if architecture is None else "none"
        found, remedy = "none" if architecture is None else "one", "Leave it out: it is for dints."
        remedy = REMEDY if architecture is None else remedy
        raise SettingError.of("architecture", name, allowed=allowed, given=found, remedy=remedy)
    return build


def _e2enet(request: Request) -> E2ENet:
    _refuse_width(request, "e2enet")
    return E2ENet(replace(request.config, in_channels=request.in_channels, num_classes=request.num_classes))


def _e2enet_plus(request: Request) -> E2ENet:
    """Builds the E2ENet(+) of Table 8: 58 channels for each 48, but no more than the widest level of the config has."""
    _refuse_width(request, "e2enet_plus")
    widest = max(request.config.channels)
    wider = tuple(min(round(width * 58 / 48), widest) for width in request.config.channels)
    return _e2enet(replace(request, config=replace(request.config, channels=wider)))


def _refuse_width(request: Request, name: str) -> None:
    given, remedy = request.width, "Leave --width out: the channels of its config say how wide it is."
    require(given == 1, "width", name, allowed="1", given=given, remedy=remedy)


_ROWS = (
    Baseline(
        "e2enet",
        "dstlib",
        (Published("AMOS", 23.90, 3069.55, source=E2ENET), Published("BraTS", 23.89, 3071.78, source=E2ENET)),
        build=_e2enet,
    ),
    Baseline("e2enet_plus", "dstlib", build=_e2enet_plus),
    Baseline(
        "nnunet",
        PLAIN_UNET,
        (
            Published("AMOS", 30.76, 1067.89, source=E2ENET),
            Published("BraTS", 31.20, 1076.62, source=E2ENET),
            Published("BTCV", 31.18, 416.73, source=E2ENET),
        ),
        build=nnunet,
    ),
    Baseline("nnunet_minus", PLAIN_UNET, (Published("AMOS", 12.96, 755.79, source=E2ENET),), build=nnunet_minus),
    Baseline(
        "unetr",
        "MONAI, UNETR",
        (
            Published("AMOS", 93.02, 391.03, source=E2ENET),
            Published("BTCV", 92.79, 164.91, source=E2ENET),
            Published("96³", 92.8, 82.6, source=UX_NET),
        ),
        build=unetr,
    ),
    Baseline(
        "swin_unetr",
        "MONAI, SwinUNETR",
        (Published("AMOS", 62.83, 1562.99, source=E2ENET), Published("96³", 62.2, 328.4, source=UX_NET)),
        build=swin_unetr,
    ),
    Baseline("vnet", "MONAI, VNet", (Published("AMOS", 45.65, 1737.57, source=E2ENET),), build=vnet),
    Baseline(
        "unet_plus_plus",
        "MONAI, BasicUNetPlusPlus",
        (Published("BraTS", 58.38, 3938.25, source=E2ENET),),
        build=unet_plus_plus,
    ),
    Baseline(
        "deeplabv3",
        "dstlib, on MONAI's ResNet-34",
        (Published("AMOS", 74.68, 1546.25, source=E2ENET),),
        build=deeplabv3,
    ),
    Baseline(
        "medformer",
        "dstlib",
        (Published("AMOS, 16 classes", 39.6, 2332.8, source=OVERPRINTED),),
        build=medformer,
    ),
    Baseline(
        "cotr",
        "dstlib",
        (Published("AMOS", 41.87, 1510.53, source=E2ENET), Published("BTCV", 41.87, 636.94, source=E2ENET)),
        build=cotr,
    ),
    Baseline(
        "nnformer",
        "dstlib",
        (
            Published("AMOS, 16 classes", 150.14, 1343.65, source=E2ENET),
            Published("96³", 149.3, 240.2, source=UX_NET),
        ),
        build=nnformer,
    ),
    Baseline("dints", "MONAI, DiNTS on TopologyInstance", build=dints, is_found=True),
    Baseline("dints_search", "MONAI, DiNTS on TopologySearch", build=dints_search),
    Baseline("umamba", "dstlib", (Published("AMOS", source=UMAMBA),), build=umamba),
    Baseline("resenc_m", RESIDUAL_UNET, (Published("AMOS", source=RESENC),), build=resenc_m),
    Baseline("resenc_l", RESIDUAL_UNET, (Published("192³", source=RESENC),), build=resenc_l),
    Baseline("mednext_s", "MONAI, MedNeXt", (Published("BTCV at 128³", 5.6, 130, source=MEDNEXT),), build=mednext_s),
    Baseline("mednext_b", "MONAI, MedNeXt", (Published("BTCV at 128³", 10.5, 170, source=MEDNEXT),), build=mednext_b),
)

BASELINES: Mapping[str, Baseline] = MappingProxyType({row.name: row for row in _ROWS})
"""Every network of the comparison by name, the runnable ones first."""

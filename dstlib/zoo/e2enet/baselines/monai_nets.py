"""The baselines that MONAI implements: UNETR, Swin UNETR, V-Net, UNet++ and MedNeXt.

MONAI is imported on demand: whoever only reads the table of baselines does not need it.
"""

from collections.abc import Sequence

from torch import Tensor

from dstlib.errors import require
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter, padded_size

HEAD_WIDTH = 64  # channels of one attention head of UNETR's ViT-Base


def unetr(request: Request) -> Segmenter:
    """Builds UNETR: a ViT-Base on patches of 16³ voxels, and a convolutional decoder.

    Its position embeddings fix the size of the input. A narrower one has fewer attention heads of the same 64
    channels.

    Reference: Hatamizadeh et al., *UNETR* (WACV 2022). On 128³ voxels it has 93,029,823 parameters for 15 classes; the
    93.02 M of E2ENet's table are of an older MONAI, which built other layers that it never called.
    """
    from monai.networks.nets import UNETR

    size, heads = padded_size(request.patch_size, (16, 16, 16)), request.channels(12)
    host = UNETR(
        in_channels=request.in_channels,
        out_channels=request.num_classes,
        img_size=size,
        feature_size=request.channels(16),
        hidden_size=HEAD_WIDTH * heads,
        mlp_dim=4 * HEAD_WIDTH * heads,
        num_heads=heads,
    )
    return Segmenter(host, in_channels=request.in_channels, multiple=(16, 16, 16), fixed_size=size)


def swin_unetr(request: Request) -> Segmenter:
    """Builds Swin UNETR with 48 features, windows of 7³; a narrower one has a multiple of 12.

    Reference: Hatamizadeh et al., *Swin UNETR* (BrainLes 2021). It has 62,187,345 parameters for 15 classes; the 62.83
    million of E2ENet's table are of an older MONAI, which built 638,208 more and never used them.
    """
    from monai.networks.nets import SwinUNETR

    width = 12 * request.channels(4)
    host = SwinUNETR(in_channels=request.in_channels, out_channels=request.num_classes, feature_size=width)
    return Segmenter(host, in_channels=request.in_channels, multiple=(32, 32, 32))


def vnet(request: Request) -> Segmenter:
    """Builds V-Net, in the one width that MONAI has: 16 channels at the finest level, 256 at the coarsest.

    Raises:
        SettingError: Another width, or a number of input channels that does not divide 16.

    Reference: Milletari et al., *V-Net* (3DV 2016). It has the 45.65 M parameters of E2ENet's table.
    """
    from monai.networks.nets import VNet

    given, remedy = request.width, "MONAI builds V-Net in one width: leave --width out."
    require(given == 1, "width", "vnet", allowed="1", given=given, remedy=remedy)
    given, remedy = (
        request.in_channels,
        "V-Net adds the image to its 16 first features, so many times over: choose another --model.",
    )
    require(16 % request.in_channels == 0, "in_channels", "vnet", allowed="a divisor of 16", given=given, remedy=remedy)
    host = VNet(in_channels=request.in_channels, out_channels=request.num_classes)
    return Segmenter(host, in_channels=request.in_channels, multiple=(16, 16, 16))


def unet_plus_plus(request: Request) -> Segmenter:
    """Builds UNet++ with the five levels and the widths of its paper: 32, 64, 128, 256, 512.

    All its heads have full resolution; the one that has seen the whole nest comes first.

    Reference: Zhou et al., *UNet++* (DLMIA 2018). MONAI halves the channels in the upsampling of all levels but
    the finest, so this is no larger than the 2D one. E2ENet's table has 58.38 M, from a network that it does not
    describe.
    """
    from monai.networks.nets import BasicUNetPlusPlus

    widths = [request.channels(32 * 2**level) for level in range(5)]
    host = BasicUNetPlusPlus(
        spatial_dims=3,
        in_channels=request.in_channels,
        out_channels=request.num_classes,
        features=(*widths, widths[0]),
        deep_supervision=True,
    )
    return Segmenter(host, in_channels=request.in_channels, multiple=(16, 16, 16), read=_last_first)


def _last_first(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(outputs[::-1])


def mednext_s(request: Request) -> Segmenter:
    """Builds MedNeXt-S with kernels of 3³: 32 channels, two blocks per level, widened twofold inside.

    Reference: Roy et al., *MedNeXt* (MICCAI 2023).
    """
    return _mednext(request, encoder=(2, 2, 2, 2), bottleneck=2)


def mednext_b(request: Request) -> Segmenter:
    """Builds MedNeXt-B with kernels of 3³: as S, but widened 2, 3, 4 and 4 times from level to level.

    Its authors' program widens a block that halves the resolution as the level below it, MONAI as the level above:
    15,456 parameters fewer here.

    Reference: Roy et al., *MedNeXt* (MICCAI 2023).
    """
    return _mednext(request, encoder=(2, 3, 4, 4), bottleneck=4)


def _mednext(request: Request, *, encoder: tuple[int, ...], bottleneck: int) -> Segmenter:
    """Builds a MedNeXt of two blocks per level, with a head at each level, the coarsest too."""
    from monai.networks.nets.mednext import MedNeXt

    host = MedNeXt(
        init_filters=request.channels(32),
        in_channels=request.in_channels,
        out_channels=request.num_classes,
        encoder_expansion_ratio=encoder,
        decoder_expansion_ratio=encoder[::-1],
        bottleneck_expansion_ratio=bottleneck,
        kernel_size=3,
        deep_supervision=True,
        use_residual_connection=True,
    )
    return Segmenter(host, in_channels=request.in_channels, multiple=(16, 16, 16), read=_trained_or_not)


def _trained_or_not(output: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Reads the heads of a MedNeXt, which returns all in training, the finest alone in evaluation."""
    return (output,) if isinstance(output, Tensor) else tuple(output)

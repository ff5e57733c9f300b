"""nnU-Net's networks, plain and with a residual encoder, from the package of their authors."""

from collections.abc import Sequence
from math import prod

from torch import nn

from dstlib.axes import Triple
from dstlib.errors import require
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter, padded_size

FEATURES, MOST_FEATURES = 32, 320  # of the finest level, doubling down to at most this many
FEATURES_MINUS = 27
RESIDUAL_BLOCKS = (1, 3, 4, 6)  # of the encoder, level by level; of all further levels 6
# What the feature maps of a patch may hold, in elements: budgets of 8 and 24 GB of GPU memory, for a batch of two.
MEDIUM, LARGE = 680_000_000, 2_100_000_000


def nnunet(request: Request) -> Segmenter:
    """Builds the plain convolutional U-Net of nnU-Net, with a head at each level but the coarsest.

    Levels and strides are the config's. The widths are nnU-Net's own (32, 64, 128, ... up to 320) whatever
    those of the config: that is what nnU-Net would plan, and a narrower one would be no baseline. All kernels
    are 3×3×3, also where a stride leaves out an axis; nnU-Net's planner may flatten those.

    Reference: Isensee et al., *nnU-Net* (Nature Methods 2021). Transposed convolutions and heads have no bias,
    as in its first version: only so do E2ENet's published counts of it come out (31,198,176 parameters and
    1,076,618 M FLOPs by the paper's convention, for BraTS). Its current version gives them one.
    """
    return _plain_unet(request, features=FEATURES, strides=request.config.strides)


def nnunet_minus(request: Request) -> Segmenter:
    """Builds the nnU-Net(-) of E2ENet's paper: 27 features at the finest level, and one level fewer than the config's.

    Raises:
        SettingError: The config has no level to spare.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Table 8: nnU-Net made as cheap as E2ENet.
    """
    strides, remedy = request.config.strides, "Choose a preset with more levels, or --model nnunet."
    where, given = "the config of nnunet_minus", len(strides) + 1
    require(len(strides) > 1, "number of channels", where, allowed="3 levels or more", given=given, remedy=remedy)
    return _plain_unet(request, features=FEATURES_MINUS, strides=strides[:-1])


def resenc_m(request: Request) -> Segmenter:
    """Builds the U-Net with a residual encoder of nnU-Net's preset M, for patches that it would plan: up to 128³.

    One convolution per level of the decoder, a head at each level but the coarsest; levels, strides and widths are as
    in "nnunet". M and L are one network: what the presets differ in is the GPU memory that they plan for, so the patch.

    Raises:
        SettingError: The feature maps of the patch are more than the preset plans for.

    Reference: Isensee et al., *nnU-Net Revisited* (MICCAI 2024); nnunetv2 2.8.1, ResEncUNetPlanner.
    """
    return _residual_unet(request, "resenc_m", MEDIUM, "Choose a smaller --patch-size, or --model resenc_l.")


def resenc_l(request: Request) -> Segmenter:
    """Builds the same U-Net as "resenc_m", for patches that nnU-Net's preset L would plan: up to 192³.

    Raises:
        SettingError: The feature maps of the patch are more than the preset plans for.
    """
    return _residual_unet(request, "resenc_l", LARGE, "Choose a smaller --patch-size.")


def _residual_unet(request: Request, name: str, most: int, remedy: str) -> Segmenter:
    """Builds the U-Net with a residual encoder whose feature maps of a patch have so many elements at most."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    strides = request.config.strides
    levels = len(strides) + 1
    host = ResidualEncoderUNet(
        input_channels=request.in_channels,
        n_stages=levels,
        features_per_stage=[request.channels(min(FEATURES * 2**level, MOST_FEATURES)) for level in range(levels)],
        conv_op=nn.Conv3d,
        kernel_sizes=[(3, 3, 3)] * levels,
        strides=[(1, 1, 1), *strides],
        n_blocks_per_stage=[RESIDUAL_BLOCKS[min(level, len(RESIDUAL_BLOCKS) - 1)] for level in range(levels)],
        num_classes=request.num_classes,
        n_conv_per_stage_decoder=[1] * (levels - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    depth, height, width = (prod(steps) for steps in zip(*strides, strict=True))
    size = padded_size(request.patch_size, (depth, height, width))
    num = int(host.compute_conv_feature_map_size(size))
    given, allowed = f"{num:,} for {'×'.join(map(str, size))}", f"at most {most:,} elements of feature maps"
    require(num <= most, "patch_size", name, allowed=allowed, given=given, remedy=remedy)
    host.apply(host.initialize)
    return Segmenter(host, in_channels=request.in_channels, multiple=(depth, height, width), read=tuple)


def _plain_unet(request: Request, *, features: int, strides: Sequence[Triple]) -> Segmenter:
    """Builds one level more than there are strides, of ``features`` doubling from level to level."""
    # on demand: whoever only reads the table of baselines does not need the package
    from dynamic_network_architectures.architectures.unet import PlainConvUNet  # type: ignore[import-untyped]

    levels = len(strides) + 1
    host = PlainConvUNet(
        input_channels=request.in_channels,
        n_stages=levels,
        features_per_stage=[request.channels(min(features * 2**level, MOST_FEATURES)) for level in range(levels)],
        conv_op=nn.Conv3d,
        kernel_sizes=[(3, 3, 3)] * levels,
        strides=[(1, 1, 1), *strides],
        n_conv_per_stage=[2] * levels,
        num_classes=request.num_classes,
        n_conv_per_stage_decoder=[2] * (levels - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"negative_slope": 0.01, "inplace": True},
        deep_supervision=True,
    )
    for layer in (*host.decoder.transpconvs, *host.decoder.seg_layers):
        layer.register_parameter("bias", None)
    host.apply(host.initialize)
    depth, height, width = (prod(steps) for steps in zip(*strides, strict=True))
    return Segmenter(host, in_channels=request.in_channels, multiple=(depth, height, width), read=tuple, pad=False)

"""nnU-Net's network, from the package of its authors."""

from collections.abc import Sequence
from math import prod

from torch import nn

from dstlib.axes import Triple
from dstlib.errors import require
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

FEATURES, MOST_FEATURES = 32, 320  # of the finest level, doubling down to at most this many
FEATURES_MINUS = 27


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

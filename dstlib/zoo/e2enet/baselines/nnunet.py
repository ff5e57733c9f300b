"""nnU-Net's network, from the package of its authors."""

from torch import nn

from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

FEATURES, MOST_FEATURES = 32, 320  # of the finest level, doubling down to at most this many


def nnunet(request: Request) -> Segmenter:
    """Builds the plain convolutional U-Net of nnU-Net, with a head at each level but the coarsest.

    Levels and strides are the config's. The widths are nnU-Net's own (32, 64, 128, ... up to 320) whatever
    those of the config: that is what nnU-Net would plan, and a narrower one would be no baseline. All kernels
    are 3×3×3, also where a stride leaves out an axis; nnU-Net's planner may flatten those.

    Reference: Isensee et al., *nnU-Net* (Nature Methods 2021). Transposed convolutions and heads have no bias,
    as in its first version: only so do E2ENet's published counts of it come out (31,205,184 parameters and
    1,067,889 M FLOPs by the paper's convention, for AMOS). Its current version gives them one.
    """
    # on demand: whoever only reads the table of baselines does not need the package
    from dynamic_network_architectures.architectures.unet import PlainConvUNet  # type: ignore[import-untyped]

    strides = [(1, 1, 1), *request.config.strides]
    levels = len(strides)
    host = PlainConvUNet(
        input_channels=request.in_channels,
        n_stages=levels,
        features_per_stage=[request.channels(min(FEATURES * 2**level, MOST_FEATURES)) for level in range(levels)],
        conv_op=nn.Conv3d,
        kernel_sizes=[(3, 3, 3)] * levels,
        strides=strides,
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
    return Segmenter(host, in_channels=request.in_channels, multiple=request.config.divisor, read=tuple, pad=False)

"""DeepLabv3 in 3D: a dilated ResNet, atrous spatial pyramid pooling, and a classifier.

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dstlib.errors import DataError
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

RATES = (6, 12, 18)  # of the atrous convolutions; the paper's for features of stride 16


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: 1×1×1, three atrous 3×3×3, and the mean of the image, joined by a 1×1×1.

    Shapes: (B, in_channels, D, H, W) → (B, out_channels, D, H, W).

    Raises:
        DataError: A batch of one in training: the norm of the image's mean needs two.

    Reference: Chen et al., *Rethinking Atrous Convolution* (arXiv:1706.05587), section 3.3, one axis more. No
    dropout.

    >>> Pyramid(4, 2).eval()(torch.rand(1, 4, 3, 4, 3)).shape
    torch.Size([1, 2, 3, 4, 3])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_unit(in_channels, out_channels, rate=rate) for rate in (None, *RATES))
        self.image = _unit(in_channels, out_channels)
        self.join = _unit((len(self.branches) + 1) * out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            remedy = "DeepLabv3 normalises over the batch: train it with two or more (--batch-size 2)."
            raise DataError.of("batch", "DeepLabv3", allowed="at least 2 in training", given=1, remedy=remedy)
        image = self.image(x.mean(dim=(2, 3, 4), keepdim=True)).expand(-1, -1, *x.shape[2:])
        joined: Tensor = self.join(torch.cat([*(branch(x) for branch in self.branches), image], dim=1))
        return joined


class DeepLabV3(nn.Module):
    """The features of ``trunk`` through a :class:`Pyramid` and a classifier, then upsampled to the image.

    Shapes: (B, C, D, H, W) → (B, K, D, H, W), trilinear from the resolution of the trunk.
    """

    def __init__(self, trunk: nn.Module, *, features: int, pyramid: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.pyramid = Pyramid(features, pyramid)
        self.classifier = nn.Conv3d(pyramid, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(self.pyramid(self.trunk(x)))
        return functional.interpolate(logits, x.shape[2:], mode="trilinear", align_corners=False)


def deeplabv3(request: Request) -> Segmenter:
    """Builds DeepLabv3 on MONAI's 3D ResNet-34, output stride 16.

    Reference: Chen et al. (arXiv:1706.05587), where the trunk is a 2D ResNet-50 or -101 with a multi-grid last
    stage. Of the 3D ResNets it is the 34, without the 3×3 convolution of later heads, that has the 74.68 M
    parameters of E2ENet's table (with the 50 it is 90.0 M); one rate 2 throughout the last stage.
    """
    from monai.networks.nets import ResNet  # on demand

    planes = [request.channels(number) for number in (64, 128, 256, 512)]
    resnet = ResNet(
        block="basic",
        layers=[3, 4, 6, 3],
        block_inplanes=planes,
        n_input_channels=request.in_channels,
        conv1_t_stride=2,
        feed_forward=False,
    )
    pyramid = request.channels(256)
    host = DeepLabV3(_trunk(resnet), features=planes[-1], pyramid=pyramid, num_classes=request.num_classes)
    return Segmenter(host, in_channels=request.in_channels, multiple=(16, 16, 16))


def _trunk(resnet: Any) -> nn.Sequential:
    """Returns the convolutional part of MONAI's ResNet, the last stage dilated where it had a stride."""
    for module in resnet.layer4.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = (1, 1, 1)
            if module.kernel_size == (3, 3, 3):
                module.dilation = module.padding = (2, 2, 2)
    stem = (resnet.conv1, resnet.bn1, resnet.act, resnet.maxpool)
    return nn.Sequential(*stem, resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)


def _unit(in_channels: int, out_channels: int, *, rate: int | None = None) -> nn.Sequential:
    """Makes a convolution, 1×1×1 or 3×3×3 at a rate, with batch norm and ReLU."""
    kernel, padding = (1, 0) if rate is None else (3, rate)
    conv = nn.Conv3d(in_channels, out_channels, kernel, padding=padding, dilation=rate or 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True))

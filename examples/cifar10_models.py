"""Networks for examples/cifar10.py: images (B, 3, 32, 32) to logits (B, classes)."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from dstlib.errors import SettingError

SMALL = ((24, 2), (48, 2), (48, 1), (96, 2), (128, 2))  # channels and stride of each convolution


def small(num_classes: int) -> nn.Module:
    """Builds five convolutions and a classifier: 186 thousand parameters, 3.3 million multiply-adds."""
    layers: list[nn.Module] = []
    width = 3
    for channels, stride in SMALL:
        conv = nn.Conv2d(width, channels, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice, beside the identity, or a 1×1 convolution where the width changes."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(width, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = width != channels
        self.shortcut = nn.Conv2d(width, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        beside = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.norm2(self.conv1(y)).relu()) + beside


class WideResNet(nn.Module):
    """WRN-``depth``-``widen``: three groups of (depth - 4) / 6 blocks of 16, 32 and 64 times ``widen`` channels.

    Reference: Zagoruyko & Komodakis 2016, Wide residual networks, BMVC, table 1; without dropout.
    """

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks, width = [], 16
        for channels, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for number in range((depth - 4) // 6):
                blocks.append(WideBlock(width, channels, stride if number == 0 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).relu().mean((2, 3)))


def vit(num_classes: int) -> nn.Module:
    """Builds timm's vision transformer, 4 blocks of width 128 over 8×8 patches of 4×4 pixels.

    Raises:
        SettingError: timm is not installed, or does not load.
    """
    try:
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that is not of this torch
        remedy = "pip install 'dstlib[timm]', with the torchvision of your torch; or take another --model."
        raise SettingError.of(
            "--model vit", "the run", allowed="timm installed and loading", given=error, remedy=remedy
        ) from error
    return VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=num_classes)


MODELS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "small": small,
        "wrn-16-1": lambda num_classes: WideResNet(16, 1, num_classes),
        "wrn-22-2": lambda num_classes: WideResNet(22, 2, num_classes),
        "vit": vit,
    }
)

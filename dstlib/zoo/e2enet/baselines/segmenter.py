"""Segmenters: what is asked of a baseline, and the adapter that lets any host network answer as a segmenter does.

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from dstlib.axes import Triple
from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.baselines.architecture import Architecture
from dstlib.zoo.e2enet.config import E2ENetConfig, are_counts, is_triple


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a baseline.

    - ``patch_size``: the (D, H, W) that it trains on and predicts.
    - ``config``: of the E2ENet it stands beside; levels and strides are taken from it where the network has any.
    - ``width``: multiplies the channels, where the implementation allows it.
    - ``architecture``: of a network whose architecture is itself the result of a search.

    Raises:
        SettingError: A setting is out of range.
    """

    in_channels: int
    num_classes: int
    patch_size: Triple
    config: E2ENetConfig
    width: float = 1.0
    architecture: Architecture | None = None

    def __post_init__(self) -> None:
        check_width(self.width)
        is_config, count = isinstance(self.config, E2ENetConfig), "a whole number from 1 up"
        extents = "Give the depth, height and width that the network trains on."
        levels = "Its levels and strides are those of the network it is compared with."
        checks = (
            ("in_channels", are_counts([self.in_channels]), count, "Count the modalities of an image."),
            ("num_classes", are_counts([self.num_classes]), count, "Count the channels of the logits."),
            ("patch_size", is_triple(self.patch_size), "three whole numbers from 1 up", extents),
            ("config", is_config, "an E2ENetConfig", levels),
        )
        for name, holds, allowed, remedy in checks:
            require(holds, name, "the network", allowed=allowed, given=getattr(self, name), remedy=remedy)

    def channels(self, number: int) -> int:
        """Scales a number of channels of the published network by the width; at least 1 is left."""
        return max(1, round(number * self.width))


def check_width(width: float) -> None:
    """Refuses a factor of channels that is none.

    Raises:
        SettingError: It is none.
    """
    remedy = "1 (--width 1) is the published network, 0.5 has half its channels."
    is_width = isinstance(width, int | float) and 0 < width < math.inf
    require(is_width, "width", "the network", allowed="a number above 0", given=width, remedy=remedy)


def padded_size(size: Sequence[int], multiple: Triple) -> Triple:
    """Rounds each extent up to its multiple."""
    depth, height, width = (extent + -extent % step for extent, step in zip(size, multiple, strict=True))
    return depth, height, width


def one_head(output: Tensor) -> tuple[Tensor, ...]:
    """Reads the logits of a host that returns nothing but them."""
    return (output,)


class Segmenter(nn.Module):
    """A host network under the manners of the zoo: it trains, predicts and is made sparse as an E2ENet is.

    ``read`` turns what the host returns into logits, the finest and best first; heads that are not asked for
    are computed all the same, as in published counts. Where a size is no ``multiple``, zeros are added behind
    it, and the logits are cut back, those of a lower resolution to their share of the size, rounded up; with
    ``pad`` False it is refused. ``fixed_size``: the only size that the host takes, padding included.

    Shapes: (B, in_channels, D, H, W) → with ``deep_supervision`` a tuple of logits (B, K, D, H, W), or lower
    resolutions of it; without, the first of them alone.

    Raises:
        DataError: The input does not fit the host.

    >>> import torch
    >>> net = Segmenter(nn.Conv3d(1, 3, 1), in_channels=1, multiple=(2, 2, 2))
    >>> [tuple(logits.shape) for logits in net(torch.rand(1, 1, 4, 5, 4))]
    [(1, 3, 4, 5, 4)]
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        in_channels: int,
        multiple: Triple,
        read: Callable[[Any], tuple[Tensor, ...]] = one_head,
        pad: bool = True,
        fixed_size: Triple | None = None,
    ) -> None:
        super().__init__()
        self.host = host
        self.in_channels = in_channels
        self.multiple = multiple
        self.read = read
        self.pad = pad
        self.fixed_size = fixed_size
        self.deep_supervision = True

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        where = f"input of {type(self.host).__name__}"
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            allowed, remedy = f"(B, {self.in_channels}, D, H, W)", "The network was built for this number of channels."
            raise DataError.of("shape", where, allowed=allowed, given=tuple(x.shape), remedy=remedy)
        depth, height, width = size = tuple(x.shape[2:])
        padded = padded_size(size, self.multiple)
        if refusal := self._refusal(size, padded):
            allowed, remedy = refusal
            raise DataError.of("size", where, allowed=allowed, given=size, remedy=remedy)
        if padded == size:
            logits = self.read(self.host(x))
        else:
            x = functional.pad(x, (0, padded[2] - width, 0, padded[1] - height, 0, padded[0] - depth))
            logits = tuple(_cut(y, size, padded) for y in self.read(self.host(x)))
        return logits if self.deep_supervision else logits[0]

    def _refusal(self, size: Sequence[int], padded: Triple) -> tuple[str, str] | None:
        """Says what size the host takes and what to do, if it does not take this one."""
        if self.fixed_size is not None and padded != self.fixed_size:
            return f"a size that pads to {self.fixed_size}", "Build the network for another size (--patch-size)."
        if padded != size and not self.pad:
            return f"D, H, W in multiples of {self.multiple}", "Choose another size (--patch-size), or other strides."
        # a single voxel at the coarsest level would have no variance to normalise by
        smallest = f"more than {self.multiple} along an axis"
        return (smallest, "Choose a larger size (--patch-size).") if padded == self.multiple else None


def _cut(logits: Tensor, size: Sequence[int], padded: Triple) -> Tensor:
    """Cuts logits of a padded input back to the part of them that belongs to its size before, rounded up."""
    depth, height, width = (
        -(-n * part // whole) for n, part, whole in zip(size, logits.shape[2:], padded, strict=True)
    )
    return logits[..., :depth, :height, :width]

"""nnFormer: attention in windows between convolutions, and attention in place of skip connections.

Written from the paper: Zhou et al., *nnFormer: Volumetric Medical Image Segmentation via a 3D Transformer* (IEEE TIP
2023, arXiv:2109.03201).

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels. Between the layers the channels are the
last axis, as attention and its norms take them.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from dstlib.axes import Triple
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

HEAD_WIDTH = 32  # channels of one attention head
HEADS, WINDOWS, DEPTH = (6, 12, 24, 48), (4, 4, 8, 4), 2  # per level, the finest first; blocks per level
PATCH: Triple = (2, 4, 4)  # voxels of the image per voxel of the finest level
DROP_PATH = 0.2  # probability to leave out the last branch; it grows from 0 along encoder and decoder


def nnformer(request: Request) -> Segmenter:
    """Builds nnFormer in its configuration for Synapse: 192 channels on patches of 2×4×4, windows of 4, 4, 8 and 4.

    A narrower one has as many heads, each with fewer channels. There are three heads: the image's resolution, and
    strides 2 and 4. Any size is taken: windows are no longer than the volume along any axis, and what is added to
    fill the last ones is not attended to.

    Reference: Zhou et al. (arXiv:2109.03201). It has the 150.14 M parameters of E2ENet's table.
    """
    host = NNFormer(request.in_channels, request.num_classes, head_width=request.channels(HEAD_WIDTH))
    return Segmenter(host, in_channels=request.in_channels, multiple=PATCH, read=tuple)


class NNFormer(nn.Module):
    """Logits at three resolutions, the finest first.

    Shapes: (B, C, D, H, W) → (B, K, D, H, W), (B, K, D / 2, H / 2, W / 2), (B, K, D / 4, H / 4, W / 4), rounded up;
    D even, H and W multiples of 4.

    >>> [tuple(logits.shape[2:]) for logits in NNFormer(1, 3, head_width=1)(torch.rand(1, 1, 6, 12, 32))]
    [(6, 12, 32), (3, 6, 16), (2, 3, 8)]
    """

    def __init__(self, in_channels: int, num_classes: int, *, head_width: int) -> None:
        super().__init__()
        widths = [head_width * heads for heads in HEADS]
        levels = range(len(HEADS))
        self.embedding = Embedding(in_channels, widths[0])
        rates = _rates(len(levels))
        self.encoder = nn.ModuleList(
            Level(widths[i], heads=HEADS[i], window=WINDOWS[i], rates=rates[i], is_decoder=False) for i in levels
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.downs = nn.ModuleList(Down(width) for width in widths[:-1])
        self.ups = nn.ModuleList(Up(width) for width in widths[1:])
        rates = _rates(len(levels) - 1)[::-1]
        self.decoder = nn.ModuleList(
            Level(widths[i], heads=HEADS[i], window=WINDOWS[i], rates=rates[i], is_decoder=True) for i in levels[:-1]
        )
        self.heads = nn.ModuleList(nn.ConvTranspose3d(width, num_classes, PATCH, stride=PATCH) for width in widths[:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size, skips = x.shape[2:], []
        x = self.embedding(x)
        for i, (level, norm) in enumerate(zip(self.encoder, self.norms, strict=True)):
            x = level(x if i == 0 else self.downs[i - 1](x))
            skips.append(norm(x))
        x, logits = skips.pop(), []
        for i in reversed(range(len(skips))):
            up = _cut(self.ups[i](x), skips[i].shape[1:4])
            x = self.decoder[i](up, skips[i])
            full = rearrange(self.heads[i](rearrange(x, "b d h w c -> b c d h w")), "b k d h w -> b d h w k")
            # a level of odd size was rounded up
            logits.append(rearrange(_cut(full, [-(-extent // 2**i) for extent in size]), "b d h w k -> b k d h w"))
        return tuple(reversed(logits))


class Embedding(nn.Module):
    """Four convolutions with GELU and layer norm between them, two of which have the strides of a patch.

    Shapes: (B, C, D, H, W) → (B, D / 2, H / 4, W / 4, width).
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.convs = nn.ModuleList(
            [
                nn.Conv3d(in_channels, half, 3, stride=(2, 2, 2), padding=1),
                nn.Conv3d(half, half, 3, padding=1),
                nn.Conv3d(half, width, 3, stride=(1, 2, 2), padding=1),
                nn.Conv3d(width, width, 3, padding=1),
            ]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in (half, half, width, width))

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            x = norm(rearrange(x if i == last else functional.gelu(x), "b c d h w -> b d h w c"))
            x = x if i == last else rearrange(x, "b d h w c -> b c d h w")
        return x


class Down(nn.Module):
    """Halves the resolution, rounded up, and doubles the channels: (B, D, H, W, C) → (B, D / 2, H / 2, W / 2, 2 C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv3d(channels, 2 * channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(functional.gelu(x))
        return rearrange(self.conv(rearrange(x, "b d h w c -> b c d h w")), "b c d h w -> b d h w c")


class Up(nn.Module):
    """Doubles the resolution and halves the channels: (B, D, H, W, C) → (B, 2 D, 2 H, 2 W, C / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.ConvTranspose3d(channels, channels // 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(rearrange(self.norm(x), "b d h w c -> b c d h w")), "b c d h w -> b d h w c")


class Level(nn.Module):
    """The blocks of one level, the windows of every second one shifted by half of themselves.

    In the decoder the first block attends from what comes from below to the skip connection.

    Shapes: (B, D, H, W, C), and there the same of the skip connection → (B, D, H, W, C).
    """

    def __init__(self, channels: int, *, heads: int, window: int, rates: Sequence[float], is_decoder: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                channels,
                heads=heads,
                window=window,
                rate=rate,
                is_shifted=number % 2 == 1,
                has_queries=not (is_decoder and number == 0),
            )
            for number, rate in enumerate(rates)
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, skip if number == 0 else None)
        return x


class Block(nn.Module):
    """Attention in windows, then a feed-forward network, each after a norm and with a residual connection around it.

    Shapes: (B, D, H, W, C) → (B, D, H, W, C). With a skip connection of the same shape, x and the skip connection are
    added up, and x attends to it; without, x attends to itself.
    """

    def __init__(
        self, channels: int, *, heads: int, window: int, rate: float, is_shifted: bool, has_queries: bool
    ) -> None:
        super().__init__()
        self.attention = WindowAttention(
            channels, heads=heads, window=window, is_shifted=is_shifted, has_queries=has_queries
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        first, second = self.norms
        y = first(x)
        attended = self.attention(y, y if skip is None else first(skip))
        x = (x if skip is None else x + skip) + self.drop_path(attended)
        x = x + self.drop_path(self.feed_forward(second(x)))
        return x


class WindowAttention(nn.Module):
    """Attention of each voxel to those of its window, with a bias for each place of one relative to the other.

    Windows are no longer than the volume. Where it is longer than they are, they are shifted by half of themselves,
    if they are to be, and what comes in from its other end is not attended to; nor are voxels that fill up the last
    windows. ``has_queries`` False: queries are taken as they come, without a layer of their own.

    Shapes: x and source (B, D, H, W, C) → (B, D, H, W, C); queries are of x, keys and values of the source.

    Reference: Liu et al., *Swin Transformer* (arXiv:2103.14030), sections 3.2 and 3.3, one axis more.

    >>> attention = WindowAttention(8, heads=2, window=4, is_shifted=True, has_queries=True)
    >>> x = torch.rand(1, 3, 4, 7, 8)
    >>> attention(x, x).shape
    torch.Size([1, 3, 4, 7, 8])
    """

    def __init__(self, channels: int, *, heads: int, window: int, is_shifted: bool, has_queries: bool) -> None:
        super().__init__()
        self.num_heads = heads
        self.window = window
        self.is_shifted = is_shifted
        self.has_queries = has_queries
        self.inputs = nn.Linear(channels, (3 if has_queries else 2) * channels)
        self.output = nn.Linear(channels, channels)
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 3, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        size = x.shape[1:4]
        window = [min(self.window, extent) for extent in size]
        shift = [w // 2 if self.is_shifted and w < extent else 0 for w, extent in zip(window, size, strict=True)]
        if self.has_queries:
            query, key, value = self._windows(self.inputs(x), window, shift, 3)
        else:
            (query,) = self._windows(x, window, shift, 1)
            key, value = self._windows(self.inputs(source), window, shift, 2)
        bias = self._bias(window)
        if any(shift) or any(extent % w for extent, w in zip(size, window, strict=True)):
            bias = bias.masked_fill(~_belongs(size, window, shift, x.device)[:, None], float("-inf"))
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.output(_joined(attended, size, window, shift))

    def _windows(self, x: Tensor, window: Sequence[int], shift: Sequence[int], parts: int) -> Tensor:
        """Cuts a volume (B, D, H, W, parts · C) into windows (parts, B, windows, heads, voxels, C / heads)."""
        x = functional.pad(x, (0, 0, *_behind(x.shape[1:4], window)))
        if any(shift):
            x = x.roll([-step for step in shift], dims=(1, 2, 3))
        d, h, w = window
        pattern = "b (nd d) (nh h) (nw w) (parts heads c) -> parts b (nd nh nw) heads (d h w) c"
        return rearrange(x, pattern, d=d, h=h, w=w, parts=parts, heads=self.num_heads)

    def _bias(self, window: Sequence[int]) -> Tensor:
        """Returns the bias of each voxel of a window towards each: (heads, voxels, voxels)."""
        number = torch.zeros(1, 1, dtype=torch.long, device=self.bias_table.device)
        for place in _places(window, self.bias_table.device):
            number = number * (2 * self.window - 1) + (place[:, None] - place + self.window - 1)
        return self.bias_table[number].permute(2, 0, 1)


class DropPath(nn.Module):
    """Leaves out a branch for some images of a batch in training, and scales it up for the others.

    Reference: Huang et al., *Deep Networks with Stochastic Depth* (arXiv:1603.09382).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = 1 - self.rate
        return x * (x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(kept) / kept)


def _rates(levels: int) -> list[list[float]]:
    """Returns the rates at which branches are left out, per level and block, in the order in which they run."""
    last = levels * DEPTH - 1
    return [[DROP_PATH * (level * DEPTH + block) / last for block in range(DEPTH)] for level in range(levels)]


def _cut(x: Tensor, size: Sequence[int]) -> Tensor:
    depth, height, width = size
    return x[:, :depth, :height, :width]


def _behind(size: Sequence[int], window: Sequence[int]) -> list[int]:
    """Returns what to pad so that windows fit, as ``torch.nn.functional.pad`` takes it."""
    return [n for extent, w in zip(reversed(size), reversed(window), strict=True) for n in (0, -extent % w)]


def _joined(windows: Tensor, size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Puts windows (B, windows, heads, voxels, c) back into their volume: (B, D, H, W, heads · c)."""
    (nd, nh, _), (d, h, w) = (-(-extent // w) for extent, w in zip(size, window, strict=True)), window
    pattern = "b (nd nh nw) heads (d h w) c -> b (nd d) (nh h) (nw w) (heads c)"
    x = rearrange(windows, pattern, nd=nd, nh=nh, d=d, h=h, w=w)
    return _cut(x.roll(list(shift), dims=(1, 2, 3)) if any(shift) else x, size)


def _places(window: Sequence[int], device: torch.device) -> list[Tensor]:
    """Returns the index of each voxel of a window along each axis, three of (voxels,)."""
    axes = torch.meshgrid(*[torch.arange(w, device=device) for w in window], indexing="ij")
    return [axis.flatten() for axis in axes]


def _belongs(size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Returns which voxels of a window were neighbours before the shift, and none of them padding, or both.

    Shapes: → (windows, voxels, voxels).
    """
    kinds = []
    for extent, w, step in zip(size, window, shift, strict=True):
        place = torch.arange(extent + -extent % w, device=device)
        place = place.roll(-step)
        # what has come from the front is behind the rest now: another kind, as padding is
        kinds.append((place < step).long() + 2 * (place >= extent))
    d, h, w = window
    kind = kinds[0][:, None, None] * 16 + kinds[1][:, None] * 4 + kinds[2]
    kind = rearrange(kind, "(nd d) (nh h) (nw w) -> (nd nh nw) (d h w)", d=d, h=h, w=w)
    return kind[:, :, None] == kind[:, None, :]

"""CoTr: a convolutional encoder, a deformable transformer over its two coarsest scales, a convolutional decoder.

Written from the paper: Xie et al., *CoTr: Efficiently Bridging CNN and Transformer for 3D Medical Image Segmentation*
(MICCAI 2021, arXiv:2103.03024).

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels, N voxels of all scales in a row.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from dstlib.axes import Triple
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

STEM = 64  # channels of the first convolution; the stages have 3, 6 and 6 times as many
HEADS, POINTS, LAYERS = 6, 4, 6  # of the transformer
DROPOUT = 0.1
TEMPERATURE = 10_000  # of the sines, from the fastest to the slowest


def cotr(request: Request) -> Segmenter:
    """Builds CoTr as published: 384 channels in 6 deformable layers of 6 heads, feed-forward 1536.

    A narrower one has as many heads, each with fewer channels. Its position embeddings are sines over the patch, so
    it takes any size. There are four heads: the image's resolution, and strides (1, 2, 2), (2, 4, 4), (4, 8, 8).

    Reference: Xie et al. (arXiv:2103.03024). It has the 41.87 M parameters of E2ENet's table.
    """
    host = CoTr(request.in_channels, request.num_classes, stem=request.channels(STEM))
    return Segmenter(host, in_channels=request.in_channels, multiple=(8, 16, 16), read=tuple)


class CoTr(nn.Module):
    """Logits at four resolutions, the finest first.

    Shapes: (B, C, D, H, W) → (B, K, D, H, W), (B, K, D, H / 2, W / 2), (B, K, D / 2, H / 4, W / 4),
    (B, K, D / 4, H / 8, W / 8); D a multiple of 8, H and W of 16.

    >>> [tuple(logits.shape[2:]) for logits in CoTr(1, 3, stem=2)(torch.rand(1, 1, 16, 16, 32))]
    [(16, 16, 32), (16, 8, 16), (8, 4, 8), (4, 2, 4)]
    """

    def __init__(self, in_channels: int, num_classes: int, *, stem: int) -> None:
        super().__init__()
        fine, middle, coarse = stem, 3 * stem, 6 * stem
        self.stem = _unit(in_channels, fine, kernel=7, stride=(1, 2, 2))
        self.stages = nn.ModuleList(
            [_stage(fine, middle, blocks=3), _stage(middle, coarse, blocks=3), _stage(coarse, coarse, blocks=2)]
        )
        self.transformer = Transformer(coarse, levels=2)
        widths = (coarse, middle, fine)
        sources = (coarse, coarse, middle)
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(source, width, 2, stride=2, bias=False)
            for source, width in zip(sources, widths, strict=True)
        )
        self.blocks = nn.ModuleList(Refinement(width) for width in widths)
        self.heads = nn.ModuleList(nn.Conv3d(width, num_classes, 1) for width in (*widths, fine))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = [self.stem(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        first, second, *coarse = features
        skip, x = self.transformer(coarse)
        logits = []
        for up, block, head, finer in zip(self.ups, self.blocks, self.heads, (skip, second, first), strict=False):
            x = block(up(x) + finer)
            logits.append(head(x))
        full = functional.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear", align_corners=False)
        # the head after the interpolation, as published, though before it the same logits would cost a fourth
        return (self.heads[-1](full), *reversed(logits))


class Residual(nn.Module):
    """A convolution with a residual connection around it, which is a 1×1×1 convolution where the shape changes.

    Shapes: (B, in_channels, D, H, W) → (B, out_channels, D / stride, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, project: bool) -> None:
        super().__init__()
        self.conv = _conv(in_channels, out_channels, kernel=3, stride=stride)
        self.shortcut = _conv(in_channels, out_channels, kernel=1, stride=stride) if project else nn.Identity()
        self.activation = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.conv(x) + self.shortcut(x))
        return y


class Refinement(nn.Module):
    """Two units of the decoder with a residual connection around them: (B, C, D, H, W) keeps its shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.units = nn.Sequential(_unit(channels, channels, kernel=3), _unit(channels, channels, kernel=3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.units(x)
        return y


class Transformer(nn.Module):
    """Deformable layers over the voxels of several scales in a row, each scale with an embedding of its own.

    Shapes: a list of (B, C, D, H, W) → a list of the same shapes; C a multiple of 6.

    >>> [tuple(x.shape) for x in Transformer(12, levels=2)([torch.rand(1, 12, 2, 4, 6), torch.rand(1, 12, 1, 2, 3)])]
    [(1, 12, 2, 4, 6), (1, 12, 1, 2, 3)]
    """

    def __init__(self, channels: int, *, levels: int) -> None:
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(levels, channels))
        self.layers = nn.ModuleList(DeformableLayer(channels, levels=levels) for _ in range(LAYERS))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        sizes = [_size(x) for x in features]
        lengths = [math.prod(size) for size in sizes]
        tokens = torch.cat([rearrange(x, "b c d h w -> b (d h w) c") for x in features], dim=1)
        embeddings = zip(sizes, self.level_embedding, strict=True)
        positions = torch.cat([sines(size, tokens.shape[-1], tokens.device) + level for size, level in embeddings])
        places = torch.cat([centres(size, tokens.device) for size in sizes])
        for layer in self.layers:
            tokens = layer(tokens, positions, places, sizes)
        return [_as_volume(x, size) for x, size in zip(tokens.split(lengths, dim=1), sizes, strict=True)]


class DeformableLayer(nn.Module):
    """Deformable attention and a feed-forward network, each with a norm after its residual connection.

    Shapes: tokens (B, N, C), positions (N, C), places (N, 3) → (B, N, C).
    """

    def __init__(self, channels: int, *, levels: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(channels, levels=levels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(4 * channels, channels),
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])

    def forward(self, tokens: Tensor, positions: Tensor, places: Tensor, sizes: Sequence[Triple]) -> Tensor:
        attended = self.attention(tokens + positions, tokens, places, sizes)
        tokens = self.norms[0](tokens + self.dropout(attended))
        tokens = self.norms[1](tokens + self.dropout(self.feed_forward(tokens)))
        return tokens


class DeformableAttention(nn.Module):
    """Attention of each voxel to a few points of each scale, at offsets and with weights that it computes itself.

    An offset is in voxels of the scale that is looked at, from the voxel's own place there. The value at a point is
    interpolated between eight voxels; outside of the volume it is zero. Places, offsets and the softmax over the
    points are in float32 whatever the rest: a coordinate in bfloat16 would be off by voxels.

    Shapes: queries and tokens (B, N, C), places (N, 3) → (B, N, C); C a multiple of the heads.

    Reference: Zhu et al., *Deformable DETR* (arXiv:2010.04159), section 4.1, one axis more. At first all weights are
    alike, and each head looks in a direction of its own, point by point further away.

    >>> attention = DeformableAttention(12, levels=1)
    >>> tokens = torch.rand(2, 8, 12)
    >>> attention(tokens, tokens, centres((2, 2, 2)), [(2, 2, 2)]).shape
    torch.Size([2, 8, 12])
    """

    def __init__(self, channels: int, *, levels: int) -> None:
        super().__init__()
        self.offsets = nn.Linear(channels, HEADS * levels * POINTS * 3)
        self.weights = nn.Linear(channels, HEADS * levels * POINTS)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, queries: Tensor, tokens: Tensor, places: Tensor, sizes: Sequence[Triple]) -> Tensor:
        offsets = rearrange(
            self.offsets(queries).float(), "b n (h l p xyz) -> l (b h) n p xyz", h=HEADS, p=POINTS, xyz=3
        )
        weights = rearrange(self.weights(queries).float(), "b n (h k) -> (b h) 1 n k", h=HEADS).softmax(dim=-1)
        value = rearrange(self.value(tokens).float(), "b n (h c) -> (b h) n c", h=HEADS)
        parts = value.split([math.prod(size) for size in sizes], dim=1)
        shares = weights.split(POINTS, dim=-1)
        attended = sum(
            (_sampled(part, size, places[:, None] + offset * _per_voxel(size, offset)) * share).sum(dim=-1)
            for part, size, offset, share in zip(parts, sizes, offsets, shares, strict=True)
        )
        output: Tensor = self.output(rearrange(attended, "(b h) c n -> b n (h c)", h=HEADS).to(tokens.dtype))
        return output


def centres(size: Triple, device: torch.device | None = None) -> Tensor:
    """Returns where the voxels of a volume lie in it: (D · H · W, 3), the last axis first, from -1 to 1.

    These are the coordinates of ``torch.nn.functional.grid_sample``.

    >>> centres((1, 1, 2)).tolist()
    [[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0]]
    """
    depth, height, width = (_middles(extent, device) * 2 - 1 for extent in size)
    return torch.stack(torch.meshgrid(depth, height, width, indexing="ij")[::-1], dim=-1).flatten(0, 2)


def sines(size: Triple, channels: int, device: torch.device | None = None) -> Tensor:
    """Returns position embeddings (D · H · W, channels): sines and cosines in turn, a third of the channels per axis.

    The fastest takes one turn over the extent of its axis, whatever the extent, the others less.

    >>> sines((1, 1, 2), 6).shape
    torch.Size([2, 6])
    """
    third = channels // 3
    rates = TEMPERATURE ** (-torch.arange(0, third, 2, dtype=torch.float32, device=device) / third)
    angles = [2 * math.pi * _middles(extent, device)[:, None] * rates for extent in size]
    depth, height, width = (torch.stack([x.sin(), x.cos()], dim=-1).flatten(1) for x in angles)
    along = (depth[:, None, None], height[None, :, None], width[None, None, :])
    return torch.cat([x.expand(*size, -1) for x in along], dim=-1).flatten(0, 2)


def _middles(extent: int, device: torch.device | None) -> Tensor:
    """Returns the middles of so many voxels, as parts of their extent."""
    return (torch.arange(extent, dtype=torch.float32, device=device) + 0.5) / extent


def _per_voxel(size: Triple, like: Tensor) -> Tensor:
    """Returns how far one voxel is along each axis, the last axis first, where the volume goes from -1 to 1."""
    return like.new_tensor([2 / extent for extent in reversed(size)])


def _sampled(value: Tensor, size: Triple, places: Tensor) -> Tensor:
    """Interpolates a volume in a row (b, D · H · W, c) at places (b, N, P, 3): (b, c, N, P)."""
    sampled = functional.grid_sample(_as_volume(value, size), places[:, None], align_corners=False)
    return sampled[:, :, 0]


def _as_volume(tokens: Tensor, size: Triple) -> Tensor:
    depth, height, _ = size
    return rearrange(tokens, "b (d h w) c -> b c d h w", d=depth, h=height)


def _size(x: Tensor) -> Triple:
    depth, height, width = x.shape[2:]
    return depth, height, width


def _conv(in_channels: int, out_channels: int, *, kernel: int, stride: int | Triple = 1) -> nn.Sequential:
    """Makes a convolution, which leaves the size as it is at stride 1, with instance norm."""
    conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.InstanceNorm3d(out_channels, affine=True))


def _unit(in_channels: int, out_channels: int, *, kernel: int, stride: int | Triple = 1) -> nn.Sequential:
    return nn.Sequential(
        *_conv(in_channels, out_channels, kernel=kernel, stride=stride), nn.LeakyReLU(0.01, inplace=True)
    )


def _stage(in_channels: int, out_channels: int, *, blocks: int) -> nn.Sequential:
    """Makes residual blocks, the first of which halves the resolution."""
    first = Residual(in_channels, out_channels, stride=2, project=True)
    others = [Residual(out_channels, out_channels, stride=1, project=False) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)


def _initialise(module: nn.Module) -> None:
    """Initialises a module as published: by He for convolutions, by Glorot for the transformer."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, DeformableAttention):  # its own layers come before it, and are set anew here
        for layer in (module.offsets, module.weights):
            nn.init.zeros_(layer.weight)
        for layer in (module.weights, module.value, module.output):
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            module.offsets.bias.copy_(_first_offsets(module.offsets.out_features))


def _first_offsets(length: int) -> Tensor:
    """Returns offsets of (heads, levels, points, 3) in a row: the directions of the heads, times 1, 2, ... points."""
    turn = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([turn.cos(), turn.sin() * turn.cos(), turn.sin() ** 2], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    steps = torch.arange(1, POINTS + 1)
    levels = length // (HEADS * POINTS * 3)
    offsets = directions[:, None, None] * steps[None, None, :, None]
    return offsets.expand(-1, levels, -1, -1).flatten()

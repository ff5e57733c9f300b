"""MedFormer: a U-Net whose features and whose small semantic maps attend to each other.

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels, M codes of a semantic map.
"""

from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from dstlib.errors import DataError
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

HEADS = (1, 2, 4, 8, 10)  # of each level, finest first; all of them have the same width, so these are its channels
RESIDUAL_BLOCKS = (2, 2, 1, 0, 0)  # of each level, in the encoder as in the decoder
ATTENTION_BLOCKS = (0, 0, 1, 4, 6)
FINE = 2  # levels without attention
FUSION_BLOCKS = 2
CODES = 4**3  # that the published map is a grid plays no part
EXPANSION = 4
SHORTEST = 2 ** (len(HEADS) - 1)  # an extent of which a single voxel is left


def medformer(request: Request) -> Segmenter:
    """Builds MedFormer in its configuration for AMOS: five levels of 32 to 320 channels, maps of 64 codes.

    Its second head stands at a quarter of the resolution, upsampled. A narrower one has as many attention heads,
    of fewer channels each.

    Reference: Gao et al., *A Data-scalable Transformer for Medical Image Segmentation* (arXiv:2203.00131). Which
    blocks stand where is known from its authors' program; with 16 classes it has 39,594,048 parameters, the 39.6 M of
    E2ENet's table. The last attention also makes values for a map that nothing reads: the gradient of those
    weights is zero.
    """
    host = MedFormer(request.in_channels, request.num_classes, head_width=request.channels(32))
    return Segmenter(host, in_channels=request.in_channels, multiple=(1, 1, 1), read=tuple)


class MedFormer(nn.Module):
    """Two convolutional levels around three in which features and semantic maps attend to each other.

    The maps of the three levels meet before the decoder takes them up. Where an extent is odd, a zero is added
    before it is halved.

    Shapes: (B, C, D, H, W) → two logits (B, K, D, H, W), those of the decoder's end first.

    Raises:
        DataError: The coarsest level would be a single voxel, which has no variance to normalise by.

    >>> [tuple(logits.shape) for logits in MedFormer(1, 3, head_width=2)(torch.rand(1, 1, 17, 8, 12))]
    [(1, 3, 17, 8, 12), (1, 3, 17, 8, 12)]
    """

    def __init__(self, in_channels: int, num_classes: int, *, head_width: int) -> None:
        super().__init__()
        widths = [heads * head_width for heads in HEADS]
        stem = _convolution(in_channels, widths[0])
        self.fine_encoder = nn.ModuleList(
            [
                nn.Sequential(stem, ResidualBlock(widths[0], widths[0])),
                *(_down(widths, level) for level in range(1, FINE)),
            ]
        )
        coarse = range(FINE, len(widths))
        self.encoder = nn.ModuleList(AttentionDown(widths, level) for level in coarse)
        self.fusion = MapFusion(widths[FINE:])
        self.decoder = nn.ModuleList(AttentionUp(widths, level) for level in reversed(coarse[:-1]))
        self.fine_decoder = nn.ModuleList(
            _residual_blocks(widths[level + 1] + widths[level], widths[level], RESIDUAL_BLOCKS[level])
            for level in reversed(range(FINE))
        )
        self.head = nn.Conv3d(widths[0], num_classes, 1)
        self.auxiliary_head = nn.Conv3d(widths[FINE], num_classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = tuple(x.shape[2:])
        if max(size) <= SHORTEST:
            allowed, remedy = f"more than {SHORTEST} along an axis", "Choose larger patches (--patch-size)."
            raise DataError.of("size", "input of MedFormer", allowed=allowed, given=size, remedy=remedy)
        features, maps = [], []
        for blocks in self.fine_encoder:
            x = blocks(x)
            features.append(x)
        for stage in self.encoder:
            x, codes = stage(x)
            features.append(x)
            maps.append(codes)
        maps = self.fusion(maps)
        x, codes = features.pop(), maps.pop()
        for stage in self.decoder:
            x, codes = stage(_joined(x, features.pop()), torch.cat([codes, maps.pop()], dim=1))
        auxiliary = self.auxiliary_head(x)
        for blocks in self.fine_decoder:
            x = blocks(_joined(x, features.pop()))
        return self.head(x), _resized(auxiliary, size)


class AttentionDown(nn.Module):
    """A level of the encoder: features are halved and convolved, a semantic map is made of them, then both attend.

    Shapes: (B, C, D, H, W) → (B, C', D/2, H/2, W/2), (B, C', M), extents rounded up.
    """

    def __init__(self, widths: Sequence[int], level: int) -> None:
        super().__init__()
        width = widths[level]
        self.features = _down(widths, level)
        self.semantic_map = SemanticMap(width)
        self.blocks = nn.ModuleList(AttentionBlock(width, width, HEADS[level]) for _ in range(ATTENTION_BLOCKS[level]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return _attend(self.blocks, x, self.semantic_map(x))


class AttentionUp(nn.Module):
    """A level of the decoder: joined features and joined maps attend to each other, the features are convolved.

    Shapes: (B, C, D, H, W), (B, C, M) → (B, C', D, H, W), (B, C', M).
    """

    def __init__(self, widths: Sequence[int], level: int) -> None:
        super().__init__()
        width, heads, num = widths[level], HEADS[level], ATTENTION_BLOCKS[level]
        joined = widths[level + 1] + width
        self.reduce_map = nn.Conv1d(joined, width, 1, bias=False)
        self.blocks = nn.ModuleList(
            AttentionBlock(width if i else joined, width, heads, last=level == FINE and i == num - 1)
            for i in range(num)
        )
        self.convolutions = _residual_blocks(width, width, RESIDUAL_BLOCKS[level])

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        x, codes = _attend(self.blocks, x, self.reduce_map(codes))
        return self.convolutions(x), codes


class SemanticMap(nn.Module):
    """Sums up features as codes: each is a mean over all voxels, by weights that the features themselves give.

    Shapes: (B, C, D, H, W) → (B, C, M).

    >>> SemanticMap(3)(torch.rand(2, 3, 4, 5, 6)).shape
    torch.Size([2, 3, 64])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.values = _convolution(channels, channels)
        self.weights = _convolution(channels, CODES)

    def forward(self, x: Tensor) -> Tensor:
        return self.values(x).flatten(2) @ _shares(self.weights(x).flatten(2), dim=2).mT


class AttentionBlock(nn.Module):
    """Bidirectional attention between features and a semantic map, then an inverted bottleneck of the features.

    ``last``: the map is read for the last time and does not change.

    Shapes: (B, in_channels, D, H, W), (B, channels, M) → (B, channels, D, H, W), (B, channels, M).
    """

    def __init__(self, in_channels: int, channels: int, heads: int, *, last: bool = False) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(in_channels)
        self.map_norm = nn.InstanceNorm1d(channels)
        self.attention = BidirectionalAttention(in_channels, channels, heads, last=last)
        shortcut = nn.Sequential(nn.ReLU(), _convolution(in_channels, channels, 1))
        self.shortcut = None if in_channels == channels else shortcut
        self.bottleneck = InvertedBottleneck(channels)

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        ready = self.norm(x)
        found, change = self.attention(ready, self.map_norm(codes))
        found = found + (x if self.shortcut is None else self.shortcut(ready))
        return self.bottleneck(found), codes if change is None else codes + change


class BidirectionalAttention(nn.Module):
    """Attention of voxels to the codes of a map and of codes to the voxels, by one matrix of scores.

    Scores are products of both sides' queries; each side takes its softmax over the other and sums the other's
    values. The cost grows with voxels times codes, not with voxels squared.

    Shapes: (B, in_channels, D, H, W), (B, channels, M) → (B, channels, D, H, W), and (B, channels, M), or None of
    the ``last``.

    >>> attention = BidirectionalAttention(6, 4, heads=2)
    >>> [tuple(x.shape) for x in attention(torch.rand(1, 6, 3, 4, 5), torch.rand(1, 4, 8))]
    [(1, 4, 3, 4, 5), (1, 4, 8)]
    """

    def __init__(self, in_channels: int, channels: int, heads: int, *, last: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.project = _separable(in_channels, 2 * channels)
        self.project_map = nn.Conv1d(channels, 2 * channels, 1, bias=False)
        self.out = _separable(channels, channels)
        self.out_map = None if last else nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        query, value = self._split(self.project(x))
        map_query, map_value = self._split(self.project_map(codes))
        scores = (map_query * self.scale).mT @ query  # (B, heads, M, voxels)
        found = map_value @ _shares(scores, dim=2)
        out: Tensor = self.out(found.reshape(len(x), -1, *x.shape[2:]))
        if self.out_map is None:
            return out, None
        return out, self.out_map((value @ _shares(scores, dim=3).mT).flatten(1, 2))

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Cuts (B, 2 · channels, ...) into queries and values (B, heads, channels of a head, places)."""
        query, value = projected.flatten(2).unflatten(1, (2, self.heads, -1)).unbind(1)
        return query, value


class InvertedBottleneck(nn.Module):
    """Widens features fourfold, convolves each by itself, weighs them by squeeze and excitation, and narrows them.

    Shapes: (B, channels, D, H, W) → the same, added to the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = EXPANSION * channels
        self.widen = _unit(channels, wide, 1)
        self.each = _unit(wide, wide, 3, groups=wide)
        self.excitation = nn.Sequential(
            nn.Conv3d(wide, channels, 1), nn.ReLU(), nn.Conv3d(channels, wide, 1), nn.Sigmoid()
        )
        self.narrow = nn.Sequential(nn.InstanceNorm3d(wide), _convolution(wide, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = self.each(self.widen(x))
        narrow: Tensor = self.narrow(wide * self.excitation(wide.mean((2, 3, 4), keepdim=True)))
        return x + narrow


class MapFusion(nn.Module):
    """Lets the codes of all maps attend to each other: all-to-all fusion of the scales.

    Shapes: maps (B, C_level, M), one for each level → the same.

    >>> [tuple(x.shape) for x in MapFusion([20, 10])([torch.rand(1, 20, 4), torch.rand(1, 10, 4)])]
    [(1, 20, 4), (1, 10, 4)]
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        width = widths[-1]
        self.into = nn.ModuleList(nn.Conv1d(channels, width, 1, bias=False) for channels in widths)
        self.blocks = nn.ModuleList(FusionBlock(width, HEADS[-1]) for _ in range(FUSION_BLOCKS))
        self.out = nn.ModuleList(nn.Conv1d(width, channels, 1, bias=False) for channels in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x = torch.cat([into(codes) for into, codes in zip(self.into, maps, strict=True)], dim=2).mT
        for block in self.blocks:
            x = block(x)
        parts = x.mT.split([codes.shape[2] for codes in maps], dim=2)
        return [out(part) for out, part in zip(self.out, parts, strict=True)]


class FusionBlock(nn.Module):
    """A transformer block: multi-head self-attention and a two-layer perceptron, each after a norm and added.

    Shapes: (B, places, channels) → the same.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.project(self.norm(x)), "b m (s h c) -> s b h m c", s=3, h=self.heads)
        found = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(rearrange(found, "b h m c -> b m (h c)"))
        y: Tensor = x + self.perceptron(x)
        return y


class ResidualBlock(nn.Module):
    """Two 3×3×3 convolutions, norm and ReLU before each; the shortcut is a third where the channels differ.

    Shapes: (B, in_channels, D, H, W) → (B, channels, D, H, W).
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.InstanceNorm3d(in_channels), nn.ReLU())
        self.first = _convolution(in_channels, channels)
        self.second = _unit(channels, channels, 3)
        self.shortcut = None if in_channels == channels else _convolution(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        ready = self.before(x)
        y: Tensor = self.second(self.first(ready))
        return y + (x if self.shortcut is None else self.shortcut(ready))


class Merging(nn.Module):
    """Halves extents: the eight voxels of each cell side by side in the channels, norm, a separable convolution.

    Shapes: (B, in_channels, D, H, W) → (B, channels, D/2, H/2, W/2), extents rounded up.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(8 * in_channels)
        self.reduce = _separable(8 * in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        depth, height, width = (extent % 2 for extent in x.shape[2:])
        x = functional.pad(x, (0, width, 0, height, 0, depth))
        cells = rearrange(x, "b c (d i) (h j) (w k) -> b (c i j k) d h w", i=2, j=2, k=2)
        y: Tensor = self.reduce(self.norm(cells))
        return y


def _attend(blocks: Iterable[nn.Module], x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    for block in blocks:
        x, codes = block(x, codes)
    return x, codes


def _joined(coarse: Tensor, fine: Tensor) -> Tensor:
    return torch.cat([_resized(coarse, fine.shape[2:]), fine], dim=1)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(x, size=size, mode="trilinear", align_corners=True)


def _shares(scores: Tensor, *, dim: int) -> Tensor:
    """Computes a softmax in float32 at least."""
    return scores.softmax(dim, dtype=torch.promote_types(scores.dtype, torch.float32)).type_as(scores)


def _down(widths: Sequence[int], level: int) -> nn.Sequential:
    width = widths[level]
    return nn.Sequential(Merging(widths[level - 1], width), _residual_blocks(width, width, RESIDUAL_BLOCKS[level]))


def _residual_blocks(in_channels: int, channels: int, num: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels if i else in_channels, channels) for i in range(num)))


def _unit(in_channels: int, channels: int, kernel: int, *, groups: int = 1) -> nn.Sequential:
    """Makes a norm, ReLU and a convolution, none of them with a bias."""
    return nn.Sequential(
        nn.InstanceNorm3d(in_channels), nn.ReLU(), _convolution(in_channels, channels, kernel, groups=groups)
    )


def _separable(in_channels: int, channels: int) -> nn.Sequential:
    """Makes a convolution of each channel by itself, and one of all channels at each voxel."""
    each = _convolution(in_channels, in_channels, groups=in_channels)
    return nn.Sequential(each, _convolution(in_channels, channels, 1))


def _convolution(in_channels: int, channels: int, kernel: int = 3, *, groups: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)

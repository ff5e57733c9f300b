"""U-Mamba: a residual nnU-Net whose coarsest features go through a selective state space model, voxel by voxel.

Shapes: B batch, C channels, K classes, D, H, W depth, height, width in voxels, L tokens, N states.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dstlib.axes import Triple
from dstlib.zoo.e2enet.baselines.nnunet import FEATURES, MOST_FEATURES
from dstlib.zoo.e2enet.baselines.segmenter import Request, Segmenter

STATES, EXPANSION, CONVOLVED, CHANNELS_PER_RANK = 16, 2, 4, 16  # of Mamba, as everybody has them
STEPS = (0.001, 0.1)  # the range of its first step sizes
CHUNK = 512  # tokens whose states are in memory at a time, where a gradient is wanted


def umamba(request: Request) -> Segmenter:
    """Builds U-Mamba with its Mamba at the bottleneck ("U-Mamba_Bot").

    Levels and strides are the config's, the widths nnU-Net's own, as for "nnunet".

    Reference: Ma et al., *U-Mamba* (arXiv:2401.04722); which blocks stand where is known from its authors' program.
    Neither says how many parameters it has. Where they upsample and then convolve by 1×1×1, the order is
    turned here: the same numbers, at an eighth of the cost.
    """
    strides = request.config.strides
    widths = [request.channels(min(FEATURES * 2**level, MOST_FEATURES)) for level in range(len(strides) + 1)]
    host = UMamba(request.in_channels, request.num_classes, widths=widths, strides=strides)
    return Segmenter(host, in_channels=request.in_channels, multiple=request.config.divisor, read=tuple)


class UMamba(nn.Module):
    """A U-Net of residual blocks, Mamba over the voxels of the coarsest level, a head at every other.

    Shapes: (B, C, D, H, W) → logits (B, K, D / s, H / s, W / s), finest first, s the strides down to a level.

    >>> network = UMamba(1, 3, widths=(4, 8, 12), strides=((1, 2, 2), (2, 2, 2)))
    >>> [tuple(logits.shape) for logits in network(torch.rand(1, 1, 4, 8, 12))]
    [(1, 3, 4, 8, 12), (1, 3, 4, 4, 6)]
    """

    def __init__(self, in_channels: int, num_classes: int, *, widths: Sequence[int], strides: Sequence[Triple]) -> None:
        super().__init__()
        levels = len(widths)
        halfway = math.ceil(levels / 2)  # two blocks up to there, one beyond, in the encoder as in the decoder
        num_blocks = [2 if i < halfway else 1 for i in range(levels)]
        self.stem = _blocks(in_channels, widths[0], num_blocks[0])
        self.encoder = nn.ModuleList(
            _blocks(widths[max(level - 1, 0)], widths[level], num_blocks[level], stride=stride)
            for level, stride in enumerate([(1, 1, 1), *strides])
        )
        self.mixer = TokenMixer(widths[-1])
        upward = list(reversed(range(levels - 1)))
        self.narrow = nn.ModuleList(nn.Conv3d(widths[level + 1], widths[level], 1) for level in upward)
        self.decoder = nn.ModuleList(
            _blocks(2 * widths[level], widths[level], num) for level, num in zip(upward, num_blocks, strict=False)
        )
        self.heads = nn.ModuleList(nn.Conv3d(widths[level], num_classes, 1) for level in upward)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        skips = []
        for blocks in self.encoder:
            x = blocks(x)
            skips.append(x)
        x = self.mixer(skips.pop())
        logits = []
        for narrow, blocks, head in zip(self.narrow, self.decoder, self.heads, strict=True):
            skip = skips.pop()
            coarse = functional.interpolate(narrow(x), size=skip.shape[2:], mode="nearest")
            x = blocks(torch.cat([coarse, skip], dim=1))
            logits.append(head(x))
        return logits[::-1]


class ResidualBlock(nn.Module):
    """Two 3×3×3 convolutions with norms; the shortcut is a 1×1×1 convolution where ``project`` says so.

    Shapes: (B, in_channels, D, H, W) → (B, channels, D / s, H / s, W / s), s the stride.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: Triple = (1, 1, 1), project: bool) -> None:
        super().__init__()
        self.first = nn.Conv3d(in_channels, channels, 3, stride=stride, padding=1)
        self.first_norm = nn.InstanceNorm3d(channels, affine=True)
        self.second = nn.Conv3d(channels, channels, 3, padding=1)
        self.second_norm = nn.InstanceNorm3d(channels, affine=True)
        self.shortcut = nn.Conv3d(in_channels, channels, 1, stride=stride) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.leaky_relu(self.first_norm(self.first(x)), inplace=True)
        y = self.second_norm(self.second(y)) + (x if self.shortcut is None else self.shortcut(x))
        return functional.leaky_relu(y, inplace=True)


class TokenMixer(nn.Module):
    """Norm and Mamba over the voxels as one sequence, depth first, in the type of its weights under autocast too.

    Nothing is added to the input: what the decoder gets has gone through Mamba.

    Shapes: (B, C, D, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mamba = Mamba(channels)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        exactly = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with exactly:
            tokens = self.mamba(self.norm(x.flatten(2).mT.to(self.norm.weight.dtype)))
        return tokens.mT.reshape(x.shape)


class Mamba(nn.Module):
    """Mamba's block: a gated selective state space model behind a short causal convolution.

    Its parameters have the names and shapes of the package mamba-ssm and of transformers' ``MambaMixer``, whose
    weights it can load. Of these, ``A_log`` and ``D`` are no layer's, and stay dense under a sparsifier.

    Shapes: (B, L, channels) → the same.

    Reference: Gu and Dao, *Mamba* (arXiv:2312.00752), section 3.

    >>> mamba = Mamba(32)
    >>> {name: tuple(p.shape) for name, p in mamba.named_parameters()}  # doctest: +NORMALIZE_WHITESPACE
    {'A_log': (64, 16), 'D': (64,), 'in_proj.weight': (128, 32), 'conv1d.weight': (64, 1, 4), 'conv1d.bias': (64,),
     'x_proj.weight': (34, 64), 'dt_proj.weight': (64, 2), 'dt_proj.bias': (64,), 'out_proj.weight': (32, 64)}
    >>> mamba(torch.rand(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide, rank = EXPANSION * channels, math.ceil(channels / CHANNELS_PER_RANK)
        self.in_proj = nn.Linear(channels, 2 * wide, bias=False)
        self.conv1d = nn.Conv1d(wide, wide, CONVOLVED, groups=wide, padding=CONVOLVED - 1)
        self.x_proj = nn.Linear(wide, rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(rank, wide)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(wide, 1))
        self.D = nn.Parameter(torch.ones(wide))
        self.out_proj = nn.Linear(wide, channels, bias=False)
        least, most = map(math.log, STEPS)
        steps = torch.empty(wide).uniform_(least, most).exp()
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus gives the steps again

    def forward(self, x: Tensor) -> Tensor:
        signal, gate = self.in_proj(x).chunk(2, dim=2)
        signal = functional.silu(self.conv1d(signal.mT)[..., : x.shape[1]]).mT
        step, written, read = self.x_proj(signal).split([self.dt_proj.in_features, STATES, STATES], dim=2)
        step = functional.softplus(self.dt_proj(step))
        scanned = selective_scan(signal, step, -self.A_log.exp(), written, read)
        y: Tensor = self.out_proj((scanned + self.D * signal) * functional.silu(gate))
        return y


def selective_scan(signal: Tensor, step: Tensor, rate: Tensor, written: Tensor, read: Tensor) -> Tensor:
    """Runs the states h = exp(step · rate) · h + step · signal · written along the tokens; returns Σ h · read.

    The states are those of float32 at least. Long sequences go in chunks, of which a backward pass makes the
    states anew: it is the inputs that are kept.

    Shapes: signal and step (B, L, C), rate (C, N), below 0, written and read (B, L, N) → (B, L, C).

    >>> ones = torch.ones(1, 3, 1)
    >>> selective_scan(ones, ones, torch.tensor([[math.log(0.5)]]), ones, ones).flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    exact = torch.promote_types(signal.dtype, torch.float32)
    rate = rate.to(exact)
    states = rate.new_zeros(len(signal), *rate.shape)
    parts = [x.to(exact).split(CHUNK, dim=1) for x in (signal, step, written, read)]
    found = []
    for chunk in zip(*parts, strict=True):
        if len(parts[0]) == 1:
            y, states = _scan_chunk(states, rate, *chunk)
        else:
            y, states = checkpoint(_scan_chunk, states, rate, *chunk, use_reentrant=False, preserve_rng_state=False)
        found.append(y)
    return torch.cat(found, dim=1).type_as(signal)


def _scan_chunk(
    states: Tensor, rate: Tensor, signal: Tensor, step: Tensor, written: Tensor, read: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what is read at each token, and the last states (B, C, N)."""
    factors = (step[..., None] * rate).exp()
    terms = (step * signal)[..., None] * written[:, :, None]
    all_states: Tensor = Recurrence.apply(factors, terms, states)
    return (all_states @ read[..., None]).squeeze(3), all_states[:, -1]


class Recurrence(torch.autograd.Function):
    """The states h[t] = factors[t] · h[t - 1] + terms[t] along the second axis, after ``before``.

    Both passes take as many steps as the logarithm of the length, of which each is a product over all that is left;
    nothing is kept in between but the states. Unlike closed forms by cumulative products, it divides by nothing, so
    that factors may be 0.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor, terms: Tensor, before: Tensor) -> Tensor:
        first = torch.addcmul(terms[:, :1], factors[:, :1], before[:, None])
        states = _scan(factors, torch.cat([first, terms[:, 1:]], dim=1))
        ctx.save_for_backward(factors, states, before)
        return states

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors, states, before = ctx.saved_tensors
        # what is owed to a state comes from all later ones: the same recurrence, backwards
        later = factors[:, 1:].flip(1)
        of_terms = _scan(torch.cat([later[:, :1], later], dim=1) if later.shape[1] else factors, gradient.flip(1))
        of_terms = of_terms.flip(1)
        earlier = torch.cat([before[:, None], states[:, :-1]], dim=1)
        return of_terms * earlier, of_terms, of_terms[:, 0] * factors[:, 0]


def _scan(factors: Tensor, terms: Tensor) -> Tensor:
    """Returns the states of a recurrence that starts from 0: of half as many tokens, then of those in between."""
    length = terms.shape[1]
    if length == 1:
        return terms
    even, odd = slice(0, length // 2 * 2, 2), slice(1, None, 2)
    pairs = _scan(factors[:, even] * factors[:, odd], torch.addcmul(terms[:, odd], factors[:, odd], terms[:, even]))
    states = torch.empty_like(terms)
    states[:, odd] = pairs
    states[:, 0] = terms[:, 0]
    states[:, 2::2] = torch.addcmul(terms[:, 2::2], factors[:, 2::2], pairs[:, : (length - 1) // 2])
    return states


def _blocks(in_channels: int, channels: int, num: int, *, stride: Triple = (1, 1, 1)) -> nn.Sequential:
    first = ResidualBlock(in_channels, channels, stride=stride, project=True)
    return nn.Sequential(first, *(ResidualBlock(channels, channels, project=False) for _ in range(num - 1)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        assert module.bias is not None
        nn.init.zeros_(module.bias)

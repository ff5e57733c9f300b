"""Attention that holds the active weights of its projections only.

Shapes: N batch, L queries, S keys, E embedding, H heads, A active weights, P packed projections.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.layers.active_matrix import ActiveMatrix, product
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.engine.ops.compact_linear import CompactPattern, compact_linear
from dstlib.errors import InputError


@dataclass(frozen=True, eq=False)
class PackedPattern:
    """Which weights are active of equally large matrices (O, I) that lie behind one another, values and all.

    >>> pattern = PackedPattern.of(torch.tensor([0, 3, 4]), (4, 2), 2)
    >>> pattern.sizes, pattern.places().tolist()
    ([2, 1], [0, 3, 4])
    """

    parts: tuple[CompactPattern, ...]

    @classmethod
    def of(cls, places: Tensor, size: tuple[int, int], num: int) -> "PackedPattern":
        """Returns the pattern of weights at rising places of ``num`` matrices, (O · num, I) in all."""
        outputs, inputs = size[0] // num, size[1]
        starts = [part * outputs * inputs for part in range(num)]
        ends = torch.searchsorted(places, torch.tensor([*starts[1:], size[0] * inputs], dtype=places.dtype)).tolist()
        spans = zip(starts, [0, *ends[:-1]], ends, strict=True)
        return cls(tuple(CompactPattern.of(places[i:j] - start, (outputs, inputs)) for start, i, j in spans))

    @property
    def sizes(self) -> list[int]:
        """How many values each matrix has."""
        return [part.num_active for part in self.parts]

    def places(self) -> Tensor:
        """Returns where in the flattened (O · P, I) matrix each of the values belongs, (A), in int32."""
        return torch.cat([part.places() + start for part, start in zip(self.parts, self._starts(), strict=True)])

    def rising(self) -> tuple[Tensor, Tensor]:
        """Returns the places in rising order, (A), and where the value of each lies, (A), in int32."""
        places, order = zip(*(part.rising() for part in self.parts), strict=True)
        firsts = [0, *accumulate(self.sizes)]
        return (
            torch.cat([x + start for x, start in zip(places, self._starts(), strict=True)]),
            torch.cat([x + first for x, first in zip(order, firsts, strict=False)]),
        )

    def to(self, device: torch.device) -> "PackedPattern":
        """Returns the pattern on a device."""
        return PackedPattern(tuple(part.to(device) for part in self.parts))

    @property
    def num_active(self) -> int:
        """A, the number of active weights of all."""
        return sum(self.sizes)

    def _starts(self) -> list[int]:
        outputs, inputs = self.parts[0].own.size
        return [part * outputs * inputs for part in range(len(self.parts))]


class ActiveProjections(ActiveMatrix):
    """The active values (A) of the projections of queries, keys and values, packed in one matrix (3 · E, E)."""

    pattern: PackedPattern  # type: ignore[assignment]  # of several matrices

    def project(self, inputs: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        """(N, L, E) → (N, L, E), each by its projection."""
        height = self.dense_shape[0] // len(inputs)
        parts = zip(inputs, self.values.split(self.pattern.sizes), biases, self.pattern.parts, strict=True)

        def project(i: int, x: Tensor, values: Tensor, bias: Tensor | None, pattern: CompactPattern) -> Tensor:
            return self.run(
                lambda: compact_linear(x, values, bias, pattern),
                lambda: F.linear(x, self.spread(self.values).split(height)[i], bias),
                x,
                i * height,
            )

        return [project(i, *part) for i, part in enumerate(parts)]

    def part_from(self, values: Tensor, first: int) -> tuple[Tensor, CompactPattern]:
        """Returns those of the values, and their pattern, of the projection that begins with an output."""
        part = first * len(self.pattern.parts) // self.dense_shape[0]
        return values.split(self.pattern.sizes)[part], self.pattern.parts[part]

    def pattern_of(self, places: Tensor) -> PackedPattern:  # type: ignore[override]
        """Returns the pattern of other places of the flattened matrix, in rising order."""
        outputs, inputs = self.dense_shape
        return PackedPattern.of(places.cpu(), (outputs, inputs), 3).to(self.values.device)


class CompactMultiheadAttention(CompactLayer, nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that holds the active weights of projections alone, made by ``make_compact()``.

    Its ``out_proj`` may be a compact layer, too. What is between the projections is torch's attention.
    """

    kind = ActiveMatrix

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, which keeps ``nn.TransformerEncoderLayer`` in inference from reading the weights by itself."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(N, L, E) → (N, L, E), and the weights (N, L, S), (N, H, L, S) if not averaged; axes as of the plain layer.

        ``is_causal`` says nothing that ``attn_mask`` does not. Without weights the plain layer goes by it alone, and so
        hides the keys that ``add_bias_kv`` and ``add_zero_attn`` add.

        Raises:
            InputError: A mask does not fit, or ``is_causal`` comes without one.
        """
        if is_causal and attn_mask is None:
            allowed, remedy = "a mask beside is_causal, which is a hint", "Pass attn_mask, too."
            raise InputError.of("attn_mask", _WHERE, allowed=allowed, given=None, remedy=remedy)
        asked = need_weights, average_attn_weights
        return self.alone(self._forward, (query, key, value), (attn_mask, key_padding_mask), asked)

    def _forward(
        self, inputs: Sequence[Tensor], masks: tuple[Tensor | None, Tensor | None], asked: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor | None]:
        need_weights, average_weights = asked
        is_batched = inputs[0].ndim == 3
        _check_sequences(inputs, 0 if self.batch_first else 1)
        q, k, v = self._projected([self._batch_first(x, is_batched) for x in inputs])
        bias = self._bias(q, k, *masks, is_batched=is_batched)
        k, v, bias = self._lengthened(k, v, bias)
        y, weights = self._attend([self._heads(x) for x in (q, k, v)], bias, need_weights=need_weights)
        y = self.out_proj(y)  # (L, N, E), as the plain layer has it: what draws numbers after it goes by that order
        if weights is not None:
            weights = weights.mean(dim=1) if average_weights else weights
            weights = weights if is_batched else weights.squeeze(0)
        return y.squeeze(1) if not is_batched else y.transpose(0, 1) if self.batch_first else y, weights

    def _batch_first(self, x: Tensor, is_batched: bool) -> Tensor:
        if not is_batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, E) → (N, H, L, E / H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _projected(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            keys = "q_proj_weight", "k_proj_weight", "v_proj_weight"
            return [product(self, key, x, bias) for key, x, bias in zip(keys, inputs, biases, strict=True)]
        held = self.held.get("in_proj_weight")
        if isinstance(held, ActiveProjections):
            return held.project(inputs, biases)
        weights = self.in_proj_weight.chunk(3)
        return [F.linear(*each) for each in zip(inputs, weights, biases, strict=True)]

    def _bias(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None, *, is_batched: bool
    ) -> Tensor | None:
        """Returns what the masks add to the products of queries and keys, (N or 1, H or 1, L or 1, S)."""
        num, length, num_keys = q.shape[0], q.shape[1], k.shape[1]
        biases = []
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, [(length, num_keys), (num * self.num_heads, length, num_keys)])
            heads = self.num_heads if attn_mask.ndim == 3 else 1
            biases.append(_added(attn_mask, q.dtype).view(-1, heads, length, num_keys))
        if padding is not None:
            _check_mask("key_padding_mask", padding, [(num, num_keys) if is_batched else (num_keys,)])
            biases.append(_added(padding, q.dtype).view(num, 1, 1, num_keys))
        return sum(biases[1:], biases[0]) if biases else None

    def _lengthened(self, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns keys and values with those that the layer adds to each sequence, which no mask hides."""
        more = [] if self.bias_k is None or self.bias_v is None else [(self.bias_k, self.bias_v)]
        more += [(k.new_zeros(1, 1, self.embed_dim),) * 2] if self.add_zero_attn else []
        for key, value in more:
            k, v = (torch.cat([x, y.expand(len(x), 1, -1)], dim=1) for x, y in ((k, key), (v, value)))
            bias = None if bias is None else F.pad(bias, (0, 1))
        return k, v, bias

    def _attend(
        self, heads: Sequence[Tensor], bias: Tensor | None, *, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(N, H, L, E / H) → (L, N, E), and the weights (N, H, L, S) where they are asked for."""
        (q, k, v), dropout, weights = heads, self.dropout if self.training else 0.0, None
        if need_weights:
            products = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
            weights = F.dropout((products if bias is None else products + bias).softmax(dim=-1), dropout)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return y.permute(2, 0, 1, 3).flatten(2), weights


_WHERE = "attention in compact storage"


def _check_sequences(inputs: Sequence[Tensor], batch_axis: int) -> None:
    axes = {x.ndim for x in inputs}
    batches = {int(x.shape[batch_axis]) if x.ndim == 3 else 1 for x in inputs}
    lengths = {int(x.shape[1 - batch_axis if x.ndim == 3 else 0]) for x in inputs[1:]}
    if axes not in ({2}, {3}) or len(batches) > 1 or len(lengths) > 1:
        allowed, remedy = "2 or 3 axes, of one batch, as many keys as values", "Pass what nn.MultiheadAttention takes."
        given = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise InputError.of("query, key and value", _WHERE, allowed=allowed, given=given, remedy=remedy)


def _check_mask(name: str, mask: Tensor, sizes: Sequence[tuple[int, ...]]) -> None:
    if tuple(mask.shape) in sizes and (mask.dtype == torch.bool or mask.is_floating_point()):
        return
    allowed, given = f"bool or float of {' or '.join(map(str, sizes))}", f"{mask.dtype} of {tuple(mask.shape)}"
    raise InputError.of(name, _WHERE, allowed=allowed, given=given, remedy="Pass what nn.MultiheadAttention takes.")


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what a mask adds: truth hides."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask

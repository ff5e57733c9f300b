"""Fused projections: which rows of a linear layer are the queries, the keys and the values.

Told by the last part of the layer's name and by what the module that owns it says of its heads. As the forward of
transformers 5.24 and timm 1.0 reads them: tests/test_transformers_families.py, tests/test_timm.py
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType

from torch import Tensor, nn

from dstlib.targets.views import MatrixView

# By the last part of the layer's name, lower case.
_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("qkv", "to_qkv", "qkv_proj", "in_proj", "in_proj_qkv", "wqkv", "c_attn", "w_pack", "qkv_linear"),
        "kv": ("kv", "to_kv", "kv_proj", "wkv", "c_attn"),
        "qk": ("qk", "to_qk", "qk_proj", "wqk"),
    }
)
# Owners of a layer whose rows alternate, head by head, or key head by key head with its queries.
_BY_HEAD = (
    ".BloomAttention",
    ".DisentangledSelfAttention",
    ".FalconAttention",
    ".GPTBigCodeAttention",
    ".GPTNeoXAttention",
    ".GPTNeoXJapaneseAttention",
    ".MiniMaxLightningAttention",
    ".PersimmonAttention",
)
_IN_FOURTHS = ".CodeGenAttention"  # queries, values, keys of a fourth of the heads, then those of the next
_BY_KEY_HEAD = ".Qwen3NextGatedDeltaNet"  # query, key, values and gates of a key head, then those of the next
# Owners whose rows alternate, and of whose heads nothing certain is known here.
_JOINT = ("timm.models.tiny_vit.Attention", "timm.models.maxxvit.AttentionCl", "lightglue.SelfBlock")
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size")
_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_NUM_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


def fused(
    name: str, layer: str, weight: Tensor, owner: nn.Module | None, *, transposed: bool
) -> tuple[MatrixView, ...]:
    """Returns the views of the projections that a linear layer holds; empty where it holds one, or nobody knows.

    ``layer`` is the qualified name of the layer, ``weight`` is (O, I), ``owner`` the module that holds the layer.

    >>> import torch
    >>> [view.name for view in fused("qkv.weight", "attn.qkv", torch.empty(24, 8), None, transposed=False)]
    ['qkv.weight.q', 'qkv.weight.k', 'qkv.weight.v']
    >>> fused("qkv.weight", "attn.qkv", torch.empty(16, 8), None, transposed=False)
    ()
    """
    heights = _heights(layer.rpartition(".")[2].lower(), weight, owner)
    if not heights:
        return ()
    every = sum(heights.values())
    spans = pairwise(accumulate(heights.values(), initial=0))
    return tuple(
        MatrixView(f"{name}.{part}", rows, transposed, every=every if every < len(weight) else None)
        for part, rows in zip(heights, spans, strict=True)
    )


def _heights(name: str, weight: Tensor, owner: nn.Module | None) -> dict[str, int]:
    """Returns the rows of each projection, in order, up to where they come round again; empty where it is one."""
    cls = f"{type(owner).__module__}.{type(owner).__qualname__}"
    num_rows, width = weight.shape
    if cls.endswith(_JOINT):
        return {}
    if cls.endswith(_BY_KEY_HEAD) and name == "in_proj_qkvz":
        key, value = (_number(owner, (n,)) for n in ("head_k_dim", "head_v_dim"))
        values = value * _number(owner, ("num_v_heads",)) // _number(owner, ("num_k_heads",))
        return {"q": key, "k": key, "v": values, "z": values}
    if cls.endswith(_IN_FOURTHS):
        return dict.fromkeys("qvk", num_rows // 12) if name in _NAMES["qkv"] else {}
    if cls.endswith(_BY_HEAD):
        return _of_heads(num_rows, owner, by_key_head=True) if name in (*_NAMES["qkv"], "query_key_value") else {}
    fits = (parts for parts, names in _NAMES.items() if name in names and num_rows == len(parts) * width)
    if parts := next(fits, ""):
        return dict.fromkeys(parts, width)
    if name not in _NAMES["qkv"]:
        return {}
    key, value = (_number(owner, (n,)) for n in ("key_dim", "value_dim"))
    if key and value and num_rows == 2 * key + value:
        return {"q": key, "k": key, "v": value}
    return _of_heads(num_rows, owner, by_key_head=False)


def _of_heads(num_rows: int, owner: nn.Module | None, *, by_key_head: bool) -> dict[str, int]:
    """Returns the rows of queries, keys and values by what their owner says of its heads; empty where that fails."""
    size, num_heads, num_key_heads = (_number(owner, names) for names in (_HEAD_SIZE, _NUM_HEADS, _NUM_KEY_HEADS))
    if by_key_head and not num_heads and size:
        num_heads = num_rows // size // 3  # GPT-NeoX says the size alone
    num_key_heads = num_key_heads or num_heads
    if not size or not num_key_heads or num_rows % size:
        return {}
    num_queries = num_rows // size - 2 * num_key_heads
    if num_queries <= 0 or num_queries % num_key_heads or num_heads not in (0, num_queries):
        return {}
    times = num_key_heads if by_key_head else 1
    queries, keys = num_queries * size // times, num_key_heads * size // times
    return {"q": queries, "k": keys, "v": keys}


def _number(owner: nn.Module | None, names: tuple[str, ...]) -> int:
    """Returns the first whole number that a module holds under one of these names; 0: none."""
    found = (getattr(owner, name, None) for name in names)
    return next((number for number in found if type(number) is int and number > 0), 0)

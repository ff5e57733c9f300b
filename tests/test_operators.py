"""What operators cost: against formulas by hand and torch's own counter, whoever calls them, and never twice."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dstlib.profile import profile

SMALL = st.integers(1, 4)


@dataclass(frozen=True)
class Masks:
    masks: Mapping[str, Tensor] = field(default_factory=dict)


class Calls(nn.Module):
    """A model of one function of its inputs and its raw parameters."""

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.parameters())


def counted(function: Callable[..., Any], *shapes: tuple[int, ...]) -> int:
    """The FLOPs of a function of activations, which with and without storage are the same."""
    result = profile(Calls(function), shapes)
    on_values = profile(Calls(function), tuple(torch.rand(shape) for shape in shapes))
    assert result.flops == on_values.flops
    assert result.uncounted == on_values.uncounted == ()
    return result.flops


# ---- attention


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.zeros(1, 1, k.shape[1])
    return torch.bmm(torch.baddbmm(bias.expand(len(q), q.shape[1], -1), q, k.mT).softmax(-1), v)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2]).tril().bool()
    )


def inferred(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        return functional.scaled_dot_product_attention(q, k, v)


WAYS = [functional.scaled_dot_product_attention, causal, masked, dropped, inferred, explicit, by_einsum, by_bmm]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@given(st.tuples(SMALL, SMALL, SMALL, SMALL, SMALL))
@settings(max_examples=8)
def test_attention_is_two_products_of_the_whole_square(
    way: Callable[..., Tensor], sizes: tuple[int, int, int, int, int]
) -> None:
    batch, heads, num_queries, num_keys, width = (n + 1 for n in sizes)  # einsum writes products over 1 by entry
    flops = counted(
        way,
        (batch, heads, num_queries, width),
        (batch, heads, num_keys, width),
        (batch, heads, num_keys, width),
    )
    assert flops == 2 * (2 * batch * heads * num_queries * num_keys * width)


@given(st.tuples(SMALL, SMALL, SMALL, SMALL))
@settings(max_examples=10)
def test_queries_that_share_keys_pay_for_each_query_head(sizes: tuple[int, int, int, int]) -> None:
    batch, groups, per_group, num = sizes
    shape = (batch, groups, num, 8)

    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert counted(shared, (batch, groups * per_group, num, 8), shape, shape) == (
        2 * (2 * batch * groups * per_group * num * num * 8)
    )


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans())
@settings(max_examples=15)
def test_multihead_attention_is_torchs_own_count(
    batch: int, num: int, heads: int, width: int, is_self: bool, needs_weights: bool
) -> None:
    """Without biases, which torch's counter leaves out; masked, its share of the projections."""
    dim = heads * width
    attention = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True).eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y = x if is_self else y
            output: Tensor = self.attention(x, y, y, need_weights=needs_weights)[0]
            return output

    model, shape = Model(), (batch, num, dim)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model(torch.rand(shape), torch.rand(shape))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    result = profile(model, (shape, shape))
    assert result.flops == counter.get_total_flops() == batch * num * (2 * 4 * dim * dim + 4 * num * dim)
    halved = Masks({"attention.in_proj_weight": torch.arange(3 * dim * dim).view(3 * dim, dim) % 2 == 0})
    num_off = int((~halved.masks["attention.in_proj_weight"]).sum())
    assert (
        result.flops - profile(model.to("meta"), (shape, shape), sparsifier=halved).flops == 2 * batch * num * num_off
    )


def test_the_fast_path_of_a_transformer_layer_hides_nothing() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() == 0  # so that it runs on values
            output: Tensor = self.layer(x)
            return output

    assert profile(Reads(), torch.zeros(2, 5, 8)).flops == profile(layer, (2, 5, 8)).flops


@given(st.tuples(SMALL, SMALL), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
@settings(max_examples=10)
def test_windows_pay_for_their_own_square_alone(windows: tuple[int, int], extent: int, heads: int, width: int) -> None:
    """As in Swin and nnFormer: cut, attended to within each window, and put together."""
    rows, columns = windows

    def attend(x: Tensor) -> Tensor:
        x = x.view(1, rows, extent, columns, extent, heads, width).permute(0, 1, 3, 5, 2, 4, 6)
        q = x.reshape(rows * columns, heads, extent**2, width)
        return explicit(q, q, q)

    flops = counted(attend, (1, rows * extent, columns * extent, heads * width))
    assert flops == rows * columns * heads * 2 * (2 * extent**4 * width)


class Vit(nn.Module):
    """ViT-B/16 as published: 12 blocks of 768 channels and 12 heads, 197 tokens of 224² pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 768))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True), 12)
        self.head = nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1))
        logits: Tensor = self.head(x[:, 0])
        return logits


def test_vit_b_16_is_the_published_one() -> None:
    """17.58 billion multiply-adds in the tables of torchvision's models."""
    with torch.device("meta"):
        result = profile(Vit(), (1, 3, 224, 224))
    tokens, dim = 197, 768
    products = 196 * 768 * dim + 12 * (tokens * 12 * dim * dim + 2 * tokens * tokens * dim) + 1000 * dim
    biases = 196 * dim + 12 * tokens * (3 + 1 + 4 + 1) * dim + 1000
    assert result.flops == 2 * products + biases
    assert round(products / 1e9, 2) == 17.56  # theirs has norms and biases besides
    assert result.uncounted == ("LayerNorm", "Vit")


# ---- weights that functions multiply by


@st.composite
def raw(draw: st.DrawFn) -> tuple[Callable[..., Tensor], tuple[int, ...], Tensor, int]:
    """A function of rows and a raw weight (3, 4), the shape of its rows, the weight, the times each entry is used."""
    before = draw(st.lists(SMALL, min_size=1, max_size=2))
    num, turned = math.prod(before), draw(st.booleans())
    weight = torch.rand((4, 3) if turned else (3, 4))
    ways: list[Callable[..., Tensor]] = [
        lambda x, w: functional.linear(x, w if turned else w.T),
        lambda x, w: x @ (w.T if turned else w),
        lambda x, w: torch.einsum("...i,oi->...o" if turned else "...i,io->...o", x, w),
        lambda x, w: torch.tensordot(x, w, ([-1], [1 if turned else 0])),
        lambda x, w: functional.linear(x, (w if turned else w.T).contiguous().clone() * 0.5),
        lambda x, w: torch.cat([x @ part for part in (w.T if turned else w).split(3, dim=1)], dim=-1),
        lambda x, w: functional.conv1d(x.reshape(-1, 3, 1), (w if turned else w.T)[..., None]),
        lambda x, w: functional.linear(x.double(), (w if turned else w.T).double()),
    ]
    return draw(st.sampled_from(ways)), (*before, 3), weight, num


@given(raw(), st.integers(0, 2**12 - 1))
@settings(max_examples=60)
def test_a_raw_weight_counts_its_active_entries_whatever_multiplies_by_it(
    case: tuple[Callable[..., Tensor], tuple[int, ...], Tensor, int], bits: int
) -> None:
    function, shape, weight, num = case
    model = Calls(function, weight=weight).to("meta")
    mask = torch.tensor([bits >> i & 1 for i in range(12)]).bool().view(weight.shape)
    dense, sparse = profile(model, shape), profile(model, shape, sparsifier=Masks({"weight": mask}))
    (row,) = dense.layers
    assert (row.type, row.flops, dense.uncounted) == ("Calls", 2 * 12 * num, ())
    assert dense.flops_per_entry == {"weight": 2 * num}
    assert sparse.flops == 2 * num * int(mask.sum())


@given(st.integers(2, 4), SMALL, st.data())
@settings(max_examples=20)
def test_experts_count_each_their_active_entries(experts: int, num: int, data: st.DataObject) -> None:
    """All rows meet all experts by one batched product, or those of their own by parts."""
    shares = data.draw(st.lists(st.integers(0, 128), min_size=experts, max_size=experts))
    shape, mask = (experts, 8, 16), torch.arange(128) < torch.tensor(shares)[:, None]
    masks, num_active = Masks({"weight": mask.view(shape)}), sum(shares)
    with torch.device("meta"):
        batched = Calls(lambda x, w: torch.bmm(x.expand(len(w), -1, -1), w), weight=torch.rand(shape))
        of_one = Calls(lambda x, w: x @ w[1], weight=torch.rand(shape))
        grouped = Calls(
            lambda x, w: functional.grouped_mm(x, w, offs=torch.arange(1, len(w) + 1, dtype=torch.int32)),
            weight=torch.rand(shape).bfloat16(),
        )
        chosen = Calls(lambda x, w: torch.bmm(x[:, None], w[torch.arange(len(x))]), weight=torch.rand(shape))
    assert profile(batched, (num, 8), sparsifier=masks).flops == 2 * num * num_active
    assert profile(of_one, (num, 8), sparsifier=masks).flops == 2 * num * shares[1]
    # which rows meet which is not looked at: the mean of what is active
    assert profile(grouped, (num, 8), sparsifier=masks).flops == round(2 * num * num_active / experts)
    assert profile(chosen, (num, 8), sparsifier=masks).flops == round(2 * num * num_active / experts)


def test_a_product_of_two_weights_counts_where_both_are_active() -> None:
    with torch.device("meta"):
        model = Calls(lambda x, a, b: x + (a @ b).sum(), a=torch.rand(2, 3), b=torch.rand(3, 4))
    a, b = torch.eye(2, 3).bool(), torch.ones(3, 4).tril().bool()
    flops = profile(model, (1,), sparsifier=Masks({"a": a, "b": b})).flops
    assert flops == 2 * int((a.double() @ b.double()).sum())


def test_convolutions_by_functions_count_as_layers_do() -> None:
    layers = nn.Sequential(nn.Conv3d(4, 6, 3, groups=2), nn.ConvTranspose3d(6, 4, 2, 2, groups=2)).to("meta")

    def function(x: Tensor, *p: Tensor) -> Tensor:
        return functional.conv_transpose3d(functional.conv3d(x, p[0], p[1], groups=2), p[2], p[3], stride=2, groups=2)

    direct, turned = layers
    raw = Calls(function, a=direct.weight, b=direct.bias, c=turned.weight, d=turned.bias)
    for convention in ("exact", "paper"):
        layered, by_functions = (profile(m, (2, 4, 5, 5, 5), convention=convention) for m in (layers, raw))
        assert layered.flops == by_functions.flops
        assert layered.flops_per_entry["0.weight"] == by_functions.flops_per_entry["a"]
        assert layered.flops_per_entry["1.weight"] == by_functions.flops_per_entry["c"]


@pytest.mark.parametrize("on", ["meta", "cpu"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_count_their_products(kind: type[nn.RNNBase], on: str) -> None:
    model = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) if on == "meta" else self.layer(x * x.max().item())

    result = profile(Reads(), torch.ones(2, 5, 3))
    each = sum(2 * p.numel() if p.ndim == 2 else p.numel() for p in model.parameters())
    assert (result.flops, result.uncounted) == (2 * 5 * each, ())
    assert set(result.flops_per_entry.values()) == {20}


# ---- never twice


class LowRank(nn.Linear):
    """A layer with a correction that its forward multiplies by itself."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.down, self.up = nn.Parameter(torch.zeros(8, 2)), nn.Parameter(torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down @ self.up


class Masked(nn.Linear):
    """A layer whose weight is computed anew."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * (self.weight != 0), self.bias)


@pytest.mark.parametrize(
    ("layer", "flops"),
    [
        (nn.Linear(8, 6), 10 * (2 * 48 + 6)),
        (Masked(8, 6), 10 * (2 * 48 + 6)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), 10 * (2 * 48 + 6)),
        (LowRank(), 10 * (2 * 48 + 6) + 10 * 2 * (16 + 12)),
        (nn.Sequential(nn.Linear(8, 6), nn.Identity()), 10 * (2 * 48 + 6)),
    ],
    ids=["plain", "masked", "normalised", "with low rank", "inside"],
)
def test_what_a_layer_does_inside_counts_once(layer: nn.Module, flops: int) -> None:
    """Of rows that lie apart too, which torch multiplies in another way."""
    assert profile(layer, (2, 5, 8)).flops == flops

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Any:
            return self.layer(x.transpose(0, 1))

    assert profile(Apart(), (5, 2, 8)).flops == flops


def test_a_failed_call_within_a_forward_leaves_the_others_where_they_are() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Fails()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.first(x)
            except ValueError:
                return x @ x.mT

    (row,) = profile(nn.Sequential(Tries()), (3, 2)).layers
    assert (row.name, row.flops) == ("0", 2 * 3 * 3 * 2)


# ---- sampling, and what is left out


@given(st.tuples(SMALL, SMALL, SMALL, SMALL), st.sampled_from([2, 3]), st.sampled_from(["bilinear", "nearest"]))
@settings(max_examples=20)
def test_a_sample_costs_its_taps(sizes: tuple[int, int, int, int], dims: int, mode: str) -> None:
    batch, channels, extent, num = sizes
    grid = (batch, *(1,) * (dims - 1), num, dims)

    def sample(x: Tensor, grid: Tensor) -> Tensor:
        return functional.grid_sample(x, grid, mode=mode, align_corners=False)

    taps = {"bilinear": 2**dims, "nearest": 0}[mode]
    assert counted(sample, (batch, channels, *(extent,) * dims), grid) == 2 * taps * batch * channels * num


def test_the_sampler_of_cudnn_costs_its_taps_though_it_names_no_mode() -> None:
    """What a GPU calls for 2D images whose corners are aligned; here the CPU stands in."""

    def of_cpu(x: Tensor, grid: Tensor) -> Tensor:
        return torch.grid_sampler_2d(x, grid, 0, 0, True)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_grid_sampler", of_cpu, "CPU")
        result = profile(Calls(torch.ops.aten.cudnn_grid_sampler), (torch.rand(2, 3, 4, 5), torch.rand(2, 6, 7, 2)))
    assert (result.flops, result.uncounted) == (2 * 4 * 2 * 3 * 6 * 7, ())


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.fft.rfft(x).real, "aten::_fft_r2c"),
        (lambda x: torch.cdist(x, x), "aten::_cdist_forward"),
        (torch.linalg.inv, "aten::linalg_inv_ex"),
        (lambda x: functional.bilinear(x, x, torch.ones(2, 4, 4)), "aten::_trilinear"),
    ],
    ids=["fft", "distances", "inverse", "bilinear"],
)
def test_products_that_are_not_counted_are_named(function: Callable[[Tensor], Tensor], named: str) -> None:
    result = profile(Calls(function), (3, 4, 4))
    assert (result.flops, result.uncounted) == (0, (named,))


def test_products_of_tensors_that_are_not_dense_are_named() -> None:
    result = profile(Calls(lambda x: torch.sparse.mm((x * x.max().item()).to_sparse(), x)), torch.eye(4))
    assert (result.flops, result.uncounted) == (0, ("aten::_sparse_addmm",))


def test_what_is_done_entry_by_entry_is_free_and_its_parameters_are_named() -> None:
    """As the scan of a state-space model: its projections count, its decay is named."""

    def scan(x: Tensor, decay: Tensor, out: Tensor) -> Tensor:
        state = x[:, 0]
        for i in range(x.shape[1]):
            state = state * decay + x[:, i]
        return state @ out

    result = profile(Calls(scan, decay=torch.rand(4), out=torch.rand(4, 3)), (2, 5, 4))
    assert (result.flops, result.uncounted) == (2 * 2 * 4 * 3, ("Calls.decay",))

"""Attention and recurrent layers in compact storage: outputs, gradients and masks are those of the plain layers.

Trained in float64, in which the order of sums moves no score past another.
"""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import dstlib
from dstlib import masking
from dstlib.engine.layers.compact import make_compact
from dstlib.engine.layers.compact_attention import CompactMultiheadAttention, PackedPattern
from dstlib.engine.layers.compact_layer import CompactLayer
from dstlib.errors import InputError
from dstlib.export import load_compact, save_compact
from dstlib.schedules import Constant
from dstlib.targets import held_weights

KINDS = nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase
# kernels and torch add up in other orders, over at most some hundred float32 products of size 1
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def twins(plain: nn.Module, share: float = 0.4, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Returns a plain model with zeros, and the same with all weights compact."""
    generator, compact = torch.Generator().manual_seed(seed), copy.deepcopy(plain)
    around = {id(child): [parent] for parent in compact.modules() for child in parent.children()}
    for name, module in list(compact.named_modules()):
        if not isinstance(module, KINDS):
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is None or "weight" not in key:
                continue
            mask = torch.rand(parameter.shape, generator=generator) < share
            with torch.no_grad():
                plain.get_parameter(f"{name}.{key}" if name else key).mul_(mask)
            make_compact(module, mask.flatten().nonzero().flatten(), key, around.get(id(module), []))
    return plain, compact


def assert_alike(plain: nn.Module, compact: nn.Module, call: Callable[[nn.Module], Tensor]) -> None:
    """Compares outputs, and the gradients of all that there is in compact storage."""
    expected, found = call(plain), call(compact)
    torch.testing.assert_close(found, expected, **CLOSE)
    for output in (expected, found):
        (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).nan_to_num().sum().backward()
    held = held_weights(compact)
    assert held
    for name, parameter in compact.named_parameters():
        whole = plain.get_parameter(name).grad
        wanted = whole.flatten()[held[name].places()] if name in held else whole
        torch.testing.assert_close(parameter.grad, wanted, **CLOSE)


# attention

MHA = {
    "batch first": {"batch_first": True},
    "sequences first": {},
    "without biases": {"bias": False},
    "keys and values that are added": {"add_bias_kv": True, "add_zero_attn": True},
    "keys and values of other sizes": {"kdim": 6, "vdim": 10, "batch_first": True},
}


def texts(num: int, length: int, width: int, options: dict, seed: int = 1) -> Tensor:
    x = torch.randn(num, length, width, generator=torch.Generator().manual_seed(seed))
    return x if options.get("batch_first") else x.transpose(0, 1)


@pytest.mark.parametrize("options", MHA.values(), ids=MHA)
@pytest.mark.parametrize("masked", ["no mask", "causal", "padding", "both, by numbers", "of each head"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_is_that_of_the_plain_layer(options, masked, need_weights):
    torch.manual_seed(0)
    plain, compact = twins(nn.MultiheadAttention(8, 2, **options))
    q = texts(3, 5, 8, options)
    k, v = texts(3, 4, options.get("kdim", 8), options, 2), texts(3, 4, options.get("vdim", 8), options, 3)
    hidden = torch.ones(5, 4).triu(1).bool()
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, False, False, True]])
    given = {
        "no mask": {},
        "causal": {"attn_mask": hidden, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both, by numbers": {"attn_mask": hidden * -2.0, "key_padding_mask": padding * -3.0},
        "of each head": {"attn_mask": hidden.expand(6, 5, 4)},
    }[masked]
    for average in (True, False):
        _, expected = plain(q, k, v, need_weights=need_weights, average_attn_weights=average, **given)
        _, found = compact(q, k, v, need_weights=need_weights, average_attn_weights=average, **given)
        assert (found is None) == (expected is None) == (not need_weights)
        if found is not None:
            torch.testing.assert_close(found, expected, **CLOSE)
    # without weights torch goes by the hint alone, which hides the keys that a layer adds
    by_hint = "is_causal" in given and "add_bias_kv" in options
    assert_alike(
        plain,
        compact,
        lambda layer: layer(q, k, v, need_weights=need_weights or (by_hint and layer is plain), **given)[0],
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_sequence_without_a_batch_and_attention_to_itself(batch_first):
    torch.manual_seed(0)
    plain, compact = twins(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    x, padding = torch.randn(5, 8), torch.tensor([False, False, True, False, True])
    for need_weights in (True, False):
        for model in (plain, compact):
            model.zero_grad()
        assert_alike(plain, compact, lambda m, w=need_weights: m(x, x, x, key_padding_mask=padding, need_weights=w)[0])
    expected, found = (m(x, x, x)[1] for m in (plain, compact))
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_what_the_plain_layer_draws(need_weights):
    torch.manual_seed(0)
    plain, compact = twins(nn.MultiheadAttention(8, 2, dropout=0.5))
    x, found = torch.randn(5, 3, 8), []
    for layer in (plain, compact):
        torch.manual_seed(7)
        found.append(layer(x, x, x, need_weights=need_weights)[0])
    torch.testing.assert_close(found[1], found[0], **CLOSE)
    assert not torch.equal(compact.eval()(x, x, x)[0], found[1])


def test_masks_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    _, compact = twins(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(3, 5, 8)
    with pytest.raises(InputError, match=r"attn_mask .*\(5, 5\) or \(6, 5, 5\), got torch.bool of \(1, 5\)"):
        compact(x, x, x, attn_mask=torch.ones(1, 5).bool())
    with pytest.raises(InputError, match=r"key_padding_mask .*\(3, 5\), got torch.int64 of \(3, 5\)"):
        compact(x, x, x, key_padding_mask=torch.ones(3, 5).long())
    with pytest.raises(InputError, match="a mask beside is_causal"):
        compact(x, x, x, is_causal=True)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([0.0, 0.2, 1.0]))
@examples(40, 400)
def test_a_packed_pattern_numbers_its_values_behind_one_another(outputs, inputs, seed, share):
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(3 * outputs, inputs, generator=rng) < share
    at = mask.flatten().nonzero().flatten()
    pattern = PackedPattern.of(at, (3 * outputs, inputs), 3)
    places, order = pattern.rising()
    assert pattern.num_active == len(at) == sum(pattern.sizes)
    assert torch.equal(places.long(), at)
    assert torch.equal(pattern.places()[order.long()].long(), at)


# transformers


def encoder(norm_first: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("include", ["*.linear?.weight", "*.self_attn.*", "*.in_proj_weight", "*"])
def test_encoders_take_no_fused_path_past_compact_layers(norm_first, include):
    model = encoder(norm_first)
    sparsifier = dstlib.sparsify(
        model, sparsity=0.5, method="static", storage="compact", include=include, keep_neurons=()
    )
    plain = encoder(norm_first)
    plain.load_state_dict(sparsifier.dense_state_dict())
    x, padding = torch.randn(3, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    notes = {row.name: row.note for row in sparsifier.summary().rows if row.note.startswith("sparse")}
    assert notes
    assert set(notes.values()) == {"sparse, compact"}
    for padded in (None, padding):
        for train in (True, False):
            expected, found = (m.train(train)(x, src_key_padding_mask=padded) for m in (plain, model))
            seen = torch.ones(3, 5).bool() if padded is None else ~padded
            torch.testing.assert_close(found[seen], expected[seen], **CLOSE)
            with torch.no_grad():
                expected, found = (m.train(train)(x, src_key_padding_mask=padded) for m in (plain, model))
            torch.testing.assert_close(found[seen], expected[seen], **CLOSE)


def test_a_transformer_of_two_stacks_computes_as_the_plain_one():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True)
    sparsifier = dstlib.sparsify(model, sparsity=0.6, method="static", storage="compact", keep_neurons=())
    assert all(row.note in ("sparse, compact", "sparse (full)") for row in sparsifier.summary().rows)
    plain = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True)
    plain.load_state_dict(sparsifier.dense_state_dict())
    x, y = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    expected, found = (m(x, y, tgt_mask=causal, tgt_is_causal=True) for m in (plain, model))
    torch.testing.assert_close(found, expected, **CLOSE)


class Own(nn.MultiheadAttention):
    """A user's attention, which may read its weights in any way."""


def test_attention_of_a_class_of_its_own_stays_masked():
    model = encoder()
    model.layers[1].self_attn = Own(8, 2, batch_first=True)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static", storage="compact", keep_neurons=())
    notes = {row.name: row.note for row in sparsifier.summary().rows}
    assert notes["layers.0.self_attn.out_proj.weight"] == "sparse, compact"
    assert notes["layers.1.self_attn.in_proj_weight"] == "sparse, masked: it belongs to a Own"
    assert notes["layers.1.self_attn.out_proj.weight"] == "sparse, masked: its Own reads the weight by itself"
    assert notes["layers.1.linear1.weight"] == (
        "sparse, masked: its TransformerEncoderLayer reads the weight by itself"
    )
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        model.eval()(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 4 + [True]]))


# recurrent layers

RECURRENT = {
    "LSTM": lambda **options: nn.LSTM(6, 8, **options),
    "LSTM, projected": lambda **options: nn.LSTM(6, 8, proj_size=5, **options),
    "GRU": lambda **options: nn.GRU(6, 8, **options),
    "RNN": lambda **options: nn.RNN(6, 8, **options),
    "RNN, rectified": lambda **options: nn.RNN(6, 8, nonlinearity="relu", **options),
}
STACKS = {
    "one": {},
    "two, no biases": {"num_layers": 2, "bias": False},
    "both ways": {"bidirectional": True, "batch_first": True},
    "two, both ways": {"num_layers": 2, "bidirectional": True},
}


def first_state(layer: nn.RNNBase, *batch: int) -> object:
    rng = torch.Generator().manual_seed(5)
    num = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or layer.hidden_size, *([layer.hidden_size] if layer.mode == "LSTM" else [])]
    states = tuple(torch.randn(num, *batch, size, generator=rng) for size in sizes)
    return states if layer.mode == "LSTM" else states[0]


def flat(found: object) -> Tensor:
    """Joins all that a recurrent layer returns."""
    if isinstance(found, PackedSequence):
        return found.data.flatten()
    return torch.cat([flat(each) for each in found]) if isinstance(found, tuple) else found.flatten()


@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
@pytest.mark.parametrize("options", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("given", ["a batch", "states", "one sequence", "sorted lengths", "lengths in any order"])
def test_recurrent_layers_are_the_plain_ones(make, options, given):
    torch.manual_seed(0)
    plain, compact = twins(make(**options))
    rng = torch.Generator().manual_seed(1)
    x, state = torch.randn(4, 3, 6, generator=rng), None
    x = x.transpose(0, 1) if options.get("batch_first") else x
    if given == "states":
        state = first_state(plain, 3)
    elif given == "one sequence":
        x, state = torch.randn(4, 6, generator=rng), first_state(plain)
    elif given == "sorted lengths":
        x = pack_padded_sequence(torch.randn(5, 3, 6, generator=rng), torch.tensor([5, 2, 2]))
    elif given == "lengths in any order":
        x = pack_sequence([torch.randn(n, 6, generator=rng) for n in (2, 4, 1)], enforce_sorted=False)
        state = first_state(plain, 3)
    expected, found = plain(x, state), compact(x, state)
    assert type(found[0]) is type(expected[0])
    assert [s.shape for s in found[1]] == [s.shape for s in expected[1]]
    assert_alike(plain, compact, lambda layer: flat(layer(x, state)))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [False, True])
def test_cells_are_the_plain_ones(kind, bias):
    torch.manual_seed(0)
    plain, compact = twins(kind(6, 8, bias=bias))
    x, h = torch.randn(3, 6), torch.randn(3, 8)
    state = (h, h * 0.5) if kind is nn.LSTMCell else h
    alone = (h[0], h[1]) if kind is nn.LSTMCell else h[0]
    for call in (lambda m: flat(m(x, state)), lambda m: flat(m(x)), lambda m: flat(m(x[0], alone))):
        plain.zero_grad()
        compact.zero_grad()
        assert_alike(plain, compact, call)


def test_dropout_between_layers_draws_what_the_plain_layer_draws():
    torch.manual_seed(0)
    plain, compact = twins(nn.GRU(6, 8, num_layers=2, dropout=0.5))
    x, found = torch.randn(4, 3, 6), []
    for layer in (plain, compact):
        torch.manual_seed(7)
        found.append(layer(x)[0])
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_states_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    _, compact = twins(nn.LSTM(6, 8))
    with pytest.raises(
        InputError, match=r"hx of a CompactLSTM: expected states of shapes \[\(1, 3, 8\), \(1, 3, 8\)\]"
    ):
        compact(torch.randn(4, 3, 6), (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_take_what_the_plain_ones_do(kind):
    """States of as many samples, and one axis or two."""
    plain, compact = twins(kind(8, 6))
    for layer in (plain, compact):
        for size in ((6, 3), (18,), (3, 1, 6)):
            state = torch.zeros(size)
            with pytest.raises((InputError, ValueError, RuntimeError), match=r"hx|hidden|batch|imension"):
                layer(torch.randn(3, 8), (state, state) if kind is nn.LSTMCell else state)
        with pytest.raises((InputError, ValueError, RuntimeError), match=r"axes|imension|1D or 2D"):
            layer(torch.randn(1, 2, 8))


def test_attention_takes_sequences_of_one_batch():
    plain, compact = twins(nn.MultiheadAttention(8, 2))
    query, key = torch.randn(5, 3, 8), torch.randn(5, 1, 8)
    with pytest.raises((AssertionError, RuntimeError)):
        plain(query, key, key)
    with pytest.raises(InputError, match=r"query, key and value .* of one batch, .* \(5, 3, 8\), \(5, 1, 8\)"):
        compact(query, key, key)


@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_behind_attention_draws_what_it_draws_behind_the_plain_layer(batch_first):
    """Random numbers fill a tensor in the order in which it lies in memory."""
    torch.manual_seed(0)
    plain, compact = twins(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=batch_first))
    x, found = torch.randn(5, 3, 8), []
    for layer in (plain, compact):
        torch.manual_seed(7)
        found.append(layer(x))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_weights_are_not_put_side_by_side_for_cudnn():
    """As moving the plain layer to a GPU does, with matrices that do not exist here."""
    _, compact = twins(nn.LSTM(8, 6))
    assert type(compact).flatten_parameters is not nn.RNNBase.flatten_parameters


# training


class Reader(nn.Module):
    """Reads texts: attention to themselves and to others, and a recurrent layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.others = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.tail = nn.LSTM(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(x)
        y = self.others(y, x[..., :6], x[..., 2:])[0]
        y, (_, c) = self.tail(y)
        return self.head(self.cell(y[:, -1], self.cell(y[:, 0], c[0])))


GATES = {"tail": ("ih_l0", "hh_l0"), "cell": ("ih", "hh")}


def life(storage: str, name: str, granularity: masking.Granularity, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    model = Reader().to(dtype)
    method = replace(dstlib.METHODS[name], interval=2, stop=1.0, granularity=granularity)
    method = replace(method, drop_fraction=Constant(0.5))
    recurrent = [f"{layer}.weight_{way}" for layer, ways in GATES.items() for way in ways]
    sparsifier = dstlib.sparsify(
        model,
        sparsity=0.6,
        method=method,
        total_steps=40,
        seed=3,
        storage=storage,
        include=["*", *recurrent],
        exclude="head.*",
    )
    # Adam would divide gradients that are nothing but rounding, as those of the keys' biases, by their own size
    optimizer = torch.optim.SGD(model.parameters(), 3e-2, momentum=0.5)
    return model, sparsifier, optimizer


def go_on(model: nn.Module, sparsifier: dstlib.Sparsifier, optimizer: torch.optim.Optimizer, steps: range):
    seen = []
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        x = torch.randn(4, 5, 8, generator=rng, dtype=torch.float64).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        seen.append((float(loss.detach()), {key: mask.clone() for key, mask in sparsifier.masks.items()}))
    return seen


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("rigl", masking.Element()),
        ("set", masking.Element()),
        ("rigl", masking.Block(2, 2)),
        ("rigl", masking.FanIn()),
    ],
    ids=["by gradient", "by chance", "blocks", "fan-in"],
)
def test_masks_and_losses_are_those_of_masked_storage(name, granularity):
    masked, compact = (life(storage, name, granularity) for storage in ("masked", "compact"))
    notes = {row.name: row.note for row in compact[1].summary().rows if row.note.startswith("sparse,")}
    assert set(notes.values()) == {"sparse, compact"}
    assert len(notes) == 2 + 2 + 4 + 2 + 2  # of Reader's layers, one after the other
    expected, found = go_on(*masked, range(9)), go_on(*compact, range(9))
    for (loss, masks), (its_loss, its_masks) in zip(expected, found, strict=True):
        assert its_loss == pytest.approx(loss, rel=1e-9)
        assert masks.keys() == its_masks.keys()
        assert all(torch.equal(mask, its_masks[key]) for key, mask in masks.items())
    for key in ("own.self_attn.in_proj_weight", "others.k_proj_weight", "tail.weight_hh_l0", "cell.weight_ih"):
        assert not torch.equal(expected[0][1][key], expected[-1][1][key])


def test_a_run_resumes_bit_for_bit_and_goes_on_in_masked_storage():
    model, sparsifier, optimizer = life("compact", "rigl", masking.Element())
    go_on(model, sparsifier, optimizer, range(3))
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, sparsifier, optimizer)], file)
    dense = {key: x.clone() for key, x in sparsifier.dense_state_dict().items()}
    expected = go_on(model, sparsifier, optimizer, range(3, 7))
    file.seek(0)
    again = life("compact", "rigl", masking.Element())
    for each, state in zip(again, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    found = go_on(*again, range(3, 7))
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert all(
        torch.equal(masks[key], mask)
        for (_, masks), (_, now) in zip(found, expected, strict=True)
        for key, mask in now.items()
    )
    other, same = life("masked", "rigl", masking.Element()), life("compact", "rigl", masking.Element())[0]
    other[0].load_state_dict(dense)
    same.load_state_dict(dense)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(same(x), other[0](x))


def test_copies_and_files_are_as_of_other_compact_models(tmp_path):
    model, sparsifier, optimizer = life("compact", "rigl", masking.Element(), torch.float32)
    go_on(model, sparsifier, optimizer, range(3))
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), expected)
        save_compact(model, tmp_path / "a.safetensors", sparsifier=sparsifier)
        plain = Reader()
        plain.load_state_dict(sparsifier.dense_state_dict())
        save_compact(plain, tmp_path / "b.safetensors", sparsifier=sparsifier)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        other = life("compact", "rigl", masking.Element(), torch.float32)[0]
        load_compact(tmp_path / "a.safetensors", other)
        assert torch.equal(other(x), expected)
    costs = [dstlib.profile(m, (2, 5, 8), sparsifier=sparsifier) for m in (model, plain)]
    assert costs[0] == costs[1]


def test_layers_without_data_are_initialised_as_when_they_are_made():
    with torch.device("meta"):
        model = nn.Sequential(nn.MultiheadAttention(64, 2))
    dstlib.sparsify(model, sparsity=0.5, method="static", storage="compact", keep_neurons=())
    attention = model[0]
    assert isinstance(attention, CompactMultiheadAttention)
    assert isinstance(attention.out_proj, CompactLayer)
    assert not attention.out_proj.bias.any()
    assert not attention.in_proj_bias.any()
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier's, of the packed matrix
    assert 0.9 * bound < float(attention.in_proj_weight.abs().max()) <= bound


@pytest.mark.parametrize("made", ["export", "trace", "compile"])
def test_programs_made_of_them_compute_the_same(made):
    model = life("compact", "rigl", masking.Element(), torch.float32)[0]
    x = torch.randn(2, 5, 8)
    program = {
        "export": lambda: torch.export.export(model, (x,)).module(),
        "trace": lambda: torch.jit.trace(model, x),
        "compile": lambda: torch.compile(model, backend="aot_eager"),
    }[made]()
    torch.testing.assert_close(program(x), model(x), **CLOSE)


def test_a_second_start_of_values_of_one_axis_is_told_how_to_begin():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    dstlib.sparsify(model, sparsity=0.5, method="static", storage="compact", keep_neurons=())
    with pytest.raises(
        dstlib.SelectionError, match=r"0\.weight: sparse already, in compact storage; to begin anew, load"
    ):
        dstlib.sparsify(model, sparsity=0.5, method="static")

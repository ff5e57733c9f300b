"""Wanda, RIA and SparseGPT against their definitions, written down in NumPy, and what they look at."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_zero_outside, batch, small, units_of
from torch import nn

import dstlib
from dstlib import NM, Block, Channel, Element, FanIn, Kernel, ScoreError, SettingError
from dstlib.at_init import ria, sparsegpt, wanda
from dstlib.masking import best_units, magnitude, prune_by_surgeon
from dstlib.methods import SRSTE
from dstlib.targets import MatrixView, moments_in_turn
from dstlib.targets.products import Products

MAKERS = (wanda, ria, sparsegpt)


def sparse(model, init, sparsity=0.5, **settings):
    granularity = settings.pop("granularity", Element())
    method = replace(dstlib.STATIC, init=init, distribution=dstlib.uniform, granularity=granularity)
    return dstlib.sparsify(model, sparsity=sparsity, method=method, **settings)


def net(seed=0, sizes=(12, 16, 10)):
    torch.manual_seed(seed)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():  # inputs that are alike, as real ones are, so that some can make up for others
        mix = torch.eye(sizes[0]) + 0.5 * torch.randn(sizes[0], sizes[0])
    return model, [torch.randn(20, sizes[0]) @ mix for _ in range(3)]


def in_numpy(model, batches, score, num_kept_of):
    """Prunes the linear layers of a sequence one after the other; returns their masks."""
    x = np.concatenate([b.double().numpy() for b in batches])
    masks = []
    for layer in model:
        if not isinstance(layer, nn.Linear):
            x = np.maximum(x, 0)
            continue
        w = layer.weight.detach().double().numpy()
        mask = num_kept_of(score(np.abs(w), np.linalg.norm(x, axis=0)))
        masks.append(mask)
        x = x @ (w * mask).T + layer.bias.detach().double().numpy()
    return masks


def best_of_rows(score, num):
    return np.argsort(np.argsort(-score, axis=1), axis=1) < num


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.25, 0.5, 0.75]))
def test_wanda_keeps_the_largest_weights_times_norms_of_each_output(seed, sparsity):
    model, batches = net(seed, sizes=(12, 16, 8, 4))
    dense = [p.detach().clone() for p in model.parameters()]
    num = {12: round(12 * (1 - sparsity)), 16: round(16 * (1 - sparsity)), 8: round(8 * (1 - sparsity))}
    expected = in_numpy(model, batches, lambda w, norm: w * norm, lambda s: best_of_rows(s, num[s.shape[1]]))
    masks = sparse(model, wanda(model, batches), sparsity).masks
    for mask, reference in zip(masks.values(), expected, strict=True):
        assert np.array_equal(mask.numpy(), reference)
    for now, before, mask in zip(
        model.parameters(), dense, [m for x in masks.values() for m in (x, True)], strict=True
    ):
        assert torch.equal(now, before * mask), "the weights within the masks keep their bits"


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_ria_keeps_the_largest_shares_times_powers_of_norms_of_a_layer(seed, power):
    model, batches = net(seed)

    def score(w, norm):
        return (w / w.sum(axis=0) + w / w.sum(axis=1, keepdims=True)) * norm**power

    def best(s):
        return (np.argsort(np.argsort(-s.ravel())) < s.size // 2).reshape(s.shape)

    expected = in_numpy(model, batches, score, best)
    for mask, reference in zip(sparse(model, ria(model, batches, power=power)).masks.values(), expected, strict=True):
        assert np.array_equal(mask.numpy(), reference)


# Optimal Brain Surgeon


def surgeon_by_inverses(w, h, choose, damping, width):
    """Clears columns from the left, each by the inverse of what is left of the Hessian, written out (slow)."""
    w, mask = w.copy(), np.zeros(w.shape, bool)
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    for start in range(0, w.shape[1], width):
        stop = min(start + width, w.shape[1])
        price = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(start, stop)])
        mask[:, start:stop] = choose(w[:, start:stop] ** 2 / price)
        for j in range(start, stop):
            inverse = np.linalg.inv(h[j:, j:])
            error = np.where(mask[:, j], 0, w[:, j]) / inverse[0, 0]
            w[:, j:] -= error[:, None] * inverse[0]
    return mask, w * mask


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.sampled_from([0.01, 0.1]))
def test_sparsegpt_is_optimal_brain_surgeon_column_by_column(seed, width, damping):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(60, 32)) @ rng.normal(size=(32, 32)), rng.normal(size=(6, 32))
    h = x.T @ x

    def half(price):
        return (np.argsort(np.argsort(-price.ravel())) < price.size // 2).reshape(price.shape)

    mask, expected = surgeon_by_inverses(w, h, half, damping, width)
    found, weight = prune_by_surgeon(
        torch.tensor(w), torch.tensor(h)[None], Element(), 96, damping=damping, block_size=width
    )
    assert np.array_equal(found.numpy(), mask)
    # double precision, and Hessians of a condition of 1e4 at most, as they are damped: 1e-16 · 1e4 · 32 steps
    assert np.allclose(weight.numpy(), expected, rtol=0, atol=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_sparsegpt_chooses_2_of_4_when_it_comes_to_them(seed):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(40, 16)) @ rng.normal(size=(16, 16)), rng.normal(size=(6, 16))
    mask, expected = surgeon_by_inverses(w, x.T @ x, lambda p: best_of_rows(p, 2), 0.01, 4)
    found, weight = prune_by_surgeon(
        torch.tensor(w), torch.tensor(x.T @ x)[None], NM(2, 4), 2, damping=0.01, block_size=128
    )
    assert np.array_equal(found.numpy(), mask)
    assert np.allclose(weight.numpy(), expected, rtol=0, atol=1e-9)  # as above


def test_a_lone_weight_is_made_up_for_as_least_squares_would():
    """In each row the first of four goes, and nothing lies to its left: the repair is the best there is."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 4)), rng.normal(size=(3, 4))
    w[:, 0] = 1e-3
    mask, weight = prune_by_surgeon(
        torch.tensor(w), torch.tensor(x.T @ x)[None], NM(3, 4), 3, damping=1e-12, block_size=4
    )
    assert mask[:, 1:].all()
    assert not mask[:, 0].any()
    best = np.linalg.lstsq(x[:, 1:], x @ w.T, rcond=None)[0].T
    assert np.allclose(weight[:, 1:].numpy(), best, rtol=0, atol=1e-9)  # the damping's 1e-12, and double precision


@pytest.mark.parametrize("granularity", [Element(), NM(2, 4), FanIn(), Block(2, 2)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_the_output_suffers_least_from_sparsegpt_then_wanda_then_magnitude(granularity, sparsity):
    """In sum over ten random layers whose inputs are alike; at each granularity that has the sparsity."""
    if isinstance(granularity, NM) and sparsity != 0.5:
        granularity = NM(1, 4)
    errors = {"sparsegpt": 0.0, "wanda": 0.0, "magnitude": 0.0}
    for seed in range(10):
        for name in errors:
            torch.manual_seed(seed)
            layer = nn.Linear(64, 16)
            x = torch.randn(200, 64) @ torch.randn(64, 64) * torch.rand(64)
            y = layer(x)
            inits = {"sparsegpt": sparsegpt(layer, [x]), "wanda": wanda(layer, [x]), "magnitude": magnitude}
            sparse(layer, inits[name], sparsity, granularity=granularity)
            errors[name] += float((layer(x) - y).square().mean().detach())
    assert errors["sparsegpt"] < 0.9 * errors["wanda"]
    assert errors["wanda"] < 0.9 * errors["magnitude"]


# What they look at


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("granularity", "sparsity"),
    [(Element(), 0.7), (Kernel(), 0.6), (FanIn(), 0.5), (NM(1, 2), 0.5), (Block(2, 2), 0.5), (Channel(), 0.5)],
    ids=str,
)
def test_counts_are_exact_at_every_granularity(make, granularity, sparsity):
    """Of a convolution, a transposed one and a linear layer; in blocks of as few columns as whole units allow."""
    model, settings = small(), {"granularity": granularity, "exclude": "head" if granularity == Block(2, 2) else ()}
    plain = sparse(small(), magnitude, sparsity, **settings)
    init = make(model, [batch(0)[0]], **{"block_size": 1} if make is sparsegpt else {})
    found = sparse(model, init, sparsity, **settings)
    assert [int(m.sum()) for m in found.masks.values()] == [int(m.sum()) for m in plain.masks.values()]
    units_of(found)
    assert_zero_outside(model, found.masks)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(6, 8, 3, stride=2, padding=1), (4, 6, 9)),
        (nn.Conv2d(6, 8, (2, 3), groups=2, padding="same", padding_mode="circular"), (4, 6, 5, 5)),
        (nn.Conv3d(4, 6, (1, 3, 2), dilation=(1, 1, 2)), (2, 4, 3, 5, 5)),
        (nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1), (3, 6, 4, 4)),
        (nn.ConvTranspose1d(6, 8, 3, groups=2), (3, 6, 5)),
        (nn.Linear(6, 4), (3, 2, 6)),
        (nn.Linear(6, 4), (1, 6)),
    ],
    ids=str,
)
def test_inputs_times_weights_are_the_outputs(layer, shape):
    """The moments are those of what is multiplied: wᵀ·M·w is what an output's squares add up to."""
    torch.manual_seed(0)
    layer = layer.double()
    nn.init.zeros_(layer.bias)
    x = torch.randn(shape, dtype=torch.float64)
    weight = dstlib.sparsify(layer, sparsity=0, method="static", include="weight").weights[0]
    matrices = {view.name: view.parts(layer.weight.detach()) for view in weight.views}
    [(_, moments)] = moments_in_turn(lambda: layer(x), {"weight": matrices}, is_full=True, where="here")
    [(_, squares)] = moments_in_turn(lambda: layer(x), {"weight": matrices}, is_full=False, where="here")
    sums = []
    for name, matrix in matrices.items():
        w_PRN = matrix.reshape(len(moments[name]), -1, moments[name].shape[-1])
        sums.append(torch.einsum("prn,pnm,prm->pr", w_PRN, moments[name], w_PRN).flatten())
        assert torch.allclose(moments[name].diagonal(dim1=1, dim2=2), squares[name], rtol=1e-12)
    y = layer(x)
    y = y.movedim(1, -1) if isinstance(layer, nn.modules.conv._ConvNd) else y
    assert torch.allclose(torch.cat(sums), y.detach().square().flatten(0, -2).sum(dim=0), rtol=1e-10)


def test_rows_of_a_fused_weight_are_seen_whichever_they_are():
    """Three matrices whose rows alternate, two at a time, of a weight of which others hold the first and last rows."""
    weight = torch.randn(12, 5)
    alternating = {n: MatrixView(n, (i, i + 2), every=6).parts(weight) for n, i in (("q", 0), ("k", 2), ("v", 4))}
    chunks = {"first": weight[:6], "last": weight[6:]}
    others = {"columns": weight[:, :3], "turned": weight.T, "elsewhere": weight.clone()}
    seen = []
    with Products(alternating | chunks | others, lambda names, inputs: seen.append(names)):
        nn.functional.linear(torch.randn(3, 5), weight)
    assert seen == [["q", "k", "v", "first", "last"]]


class Mixture(nn.Module):
    """Two experts in raw parameters, one each way round; tokens go to the one by the sign of their first number."""

    def __init__(self, num_experts=2):
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, 8, 6))
        self.down = nn.Parameter(torch.randn(num_experts, 8, 6))

    def forward(self, x):
        y = torch.zeros_like(x)
        for expert, chosen in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
            y[chosen] = nn.functional.linear(x[chosen], self.up[expert]).relu() @ self.down[expert]
        return y


@pytest.mark.parametrize("make", MAKERS)
def test_stacked_experts_are_seen_each_by_its_own_tokens(make):
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(60, 6)
    before = model.up.detach().clone()
    init = make(model, [x])
    masks = sparse(model, init, include=["up", "down"], axes={"up": "e o i", "down": "e i o"}).masks
    assert [int(m.sum()) for m in (*masks["up"], *masks["down"])] == [24] * 4
    for expert, chosen in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
        alone = nn.Linear(6, 8, bias=False)
        alone.weight.data.copy_(before[expert])
        alone_init = make(alone, [x[chosen]])
        assert torch.equal(sparse(alone, alone_init).masks["weight"], masks["up"][expert])


@pytest.mark.parametrize("make", MAKERS)
def test_attention_is_seen_in_its_projections_and_fused_ones_part_by_part(make):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    was_fast = torch.backends.mha.get_fastpath_enabled()
    found = sparse(attention, make(attention, [(x, x, x)]))
    assert [int(m.sum()) for m in found.masks.values()] == [96, 32]
    assert [int(part.sum()) for part in found.masks["in_proj_weight"].chunk(3)] == [32] * 3
    assert torch.backends.mha.get_fastpath_enabled() == was_fast
    others = nn.MultiheadAttention(8, 2, batch_first=True)  # keys and values of another place
    sparse(others, make(others, [{"query": x, "key": x + 1, "value": x - 1}]))


@pytest.mark.parametrize("make", MAKERS)
def test_each_weight_is_seen_as_it_is_fed_once_those_before_it_are_pruned(make):
    model, batches = net()
    sparse(model, make(model, batches))
    again, _ = net()
    sparse(again, make(again, batches), include="0")
    tail = sparse(again, make(again, batches), include="2")
    assert torch.equal(again[2].weight, model[2].weight)
    first, _ = net()
    assert not torch.equal(sparse(first, make(first, batches), include="2").masks["2.weight"], tail.masks["2.weight"])


@pytest.mark.parametrize("make", MAKERS)
def test_the_order_is_that_of_the_forward_and_iterators_are_read_once(make):
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(8, 4), nn.Linear(6, 8)

        def forward(self, x):
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    crossed, x = Crossed(), torch.randn(30, 6)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    plain[0].load_state_dict(crossed.first.state_dict())
    plain[2].load_state_dict(crossed.second.state_dict())
    sparse(crossed, make(crossed, iter([x[:10], x[10:]])))
    sparse(plain, make(plain, [x[:10], x[10:]], forward=lambda batch: plain(batch)))
    assert torch.equal(crossed.first.weight, plain[0].weight)
    assert torch.equal(crossed.second.weight, plain[2].weight)


@pytest.mark.parametrize("make", MAKERS)
def test_buffers_modes_and_gradients_are_as_before(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[1].eval()
    buffers, modes = [b.clone() for b in model.buffers()], [m.training for m in model.modules()]
    sparse(model, make(model, [torch.randn(16, 8)]))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_masks_move_from_there_and_a_resumption_needs_no_batches():
    model, batches = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = replace(dstlib.RIGL, init=sparsegpt(model, batches), interval=2)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=20)
    first = {n: m.clone() for n, m in sparsifier.masks.items()}
    for x in batches * 2:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert any(not torch.equal(first[n], m) for n, m in sparsifier.masks.items())
    other, _ = net()
    resumed = dstlib.sparsify(other, sparsity=0.5, method=replace(method, init=dstlib.masking.random), total_steps=20)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(sparsifier.state_dict())
    assert all(torch.equal(resumed.masks[n], m) for n, m in sparsifier.masks.items())


def test_hidden_weights_under_dense_storage_stay_and_active_ones_are_repaired():
    model, batches = net()
    dense = model[0].weight.detach().clone()
    method = replace(SRSTE, init=sparsegpt(model, batches), grow=magnitude)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method=method, total_steps=20, include="0")
    mask = sparsifier.masks["0.weight"]
    hidden = sparsifier.state_dict()["weights"]["0.weight"]["hidden"]
    assert torch.equal(hidden, dense.masked_fill(mask, 0.0))
    assert not torch.equal(model[0].weight[mask], dense[mask])


def test_a_dead_input_keeps_no_weight_that_is_worth_anything():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6), torch.randn(40, 8)
    x[:, 3] = 0
    with torch.no_grad():
        layer.weight[:, 3] = 100.0
    for make in MAKERS:
        other = nn.Linear(8, 6)
        other.load_state_dict(layer.state_dict())
        assert not sparse(other, make(other, [x])).masks["weight"][:, 3].any()


def test_what_cannot_be_seen_is_refused_by_name_before_anything_is_pruned():
    model, batches = net()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        ScoreError, match=r"inputs of 2\.weight .*Wanda at initialisation.*multiplies by the weight itself"
    ):
        sparse(model, wanda(model, batches, forward=lambda x: model[:2](x)))
    with pytest.raises(SettingError, match=r"batches .*SparseGPT at initialisation: expected at least one, got none"):
        sparse(model, sparsegpt(model, []))
    recurrent = nn.LSTM(4, 4)
    with pytest.raises(ScoreError, match=r"inputs of weight_ih_l0\.0, .*and 5 more"):
        sparse(recurrent, ria(recurrent, [torch.randn(3, 2, 4)]), include=["weight_ih_l0", "weight_hh_l0"])
    experts = Mixture()
    with pytest.raises(ScoreError, match=r"inputs of up\.1, down\.1 .*every expert, too"):
        sparse(
            experts, wanda(experts, [torch.rand(10, 6)]), include=["up", "down"], axes={"up": "e o i", "down": "e i o"}
        )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    for wrong in ({"damping": 0.0}, {"block_size": 0}, {"block_size": 2.0}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))} of sparsegpt"):
            sparsegpt(model, batches, **wrong)
    with pytest.raises(SettingError, match="power of ria"):
        ria(model, batches, power=-1.0)
    for make in (wanda, ria, sparsegpt):
        for one in (batches[0], {"input": batches[0]}):
            with pytest.raises(SettingError, match=rf"batches of {make.__name__}\(\): .* pass \[x\]"):
                make(model, one)
    with pytest.raises(ScoreError, match="finite ones, positive definite"):
        sparse(model, sparsegpt(model, [batches[0] * torch.nan]))
    with pytest.raises(SettingError, match="init of method gmp"):
        replace(dstlib.GMP, init=wanda(model, batches))


def test_an_expert_that_pruning_cuts_off_is_pruned_by_magnitude_and_told_of():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.expert = nn.Linear(3, 2, bias=False), nn.Linear(3, 4)

        def forward(self, x):
            return self.expert(x[self.gate(x)[:, 0] > 0])

    model = Routed()
    with torch.no_grad():
        model.gate.weight.copy_(torch.tensor([[1.0, 1.0, -1.5], [0.5, 0.1, 0.1]]))
    size = model.expert.weight.detach().abs()
    with pytest.warns(UserWarning, match=r"expert\.weight: no inputs reach it any more"):
        found = sparse(model, wanda(model, [torch.ones(1, 3)]))
    assert torch.equal(found.masks["expert.weight"], best_units(size, Element(), 6))


def test_the_products_of_other_libraries_are_seen():
    """GPT-2's layers, which lie the other way round, and experts in one grouped product."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (16, 16))
    small = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **small)
    )
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            **small,
        )
    )
    for model in (gpt2, mixtral):
        before, dense = model(ids).logits.detach(), {k: v.clone() for k, v in model.state_dict().items()}
        found = sparse(model, sparsegpt(model, [{"input_ids": ids}]))
        assert abs(found.density - 0.5) < 0.01, "half of each weight, to whole numbers"
        again = type(model)(model.config)
        again.load_state_dict(dense)
        sparse(again, magnitude)
        errors = [float((pruned(ids).logits - before).square().mean().detach()) for pruned in (model, again)]
        assert errors[0] < errors[1]

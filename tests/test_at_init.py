"""Masks at initialisation against their definitions, and what a resumption makes of them."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, batch, small, train
from torch import nn

import dstlib
from dstlib import NM, FanIn, Kernel, ScoreError, SettingError
from dstlib.at_init import grasp, snip, synflow


def loss_of(model, step=0):
    x, y = batch(step, 16)
    return lambda: nn.functional.cross_entropy(model(x), y)


def sparse(model, init, sparsity=0.8, **settings):
    method = replace(dstlib.STATIC, init=init)
    return dstlib.sparsify(model, sparsity=sparsity, **{"method": method, **settings})


def kept_of(model, scores, num):
    """The ``num`` highest of all weights together, and in any case the best of each."""
    flat = torch.cat([s.flatten() for s in scores])
    sure = torch.cat([torch.nn.functional.one_hot(s.argmax(), s.numel()) for s in map(torch.flatten, scores)])
    order = sorted(range(len(flat)), key=lambda i: (-int(sure[i]), -float(flat[i])))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:num]] = True
    return dict(zip(("conv.weight", "up.weight", "head.weight"), mask.split([s.numel() for s in scores]), strict=True))


def weights_of(model):
    return [model.conv.weight, model.up.weight, model.head.weight]


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([0.5, 0.8, 0.95]))
def test_snip_keeps_the_order_of_w_times_g_over_all_layers(seed, sparsity):
    model = small(seed)
    grads = torch.autograd.grad(loss_of(model)(), weights_of(model))
    scores = [(w * g).abs().detach() for w, g in zip(weights_of(model), grads, strict=True)]
    num_all = sum(s.numel() for s in scores)
    masks = sparse(model, snip(model, loss_of(model)), sparsity).masks
    num = num_all - int(sparsity * num_all + 1e-9)
    assert sum(int(m.sum()) for m in masks.values()) == num
    for name, mask in kept_of(model, scores, num).items():
        assert torch.equal(masks[name].flatten(), mask), name


def test_grasp_keeps_the_highest_products_with_the_hessian():
    """H·g by the full Hessian of a small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randint(0, 2, (16,))
    shapes = [model[0].weight.shape, model[2].weight.shape]

    def loss_at(flat):
        first, second = flat.split([12, 8])
        hidden = torch.tanh(x @ first.view(shapes[0]).T + model[0].bias)
        return nn.functional.cross_entropy(hidden @ second.view(shapes[1]).T + model[2].bias, y)

    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    g = torch.func.grad(loss_at)(flat)
    score = flat * (torch.autograd.functional.hessian(loss_at, flat) @ g)
    masks = sparse(model, grasp(model, lambda: nn.functional.cross_entropy(model(x), y)), 0.5).masks
    kept = torch.cat([masks["0.weight"].flatten(), masks["2.weight"].flatten()])
    assert int(kept.sum()) == 10
    assert score[kept].min() > score[~kept].max()


def deep(depth=12, width=8):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 4))


@pytest.mark.parametrize("sparsity", [0.9, 0.96])
def test_synflow_cuts_no_path_at_extreme_sparsity(sparsity):
    """Some input still reaches some output: the product of the masks along the layers is not zero."""
    model = deep()
    sparsifier = sparse(model, synflow(model, torch.empty(2, 8)), sparsity)
    flow = torch.ones(8)
    for mask in sparsifier.masks.values():
        flow = mask.float() @ flow
    assert flow.sum() > 0
    num_all = sum(m.numel() for m in sparsifier.masks.values())
    assert sum(int(m.sum()) for m in sparsifier.masks.values()) == num_all - int(sparsity * num_all + 1e-9)


def test_synflow_conserves_flow_and_needs_no_data():
    """Tanaka et al. 2020: without biases, the scores of every layer add up to the same number, the output's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 5, bias=False))
    scores = synflow(model, torch.full((1, 6), torch.nan)).scores([model[0].weight, model[2].weight])
    totals = [float(s.sum()) for s in scores]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)  # sums of 99 doubles
    expected = (model[2].weight.abs().double() @ model[0].weight.abs().double()).sum().detach()
    assert totals[0] == pytest.approx(float(expected), rel=1e-12)


def test_nothing_but_the_masks_is_left_behind():
    """Batch statistics, modes and gradients are as before; the weights inside the masks keep their bits."""
    x = torch.randn(16, 8)
    for make in (lambda m: snip(m, lambda: m(x).square().mean()), lambda m: synflow(m, x)):
        model = deep(3)
        model[1].eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        masks = sparse(model, make(model), 0.5).masks
        after = model.state_dict()
        for name, value in before.items():
            expected = value * masks[name] if name in masks else value
            assert torch.equal(after[name], expected), name
        assert [m.training for m in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("granularity", "sparsity"), [(Kernel(), 0.6), (FanIn(), 0.5), (NM(1, 2), 0.5)], ids=["kernel", "fan-in", "1:2"]
)
def test_other_granularities(granularity, sparsity):
    model = small()
    method = replace(dstlib.STATIC, granularity=granularity, distribution=dstlib.uniform)
    init = snip(model, loss_of(model))
    sparsifier = dstlib.sparsify(model, sparsity=sparsity, method=replace(method, init=init))
    for weight in sparsifier.weights:
        folded = granularity.fold(weight.views[0].of(sparsifier.masks[weight.name]))
        assert (folded == folded[..., :1]).all()
        counts = folded[..., 0].sum(dim=1)
        assert (counts == counts[0]).all()
    assert abs(sparsifier.density - (1 - sparsity)) < 0.15, "32 kernels, fan-ins of 6 at the least"


def test_overridden_weights_keep_their_own_density():
    model = small()
    masks = sparse(model, snip(model, loss_of(model)), 0.8, overrides={"head": 0.5}).masks
    assert int(masks["head.weight"].sum()) == 9
    assert int(masks["conv.weight"].sum() + masks["up.weight"].sum()) == 168 - int(0.8 * 168)


@pytest.mark.parametrize("init", [snip, grasp], ids=["snip", "grasp"])
def test_moving_masks_keep_the_numbers_of_the_first(init):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(dstlib.RIGL, init=init(model, loss_of(model)), interval=2)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=method, total_steps=20)
    first = {n: m.clone() for n, m in sparsifier.masks.items()}
    train(model, optimizer, 20)
    assert any(not torch.equal(first[n], m) for n, m in sparsifier.masks.items())
    assert {n: int(m.sum()) for n, m in first.items()} == {n: int(m.sum()) for n, m in sparsifier.masks.items()}


def test_a_resumption_with_another_batch_takes_the_saved_numbers():
    """The scores of another batch give other budgets; the saved masks count, and training goes on bit for bit."""
    runs = []
    for step in (0, 5):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = replace(dstlib.RIGL, init=snip(model, loss_of(model, step)), interval=2)
        runs.append((model, optimizer, dstlib.sparsify(model, sparsity=0.7, method=method, total_steps=20)))
    counts = [{n: int(m.sum()) for n, m in s.masks.items()} for _, _, s in runs]
    assert counts[0] != counts[1], "else nothing is shown"
    train(runs[0][0], runs[0][1], 6)
    for part, other in zip(runs[0], runs[1], strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    for model, optimizer, _ in runs:
        train(model, optimizer, 10, start=6)
    assert_same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert_same(runs[0][2].state_dict(), runs[1][2].state_dict())


def test_mistakes_are_one_error_with_a_name():
    model = small()
    with pytest.raises(ScoreError, match=r"snip scores of head\.weight: expected a loss .* depends on it"):
        sparse(model, snip(model, lambda: model.conv(batch(0)[0]).sum() + model.up.weight.sum()))
    with pytest.raises(ScoreError, match="loss of SNIP at initialisation: expected a number, got a tensor"):
        sparse(small(), snip(model, lambda: model(batch(0)[0])))
    with pytest.raises(ScoreError, match="loss of GraSP"):
        sparse(small(), grasp(model, lambda: model(batch(0)[0]).sum() * torch.nan))
    with pytest.raises(SettingError, match="inputs of synflow"):
        synflow(model, (1, 3))
    with pytest.raises(SettingError, match="rounds of AtInit"):
        snip(model, loss_of(model), rounds=0)
    with pytest.raises(SettingError, match="init of method gmp"):
        replace(dstlib.GMP, init=snip(model, loss_of(model)))

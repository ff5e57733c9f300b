"""First weights at the scale of the dense layer, and learning rates over density."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, seeds
from torch import nn

import dstlib
from dstlib import SettingError, StateError
from dstlib.masking import density_factor, fan_in_factor
from dstlib.sparsifier import density_groups


def mlp(width=256, depth=8, norm=False):
    """Linear layers between ReLUs, started by He's rule, which keeps the scale of a dense network's signal."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width, bias=False), nn.ReLU())))
    for weight in model.parameters():
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    return model


def sparse(model, **kwargs):
    sparsifier = dstlib.sparsify(model, **{"sparsity": 0.9, "method": "static", **kwargs})
    sparsifier.detach()
    return sparsifier


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.sampled_from([(), (3,), (2, 2)]))
def test_the_factors_by_definition(seed, num_out, num_in, taps):
    mask = torch.rand(num_out, num_in, *taps, generator=generator(seed)) < 0.5
    factors = fan_in_factor(mask)
    assert factors.shape == (num_out, 1, *(1 for _ in taps))
    for row, factor in zip(mask, factors, strict=True):
        num = int(row.sum())
        assert float(factor) == pytest.approx((row.numel() / num) ** 0.5 if num else 1.0, rel=1e-6)  # in float32
    num = int(mask.sum())
    assert float(density_factor(mask)) == pytest.approx((mask.numel() / num) ** 0.5 if num else 1.0, rel=1e-6)


@given(seeds, st.sampled_from([0.5, 0.8, 0.95]))
def test_each_output_keeps_the_variance_that_it_has_in_the_dense_layer(seed, sparsity):
    """Over draws of weights: inputs of one scale, and Σ active w² · factor² = Σ all w², in expectation."""
    num_draws, num_in = 4000, 40
    rng = generator(seed)
    mask = torch.rand(3, num_in, generator=rng) >= sparsity
    mask[:, 0] = True
    x, w = torch.randn(num_in, generator=rng).sign(), torch.randn(num_draws, 3, num_in, generator=rng)
    y = (w * mask * fan_in_factor(mask)) @ x
    # of 4,000 normal values the variance has a relative error of √(2 / 4000) = 0.022: five times that
    assert y.var(dim=0) / num_in == pytest.approx(torch.ones(3), abs=0.11)


@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95])
@pytest.mark.parametrize(("method", "scale"), [("static", "fan_in"), ("srigl", "fan_in"), ("static", "density")])
def test_the_signal_goes_through_eight_layers_as_through_dense_ones(sparsity, method, scale):
    model, x = mlp(), torch.randn(64, 256, generator=generator(0))
    dense = float(model(x).detach().std())
    faded = copy.deepcopy(model)
    options = {"sparsity": sparsity, "method": method, "total_steps": 1000}
    sparse(model, init_scale=scale, **options)
    sparse(faded, **options)
    # eight layers of random weights with as few as 13 inputs an output: each a fifth up or down
    assert 0.5 < float(model(x).detach().std()) / dense < 2
    assert float(faded(x).detach().std()) / dense < 2 * (1 - sparsity) ** 4


def test_only_the_scale_changes_and_each_matrix_of_a_weight_has_its_own():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 2, bias=False)
    before = weights_of(model)
    overrides = {"in_proj_weight": 0.75}
    sparsifier = sparse(model, init_scale="fan_in", overrides=overrides)
    plain = nn.MultiheadAttention(32, 2, bias=False)
    plain.load_state_dict(before)
    assert all(torch.equal(m, sparsifier.masks[n]) for n, m in sparse(plain, overrides=overrides).masks.items())
    mask, weight = sparsifier.masks["in_proj_weight"], model.in_proj_weight.detach()
    factors = (32 / mask.sum(dim=1, keepdim=True).clamp(min=1)).sqrt()
    assert torch.allclose(weight, before["in_proj_weight"] * factors * mask, rtol=1e-6)  # one rounding of the factor


def test_without_the_option_and_where_nothing_is_masked_bits_stay():
    for kwargs in ({}, {"sparsity": 0.0, "init_scale": "fan_in"}, {"method": "gmp", "init_scale": "density"}):
        model = mlp(16, 2)
        before = weights_of(model)
        sparsifier = sparse(model, **{"total_steps": 1000, **kwargs})
        assert all(torch.equal(w, before[n] * sparsifier.masks[n]) for n, w in model.named_parameters())


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_weights_that_hold_zeros_already_keep_their_values(sparsity):
    """As when a run is resumed: the model is loaded, made sparse by the same call, and the state loaded."""
    options = {"sparsity": sparsity, "init_scale": "fan_in"}
    first = mlp(16, 2)
    sparse(first, **options, seed=3)
    held = weights_of(first)
    for seed in (3, 4):  # whose masks are the same, and others
        again = mlp(16, 2)
        again.load_state_dict(held)
        sparse(again, **options, seed=seed)
        assert all(torch.equal(w, held[n]) for n, w in again.named_parameters())


def test_weights_with_more_non_zeros_than_there_is_room_are_no_fresh_ones_either():
    first = mlp(16, 2)
    sparse(first, sparsity=0.6)
    held = weights_of(first)
    with pytest.warns(UserWarning, match="already held zeros, but more non-zeros"):
        sparsifier = sparse(first, sparsity=0.9, init_scale="fan_in")
    assert all(torch.equal(w, held[n] * sparsifier.masks[n]) for n, w in first.named_parameters())


def test_masks_that_are_given_scale_weights_that_are_fresh_and_no_others():
    first = mlp(16, 2)
    masks = sparse(first).masks
    held, fresh = weights_of(first), mlp(16, 2)
    before = weights_of(fresh)
    sparse(first, sparsity=None, masks=masks, init_scale="fan_in")
    assert all(torch.equal(w, held[n]) for n, w in first.named_parameters())
    sparse(fresh, sparsity=None, masks=masks, init_scale="fan_in")
    for name, weight in fresh.named_parameters():
        assert torch.allclose(weight, before[name] * masks[name] * fan_in_factor(masks[name]), rtol=1e-6)  # a rounding


def test_two_ranks_start_alike_and_so_does_a_run_that_is_resumed():
    def begin():
        model = mlp(16, 2)
        return model, dstlib.sparsify(model, sparsity=0.9, method="rigl", total_steps=1000, init_scale="fan_in")

    (one, first), (other, second) = begin(), begin()
    assert all(torch.equal(w, other.state_dict()[n]) for n, w in one.state_dict().items())
    other.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(w, other.state_dict()[n]) for n, w in one.state_dict().items())


def test_a_scale_that_is_unknown_or_would_change_what_competes_is_refused():
    with pytest.raises(SettingError, match=r"init_scale of sparsify\(\): expected None, or one of fan_in, density"):
        sparse(mlp(16, 2), init_scale="fan_out")
    with pytest.raises(SettingError, match=r"init_scale of sparsify\(\) with method topkast: expected None"):
        sparse(mlp(16, 2), method="topkast", init_scale="fan_in", total_steps=1000)


# Learning rates


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_rates_go_with_one_over_the_density_and_all_parameters_are_there_once(sparsity):
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 10))
    sparsifier = sparse(model, sparsity=sparsity)
    groups = density_groups(model, sparsifier.masks, lr=0.01)
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == 4
    for name, p in model.named_parameters():
        mask = sparsifier.masks.get(name)
        density = 1.0 if mask is None else float(mask.double().mean())
        assert found[id(p)] == pytest.approx(0.01 / density, rel=1e-6)  # densities are read in float32


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_one_step_of_adam_changes_outputs_as_much_as_in_the_dense_layer(sparsity):
    """Adam's first step moves each weight by its rate: inputs and gradients of one sign add up over active inputs."""

    def change(sparsity):
        torch.manual_seed(0)
        model = nn.Linear(400, 50, bias=False)
        masks = sparse(model, sparsity=sparsity).masks if sparsity else {}
        optimizer = torch.optim.Adam(density_groups(model, masks, lr=1e-3))
        x, mask = torch.ones(400), masks.get("weight", torch.ones(50, 400, dtype=torch.bool))
        before = model(x)
        model.weight.grad = mask.float()
        optimizer.step()
        return float((model(x) - before).mean())

    assert change(sparsity) == pytest.approx(change(0.0), rel=1e-3)  # Adam's epsilon, and sums of 400 numbers


def test_rates_and_masks_that_do_not_fit_are_refused():
    model = mlp(16, 1)
    with pytest.raises(SettingError, match=r"lr of density_groups\(\): expected a number above 0, got 0"):
        density_groups(model, {}, lr=0)
    with pytest.raises(StateError):
        density_groups(model, {"other": torch.ones(16, 16)}, lr=0.1)

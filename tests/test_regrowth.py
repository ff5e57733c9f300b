"""What grows takes steps of the size of others: what optimizers divide by starts like theirs, and moves warm up."""

import copy
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import backward, small, train
from strategies import generator, seeds
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop

import dstlib
from dstlib import RIGL, SET, SettingError
from dstlib.masking import DenseStorage
from dstlib.sparsifier.known_optimizers import MOMENT, Meaning
from dstlib.sparsifier.optimizer_state import Kept
from dstlib.targets.views import MatrixView
from dstlib.testing import check_method

WHOLE = MatrixView("weight")
FAST = replace(RIGL, interval=4)


# What steps are divided by


@given(seeds, st.sampled_from([0, 1, 2]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_divides_starts_as_large_as_where_weights_stayed_or_larger_by_the_own_gradient(seed, power, dtype):
    rng = generator(seed)
    state = torch.randn(5, 8, generator=rng).to(dtype)
    where = torch.rand(5, 8, generator=rng)
    stayed, grown = where < 0.3, where > 0.7
    grad, before = torch.randn(5, 8, generator=rng), state.clone()
    Kept("v", state, Meaning("moment", power=power), 0.0).start_beside(WHOLE, grown, stayed, grad)
    assert torch.equal(state[~grown], before[~grown])
    if not stayed.any():
        assert torch.equal(state, before)
        return
    typical, size = before[stayed].double().mean(), grad.double().abs() ** power
    expected = typical * (size[grown] / size[stayed].mean()).clamp(min=1)
    # sums of forty numbers in single precision; then one rounding to the state's own
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    assert state[grown].double() == pytest.approx(expected, rel=rounding, abs=1e-5)


@given(seeds, st.floats(1e-12, 1e6))
def test_the_scale_of_gradients_does_not_matter(seed, scale):
    """Loss scales, clipping and accumulation change gradients by a factor, of which moments may know nothing."""
    rng = generator(seed)
    values, grad = torch.rand(4, 4, generator=rng), torch.randn(4, 4, generator=rng)
    grown = torch.eye(4, dtype=torch.bool)
    first, second = values.clone(), values.clone()
    Kept("v", first, Meaning("moment", power=2), 0.0).start_beside(WHOLE, grown, ~grown, grad)
    Kept("v", second, Meaning("moment", power=2), 0.0).start_beside(WHOLE, grown, ~grown, grad * scale)
    # the scaled gradient is rounded, squared and divided
    assert torch.allclose(first, second, rtol=1e-5, atol=0)


def test_without_a_gradient_of_others_it_is_their_mean():
    values, grown = torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([[False, False, True]])
    for grad in (torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 5.0]]), None):
        state = values.clone()
        Kept("v", state, Meaning("moment", power=2), 0.0).start_beside(WHOLE, grown, ~grown, grad)
        assert torch.equal(state, torch.tensor([[4.0, 2.0, 3.0]]))


def test_momentum_copies_and_codes_are_not_started_beside_others():
    grown = torch.tensor([[False, True]])
    squares = Meaning("moment", power=2)
    for kept in (
        Kept("m", torch.tensor([[4.0, 0.0]]), MOMENT, 0.0),
        Kept("codes", torch.tensor([[4, 0]], dtype=torch.uint8), squares, 0.0),
        Kept("two of it", torch.tensor([[[4.0, 0.0]]] * 2), squares, 0.0),
    ):
        before = kept.values.clone()
        kept.start_beside(WHOLE, grown, ~grown, torch.ones(1, 2))
        assert torch.equal(kept.values, before)


def test_each_matrix_of_a_weight_has_a_mean_of_its_own():
    model = nn.MultiheadAttention(8, 2, bias=False)
    optimizer = Adam(model.parameters())
    method = replace(RIGL, interval=2, grown_state="mean", distribution=dstlib.uniform)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=20)
    weight, grown = model.in_proj_weight, {}
    sparsifier.observers.append(lambda site, update: grown.__setitem__(site.name, update.grown.clone()))
    for step in range(2):
        scale = torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(8)[:, None]
        weight.grad = scale * (1 + torch.rand(24, 8, generator=generator(step)))
        model.out_proj.weight.grad = torch.ones(8, 8)
        if step:
            sparsifier.before_step()
        else:
            optimizer.step()
    parts = [g for name, g in grown.items() if name.startswith("in_proj")]
    assert len(parts) == 3
    masks, squares = sparsifier.masks["in_proj_weight"].chunk(3), optimizer.state[weight]["exp_avg_sq"].chunk(3)
    for part, mask, values in zip(parts, masks, squares, strict=True):
        stayed = mask & ~part
        assert part.any()
        # sums of some thirty numbers in single precision
        assert values[part] == pytest.approx(float(values[stayed].double().mean()), rel=1e-5)


ADAPTIVE = {
    "Adam": lambda p: Adam(p, lr=1e-3),
    "AdamW, fused": lambda p: AdamW(p, lr=1e-3, fused=True),
    "AdamW, foreach": lambda p: AdamW(p, lr=1e-3, foreach=True),
    "Adam, amsgrad": lambda p: Adam(p, lr=1e-3, amsgrad=True),
    "Adam, one by one": lambda p: Adam(p, lr=1e-3, foreach=False),
    "NAdam": lambda p: NAdam(p, lr=1e-3),
    "RAdam": lambda p: RAdam(p, lr=1e-3),
    "RMSprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5),
    "Adagrad": lambda p: Adagrad(p, lr=1e-2),
    "Adamax": lambda p: Adamax(p, lr=1e-3),
    "Adadelta": lambda p: Adadelta(p, lr=1.0),
}


def ways(make, method, num_after=40):
    """How far grown weights and those that stayed have come in so many steps after an update late in a run, on average.

    Gradients of one sign and nearly one size: what an optimizer does then depends on its state alone.
    """
    model = nn.Linear(20, 20, bias=False)
    optimizer = make(model.parameters())
    method = replace(method, interval=400, distribution=dstlib.uniform)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=4000)
    rng, old = generator(0), sparsifier.masks["weight"].clone()
    sign, way, grown, stayed = torch.sign(torch.randn(20, 20, generator=rng)), torch.zeros(20, 20), None, None
    for step in range(1, 400 + num_after):
        model.weight.grad = sign * (1 + 0.1 * torch.rand(20, 20, generator=rng))
        before = model.weight.detach().clone()
        optimizer.step()
        if step == 400:
            grown, stayed = sparsifier.masks["weight"] & ~old, sparsifier.masks["weight"] & old
        if step >= 400:
            way += (model.weight.detach() - before).abs()
    assert grown.any()
    return float(way[grown].mean()), float(way[stayed].mean())


@pytest.mark.parametrize("make", ADAPTIVE.values(), ids=list(ADAPTIVE))
def test_grown_weights_go_no_further_than_those_that_stayed(make):
    ours, theirs = ways(make, RIGL)
    assert 0 < ours < 1.1 * theirs  # gradients differ by a tenth in size


@pytest.mark.parametrize(("name", "factor"), [("Adam", 3), ("AdamW, fused", 3), ("NAdam", 3), ("Adagrad", 2)])
def test_started_as_at_birth_they_would(name, factor):
    """What the law above is for: without the start, it does not hold."""
    ours, theirs = ways(ADAPTIVE[name], replace(RIGL, grown_state="birth"))
    assert ours > factor * theirs


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Rprop(p, lr=0.1)])
def test_where_nothing_divides_nothing_changes(make):
    models = []
    for how in ("birth", "mean", "gradient"):
        model = small()
        optimizer = make(model.parameters())
        dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(FAST, grown_state=how), total_steps=40)
        train(model, optimizer, 12)
        models.append(model.state_dict())
    for other in models[1:]:
        assert all(torch.equal(value, other[name]) for name, value in models[0].items())


# Warm-up


def by_hand(method, num_steps):
    """Runs SGD with a gradient of ones, and yields sparsifier, weight and its moves in units of the learning rate."""
    model = nn.Linear(8, 8, bias=False)
    optimizer = SGD(model.parameters(), lr=0.5)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=100)
    for _ in range(num_steps):
        before = model.weight.detach().clone()
        model.weight.grad = torch.ones(8, 8)
        optimizer.step()
        yield sparsifier, (before - model.weight.detach()) / 0.5


@settings(max_examples=25)  # of 45 in all
@given(st.integers(0, 8), st.integers(2, 6))
def test_the_first_moves_of_a_grown_weight_are_shares_of_what_its_optimizer_makes_them(warmup, interval):
    method = replace(
        SET, interval=interval, grown_warmup=warmup, distribution=dstlib.uniform, init=dstlib.masking.random
    )
    grown, updated_at, old = None, 0, None
    for step, (sparsifier, moves) in enumerate(by_hand(method, 4 * interval), 1):
        mask = sparsifier.masks["weight"].clone()
        if step % interval == 0 and old is not None:
            grown, updated_at, dropped = mask & ~old, step, old & ~mask
            assert grown.any()
            moves[dropped] = 1.0  # they moved to zero
        old = mask
        share = min(1.0, (step - updated_at + 1) / warmup) if warmup and grown is not None else 1.0
        expected = mask.float() if grown is None else torch.where(grown, share, mask.float())
        # weights of up to two are rounded, and the difference of two is in halves
        assert moves[mask] == pytest.approx(expected[mask], abs=1e-6)


def test_copies_of_a_weight_warm_up_with_it():
    model, young = nn.Linear(2, 1, bias=False), torch.tensor([[True, False]])
    sparsifier = dstlib.sparsify(model, sparsity=0, method="static")
    (m,) = sparsifier._masked
    m.young, m.begun, m.updated_at = young, 6, 5
    z = torch.tensor([[1.0, 1.0]])
    kept = [Kept("z", z, Meaning("weights"), 0.0), Kept("m", torch.ones(1, 2), MOMENT, 0.0)]
    m.note_young(kept, 8)
    z += 4
    kept[1].values.add_(4)
    m.slow_young(kept, 8)
    assert z.tolist() == [[2.0, 5.0]]  # the second move of eight
    assert kept[1].values.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.01)])
def test_a_run_that_stops_while_weights_warm_up_goes_on_as_if_it_had_not(make):
    method, at = replace(FAST, grown_warmup=4), 5  # the second step of what has grown at the fourth

    def begin():
        model = small()
        optimizer = make(model.parameters())
        return model, optimizer, dstlib.sparsify(model, optimizer, sparsity=0.7, method=method, total_steps=40)

    model, optimizer, sparsifier = begin()
    train(model, optimizer, at)
    held = copy.deepcopy([part.state_dict() for part in (model, optimizer, sparsifier)])
    assert any(weight["young"] is not None for weight in held[2]["weights"].values())
    train(model, optimizer, 9, start=at)
    other, other_optimizer, other_sparsifier = begin()
    for part, state in zip((other, other_optimizer, other_sparsifier), held, strict=True):
        part.load_state_dict(state)
    train(other, other_optimizer, 9, start=at)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


class LooksAhead(SGD):
    """Takes its gradient where a first gradient leads to, and its step from where it was, as SAM does."""

    def step(self, closure):
        (weight,) = self.param_groups[0]["params"]
        closure()
        with torch.no_grad():
            ahead = 8.0 * weight.grad
            weight += ahead
            closure()
            weight -= ahead
        super().step()


def test_a_step_that_asks_for_gradients_elsewhere_warms_up_from_where_it_was():
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    model.weight.data.copy_(torch.randint(-4, 5, (8, 8)))  # so that sums are exact
    optimizer = LooksAhead(model.parameters(), lr=0.5)
    method = replace(SET, interval=4, grown_warmup=4)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=40)

    def closure():
        model.weight.grad = torch.ones(8, 8)

    old = before = torch.empty(0)
    for _ in range(4):
        old, before = sparsifier.masks["weight"].clone(), model.weight.detach().clone()
        optimizer.step(closure)
    grown = sparsifier.masks["weight"] & ~old
    assert grown.any()
    assert set((before - model.weight.detach())[grown].tolist()) == {0.5 / 4}  # from zero, the first move of four


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_step_that_was_begun_and_not_taken_warms_up_from_what_was_loaded_since(by_hand):
    model = small()
    optimizer = SGD(model.parameters(), lr=0.5)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(FAST, grown_warmup=4), total_steps=40)
    train(model, optimizer, 4)
    backward(model, 4)
    sparsifier.before_step()  # and never taken
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).copy_(3.0 * mask)
            model.get_parameter(name).grad = mask.float()
    if by_hand:
        sparsifier.before_step()
    optimizer.step()
    young = [m.young for m in sparsifier._masked]
    assert any(y is not None and y.any() for y in young), "else nothing is shown"
    for m in sparsifier._masked:
        moves = 3.0 - m.parameter.detach()
        assert set(moves[m.mask & ~m.young].tolist()) == {0.5}
        assert set(moves[m.young].tolist()) <= {0.5 / 4, 0.5 / 2}  # the first move of four, or the second


def test_a_step_that_overflows_warms_nothing_up():
    model = small()
    optimizer = AdamW(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(FAST, grown_warmup=4), total_steps=40)
    train(model, optimizer, 4)
    before = copy.deepcopy(model.state_dict())
    backward(model, 4)
    sparsifier.before_step()
    optimizer.found_inf = torch.tensor(1.0)  # as a fused one is told
    with torch.no_grad():
        sparsifier.before_optimizer(optimizer)
        sparsifier.after_optimizer(optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sparsifier.step == 4


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"grown_state": "zero"}, r"grown_state of method rigl: expected one of birth, mean, gradient, got 'zero'"),
        ({"grown_warmup": -1}, r"grown_warmup of method rigl: expected a whole number of steps from 0 up, got -1"),
        ({"grown_warmup": 2.0}, r"grown_warmup of method rigl: expected a whole number"),
        (
            {"grown_warmup": 2, "storage": DenseStorage()},
            "grown_warmup of method rigl: expected 0, with dense",
        ),
    ],
)
def test_what_is_no_start_is_refused(changed, told):
    with pytest.raises(SettingError, match=told):
        replace(RIGL, **changed)


@pytest.mark.parametrize("changed", [{"grown_state": "mean"}, {"grown_state": "birth"}, {"grown_warmup": 3}], ids=str)
def test_the_laws_of_methods_hold(changed):
    check_method(replace(RIGL, **changed))


def test_the_benchmark_refuses_an_optimizer_that_torch_does_not_have(monkeypatch, capsys):
    script = Path(__file__).parents[1] / "benchmarks" / "regrowth.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--optimizer", "AdamWW"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 2
    assert "invalid choice: 'AdamWW'" in capsys.readouterr().err

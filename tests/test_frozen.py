"""Weights that are frozen midway: the plan reaches its density without them, and who does not is told of."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, assert_zero_outside, backward, small, train

import dstlib
from dstlib.masking import DenseStorage, FanIn, Kernel, OverDensity, Trace, moved, stored, traced, uniform
from dstlib.schedules import Cubic

NAMES = ["conv.weight", "up.weight", "head.weight"]
TOTAL = 24
SPARE = ["gmp", "gmp_global", "granet", "granet_sparse", "acdc", "mest_soft"]
METHODS = {
    **{name: dstlib.METHODS[name] for name in (*SPARE, "rigl", "snfs", "dsr", "topkast")},
    "granet": replace(dstlib.METHODS["granet"], ramp=Cubic(0.0, 1.0), stop=0.75),  # whose density falls to the end
    "gmp of kernels": replace(dstlib.GMP, granularity=Kernel()),
    "gmp by fan-in": replace(dstlib.GMP, granularity=FanIn()),
    "movement": replace(dstlib.GMP, drop=traced, trace=Trace(of=moved)),
    "stored": replace(dstlib.GMP, storage=DenseStorage(), grown_init=stored),
    "stored, in reach": replace(
        dstlib.METHODS["topkast"], ramp=Cubic(0.0, 1.0), storage=DenseStorage(extra=0.1, decay=OverDensity(1e-4))
    ),
    "stored and shared": replace(dstlib.METHODS["granet"], storage=DenseStorage(), grown_init=stored),
    "grown at random": replace(
        dstlib.METHODS["granet"], grow=dstlib.masking.random, grown_init=dstlib.masking.uniform_fan_out, skip_step=True
    ),
}
WAYS = ["requires_grad", "left out", "both", "from its group"]


def built(method, interval=2, **settings_):
    model = small()
    method = replace(METHODS[method], interval=interval, distribution=uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    if method.storage is not None:  # momentum of hidden weights is another matter
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=method, total_steps=TOTAL, **settings_)
    return model, optimizer, sparsifier


def freeze(model, optimizer, names, way):
    """Freezes these weights; returns the optimizer to go on with."""
    frozen = [model.get_parameter(name) for name in names]
    if way in ("requires_grad", "both"):
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    if way == "from its group":
        group = optimizer.param_groups[0]
        group["params"] = [p for p in group["params"] if not any(p is f for f in frozen)]
    if way in ("left out", "both"):
        kept = [p for p in model.parameters() if not any(p is f for f in frozen)]
        return torch.optim.SGD(kept, lr=0.05, momentum=0.9)
    return optimizer


def folded(sparsifier):
    """The mask of each weight, (groups, units, elements)."""
    fold = sparsifier.plan.method.granularity.fold
    return {w.name: fold(view.of(sparsifier.masks[w.name])) for w in sparsifier.weights for view in w.views}


def planned(sparsifier, step):
    target = sparsifier.plan.num_target
    return {name: len(m) * target(name, m.shape[1], step) for name, m in folded(sparsifier).items()}


def active(sparsifier):
    return {name: int(mask[..., 0].sum()) for name, mask in folded(sparsifier).items()}


whatever = given(
    st.sets(st.sampled_from(NAMES), min_size=1, max_size=2),
    st.integers(1, TOTAL - 2),
    st.sampled_from(WAYS),
    st.sampled_from([1, 2, 3]),
)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=4)
@whatever
def test_the_plan_reaches_its_density_whatever_is_frozen(method, names, at, way, interval):
    check(method, names, at, way, interval)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@whatever
def test_so_it_does_in_many_trainings(method, names, at, way, interval):
    check(method, names, at, way, interval)


def check(method, names, at, way, interval):
    """Frozen weights lose units and gain none, keep the values of the others, and nobody is warned."""
    model, optimizer, sparsifier = built(method, interval)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # true of a single weight that trains on: what it hides may never outgrow what it has
        warnings.filterwarnings("ignore", ".*none of them has dropped or grown a unit")
        train(model, optimizer, at)
        optimizer = freeze(model, optimizer, names, way)
        masks = {name: sparsifier.masks[name].clone() for name in names}
        values = {name: model.get_parameter(name).detach().clone() for name in names}
        for step in range(at, TOTAL):
            train(model, optimizer, 1, start=step)
            assert_zero_outside(model, sparsifier.masks)
            for name, mask in masks.items():
                now = sparsifier.masks[name]
                assert not bool((now & ~mask).any())
                assert torch.equal(model.get_parameter(name).detach(), values[name] * now)
                masks[name] = now.clone()
    last = planned(sparsifier, sparsifier.plan.clock.last)
    if sparsifier.plan.method.allocate is None:
        assert active(sparsifier) == last
    assert sum(active(sparsifier).values()) == sum(last.values())
    assert sparsifier.step == TOTAL


@pytest.mark.parametrize("method", ["gmp", "granet", "stored"])
def test_a_frozen_weight_keeps_its_largest(method):
    model, optimizer, sparsifier = built(method)
    train(model, optimizer, 5)
    before = model.conv.weight.detach().abs().clone()
    optimizer = freeze(model, optimizer, ["conv.weight"], "both")
    train(model, optimizer, TOTAL - 5, start=5)
    mask = sparsifier.masks["conv.weight"]
    assert before[mask].min() >= before[~mask].max()
    if method == "stored":  # what was pruned is put aside, as everything under the mask
        hidden = sparsifier.state_dict()["weights"]["conv.weight"]["hidden"]
        assert not hidden[mask].any()
        assert bool((hidden[~mask] != 0).any())


def test_of_a_total_that_falls_a_frozen_weight_gives_up_its_share():
    model, optimizer, sparsifier = built("granet")
    optimizer = freeze(model, optimizer, ["up.weight"], "requires_grad")
    for step in range(TOTAL):
        train(model, optimizer, 1, start=step)
        counts = active(sparsifier)
        assert abs(counts["up.weight"] / 96 - sum(counts.values()) / 186) < 0.03  # rounded at each of nine updates


@pytest.mark.parametrize("method", ["gmp", "granet", "acdc", "rigl"])
@pytest.mark.parametrize("way", ["requires_grad", "left out", "both"])
def test_a_weight_that_thaws_is_where_the_others_are(method, way):
    model, optimizer, sparsifier = built(method)
    train(model, optimizer, 5)
    other = freeze(model, optimizer, ["conv.weight"], way)
    train(model, other, 8, start=5)
    model.conv.weight.requires_grad_(True)
    if way == "left out":
        other.add_param_group({"params": [model.conv.weight]})
    grown = []
    sparsifier.observers.append(lambda site, update: grown.append((site.name, site.grad is not None)))
    train(model, optimizer if way == "both" else other, TOTAL - 13, start=13)
    assert {m.step for m in sparsifier._masked} == {TOTAL}
    assert ("conv.weight", True) in grown
    if sparsifier.plan.method.allocate is None:
        assert active(sparsifier) == planned(sparsifier, sparsifier.plan.clock.last)
    assert sum(active(sparsifier).values()) == sum(planned(sparsifier, sparsifier.plan.clock.last).values())


@pytest.mark.parametrize("way", ["requires_grad", "left out", "both"])
def test_a_resumed_run_with_a_frozen_weight_equals_an_uninterrupted_one(way):
    """Also of a weight that no optimizer of the resumed run holds: its state tells that it followed the others."""
    ends = []
    for is_resumed in (False, True):
        model, optimizer, sparsifier = built("granet")
        train(model, optimizer, 5)
        optimizer = freeze(model, optimizer, ["conv.weight"], way)
        train(model, optimizer, 4, start=5)
        if is_resumed:
            states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, sparsifier)]
            model, fresh, sparsifier = built("granet")
            optimizer = freeze(model, fresh, ["conv.weight"], way)
            for part, state in zip((model, optimizer, sparsifier), states, strict=True):
                part.load_state_dict(state)
        train(model, optimizer, TOTAL - 9, start=9)
        ends.append([model.state_dict(), sparsifier.state_dict()])
    for uninterrupted, resumed in zip(*ends, strict=True):
        assert_same(uninterrupted, resumed)


def test_a_copy_knows_what_was_left_out():
    model, optimizer, _ = (run := built("gmp"))
    train(model, optimizer, 5)
    optimizer = freeze(model, optimizer, ["conv.weight"], "left out")
    train(model, optimizer, 1, start=5)
    model, optimizer, sparsifier = copy.deepcopy((model, optimizer, run[2]))
    train(model, optimizer, TOTAL - 6, start=6)
    assert active(sparsifier) == planned(sparsifier, sparsifier.plan.clock.last)


# Not frozen


def test_weights_of_another_optimizer_wait_for_it():
    """As in adversarial training: each trains while the other has no gradients."""
    model, _, sparsifier = run(lambda step: None)
    assert active(sparsifier) == planned(sparsifier, sparsifier.plan.clock.last)
    assert {m.step for m in sparsifier._masked} == {TOTAL}
    assert_zero_outside(model, sparsifier.masks)


def test_a_weight_whose_optimizer_steps_more_seldom_goes_by_its_own_count():
    with pytest.warns(UserWarning, match=r"head\.weight has 1\.0000 where the plan has 0\.2778, as its optimizer has"):
        _, seen, sparsifier = run(lambda step: step % 5 == 0)
    assert ("head.weight", False) not in seen
    assert {m.weight.name: m.step for m in sparsifier._masked}["head.weight"] == 5


def run(steps_on_head):
    """Two optimizers that step one after the other; gradients of the other's weights are off meanwhile."""
    model = small()
    body = [*model.conv.parameters(), *model.up.parameters()]
    optimizers = torch.optim.SGD(body, lr=0.1), torch.optim.SGD(model.head.parameters(), lr=0.1)
    method = replace(dstlib.GMP, interval=5, distribution=uniform)
    sparsifier = dstlib.sparsify(model, sparsity=0.7, method=method, total_steps=TOTAL)
    seen = []
    sparsifier.observers.append(lambda site, update: seen.append((site.name, site.grad is not None)))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if steps_on_head(1) is None else "always")
        for step in range(TOTAL):
            for i, optimizer in enumerate(optimizers):
                if i and steps_on_head(step) is False:
                    continue
                for parameter in body:
                    parameter.requires_grad_(i == 0)
                for parameter in model.head.parameters():
                    parameter.requires_grad_(i == 1)
                model.zero_grad()
                backward(model, step)
                optimizer.step()
    assert (("head.weight", False) in seen) is False
    return model, seen, sparsifier


# Told of at the end


def told(model, optimizer, steps, without=(), start=0):
    """The warnings of a training in which some weights have no gradient."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(start, start + steps):
            optimizer.zero_grad()
            backward(model, step)
            for name in without:
                model.get_parameter(name).grad = None
            optimizer.step()
    return [str(warning.message) for warning in caught if "last mask update" in str(warning.message)]


@pytest.mark.parametrize("method", ["gmp", "granet", "gmp_global", "stored"])
def test_a_weight_that_waits_until_the_end_is_told_of_once(method):
    model, optimizer, sparsifier = built(method)
    train(model, optimizer, 7)
    (message,) = told(model, optimizer, TOTAL - 7, ["up.weight"], start=7)
    density = float(sparsifier.masks["up.weight"].double().mean())
    assert message.startswith("the last mask update is at step 18, and there are weights without the density")
    assert f"up.weight has {density:.4f} where the plan has 0.3021, as it had no gradient then, nor at any" in message
    assert "since step 6. One that trains on is updated at its next step with a gradient" in message
    assert density > 0.4  # that of step 6
    model.up.weight.requires_grad_(False)  # what the message says to do
    assert told(model, optimizer, 1, start=TOTAL) == []
    if sparsifier.plan.method.allocate is None:
        assert active(sparsifier) == planned(sparsifier, 18)
    assert sum(active(sparsifier).values()) == sum(planned(sparsifier, 18).values())


def test_a_weight_that_waits_for_less_is_not_told_of():
    model, optimizer, sparsifier = built("gmp")
    train(model, optimizer, 7)
    assert told(model, optimizer, 5, ["up.weight"], start=7) == []
    assert told(model, optimizer, TOTAL - 12, start=12) == []
    assert active(sparsifier) == planned(sparsifier, 18)


@pytest.mark.parametrize("method", ["rigl", "snfs", "dsr"])
def test_a_weight_whose_density_stays_is_not_told_of(method):
    model, optimizer, _ = built(method)
    assert told(model, optimizer, TOTAL, ["up.weight"]) == []


def test_a_topology_that_was_fixed_is_not_told_of():
    model, optimizer, sparsifier = built("gmp")
    train(model, optimizer, 7)
    sparsifier.freeze()
    assert told(model, optimizer, TOTAL - 7, start=7) == []


def test_a_weight_that_was_never_stepped_on_is_told_of():
    model = small()
    method = replace(dstlib.GMP, interval=2, distribution=uniform)
    sparsifier = dstlib.sparsify(model, sparsity=0.7, method=method, total_steps=TOTAL)
    optimizer = torch.optim.SGD([*model.conv.parameters(), *model.head.parameters()], lr=0.1)
    (message,) = told(model, optimizer, TOTAL)
    assert "up.weight has 1.0000 where the plan has 0.3021, as no optimizer has stepped on it" in message
    assert bool(sparsifier.masks["up.weight"].all())

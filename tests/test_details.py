"""Details of growth, each against a loop that does it by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from models import assert_same, backward, small, train

import dstlib
from dstlib import SettingError
from dstlib.masking import NormalFanIn, Trace, num_units, traced_magnitude, uniform_fan_in, uniform_fan_out
from dstlib.schedules import Constant, Linear

SGD = {"lr": 0.1, "momentum": 0.9}
FAST = replace(dstlib.RIGL, interval=4, stop=1.0)


def built(method, sparsity=0.7, total_steps=16):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=sparsity, method=method, total_steps=total_steps)
    return model, optimizer, sparsifier


def watched(sparsifier):
    """What sites of conv.weight show at each update."""
    seen = []
    sparsifier.observers.append(
        lambda site, update: seen.append((site.step, site.trace.clone())) if site.name == "conv.weight" else None
    )
    return seen


@pytest.mark.parametrize("num_steps", [1, 3, 4, 9])
def test_a_trace_of_the_last_steps_is_the_sum_of_their_gradients(num_steps):
    """Also of a window longer than the interval, which begins anew after each update."""
    method = replace(FAST, grow=traced_magnitude, trace=Trace(steps=num_steps))
    model, optimizer, sparsifier = built(method)
    seen, grads = watched(sparsifier), []
    for step in range(16):
        optimizer.zero_grad()
        backward(model, step)
        grads.append(model.conv.weight.grad.clone())
        optimizer.step()
    assert [step for step, _ in seen] == [4, 8, 12, 16]
    for step, trace in seen:
        window = grads[max(step - num_steps, step - 4) : step]
        expected = torch.zeros_like(trace)
        for grad in window:
            expected = expected * 1.0 + grad
        assert torch.equal(trace, expected)


def test_a_decaying_trace_is_a_momentum_that_inactive_weights_have_too():
    method = replace(FAST, grow=traced_magnitude, trace=Trace(decay=0.9))
    model, optimizer, sparsifier = built(method)
    seen, momentum = watched(sparsifier), torch.zeros_like(model.conv.weight)
    expected = {}
    for step in range(16):
        optimizer.zero_grad()
        backward(model, step, scale=0.5)
        backward(model, step + 100, scale=0.5)  # accumulated
        sparsifier.before_step()  # as before clipping: must count once
        if step == 0:
            assert not seen
        optimizer.step()
    assert [step for step, _ in seen] == [4, 8, 12, 16]
    twin, twin_optimizer, other = built(replace(method, trace=Trace(decay=0.9)))
    for step in range(16):
        twin_optimizer.zero_grad()
        backward(twin, step, scale=0.5)
        backward(twin, step + 100, scale=0.5)
        momentum = momentum * 0.9 + twin.conv.weight.grad
        expected[step + 1] = momentum
        twin_optimizer.step()
    for step, trace in seen:
        assert torch.equal(trace, expected[step])
    assert_same(sparsifier.state_dict(), other.state_dict())


def test_a_trace_survives_a_resumption_in_mid_window():
    method = replace(FAST, grow=traced_magnitude, trace=Trace(steps=3))
    whole, resumed = built(method), built(method)
    train(whole[0], whole[1], 7)
    assert whole[2].state_dict()["weights"]["conv.weight"]["trace"].any()
    for part, other in zip(whole, resumed, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    for model, optimizer, _ in (whole, resumed):
        train(model, optimizer, 9, start=7)
    assert_same(whole[0].state_dict(), resumed[0].state_dict())


def test_no_step_is_taken_at_an_update():
    """RigL's Algorithm 1 has an update in place of a step: nothing moves but what was dropped or grown."""
    model, optimizer, sparsifier = built(replace(FAST, skip_step=True))
    for step in range(16):
        before = copy.deepcopy(model.state_dict())
        momenta = {n: optimizer.state[p].get("momentum_buffer") for n, p in model.named_parameters()}
        momenta = {n: None if v is None else v.clone() for n, v in momenta.items()}
        masks = {n: m.clone() for n, m in sparsifier.masks.items()}
        train(model, optimizer, 1, start=step)
        if (step + 1) % 4:
            continue
        for name, parameter in model.named_parameters():
            stays = masks[name] & sparsifier.masks[name] if name in masks else torch.ones_like(parameter).bool()
            assert torch.equal(parameter[stays], before[name][stays]), name
            assert torch.equal(optimizer.state[parameter]["momentum_buffer"][stays], momenta[name][stays]), name
    assert sparsifier.step == 16


def test_what_was_dropped_does_not_grow_back():
    """Growth by magnitude, where chance decides between zeros, would take back all that was just dropped."""
    method = replace(FAST, grow=lambda site: site.weight.abs() + 1e-9 * site.rand(), drop_fraction=Constant(0.5))
    moved = {}
    for regrow in (True, False):
        model, optimizer, sparsifier = built(replace(method, regrow=regrow))
        counts = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
        before = {n: m.clone() for n, m in sparsifier.masks.items()}
        train(model, optimizer, 4)
        moved[regrow] = {n: int((m & ~before[n]).sum()) for n, m in sparsifier.masks.items()}
        assert counts == {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    assert set(moved[True].values()) == {0}
    free = {n: m.numel() - counts[n] for n, m in sparsifier.masks.items()}
    assert moved[False] == {n: min(num // 2, free[n]) for n, num in counts.items()}


@pytest.mark.parametrize("init", [uniform_fan_in, uniform_fan_out, NormalFanIn()], ids=["fan-in", "fan-out", "normal"])
def test_grown_weights_start_where_they_are_told(init):
    """With a learning rate of nothing, grown weights are still what they began as."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=0.7, method=replace(FAST, interval=2, grown_init=init), total_steps=16
    )
    grown, begun = {}, []
    sparsifier.observers.append(
        lambda site, update: (begun.append(site.weight[update.grown].clone()), grown.update({site.name: update.grown}))
    )
    train(model, optimizer, 2)
    values = torch.cat(begun)
    assert len(values) > 5
    assert (values != 0).all()
    for name, where in grown.items():
        now = model.get_parameter(name).detach()
        now = now.transpose(0, 1) if name == "up.weight" else now
        assert torch.equal(now[where], begun[list(grown).index(name)])


def test_a_surplus_lasts_until_the_next_update_and_ends_with_the_last():
    """MEST's soft bound: more between updates than after the last."""
    method = replace(dstlib.METHODS["mest_soft"], surplus=Linear(0.5, 0.0), interval=4, stop=1.0)
    model, optimizer, sparsifier = built(method, sparsity=0.75)
    target = {n: num_units(sparsifier.masks[n].numel(), d) for n, d in sparsifier.plan.densities.items()}
    totals = []
    for step in range(16):
        train(model, optimizer, 1, start=step)
        totals.append(sum(int(m.sum()) for m in sparsifier.masks.values()))
    assert totals[0] > totals[4] > totals[8] > totals[12] > totals[15]
    assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trace": 8}, "trace of method rigl: expected a Trace, or None"),
        ({"storage": True}, "storage of method rigl: expected a DenseStorage"),
        ({"regrow": 1}, "regrow of method rigl: expected True or False"),
        ({"start_density": 0.0}, "start_density of method rigl: expected a density"),
        ({"allocate": 3}, "allocate of method rigl: expected an allocator"),
        ({"allocate": dstlib.masking.lamp, "granularity": dstlib.NM(2, 4)}, "fixes the number of each weight"),
        ({"allocate": dstlib.masking.lamp, "surplus": Constant(0.1)}, "surplus of method rigl: expected none"),
        ({"skip_step": True, "storage": dstlib.masking.DenseStorage()}, "skip_step of method rigl: expected False"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        replace(dstlib.RIGL, **changes)


def test_a_start_below_the_end_is_refused():
    with pytest.raises(SettingError, match=r"start_density of method granet_sparse: expected at least .* 0\.7"):
        dstlib.sparsify(small(), sparsity=0.3, method="granet_sparse", total_steps=1000)


@pytest.mark.parametrize("settings", [{"decay": 1.1}, {"decay": -0.1}, {"steps": 0}])
def test_traces_out_of_range_are_refused(settings):
    with pytest.raises(SettingError, match="of Trace: expected"):
        Trace(**settings)


@pytest.mark.parametrize("name", ["plan", "observers", "frozen", "masks", "weights", "step"])
def test_what_a_sparsifier_tells_is_not_to_be_set(name):
    sparsifier = dstlib.sparsify(torch.nn.Linear(8, 8), sparsity=0.5, method="static")
    with pytest.raises(AttributeError):
        setattr(sparsifier, name, getattr(sparsifier, name))

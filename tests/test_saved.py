"""Saving and resuming: equal to an uninterrupted run bit for bit, or one clear error and no change."""

import io
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_same, assert_zero_outside, backward, small, train
from torch import nn

import dstlib
from dstlib import DSFF, GMP, RIGL, SET, StateError
from dstlib.masking import FanIn, uniform
from dstlib.torch_files import checksum

METHODS = {
    "rigl": replace(RIGL, interval=3),
    "set": replace(SET, interval=2),
    "gmp": replace(GMP, interval=2),
    "dsff": replace(DSFF, interval=3),
    "fan-in": replace(RIGL, interval=2, granularity=FanIn(), distribution=uniform),
}


def set_up(method, model_seed=0, sparsity=0.6, seed=0):
    model = small(model_seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=sparsity, method=method, total_steps=12, seed=seed)
    return model, optimizer, sparsifier


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@given(name=st.sampled_from(sorted(METHODS)), cut=st.integers(1, 11), amid=st.booleans())
def test_resume_equals_uninterrupted(name, cut, amid):
    """Cut anywhere, also between an explicit ``before_step`` and the step itself, the gradients kept."""
    model, optimizer, sparsifier = set_up(METHODS[name])
    train(model, optimizer, 12)

    first, first_optimizer, first_sparsifier = set_up(METHODS[name])
    train(first, first_optimizer, cut)
    if amid:
        first_optimizer.zero_grad()
        backward(first, cut)
        first_sparsifier.before_step()
    parts = (first, first_optimizer, first_sparsifier)
    state = through_a_file([part.state_dict() for part in parts])

    second = set_up(METHODS[name], model_seed=1, seed=0)
    for part, saved in zip(second, state, strict=True):
        part.load_state_dict(saved)
    assert_zero_outside(second[0], second[2].masks, second[1])
    if amid:
        for ours, theirs in zip(second[0].parameters(), first.parameters(), strict=True):
            ours.grad = theirs.grad
        second[1].step()
    train(second[0], second[1], 12 - cut - amid, start=cut + amid)
    assert_same(model.state_dict(), second[0].state_dict())
    assert_same(optimizer.state_dict()["state"], second[1].state_dict()["state"])
    assert_same(sparsifier.state_dict(), second[2].state_dict())


@pytest.mark.parametrize("cut", [2, 5])
def test_an_optimizer_that_is_named_before_its_first_step_takes_part_in_it(cut):
    """As when gradients are clipped: an update leaves the step out, also for weights that are not sparse."""
    method = replace(RIGL, interval=3, skip_step=True)

    def clipped(model, optimizer, sparsifier, steps, start):
        for step in range(start, start + steps):
            optimizer.zero_grad()
            backward(model, step)
            sparsifier.before_step(optimizer)
            optimizer.step()

    whole, first, second = (set_up(method) for _ in range(3))
    clipped(*whole, 12, 0)
    clipped(*first, cut, 0)
    second[2].detach()
    resumed = dstlib.sparsify(second[0], sparsity=0.6, method=method, total_steps=12)
    second = (*second[:2], resumed)
    for part, saved in zip(second, through_a_file([part.state_dict() for part in first]), strict=True):
        part.load_state_dict(saved)
    clipped(*second, 12 - cut, cut)
    assert_same(whole[0].state_dict(), second[0].state_dict())
    assert_same(whole[1].state_dict()["state"], second[1].state_dict()["state"])


def test_model_and_sparsifier_pickle_together():
    model, optimizer, sparsifier = set_up(METHODS["rigl"])
    train(model, optimizer, 4)
    twin, twin_sparsifier = pickle.loads(pickle.dumps((model, sparsifier)))
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    train(twin, twin_optimizer, 3, start=4)
    assert_zero_outside(twin, twin_sparsifier.masks, twin_optimizer)
    assert (twin_sparsifier.step, sparsifier.step) == (7, 4)


def test_the_model_itself_stays_as_it_was():
    plain, (model, optimizer, _) = small(), set_up(METHODS["rigl"])
    train(model, optimizer, 4)
    assert type(model) is type(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    pickle.loads(pickle.dumps(model))


def test_frozen_is_saved():
    *_, sparsifier = set_up(METHODS["rigl"])
    sparsifier.freeze()
    resumed = set_up(METHODS["rigl"])
    resumed[2].load_state_dict(sparsifier.state_dict())
    before = {n: m.clone() for n, m in resumed[2].masks.items()}
    train(resumed[0], resumed[1], 9)
    assert_same(before, resumed[2].masks)


def without(state, name):
    return {**state, "weights": {n: w for n, w in state["weights"].items() if n != name}}


def with_mask(state, name, mask):
    return {**state, "weights": {**state["weights"], name: {**state["weights"][name], "mask": mask}}}


BROKEN = {
    "not a state": (lambda s: [1, 2], "contents of the saved state"),
    "that of a model": (lambda s: {"up.weight": 1, "up.bias": 2}, "dict with the keys up.weight, up.bias. Pass what"),
    "of a later version": (lambda s: {**s, "version": 9}, "version of the saved state: expected 2, got 9"),
    "a weight missing": (lambda s: without(s, "up.weight"), r"1 missing \(up.weight\), 0 extra"),
    "another shape": (lambda s: with_mask(s, "up.weight", torch.ones(2, 2).bool()), r"mask of up.weight: .*\(4, 6, 2"),
    "not boolean": (lambda s: with_mask(s, "up.weight", torch.ones(4, 6, 2, 2)), "mask of up.weight: .*bool"),
    "another sparsity": (lambda s: with_mask(s, "up.weight", torch.ones(4, 6, 2, 2).bool()), "got 24"),
    "part of a unit": (lambda s: with_mask(s, "up.weight", half_units()), "whole units of Kernel"),
    "a field missing": (lambda s: {**s, "weights": {**s["weights"], "up.weight": {}}}, "fields of up.weight"),
}


def half_units():
    mask = torch.zeros(4, 6, 2, 2, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    return mask


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(case):
    break_it, message = BROKEN[case]
    model, optimizer, sparsifier = set_up(METHODS["dsff"])
    train(model, optimizer, 4)
    state, weights = sparsifier.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(StateError, match=message):
        sparsifier.load_state_dict(break_it(sparsifier.state_dict()))
    assert_same(state, sparsifier.state_dict())
    assert_same(weights, model.state_dict())


def test_another_architecture_is_refused():
    *_, sparsifier = set_up(METHODS["rigl"])
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(StateError, match="names of the weights"):
        dstlib.sparsify(other, sparsity=0.6, method="static").load_state_dict(sparsifier.state_dict())


def test_a_state_is_a_snapshot():
    model, optimizer, sparsifier = set_up(METHODS["rigl"])
    state = sparsifier.state_dict()
    copy = {n: w["mask"].clone() for n, w in state["weights"].items()}
    train(model, optimizer, 6)
    assert_same(copy, {n: w["mask"] for n, w in state["weights"].items()})


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "message"),
    [
        (("rigl", 400), ("set", 400), "method of the saved state: expected 'set', got 'rigl'"),
        (("rigl", 400), ("rigl", 800), "total_steps of the saved state: expected 800, got 400"),
        (("static", None), ("static", 400), "total_steps of the saved state: expected 400, got None"),
    ],
)
def test_a_state_knows_its_method_and_the_length_of_its_run(saved_by, loaded_by, message):
    def built(method, total_steps):
        torch.manual_seed(0)
        model = torch.nn.Linear(20, 20)
        return model, dstlib.sparsify(model, sparsity=0.5, method=method, total_steps=total_steps)

    (_, theirs), (_, ours) = built(*saved_by), built(*loaded_by)
    before = {name: mask.clone() for name, mask in ours.masks.items()}
    with pytest.raises(dstlib.StateError, match=message):
        ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(mask, before[name]) for name, mask in ours.masks.items())
    ours.detach()
    state = {
        key: value for key, value in theirs.state_dict().items() if key not in ("method", "total_steps", "checksum")
    }
    state["checksum"] = checksum(state)  # as earlier builds saved it
    _, again = built(*saved_by)
    again.load_state_dict(state)
    assert all(torch.equal(mask, theirs.masks[name]) for name, mask in again.masks.items())

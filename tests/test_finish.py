"""Runs that are cut short: finish() brings the plan to its end, and freeze() says where it was not."""

import copy
import io
import warnings
from dataclasses import replace

import pytest
import torch
from models import assert_same, small, train

import dstlib
from dstlib import METHODS, NM

TOTAL = 24


def built(name):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = METHODS[name]
    if method.interval is not None:
        method = replace(method, interval=2)
    structured = isinstance(method.granularity, NM)
    if structured:
        method = replace(method, granularity=NM(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is left dense, and of weights without zeros to start from
        sparsifier = dstlib.sparsify(
            model,
            optimizer,
            sparsity=0.5 if structured else 0.7,
            method=method,
            total_steps=TOTAL,
            include=["up"] if structured else "*",
        )
    return model, optimizer, sparsifier


def planned(sparsifier, step):
    plan = sparsifier.plan
    sizes = {s.name: plan.method.granularity.fold(s.of(w.parameter)).shape for w in sparsifier.weights for s in w.views}
    return sum(size[0] * plan.num_target(name, size[1], step) * size[2] for name, size in sizes.items())


@pytest.mark.parametrize("num_steps", [0, 5, TOTAL])
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_brought_to_its_end(name, num_steps):
    model, optimizer, sparsifier = built(name)
    train(model, optimizer, num_steps)
    before = copy.deepcopy(sparsifier.masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # finish() has nothing to warn of
        sparsifier.finish()
    wanted = planned(sparsifier, TOTAL)
    num_groups = max(sparsifier.plan.method.granularity.fold(m).shape[0] for m in sparsifier.masks.values())
    spare = 3 * (num_groups - 1)  # what does not divide into groups may lie idle
    num_active = sum(int(m.sum()) for m in sparsifier.masks.values())
    assert wanted - spare <= num_active <= wanted
    if num_active <= sum(int(m.sum()) for m in before.values()):
        assert all(not (m & ~before[n]).any() for n, m in sparsifier.masks.items()), "nothing grows"
    masks = copy.deepcopy(sparsifier.masks)
    train(model, optimizer, 3, start=num_steps)
    assert_same(sparsifier.masks, masks)
    for n, mask in masks.items():
        weight = model.get_parameter(n)
        assert not weight.detach()[~mask].any()
        if sparsifier.plan.method.storage is None:
            assert not optimizer.state[weight]["momentum_buffer"][~mask].any()


@pytest.mark.parametrize("name", ["rigl", "gmp", "granet", "acdc", "topkast", "mest_soft"])
def test_what_is_finished_is_saved_and_loaded(name):
    model, optimizer, sparsifier = built(name)
    train(model, optimizer, 5)
    sparsifier.finish()
    file = io.BytesIO()
    torch.save([model.state_dict(), sparsifier.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, _, other = built(name)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.frozen
    assert_same(other.masks, sparsifier.masks)


@pytest.mark.parametrize(("name", "density"), [("acdc", "1.0000"), ("gmp", r"0\.6\d+"), ("mest_soft", r"0\.4\d+")])
def test_freezing_on_the_way_says_at_what_density(name, density):
    model, optimizer, sparsifier = built(name)
    train(model, optimizer, 1 if name == "acdc" else 5)
    with pytest.warns(UserWarning, match=rf"freeze\(\) at step \d: the density stays at {density}, .*finish\(\)"):
        sparsifier.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.freeze()  # it is, already


@pytest.mark.parametrize("name", ["acdc", "gmp", "mest_soft", "granet"])
def test_what_was_frozen_on_the_way_can_still_be_finished_as_the_warning_says(name):
    model, optimizer, sparsifier = built(name)
    num_steps = 1 if name == "acdc" else 5
    train(model, optimizer, num_steps)
    with pytest.warns(UserWarning, match=r"Call finish\(\)"):
        sparsifier.freeze()
    train(model, optimizer, 2, start=num_steps)
    sparsifier.finish()
    assert sparsifier.frozen
    assert sum(int(m.sum()) for m in sparsifier.masks.values()) == planned(sparsifier, TOTAL)
    masks = copy.deepcopy(sparsifier.masks)
    sparsifier.finish()
    train(model, optimizer, 2, start=num_steps + 2)
    assert_same(sparsifier.masks, masks)


@pytest.mark.parametrize("name", ["static", "rigl", "srigl", "dsff"])
def test_freezing_at_a_constant_density_says_nothing(name):
    model, optimizer, sparsifier = built(name)
    train(model, optimizer, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.freeze()

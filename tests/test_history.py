"""Histories: whole numbers against masks looked at one by one, and no trace of the observer in the run."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import assert_same, small, train
from torch import nn

import dstlib
from dstlib import NM, History, StateError, TrainingCost
from dstlib.tracks import dead_channels, explored_by_chance


def built(name="rigl", **changes):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(dstlib.METHODS[name], **changes)
    if method.interval is not None:
        method = replace(method, interval=2)
    include = ["up"] if isinstance(method.granularity, NM) else "*"
    with torch.no_grad():
        sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=16, include=include)
    return model, optimizer, sparsifier


@pytest.mark.parametrize("name", dstlib.METHODS)
def test_observers_never_change_a_run(name):
    """Weights, masks and optimizer state are bit-equal with and without a history and a cost."""
    ends = []
    for observed in (False, True):
        model, optimizer, sparsifier = built(name)
        if observed:
            history = History(sparsifier)
            cost = TrainingCost(history, model, (4, 2, 6, 6))
        train(model, optimizer, 16)
        if observed:
            assert str(history)
            assert str(cost)
        states = [part.state_dict() for part in (model, sparsifier)]
        ends.append([*states, {str(k): v for k, v in optimizer.state_dict()["state"].items()}])
    for without, observed in zip(*ends, strict=True):
        assert_same(without, observed)


@pytest.mark.parametrize("name", ["set", "rigl", "gmp", "granet", "dsff", "acdc", "topkast"])
def test_numbers_are_those_of_the_masks(name):
    """An oracle that copies every mask at every step and compares them in plain torch."""
    model, optimizer, sparsifier = built(name)
    history = History(sparsifier)
    masks = [copy.deepcopy(sparsifier.masks)]
    for step in range(16):
        train(model, optimizer, 1, start=step)
        masks.append(copy.deepcopy(sparsifier.masks))
    a = history.arrays()
    for i, layer in enumerate(a["name"]):
        seen = [m[layer] for m in masks]
        union = torch.zeros_like(seen[0])
        for j, step in enumerate(a["step"]):
            now, before = seen[step], seen[a["step"][j - 1]] if j else seen[0]
            for mask in seen[: step + 1]:
                union |= mask
            assert a["active"][i, j] == now.sum()
            assert a["explored"][i, j] == union.sum()
            assert a["from_first"][i, j] == (now & seen[0]).sum()
            assert a["grown"][i, j] == (now & ~before).sum()
            assert a["dropped"][i, j] == (before & ~now).sum()
            assert a["overlap"][i, j] == (now & before).sum() / before.sum()
            assert a["jaccard"][i, j] == (now & before).sum() / (now | before).sum()
        assert a["density"][i, -1] == sparsifier.masks[layer].double().mean()
    explored = a["total_explored_share"]
    assert (np.diff(explored) >= 0).all()
    assert a["total_density"][0] <= explored[-1] == history.explored <= 1


def test_dead_channels_by_hand():
    mask = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 0]]]).bool()  # (3 outputs, 2 inputs, 2 taps)
    dead = dead_channels(mask)
    assert dead.outputs.tolist() == [False, True, False]
    assert dead.inputs.tolist() == [False, True]


def test_dead_channels_are_those_of_the_live_masks():
    _, _, sparsifier = built("static", distribution=dstlib.uniform)
    sparsifier.masks["head.weight"][1] = False
    dead = History(sparsifier).dead_channels()["head.weight"]
    assert dead.outputs.tolist() == [not row.any() for row in sparsifier.masks["head.weight"]]
    assert dead.inputs.tolist() == [not column.any() for column in sparsifier.masks["head.weight"].T]


def test_a_history_goes_on_after_a_resumption():
    """The explored share knows what was active before the interruption."""
    model, optimizer, sparsifier = built("set")
    whole = History(sparsifier)
    train(model, optimizer, 8)
    file = io.BytesIO()
    torch.save([p.state_dict() for p in (model, optimizer, sparsifier, whole)], file)
    train(model, optimizer, 8, start=8)
    file.seek(0)
    resumed = built("set")
    history = History(resumed[2])
    for part, state in zip((*resumed, history), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[1], 8, start=8)
    assert history.explored == whole.explored
    for name, values in whole.arrays().items():
        assert np.array_equal(values, history.arrays()[name]), name


def test_a_history_of_another_model_is_refused():
    history = History(built()[2])
    for state in ({}, {"version": 1, "layers": {}}, {"version": 9, "layers": history.state_dict()["layers"]}):
        with pytest.raises(StateError, match="of the saved history: expected"):
            history.load_state_dict(state)


def test_a_closed_history_records_no_more():
    model, optimizer, sparsifier = built()
    history = History(sparsifier)
    train(model, optimizer, 4)
    history.close()
    history.close()
    before = history.state_dict()
    train(model, optimizer, 4, start=4)
    assert_same(before, history.state_dict())
    assert sparsifier.observers == []


def test_random_growth_explores_as_the_closed_form_says():
    """E[R_s] = 1 - (1-d)·Π(1-q); 40 seeds of 1,024 entries, within five standard errors."""
    num_updates, density, shares = 10, 0.25, []
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Linear(32, 32, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        method = replace(
            dstlib.SET, drop=dstlib.masking.magnitude, distribution=dstlib.uniform, interval=1, stop=1.0,
            drop_fraction=dstlib.schedules.Constant(0.25),
        )  # fmt: skip
        sparsifier = dstlib.sparsify(
            model, optimizer, sparsity=1 - density, method=method, total_steps=num_updates, seed=seed
        )
        history = History(sparsifier)
        for _ in range(num_updates):
            optimizer.zero_grad()
            model(torch.ones(1, 32)).sum().backward()
            optimizer.step()
        shares.append(history.explored)
    expected = explored_by_chance(density, [0.25] * num_updates)  # 0.25 · 256 is whole
    error = np.std(shares, ddof=1) / len(shares) ** 0.5
    assert abs(np.mean(shares) - expected) < 5 * error < 0.01

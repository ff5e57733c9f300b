"""Histories: whole numbers against masks looked at one by one, and no trace of the observer in the run."""

import copy
import importlib.util
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_same, small, train
from torch import nn

import dstlib
from dstlib import NM, History, StateError, TrainingCost
from dstlib.history import dead_channels, explored_by_chance


def built(name="rigl", **changes):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(dstlib.METHODS[name], **changes)
    if method.interval is not None:
        method = replace(method, interval=2)
    if name == "acdc":  # of which 16 steps are too few for the phases of the paper
        method = replace(method, ramp=dstlib.schedules.Alternating())
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


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(), (1,), (2, 3)]), st.integers(0, 2**32 - 1))
def test_dead_channels_against_a_search(num_out, num_in, taps, seed):
    mask = torch.rand(num_out, num_in, *taps, generator=torch.Generator().manual_seed(seed)) < 0.3
    dead = dead_channels(mask)
    assert dead.outputs.tolist() == [not any(mask[o].flatten().tolist()) for o in range(num_out)]
    assert dead.inputs.tolist() == [not any(mask[:, i].flatten().tolist()) for i in range(num_in)]


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


def test_a_history_of_version_1_is_gone_on_with():
    """It was saved before idle groups were counted."""
    model, optimizer, sparsifier = built("set")
    whole = History(sparsifier)
    train(model, optimizer, 8)
    saved = whole.state_dict()
    old = {
        "version": 1,
        "layers": {name: {**layer, "changes": layer["changes"][:, :8]} for name, layer in saved["layers"].items()},
    }
    history = History(sparsifier)
    history.load_state_dict(old)
    assert_same(history.state_dict(), saved)
    with pytest.raises(StateError, match=r"changes of conv.weight: expected whole numbers of shape \(updates, 8\)"):
        history.load_state_dict({**saved, "version": 1})
    train(model, optimizer, 8, start=8)
    for name, values in whole.arrays().items():
        assert np.array_equal(values, history.arrays()[name]), name


@pytest.mark.parametrize(("granularity", "num_groups"), [(dstlib.Element(), 1), (dstlib.FanIn(), 8)])
def test_updates_without_a_reason_are_counted(granularity, num_groups):
    """A layer without a gradient exchanges nothing; one that has gradients goes on."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("reached", "idle")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    half = dstlib.schedules.Constant(0.5)
    method = replace(dstlib.RIGL, interval=2, granularity=granularity, distribution=dstlib.uniform, drop_fraction=half)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=20)
    history = History(sparsifier)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(4, 8)
        ((model["reached"](x) - 1).square() + 0 * model["idle"](x)).sum().backward()
        optimizer.step()
    a = history.arrays()
    assert a["name"].tolist() == ["reached.weight", "idle.weight"]
    assert a["idle"].tolist() == [[0] * 6, [0] + [num_groups] * 5]
    assert a["grown"].any(axis=1).tolist() == [True, False]
    _, title, _, reached, idle, _ = str(history).splitlines()
    place = title.split().index("idle")
    assert [row.split()[place] for row in (reached, idle)] == ["0", "5"]


def test_attached_in_mid_run_it_begins_with_the_masks_of_that_moment():
    model, optimizer, sparsifier = built("set")
    train(model, optimizer, 5)
    first = copy.deepcopy(sparsifier.masks)
    history = History(sparsifier)
    assert history.explored == sparsifier.density
    train(model, optimizer, 7, start=5)
    a = history.arrays()
    assert a["step"].tolist() == [5, 6, 8, 10, 12]
    assert a["active"][:, 0].tolist() == [int(mask.sum()) for mask in first.values()]
    both = sum(int((mask & sparsifier.masks[name]).sum()) for name, mask in first.items())
    assert a["total_first_overlap"][-1] == both / sum(int(mask.sum()) for mask in first.values())


def test_what_is_exchanged_and_what_stays_is_all_there_was():
    """Churn and overlap add up to 1 while the number of active entries holds; a ramp exchanges nothing."""
    for name in ("set", "gmp"):
        model, optimizer, sparsifier = built(name)
        history = History(sparsifier)
        train(model, optimizer, 16)
        a = history.arrays()
        if name == "set":
            np.testing.assert_allclose(a["churn"] + a["overlap"], 1, rtol=1e-15)
            assert (a["churn"][a["updated"]] > 0).any()
        else:
            assert not a["churn"].any()
            assert (a["overlap"] < 1).any()


def test_layers_are_slots():
    """Query, key and value of one in_proj are three layers, and transposed convolutions are turned round."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "up": nn.ConvTranspose1d(3, 5, 2)})
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    a = History(sparsifier).arrays()
    assert a["name"].tolist() == [
        "attn.in_proj_weight.q", "attn.in_proj_weight.k", "attn.in_proj_weight.v", "attn.out_proj.weight", "up.weight"
    ]  # fmt: skip
    assert a["active"][0, 0] == sparsifier.masks["attn.in_proj_weight"][:8].sum()
    assert (a["num_outputs"][-1], a["num_inputs"][-1]) == (5, 3)


def test_masks_that_were_loaded_in_between_count_as_seen():
    model, optimizer, sparsifier = built("set")
    history = History(sparsifier)
    method = replace(dstlib.SET, interval=2)
    other = dstlib.sparsify(small(), sparsity=0.5, method=method, total_steps=16, seed=1).state_dict()
    union = {name: mask | other["weights"][name]["mask"] for name, mask in copy.deepcopy(sparsifier.masks).items()}
    sparsifier.load_state_dict(other)
    train(model, optimizer, 2)
    for i, (name, mask) in enumerate(union.items()):
        assert history.arrays()["explored"][i, -1] == (mask | sparsifier.masks[name]).sum()


def test_copies_record_for_themselves():
    model, optimizer, sparsifier = built("set")
    history = History(sparsifier)
    twin_model, twin_optimizer, twin = copy.deepcopy((model, optimizer, sparsifier))
    train(twin_model, twin_optimizer, 4)
    assert history.arrays()["step"].tolist() == [0]
    assert twin.observers[0].__self__.arrays()["step"].tolist() == [0, 2, 4]


def test_a_history_of_another_model_is_refused():
    history = History(built()[2])
    for state in ({}, {"version": 1, "layers": {}}, {"version": 9, "layers": history.state_dict()["layers"]}):
        with pytest.raises(StateError, match="of the saved history: expected"):
            history.load_state_dict(state)
    for key, damaged in (("changes", torch.zeros(0, 9).long()), ("changes", None), ("marks", torch.zeros(3).byte())):
        state = history.state_dict()
        state["layers"]["conv.weight"][key] = damaged
        with pytest.raises(StateError, match=f"{key} of conv.weight: expected"):
            history.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("changes", lambda x: x.roll(1, dims=0), "changes of conv.weight: expected steps in order"),
        ("changes", lambda x: x.neg(), "changes of conv.weight: expected steps in order, and counts of 72 entries"),
        ("changes", lambda x: x.to("meta"), "changes of conv.weight: expected whole numbers of shape"),
        ("marks", lambda x: x.clamp(max=2), "marks of conv.weight: expected .* entries that were active"),
        ("marks", torch.zeros_like, "marks of conv.weight: expected .* entries that were active"),
        ("marks", lambda x: x.to_sparse(), "marks of conv.weight: expected bytes of shape"),
        ("marks", lambda x: x.flip(0), "checksum of the saved history: expected"),
        ("changes", lambda x: x * torch.tensor([1, 1, 0, *[1] * 6]), "checksum of the saved history: expected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_history_is_refused(key, change, message):
    model, optimizer, sparsifier = built()
    history = History(sparsifier)
    train(model, optimizer, 4)
    state = history.state_dict()
    state["layers"]["conv.weight"][key] = change(state["layers"]["conv.weight"][key])
    with pytest.raises(StateError, match=message):
        history.load_state_dict(state)
    with pytest.raises(StateError, match="contents of the saved history"):
        history.load_state_dict({**state, "version": torch.ones(2)})


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


def test_the_benchmark_of_exploration_in_small():
    """Fractions that fall and do not divide: within five standard errors by the exact variance of one run."""
    spec = importlib.util.spec_from_file_location("explored", Path(__file__).parents[1] / "benchmarks" / "explored.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    drop, fraction = dstlib.masking.random, dstlib.schedules.Cosine(0.5)
    result = benchmark.measure(drop, fraction, size=24, density=0.11, num_updates=8, seeds=range(30))
    assert abs(result.z) < 5
    assert 0.5 < np.std(result.seen, ddof=1) / result.law.deviation < 1.6  # χ² of 29: outside it 1 in 10⁵
    whole = benchmark.law(1024, 256, [64] * 10)
    assert whole.mean == pytest.approx(explored_by_chance(0.25, [0.25] * 10), rel=1e-12)

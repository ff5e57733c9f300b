"""Defects that a review found, one test each; every docstring says what went wrong and why it matters."""

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from models import assert_same, backward, small, train
from torch import nn

import dstlib
from dstlib import GMP, RIGL, ScoreError, SelectionError, StateError
from dstlib.masking import magnitude
from dstlib.targets import select

METHOD = replace(RIGL, interval=2)


def sgd(parameters, **settings):
    return torch.optim.SGD(parameters, lr=0.1, **settings)


def test_listeners_are_told_in_the_order_in_which_they_came():
    """A WeakSet iterates by address, so ranks compared the masks of different sparsifiers and raised."""
    code = (
        "import torch, dstlib; from torch import nn; from dstlib.sparsifier import hooks\n"
        "kept = [(nn.Linear(4, 4), bytearray(2000 * i)) for i in range(12)]\n"
        "made = [dstlib.sparsify(m, sparsity=0.5, method='static') for m, _ in kept]\n"
        "told = []\n"
        "for s in made: s.steps_with = lambda o, s=s: told.append(made.index(s))\n"
        "weight = nn.Parameter(torch.ones(1)); torch.optim.SGD([weight], lr=0.1).step(); print(told[:12])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout.split() == str(list(range(12))).split()


def test_draws_do_not_depend_on_the_default_dtype():
    """In a bfloat16 default, uniform draws had 256 values: ties put all active weights into the first quarter."""
    masks = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            masks.append(dstlib.sparsify(nn.Linear(300, 300), sparsity=0.999, method="static").masks["weight"])
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_draws_do_not_depend_on_the_default_device():
    """Under ``torch.set_default_device`` the CPU generator met a draw on another device, and sparsify raised."""
    model = nn.Linear(10, 10)
    with torch.device("meta"):
        assert dstlib.sparsify(model, sparsity=0.9, method="static").density == 0.1


def test_a_weight_shared_with_another_model_is_not_masked_twice():
    """The check looked at modules; two sparsifiers on one parameter left half of the density asked for."""
    first, second = nn.Linear(10, 10), nn.Linear(10, 10)
    second.weight = first.weight
    kept = dstlib.sparsify(first, sparsity=0.5, method="static")
    with pytest.raises(SelectionError, match="another sparsifier"):
        dstlib.sparsify(second, sparsity=0.5, method="static", seed=1)
    assert kept.density == 0.5


def test_a_copied_pair_is_not_masked_twice():
    """The copy of a masked model did not count as masked."""
    model = nn.Linear(10, 10)
    pair = copy.deepcopy((model, dstlib.sparsify(model, sparsity=0.5, method="static")))
    with pytest.raises(SelectionError, match="another sparsifier"):
        dstlib.sparsify(pair[0], sparsity=0.5, method="static")


def test_two_sparsifiers_may_share_a_module_but_not_a_weight():
    """The second was refused although its weight was free."""
    model = nn.LSTM(4, 8)
    first = dstlib.sparsify(model, sparsity=0.5, method="static", include="weight_ih_l0")
    second = dstlib.sparsify(model, sparsity=0.5, method="static", include="weight_hh_l0")
    assert not first.masks.keys() & second.masks.keys()


def test_a_call_before_clipping_does_not_spend_the_update_of_another_optimizer():
    """``before_step`` booked an update for weights that had no gradient yet, which then never came."""
    model = small()
    body = sgd([*model.conv.parameters(), *model.up.parameters(), *model.norm.parameters()])
    head = sgd(model.head.parameters())
    sparsifier = dstlib.sparsify(model, body, head, sparsity=0.7, method=METHOD, total_steps=40)
    updates = []
    sparsifier.observers.append(lambda site, update: updates.append((site.name, site.step)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head has no gradient when the body steps, as is meant
        for step in range(4):
            model.zero_grad()
            backward(model, step)
            model.head.zero_grad()
            sparsifier.before_step()
            body.step()
            model.zero_grad()
            backward(model, step)
            head.step()
    assert [step for name, step in updates if name == "head.weight"] == [2, 4]


def test_momentum_is_that_of_the_optimizer_which_steps():
    """An optimizer that was replaced but lives on shadowed the momentum of its successor, by address."""
    for _ in range(6):  # the order was one of addresses
        model, seen = small(), []
        method = replace(
            METHOD, drop=lambda site, seen=seen: (seen.append((site.name, site.momentum)), site.weight.abs())[1]
        )
        dstlib.sparsify(model, sparsity=0.7, method=method, total_steps=40)
        old, new = sgd(model.parameters(), momentum=0.9), torch.optim.Adam(model.parameters(), lr=0.01)
        train(model, old, 3)
        train(model, new, 1)
        seen.clear()
        train(model, new, 2)
        expected = {n: new.state[p]["exp_avg"] for n, p in model.named_parameters()}
        assert seen
        for name, momentum in seen:
            whole = expected[name]
            assert momentum.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), name


def test_zeros_hold_when_an_observer_raises():
    """The mask had moved, the dropped weights were not yet cleared: a caught exception left live zeros."""
    model = small()
    optimizer = sgd(model.parameters(), momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=METHOD, total_steps=40)
    sparsifier.observers.append(lambda site, update: 1 / 0)
    train(model, optimizer, 1)
    with pytest.raises(ZeroDivisionError):
        train(model, optimizer, 1, start=1)
    for name, mask in sparsifier.masks.items():
        assert not (model.get_parameter(name)[~mask] != 0).any(), name


def test_a_module_with_one_weight_that_can_be_sparse_may_be_named():
    """bias_k, a 1×1×E parameter, made ``include="attention"`` an error; so did the factors of a LoRA layer."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, add_bias_kv=True), "embed": nn.Embedding(4, 8)})
    found = {w.name: w.reason for w in select(model, include=("attention",))}
    assert found["attention.in_proj_weight"] == ""
    assert "no weight of Linear, Conv or attention" in found["attention.bias_k"]
    for impossible in ("attention.bias_k", "embed"):
        with pytest.raises(SelectionError, match="masked in place"):
            select(model, include=(impossible,))


def test_names_survive_compilation_around_data_parallel():
    """torch.compile(DistributedDataParallel(model)) gave names with "module.", other draws and other states."""
    model = small()
    sparsifier = dstlib.sparsify(torch.compile(nn.DataParallel(model)), sparsity=0.5, method="static")
    assert list(sparsifier.masks) == ["conv.weight", "up.weight", "head.weight"]


def test_a_state_of_another_sparsity_is_refused_by_pruning_too():
    """The docstring promises it; for methods with a ramp nothing was checked, and the density stayed wrong."""
    states = []
    for sparsity in (0.7, 0.2):
        model = small()
        sparsifier = dstlib.sparsify(model, sparsity=sparsity, method=replace(GMP, interval=2), total_steps=20)
        train(model, sgd(model.parameters()), 10)
        states.append((sparsifier, sparsifier.state_dict()))
    before = states[1][0].state_dict()
    with pytest.raises(StateError, match="active units"):
        states[1][0].load_state_dict(states[0][1])
    assert_same(before, states[1][0].state_dict())


@pytest.mark.parametrize(
    "damage", [{"weights": None}, {"weights": {"weight": {"mask": None, "step": "x", "updated_at": 0}}}]
)
def test_a_damaged_state_is_a_state_error(damage):
    """A TypeError or ValueError came out instead of a StateError that says what to do."""
    sparsifier = dstlib.sparsify(nn.Linear(4, 4), sparsity=0.5, method="static")
    state = sparsifier.state_dict()
    if damage["weights"]:
        damage["weights"]["weight"]["mask"] = state["weights"]["weight"]["mask"]
    with pytest.raises(StateError):
        sparsifier.load_state_dict({**state, **damage})


def test_the_argument_of_a_step_that_is_no_closure_is_left_alone():
    """It was wrapped as if it were a closure; the optimizer got a function, and the masks were never told."""

    class Scored(torch.optim.SGD):
        def step(self, score=None):
            assert score is None or score == 1.0
            super().step()

    model = small()
    optimizer = Scored(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method="static")
    backward(model, 0)
    optimizer.step(1.0)
    assert sparsifier.step == 1


def test_the_warning_points_at_the_users_line():
    """stacklevel was one short: the warning named door.py."""
    with pytest.warns(UserWarning, match="total_steps") as caught:
        dstlib.sparsify(small(), sparsity=0.5)
    assert caught[0].filename == __file__


def test_scores_that_cannot_be_ranked_at_the_start_name_their_weight():
    """``init=magnitude`` over a NaN said neither which weight nor that it was the first mask."""
    model = small()
    with torch.no_grad():
        model.up.weight[0] = torch.nan
    with pytest.raises(ScoreError, match=r"up\.weight at step 0"):
        dstlib.sparsify(model, sparsity=0.5, method=replace(dstlib.STATIC, init=magnitude))


def test_a_detached_sparsifier_is_freed():
    """It stayed, with its masks, for as long as the model lived."""
    model = small()
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    alive = weakref.ref(sparsifier)
    sparsifier.detach()
    del sparsifier
    gc.collect()
    assert alive() is None

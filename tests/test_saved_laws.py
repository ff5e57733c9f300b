"""The laws of saved states: whatever the container let pass, one that no training wrote is refused by what is wrong."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, backward, small

import dstlib
from dstlib import METHODS, StateError
from dstlib.masking import NM
from dstlib.sparsifier.saved import at_step_0, masks_of

STEPS, NAME = 24, "up.weight"


def set_up(name):
    method = METHODS[name]
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = dstlib.sparsify(
        model,
        optimizer,
        sparsity=0.5 if isinstance(method.granularity, NM) else 0.6,
        method=replace(method, interval=method.interval and 3),
        total_steps=STEPS,
        include=NAME if isinstance(method.granularity, NM) else ["up.weight", "head.weight"],  # what divides by four
    )
    return model, optimizer, sparsifier


def train(model, optimizer, steps, absent=frozenset()):
    """Some steps, in each of which one weight may have no gradient."""
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        if step in absent:
            (model.up if step % 2 else model.head).weight.grad = None
        optimizer.step()


def weight_of(state, **changes):
    """A copy of a state with other fields of one weight."""
    return {**state, "weights": {**state["weights"], NAME: {**state["weights"][NAME], **changes}}}


def unsealed(state):
    """A state as it was saved before states had checksums."""
    return {key: value for key, value in state.items() if key != "checksum"}


@pytest.fixture(scope="module", params=METHODS)
def trained(request):
    """A sparsifier after ten steps, between two updates, with its state; not to be changed."""
    model, optimizer, sparsifier = set_up(request.param)
    train(model, optimizer, 10)
    return sparsifier, sparsifier.state_dict()


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(METHODS)), num=st.integers(0, STEPS), absent=st.frozensets(st.integers(0, STEPS)))
def test_what_a_training_saves_is_taken_back(name, num, absent):
    """Also where weights wait for a gradient while others are updated."""
    model, optimizer, sparsifier = set_up(name)
    train(model, optimizer, num, absent)
    state = sparsifier.state_dict()
    for saved in (state, unsealed(state)):
        *_, other = set_up(name)
        other.load_state_dict(saved)
        assert_same(other.state_dict(), state)


def other_mask(state, change):
    mask = state["weights"][NAME]["mask"].clone()
    return weight_of(state, mask=change(mask))


def one_more(mask):
    mask.view(-1)[int(torch.nonzero(~mask.flatten())[0])] = True
    return mask


def odd_byte(mask):
    mask.view(torch.uint8)[mask] = 2  # True, as far as torch can tell
    return mask


def exchanged(mask):
    """As many active, elsewhere."""
    return mask.flatten().roll(1).view(mask.shape)


# what is changed, and how the refusal begins
WEIGHT = {
    "a negative step": ({"step": -1}, "step"),
    "a step without end": ({"step": 2**64}, "step"),
    "a fractional step": ({"step": 10.0}, "step"),
    "a step that is a truth value": ({"step": True}, "step"),
    "no step": ({"step": None}, "step"),
    "an update before there is one": ({"updated_at": 1}, "(updated_at|masks)"),  # acdc may have had one at step 1
    "a negative update": ({"updated_at": -3}, "updated_at"),
    "an update to come": ({"updated_at": 1200}, "(updated_at|mask)"),
    "a trace to come": ({"traced_at": 1200}, "traced_at"),
    "a trace before the start": ({"traced_at": -1}, "traced_at"),
    "no mask": ({"mask": None}, "mask"),
    "a mask of numbers": ({"mask": torch.ones(4, 6, 2, 2)}, "mask"),
    "a mask of another shape": ({"mask": torch.ones(4, 6, 2, dtype=torch.bool)}, "mask"),
    "a mask of more values than memory": ({"mask": torch.ones(1, dtype=torch.bool).expand(2**40)}, "mask"),
    "a trace of nothing": ({"trace": torch.full((4, 6, 2, 2), torch.nan), "traced_at": 9}, "traced?(_at)?"),
    "a trace of text": ({"trace": "trace"}, "trace"),
    "a trace of another shape": ({"trace": torch.ones(2), "traced_at": 9}, "traced?(_at)?"),
    "hidden weights of text": ({"hidden": "hidden"}, "hidden"),
    "hidden weights that are infinite": ({"hidden": torch.full((4, 6, 2, 2), torch.inf)}, "hidden"),
    "hidden weights inside the mask": ({"hidden": torch.ones(4, 6, 2, 2)}, "hidden"),
    "a reach of numbers": ({"reach": torch.ones(4, 6, 2, 2)}, "reach"),
    "a reach less than the mask": ({"reach": torch.zeros(4, 6, 2, 2, dtype=torch.bool)}, "reach"),
    "densities from nowhere": ({"ranked": (0.5,)}, "ranked densities"),
    "a field more": ({"momentum": 1}, "fields"),
}
MASK = {"one unit more": (one_more, "(masks?|hidden)"), "bytes of no truth value": (odd_byte, "mask")}
WHOLE = {
    "no version": ({"version": None}, "version"),
    "a version that is a truth value": ({"version": True}, "version"),
    "frozen by a number": ({"frozen": 1}, "frozen"),
    "frozen by text": ({"frozen": "no"}, "frozen"),
    "a memory of nothing": ({"memory": float("nan")}, "memory"),
    "a memory of text": ({"memory": "0"}, "memory"),
    "more planned": ({"num_planned": 1}, "sparsity"),
    "a plan of text": ({"num_planned": "many"}, "num_planned"),
    "outputs of lists": ({"outputs": {NAME: [None]}}, "outputs"),
    "no weights": ({"weights": {}}, "names of the weights"),
    "weights of numbers": ({"weights": {1: {}, 2: {}}}, "names of the weights"),
}


@pytest.mark.parametrize("case", [*WEIGHT, *MASK, *WHOLE])
def test_a_state_against_a_law_is_refused_by_name(trained, case):
    sparsifier, state = trained
    changes, what = {**WEIGHT, **MASK, **WHOLE}[case]
    if case in MASK:
        damaged = other_mask(state, changes)
    else:
        damaged = weight_of(state, **changes) if case in WEIGHT else {**state, **changes}
    method = sparsifier.plan.method
    lawful = {
        "an update before there is one": method.interval is None,  # no clock says when there would be one
        # what is shown of softened weights is less than they are, and the rest is kept
        "hidden weights inside the mask": method.storage is not None and method.storage.soft,
    }
    if lawful.get(case, False):
        what = "checksum"
    else:
        damaged = unsealed(damaged)
    with pytest.raises(StateError, match=rf"^{what} of "):
        sparsifier.load_state_dict(damaged)
    assert_same(sparsifier.state_dict(), state)


def test_what_no_law_forbids_is_told_by_the_checksum(trained):
    sparsifier, state = trained
    saved = state["weights"][NAME]
    changes = [{"step": saved["step"] + 1}, {"mask": exchanged(saved["mask"])}]
    changes += [{key: 2 * saved[key]} for key in ("trace", "hidden") if saved[key] is not None]
    for change in changes:
        with pytest.raises(StateError, match=r"^(checksum of the saved state|mask of|reach of|hidden of)"):
            sparsifier.load_state_dict(weight_of(state, **change))
        with pytest.raises(StateError, match=r"^checksum of the saved state"):
            masks_of(weight_of(state, **change))
        with pytest.raises(StateError, match=r"^checksum of the saved state"):
            at_step_0(weight_of(state, **change))
    with pytest.raises(StateError, match=r"^checksum of the saved state"):
        sparsifier.load_state_dict({**state, "frozen": True})
    assert_same(sparsifier.state_dict(), state)


@pytest.mark.parametrize("state", [None, [], {}, {"weights": {}}, {"version": 2, "weights": {"a": {}}}])
def test_masks_of_no_state_are_refused(state):
    for read in (masks_of, at_step_0):
        with pytest.raises(StateError, match=r"^(contents|version|fields) of "):
            read(state)


def test_constant_fan_in_is_a_law_of_its_own():
    model, optimizer, sparsifier = set_up("srigl")
    train(model, optimizer, 10)
    state = unsealed(sparsifier.state_dict())

    def moved(mask):  # from one output to another: as many in all
        view = next(w for w in sparsifier.weights if w.name == NAME).views[0].of(mask)
        rows = [row for row in range(len(view)) if view[row].any() and not view[row].all()]
        giver, taker = (view[row] for row in rows[:2])
        give, take = torch.nonzero(giver)[0], torch.nonzero(~taker)[0]
        giver[tuple(give)] = False
        taker[tuple(take)] = True
        return mask

    with pytest.raises(StateError, match=r"^mask of up\.weight: expected one number of inputs .* got from"):
        sparsifier.load_state_dict(other_mask(state, moved))

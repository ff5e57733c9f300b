"""A sparse training inside a trainer of someone else, without one: begin, save, load, begin again."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import dstlib
from dstlib.errors import SettingError, StateError
from dstlib.integrations.training import HostedTraining, Settings

SETTINGS = Settings(sparsity=0.8, method="set", seed=3)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def train(model, steps, *, first=0):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(first, first + steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def halfway():
    """A model after 250 of 400 steps, its weights and its state."""
    training, model = HostedTraining(SETTINGS), network()
    training.begin(model, total_steps=400)
    train(model, 250)
    return training, model, weights(model), training.state_dict()


@pytest.mark.parametrize(("setting", "match"), [({"sparsity": 90}, "sparsity"), ({"method": "rigI"}, "method")])
def test_settings_are_checked_at_once(setting, match):
    with pytest.raises(SettingError, match=match):
        Settings(**{"sparsity": 0.9, **setting})


def test_before_it_begins_there_is_no_sparsifier():
    with pytest.raises(StateError, match="a training that has begun in this process"):
        HostedTraining(SETTINGS).sparsifier


def test_a_state_that_was_loaded_before_it_begins_keeps_the_weights_bit_for_bit(halfway):
    training, model, at_250, state = halfway
    other, resumed = HostedTraining(SETTINGS), network(seed=1)
    resumed.load_state_dict(at_250)
    other.load_state_dict(state, resumed, where="a file")
    other.begin(resumed, total_steps=400)
    assert equal(weights(resumed), at_250)
    assert other.sparsifier.step == 250
    assert equal(other.sparsifier.masks, training.sparsifier.masks)
    assert equal(weights(train(model, 150, first=250)), weights(train(resumed, 150, first=250)))


def test_optimizer_state_that_was_loaded_before_it_begins_stays_too():
    settings = replace(SETTINGS, method=replace(dstlib.SET, interval=1))

    def start(seed=0):
        model = network(seed)
        return HostedTraining(settings), model, torch.optim.Adam(model.parameters())

    first, model, optimizer = start()
    first.begin(model, optimizer, total_steps=400)
    for _ in range(3):
        model(torch.ones(8, 16)).square().sum().backward()
        optimizer.step()
    second, resumed, other = start(seed=1)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(first.state_dict(), resumed, where="a file")
    second.begin(resumed, other, total_steps=400)
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], other.state[theirs]["exp_avg"])


def test_pruning_from_dense_goes_on_without_a_word_about_the_zeros_that_it_brought():
    settings = replace(SETTINGS, method=replace(dstlib.GMP, interval=1))
    first, model = HostedTraining(settings), network()
    first.begin(model, total_steps=12)
    train(model, 10)
    assert first.sparsifier.density < 0.5
    second, resumed = HostedTraining(settings), network(seed=1)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict(), resumed, where="a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.begin(resumed, total_steps=12)
        train(resumed, 2, first=10)
    assert equal(weights(train(model, 2, first=10)), weights(resumed))


def test_a_state_that_comes_later_is_taken_at_once(halfway):
    training, model, at_250, state = halfway
    train(model, 100, first=250)
    masks = {name: mask.clone() for name, mask in training.sparsifier.masks.items()}
    model.load_state_dict(at_250)
    training.load_state_dict(state, model, where="a file")
    assert training.sparsifier.step == 250
    assert equal(weights(model), at_250)
    assert not equal(training.sparsifier.masks, masks)


def test_beginning_again_changes_nothing(halfway):
    training, model, at_250, _ = halfway
    sparsifier = training.sparsifier
    training.begin(model, total_steps=400)
    assert training.sparsifier is sparsifier
    assert equal(weights(model), at_250)


def test_a_longer_run_goes_on_with_masks_weights_and_observers(halfway):
    training, model, at_250, state = halfway
    seen = []
    training.sparsifier.observers.append(lambda site, update: seen.append(site.step))
    with pytest.warns(UserWarning, match="400 optimizer steps, which now has 800"):
        training.begin(model, total_steps=800)
    assert equal(weights(model), at_250)
    assert equal(training.sparsifier.masks, {k: w["mask"] for k, w in state["sparsifier"]["weights"].items()})
    train(model, 60, first=250)
    assert set(seen) == {300}  # the one that was left would have updated as well: an observer is told once per weight
    assert len(seen) == 2


def test_weights_that_were_loaded_by_hand_lose_nothing_when_a_longer_run_goes_on(halfway):
    training, model, _, _ = halfway
    best, other = network(seed=7), HostedTraining(replace(SETTINGS, seed=8))
    other.begin(best, total_steps=400)
    loaded = weights(train(best, 250))
    model.load_state_dict(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The masks were saved in a training of 400")
        training.begin(model, total_steps=800)
    assert equal(weights(model), loaded)
    with pytest.warns(UserWarning, match="step 251: sparse weights were loaded .* no weight was lost"):
        train(model, 1, first=250)
    for name, mask in training.sparsifier.masks.items():
        assert mask[loaded[name] != 0].all()  # what SET grew may still be zero, and its place is not known
        assert mask.sum() == other.sparsifier.masks[name].sum()


def test_a_layer_that_was_replaced_is_named_and_sparse_in_the_next_training(halfway):
    training, model, at_250, _ = halfway
    model[2] = nn.Linear(24, 4)
    with pytest.raises(StateError, match=r"the network to save: .* others in the place of 2.weight\. Replace layers"):
        training.refuse_replaced(model, "the network to save")
    training.begin(model, total_steps=800)
    assert training.sparsifier.step == 0
    assert torch.equal(model[0].weight, at_250["0.weight"])
    assert int(model[2].weight.count_nonzero()) == int(training.sparsifier.masks["2.weight"].sum()) < 96


def test_another_model_begins_afresh_and_leaves_the_first_alone(halfway):
    training, model, at_250, _ = halfway
    first, other = training.sparsifier, network(seed=2)
    training.begin(other, total_steps=400)
    assert training.sparsifier is not first
    assert training.sparsifier.step == 0
    assert equal(weights(model), at_250)


def test_its_own_total_steps_come_first():
    training, model = HostedTraining(Settings(sparsity=0.5, total_steps=200)), network()
    training.begin(model, total_steps=1000)
    assert training.state_dict()["total_steps"] == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: None, "masks of a file: expected the masks of a sparse training, version 1, got none"),
        (lambda state: {**state, "version": 7}, "got version 7"),
        (lambda state: {**state, "settings": {**state["settings"], "seed": 4}}, "expected seed 4, got seed 3"),
        (lambda state: {**state, "settings": None}, "contents of a file: expected settings, and total_steps"),
        (lambda state: {**state, "total_steps": "400"}, "contents of a file: expected settings, and total_steps"),
        (lambda state: {**state, "total_steps": 401}, "checksum of a file"),
    ],
)
def test_other_states_are_refused_and_change_nothing(halfway, change, message):
    training, model, at_250, state = halfway
    with pytest.raises(StateError, match=message):
        training.load_state_dict(change(state), model, where="a file")
    assert equal(weights(model), at_250)
    assert training.sparsifier.step == 250


def test_a_state_is_read_with_weights_only(halfway, tmp_path):
    *_, at_250, state = halfway
    torch.save(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read["settings"] == state["settings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        model.load_state_dict(at_250)
        training = HostedTraining(SETTINGS)
        training.load_state_dict(read, model, where="a file")
        training.begin(model, total_steps=400)


def test_a_state_that_does_not_fit_leaves_the_weights_bit_for_bit_and_unmasked(halfway):
    _, _, at_250, state = halfway
    state["sparsifier"]["weights"].pop("0.weight")
    other, resumed = HostedTraining(SETTINGS), network()
    resumed.load_state_dict(at_250)
    other.load_state_dict(state, None, where="a file")
    with pytest.raises(StateError, match="1 missing"):
        other.begin(resumed, total_steps=400)
    assert equal(weights(resumed), at_250)
    with torch.no_grad():
        resumed[0].weight.fill_(1.0)
    assert not (train(resumed, 1)[0].weight == 0).any()

"""Compact storage: every mask, value and loss is that of masked storage, though nothing outside the masks exists.

Sums are of small integers, which floats hold, so that "the same" is ``torch.equal``, in whatever order they are taken.
"""

import copy
import io
import pickle
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import dstlib
from dstlib import METHODS, SelectionError, SettingError, StateError, masking
from dstlib.engine.layers.compact_linear import CompactLinear
from dstlib.engine.ops import compact_linear as ops
from dstlib.export import load_compact, save_compact
from dstlib.sparsifier import by_tiles
from dstlib.sparsifier.compact import check_method

TAKEN = []  # presets that change masks by what compact storage has
for _name, _method in METHODS.items():
    try:
        check_method(_method)
    except SettingError:
        continue
    TAKEN.append(_name)
GRAINS = [
    masking.Element(),
    masking.Kernel(),
    masking.Block(4, 1),
    masking.Block(2, 3),
    masking.Block(4, 4),
    masking.FanIn(),
    masking.SharedFanIn(4),
    masking.Channel(),
    masking.NM(1, 4),
]
STEPS = 7


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes tiles of a few rows, so that small matrices have several."""
    monkeypatch.setattr(by_tiles, "TILE", 50)
    monkeypatch.setattr(ops, "_TILE", 50)


class Sides(nn.Module):
    """Layers side by side, whose gradients are sums of products of integers: (N, 12) → [(N, 16), (N, 12), (N, 24)]."""

    def __init__(self):
        super().__init__()
        self.wide, self.bare, self.qkv = nn.Linear(12, 16), nn.Linear(12, 12, bias=False), nn.Linear(12, 24)

    def forward(self, x):
        return torch.cat([self.wide(x), self.bare(x), self.qkv(x)], dim=-1)


def sides(seed=0):
    """Weights are eighths, few enough for ties."""
    torch.manual_seed(seed)
    model = Sides()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-16, 17, parameter.shape) / 8)
    return model


def integers(step, size=5, width=12, top=3):
    """Inputs and factors of the outputs of a step: small integers."""
    rng = torch.Generator().manual_seed(step)
    x = torch.randint(-top, top + 1, (size, width), generator=rng).float()
    return x, torch.randint(-top, top + 1, (size, 52), generator=rng).float()


def fresh_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.125, momentum=0.5)


def is_compact(model):
    return any(isinstance(module, CompactLinear) for module in model.modules())


def life(storage, method, make=sides, optimizer=fresh_sgd, batch=integers, steps=STEPS, **settings):
    """Trains, and returns what every step left: the loss, the weights with their zeros, and the masks."""
    settings = {"sparsity": 0.7, "total_steps": 12, "seed": 3} | settings
    model = make()
    sparsifier = dstlib.sparsify(model, method=method, storage=storage, **settings)
    if storage == "masked":
        sparsifier.observers.append(lambda site, update: None)  # who sees updates has them computed all at once
    trained, found = optimizer(model.parameters()), []
    for step in range(steps):
        trained.zero_grad()
        x, factors = batch(step)
        loss = (model(x) * factors).sum()
        loss.backward()
        trained.step()
        dense = sparsifier.dense_state_dict()
        found.append(
            (
                loss.detach(),
                {n: x.clone() for n, x in dense.items()},
                {n: m.clone() for n, m in sparsifier.masks.items()},
            )
        )
    assert is_compact(model) == (storage == "compact")
    return found


def assert_same_lives(method, **settings):
    masked, compact = (life(storage, method, **settings) for storage in ("masked", "compact"))
    for step, ((loss, dense, masks), (its_loss, its_dense, its_masks)) in enumerate(zip(masked, compact, strict=True)):
        for name, mask in masks.items():
            assert torch.equal(mask, its_masks[name]), f"{name} at step {step}: {int((mask ^ its_masks[name]).sum())}"
        assert dense.keys() == its_dense.keys()
        for name, x in dense.items():
            assert torch.equal(x, its_dense[name]), f"{name} at step {step}"
        assert torch.equal(loss, its_loss), step
    return masked


def quick(method, **changes):
    changes = {"interval": 2} | changes if method.interval is not None else changes
    return replace(method, **changes)


RIGL = quick(METHODS["rigl"])


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.usefixtures("small_tiles")
def test_every_preset_has_the_masks_of_masked_storage(name):
    found = assert_same_lives(quick(METHODS[name]))
    first, last = found[0][2], found[-1][2]
    assert any(not torch.equal(first[key], last[key]) for key in first) or name in ("static", "srste"), "masks move"


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("name", ["rigl", "set"])
@pytest.mark.usefixtures("small_tiles")
def test_every_granularity_has_the_masks_of_masked_storage(name, grain):
    overrides = {"*": 0.75} if isinstance(grain, masking.NM) else None
    assert_same_lives(quick(METHODS[name], granularity=grain, distribution=masking.uniform), overrides=overrides)


@pytest.mark.usefixtures("small_tiles")
def test_observers_see_the_updates_of_masked_storage():
    seen = []
    for storage in ("masked", "compact"):
        model = sides()
        sparsifier = dstlib.sparsify(model, sparsity=0.7, method=RIGL, total_steps=12, storage=storage)
        history, optimizer = dstlib.History(sparsifier), fresh_sgd(model.parameters())
        for step in range(STEPS):
            optimizer.zero_grad()
            x, factors = integers(step)
            (model(x) * factors).sum().backward()
            optimizer.step()
        seen.append((history.explored, sparsifier.masks))
    assert seen[0][0] == seen[1][0] > 0.3
    for name, mask in seen[0][1].items():
        assert torch.equal(mask, seen[1][1][name])


@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("top", [0, 1, 3], ids=["no gradient", "ties everywhere", "ties"])
@pytest.mark.parametrize("drop", [masking.magnitude, masking.gradient, masking.saliency])
@pytest.mark.parametrize("grow", [masking.gradient, masking.saliency, masking.magnitude, masking.random])
@pytest.mark.usefixtures("small_tiles")
def test_ties_go_to_the_units_of_masked_storage(grow, drop, top, regrow):
    method = replace(RIGL, grow=grow, drop=drop, regrow=regrow)
    assert_same_lives(method, steps=5, batch=lambda step: integers(step, top=top))


def every_other(site):
    """A criterion of a user, who may look at anything."""
    order = torch.arange(site.weight.numel()).view_as(site.weight)
    return site.grad.abs() + (order % 2) * site.mask.float().mean()


@pytest.mark.usefixtures("small_tiles")
def test_criteria_of_a_user_see_the_whole_weight():
    assert_same_lives(replace(RIGL, grow=every_other))


@given(
    seed=st.integers(0, 50),
    sparsity=st.sampled_from([0.5, 0.9, 0.97]),
    grain=st.sampled_from([masking.Element(), masking.Block(4, 2), masking.FanIn()]),
    tile=st.sampled_from([1, 50, 10_000]),
    top=st.integers(1, 3),
)
@examples(8, 60)
def test_masks_are_those_of_masked_storage(seed, sparsity, grain, tile, top):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_tiles, "TILE", tile)
        patch.setattr(ops, "_TILE", tile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such high sparsities leave outputs without weights
            assert_same_lives(
                quick(METHODS["rigl"], granularity=grain, grown_state="birth"),
                make=lambda: sides(seed),
                batch=lambda step: integers(step + seed, top=top),
                sparsity=sparsity,
                steps=5,
            )


def deep():
    """Three layers in double precision, whose sums do differ in their order."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()


def ordinary(model, optimizer, sparsifier, x, step):
    model(x).square().mean().backward()
    optimizer.step()


def train(model, optimizer, sparsifier, steps, how=ordinary):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        how(model, optimizer, sparsifier, x, step)


def begin(storage, method=RIGL, make=deep, optimizer=fresh_sgd, sparsity=0.7):
    model = make()
    sparsifier = dstlib.sparsify(model, sparsity=sparsity, method=method, total_steps=12, storage=storage)
    return model, optimizer(model.parameters()), sparsifier


# a gradient that is 0 but for rounding becomes, over Adam's eps of 1e-8, a step of a few 1e-9
CLOSE = {"rtol": 0, "atol": 1e-7}


def assert_alike(one, other):
    for name, mask in one[2].masks.items():
        assert torch.equal(mask, other[2].masks[name]), name
    dense = other[2].dense_state_dict()
    for name, x in one[2].dense_state_dict().items():
        torch.testing.assert_close(dense[name], x, **CLOSE)


def assert_trains_alike(how=ordinary, steps=7, **settings):
    plain, compact = (begin(storage, **settings) for storage in ("masked", "compact"))
    for trained in (plain, compact):
        train(*trained, range(steps), how)
    assert is_compact(compact[0])
    assert_alike(plain, compact)
    return plain, compact


OPTIMIZERS = {
    "sgd": fresh_sgd,
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_elementwise_optimizers_train_as_on_masked_weights(name):
    assert_trains_alike(optimizer=OPTIMIZERS[name])


@pytest.mark.parametrize("how", ["gradient", "mean"])
def test_state_of_what_grows_starts_as_on_masked_weights(how):
    assert_trains_alike(method=quick(METHODS["rigl"], grown_state=how), optimizer=OPTIMIZERS["adam"])


def test_a_single_value_takes_its_momentum_along():
    """Of one active weight each: state of shape (1,) is of that weight, not of the parameter."""
    always = quick(METHODS["rigl"], interval=1, drop_fraction=dstlib.schedules.Constant(1.0))
    _, (model, *_) = assert_trains_alike(method=always, sparsity=0.99, optimizer=OPTIMIZERS["adam"])
    assert any(layer.weight.numel() == 1 for layer in model if isinstance(layer, CompactLinear))


def in_two(model, optimizer, sparsifier, x, step):
    for half in (x[:3], x[3:]):
        model(half).square().mean().backward()
    optimizer.step()


def clipped(model, optimizer, sparsifier, x, step):
    model(x).square().mean().mul(10).backward()
    sparsifier.before_step(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def discarded(model, optimizer, sparsifier, x, step):
    model(x + 1).square().mean().backward()
    optimizer.zero_grad()
    ordinary(model, optimizer, sparsifier, x, step)


def discarded_to_zeros(model, optimizer, sparsifier, x, step):
    model(x + 1).square().mean().backward()
    optimizer.zero_grad(set_to_none=False)
    ordinary(model, optimizer, sparsifier, x, step)


def with_closure(model, optimizer, sparsifier, x, step):
    def evaluate():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(evaluate)


def checkpointed(model, optimizer, sparsifier, x, step):
    checkpoint(model, x, use_reentrant=False).square().mean().backward()
    optimizer.step()


def checkpointed_reentrant(model, optimizer, sparsifier, x, step):
    checkpoint(model, x.requires_grad_(), use_reentrant=True).square().mean().backward()
    optimizer.step()


def one_freezes(model, optimizer, sparsifier, x, step):
    model[2].weight.requires_grad_(step < 3)
    ordinary(model, optimizer, sparsifier, x, step)


def topology_freezes(model, optimizer, sparsifier, x, step):
    if step == 4:
        sparsifier.freeze()
    ordinary(model, optimizer, sparsifier, x, step)


def finishes(model, optimizer, sparsifier, x, step):
    if step == 4:
        sparsifier.finish()
    ordinary(model, optimizer, sparsifier, x, step)


def skips(model, optimizer, sparsifier, x, step):
    model(x).square().mean().backward()
    if step % 3 != 1:
        optimizer.step()


LOOPS = [
    *(in_two, clipped, discarded, discarded_to_zeros, with_closure, checkpointed, checkpointed_reentrant),
    *(one_freezes, topology_freezes, finishes, skips),
]


@pytest.mark.filterwarnings("ignore:.*density:UserWarning")  # of a ramp that is cut short
@pytest.mark.parametrize("name", ["rigl", "gmp"])
@pytest.mark.parametrize("how", LOOPS, ids=lambda how: how.__name__)
def test_loops_of_every_kind_train_as_on_masked_weights(how, name):
    assert_trains_alike(how, method=quick(METHODS[name]))


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_in_no_growth(fused):
    """A fused optimizer divides it out inside its step: what grows must have it, too."""

    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def step_once(model, optimizer, sparsifier, x, step):
            loss = model(x).square().mean() * (float("inf") if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

        return step_once

    lives = []
    for storage in ("masked", "compact"):
        trained = begin(storage, optimizer=lambda p: torch.optim.Adam(p, lr=0.01, fused=fused))
        train(*trained, range(7), scaled())
        lives.append(trained)
    assert_alike(*lives)


class Twice(nn.Module):
    """Uses a layer twice, each time under a checkpoint or not."""

    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(0)
        self.mode, self.inner, self.head = mode, nn.Linear(12, 12), nn.Linear(12, 4)
        self.double()

    def forward(self, x):
        for _ in range(2):
            x = self.half(x) if self.mode is None else checkpoint(self.half, x, use_reentrant=self.mode)
        return self.head(x)

    def half(self, x):
        return self.inner(x).tanh()


@pytest.mark.parametrize("mode", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_a_layer_used_twice_grows_by_both_uses(mode):
    def how(model, optimizer, sparsifier, x, step):
        ordinary(model, optimizer, sparsifier, x.requires_grad_(), step)

    assert_trains_alike(how, make=lambda: Twice(mode))


class WritesInPlace(nn.Module):
    """Outputs of compact layers are written into, one of a layer that is called twice, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.attention = nn.Linear(12, 16), nn.Linear(16, 16), nn.MultiheadAttention(16, 2)
        self.conv, self.last, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3), nn.ReLU(inplace=True)
        self.double()

    def forward(self, x):
        x = self.relu(self.first(x))
        x = self.twice(2 * x).relu() + self.twice(x).relu_()
        y = self.attention(x, x, x, need_weights=False)[0]
        y += x
        return self.last(self.relu(self.conv(y[None])).mean(dim=(1, 2)))


def test_outputs_may_be_written_to():
    method = replace(RIGL, granularity=masking.Kernel())
    assert_trains_alike(make=WritesInPlace, method=method)
    assert_trains_alike(make=WritesInPlace)


def test_a_gradient_that_is_not_of_the_passes_is_told():
    model, optimizer, _ = begin("compact")
    for step in range(2):  # the second has the update
        for parameter in model.parameters():
            parameter.grad = None
        (
            model(torch.ones(2, 12).double()).square().mean() + sum(p.square().sum() for p in model.parameters())
        ).backward()
        with pytest.warns(UserWarning, match=r"0\.weight is not that of the passes") if step else nullcontext():
            optimizer.step()


def test_active_weights_may_be_zero():
    """As where an input is always: a dense state dict then has fewer numbers that are not."""
    one, _, sparsifier = begin("compact", method="static")
    other, *_, its_sparsifier = begin("compact", method="static")
    with torch.no_grad():
        one[0].weight[:3] = 0
    given = sparsifier.dense_state_dict()
    other.load_state_dict(given)
    assert all(torch.equal(x, given[name]) for name, x in its_sparsifier.dense_state_dict().items())


@pytest.mark.parametrize("to_none", [True, False])
def test_a_pass_counts_that_gives_what_is_active_no_gradient(to_none):
    """Zeros in the place of a gradient are not taken for one that was thrown away."""
    model, optimizer, sparsifier = begin("compact", make=lambda: nn.Sequential(nn.Linear(20, 1, bias=False)))
    ordinary(model, optimizer, sparsifier, torch.ones(1, 20), 0)
    optimizer.zero_grad(set_to_none=to_none)
    active = sparsifier.masks["0.weight"].clone().float()
    wanted = int((active == 0).flatten().nonzero()[-1])
    model(functional.one_hot(torch.tensor([wanted]), 20).float()).sum().backward()
    assert not model[0].weight.grad.any()
    (model(active) + model(0.01 * (1 - active))).sum().backward()
    optimizer.step()
    assert sparsifier.masks["0.weight"][0, wanted]


def test_a_gradient_from_elsewhere_cannot_grow():
    model, optimizer, _ = begin("compact")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # no update is due at the first
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(StateError, match=r"gradients of what is not active of 0\.weight at step 2"):
        optimizer.step()


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(TAKEN)))
def test_methods_that_keep_something_dense_are_refused(name):
    with pytest.raises(SettingError, match=rf"storage of sparsify\(\) with method {name}: expected \"masked\""):
        dstlib.sparsify(deep(), sparsity=0.7, method=name, total_steps=100_000, storage="compact")


def test_an_optimizer_that_has_stepped_comes_too_early():
    model = deep()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, None, range(1))
    with pytest.raises(StateError, match=r"0\.weight\. Make the optimizer after"):
        dstlib.sparsify(model, optimizer, sparsity=0.7, method="static", storage="compact")


# what is saved and copied


@pytest.mark.parametrize("order", ["mos", "som", "oms"])
def test_a_run_resumes_bit_for_bit(order):
    whole = begin("compact", optimizer=OPTIMIZERS["adam"])
    train(*whole, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    file.seek(0)
    again = begin("compact", optimizer=OPTIMIZERS["adam"])
    states = dict(zip("mos", torch.load(file, weights_only=True), strict=True))
    for letter in order:
        dict(zip("mos", again, strict=True))[letter].load_state_dict(states[letter])
    for trained in (whole, again):
        train(*trained, range(5, 10))
    for name, x in whole[0].state_dict().items():
        assert torch.equal(x, again[0].state_dict()[name]), name


@pytest.mark.parametrize("name", ["rigl", "gmp"])
@pytest.mark.parametrize(("before", "after"), [("masked", "compact"), ("compact", "masked")])
def test_a_run_goes_on_in_the_other_storage(before, after, name):
    lives = []
    for second in (before, after):
        trained = begin(before, quick(METHODS[name]))
        train(*trained, range(5))
        states = copy.deepcopy((trained[2].dense_state_dict(), trained[2].state_dict()))
        other = begin(second, quick(METHODS[name]))
        other[0].load_state_dict(states[0])
        other[2].load_state_dict(states[1])
        train(*other, range(5, 10))
        lives.append(other)
    assert_alike(*lives)


def test_masks_are_sent_to_other_processes_as_they_are():
    model = nn.Linear(20, 10)
    masks = dstlib.sparsify(model, sparsity=0.9, method="static", storage="compact").masks
    sent = pickle.loads(pickle.dumps(masks))
    assert list(sent) == ["weight"]
    assert torch.equal(sent["weight"], masks["weight"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_a_training_train_on_alike(copied):
    whole = begin("compact", optimizer=OPTIMIZERS["adam"])
    train(*whole, range(4))
    twin = copied(whole)
    for trained in (whole, twin):
        train(*trained, range(4, 9))
    assert twin[2].step == 9
    for name, x in whole[0].state_dict().items():
        assert torch.equal(x, twin[0].state_dict()[name]), name


def test_an_average_over_moving_masks_is_refused():
    """Values are averaged by their order, which an update changes."""
    model, optimizer, sparsifier = begin("compact")
    average = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, sparsifier, range(1))
    average.update_parameters(model)
    snapshot, x = copy.deepcopy(model), torch.ones(2, 12, dtype=torch.float64)
    expected = snapshot(x)
    assert average(x).shape == expected.shape
    sparsifier.mask_model(average)
    second = copy.deepcopy(average)
    train(model, optimizer, sparsifier, range(1, 2))
    assert torch.equal(snapshot(x), expected), "what nobody writes to stays as it is"
    with pytest.raises(StateError, match="under its present mask"):
        sparsifier.mask_model(average)
    average.update_parameters(model)
    second.update_parameters(model)
    for use in (average, second, lambda _: average.state_dict()):
        with pytest.raises(StateError, match="Make a moving average anew after a mask update"):
            use(x)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert torch.equal(average(x), model(x))


DAMAGED = {
    "missing": None,
    "a byte short": lambda bits: bits[:-1],
    "of another type": lambda bits: bits.float(),
    "full": lambda bits: torch.full_like(bits, 255),
    "no tensor": lambda bits: bits.tolist(),
    "without data": lambda bits: bits.to("meta"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_mask_is_refused_and_changes_nothing(how):
    model, *_ = begin("compact")
    state, before = dict(model.state_dict()), copy.deepcopy(model.state_dict())
    bits = state.pop("0.weight_mask")
    if DAMAGED[how] is not None:
        state["0.weight_mask"] = DAMAGED[how](bits)
    with pytest.raises(RuntimeError, match=r"weight of 0\.weight: expected .* Load what the same model saved"):
        model.load_state_dict(state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_state_without_a_weight_leaves_it_where_that_is_allowed():
    model, *_ = begin("compact")
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("0.weight")}
    before = model[0].weight.clone()
    assert model.load_state_dict(state, strict=False).missing_keys == ["0.weight"]
    assert torch.equal(model[0].weight, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_a_dense_model_without_zeros_is_no_compact_one():
    model, *_ = begin("compact")
    with pytest.raises(RuntimeError, match="192 that are not zero"):
        model.load_state_dict(deep().state_dict())


@pytest.mark.parametrize("with_masks", [True, False])
def test_the_compact_file_is_that_of_the_plain_model(with_masks, tmp_path):
    model, optimizer, sparsifier = begin("compact")
    train(model, optimizer, sparsifier, range(5))
    plain = deep()
    plain.load_state_dict(sparsifier.dense_state_dict())
    masked = dstlib.sparsify(plain, masks=sparsifier.masks, method="static") if with_masks else None
    save_compact(model, tmp_path / "compact", sparsifier=sparsifier if with_masks else None)
    save_compact(plain, tmp_path / "plain", sparsifier=masked)
    assert (tmp_path / "compact").read_bytes() == (tmp_path / "plain").read_bytes()
    for other in (begin("compact")[0], deep()):
        load_compact(tmp_path / "compact", other)
        x = torch.ones(3, 12, dtype=torch.float64)
        assert torch.equal(other(x), model(x))


def test_a_compact_file_takes_the_masks_of_this_model_alone(tmp_path):
    model, optimizer, sparsifier = begin("compact")
    earlier = copy.deepcopy(model)
    train(model, optimizer, sparsifier, range(5))
    with pytest.raises(StateError, match="zeros outside their masks"):
        save_compact(earlier, tmp_path / "file", sparsifier=sparsifier)


def test_costs_are_those_of_the_plain_model_under_the_masks():
    model, _, sparsifier = begin("compact")
    plain = deep()
    plain.load_state_dict(sparsifier.dense_state_dict())
    masked = dstlib.sparsify(plain, masks=sparsifier.masks, method="static")
    expected = dstlib.profile(plain, (1, 12), sparsifier=masked)
    assert dstlib.profile(model, (1, 12)) == dstlib.profile(model, (1, 12), sparsifier=sparsifier) == expected
    assert dstlib.profile(model[0], (1, 12)).layers[0].active == int(sparsifier.masks["0.weight"].sum())


def test_the_engine_leaves_compact_layers_as_they_are():
    model, _, sparsifier = begin("compact", make=lambda: deep().float())
    x = torch.randn(4, 12)
    fast = sparsifier.accelerate(model, x)
    assert all(isinstance(fast[place], CompactLinear) for place in (0, 2, 4))
    assert torch.equal(fast(x), model(x))


# without data


def on(device):
    torch.manual_seed(5)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 12), nn.Conv1d(3, 4, 5))
    torch.manual_seed(5)
    return model


def test_layers_without_data_are_initialised_as_when_they_are_made():
    states = []
    for device in ("cpu", "meta"):
        model = on(device)
        sparsifier = dstlib.sparsify(model, sparsity=0.7, method="static", storage="compact")
        states.append(sparsifier.dense_state_dict())
    for name, x in states[0].items():
        assert torch.equal(x, states[1][name]), name


def test_a_module_that_cannot_be_initialised_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 12), nn.ParameterList([nn.Parameter(torch.zeros(3))]))
    with pytest.raises(SelectionError, match="a ParameterList of the model"):
        dstlib.sparsify(model, sparsity=0.7, method="static", storage="compact")


def test_tied_weights_stay_tied():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 20))
        model[1].weight = model[0].weight
    sparsifier = dstlib.sparsify(model, sparsity=0.7, method="static", storage="compact")
    assert model[0].weight is model[1].weight
    assert model[0].weight.shape == (12, 12)
    notes = {row.name: row.note for row in sparsifier.summary().rows}
    assert notes == {"0.weight": "sparse, masked: it is shared by several modules", "2.weight": "sparse, compact"}

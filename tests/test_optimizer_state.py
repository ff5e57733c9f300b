"""What optimizers keep for a weight has a meaning: stated, known or observed; and is born as the optimizer bears it."""

import copy
from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import backward, small, train
from strategies import generator, seeds
from torch import nn

import dstlib
from dstlib import RIGL, SettingError
from dstlib.masking import NormalFanIn
from dstlib.sparsifier.known_optimizers import KNOWN, MOMENT, WEIGHTS, Meaning, known
from dstlib.sparsifier.optimizer_state import Kept, StateMeanings, momentum_of, observe, refuse_unsupported, reset_state

FAST = replace(RIGL, interval=3)


def half(shape, seed=0):
    return torch.rand(shape, generator=generator(seed)) < 0.5


class Ours(torch.optim.Optimizer):
    """An optimizer that no table knows: what it keeps, and how that follows the gradient, is given."""

    def __init__(self, params, **kept):
        super().__init__(params, {"lr": 0.1})
        self.kept = kept

    def __getstate__(self):
        return {**super().__getstate__(), "kept": self.kept}

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            for key, first in self.kept.items():
                if key not in state:
                    state[key] = first(p)
                values = state[key]
                for value in values.values() if isinstance(values, dict) else values if key == "queue" else [values]:
                    if key == "precondition":
                        value.addmm_(p.grad.flatten(1), p.grad.flatten(1).T)
                    elif key == "slow":
                        value.lerp_(p, 0.1)
                    else:
                        value.mul_(0.9).addcmul_(p.grad, p.grad)
            p.add_(p.grad, alpha=-0.1)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.two(self.one(x).tanh())


def fit(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8, generator=generator(step))).square().mean().backward()
        optimizer.step()


def sparse(optimizer, steps=4, method="static", sparsity=0.5, **kwargs):
    model = Square()
    made = optimizer(model)
    sparsifier = dstlib.sparsify(model, made, sparsity=sparsity, method=method, total_steps=40, **kwargs)
    fit(model, made, steps)
    return model, made, sparsifier


@given(seeds, st.integers(1, 5), st.sampled_from([0.0, 0.25, 1e-6]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_outside_is_what_was_at_birth_and_inside_keeps_its_bits(seed, rows, birth, dtype):
    values = torch.randn(rows, 6, generator=generator(seed)).to(dtype)
    values[0, 0] = float("nan")
    mask, before = half((rows, 6), seed), values.clone()
    Kept("x", values, MOMENT, birth).write_outside(mask)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(values.view(bits)[mask], before.view(bits)[mask])
    assert (values[~mask] == torch.tensor(birth).to(dtype)).all()


@given(seeds, st.integers(1, 5), st.integers(0, 15))
def test_of_two_codes_in_a_byte_each_is_written_by_its_own_mask(seed, rows, zero):
    codes = torch.randint(0, 16, (rows, 8), generator=generator(seed), dtype=torch.uint8)
    pairs = codes.view(-1, 2)
    packed, mask = pairs[:, 0] << 4 | pairs[:, 1], half((rows, 8), seed)
    Kept("x", packed, MOMENT, zero, packed=True).write_outside(mask)
    unpacked = torch.stack([packed >> 4, packed & 15], dim=1).view(rows, 8)
    assert torch.equal(unpacked, torch.where(mask, codes, zero))


@pytest.mark.parametrize(
    ("values", "mask", "expected"),
    [
        ([0.5, 0.25, 0.0, 0.0], [1, 1, 0, 0], MOMENT),
        ([0.5, 0.25, -0.0, 0.0], [1, 1, 0, 0], MOMENT),
        ([0.5, 0.25, 1.0, 1.0], [1, 1, 0, 0], Meaning("accumulator", 1.0)),
        ([0.5, 1.0, 1.0, 1.0], [1, 1, 0, 0], Meaning("accumulator", 1.0)),
        ([0.5, 0.25, 1.0, 0.9], [1, 1, 0, 0], Meaning("other")),
        ([0.5, 0.25, float("nan"), 0.0], [1, 1, 0, 0], Meaning("other")),
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 0, 0], None),  # not yet: all are as at birth
        ([0.5, 0.25, 0.1, 0.0], [1, 1, 1, 1], None),  # nothing is outside
    ],
)
def test_what_is_observed(values, mask, expected):
    assert observe(torch.tensor(values), torch.tensor(mask, dtype=torch.bool)) == expected


def grown_state(make, key, steps=3, method=FAST):
    """What is kept for weights that have grown at the last of these steps, and what was before the update."""
    model = small()
    optimizer = make(model.parameters())
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=method, total_steps=40)
    train(model, optimizer, steps - 1)
    backward(model, steps - 1)
    old = sparsifier.masks["up.weight"].clone()
    sparsifier.before_step()
    grown = sparsifier.masks["up.weight"] & ~old
    assert grown.any()
    return optimizer.state[model.up.weight][key][grown], model.up.weight.grad[grown]


@pytest.mark.parametrize(
    ("make", "key", "birth"),
    [
        (lambda p: torch.optim.Adam(p), "exp_avg_sq", 0.0),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.25), "sum", 0.25),
        (lambda p: torch.optim.Rprop(p, lr=0.125), "step_size", 0.125),
        (lambda p: Ours(p, scale=torch.ones_like), "scale", 0.9),  # observed when it is one step old
    ],
    ids=["Adam", "Adagrad", "Rprop", "unknown"],
)
def test_what_has_grown_is_born_as_its_optimizer_bears_it(make, key, birth):
    born, _ = grown_state(make, key, method=replace(FAST, grown_state="birth"))
    assert (born == birth).all()


def test_where_an_optimizer_begins_with_the_first_gradient_what_has_grown_does_too():
    timm = pytest.importorskip("timm.optim", exc_type=ImportError)
    born, grad = grown_state(lambda p: timm.adopt.Adopt(p), "exp_avg_sq")
    assert torch.equal(born, grad.square())
    born, grad = grown_state(lambda p: timm.adan.Adan(p), "neg_pre_grad")
    assert torch.equal(born, -grad)


def test_a_rate_that_a_schedule_changes_is_the_birth_of_step_sizes_from_then_on():
    model, optimizer, sparsifier = sparse(lambda m: torch.optim.Rprop(m.parameters(), lr=0.5))
    optimizer.param_groups[0]["lr"] = 0.25
    fit(model, optimizer, 1)
    step_size = optimizer.state[model.one.weight]["step_size"]
    assert (step_size[~sparsifier.masks["one.weight"]] == 0.25).all()


def test_a_preconditioner_of_a_square_weight_is_left_alone():
    def shampoo(model):
        return Ours(model.parameters(), precondition=lambda p: 0.1 * torch.eye(8), scale=torch.ones_like)

    def assert_whole(model, optimizer, sparsifier):
        for name, mask in sparsifier.masks.items():
            state = optimizer.state[model.get_parameter(name)]
            torch.testing.assert_close(state["precondition"], state["precondition"].T, rtol=0, atol=1e-6)  # two sums
            assert (state["precondition"].diagonal() > 0.1).all()
            assert (state["scale"][~mask] == state["scale"][~mask][0]).all()

    model, optimizer, sparsifier = sparse(shampoo, method=FAST, steps=8)
    assert_whole(model, optimizer, sparsifier)
    fit(*(twin := copy.deepcopy((model, optimizer))), 4, start=8)  # a copy without its sparsifier is dense, but lives
    assert twin[0] is not model
    assert "left alone: precondition (observed)" in str(sparsifier.summary())


def test_nested_state_is_seen():
    def buffers(p):
        return {0.0: torch.zeros_like(p), 0.9: torch.zeros_like(p)}

    def make(model):
        return Ours(
            model.parameters(), momenta=buffers, queue=lambda p: deque([torch.zeros_like(p)]), flat=torch.zeros_like
        )

    model, optimizer, sparsifier = sparse(make, method=FAST, steps=7)
    for parameter in model.parameters():  # as AdaShift's queue, which holds other tensors after each step
        queue = optimizer.state[parameter]["queue"]
        queue.append(queue.popleft().clone())
    fit(model, optimizer, 2, start=7)
    state, mask = optimizer.state[model.one.weight], sparsifier.masks["one.weight"]
    for value in (*state["momenta"].values(), *state["queue"]):
        assert (value[~mask] == 0).all()
        assert (value[mask] != 0).any()
    assert "momenta.0.9" in str(sparsifier.summary())


@pytest.mark.parametrize("shape", [(64,), (2, 8, 8), (1, 8, 8)], ids=["in a row", "two of it", "one of it"])
def test_state_of_another_shape_is_seen_if_it_has_an_entry_for_each(shape):
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([weight])
    mask = half((8, 8))
    values = torch.ones(shape)
    optimizer.state[weight]["exp_avg"] = values
    (kept,) = StateMeanings({}).kept(optimizer, weight, mask)
    kept.write_outside(mask)
    assert torch.equal(values.view(-1, 8, 8), mask.float().expand(values.numel() // 64, 8, 8))


def test_state_that_is_not_per_entry_by_its_shape_is_none_of_ours():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight].update(step=torch.tensor(1.0), row=torch.ones(8), mask=half((8, 8)), name="x", none=None)
    assert StateMeanings({}).kept(optimizer, weight, half((8, 8))) == ()


def test_what_the_user_states_comes_first():
    stated = {"scale": "other", "slow": "weights", "mom*": "moment", "size": "accumulator"}

    def make(model):
        first = {
            "scale": torch.ones_like,
            "momentum": torch.zeros_like,
            "size": torch.ones_like,
            "new": torch.zeros_like,
        }
        return Ours(model.parameters(), slow=torch.clone, **first)

    model, optimizer, sparsifier = sparse(make, method=FAST, steps=5, state=stated)
    kept = sparsifier._meanings.kept(optimizer, model.one.weight, sparsifier.masks["one.weight"])
    assert {k.key: k.meaning.kind for k in kept} == {
        "slow": "weights",
        "momentum": "moment",
        "size": "accumulator",
        "new": "moment",
    }
    text = str(sparsifier.summary())
    for part in ("left alone: scale (stated)", "copies of the weights slow (stated)", "moments new (observed)"):
        assert part in text


def test_a_word_that_is_none_of_the_four_is_refused():
    with pytest.raises(SettingError, match=r"state of exp_avg of sparsify\(\): expected one of moment, .*'momentum'"):
        dstlib.sparsify(Square(), sparsity=0.5, method="static", state={"exp_avg": "momentum"})


@pytest.mark.parametrize("key", ["slow", "x0"])
def test_a_copy_of_the_weights_takes_the_value_of_what_has_grown(key):
    method = replace(FAST, grown_init=NormalFanIn())
    model = Square()
    optimizer = Ours(model.parameters(), **{key: torch.clone})
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=0.5, method=method, total_steps=40, state={"slow": "weights", "x0": "weights"}
    )
    grown = {}
    sparsifier.observers.append(lambda site, update: grown.__setitem__(site.name, update.grown.clone()))
    fit(model, optimizer, 2)
    model(torch.randn(16, 8, generator=generator(2))).square().mean().backward()
    sparsifier.before_step()
    for name, where in grown.items():
        weight = model.get_parameter(name).detach()
        copied = optimizer.state[model.get_parameter(name)][key]
        assert where.any()
        assert (weight[where] != 0).all()
        assert torch.equal(copied[where], weight[where])
        assert (copied[~sparsifier.masks[name]] == 0).all()


def test_dense_at_first_nothing_can_be_observed_and_the_names_of_moments_tell():
    def make(model):
        return Ours(model.parameters(), exp_avg=torch.zeros_like, memory=torch.zeros_like)

    method = replace(dstlib.GMP, interval=2)
    model, optimizer, sparsifier = sparse(make, method=method, steps=30)
    state, mask = optimizer.state[model.one.weight], sparsifier.masks["one.weight"]
    assert not mask.all()
    assert (state["exp_avg"][~mask] == 0).all()
    assert (state["memory"][~mask] != 0).any(), "left alone, as it may be a preconditioner"
    assert "left alone: memory (observed)" in str(sparsifier.summary())


def test_what_an_optimizer_kept_before_there_was_a_mask_is_known_by_its_name():
    model = Square()
    optimizer = Ours(model.parameters(), exp_avg=torch.zeros_like, memory=torch.zeros_like)
    fit(model, optimizer, 3)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    fit(model, optimizer, 1, start=3)
    state, mask = optimizer.state[model.one.weight], sparsifier.masks["one.weight"]
    assert (state["exp_avg"][~mask] == 0).all()
    assert (state["memory"][~mask] != 0).any()


def test_what_is_loaded_before_the_first_step_may_be_older_than_the_mask_too():
    dense, model = Square(), Square()
    first, optimizer = (Ours(m.parameters(), exp_avg=torch.zeros_like) for m in (dense, model))
    fit(dense, first, 3)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method="static")
    optimizer.load_state_dict(first.state_dict())
    sparsifier.apply_masks()
    for _ in range(2):
        exp_avg, mask = optimizer.state[model.one.weight]["exp_avg"], sparsifier.masks["one.weight"]
        assert (exp_avg[~mask] == 0).all()
        assert (exp_avg[mask] != 0).any()
        fit(model, optimizer, 1, start=3)


def test_a_copied_run_observes_the_same():
    def make(model):
        return Ours(model.parameters(), scale=torch.ones_like, precondition=lambda p: torch.eye(8))

    model, optimizer, sparsifier = sparse(make, method=FAST, steps=4)
    twin, twin_optimizer, twin_sparsifier = copy.deepcopy((model, optimizer, sparsifier))
    fit(model, optimizer, 5, start=4)
    fit(twin, twin_optimizer, 5, start=4)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, twin_optimizer.state[theirs][key]), key
    assert twin_sparsifier.step == 9


def test_a_look_is_taken_again_only_where_the_state_is_another():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    meanings, mask = StateMeanings({}), half((8, 8))
    assert meanings.kept(optimizer, weight, mask) == ()
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    first = meanings.kept(optimizer, weight, mask)
    optimizer.step()
    assert meanings.kept(optimizer, weight, mask) is first
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (again,) = meanings.kept(optimizer, weight, mask)
    assert again.values is optimizer.state[weight]["momentum_buffer"]


def test_a_reset_starts_all_of_it_as_at_birth():
    weight = nn.Parameter(torch.randn(8, 8, generator=generator(0)))
    everywhere = torch.ones(8, 8, dtype=torch.bool)
    for make, expected in (
        (lambda: torch.optim.NAdam([weight]), {"exp_avg": 0, "exp_avg_sq": 0, "step": 0, "mu_product": 1}),
        (lambda: torch.optim.Rprop([weight], lr=0.5), {"step_size": 0.5, "prev": 0}),
        (lambda: torch.optim.Adagrad([weight], initial_accumulator_value=2.0), {"sum": 2, "step": 0}),
    ):
        optimizer = make()
        weight.grad = torch.randn(8, 8, generator=generator(1))
        optimizer.step()
        reset_state(optimizer, weight, StateMeanings({}).kept(optimizer, weight, everywhere), weight.grad)
        for key, value in expected.items():
            assert (optimizer.state[weight][key] == value).all(), key


class LowBit(torch.Tensor):
    """What torchao makes of a moment, as far as it matters: codes, scales of blocks, and a map from codes to values."""

    @staticmethod
    def __new__(cls, codes, scale, qmap, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    def __init__(self, codes, scale, qmap, shape):
        self.codes, self.scale, self.qmap = codes, scale, qmap

    def dequantize(self):
        return self.qmap[self.codes.int()].view(self.scale.shape[0], -1).mul(self.scale[:, None]).view(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(str(func))


def test_codes_outside_become_that_of_zero_and_those_inside_and_their_scales_keep_their_bits():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([weight])
    qmap = torch.arange(-127, 128) / 127
    codes = torch.randint(0, 255, (8, 8), generator=generator(0), dtype=torch.uint8)
    state = LowBit(codes.clone(), torch.rand(4, generator=generator(1)), qmap, (8, 8))
    optimizer.state[weight]["exp_avg"] = state
    mask, scale = half((8, 8)), state.scale.clone()
    (kept,) = StateMeanings({}).kept(optimizer, weight, mask)
    kept.write_outside(mask)
    assert torch.equal(state.codes[mask], codes[mask])
    assert torch.equal(state.scale, scale)
    assert (state.dequantize()[~mask] == 0).all()
    assert torch.equal(momentum_of([optimizer], weight), state.dequantize())


def test_a_momentum_that_is_several_is_none():
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight]["momentum_buffer"] = {0.9: torch.zeros(8, 8)}
    assert momentum_of([optimizer], weight) is None


def test_optimizers_that_move_weights_elsewhere_than_in_their_step_are_refused():
    class LOMO(torch.optim.SGD):
        def fused_backward(self, loss, lr):
            """As pytorch_optimizer's."""

    class CPUOffloadOptimizer(torch.optim.SGD):
        """As torchao's."""

    weight = nn.Parameter(torch.zeros(8, 8))
    for cls, why in ((LOMO, "inside the backward pass"), (CPUOffloadOptimizer, "on the host")):
        with pytest.raises(SettingError, match=f"once, in its step, got {cls.__name__} .*{why}"):
            refuse_unsupported(cls([weight]))
    refuse_unsupported(torch.optim.SGD([weight]))


def test_a_class_derived_from_a_known_one_is_known_but_for_what_it_adds():
    class Mine(torch.optim.AdamW):
        pass

    assert known(Mine, "exp_avg") == MOMENT
    assert known(Mine, "memory") is None
    assert known(torch.optim.Optimizer, "exp_avg") is None
    assert known(type("Unknown", (torch.optim.Optimizer,), {}), "exp_avg") is None
    assert known(torch.optim.SGD, "z") == WEIGHTS, "what schedulefree's wrapper leaves there"
    assert all(row.source and row.classes and row.keys for row in KNOWN)


class Wrapper(torch.optim.Optimizer):
    """Shows the state and groups of the optimizer inside, as Accelerate's does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_wrapper_shows_means_what_it_does_inside(depth):
    """Also where the optimizer inside has not been met yet, as after a state was loaded."""
    weight, mask = nn.Parameter(torch.ones(2, 2)), torch.eye(2, dtype=torch.bool)
    inside = torch.optim.AdamW([weight])
    weight.grad = mask.float()
    inside.step()
    wrapper = inside
    for _ in range(depth):
        wrapper = Wrapper(wrapper)
    meanings = [{k.key: k.meaning for k in StateMeanings({}).kept(o, weight, mask)} for o in (inside, wrapper)]
    assert meanings[0] == meanings[1]
    assert meanings[1]["exp_avg_sq"].power == 2


def test_the_summary_says_what_was_decided():
    _, _, sparsifier = sparse(lambda m: torch.optim.AdamW(m.parameters()))
    assert "state of AdamW: moments exp_avg, exp_avg_sq (known)" in str(sparsifier.summary()).splitlines()


def test_a_stated_key_that_nobody_keeps_is_told_of():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    stated = {"exp_avgg": "moment", "exp_avg_*": "moment"}
    dstlib.sparsify(model, optimizer, sparsity=0.5, method="static", state=stated)
    for _ in range(10):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=r"exp_avgg matches nothing .* of a sparse weight: exp_avg, exp_avg_sq\."):
        optimizer.step()

"""A user's life with a sparse model, in any order: after each step every zero holds, or something was said of it.

Layers are replaced, weights loaded, cast and moved, optimizers swapped, runs resumed with and without our state.
Between the steps of the training, the summary tells what is.
"""

import contextlib
import copy
import pickle
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from models import assert_same, assert_zero_outside, batch, check_counts, small, state_of, train
from torch import Tensor, nn

import dstlib
from dstlib import DstlibError
from dstlib.masking import uniform

TOTAL_STEPS = 30
LAYERS = ("conv", "up", "head")
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
METHODS = ["static", "set", "rigl", "gmp", "granet", "topkast"]


def life(**drawn):
    """A rule after which training goes on for some steps, or not yet."""

    def make_rule(act):
        def act_and_train(self, steps, **given):
            act(self, **given)
            self.train(steps)

        act_and_train.__name__ = act.__name__
        return rule(steps=st.integers(0, 2), **drawn)(act_and_train)

    return make_rule


class Life(RuleBasedStateMachine):
    """A model, its optimizer and its sparsifier.

    ``groups`` names the parameters as the optimizer was given them; ``told`` the weights of which it was said that
    they are no longer masked.
    """

    @initialize(
        method=st.sampled_from(METHODS),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        interval=st.integers(1, 3),
        partly=st.booleans(),
    )
    def start(self, method, optimizer, interval, partly):
        method = dstlib.METHODS[method]
        interval = None if method.interval is None else interval
        self.method = replace(method, interval=interval, distribution=uniform)
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.dtype, self.num_batches = torch.float32, 0
        self.model = small()
        names = [name for name, _ in self.model.named_parameters()]
        self.groups = [[n for n in names if not (partly and n.startswith("head"))]]
        self.optimizer = self.optimize(self.groups)
        self.sparsify()
        self.saved = copy.deepcopy(self.model.state_dict())

    def sparsify(self, *optimizers):
        self.sparsifier = dstlib.sparsify(
            self.model, *optimizers, sparsity=0.7, method=self.method, total_steps=TOTAL_STEPS
        )
        self.told, self.in_a_row = set(), set()

    def optimize(self, groups):
        """An optimizer of these groups of parameters; one that is in several of them counts in the first."""
        of = dict(self.model.named_parameters())
        return self.make_optimizer([{"params": [of.pop(name) for name in names if name in of]} for names in groups])

    def load_optimizer(self, state):
        """Groups that no longer match torch itself refuses: then the optimizer is a new one."""
        with contextlib.suppress(ValueError):
            self.optimizer.load_state_dict(state)

    def live(self, name) -> Tensor:
        """What the model computes with under the name of a weight."""
        owner, _, key = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), key)

    def outside(self) -> dict[str, int]:
        """Counts the non-zeros outside the masks in what the model computes with."""
        return {n: int((self.live(n)[~mask] != 0).sum()) for n, mask in self.sparsifier.masks.items()}

    def amiss(self) -> set[str]:
        """Names the weights that are not as their masks, or not masked at all; but for those that were told of."""
        apart = {w.name for w in self.sparsifier.weights if self.live(w.name) is not w.parameter}
        return (apart | {name for name, num in self.outside().items() if num}) - self.told

    def said(self, action) -> list[str]:
        """Returns the warnings of an action and the error that ended it, if any."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                action()
            except (DstlibError, RuntimeError) as error:
                return [*(str(w.message) for w in caught), f"{type(error).__name__}: {error}"]
        return [str(w.message) for w in caught]

    def step_once(self):
        x, y = batch(self.num_batches)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x.to(self.dtype)), y).backward()
        self.optimizer.step()

    @rule(steps=st.integers(1, 3))
    def go_on(self, steps):
        self.train(steps)

    def train(self, steps):
        for _ in range(steps):
            before = self.amiss()
            messages = self.said(self.step_once)
            self.num_batches += 1
            after = self.amiss()
            note(f"amiss before {before}, said {messages}, amiss after {after}")
            is_error = any("Error: " in message for message in messages)
            # what no optimizer steps on waits: the summary tells of it
            stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            heard = {name for name in before if id(self.live(name)) in stepped} - self.in_a_row
            untold = {
                name for name in heard | (after - before) if not any(name in m or " more " in m for m in messages)
            }
            assert is_error or not untold, "neither held nor told"
            self.told |= after if messages else set()
            self.in_a_row = before  # at steps in a row, a loss has one cause, and is told of once
            if is_error:
                self.begin_again()
                return
            self.check()

    def begin_again(self):
        """Does what the errors advise: a new optimizer, masks anew."""
        self.sparsifier.detach()
        self.dtype = torch.float32
        self.model = self.model.float()
        self.groups = [[name for name, _ in self.model.named_parameters()]]
        self.optimizer = self.optimize(self.groups)
        self.sparsify(self.optimizer)
        assert not any(self.outside().values())

    def check(self):
        """Counts are exact, and outside the masks the optimizer's state is as at birth."""
        check_counts(self.sparsifier)
        if self.method.storage is None:
            for weight in self.sparsifier.weights:
                if weight.parameter not in self.optimizer.state:  # to ask for it would make it
                    continue
                for state, birth in state_of(self.optimizer, weight.parameter):
                    assert (state[~self.sparsifier.masks[weight.name]] == birth).all(), weight.name

    @life(layer=st.sampled_from(LAYERS), renew=st.booleans())
    def replace_layer(self, layer, renew):
        setattr(self.model, layer, small(self.num_batches).get_submodule(layer).to(self.dtype))
        if renew:
            self.swap_optimizer()

    @life(overwrite=st.booleans(), renew=st.booleans())
    def move(self, overwrite, renew):
        """As ``to(device)`` does: other storage in the same parameters, or other parameters."""
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        self.model._apply(torch.clone)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        if renew:
            self.swap_optimizer()

    @life(dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.float32]), renew=st.booleans())
    def cast(self, dtype, renew):
        self.dtype = dtype
        self.model.to(dtype)
        if renew:
            self.swap_optimizer()

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.model.state_dict())

    @life(what=st.sampled_from(["saved", "dense", "average"]), assign=st.booleans(), renew=st.booleans())
    def load(self, what, assign, renew):
        state = small(self.num_batches).to(self.dtype).state_dict() if what == "dense" else copy.deepcopy(self.saved)
        state = {name: x.to(self.dtype) for name, x in state.items()}
        if what == "average":
            state = {name: (x + self.model.state_dict()[name]) / 2 for name, x in state.items()}
        self.model.load_state_dict(state, assign=assign)
        if renew:
            self.swap_optimizer()

    @life(layer=st.sampled_from(["conv", "up"]), trains=st.booleans())
    def freeze_layer(self, layer, trains):
        self.model.get_submodule(layer).requires_grad_(trains)

    @life()
    def freeze_masks(self):
        self.sparsifier.freeze()

    @life()
    def add_param_group(self):
        """Gives the optimizer all that it has not."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        names = [name for name, p in self.model.named_parameters() if id(p) not in held]
        if names:
            self.optimizer.add_param_group({"params": [self.model.get_parameter(name) for name in names]})
            self.groups.append(names)

    @life()
    def swap(self):
        self.swap_optimizer()

    def swap_optimizer(self):
        self.groups = [[name for name, _ in self.model.named_parameters()]]
        self.optimizer = self.optimize(self.groups)

    @life(with_optimizer=st.booleans())
    def copy_all(self, with_optimizer):
        self.model, self.sparsifier, optimizer = copy.deepcopy((self.model, self.sparsifier, self.optimizer))
        if with_optimizer:
            self.optimizer = optimizer
        else:
            self.swap_optimizer()

    @life()
    def cross_a_process(self):
        """As a spawn does, of all at once."""
        self.model, self.sparsifier, self.optimizer = pickle.loads(
            pickle.dumps((self.model, self.sparsifier, self.optimizer))
        )

    @life(order=st.permutations(["model", "optimizer", "sparsifier"]), mixed=st.booleans())
    def resume(self, order, mixed):
        """In a new process, with our state, in any order; or with the weights of another moment."""
        states = {}
        messages = self.said(lambda: states.update({name: getattr(self, name).state_dict() for name in order}))
        states = copy.deepcopy(states)
        if mixed:
            states["model"] = {name: x.to(self.dtype) for name, x in self.saved.items()}
        with self.new_process():
            self.sparsify()
        for name in order:
            load = self.load_optimizer if name == "optimizer" else getattr(self, name).load_state_dict
            messages += self.said(partial(load, states[name]))
        assert_same(states["sparsifier"], self.sparsifier.state_dict())
        for name, saved in states["sparsifier"]["weights"].items():
            erased = (states["model"][name] != 0) & (self.live(name) == 0)
            if saved["hidden"] is not None:  # what is put aside under a mask is not lost
                erased &= states["model"][name] != saved["hidden"]
            # before its first step, a state is that of any dense weights
            assert messages or saved["step"] == 0 or not erased.any(), "weights were erased"

    @life(first=st.sampled_from(["load", "sparsify"]))
    def resume_without_masks(self, first):
        """As trainers do that know nothing of masks."""
        states = [copy.deepcopy(part.state_dict()) for part in (self.model, self.optimizer)]
        with self.new_process():
            if first == "load":
                self.model.load_state_dict(states[0])
            self.said(self.sparsify)
            if first == "sparsify":
                self.model.load_state_dict(states[0])
        self.load_optimizer(states[1])

    @contextlib.contextmanager
    def new_process(self):
        """Another model; while it is made sparse, those of its weights train that are to be sparse."""
        self.sparsifier.detach()
        sparse = {weight.name for weight in self.sparsifier.weights}
        trains = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.model = small(7).to(self.dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in sparse or parameter.ndim < 2)
        yield
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains[name])
        self.optimizer = self.optimize(self.groups)

    @invariant()
    def the_summary_tells_what_is(self):
        rows = {row.name: row for row in self.sparsifier.summary().rows}
        for weight in self.sparsifier.weights:
            live, mask, row = self.live(weight.name), self.sparsifier.masks[weight.name], rows[weight.name]
            if live is weight.parameter:
                assert row.num_active == int(mask.sum()) + int((live[~mask] != 0).sum())
            else:
                assert row.num_active == int(live.count_nonzero())
                assert "not masked" in row.note


Life.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestLife = pytest.mark.filterwarnings("ignore::UserWarning")(Life.TestCase)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_many_lives():
    run_state_machine_as_test(Life, settings=settings(max_examples=400, stateful_step_count=40, deadline=None))


def train_apart(model, sparsifier, masks):
    """What a spawned process does with what it was sent."""
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, 4)
    assert_zero_outside(model, sparsifier.masks)
    assert not any(mask.is_shared() for mask in sparsifier.masks.values())
    masks.put({name: mask.numpy() for name, mask in sparsifier.masks.items()})


@pytest.mark.long
def test_masks_that_cross_a_spawn_are_copies_and_what_comes_back_is_told():
    """Weights on a CPU are shared with a spawned process, as torch has it; so the parent finds them changed."""
    model = small()
    sparsifier = dstlib.sparsify(model, sparsity=0.7, method=replace(dstlib.SET, interval=1), total_steps=TOTAL_STEPS)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    context = torch.multiprocessing.get_context("spawn")
    masks = context.SimpleQueue()
    process = context.Process(target=train_apart, args=(model, sparsifier, masks))
    process.start()
    moved = {name: torch.from_numpy(mask) for name, mask in masks.get().items()}
    process.join()
    assert process.exitcode == 0
    assert_same(first, sparsifier.masks)
    num_outside = sum(int((model.get_parameter(n)[~mask] != 0).sum()) for n, mask in first.items())
    assert num_outside > 0, "the child's masks moved"
    assert not all(torch.equal(first[name], moved[name]) for name in first)
    assert sparsifier.summary().num_active == sum(int(mask.sum()) for mask in first.values()) + num_outside
    with pytest.warns(UserWarning, match="were loaded into .* without the masks|non-zeros outside the masks"):
        train(model, torch.optim.SGD(model.parameters(), lr=0.05), 1)
    assert_zero_outside(model, sparsifier.masks)

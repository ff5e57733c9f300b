"""A state machine: step, accumulate, overflow, clip, save and load, freeze, detach, copy, in any order."""

import copy
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import assert_same, assert_zero_outside, backward, check_counts, small, state_of
from strategies import examples

import dstlib
from dstlib.masking import NM, Channel, Element, FanIn, Kernel, uniform

TOTAL_STEPS = 24
GRAINS = {
    "element": (Element(), 0.8),
    "kernel": (Kernel(), 0.6),
    "channel": (Channel(), 0.5),
    "fan-in": (FanIn(), 0.7),
    "1:2": (NM(1, 2), 0.5),
}
OPTIMIZERS = {
    "sgd": lambda p, fused: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=fused),
    "adamw": lambda p, fused: torch.optim.AdamW(p, lr=0.01, fused=fused),
}


TRIED = ["static", "set", "rigl", "dsff", "gmp", "mest", "mest_soft", "topkast", "srste"]
TRIED += ["snfs", "dsr", "granet", "granet_sparse", "gmp_global", "acdc", "srigl"]  # these share units out


class Training(RuleBasedStateMachine):
    @initialize(
        method=st.sampled_from(TRIED),
        grain=st.sampled_from(sorted(GRAINS)),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        fused=st.booleans(),
        interval=st.integers(1, 4),
    )
    def start(self, method, grain, optimizer, fused, interval):
        interval = None if method == "static" else interval
        if method == "srigl":
            grain = "fan-in"
        elif dstlib.METHODS[method].allocate is not None and grain in ("fan-in", "1:2"):
            grain = "element"  # several groups leave a remainder, or nothing to share: test_shared_budgets.py
        granularity, sparsity = GRAINS[grain]
        method = replace(dstlib.METHODS[method], granularity=granularity, distribution=uniform, interval=interval)

        def build():
            model = small()
            opt = OPTIMIZERS[optimizer](model.parameters(), fused)
            return model, opt, dstlib.sparsify(model, opt, sparsity=sparsity, method=method, total_steps=TOTAL_STEPS)

        self.build, self.fused = build, fused
        self.model, self.optimizer, self.sparsifier = build()
        self.num_batches = self.num_steps = 0
        self.frozen_at = self.detached_at = None
        self.started = True

    @rule()
    def accumulate(self):
        backward(self.model, self.num_batches, scale=0.5)
        self.num_batches += 1

    @rule(clip=st.booleans(), without=st.sampled_from(["", "", "conv.weight", "head.weight"]))
    def step(self, clip, without):
        """Of a weight without a gradient, an update that is due waits, and the others do not take its units."""
        backward(self.model, self.num_batches)
        self.num_batches += 1
        if without and self.num_steps:  # torch's fused SGD cannot begin with a part of its parameters
            self.model.get_parameter(without).grad = None
        if clip and self.detached_at is None:
            self.sparsifier.before_step()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.detached_at is None:
            self.num_steps += 1

    @precondition(lambda self: self.num_steps > 0)  # torch's fused SGD: see test_amp.py
    @rule(early=st.booleans())
    def overflow(self, early):
        weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        backward(self.model, self.num_batches, scale=1024.0)
        self.model.conv.weight.grad.view(-1)[0] = torch.inf
        if early:
            scaler.unscale_(self.optimizer)
            self.sparsifier.before_step()
        saved = self.sparsifier.state_dict()
        scaler.step(self.optimizer)
        self.optimizer.zero_grad()
        assert_same(saved, self.sparsifier.state_dict())
        assert_same(weights, self.model.state_dict())

    @rule()
    def save_and_load(self):
        states = [copy.deepcopy(part.state_dict()) for part in (self.model, self.optimizer, self.sparsifier)]
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        detached = self.detached_at is not None
        self.model, self.optimizer, self.sparsifier = self.build()
        for part, state in zip((self.model, self.optimizer, self.sparsifier), states, strict=True):
            part.load_state_dict(state)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        if detached:
            self.model.load_state_dict(states[0])
            self.sparsifier.detach()

    @rule()
    def copy_all(self):
        self.model, self.optimizer, self.sparsifier = copy.deepcopy((self.model, self.optimizer, self.sparsifier))

    @rule()
    def freeze(self):
        self.sparsifier.freeze()
        self.frozen_at = {n: m.clone() for n, m in self.sparsifier.masks.items()}

    @precondition(lambda self: self.num_steps > 2)
    @rule()
    def detach(self):
        self.sparsifier.detach()
        self.detached_at = {n: m.clone() for n, m in self.sparsifier.masks.items()}

    @precondition(lambda self: getattr(self, "started", False))
    @invariant()
    def holds(self):
        assert self.sparsifier.step == self.num_steps
        check_counts(self.sparsifier)
        if self.frozen_at is not None:
            assert_same(self.frozen_at, self.sparsifier.masks)
        if self.detached_at is not None:
            assert_same(self.detached_at, self.sparsifier.masks)
        else:
            hides = self.sparsifier.plan.method.storage is not None  # then its state lives on within reach
            assert_zero_outside(self.model, self.sparsifier.masks, *([] if hides else [self.optimizer]))
            for name, saved in self.sparsifier.state_dict()["weights"].items():
                if saved["reach"] is not None:
                    for state, birth in state_of(self.optimizer, self.model.get_parameter(name)):
                        assert (state[~saved["reach"]] == birth).all()


Training.TestCase.settings = examples(40, 160, stateful_step_count=25)
TestTraining = Training.TestCase

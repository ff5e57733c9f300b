"""Dense storage: weights under the mask live on, as Top-KAST and SR-STE define it, and nobody sees them.

The oracle keeps one dense parameter per weight in a second model, computes with the masked copy of it, and lets
torch's own optimizer move the dense one: no mask of the library, no hook, no hidden tensor.
"""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import assert_same
from strategies import examples
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dstlib
from dstlib import StateError
from dstlib.masking import Element, Trace
from dstlib.methods import SRSTE, TOPKAST

LAMBDA = 0.05  # strong, so that a pull that is missing or doubled shows within a few steps
DENSITY, EXTRA = 0.25, 0.15


class Attentive(nn.Module):
    """A convolution, a transposed one, an attention and a linear layer: (B, 4, 5, 5) → (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(self.conv(x).relu()).relu().flatten(2).transpose(1, 2)
        # ten-fold logits: gradients large enough for masks to move within a few steps
        return 10 * self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


WEIGHTS = ("conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight")


def attentive(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Attentive().to(dtype)


def batch(step, dtype=torch.float32, size=4):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, 5, 5, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def backward(model, step, scale=1.0):
    x, y = batch(step, model.head.weight.dtype)
    (nn.functional.cross_entropy(model(x), y) * scale).backward()


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


# The oracle's choice of masks, with sorting in plain Python


def top(values, num):
    """Marks the ``num`` largest of a list, ties to the earlier."""
    best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:num]
    return [i in best for i in range(len(values))]


def outputs_first(name, x):
    """Torch has the inputs of a transposed convolution first; turns them round, and back."""
    return x.transpose(0, 1) if name == "up.weight" else x


def matrices(name, weight):
    """The parts that compete each for itself: three for the in_proj of an attention."""
    return weight.chunk(3) if "in_proj" in name else (weight,)


def choose_topkast(name, weight):
    """The mask of the forward pass and that of the backward pass, top D and top D + M."""
    forward, backward = [], []
    for part in matrices(name, outputs_first(name, weight)):
        size = part.abs().flatten().tolist()
        num, more = round(DENSITY * len(size)), round(EXTRA * len(size))
        assert abs(DENSITY * len(size) % 1 - 0.5) > 1e-6 < abs(EXTRA * len(size) % 1 - 0.5), "a half to round"
        forward.append(torch.tensor(top(size, num)).view(part.shape))
        backward.append(torch.tensor(top(size, num + more)).view(part.shape))
    return outputs_first(name, torch.cat(forward)).contiguous(), outputs_first(name, torch.cat(backward)).contiguous()


def choose_two_of_four(name, weight):
    """2 of 4 consecutive inputs; everything learns."""
    by_output = outputs_first(name, weight)
    mask = torch.zeros(by_output.shape, dtype=torch.bool)
    for o in range(by_output.shape[0]):
        for i in range(0, by_output.shape[1], 4):
            taps = by_output[o, i : i + 4].abs().reshape(4, -1)
            for k in range(taps.shape[1]):
                mask[o, i : i + 4].view(4, -1)[:, k] = torch.tensor(top(taps[:, k].tolist(), 2))
    return outputs_first(name, mask).contiguous(), torch.ones_like(weight, dtype=torch.bool)


def choose_quarter(name, weight):
    forward, _ = choose_topkast(name, weight)
    return forward, torch.ones_like(weight, dtype=torch.bool)


CASES = {
    # Jayakumar et al. 2020: the pull of the exploration set is divided by the density
    "topkast": (
        replace(TOPKAST, storage=replace(TOPKAST.storage, extra=EXTRA, decay=dstlib.masking.OverDensity(LAMBDA))),
        1 - DENSITY,
        choose_topkast,
        LAMBDA / DENSITY,
    ),
    # Zhou et al. 2021, equation 9
    "srste": (
        replace(SRSTE, storage=replace(SRSTE.storage, decay=dstlib.schedules.Constant(LAMBDA))),
        0.5,
        choose_two_of_four,
        LAMBDA,
    ),
    "srste-element": (
        replace(SRSTE, granularity=Element(), storage=replace(SRSTE.storage, decay=dstlib.schedules.Constant(LAMBDA))),
        1 - DENSITY,
        choose_quarter,
        LAMBDA,
    ),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}
every_case = pytest.mark.parametrize("case", CASES)


def set_up(case, optimizer="sgd", dtype=torch.float32, seed=0, **changes):
    method, sparsity, *_ = CASES[case]
    model = attentive(seed, dtype)
    opt = OPTIMIZERS[optimizer](model.parameters())
    method = replace(method, **changes) if changes else method
    return model, opt, dstlib.sparsify(model, opt, sparsity=sparsity, method=method, total_steps=30)


class Oracle:
    """Dense parameters, of which the model computes with the masked part only."""

    def __init__(self, case, optimizer="sgd", dtype=torch.float32, clip=None):
        *_, self.choose, self.pull = CASES[case]
        self.model = attentive(dtype=dtype)
        self.dense = dict(self.model.named_parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.clip = clip
        self.choose_masks()

    def choose_masks(self):
        chosen = {name: self.choose(name, self.dense[name].detach()) for name in WEIGHTS}
        self.masks = {name: forward for name, (forward, _) in chosen.items()}
        self.reach = {name: backward for name, (_, backward) in chosen.items()}

    def visible(self):
        """What the model computes with."""
        everything = {name: p.detach().clone() for name, p in self.dense.items()}
        return everything | {n: torch.where(m, everything[n], 0.0) for n, m in self.masks.items()}

    def step(self, step):
        x, y = batch(step, self.model.head.weight.dtype)
        leaves = {name: x.requires_grad_() for name, x in self.visible().items()}
        loss = nn.functional.cross_entropy(functional_call(self.model, leaves, x), y)
        before = {name: self.dense[name].detach().clone() for name in WEIGHTS}
        for (name, p), g in zip(self.dense.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
            p.grad = torch.empty_like(p).copy_(g)
            if name in self.masks:
                hidden = torch.where(self.masks[name], 0.0, before[name])
                # turned round, as torch rounds a sum of bfloat16 tensors by their layout
                outputs_first(name, p.grad).add_(outputs_first(name, hidden), alpha=self.pull)
                p.grad[~self.reach[name]] = 0
        if self.clip is not None:
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for name, reach in self.reach.items():
                p = self.dense[name]
                p.copy_(torch.where(reach, p, before[name]))
                for value in self.optimizer.state[p].values():
                    if value is not None and value.shape == p.shape:
                        value[~reach] = 0
            left = self.reach
            self.choose_masks()
            for name in WEIGHTS:  # what leaves the backward mask starts afresh when it comes back
                for value in self.optimizer.state[self.dense[name]].values():
                    if value is not None and value.shape == left[name].shape:
                        value[~self.reach[name]] = 0


def assert_agrees(model, sparsifier, oracle):
    """Weights and masks bit for bit, the hidden ones too: the state holds them."""
    assert_same({n: p.detach() for n, p in model.named_parameters()}, oracle.visible())
    assert_same(sparsifier.masks, oracle.masks)
    for name, saved in sparsifier.state_dict()["weights"].items():
        hidden = torch.where(oracle.masks[name], 0.0, oracle.dense[name].detach())
        assert torch.equal(saved["hidden"], hidden), f"{name}: the hidden values differ"


@every_case
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_is_what_the_paper_says_bit_for_bit(case, optimizer, dtype):
    model, opt, sparsifier = set_up(case, optimizer, dtype)
    oracle = Oracle(case, optimizer, dtype)
    first = {n: m.clone() for n, m in oracle.masks.items()}
    assert_agrees(model, sparsifier, oracle)
    for step in range(12):
        train(model, opt, 1, start=step)
        oracle.step(step)
        assert_agrees(model, sparsifier, oracle)
        x, _ = batch(step + 1, dtype)
        assert torch.equal(model(x), functional_call(oracle.model, oracle.visible(), x))
    moved = [name for name in WEIGHTS if not torch.equal(first[name], sparsifier.masks[name])]
    assert len(moved) >= 3, f"only {moved} moved: nothing was compared"


def test_srste_is_equation_9():
    """Written out: W ← W - lr · (g(W̃) + λ · (1 - mask) · W), for plain SGD on one linear layer."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False).double()
    w = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = replace(CASES["srste"][0])
    dstlib.sparsify(layer, optimizer, sparsity=0.5, method=method, total_steps=30)
    for step in range(15):
        x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        mask = choose_two_of_four("", w)[0]
        g = 2 * ((x @ (w * mask).T - 1).T @ x) / 30  # of the mean of (W̃x - 1)² over 5 · 6 outputs
        w = w - 0.1 * (g + LAMBDA * torch.where(mask, 0.0, w))
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        mask = choose_two_of_four("", w)[0]
        assert torch.equal(layer.weight != 0, mask)
        # sums in another order, in double precision
        torch.testing.assert_close(layer.weight.detach(), w * mask, rtol=1e-12, atol=1e-14)


def test_what_topkast_leaves_out_does_not_move_at_all():
    """Neither weight decay, nor momentum from when it was within reach: only B moves."""
    model, opt, sparsifier = set_up("topkast")
    train(model, opt, 3)
    before = sparsifier.state_dict()["weights"]
    train(model, opt, 1, start=3)
    after = sparsifier.state_dict()["weights"]
    for name in WEIGHTS:
        out = ~before[name]["reach"]
        assert out.any()
        dense = torch.where(after[name]["mask"], model.get_parameter(name).detach(), after[name]["hidden"])
        assert torch.equal(before[name]["hidden"][out], dense[out])
        buffer = opt.state[model.get_parameter(name)]["momentum_buffer"]
        assert (buffer[out] == 0).all(), "what comes within reach starts without momentum"


@every_case
def test_between_steps_the_model_is_sparse_and_looks_as_ever(case):
    plain = attentive()
    model, opt, sparsifier = set_up(case)
    for step in range(5):
        for name, mask in sparsifier.masks.items():
            assert (model.get_parameter(name)[~mask] == 0).all()
            assert (model.get_parameter(name)[mask] != 0).any()
        train(model, opt, 1, start=step)
    assert type(model) is type(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    pickle.loads(pickle.dumps(model))


# Ways to step


def test_a_call_before_clipping_twice_and_the_norm_it_shows():
    for case in CASES:
        model, opt, sparsifier = set_up(case)
        oracle = Oracle(case, clip=0.05)
        for step in range(8):
            opt.zero_grad()
            backward(model, step)
            sparsifier.before_step()
            sparsifier.before_step()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            opt.step()
            oracle.step(step)
            assert torch.equal(norm, oracle.norm), f"{case}: of what learns, the pull included"
            assert norm > 0.05
            assert_agrees(model, sparsifier, oracle)


@every_case
def test_a_closure_and_an_engine_of_ones_own_step_alike(case):
    oracle = Oracle(case)
    with_closure, opt, first = set_up(case)
    with_engine, engine, second = set_up(case)
    arithmetic = engine.step.__wrapped__ if hasattr(engine.step, "__wrapped__") else None
    assert arithmetic is not None, "torch wraps step to call the hooks"
    for step in range(6):

        def closure(step=step):
            opt.zero_grad()
            backward(with_closure, step)
            return torch.zeros(())

        opt.step(closure)
        engine.zero_grad()
        backward(with_engine, step)
        second.before_step()
        arithmetic(engine)  # no hooks
        second.after_step()
        oracle.step(step)
        assert_agrees(with_closure, first, oracle)
        assert_agrees(with_engine, second, oracle)


@every_case
def test_accumulation_shows_sparse_weights_to_every_part(case):
    whole, opt, sparsifier = set_up(case, dtype=torch.float64)
    split, split_opt, split_sparsifier = set_up(case, dtype=torch.float64)
    for step in range(6):
        train(whole, opt, 1, start=step)
        x, y = batch(step, torch.float64)
        split_opt.zero_grad()
        for part in (slice(0, 2), slice(2, 4)):
            (nn.functional.cross_entropy(split(x[part]), y[part]) / 2).backward()
            for name, mask in split_sparsifier.masks.items():
                assert (split.get_parameter(name)[~mask] == 0).all()
        split_opt.step()
        assert_same(sparsifier.masks, split_sparsifier.masks)
    for name, p in whole.named_parameters():
        # two sums in another order, in double precision, over 6 steps
        torch.testing.assert_close(p, split.get_parameter(name), rtol=1e-10, atol=1e-12)


FUSED = {"fused": True, "unfused": False}


@every_case
@pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("early", [False, True], ids=["plain", "early call"])
def test_an_overflow_moves_nothing_and_leaves_nothing_open(case, fused, early):
    """Steps 2 and 5 overflow, in a parameter that is not sparse; the others are those of a run without AMP."""
    method, sparsity, *_ = CASES[case]
    model, oracle = attentive(), Oracle(case)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05, fused=fused)
    oracle.optimizer = torch.optim.SGD(oracle.dense.values(), lr=0.1, momentum=0.9, weight_decay=0.05, fused=fused)
    sparsifier = dstlib.sparsify(model, opt, sparsity=sparsity, method=method, total_steps=30)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    good = 0
    for step in range(8):
        overflow = step in (2, 5)
        opt.zero_grad()
        scaler.scale(torch.zeros(()))  # makes the scale exist before the first step
        backward(model, step, scale=float(scaler.get_scale()))
        if overflow:
            model.conv.bias.grad[0] = torch.inf
        before, saved = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
        if early:
            scaler.unscale_(opt)
            sparsifier.before_step()
        scaler.step(opt)
        scaler.update()
        if overflow:
            assert_same(before, model.state_dict())
            assert_same(saved, sparsifier.state_dict())
            assert not any(m.is_revealed for m in sparsifier._masked)
        else:
            oracle.step(step)
            good += 1
        assert_agrees(model, sparsifier, oracle)  # the scales are powers of two: exact
    assert sparsifier.step == good == 6


def test_a_fused_overflow_after_an_early_call_that_could_not_know_closes_what_it_opened():
    """Before the first step no optimizer is known that holds the bias, where the overflow is."""
    model = attentive()
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method=CASES["srste"][0], total_steps=30)
    opt = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    before, saved = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    backward(model, 0, scale=1024.0)
    model.conv.bias.grad[0] = torch.inf
    scaler.unscale_(opt)
    sparsifier.before_step()
    scaler.step(opt)
    assert_same(before, model.state_dict())
    assert_same(saved, sparsifier.state_dict())


@pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_criteria_and_traces_see_the_unscaled_gradient_without_the_pull(fused, kind):
    """The update comes after the step, when a fused optimizer has divided the scale out already."""
    seen = []
    for scale in (1.0, 1024.0):
        model = attentive()
        opt = kind(model.parameters(), lr=0.1, fused=fused)
        method = replace(CASES["srste"][0], trace=Trace(steps=1))
        sparsifier = dstlib.sparsify(model, opt, sparsity=0.5, method=method, total_steps=30)
        sparsifier.observers.append(
            lambda site, update: seen.append((site.name, site.grad.clone(), site.trace.clone()))
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))
        backward(model, 0, scale=scale)
        dense = {n: p.grad.clone() / scale for n, p in model.named_parameters()}
        scaler.step(opt)
    half = len(seen) // 2
    assert half == 7, "five weights, one of them three matrices"
    for (name, grad, trace), (_, scaled_grad, scaled_trace) in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(grad, scaled_grad), name
        assert torch.equal(trace, scaled_trace), name
        if name == "head.weight":
            assert torch.equal(trace, dense[name])


def test_a_weight_without_a_gradient_rests_with_all_that_is_hidden():
    for case in CASES:
        model, opt, sparsifier = set_up(case)
        train(model, opt, 3)
        before, weight = sparsifier.state_dict()["weights"], model.head.weight.detach().clone()
        opt.zero_grad()
        backward(model, 3)
        model.head.weight.grad = None
        opt.step()
        after = sparsifier.state_dict()["weights"]
        assert torch.equal(model.head.weight, weight)
        for field in ("mask", "hidden", "reach"):
            ours, theirs = before["head.weight"][field], after["head.weight"][field]
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        assert not torch.equal(before["conv.weight"]["hidden"], after["conv.weight"]["hidden"])
        assert sparsifier.step == 4
        train(model, opt, 2, start=4)
        assert not torch.equal(
            before["head.weight"]["hidden"], sparsifier.state_dict()["weights"]["head.weight"]["hidden"]
        )


def test_two_optimizers_open_only_what_they_step_on():
    for case in CASES:
        method, sparsity, *_ = CASES[case]
        model, oracle = attentive(), Oracle(case)
        heads = set(model.head.parameters())
        body = OPTIMIZERS["sgd"]([p for p in model.parameters() if p not in heads])
        head = OPTIMIZERS["sgd"](model.head.parameters())
        sparsifier = dstlib.sparsify(model, body, head, sparsity=sparsity, method=method, total_steps=30)
        for step in range(6):
            model.zero_grad()
            backward(model, step)
            if step % 2:
                sparsifier.before_step(body)
            body.step()
            for name, mask in sparsifier.masks.items():
                assert (model.get_parameter(name)[~mask] == 0).all()
            head.step()
            oracle.step(step)
            assert_agrees(model, sparsifier, oracle)


# Freeze, detach, copy, average


@every_case
def test_frozen_masks_stay_and_hidden_weights_go_on_learning(case):
    model, opt, sparsifier = set_up(case)
    train(model, opt, 3)
    sparsifier.freeze()
    masks = {n: m.clone() for n, m in sparsifier.masks.items()}
    hidden = sparsifier.state_dict()["weights"]["conv.weight"]["hidden"]
    train(model, opt, 4, start=3)
    assert_same(masks, sparsifier.masks)
    assert not torch.equal(hidden, sparsifier.state_dict()["weights"]["conv.weight"]["hidden"])
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()


@every_case
def test_after_detach_the_weights_are_the_users(case):
    model, opt, sparsifier = set_up(case)
    train(model, opt, 3)
    sparsifier.detach()
    weights, saved = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    for name, mask in sparsifier.masks.items():
        assert (weights[name][~mask] == 0).all()
    train(model, opt, 1, start=3)
    assert_same(saved, sparsifier.state_dict())
    mask = sparsifier.masks["conv.weight"]
    assert (model.conv.weight[~mask] != 0).any()


@every_case
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("amid", [False, True], ids=["between steps", "amid a step"])
def test_a_copy_trains_on_alike(case, way, amid):
    model, opt, sparsifier = set_up(case)
    train(model, opt, 3)
    if amid:
        opt.zero_grad()
        backward(model, 3)
        sparsifier.before_step()
    whole = (model, opt, sparsifier)
    twins = copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    for ours, theirs in zip(model.parameters(), twins[0].parameters(), strict=True):
        theirs.grad = None if ours.grad is None else ours.grad.clone()  # pickle leaves gradients out
    for m, o, _ in (whole, twins):
        if amid:
            o.step()
        train(m, o, 4, start=3 + amid)
    assert_same(model.state_dict(), twins[0].state_dict())
    assert_same(opt.state_dict()["state"], twins[1].state_dict()["state"])
    assert_same(sparsifier.state_dict(), twins[2].state_dict())
    assert twins[2].step == 7 + amid


def test_an_average_of_the_sparse_weights_is_masked_when_it_is_read():
    model, opt, sparsifier = set_up("topkast")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(8):
        train(model, opt, 1, start=step)
        average.update_parameters(model)
    mask = sparsifier.masks["conv.weight"]
    assert (average.module.conv.weight[~mask] != 0).any(), "the trap: masks have moved"
    sparsifier.mask_model(average)
    assert (average.module.conv.weight[~mask] == 0).all()


# Saving


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@examples(10, 25)
@given(
    case=st.sampled_from(sorted(CASES)),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    cut=st.integers(0, 9),
    amid=st.booleans(),
    frozen=st.booleans(),
)
def test_resume_equals_uninterrupted(case, optimizer, cut, amid, frozen):
    """Also cut between ``before_step`` and the step; the batch of that step is then taken again, from the start."""
    whole = set_up(case, optimizer, trace=Trace(decay=0.5))
    train(*whole[:2], cut)
    if frozen:
        whole[2].freeze()
    train(*whole[:2], 10 - cut, start=cut)

    first = set_up(case, optimizer, trace=Trace(decay=0.5))
    train(*first[:2], cut)
    if frozen:
        first[2].freeze()
    if amid:
        first[1].zero_grad()
        backward(first[0], cut)
        first[2].before_step()
    state = through_a_file([part.state_dict() for part in first])
    second = set_up(case, optimizer, seed=1, trace=Trace(decay=0.5))
    train(*second[:2], 2, start=50)
    for part, saved in zip(second, state, strict=True):
        part.load_state_dict(saved)
    for name, mask in second[2].masks.items():
        assert (second[0].get_parameter(name)[~mask] == 0).all()
    train(*second[:2], 10 - cut, start=cut)
    for ours, theirs in zip(whole, second, strict=True):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert_same(ours.get("state", ours), theirs.get("state", theirs))


def test_values_that_are_revealed_for_a_step_that_is_not_taken_are_counted():
    model, opt, sparsifier = set_up("topkast")
    train(model, opt, 3)
    backward(model, 3)
    sparsifier.before_step()
    weights = [weight.parameter for weight in sparsifier.weights]
    summary = sparsifier.summary()
    assert (
        summary.num_active
        >= sum(int(p.count_nonzero()) for p in weights)
        > sum(int(mask.sum()) for mask in sparsifier.masks.values())
    )
    assert any("outside the mask" in row.note for row in summary.rows)


def test_a_state_without_what_is_hidden_is_refused():
    *_, sparsifier = set_up("topkast")
    for field in ("hidden", "reach"):
        state = sparsifier.state_dict()
        state["weights"]["up.weight"][field] = None
        with pytest.raises(StateError, match=rf"{field} of up\.weight: .*\(8, 8, 2, 2\), got NoneType"):
            sparsifier.load_state_dict(state)
    *_, plain = set_up("topkast", storage=None, grown_init=dstlib.masking.zeros)
    with pytest.raises(StateError, match=r"hidden of conv\.weight: expected nothing"):
        plain.load_state_dict(sparsifier.state_dict())


def test_a_new_optimizer_takes_over():
    """Its state begins empty; what is hidden stays where it was."""
    for case in CASES:
        model, opt, sparsifier = set_up(case)
        oracle = Oracle(case)
        for step in range(6):
            if step == 3:
                opt = OPTIMIZERS["adamw"](model.parameters())
                oracle.optimizer = OPTIMIZERS["adamw"](oracle.dense.values())
            train(model, opt, 1, start=step)
            oracle.step(step)
        assert_agrees(model, sparsifier, oracle)


def test_interval_and_overrides():
    """Masks that move each third step only, and one weight with a sparsity of its own."""
    method = replace(CASES["topkast"][0], interval=3)
    model = attentive()
    opt = OPTIMIZERS["sgd"](model.parameters())
    overrides = {"head": 0.5, "conv": 0.0}
    sparsifier = dstlib.sparsify(model, opt, sparsity=1 - DENSITY, method=method, total_steps=30, overrides=overrides)
    assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == {
        "conv.weight": 8 * 4 * 9,
        "up.weight": 8 * 8 * 4 // 4,
        "attention.in_proj_weight": 3 * 8 * 8 // 4,
        "attention.out_proj.weight": 8 * 8 // 4,
        "head.weight": 3 * 8 // 2,
    }
    steps = []
    sparsifier.observers.append(lambda site, update: steps.append(site.step))
    train(model, opt, 9)
    assert sorted(set(steps)) == [3, 6, 9]
    for name, saved in sparsifier.state_dict()["weights"].items():
        dense = torch.where(saved["mask"], model.get_parameter(name).detach(), saved["hidden"])
        num = int(saved["mask"].sum())
        if "in_proj" not in name:
            assert torch.equal(saved["mask"].flatten(), torch.tensor(top(dense.abs().flatten().tolist(), num)))

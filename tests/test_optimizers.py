"""The zeros hold under every torch optimizer, and the topology changes as the method says."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from models import assert_same, assert_zero_outside, backward, batch, small, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dstlib
from dstlib import NM, RIGL, SettingError, StateError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "adopted"])
def test_zeros_hold_and_masks_move(name, given):
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    method = replace(RIGL, interval=3)
    optimizers = (optimizer,) if given else ()
    sparsifier = dstlib.sparsify(model, *optimizers, sparsity=0.7, method=method, total_steps=20)
    num_active = {n: int(m.sum()) for n, m in sparsifier.masks.items()}
    first = {n: m.clone() for n, m in sparsifier.masks.items()}
    for step in range(20):
        train(model, optimizer, 1, start=step)
        assert_zero_outside(model, sparsifier.masks, optimizer)
        assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == num_active
    assert sparsifier.step == 20
    assert any(not torch.equal(first[n], m) for n, m in sparsifier.masks.items()), "no mask has moved"


class Noisy(torch.optim.Optimizer):
    """An optimizer that torch has never heard of, which moves all weights, and whose state is not zero at birth."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                memory = self.state[p].setdefault("memory", torch.ones_like(p))
                memory += p.grad.square()
                p += memory


def test_an_unknown_optimizer_is_masked_too():
    model = small()
    optimizer = Noisy(model.parameters())
    sparsifier = dstlib.sparsify(model, sparsity=0.7, method="static")
    train(model, optimizer, 2)
    assert_zero_outside(model, sparsifier.masks)
    mask, memory = sparsifier.masks["head.weight"], optimizer.state[model.head.weight]["memory"]
    assert (memory[~mask] == 1).all(), "its value at birth"
    assert (memory[mask] > 1).all(), "active state is the optimizer's business"


def test_the_gradient_is_masked_when_the_optimizer_steps():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method="static")
    backward(model, 0)
    dense = model.head.weight.grad.clone()
    optimizer.step()
    mask = sparsifier.masks["head.weight"]
    assert (dense[~mask] != 0).any()
    assert torch.equal(model.head.weight.grad, torch.where(mask, dense, 0.0))


def test_lbfgs_is_refused_when_given_and_when_met():
    model = small()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(SettingError, match="LBFGS"):
        dstlib.sparsify(model, lbfgs, sparsity=0.5, method="static")
    dstlib.sparsify(model, sparsity=0.5, method="static")
    with pytest.raises(SettingError, match="LBFGS"):
        lbfgs.step(lambda: nn.functional.mse_loss(model.head.weight, torch.zeros(3, 6)))


def test_a_closure_computes_the_gradients_inside_the_step():
    with_closure, without = small(), small()
    sparsifiers, optimizers = [], []
    for model in (with_closure, without):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        method = replace(RIGL, interval=2)
        sparsifiers.append(dstlib.sparsify(model, sparsity=0.7, method=method, total_steps=8))
    train(without, optimizers[1], 8)
    for step in range(8):

        def closure(step=step):
            optimizers[0].zero_grad()
            return torch.tensor(backward(with_closure, step))

        optimizers[0].step(closure) if step % 2 else optimizers[0].step(closure=closure)
    assert_same(with_closure.state_dict(), without.state_dict())
    assert_same(sparsifiers[0].masks, sparsifiers[1].masks)


def test_two_optimizers_each_own_their_weights_and_steps():
    model = small()
    body = torch.optim.SGD([*model.conv.parameters(), *model.up.parameters()], lr=0.1, momentum=0.9)
    head = torch.optim.AdamW([*model.norm.parameters(), *model.head.parameters()], lr=0.01)
    method = replace(RIGL, interval=2)
    sparsifier = dstlib.sparsify(model, body, head, sparsity=0.6, method=method, total_steps=12)
    updates = []
    sparsifier.observers.append(lambda site, update: updates.append((site.name, site.step)))
    for step in range(8):
        model.zero_grad()
        backward(model, step)
        body.step()
        if step % 2:
            head.step()
        assert_zero_outside(model, sparsifier.masks, body, head)
    assert [s for n, s in updates if n == "conv.weight"] == [2, 4, 6, 8]
    assert [s for n, s in updates if n == "head.weight"] == [2, 4]
    assert sparsifier.step == 8


def test_a_copied_or_new_optimizer_is_met_by_itself():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method="static")
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    later = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, later, 2)
    assert_zero_outside(model, sparsifier.masks, later)
    assert sparsifier.step == 4
    assert state["param_groups"][0]["lr"] == 0.1


def test_a_copy_of_model_optimizer_and_sparsifier_trains_on_alike():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(RIGL, interval=2), total_steps=20)
    train(model, optimizer, 3)
    twin, twin_optimizer, twin_sparsifier = copy.deepcopy((model, optimizer, sparsifier))
    train(model, optimizer, 5, start=3)
    assert twin_sparsifier.step == 3, "the copy must not hear of the original's steps"
    train(twin, twin_optimizer, 5, start=3)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(sparsifier.state_dict(), twin_sparsifier.state_dict())


def test_gradient_accumulation_counts_optimizer_steps_and_sees_the_full_gradient():
    whole, split = small(), small()
    sparsifiers = []
    for model in (whole, split):
        method = replace(RIGL, interval=1)
        sparsifiers.append(dstlib.sparsify(model, sparsity=0.6, method=method, total_steps=4))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, split)]
    seen = []
    for sparsifier in sparsifiers:
        sparsifier.observers.append(lambda site, update: seen.append((site.name, site.grad.clone())))
    x, y = batch(0, 8)
    nn.functional.cross_entropy(whole(x), y).backward()
    for part in (slice(0, 4), slice(4, 8)):
        (nn.functional.cross_entropy(split(x[part]), y[part]) / 2).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [s.step for s in sparsifiers] == [1, 1]
    half = len(seen) // 2
    for (name, full), (other, accumulated) in zip(seen[:half], seen[half:], strict=True):
        assert name == other
        torch.testing.assert_close(full, accumulated, rtol=1e-5, atol=1e-7)  # two sums in another order
        assert (full != 0).float().mean() > 0.5, "growth needs the dense gradient"


def test_clipping_after_an_explicit_call_sees_the_masked_norm_and_updates_once():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.9, method=replace(RIGL, interval=2), total_steps=40)
    updates = []
    sparsifier.observers.append(lambda site, update: updates.append(site.step))
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        dense = nn.utils.get_total_norm(p.grad for p in model.parameters())
        sparsifier.before_step()
        sparsifier.before_step()
        masked = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert masked < dense
        optimizer.step()
        assert_zero_outside(model, sparsifier.masks, optimizer)
    assert sparsifier.step == 4
    assert sorted(updates) == [2, 2, 2, 4, 4, 4]


def test_an_engine_without_torch_optimizers_calls_before_and_after():
    model = small()
    sparsifier = dstlib.sparsify(model, sparsity=0.7, method=replace(RIGL, interval=2), total_steps=10)
    first = sparsifier.masks["conv.weight"].clone()
    for step in range(6):
        model.zero_grad()
        backward(model, step)
        sparsifier.before_step()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad + 0.01
        sparsifier.after_step()
        assert_zero_outside(model, sparsifier.masks)
    assert sparsifier.step == 6
    assert not torch.equal(first, sparsifier.masks["conv.weight"])


def test_an_update_waits_for_the_next_step_at_which_the_weight_has_a_gradient():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(RIGL, interval=2), total_steps=20)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    before = sparsifier.masks["head.weight"].clone()
    updates = []
    sparsifier.observers.append(lambda site, update: updates.append((site.name, site.step)))
    model.conv(torch.randn(1, 2, 6, 6)).sum().backward()
    optimizer.step()
    assert torch.equal(before, sparsifier.masks["head.weight"])
    assert_zero_outside(model, sparsifier.masks, optimizer)
    train(model, optimizer, 3, start=1)
    assert [step for name, step in updates if name == "conv.weight"] == [2, 4]
    assert [step for name, step in updates if name == "head.weight"] == [3, 4], "3 makes up for 2"
    assert sparsifier.step == 5


def test_a_replaced_parameter_is_noticed():
    model = small()
    dstlib.sparsify(model, sparsity=0.7, method="static")
    model.load_state_dict(small(1).state_dict(), assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, 0)
    with pytest.raises(StateError, match=r"parameter of conv\.weight: expected the one that was made sparse"):
        optimizer.step()


def test_momentum_cannot_tell_what_to_grow():
    with pytest.raises(SettingError, match=r"grow of method rigl.*got momentum"):
        dstlib.sparsify(small(), sparsity=0.7, method=replace(RIGL, grow=dstlib.masking.momentum), total_steps=1000)


def test_a_sparse_weight_that_no_given_optimizer_holds_is_named():
    model = small()
    with pytest.warns(UserWarning, match=r"up\.weight, head\.weight: sparse, but in none of the optimizers given"):
        dstlib.sparsify(model, torch.optim.SGD(model.conv.parameters(), lr=0.1), sparsity=0.7, method="static")


def test_masked_gradients_are_zero_outside():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(RIGL, interval=2), total_steps=20)
    for step in range(6):
        train(model, optimizer, 1, start=step)
        for name, mask in sparsifier.masks.items():
            assert (model.get_parameter(name).grad[~mask] == 0).all()


def test_the_one_line_survives_a_discarded_return_value_and_says_what_is_missing():
    model = small()
    with pytest.warns(UserWarning, match="total_steps"):
        dstlib.sparsify(model, sparsity=0.8)
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.ndim > 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 5)
    for name, parameter in model.named_parameters():
        if name in zeros:
            assert torch.equal(parameter == 0, zeros[name]), f"{name} came back to life"


def test_sparsity_zero_changes_no_bit():
    dense, sparse = small(), small()
    optimizers = [torch.optim.Adagrad(m.parameters(), lr=0.1, initial_accumulator_value=0.1) for m in (dense, sparse)]
    sparsifier = dstlib.sparsify(sparse, optimizers[1], sparsity=0.0, method=replace(RIGL, interval=2), total_steps=10)
    assert train(dense, optimizers[0], 10) == train(sparse, optimizers[1], 10)
    assert_same(dense.state_dict(), sparse.state_dict())
    assert_same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])
    assert sparsifier.density == 1


def test_kept_weights_and_state_keep_their_bits_and_the_others_become_zero():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(RIGL, interval=3), total_steps=12)
    train(model, optimizer, 2)
    parameter = model.up.weight
    old, weight = sparsifier.masks["up.weight"].clone(), parameter.detach().clone()
    backward(model, 2)
    sparsifier.before_step()
    new = sparsifier.masks["up.weight"]
    kept, grown, dropped = old & new, new & ~old, old & ~new
    assert grown.any()
    assert dropped.any()
    assert torch.equal(parameter[kept], weight[kept])
    assert (parameter[grown] == 0).all()
    assert (parameter[dropped] == 0).all()
    momentum = optimizer.state[parameter]["momentum_buffer"]
    assert (momentum[kept] != 0).any()
    assert (momentum[~kept] == 0).all()


def test_an_averaged_model_is_masked_when_it_is_read():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=replace(RIGL, interval=2), total_steps=40)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(10):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
    density = sum(int((average.module.get_parameter(n) != 0).sum()) for n in sparsifier.masks)
    active = sum(int(m.sum()) for m in sparsifier.masks.values())
    assert density > active, "the trap: an average under moving masks is denser than the model"
    inside = average.module.up.weight[sparsifier.masks["up.weight"]].clone()
    sparsifier.mask_model(average)
    assert_zero_outside(average.module, sparsifier.masks)
    assert torch.equal(inside, average.module.up.weight[sparsifier.masks["up.weight"]])
    with pytest.raises(StateError, match=r"model of mask_model\(\): expected a weight conv\.weight of shape"):
        sparsifier.mask_model(nn.Linear(2, 2))


def test_gmp_reaches_its_sparsity_exactly_and_only_shrinks():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=0.75, method=replace(dstlib.GMP, interval=4), total_steps=40
    )
    assert sparsifier.density == 1
    previous = {n: m.clone() for n, m in sparsifier.masks.items()}
    for step in range(40):
        train(model, optimizer, 1, start=step)
        for name, mask in sparsifier.masks.items():
            assert not (mask & ~previous[name]).any(), "GMP never grows"
            previous[name] = mask.clone()
    assert {n: int(m.sum()) for n, m in sparsifier.masks.items()} == {
        "conv.weight": 18,  # a quarter of 4·2·3·3 = 72
        "up.weight": 24,  # of 4·6·2·2 = 96
        "head.weight": 5,  # of 3·6 = 18, halves up
    }


def test_freeze_fixes_the_topology_and_detach_ends_the_masking():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=replace(RIGL, interval=1), total_steps=40)
    train(model, optimizer, 2)
    sparsifier.freeze()
    frozen = {n: m.clone() for n, m in sparsifier.masks.items()}
    train(model, optimizer, 5)
    assert_same(frozen, sparsifier.masks)
    assert_zero_outside(model, sparsifier.masks, optimizer)
    sparsifier.detach()
    train(model, optimizer, 1)
    assert (model.conv.weight[~frozen["conv.weight"]] != 0).any()
    assert sparsifier.step == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dstlib.sparsify(model, sparsity=0.5, method="static")


def test_method_presets_train():
    for name in dstlib.METHODS:
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = dstlib.METHODS[name]
        if method.interval is not None:
            method = replace(method, interval=5)
        include = ["up"] if isinstance(method.granularity, NM) else ["conv", "up"]  # conv has but two inputs
        sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=method, total_steps=20, include=include)
        train(model, optimizer, 20)
        # under dense storage the optimizer's state lives on where hidden weights learn
        assert_zero_outside(model, sparsifier.masks, *([] if method.storage else [optimizer]))
        assert abs(sparsifier.density - 0.5) < 0.07, f"{name}: 17 kernels of 32 is the coarsest rounding here"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 80], ids=["small", "large"])
def test_zeros_follow_masks_that_change_and_memory_that_is_exchanged(dtype, size):
    """Masks are kept as integers beside the weights, and states as integers of their bits."""
    model = nn.Linear(size, size, bias=False, dtype=dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=replace(RIGL, interval=1), total_steps=40)
    before = sparsifier.masks["weight"].clone()
    for step in range(6):
        x = torch.randn(4, size, dtype=dtype, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        assert_zero_outside(model, sparsifier.masks, optimizer)
        if step == 3:
            model.weight.data = model.weight.data.clone()
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[model.weight][name].data = optimizer.state[model.weight][name] + 1.0
    assert not torch.equal(before, sparsifier.masks["weight"])

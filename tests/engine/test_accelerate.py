"""Accelerated models beside the plain ones; what runs fast is decided here, not measured."""

import copy
import importlib
import json
from collections import UserDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor, nn

import dstlib
from dstlib.engine import Decision, Decisions, SparseLinear, accelerate
from dstlib.engine.decisions import Tries
from dstlib.engine.layers.conv import FastConv, FastConv3d
from dstlib.engine.layers.fast_layer import FastLayer, give_out
from dstlib.engine.layers.feature_map import Pending, feature_map
from dstlib.engine.layers.fusion_node import FastFusionNode
from dstlib.engine.layers.unit import FastUnit, make_unit
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.registry import obstacle
from dstlib.errors import SelectionError, SettingError, StateError
from dstlib.inputs import arguments, tensors_in
from dstlib.layers import LearnedShift, Shift, ShiftedConv3d, Unit
from dstlib.targets import outside
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

MODULE = importlib.import_module("dstlib.engine.accelerate")  # the package has the function under this name
SMALL = E2ENetConfig(channels=(8, 16, 24), strides=((2, 2, 2),) * 2, heads=2, num_classes=3)


def _forced(model: nn.Module, *, fast: bool = True) -> Decisions:
    """Decisions for the engine wherever it can, or against it."""
    return Decisions.of(
        Decision(name, type(layer).__name__, *((None, None) if obstacle(layer) else (2.0, 1.0 if fast else 3.0)), None)
        for name, layer in MODULE._candidates(model)
    )


def _images(seed: int = 0, *, batch: int = 1) -> Tensor:
    return torch.randn(batch, 1, 8, 16, 16, generator=torch.Generator().manual_seed(seed))


def _sparse(*, interval: int = 5, seed: int = 0, method: Any = None) -> tuple[E2ENet, dstlib.Sparsifier]:
    torch.manual_seed(seed)
    network = E2ENet(SMALL)
    method = method or replace(dstlib.DSFF, interval=interval)
    return network, dstlib.sparsify(network, sparsity=0.7, method=method, total_steps=100, include=E2ENet.FUSION)


def _assert_close(got: Any, expected: Any, share: float = 1e-4) -> None:
    """Within a share of the largest: float32 rounds by 6e-8, and a dozen layers multiply that by about 10 each."""
    if isinstance(expected, tuple):
        assert type(got) is tuple
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            _assert_close(one, other, share)
    else:
        assert got.shape == expected.shape
        torch.testing.assert_close(got + 0, expected, rtol=0, atol=share * expected.abs().max().item() + 1e-12)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("supervised", [True, False], ids=["deep supervision", "one head"])
def test_e2enet_gives_the_same(mode: str, supervised: bool):
    network, sparsifier = _sparse()
    network.train(mode == "train").deep_supervision = supervised
    fast = accelerate(network, _images(), masks=sparsifier.masks, decisions=_forced(network))
    kinds = {type(module) for module in fast.modules()}
    assert {FastFusionNode, FastUnit, FastConv3d} <= kinds
    assert type(fast) is E2ENet
    assert fast.training == network.training
    for batch in (1, 2):
        x = _images(1, batch=batch)
        _assert_close(fast(x), network(x))
        with torch.no_grad():
            _assert_close(fast(x), network(x))


def test_where_the_plain_layer_was_faster_it_stays():
    network, _ = _sparse()
    fast = accelerate(network, _images(), decisions=_forced(network, fast=False))
    assert [type(m) for m in fast.modules()] == [type(m) for m in network.modules()]
    _assert_close(fast(_images()), network(_images()), share=0)


def test_parameters_are_shared_and_states_exchanged():
    network, _ = _sparse()
    before = [type(m) for m in network.modules()]
    fast = accelerate(network, _images(), decisions=_forced(network))
    assert [type(m) for m in network.modules()] == before
    assert list(fast.state_dict()) == list(network.state_dict())
    ours, theirs = dict(fast.named_parameters()), dict(network.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
    other = E2ENet(SMALL)
    other.load_state_dict(fast.state_dict())
    _assert_close(other(_images()), fast(_images()))
    fresh = E2ENet(SMALL)
    fast.load_state_dict(fresh.state_dict())  # without masks the zeros of the new weights are followed
    _assert_close(fast(_images()), fresh(_images()))
    with torch.no_grad():
        _assert_close(fast(_images()), fresh(_images()))


def _train(model: nn.Module, network: nn.Module, steps: int) -> Iterator[float]:
    """Losses of steps of SGD; ``network`` has the parameters."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    for step in range(steps):
        finest, coarse = model(_images(step))
        loss = (finest - 1).square().mean() + coarse.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize(("method", "close"), [("DSFF", 1e-3), ("RIGL", 3e-2)])
def test_training_follows_the_masks(method: str, close: float):
    """Random growth, and growth by the gradients of what is not active.

    Rounding grows slowly with the steps. Two kernels whose gradients differ by less than it may be chosen the other way
    round by RigL, which moves the loss by 1 %; masks that differ in many kernels move it by 14 %.
    """
    chosen = replace(getattr(dstlib, method), interval=5, granularity=dstlib.DSFF.granularity)
    plain, _ = _sparse(method=chosen)
    expected = list(_train(plain, plain, 30))
    network, sparsifier = _sparse(method=chosen)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    fast = sparsifier.accelerate(network, _images(), decisions=_forced(network))
    losses = list(_train(fast, network, 30))
    assert losses[:10] == pytest.approx(expected[:10], rel=1e-3)
    assert losses[:20] == pytest.approx(expected[:20], rel=close)
    assert losses == pytest.approx(expected, rel=max(close, 1e-2))
    assert any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks.items())
    parameters = dict(network.named_parameters())
    assert all(not parameters[name][~mask].any() for name, mask in sparsifier.masks.items())
    _assert_close(fast(_images()), network(_images()))


@pytest.mark.long
def test_two_hundred_steps_lose_the_same():
    chosen = replace(dstlib.DSFF, interval=20)
    plain, _ = _sparse(method=chosen)
    expected = list(_train(plain, plain, 200))
    network, sparsifier = _sparse(method=chosen)
    fast = sparsifier.accelerate(network, _images(), decisions=_forced(network))
    # with another order of sums, as of channels last, torch itself drifts by up to about this much
    assert list(_train(fast, network, 200)) == pytest.approx(expected, rel=1e-2)


def test_a_step_gives_the_gradients_of_active_weights():
    network, sparsifier = _sparse()
    plain = copy.deepcopy(network)
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    fast = accelerate(network, _images(), masks=masks, decisions=_forced(network))
    for model in (fast, plain):
        sum(y.square().mean() for y in model(_images())).backward()
    for name, parameter in plain.named_parameters():
        got, kept = network.get_parameter(name).grad, parameter.grad * masks.get(name, True)
        if name.endswith("conv.bias"):
            continue  # zero but for rounding, as a norm follows
        _assert_close(got, kept, share=1e-3)
        if name in masks:
            assert not got[~masks[name]].any()


@pytest.mark.parametrize("wanted", ["without masks", "dense gradient"])
def test_a_step_gives_all_gradients(wanted: str):
    network, sparsifier = _sparse()
    plain = copy.deepcopy(network)
    asked: dict[str, Any] = {}
    if wanted == "dense gradient":
        asked = {"masks": sparsifier.masks, "dense_gradient": lambda name: name.startswith("fusion.")}
    fast = accelerate(network, _images(), decisions=_forced(network), **asked)
    for model in (fast, plain):
        sum(y.square().mean() for y in model(_images())).backward()
    for name, parameter in plain.named_parameters():
        if not name.endswith("conv.bias"):
            _assert_close(network.get_parameter(name).grad, parameter.grad, share=1e-3)


def test_without_masks_weights_zeroed_in_place_are_followed():
    network, _ = _sparse()
    fast = accelerate(network, _images(), decisions=_forced(network)).eval()
    unit = fast.get_submodule("fusion.stage1_level1.units.0")
    with torch.no_grad():
        fast(_images())
        before = unit.active.num_active
        network.get_parameter("fusion.stage1_level1.units.0.conv.weight")[:4] = 0
        _assert_close(fast(_images()), network.eval()(_images()))
        assert unit.active.num_active < before
        network.get_parameter("fusion.stage1_level1.units.0.conv.weight")[:2] = 1
        _assert_close(fast(_images()), network(_images()))


CNN = (
    lambda: nn.Conv2d(3, 8, 3, padding=1),
    nn.ReLU,
    lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
    lambda: nn.BatchNorm2d(8),
    lambda: nn.Conv2d(8, 6, 1),
    nn.Flatten,
    lambda: nn.Linear(6 * 5 * 5, 4),
)


def _networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    return {
        "cnn": (nn.Sequential(*(make() for make in CNN)), torch.randn(4, 3, 9, 9)),
        "mlp": (mlp, torch.randn(7, 20)),
    }


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_other_networks_too(name: str):
    model, x = _networks()[name]
    dstlib.sparsify(model, sparsity=0.5, method="static").detach()
    plain = copy.deepcopy(model)
    fast = accelerate(model, x, decisions=_forced(model))
    assert sum(isinstance(m, FastConv | SparseLinear) for m in fast.modules()) == {"cnn": 4, "mlp": 2}[name]
    for _ in range(3):
        for network in (fast, plain):
            network(x).square().sum().backward()
        _assert_close(fast(x), plain(x))
    for key, parameter in plain.named_parameters():
        _assert_close(model.get_parameter(key).grad, parameter.grad, share=1e-3)
    for key, buffer in plain.named_buffers():
        assert torch.allclose(model.get_buffer(key), buffer, atol=1e-5)
    _assert_close(fast.eval()(x), plain.eval()(x))


def _batch() -> Unit:
    unit = Unit(4, 4, kernel_size=(1, 3, 3))
    unit.norm = nn.BatchNorm3d(4)
    return unit


FLAT = {"kernel_size": (1, 3, 3)}
OBSTACLES = {
    "groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), "groups"),
    "dilation": (lambda: nn.Conv2d(4, 4, 3, padding=1, dilation=2), "dilation"),
    "padding mode": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding other than zeros"),
    "kernel": (lambda: nn.Conv2d(4, 4, 5, padding=2), r"kernel is \(5, 5\)"),
    "deep kernel": (lambda: nn.Conv3d(4, 4, 3, padding=1), r"kernel is \(3, 3, 3\)"),
    "subclass": (lambda: ShiftedConv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), sizes=(1,)), "ShiftedConv3d"),
    "padding": (lambda: nn.Conv2d(4, 4, 3), "padding is not half"),
    "learned shift": (lambda: Unit(4, 4, shift=LearnedShift((-1, 1), axis=2), **FLAT), "shift is learned"),
    "other axis": (lambda: Unit(4, 4, shift=Shift((-1, 1), axis=3), **FLAT), "not along depth"),
    "batch norm": (_batch, "not an affine instance norm"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_are_named(name: str):
    make, reason = OBSTACLES[name]
    layer = make()
    pattern = pytest.raises(AssertionError, match=reason)
    with pattern:
        raise AssertionError(obstacle(layer))
    is_flat = isinstance(layer, nn.Conv2d)
    model, x = nn.Sequential(layer), torch.randn(2, 4, *(() if is_flat else (5,)), 8, 8)
    fast = accelerate(model, x)
    assert type(fast[0]) is type(layer)
    assert fast.decisions["0"].obstacle == obstacle(layer)
    assert "plain: " in str(fast.decisions["0"])
    _assert_close(fast(x), model(x))


def test_decisions_are_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, x = _networks()["mlp"]
    taken = accelerate(model, x).decisions
    taken.save(tmp_path / "decisions.json")
    loaded = Decisions.load(tmp_path / "decisions.json")
    assert loaded == taken
    saved = (tmp_path / "decisions.json").read_text()
    (tmp_path / "decisions.json").write_text(saved.replace('_ms": ', '_ms": 1'))
    with pytest.raises(StateError, match=r"crc32 of .*it was changed since it was written"):
        Decisions.load(tmp_path / "decisions.json")
    monkeypatch.setattr(MODULE, "_measure", lambda *_: pytest.fail("measured again"))
    again = accelerate(model, x, decisions=loaded)
    assert again.decisions == taken
    assert [isinstance(again[i], SparseLinear) for i in (0, 2)] == [taken[str(i)].is_fast for i in (0, 2)]
    with pytest.raises(SettingError, match=r"decisions of accelerate\(\): expected those of this model"):
        accelerate(_networks()["cnn"][0], _networks()["cnn"][1], decisions=loaded)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"machine": "a", "rows": [{"name": "b"}]}', "[" * 100_000])
def test_other_files_are_not_decisions(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "decisions.json").write_text(text)
    with pytest.raises(StateError, match=r"decisions\.json.*Measure anew, and save the decisions\."):
        Decisions.load(tmp_path / "decisions.json")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"plain_ms": "a", "fast_ms": "b"}, r"rows\[1\].plain_ms of .*: expected a number or null, got 'a'"),
        ({"plain_ms": "a"}, r"rows\[1\].plain_ms of .*: expected a number or null, got 'a'"),
        ({"plain_ms": True}, r"rows\[1\].plain_ms of .*: expected a number or null, got True"),
        ({"fast_ms": 0}, r"rows\[1\] of .*times of decision 'b': expected two, finite and above 0.*got \(2.0, 0.0\)"),
        ({"fast_ms": -1.5}, r"rows\[1\] of .*times of decision 'b'.*got \(2.0, -1.5\)"),
        ({"fast_ms": float("nan")}, r"rows\[1\].fast_ms of .*: expected a finite number"),
        ({"fast_ms": None}, r"rows\[1\] of .*times of decision 'b'"),
        ({"obstacle": "none"}, r"rows\[1\] of .*times of decision 'b'.*and the obstacle 'none'"),
        ({"name": 5, "kind": []}, r"rows\[1\].name of .*: expected text, got 5"),
        ({"name": "a"}, r"decisions of a model: expected one a layer, got \['a'\]"),
        ({"is_fast": True}, r"rows\[1\].is_fast of .*: expected none but name, kind"),
        ({"spread": 0.5}, r"rows\[1\] of .*spread and share of products of decision 'b': expected 1 or more"),
        ({"active": 1.5}, r"rows\[1\] of .*spread and share of products of decision 'b'.*got \(1.0, 1.5\)"),
    ],
)
def test_decisions_that_nobody_took_are_refused(tmp_path: Path, changed: dict[str, object], text: str):
    rows = [asdict(Decision(name, "Linear", 2.0, 1.0, None)) for name in ("a", "b")]
    rows[1].update(changed)
    (tmp_path / "decisions.json").write_text(json.dumps({"busy": False, "machine": "any", "rows": rows}))
    with pytest.raises(StateError, match=text) as refused:
        Decisions.load(tmp_path / "decisions.json")
    assert str(refused.value).count("Measure anew") == 1  # a remedy once


def test_decisions_print_nothing_that_a_terminal_obeys():
    text = str(Decisions((Decision("\x1b[2J", "a\nb", None, None, "\x07"),), "any"))
    assert len(text.split("\n")) == 2
    assert text.replace("\n", "").isprintable()


def test_decisions_print_as_a_table():
    rows = [
        Decision("a", "Unit", 3.0, 1.5, None),
        Decision("b", "Conv2d", 1.0, 2.0, None),
        Decision("c", "Conv2d", None, None, "its kernel is (5, 5)"),
        Decision("d", "Linear", None, None, None),
        Decision("e", "Linear", 1.0, 2.0, None, spread=3.456, active=0.1),
        Decision("f", "Linear", 1.0, 1.0, None, spread=1.2),
    ]
    decisions = Decisions.of(rows)
    lines = str(decisions).splitlines()
    assert [row.is_fast for row in rows] == [True, False, False, False, True, True]
    assert lines[0].endswith("  ± 0 %   2.00× engine")
    assert lines[1].endswith("  ± 0 %   0.50× plain")
    assert lines[2].endswith("plain: its kernel is (5, 5)")
    assert lines[3].endswith("plain: the example did not reach it")
    assert lines[4].endswith("± 246 %   0.50× engine: 10% of the products")
    assert lines[5].endswith(" ± 20 %   1.00× engine: a tie")
    assert lines[6] == str(dstlib.engine.info())
    crowded = str(Decisions.of(rows, busy=True)).splitlines()
    assert crowded[6].startswith("Others took the cores meanwhile")
    assert (crowded[:6], crowded[7]) == (lines[:6], lines[6])


@pytest.mark.parametrize(
    ("plain", "fast", "active", "is_fast", "spread"),
    [
        ([4.0, 4.1, 4.2], [1.0, 1.1, 1.0], 1.0, True, 1.025),
        ([4.0, 4.1, 9.0], [5.0, 5.1, 5.0], 0.1, False, 1.025),  # clearly slower, whatever was saved
        ([4.0, 9.0, 8.0], [5.0, 5.1, 5.0], 0.1, True, 2.0),  # within what others made of it
        ([4.0, 9.0, 8.0], [5.0, 5.1, 5.0], 0.5, False, 2.0),  # but half of the products is no reason
        ([4.0, 9.0, 8.0], [8.0, 8.0, 8.0], 0.1, False, 2.0),
        ([4.0, 9.0, 8.0], [4.3, 4.4, 4.4], 1.0, True, 2.0),  # a tie
        ([4.0, 4.1, 4.2], [4.3, 4.4, 4.4], 1.0, False, 1.025),
        ([4.0, 80.0, 4.0], [3.0, 90.0, 90.0], 0.9, True, 30.0),  # the least counts
        ([4.0], [3.0], 0.9, True, 1.0),
    ],
)
def test_the_least_of_the_tries_decides_or_the_products(
    plain: list[float], fast: list[float], active: float, is_fast: bool, spread: float
):
    decision = Decision.of("a", "Linear", Tries(plain, fast), active)
    assert (decision.plain_ms, decision.fast_ms) == (min(plain), min(fast))
    assert decision.spread == pytest.approx(spread)
    assert decision.is_fast is is_fast


def test_no_try_is_no_decision():
    assert Decision.of("a", "Linear", Tries([], []), 0.1) == Decision("a", "Linear", None, None, None)


_TIMES = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=20)


@given(_TIMES, _TIMES, st.floats(0, 1), st.randoms(use_true_random=False))
def test_whatever_was_measured_the_choice_is_sound(plain: list[float], fast: list[float], active: float, chance: Any):
    decision = Decision.of("a", "Linear", Tries(plain, fast), active)
    if min(fast) < min(plain):
        assert decision.is_fast  # never left plain where the least gains
    elif decision.is_fast:
        assert active <= 1 / 3 or min(fast) < min(plain) * 1.1
        assert min(fast) < min(plain) * decision.spread  # never on the engine against a clear measurement
    # others that lengthen some tries never turn the engine down, as long as one of it is left
    slower = [*fast, *(ms * 7 for ms in fast)]
    chance.shuffle(slower)
    assert Decision.of("a", "Linear", Tries(plain, slower), active).is_fast >= decision.is_fast
    # and the order of the tries tells nothing
    assert Decision.of("a", "Linear", Tries(plain[::-1], fast[::-1]), active) == decision


@pytest.mark.parametrize("takes_cores", [False, True])
def test_where_others_take_the_cores_one_thread_is_timed(takes_cores: bool, monkeypatch: pytest.MonkeyPatch):
    model, x = _networks()["mlp"]
    threads: list[int] = []
    model[0].register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
    monkeypatch.setattr(MODULE, "watch_crowd", lambda: lambda: takes_cores)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fast = accelerate(model, x)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert fast.decisions.busy is takes_cores
    assert set(threads) == {1 if takes_cores else 2}
    assert 4 <= len(threads) <= 21  # the first warms up
    rows = fast.decisions.values()
    assert all(row.plain_ms and row.fast_ms and row.spread >= 1 and row.active == 1 for row in rows)


def test_the_products_of_a_layer_are_those_of_its_weights_that_are_not_zero():
    layer = nn.Linear(10, 4)
    with torch.no_grad():
        layer.weight.fill_(1)[:, 1:] = 0
    assert MODULE._active(layer) == 0.1
    assert MODULE._active(nn.Sequential(layer, nn.Linear(4, 10, bias=False))) == 0.55
    assert MODULE._active(nn.BatchNorm2d(3)) == 1


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x))
        return y


def test_calls_of_a_pass_are_timed_together(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]

    def clock() -> float:  # each time it is asked, a second has passed
        now[0] += 1
        return now[0]

    model = _Twice()
    fast = copy.deepcopy(model)
    tries = MODULE._tries(fast, {"layer": model.layer}, torch.randn(2, 8), clock, lambda: False)
    assert set(tries["layer"].plain) == set(tries["layer"].fast) == {2000.0}


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x)
        return y


def test_a_layer_that_the_example_does_not_reach_stays():
    model = _Branching()
    fast = accelerate(model, torch.randn(2, 6))
    assert type(fast.unused) is nn.Linear
    assert "did not reach" in str(fast.decisions["unused"])


def test_measuring_leaves_no_trace():
    model, x = _networks()["cnn"]
    model.train()
    model[4].eval()  # a part that is frozen
    state = copy.deepcopy(model.state_dict())
    fast = accelerate(model, x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [
        not isinstance(m, nn.Conv2d) or m is not model[4] for m in model.modules()
    ]
    hooks = [hook for m in [*model.modules(), *fast.modules()] for hook in m._forward_hooks.values()]
    assert hooks in ([], [give_out])  # where a layer came out faster, the outputs of the whole are plain tensors
    assert all(p.grad is None for p in model.parameters())


def test_layers_made_in_inference_mode_stay_plain():
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Linear(9, 4)), torch.randn(2, 8, 9, 9)
        fast = accelerate(model, x)
        assert ["inference mode" in row.obstacle for row in fast.decisions.values()] == [True, True]
        assert torch.equal(fast(x), model(x))


def test_a_copy_of_what_has_run_begins_anew():
    (network, _), x = _sparse(), _images()
    fast = accelerate(network, x, decisions=_forced(network))
    with torch.no_grad():
        expected = fast(x)
        again = copy.deepcopy(fast)
        for parameter in fast.parameters():
            parameter.zero_()
        _assert_close(again(x), expected)
        assert all(not out.any() for out in fast(x))


def _pending() -> tuple[Tensor, Tensor]:
    """A map whose norm is to be applied, and its values."""
    x = torch.randn(2, 3, 5, 4, 4)
    scale, offset = torch.rand(2, 3) + 0.5, torch.randn(2, 3)
    y = scale[:, :, None, None, None] * x + offset[:, :, None, None, None]
    return Pending.of(FeatureMap(x, (scale, offset, 0.01))), torch.maximum(y, 0.01 * y)


@pytest.mark.parametrize(
    "operation",
    [
        lambda z: z + 1,
        lambda z: torch.cat([z, z], dim=1),
        lambda z: z.mean((2, 3, 4)),
        lambda z: nn.functional.max_pool3d(z, 2),
        lambda z: z[:, 1:],
        lambda z: z.T if z.ndim == 2 else z.flatten(1),
    ],
    ids=["add", "cat", "mean", "pool", "index", "flatten"],
)
def test_any_other_operation_sees_the_values(operation: Any):
    pending, values = _pending()
    result = operation(pending)
    assert type(result) is Tensor
    torch.testing.assert_close(result, operation(values))


@pytest.mark.parametrize("about", ["shape", "ndim", "dtype", "device", "requires_grad", "layout"])
def test_what_is_asked_about_a_pending_map_writes_nothing(about: str, monkeypatch: pytest.MonkeyPatch):
    pending, values = _pending()

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("written out")

    monkeypatch.setattr("dstlib.engine.layers.feature_map.written_out", refuse)
    assert getattr(pending, about) == getattr(values, about)
    with pytest.raises(AssertionError, match="written out"):
        pending + 0


def test_gradients_pass_through_foreign_operations():
    unit = Unit(3, 4, kernel_size=(1, 3, 3))
    plain = copy.deepcopy(unit)
    x = torch.randn(2, 3, 5, 6, 6, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    pending = make_unit(copy.deepcopy(unit, {id(p): p for p in unit.parameters()}))(x)
    assert isinstance(pending, Pending)
    assert pending.shape == (2, 4, 5, 6, 6)
    assert pending.requires_grad
    assert feature_map(pending) is pending.feature_map
    assert pending.feature_map.norm is not None
    for z in (pending, plain(again)):
        (torch.sin(z) * z).sum().backward()
    _assert_close(x.grad, again.grad, share=1e-3)
    _assert_close(unit.norm.weight.grad, plain.norm.weight.grad, share=1e-3)


class _Conditioned(nn.Module):
    """Takes an image and what else by name, calls its layers by name too, and returns a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Embedding(5, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, label: Tensor, *, scale: float | None = None) -> dict[str, Any]:
        features = self.stem(input=image).mean((-1, -2)) + self.table(label)
        return {"logits": self.head(input=features) * (scale or 1.0), "parts": (features, None)}


@pytest.mark.parametrize("by_name", [True, False], ids=["a mapping", "a tuple"])
def test_any_inputs_and_outputs(by_name: bool):
    torch.manual_seed(0)
    model, image, label = _Conditioned(), torch.randn(2, 3, 6, 6), torch.tensor([1, 4])
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    example = UserDict(image=image, label=label, scale=2.0) if by_name else (image, label)
    args, kwargs = arguments(example)
    fast = sparsifier.accelerate(model, example)  # measured
    assert {row.name for row in fast.decisions.values() if row.plain_ms} == {"stem", "head"}
    fast = sparsifier.accelerate(model, example, decisions=_forced(model))
    assert sum(isinstance(m, FastConv | SparseLinear) for m in fast.modules()) == 2
    got, expected = fast(*args, **kwargs), model(*args, **kwargs)
    assert got.keys() == expected.keys()
    assert got["parts"][1] is None
    for one, other in zip(tensors_in(got), tensors_in(expected), strict=True):
        _assert_close(one, other)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv2d, (3, 6, 6)), (nn.Conv3d, (3, 3, 6, 6))])
def test_one_sample_without_a_batch(kind: Any, shape: tuple[int, ...]):
    flat = (1, 3, 3) if kind is nn.Conv3d else 3
    model = nn.Sequential(kind(3, 3, flat, padding=(0, 1, 1) if kind is nn.Conv3d else 1))
    fast, x = accelerate(model, torch.randn(1, *shape), decisions=_forced(model)), torch.randn(shape)
    assert isinstance(fast[0], FastConv)
    _assert_close(fast(x), model(x))
    _assert_close(fast(x[None]), model(x[None]))


REFUSED = (
    r"accelerate\(\): expected zeros outside their masks, got {:,} that are not zero, in .*load_state_dict\(state\)"
)


def _two_layers() -> tuple[nn.Module, dstlib.Sparsifier, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), torch.randn(7, 20)
    method = replace(dstlib.RIGL, interval=3)
    return model, dstlib.sparsify(model, sparsity=0.8, method=method, total_steps=100), x


def _steps(model: nn.Module, x: Tensor, number: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(number):
        optimizer.zero_grad()
        (model(x) - x[:, :5]).square().mean().backward()
        optimizer.step()


def _num_outside(model: nn.Module, sparsifier: dstlib.Sparsifier) -> int:
    parameters = dict(model.named_parameters())
    return sum(int((parameters[name][~mask] != 0).sum()) for name, mask in sparsifier.masks.items())


@pytest.mark.parametrize("records", [True, False], ids=["recorded", "not recorded"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_weights_that_came_without_their_masks_are_refused(records: bool, training: bool):
    """A best model, put back before or after it is accelerated: its own state makes it right, and erases nothing."""
    model, sparsifier, x = _two_layers()
    model.train(training)
    fast = sparsifier.accelerate(model, x, decisions=_forced(model))
    with torch.set_grad_enabled(records):
        fast(x)
    best, state = copy.deepcopy(model.state_dict()), sparsifier.state_dict()
    _steps(model, x, 20)
    model.load_state_dict(best)
    expected, num = model(x), _num_outside(model, sparsifier)
    assert num
    pattern = REFUSED.format(num)
    with pytest.raises(StateError, match=pattern):
        sparsifier.accelerate(model, x, decisions=_forced(model))
    with pytest.raises(StateError, match=pattern):
        accelerate(model, x, masks=sparsifier.masks, decisions=_forced(model))
    with torch.set_grad_enabled(records):
        for _ in range(2):  # it does not pass a second time
            with pytest.raises(StateError, match=pattern):
                fast(x)
        sparsifier.load_state_dict(state)
        assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
        _assert_close(fast(x), expected)
        _assert_close(sparsifier.accelerate(model, x, decisions=_forced(model))(x), expected)


def test_an_average_is_refused_until_it_is_cut_to_the_masks():
    model, sparsifier, x = _two_layers()
    average = torch.optim.swa_utils.AveragedModel(model)
    fast = sparsifier.accelerate(model, x, decisions=_forced(model))
    for _ in range(4):
        _steps(fast, x, 5)
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    with pytest.raises(StateError, match=REFUSED.format(_num_outside(model, sparsifier))):
        fast(x)
    sparsifier.mask_model(average)
    model.load_state_dict(average.module.state_dict())
    _assert_close(fast(x), average(x))
    without = accelerate(model, x, decisions=_forced(model))
    _assert_close(without(x), average(x))


def test_what_is_written_unseen_is_noticed_when_training_ends():
    model, sparsifier, x = _two_layers()
    fast = sparsifier.accelerate(model, x, decisions=_forced(model))
    fast(x)
    model[0].weight.data.fill_(1.0)  # as averages are swapped in by some; this has no version
    fast.eval()
    with torch.no_grad(), pytest.raises(StateError, match=REFUSED.format(_num_outside(model, sparsifier))):
        fast(x)


def test_it_is_counted_once_for_each_change(monkeypatch: pytest.MonkeyPatch):
    model, sparsifier, x = _two_layers()
    fast, counted = accelerate(model, x, masks=sparsifier.masks, decisions=_forced(model)).eval(), []
    count = outside.count_outside
    monkeypatch.setattr(outside, "count_outside", lambda x, mask: counted.append(mask) or count(x, mask))
    with torch.no_grad():
        for _ in range(3):
            fast(x)  # the first is the first in evaluation
        assert len(counted) == 2
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        for _ in range(3):
            fast(x)
    assert len(counted) == 4


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
def test_values_that_are_written_unseen_are_read_when_training_ends(masked: bool):
    """Of linear layers, which gather them, and of convolutions, which transform them."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 4)), torch.randn(2, 8, 8, 8)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    fast = (sparsifier.accelerate if masked else accelerate)(model, x, decisions=_forced(model))
    with torch.no_grad():
        fast.eval()(x)
        for parameter in model.parameters():
            parameter.data.mul_(-2.0)
        _assert_close(fast.train().eval()(x), model.eval()(x))


EVENTS = ("step", "best", "best and state", "average", "cut average", "assign", "written unseen", "poke", "copy")


@given(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=6), st.booleans(), st.booleans())
@examples(20, 60)
@pytest.mark.filterwarnings("ignore:step")  # which says what becomes of weights without their masks
def test_whatever_happens_it_computes_the_model_or_refuses(events: list[str], records: bool, with_masks: bool):
    model, sparsifier, x = _two_layers()
    fast = sparsifier.accelerate(model, x, decisions=_forced(model))
    if not with_masks:
        fast = accelerate(model, x, decisions=_forced(model))
    best, state = copy.deepcopy(model.state_dict()), sparsifier.state_dict()
    average = torch.optim.swa_utils.AveragedModel(model)
    for event in events:
        match event:
            case "step":
                with suppress(StateError):  # of parameters that are gone
                    _steps(model, x, 2)  # an update at each third
                average.update_parameters(model)
            case "best" | "assign":
                model.load_state_dict(best, assign=event == "assign")
                best = copy.deepcopy(best)
            case "best and state":
                model.load_state_dict(best)
                with suppress(StateError):
                    sparsifier.load_state_dict(state)
            case "average" | "cut average":
                if event == "cut average":
                    sparsifier.mask_model(average)
                model.load_state_dict(average.module.state_dict())
            case "written unseen":
                model[0].weight.data.add_(1.0)
                model.train(not fast.training)
                fast.train(not fast.training)
            case "poke":
                with torch.no_grad():
                    model[2].weight.view(-1)[3] += 1.0
            case "copy":
                fast = copy.deepcopy(fast)
                fast.load_state_dict(model.state_dict())
        with torch.set_grad_enabled(records):
            try:
                got = fast(x)
            except StateError:
                assert with_masks or "assign" in events
                continue
            _assert_close(got, model(x))
        if event == "copy":  # which has parameters of its own, so that it no longer follows the model
            return


def test_a_training_counts_nothing(monkeypatch: pytest.MonkeyPatch):
    model, sparsifier, x = _two_layers()
    fast = sparsifier.accelerate(model, x, decisions=_forced(model))
    _steps(fast, x, 1)
    monkeypatch.setattr(outside, "count_outside", lambda *_: pytest.fail("counted"))
    _steps(fast, x, 7)
    with torch.no_grad():
        fast(x)


@pytest.mark.parametrize("change", ["assigned", "replaced"])
def test_a_model_that_got_other_parameters_is_refused(change: str):
    model, sparsifier, x = _two_layers()
    fast = sparsifier.accelerate(model, x, decisions=_forced(model))
    if change == "assigned":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(StateError, match=r"that it was accelerated with, got another '\d\.weight'"):
        fast(x)


def test_masks_of_another_model_are_refused():
    model, x = _networks()["mlp"]
    for masks, got in (
        ({"fc.weight": torch.ones(30, 20, dtype=torch.bool)}, "got 'fc.weight'"),
        ({"0.weight": torch.ones(20, 30, dtype=torch.bool)}, r"expected shape \(30, 20\), got \(20, 30\)"),
    ):
        with pytest.raises(SelectionError, match=got):
            accelerate(model, x, masks=masks)


def test_a_copy_follows_its_own_weights():
    model, sparsifier, x = _two_layers()
    fast = sparsifier.accelerate(model, x, decisions=_forced(model)).eval()
    without = accelerate(model, x, decisions=_forced(model)).eval()
    dense = copy.deepcopy(model).eval()
    with torch.no_grad():
        without(x)
        again, alone = copy.deepcopy(fast), copy.deepcopy(without)
        dense[0].weight.fill_(1.0)
        again.load_state_dict(dense.state_dict())
        alone.load_state_dict(dense.state_dict())
        _assert_close(alone(x), dense(x))
        _assert_close(again(x), dense(x))  # masks do not travel
        _assert_close(fast(x), model(x))
        _assert_close(without(x), model(x))
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        again.load_state_dict(fast.state_dict())
        _assert_close(again(x), model(x))  # a copy has parameters of its own, whatever became of the model's


class _Projection(nn.Module):
    """A product with a transposed weight, which the engine does not know."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class _FastProjection(nn.Module):
    def __init__(self, plain: _Projection) -> None:
        super().__init__()
        self.weight, self.dense_gradient, self.masks = plain.weight, False, []

    def set_mask(self, mask: Tensor) -> None:
        self.masks.append(mask.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.masks[-1])


def test_layers_of_a_user_come_first_and_follow_masks():
    def obstacle_to_projection(layer: _Projection) -> str | None:
        return "it is wide" if layer.weight.shape[1] > 8 else None

    own = (
        FastLayer(_Projection, obstacle_to_projection, _FastProjection),
        FastLayer(nn.Linear, lambda layer: "the user says so", nn.Identity),
    )
    model = nn.Sequential(_Projection(6, 8), nn.ReLU(), _Projection(8, 9), nn.Linear(9, 4))
    x = torch.randn(5, 6)
    mask = torch.rand(6, 8) < 0.5
    with torch.no_grad():
        model[0].weight[~mask] = 0
    rows = [
        Decision("0", "_Projection", 2.0, 1.0, None),
        *(Decision(name, "plain", None, None, "as is") for name in ("2", "3")),
    ]
    fast = accelerate(model, x, masks={"0.weight": mask}, decisions=Decisions.of(rows), layers=own)
    assert [type(layer) for layer in fast] == [_FastProjection, nn.ReLU, _Projection, nn.Linear]
    assert [obstacle(layer, own) for layer in model] == [None, "it is a ReLU", "it is wide", "the user says so"]
    _assert_close(fast(x), model(x))
    fast(x)
    mask[0] = False
    with torch.no_grad():
        model[0].weight[0] = 0
        fast(x)
    assert [kept.sum() for kept in fast[0].masks] == [kept.sum() for kept in (fast[0].masks[0], mask)]

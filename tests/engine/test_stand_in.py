"""A fast layer stands for the layer that it replaces: what it carries, where it goes, and that it never computes by
values that are gone. What runs fast is decided here, not measured."""

import copy
import importlib
import io
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

import dstlib
from dstlib.engine import Decision, Decisions, SparseLinear, accelerate, registry
from dstlib.engine.gpu.layers import GPU_LAYERS, BlockConv, GPUFusionNode, GPUUnit
from dstlib.engine.layers.conv import CONV, FastConv
from dstlib.engine.layers.fast_layer import FastLayer
from dstlib.engine.layers.fusion_node import FastFusionNode
from dstlib.engine.layers.linear import LINEAR
from dstlib.engine.layers.unit import FastUnit
from dstlib.engine.registry import obstacle
from dstlib.errors import SettingError, StateError
from dstlib.layers import FusionNode, Shift, Unit

MODULE = importlib.import_module("dstlib.engine.accelerate")  # the package has the function under this name
FLAT = (1, 3, 3)


def forced(model: nn.Module, layers: Any = ()) -> Decisions:
    """Decisions for the engine wherever it can."""
    return Decisions.of(
        Decision(name, type(layer).__name__, *((None, None) if obstacle(layer, layers) else (2.0, 1.0)), None)
        for name, layer in MODULE._candidates(model, layers)
    )


class Node(nn.Module):
    """A fusion node of maps that are made of one."""

    def __init__(self) -> None:
        super().__init__()
        shift = Shift((-1, 0, 1), axis=2)
        self.node = FusionNode(4, coarser=(6, (2, 2, 2)), finer=(3, (1, 2, 2)), kernel_size=FLAT, shift=shift)

    def forward(self, x: Tensor) -> Tensor:
        coarser, finer = x[:, :1, ::2, ::2, ::2].repeat(1, 6, 1, 1, 1), x[:, :3].repeat(1, 1, 1, 2, 2)
        y: Tensor = self.node(same=x, coarser=coarser, finer=finer)
        return y


@dataclass(frozen=True)
class Case:
    """A model of one kind of layer, how large its input is, and the weight that is followed."""

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    weight: str
    kind: type[nn.Module]

    def model(self) -> nn.Module:
        """The model, a third of whose kernels is active."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            weight = model.get_parameter(self.weight)
            weight *= (torch.rand(weight.shape[:2]) < 0.3).reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return model

    @property
    def layer(self) -> str:
        """The path of the layer."""
        return self.weight.partition(".")[0]

    @property
    def x(self) -> Tensor:
        """An input."""
        return torch.randn(self.size, generator=torch.Generator().manual_seed(1))


CASES = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(64, 48)), (5, 64), "0.weight", SparseLinear),
    "wide linear": Case(lambda: nn.Sequential(nn.Linear(256, 200)), (5, 256), "0.weight", SparseLinear),
    "conv 2d": Case(lambda: nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)), (2, 8, 9, 9), "0.weight", FastConv),
    "conv 3d": Case(
        lambda: nn.Sequential(nn.Conv3d(8, 12, FLAT, padding=(0, 1, 1))), (2, 8, 3, 9, 9), "0.weight", FastConv
    ),
    "unit": Case(lambda: nn.Sequential(Unit(8, 12, kernel_size=FLAT)), (2, 8, 3, 9, 9), "0.conv.weight", FastUnit),
    "node": Case(Node, (2, 4, 4, 8, 8), "node.units.0.conv.weight", FastFusionNode),
    "upward": Case(Node, (2, 4, 4, 8, 8), "node.upward.weight", FastFusionNode),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_close(got: Any, expected: Any) -> None:
    """Within a share of the largest: float32 rounds by 6e-8, and three layers multiply that by about 10 each."""
    torch.testing.assert_close(got + 0, expected + 0, rtol=0, atol=1e-4 * float(expected.detach().abs().max()) + 1e-12)


def made_fast(case: Case, model: nn.Module, **options: Any) -> nn.Module:
    """The model with its layer on the engine."""
    fast = accelerate(model, case.x, decisions=forced(model), **options)
    assert isinstance(fast.get_submodule(case.layer), case.kind)
    return fast


# ---- no old weights


def _other(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape)


def _copied(model: nn.Module, name: str) -> None:
    torch.manual_seed(7)
    model.get_parameter(name).data.copy_(_other(model.get_parameter(name)))


def _masked_unseen(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(name)
    weight.data.mul_(_other(weight) > 0)


def _placed(model: nn.Module, name: str) -> None:
    model.get_parameter(name).data = _other(model.get_parameter(name))


def _in_place(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(_other(model.get_parameter(name)))


def _loaded(model: nn.Module, name: str) -> None:
    state = copy.deepcopy(model.state_dict())
    state[name] = _other(state[name])
    model.load_state_dict(state)


def _shared(model: nn.Module, name: str) -> None:
    model.share_memory()
    _copied(model, name)


def _swapped_data(model: nn.Module, name: str) -> None:
    weight = model.get_parameter(name)
    other = _other(weight)
    weight.data, other.data = other.data, weight.data


UNSEEN: dict[str, Callable[[nn.Module, str], None]] = {
    "data.copy_": _copied,
    "data.mul_": _masked_unseen,
    "data =": _placed,
    "copy_": _in_place,
    "load_state_dict": _loaded,
    "share_memory": _shared,
    "data swapped": _swapped_data,
}


@each_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_very_next_pass_computes_with_what_was_written(case: Case, training: bool):
    model = case.model().train(training)
    fast = made_fast(case, model)
    with torch.no_grad():
        for change in UNSEEN.values():
            for _ in range(2):
                assert_close(fast(case.x), model(case.x))
            change(model, case.weight)
            assert_close(fast(case.x), model(case.x))


@each_case
def test_an_average_that_is_swapped_in_and_out(case: Case):
    model = case.model().eval()
    fast = made_fast(case, model)
    with torch.no_grad():
        own, average = fast(case.x) + 0, copy.deepcopy(model)
        _copied(average, case.weight)
        kept = [p.detach().clone() for p in model.parameters()]
        for values, expected in (([*average.parameters()], average(case.x)), (kept, own)) * 2:
            for p, value in zip(model.parameters(), values, strict=True):
                p.data.copy_(value)
            assert_close(fast(case.x), expected)


def test_one_value_is_noticed_when_the_mode_changes():
    case = CASES["wide linear"]
    model = case.model().eval()
    fast = made_fast(case, model)
    with torch.no_grad():
        fast(case.x)
        for i in range(0, 51_200, 3571):  # wherever it lies
            model[0].weight.data.view(-1)[i] += 10.0
            fast.train().eval()
            assert_close(fast(case.x), model(case.x))
            fast[0].training = True  # also where it is set by hand
            model[0].weight.data.view(-1)[i + 1] += 10.0
            assert_close(fast(case.x), model(case.x))
            fast[0].training = False


@each_case
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_functional_call_computes_with_what_was_passed(case: Case, masked: bool):
    model = case.model().eval()
    mask = model.get_parameter(case.weight) != 0
    fast = made_fast(case, model, **({"masks": {case.weight: mask}} if masked else {}))
    given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        before = fast(case.x) + 0
        if masked:
            with pytest.raises(StateError, match="zeros outside their masks"):
                torch.func.functional_call(fast, given, case.x)
            given[case.weight] *= mask
        expected = torch.func.functional_call(model, given, case.x)
        assert_close(torch.func.functional_call(fast, given, case.x), expected)
        assert_close(fast(case.x), before)
    wanted = {name: p.requires_grad_() for name, p in given.items()}
    for net in (fast, model):
        torch.func.functional_call(net, wanted, case.x).square().sum().backward()
        if net is fast:
            grads = {name: p.grad.clone() for name, p in wanted.items()}
            for p in wanted.values():
                p.grad = None
    expected = wanted[case.weight].grad * (mask if masked else 1)
    torch.testing.assert_close(grads[case.weight], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@each_case
def test_parameters_of_the_fast_model_may_be_replaced(case: Case):
    model = case.model().eval()
    fast = made_fast(case, model)
    path, _, key = case.weight.rpartition(".")
    with torch.no_grad():
        before = model(case.x) + 0
        other = copy.deepcopy(model)
        setattr(fast.get_submodule(path), key, nn.Parameter(_other(model.get_parameter(case.weight))))
        setattr(other.get_submodule(path), key, fast.get_parameter(case.weight))
        assert_close(fast(case.x), other(case.x))
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        fast.load_state_dict(state, assign=True)
        other.load_state_dict(state)
        assert_close(fast(case.x), other(case.x))
        assert_close(model(case.x), before)


def _assign(model: nn.Module, case: Case) -> str:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return r"\S+(weight|bias)"


def _replace_parameter(model: nn.Module, case: Case) -> str:
    path, _, key = case.weight.rpartition(".")
    setattr(model.get_submodule(path), key, nn.Parameter(model.get_parameter(case.weight).detach().clone()))
    return case.weight


def _replace_layer(model: nn.Module, case: Case) -> str:
    model.set_submodule(case.layer, copy.deepcopy(model.get_submodule(case.layer)))
    return case.layer


def _parametrize(model: nn.Module, case: Case) -> str:
    path, _, key = case.weight.rpartition(".")
    parametrize.register_parametrization(model.get_submodule(path), key, nn.Identity())
    return case.weight


@each_case
@pytest.mark.parametrize("change", [_assign, _replace_parameter, _replace_layer, _parametrize])
@pytest.mark.parametrize("called", ["model", "layer"])
def test_a_plain_model_of_other_parts_is_refused_by_name(case: Case, change: Any, called: str):
    model = case.model()
    fast = made_fast(case, model)
    name = change(model, case)
    call = fast if called == "model" else partial(type(model).forward, fast)
    with torch.no_grad(), pytest.raises(StateError, match=f"accelerated with, got another '{name}'"):
        call(case.x)


def test_a_layer_that_stays_plain_may_not_be_replaced_either():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    fast, x = accelerate(model, torch.randn(1, 8, 5, 5), decisions=forced(model)), torch.randn(2, 8, 5, 5)
    fast[1] = nn.Identity()  # the fast model may
    fast(x)
    model[1] = nn.Identity()  # and what it has replaced itself binds it no more
    fast(x)
    model.append(nn.ReLU())  # what is added is no part of what was accelerated
    model[0].bias = None
    with pytest.raises(StateError, match=r"another '0\.bias'"):
        fast(x)


def test_statistics_may_not_be_replaced_either():
    """As ``to(dtype)`` replaces them: the fast model would go on with those of before; what are no state may be."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    x = torch.randn(2, 4, 5, 5)
    fast = accelerate(model, x, decisions=forced(model))
    model.cache = torch.ones(1)
    fast(x)
    model.double().float()
    with pytest.raises(StateError, match=r"another '1\.running_mean'"):
        fast(x)


@each_case
def test_layers_look_by_themselves_whoever_calls_them(case: Case):
    """Not the model: so it may have other methods, and be called in parts."""
    model = case.model().eval()
    fast = made_fast(case, model)
    call = type(model).forward
    with torch.no_grad():
        call(fast, case.x)
        _copied(model, case.weight)
        assert_close(call(fast, case.x), model(case.x))
        model.get_parameter(case.weight)[:2] = 0
        assert_close(call(fast, case.x), model(case.x))


# ---- copies


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "save": _saved,
    "average": lambda model: AveragedModel(model).module,
    "twice": lambda model: _pickled(copy.deepcopy(model)),
}


@each_case
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(("masked", "has_run"), [(False, True), (True, True), (True, False)])
def test_a_copy_watches_its_own_layers(case: Case, how: str, masked: bool, has_run: bool):
    model = case.model().eval()
    mask = model.get_parameter(case.weight) != 0
    options: dict[str, Any] = {}
    if masked:
        options = {"masks": {case.weight: mask}, "dense_gradient": lambda name: False, "holds": lambda name: False}
    fast = made_fast(case, model, **options)
    if has_run:
        with torch.no_grad():
            fast(case.x)
    again, own = COPIES[how](fast), copy.deepcopy(model)
    assert type(again.get_submodule(case.layer)) is type(fast.get_submodule(case.layer))
    assert again.decisions == fast.decisions
    assert list(again.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert_close(again(case.x), own(case.x))
        for net in (again, own):
            _copied(net, case.weight)
        assert_close(again(case.x), own(case.x))  # with all that its weights have by now
        assert_close(fast(case.x), model(case.x))
    for net in (again, own):
        net.zero_grad()
        net(case.x).square().sum().backward()
    grads = [net.get_parameter(case.weight).grad for net in (again, own)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    again(case.x)  # whatever becomes of the model that was copied


def test_an_average_over_moving_masks_is_that_of_the_plain_model():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        CASES["conv 2d"].x,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = replace(dstlib.RIGL, interval=2)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=method, total_steps=100, include="*")
    fast = sparsifier.accelerate(model, x, decisions=forced(model))
    ours, theirs = AveragedModel(fast), AveragedModel(model)
    for _ in range(12):
        optimizer.zero_grad()
        fast(x).square().mean().backward()
        optimizer.step()
        ours.update_parameters(fast)
        theirs.update_parameters(model)
        with torch.no_grad():
            assert_close(ours(x), theirs(x))


def _compute_elsewhere(model: nn.Module, x: Tensor, results: Any) -> None:
    with torch.no_grad():
        results.put((model(x) + 0).numpy())


@pytest.mark.long
def test_it_is_sent_to_a_spawned_process():
    case = CASES["conv 2d"]
    model = case.model().eval()
    fast = made_fast(case, model, masks={case.weight: model[0].weight != 0}, holds=lambda name: True)
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_compute_elsewhere, args=(fast, case.x, results))
    process.start()
    got = torch.from_numpy(results.get(timeout=120))
    process.join()
    with torch.no_grad():
        assert_close(got, model(case.x))


# ---- what a layer carries


@each_case
def test_it_is_the_layer_in_all_but_its_class(case: Case):
    model = case.model()
    fast = made_fast(case, model)
    plain, ours = model.get_submodule(case.layer), fast.get_submodule(case.layer)
    assert isinstance(ours, type(plain))
    for name, value in vars(plain).items():
        if not name.startswith("_"):
            assert getattr(ours, name) == value, name
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in plain.named_modules()]
    if not isinstance(ours, SparseLinear):  # which tells how many of its weights are active
        assert ours.extra_repr() == plain.extra_repr()


def test_layers_are_called_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unit = nn.Conv3d(2, 4, FLAT, padding=(0, 1, 1)), Unit(4, 4, kernel_size=FLAT)
            self.out = nn.Linear(4 * 75, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.unit(x=self.conv(input=x)).reshape(len(x), self.conv.out_channels * 75)
            return self.out(input=y)

    model, x = Named(), torch.randn(2, 2, 3, 5, 5)
    fast = accelerate(model, x)  # measured, which calls them, too
    assert_close(fast(x), model(x))
    assert_close(accelerate(model, x, decisions=forced(model))(x), model(x))


def _forward_hooks(layer: nn.Module, log: list[Any]) -> None:
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]) if args else None)
    layer.register_forward_hook(lambda module, args, output: log.append("forward") or output.relu())
    layer.register_forward_hook(lambda module, args, kwargs, output: log.append("kwargs"), with_kwargs=True)


def _backward_hooks(layer: nn.Module, log: list[Any]) -> None:
    layer.register_full_backward_pre_hook(lambda module, grad: log.append("pre") or (3 * grad[0],))
    layer.register_full_backward_hook(lambda module, into, grad: log.append(float(grad[0].abs().sum())))


class _Log:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.log.append("noted")

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.log.append("called")


def _bound_hooks(layer: nn.Module, log: list[Any]) -> None:
    def note(into: list[Any], module: nn.Module, args: Any, output: Tensor) -> None:
        into.append("partial")

    layer.register_forward_hook(_Log(log).note)
    layer.register_forward_hook(_Log(log))
    layer.register_forward_hook(partial(note, log))


def _state_hooks(layer: nn.Module, log: list[Any]) -> None:
    layer.register_state_dict_pre_hook(lambda module, prefix, keep: log.append("before"))
    layer.register_state_dict_post_hook(lambda module, state, prefix, meta: log.append("after"))
    layer.register_load_state_dict_pre_hook(lambda module, *_: log.append("load"))
    layer.register_load_state_dict_post_hook(lambda module, keys: log.append("loaded"))


@each_case
@pytest.mark.parametrize("register", [_forward_hooks, _backward_hooks, _bound_hooks, _state_hooks])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_layer_are_kept(case: Case, register: Any, when: str):
    model, log = case.model(), []
    if when == "before":
        register(model.get_submodule(case.layer), log)
        fast = made_fast(case, model)
    else:
        fast = made_fast(case, model)
        register(model.get_submodule(case.layer), log)
        register(fast.get_submodule(case.layer), log)
    outputs, notes, grads = [], [], []
    for net in (fast, model):
        log.clear()
        net.zero_grad()
        y = net(case.x)
        y.square().sum().backward()
        net.load_state_dict(net.state_dict())
        outputs.append(y.detach() + 0)
        notes.append([f"{x:.2g}" if isinstance(x, float) else x for x in log])
        grads.append(net.get_parameter(case.weight).grad.clone())
    assert_close(*outputs)
    assert notes[0] == notes[1] != []
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


class _OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class _OwnUnit(Unit):
    pass


class _OwnNode(FusionNode):
    pass


def _with(layer: nn.Module, change: Callable[[Any], object]) -> nn.Module:
    change(layer)
    return layer


def _replace_forward(layer: nn.Module) -> None:
    layer.forward = lambda x: x


def _hook(path: str) -> Callable[[nn.Module], object]:
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda *_: None)


def _node() -> FusionNode:
    return Node().node


CARRIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass of linear": (lambda: _OwnLinear(4, 4), "it is a _OwnLinear"),
    "subclass of a unit": (lambda: _OwnUnit(4, 4, kernel_size=FLAT), "_OwnUnit"),
    "subclass of a node": (lambda: _OwnNode(4, coarser=(4, (2, 2, 2)), kernel_size=FLAT), "it is a _OwnNode"),
    "forward": (lambda: _with(nn.Linear(4, 4), _replace_forward), "its forward was replaced"),
    "forward inside": (lambda: _with(Unit(4, 4, kernel_size=FLAT), lambda u: _replace_forward(u.norm)), "'norm'"),
    "parametrization": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "computed from others"),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1)), "computed from others"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "computed from others"),
    "pruned inside": (
        lambda: _with(Unit(4, 4, kernel_size=FLAT), lambda u: prune.random_unstructured(u.conv, "weight", 0.5)),
        "'conv' has a hook",
    ),
    "hook on a convolution": (lambda: _with(Unit(4, 4, kernel_size=FLAT), _hook("conv")), "'conv' has a hook"),
    "hook on a norm": (lambda: _with(Unit(4, 4, kernel_size=FLAT), _hook("norm")), "'norm' has a hook"),
    "hook on a unit": (lambda: _with(_node(), _hook("units.0")), r"'units\.0' has a hook"),
    "hook on pooling": (lambda: _with(_node(), _hook("downward")), "'downward' has a hook"),
    "hook within a unit": (lambda: _with(_node(), _hook("units.0.activation")), r"'units\.0\.activation' has a hook"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CARRIED)
def test_what_cannot_be_kept_is_named(name: str):
    make, reason = CARRIED[name]
    layer = make()
    pattern = pytest.raises(AssertionError, match=reason)
    with pattern:
        raise AssertionError(obstacle(layer))
    model = nn.Sequential(layer)
    fast = MODULE._twin(model)
    assert type(fast[0]) is type(layer)


@contextmanager
def _forward_hook(part: nn.Module, log: list[Any]) -> Iterator[None]:
    with part.register_forward_hook(lambda module, args, output: log.append(1) or 2 * output):
        yield


@contextmanager
def _global_hook(part: nn.Module, log: list[Any]) -> Iterator[None]:
    def note(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if isinstance(module, nn.Conv3d | nn.LeakyReLU):
            log.append(1)
            return 2 * output
        return None

    with nn.modules.module.register_module_forward_hook(note):
        yield


@contextmanager
def _own_forward(part: nn.Module, log: list[Any]) -> Iterator[None]:
    plain = part.forward
    part.forward = lambda x: log.append(1) or 2 * plain(x)
    yield
    del part.forward


INSIDE = [("unit", "conv"), ("unit", "norm"), ("unit", "activation")]
INSIDE += [("node", path) for path in ("upward", "downward", "units", "units.0", "units.0.conv", "units.0.shift")]


@pytest.mark.parametrize(("kind", "path"), INSIDE)
@pytest.mark.parametrize("change", [_forward_hook, _global_hook, _own_forward])
def test_what_is_put_on_a_part_later_works(kind: str, path: str, change: Any):
    """Such a pass takes the plain way, and those after it are fast again."""
    case, log = CASES[kind], []
    model = case.model()
    fast = made_fast(case, model)
    with torch.no_grad():
        before = fast(case.x) + 0
        for net in (fast, model):
            log.clear()
            with change(net.get_submodule(case.layer).get_submodule(path), log):
                output, notes = net(case.x) + 0, len(log)
            if net is fast:
                first = output, notes
        assert_close(first[0], output)
        assert first[1] == notes > 0
        assert torch.equal(fast(case.x), before)


def _set(path: str, name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda layer: setattr(layer.get_submodule(path), name, value)


CHANGED = {
    "slope": ("unit", _set("activation", "negative_slope", 0.3)),
    "a slope that is none": ("unit", _set("activation", "negative_slope", -0.5)),
    "eps": ("unit", _set("norm", "eps", 0.1)),
    "another norm": ("unit", _set("", "norm", nn.BatchNorm3d(12))),
    "another activation": ("unit", _set("", "activation", nn.Tanh())),
    "another convolution": ("unit", _set("", "conv", nn.Conv3d(8, 12, FLAT, padding=(0, 1, 1)))),
    "a shift": ("unit", _set("", "shift", Shift((1, 0), axis=2))),
    "stride": ("conv 2d", _set("", "stride", (2, 2))),
    "dilation": ("conv 2d", lambda conv: [setattr(conv, name, (2, 2)) for name in ("dilation", "padding")]),
    "padding": ("conv 3d", _set("", "padding", (0, 0, 0))),
    "a wider weight": ("conv 2d", _set("", "weight", nn.Parameter(torch.randn(12, 8, 1, 3)))),
    "no bias": ("linear", _set("", "bias", None)),
    "pooling": ("node", _set("", "downward", nn.AvgPool3d((1, 2, 2)))),
    "a unit": ("node", _set("units", "0", Unit(11, 4, kernel_size=FLAT))),
    "weight norm": ("linear", lambda layer: parametrizations.weight_norm(layer)),
    "pruning": ("conv 2d", lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "pruning inside": ("unit", lambda layer: prune.l1_unstructured(layer.conv, "weight", 0.5)),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_fast_layer_that_is_changed_computes_as_it_is_now(change: str):
    kind, apply = CHANGED[change]
    case = CASES[kind]
    model = case.model()
    fast = made_fast(case, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        fast(case.x)
        for net in (fast, other):
            torch.manual_seed(3)
            apply(net.get_submodule(case.layer))
        assert_close(fast(case.x), other(case.x))


def test_a_layer_that_is_used_twice_is_one_layer():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), nn.ModuleDict({"again": layer})["again"])
    fast = accelerate(model, torch.randn(2, 8))
    assert list(fast.decisions) == ["0"]
    fast = accelerate(model, torch.randn(2, 8), decisions=forced(model))
    assert fast[0] is fast[2]
    assert isinstance(fast[0], SparseLinear)


# ---- torch's own traces, graphs and modes


@each_case
def test_traces_and_exports_are_of_the_plain_layers(case: Case):
    """Which hold no weights: they are right for others, too."""
    model = case.model().eval()
    fast = made_fast(case, model)
    with torch.no_grad():
        fast(case.x)
        made = {
            "trace": torch.jit.trace(fast, case.x),
            "trace that is not checked": torch.jit.trace(fast, case.x, check_trace=False),
            "export": torch.export.export(fast, (case.x,)).module(),
            "strict export": torch.export.export(fast, (case.x,), strict=True).module(),
        }
        if not isinstance(model, Node):  # whose shift asks a proxy for its axes
            made["fx"] = torch.fx.symbolic_trace(fast)
        x = torch.randn(case.size)
        for name, traced in made.items():
            torch.testing.assert_close(traced(x), model(x), msg=name)
        with_parameters = make_fx(lambda given, x: torch.func.functional_call(fast, given, x))
        given = dict(model.named_parameters())
        traced = with_parameters(given, case.x)
        _copied(model, case.weight)
        for name in made.keys() - {"export", "strict export"}:  # which share the parameters
            torch.testing.assert_close(made[name](x), model(x), msg=name)
        torch.testing.assert_close(traced(given, x), model(x))


@each_case
def test_scripts_are_refused_in_words(case: Case):
    fast = made_fast(case, case.model())
    with pytest.raises(SettingError, match=r"^layer of torch\.jit\.script\(\): .*Script the model that accelerate\(\)"):
        torch.jit.script(fast)


def _steps(fast: nn.Module, model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, number: int) -> None:
    """Steps of training through the fast model."""
    for _ in range(number):
        optimizer.zero_grad()
        fast(x).square().mean().backward()
        optimizer.step()


def _trained(case: Case) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, dstlib.Sparsifier]:
    """A model, the fast one, and what moves its masks at every second step."""
    model = case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = replace(dstlib.RIGL, interval=2)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=method, total_steps=100, include="*")
    return model, sparsifier.accelerate(model, case.x, decisions=forced(model)), optimizer, sparsifier


@pytest.mark.parametrize("kind", ["linear", "unit"])
def test_under_the_compiler_masks_and_weights_are_followed(kind: str):
    torch._dynamo.reset()
    case = CASES[kind]
    model, fast, optimizer, _ = _trained(case)
    compiled = torch.compile(fast, backend="eager")
    for _ in range(3):
        _steps(compiled, model, case.x, optimizer, 3)
        with torch.no_grad():
            assert_close(compiled(case.x), model(case.x))
    alone = made_fast(case, model).eval()
    model.eval()
    compiled = torch.compile(alone, backend="eager")
    with torch.no_grad():
        for change in UNSEEN.values():
            change(model, case.weight)
            assert_close(compiled(case.x), model(case.x))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="looks at its weight in each call"):
        torch.compile(alone, backend="eager", fullgraph=True)(case.x)
    _replace_layer(model, case)
    with pytest.raises(StateError, match=f"another '{case.layer}'"):
        compiled(case.x)


@pytest.mark.parametrize(
    "case", [CASES[name] for name in ("linear", "conv 2d", "node")], ids=["linear", "conv", "node"]
)
@pytest.mark.parametrize("where", ["validation", "accelerate", "both"])
def test_inference_mode_changes_nothing(case: Case, where: str):
    """Not for a training, before and after it, either: what is made in it has no gradients."""
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        model = case.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = replace(dstlib.RIGL, interval=2)
        sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=method, total_steps=100, include="*")
        with mode(where != "validation") if mode is torch.inference_mode else mode():
            fast = sparsifier.accelerate(model, case.x, decisions=forced(model))
        for _ in range(3):
            if where != "accelerate":
                with mode():
                    found = fast(case.x)
                    assert_close(found, model(case.x))
            _steps(fast, model, case.x, optimizer, 3)
        results.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_mask_that_is_set_in_inference_mode_trains():
    sparse = SparseLinear(nn.Linear(8, 4))
    with torch.inference_mode():
        sparse.set_mask(torch.rand(4, 8) < 0.5)
        sparse(torch.randn(2, 8))
    sparse(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert torch.equal(sparse.weight.grad != 0, (sparse.weight.grad != 0) & (sparse.weight != 0))


@each_case
def test_threads_at_once(case: Case):
    """The first of them to look makes what all compute with."""
    model = case.model().eval()
    fast = made_fast(case, model)
    with torch.no_grad():
        fast(case.x)
        _copied(model, case.weight)
        expected = model(case.x)
    wrong: list[Any] = []

    @torch.no_grad()
    def work() -> None:
        try:
            for _ in range(20):
                assert_close(fast(case.x), expected)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- layers of a user


class Projection(nn.Module):
    """A product with a transposed weight, which the engine does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 60))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class FastProjection(nn.Module):
    """Keeps values until it is told: as docs/your_own.md has it, by the version."""

    def __init__(self, plain: Projection) -> None:
        super().__init__()
        self.weight, self.dense_gradient = plain.weight, False
        self.set_mask(plain.weight != 0)

    def set_mask(self, mask: Tensor) -> None:
        self.mask, self.kept = mask.clone(), (-1, mask)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return x @ (self.weight * self.mask)
        if self.kept[0] != self.weight._version:
            self.kept = self.weight._version, self.weight.detach() * self.mask
        return x @ self.kept[1]


PROJECTION = (FastLayer(Projection, lambda layer: None, FastProjection),)
OWN = Case(lambda: nn.Sequential(Projection()), (3, 40), "0.weight", FastProjection)


@pytest.mark.parametrize("change", UNSEEN)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_layers_of_a_user_are_told_of_what_was_written(change: str, compiled: bool):
    model = OWN.model().eval()
    fast = accelerate(model, OWN.x, decisions=forced(model, PROJECTION), layers=PROJECTION)
    assert isinstance(fast[0], FastProjection)
    torch._dynamo.reset()
    call = torch.compile(fast, backend="eager") if compiled else fast
    with torch.no_grad():
        assert_close(call(OWN.x), model(OWN.x))
        for _ in range(2):
            UNSEEN[change](model, OWN.weight)
            assert_close(call(OWN.x), model(OWN.x))
            assert_close(fast[0](OWN.x), model(OWN.x))


@pytest.mark.parametrize("how", COPIES)
def test_layers_of_a_user_are_copied_with_their_look(how: str):
    model, log = OWN.model().eval(), []
    model[0].register_forward_hook(_noting)
    mask = model[0].weight != 0
    fast = accelerate(model, OWN.x, masks={OWN.weight: mask}, decisions=forced(model, PROJECTION), layers=PROJECTION)
    with torch.no_grad():
        assert_close(fast(OWN.x), model(OWN.x))
        again = COPIES[how](fast)
        _copied(again, OWN.weight)
        other = copy.deepcopy(model)
        other.load_state_dict(again.state_dict())
        assert_close(again(OWN.x), other(OWN.x))
        assert_close(fast(OWN.x), model(OWN.x))
        _copied(model, OWN.weight)
        with pytest.raises(StateError, match="zeros outside their masks"):
            fast(OWN.x)
        assert not log


def _noting(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_layers_of_a_user_follow_what_is_passed_and_refuse_what_is_lost():
    model = OWN.model()
    fast = accelerate(model, OWN.x, decisions=forced(model, PROJECTION), layers=PROJECTION)
    given = {OWN.weight: torch.randn(40, 60)}
    with torch.no_grad():
        expected = torch.func.functional_call(model, given, OWN.x)
        assert_close(torch.func.functional_call(fast, given, OWN.x), expected)
        assert_close(fast(OWN.x), model(OWN.x))
        _replace_parameter(model, OWN)
        with pytest.raises(StateError, match=r"another '0\.weight'"):
            fast[0](OWN.x)


# ---- on a GPU: here it is told that this is one


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CPU_LAYERS", GPU_LAYERS)


class _OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


CARRIED_ON_GPU: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: _OwnConv(16, 16, 3, padding=1), "it is a _OwnConv"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)), "computed from others"),
    "parametrization": (lambda: parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)), "ParametrizedConv2d"),
} | {name: CARRIED[name] for name in ("subclass of a unit", "subclass of a node", "hook on a norm", "hook on a unit")}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", CARRIED_ON_GPU)
def test_what_cannot_be_kept_on_a_gpu_is_named(name: str):
    make, reason = CARRIED_ON_GPU[name]
    assert re.search(reason, str(obstacle(make())))


@pytest.mark.usefixtures("on_gpu")
def test_layers_of_a_gpu_have_what_the_plain_ones_have():
    case = Case(lambda: nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), (2, 32, 5, 5), "0.weight", BlockConv)
    model, log = case.model(), []
    _bound_hooks(model[0], log)
    fast = made_fast(case, model)
    assert (fast[0].out_channels, fast[0].padding, fast[0].kernel_size) == (32, (1, 1), (3, 3))
    with torch.no_grad():
        for change in (None, *UNSEEN.values()):
            if change is not None:
                change(model, case.weight)
            assert_close(fast[0](input=case.x), model(case.x))
        assert log[:3] == ["noted", "called", "partial"]
        again = copy.deepcopy(fast)
        _copied(again, case.weight)
        other = copy.deepcopy(model)
        other.load_state_dict(again.state_dict())
        assert_close(again(case.x), other(case.x))
        _replace_layer(model, case)
        with pytest.raises(StateError, match=r"another '0'"):
            fast[0](case.x)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("kind", "path"), [("unit", "conv"), ("unit", "norm"), ("node", "units.0"), ("node", "units")])
def test_hooks_on_a_part_of_what_a_gpu_computes_as_one_are_refused(kind: str, path: str):
    case = CASES[kind]
    model = case.model()
    fast = accelerate(model, case.x, decisions=forced(model))
    assert isinstance(fast.get_submodule(case.layer), GPUUnit | GPUFusionNode)
    _hook(path)(fast.get_submodule(case.layer))
    with pytest.raises(StateError, match=r"hooks of GPU\w+: expected none on a part"):
        fast(case.x)


def test_the_old_calls_are_forgotten_before_a_new_plan_can_be_found():
    """Else another thread computes by the new plan and what was prepared by the old one."""
    conv = CONV.make(nn.Conv2d(2, 3, 1))
    conv(torch.ones(1, 2, 4, 4))
    before, found = conv.settled, []
    conv.forget = lambda: found.append(conv.settled)
    conv.stride = (2, 2)
    conv(torch.ones(1, 2, 4, 4))
    assert found[0] is before


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: CONV.make(nn.Conv2d(64, 64, 3, padding=1)), lambda: LINEAR.make(nn.Linear(512, 512))]
)
def test_what_a_sample_misses_is_noticed_after_a_mode_and_back_without_a_call_between(make, first):
    layer = make().train(first)
    x = torch.randn(4, layer.weight.shape[1], *[6] * (layer.weight.ndim - 2))
    with torch.no_grad():
        layer(x)
        layer.weight.data.view(-1)[12345] += 100
        layer.train(not first).train(first)
        assert (layer(x) - layer.as_plain(x)).abs().max() < 1e-3  # of values of some 100

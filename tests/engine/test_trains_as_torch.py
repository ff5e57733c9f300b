"""Gradients of layers on the engine beside those of torch's, however autograd is asked for them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from test_as_torch import FLAT, forced
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import dstlib
from dstlib.engine.layers.feature_map import Pending
from dstlib.engine.ops.conv import Geometry, conv, unit
from dstlib.engine.ops.conv_transpose import conv_transpose
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import to_channels_first, to_depth_last
from dstlib.engine.ops.max_pool import max_pool
from dstlib.engine.ops.patterns import Pattern, Weights
from dstlib.layers import Shift, Unit
from dstlib.layers.blocks import FusionNode


class Levels(nn.Module):
    """Three levels and the node that joins them: maps of which two layers read the same."""

    def __init__(self) -> None:
        super().__init__()
        shift = Shift((-1, 0, 1), axis=2)
        self.fine = Unit(3, 4, kernel_size=(1, 3, 3))
        self.same = Unit(4, 5, kernel_size=(1, 3, 3), stride=(2, 2, 2), shift=shift)
        self.coarse = Unit(5, 6, kernel_size=(1, 3, 3), stride=(2, 2, 2))
        both = {"coarser": (6, (2, 2, 2)), "finer": (4, (2, 2, 2))}
        self.node = FusionNode(5, kernel_size=(1, 3, 3), shift=shift, num_units=2, **both)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        same = self.same(fine)
        y: Tensor = self.node(same, self.coarse(same), fine)
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 1)), (2, 3, 6, 5)),
    "vgg": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3, padding=1), nn.ReLU(inplace=True)
        ),
        (1, 3, 6, 5),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(3, 4, **FLAT), nn.LeakyReLU(0.1, inplace=True), nn.Conv3d(4, 2, **FLAT)),
        (2, 3, 4, 6, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ELU(inplace=True), nn.Linear(16, 4)), (5, 12)),
    "units": (
        lambda: nn.Sequential(Unit(3, 4, kernel_size=(1, 3, 3)), Unit(4, 2, kernel_size=(1, 3, 3)), nn.Hardswish()),
        (2, 3, 4, 6, 5),
    ),
    "levels": (Levels, (1, 3, 8, 8, 8)),
    "shifted out": (  # so that nothing of the map is read, which has a gradient all the same: zeros
        lambda: nn.Sequential(
            Unit(2, 3, kernel_size=(1, 3, 3)), Unit(3, 2, kernel_size=(1, 3, 3), shift=Shift((2,), axis=2))
        ),
        (2, 2, 1, 4, 4),
    ),
}
Grads = list[Tensor | None]


def _weighted(y: Tensor) -> Tensor:
    """A loss that weighs every number of a result otherwise."""
    return (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum()


def _grads(model: nn.Module, x: Tensor) -> Grads:
    found = [x.grad, *(p.grad for p in model.parameters())]
    return [None if each is None else each.clone() for each in found]


def _once(model: nn.Module, x: Tensor) -> Grads:
    _weighted(model(x)).backward()
    return _grads(model, x)


def _twice(model: nn.Module, x: Tensor) -> Grads:
    loss = _weighted(model(x)).square()
    loss.backward(retain_graph=True)
    loss.backward()
    return _grads(model, x)


def _some(model: nn.Module, x: Tensor) -> Grads:
    last = [*model.parameters()][-1]
    return [*torch.autograd.grad(_weighted(model(x)), [last, x])]


def _of_frozen(model: nn.Module, x: Tensor) -> Grads:
    for parameter in [*model.parameters()][:2]:
        parameter.requires_grad_(False)
    return _once(model, x)


def _without_input(model: nn.Module, x: Tensor) -> Grads:
    _weighted(model(x.detach())).backward()
    return _grads(model, x)


def _penalty(model: nn.Module, x: Tensor) -> Grads:
    """Beside a loss that is linear in the outputs, as of WGAN-GP: no gradient of it tells of a second derivative."""
    loss = _weighted(model(x))
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()
    return _grads(model, x)


def _hessian_vector(model: nn.Module, x: Tensor) -> Grads:
    loss = _weighted(model(x).square())
    grads = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    return [*torch.autograd.grad(sum(_weighted(each) for each in grads), [x, *model.parameters()], allow_unused=True)]


def _forward_mode(model: nn.Module, x: Tensor) -> Grads:
    with forward_ad.dual_level(), torch.no_grad():
        return [forward_ad.unpack_dual(model(forward_ad.make_dual(x.detach(), x.detach().cos()))).tangent]


def _func_grad(model: nn.Module, x: Tensor) -> Grads:
    found, like = torch.func.vjp(lambda x: _weighted(model(x)), x.detach())
    return [found, *like(torch.ones(()))]


def _vmap(model: nn.Module, x: Tensor) -> Grads:
    with torch.no_grad():
        return [torch.vmap(model)(torch.stack([x, 2 * x, x.cos()]))]


def _checkpointed(*, reentrant: bool) -> Callable[[nn.Module, Tensor], Grads]:
    def run(model: nn.Module, x: Tensor) -> Grads:
        y = x
        for layer in model if isinstance(model, nn.Sequential) else [model]:
            y = checkpoint(layer, y, use_reentrant=reentrant)
        _weighted(y).backward()
        return _grads(model, x)

    return run


def _saved_elsewhere(model: nn.Module, x: Tensor) -> Grads:
    """What is kept comes back as copies in torch's default order."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone().contiguous(), lambda x: x):
        y = model(x)
    _weighted(y).backward()
    return _grads(model, x)


def _anomalies(model: nn.Module, x: Tensor) -> Grads:
    with torch.autograd.detect_anomaly(check_nan=True):
        return _once(model, x)


def _hooks_on_tensors(model: nn.Module, x: Tensor) -> Grads:
    seen: Grads = []
    y = model[0](x) if isinstance(model, nn.Sequential) else model.fine(x)
    y.register_hook(lambda grad: seen.append(grad.clone()))
    y.retain_grad()
    _weighted(y).backward()
    return [*seen, y.grad, x.grad]


def _outputs_changed(model: nn.Module, x: Tensor) -> Grads:
    y = model(x)
    y.mul_(2)
    y[:, 0] = 1.0
    _weighted(y).backward()
    return [y.detach(), *_grads(model, x)]


def _unused(model: nn.Module, x: Tensor) -> Grads:
    model(x)
    _weighted(model(2 * x)).backward()
    return _grads(model, x)


def _accumulated(model: nn.Module, x: Tensor) -> Grads:
    for factor in (1, 2):
        _weighted(model(factor * x)).backward()
    return _grads(model, x)


WAYS: dict[str, Callable[[nn.Module, Tensor], Grads]] = {
    "once": _once,
    "twice": _twice,
    "some": _some,
    "of frozen layers": _of_frozen,
    "without the input's": _without_input,
    "gradient penalty": _penalty,
    "Hessian-vector": _hessian_vector,
    "forward mode": _forward_mode,
    "torch.func": _func_grad,
    "vmap": _vmap,
    "checkpointed": _checkpointed(reentrant=False),
    "checkpointed, reentrant": _checkpointed(reentrant=True),
    "saved elsewhere": _saved_elsewhere,
    "anomalies": _anomalies,
    "hooks on tensors": _hooks_on_tensors,
    "outputs changed": _outputs_changed,
    "unused": _unused,
    "accumulated": _accumulated,
}


def _assert_same(found: Grads, expected: Grads) -> None:
    """Within 1e-4 of the largest gradient: float32 rounds by 6e-8, a dozen layers multiply that by about 10 each."""
    most = max(each.abs().max().item() for each in expected if each is not None)
    assert [each is None for each in found] == [each is None for each in expected]
    for one, other in zip(found, expected, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * most)


def _pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    model = make()
    return model, forced(copy.deepcopy(model), torch.randn(size)), torch.randn(size)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_gradients_are_those_of_torch(name: str, way: str):
    model, fast, x = _pair(name)
    try:
        expected = WAYS[way](model, x.clone().requires_grad_())
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error) or "leaf Variable" in str(error):
            return  # what torch keeps for the gradients was changed
        raise
    _assert_same(WAYS[way](fast, x.clone().requires_grad_()), expected)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["vgg", "linear", "levels"])
@pytest.mark.parametrize("first", [True, False], ids=["validates first", "trains first"])
def test_validation_between_steps_changes_nothing(name: str, mode: str, first: bool):
    _, fast, x = _pair(name)
    alone = copy.deepcopy(fast)
    for model, validates in ((fast, True), (alone, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(2):
            if validates and (first or step):
                for training in (True, False):
                    with MODES[mode]():
                        model.train(training)(x + step)
            model.train()
            optimizer.zero_grad()
            _weighted(model(x)).backward()
            optimizer.step()
    for one, other in zip(fast.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_made_but_once_may_be_made_in_inference_mode_and_trained_with():
    from dstlib.engine.gpu.feature_map import _moves
    from dstlib.engine.ops.operator import _nan

    _nan.cache_clear()
    _moves.cache_clear()
    model = forced(nn.Sequential(Unit(3, 4, kernel_size=(1, 3, 3))), x := torch.randn(1, 3, 4, 6, 5))
    with torch.inference_mode():
        model(x)
        assert not _moves((1, 0, -1), 3, torch.device("cpu")).is_inference()
    _weighted(model(x)).backward()


IN_FRONT = {
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(1),
    "affine InstanceNorm2d": lambda: nn.InstanceNorm2d(1, affine=True),
    "BatchNorm2d": lambda: nn.BatchNorm2d(1),
    "GroupNorm": lambda: nn.GroupNorm(1, 1),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "Upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "PixelShuffle": lambda: nn.Sequential(nn.Conv2d(1, 4, 5), nn.PixelShuffle(2)),
    "Conv2d": lambda: nn.Conv2d(1, 1, 5, padding=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(1, 1, 2),
    "PReLU": nn.PReLU,
    "LayerNorm": lambda: nn.LayerNorm(6),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(1),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d(1),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "Softmax2d": lambda: nn.Softmax(dim=-1),
}


@pytest.mark.parametrize("layer", IN_FRONT)
@pytest.mark.parametrize("batch", [1, 3])
def test_layers_in_front_get_gradients_that_they_can_read(layer: str, batch: int):
    """A few of torch's gradients misread others: see findings/torch_batch_norm_gradient_in_channels_last.sh."""
    torch.manual_seed(0)
    model = nn.Sequential(IN_FRONT[layer](), nn.Conv2d(1, 3, 3, padding=1))
    fast, x = forced(copy.deepcopy(model), torch.randn(batch, 1, 10, 6)), torch.randn(batch, 1, 10, 6)
    expected = _once(model, x.clone().requires_grad_())
    _assert_same(_once(fast, x.clone().requires_grad_()), expected)


class _Copies(TorchDispatchMode):
    """Counts the maps that are copied by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.clone.default and y.ndim == 5
        return y


def test_gradients_between_fast_layers_are_not_put_in_order():
    """Each copy would be a map of the whole image: the layers read gradients in any order."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 8, 8)
    y = forced(Levels(), x)(x)
    grad = torch.randn_like(y)
    with _Copies() as copies:
        y.backward(grad)
    assert copies.count == 0


def _order(x: Tensor) -> list[int]:
    """The axes as they lie in memory, but for those of one number."""
    return sorted((axis for axis in range(x.ndim) if x.shape[axis] > 1), key=x.stride, reverse=True)


@examples(15, 40)
@given(
    axes=st.permutations(range(5)),
    size=st.tuples(*[st.integers(1, 4)] * 5),
    kind=st.integers(0, 5),
    spread=st.booleans(),
)
def test_gradients_lie_as_what_they_belong_to(axes: list[int], size: tuple[int, ...], kind: int, spread: bool):
    back = [axes.index(axis) for axis in range(5)]
    room = torch.randn([size[axis] for axis in axes])
    x = (torch.stack([room, room], dim=-1)[..., 0] if spread else room).permute(back).requires_grad_()
    channels = size[1]
    full = Pattern.of(torch.ones(2, channels, dtype=torch.bool))
    weights = Weights(torch.randn(2, channels, 1, 3, 3, requires_grad=True), None, full, full)
    back_weights = Weights(torch.randn(channels, 2, 1, 2, 2), None, full, full)
    geometry = Geometry(torch.zeros(channels, dtype=torch.int32))
    if kind == 1 and max(size[2:]) == 1:
        return  # of one voxel there is no norm
    y = (
        lambda: conv([FeatureMap(x)], weights, geometry).raw,
        lambda: Pending.of(unit([FeatureMap(x)], weights, geometry, (torch.ones(2), torch.zeros(2), 1e-5), 0.1)),
        lambda: conv_transpose(FeatureMap(x), back_weights, (1, 2, 2)).raw,
        lambda: max_pool(FeatureMap(x), (1, 1, 1)).raw,
        lambda: to_depth_last(x),
        lambda: to_channels_first(x),
    )[kind]()
    if y is x:
        return
    (grad,) = torch.autograd.grad(_weighted(y), x)
    assert grad.shape == x.shape
    assert _order(grad) == _order(x)


def test_what_has_no_second_derivative_says_so():
    from dstlib.engine.ops.conv import CONV_BACKWARD_INPUT, stated

    full = Pattern.of(torch.ones(2, 2, dtype=torch.bool))
    weights = Weights(torch.randn(2, 2, 1, 3, 3, requires_grad=True), None, full, full)
    x = FeatureMap(torch.randn(1, 2, 3, 4, 4))
    problem, tensors = stated([x], weights, Geometry(torch.zeros(2, dtype=torch.int32)))
    with pytest.raises(RuntimeError, match="expected gradients, once, got gradients of gradients") as found:
        CONV_BACKWARD_INPUT(problem, [*tensors, torch.randn(1, 2, 3, 4, 4)])
    assert isinstance(found.value, dstlib.DstlibError)

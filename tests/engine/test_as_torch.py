"""Layers on the engine take what torch's layers take, with their results, and refuse what these refuse."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dstlib.engine import Decision, Decisions, accelerate
from dstlib.engine.layers.feature_map import Pending
from dstlib.engine.ops.feature_map import FeatureMap
from dstlib.engine.ops.layouts import materialise
from dstlib.engine.ops.max_pool import max_pool
from dstlib.engine.registry import obstacle
from dstlib.errors import InputError
from dstlib.layers import Shift, Unit

MODULE = importlib.import_module("dstlib.engine.accelerate")  # the package has the function under this name
FLAT = {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)}


def forced(model: nn.Module, *examples: Tensor) -> nn.Module:
    """The model on the engine wherever it can be."""
    found = {name: (type(layer).__name__, obstacle(layer)) for name, layer in MODULE._candidates(model)}
    rows = (Decision(n, kind, *((None, None) if why else (2.0, 1.0)), why) for n, (kind, why) in found.items())
    decisions = Decisions.of(rows)
    assert any(row.is_fast for row in decisions.values())
    return accelerate(model, examples, decisions=decisions)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    "conv2d by one": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 7, 6)),
    "conv2d stride": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, **FLAT), (2, 4, 5, 7, 6)),
    "linear": (lambda: nn.Linear(32, 12), (3, 32)),
    "unit": (lambda: Unit(4, 6, kernel_size=(1, 3, 3)), (2, 4, 5, 7, 6)),
    "shifted unit": (lambda: Unit(4, 6, kernel_size=(1, 3, 3), shift=Shift((-1, 0, 1), axis=2)), (2, 4, 5, 7, 6)),
}


def _overlapping(x: Tensor) -> Tensor:
    strides = (5, *x.stride()[1:-2], 3, 1) if x.ndim > 2 else (7, 1)
    return x.new_tensor(range(1000)).sin().as_strided(x.shape, strides, 2)


class Subclass(Tensor):
    """A tensor with a meaning of its own."""


# fmt: off
INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "more channels": lambda x: torch.cat([x, x], dim=1),
    "fewer channels": lambda x: x[:, :3],
    "one channel": lambda x: x[:, :1],
    "no channels": lambda x: x[:, :0],
    "without batch": lambda x: x[0],
    "a number": lambda x: x.sum(),
    "nothing": lambda x: None,
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "no samples": lambda x: x[:0],
    "two axes less": lambda x: x[0, 0],
    "an axis more": lambda x: x[None],
    "two axes more": lambda x: x[None, None],
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "quantized": lambda x: torch.ops.aten.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "no rows": lambda x: x[..., :0, :],
    "no columns": lambda x: x[..., :0],
    "no depths": lambda x: x[:, :, :0] if x.ndim == 5 else x[:, :0],
    "one voxel": lambda x: x[:, :, :1, :1, :1] if x.ndim == 5 else x[:, :, :1, :1] if x.ndim == 4 else x[:1],
    "one row": lambda x: x[..., :1, :],
    "one depth": lambda x: x[:, :, :1] if x.ndim == 5 else x[:1],
    "expanded samples": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
    "expanded columns": lambda x: x[..., :1].expand_as(x),
    "expanded": lambda x: x.flatten()[0].expand_as(x),
    "every other": lambda x: torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
    "every other channel": lambda x: torch.stack([x, x + 1], dim=2).flatten(1, 2)[:, ::2],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x),
    "overlapping": _overlapping,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "samples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "negative": lambda x: torch.complex(x, x).conj().imag,
    "part of complex": lambda x: torch.complex(x, x).real,
    "leaf": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: nn.Parameter(x.clone()),
    "subclass": lambda x: x.as_subclass(Subclass),
}
# fmt: on


def _outcome(model: nn.Module, *given: Any) -> Any:
    try:
        return model(*given)
    except Exception as error:  # of any kind: its type is compared
        return error


def _assert_as(plain: Any, found: Any) -> None:
    """The same result, or an error of the same kind."""
    if isinstance(plain, Exception):
        assert isinstance(found, type(plain) if not isinstance(plain, NotImplementedError) else RuntimeError), found
        return
    assert isinstance(found, Tensor), found
    assert found.shape == plain.shape
    assert found.dtype == plain.dtype
    assert found.device == plain.device
    assert found.requires_grad == plain.requires_grad
    if plain.layout is not torch.strided:
        found, plain = found.to_dense(), plain.to_dense()
    if plain.device.type != "meta" and plain.numel():
        some = plain.abs()[plain.isfinite()]
        # 1e-4 of the largest: sums of some hundred products in float32; 1e-2 where torch computes in fewer bits
        share = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 1e-2
        atol = share * some.max().item() if some.numel() else 0
        torch.testing.assert_close(found + 0, plain + 0, rtol=0, atol=atol, equal_nan=True)


@cache
def _pair(layer: str) -> tuple[nn.Module, nn.Module]:
    """A layer, and its fast form with parameters of its own."""
    torch.manual_seed(0)
    make, size = LAYERS[layer]
    model = nn.Sequential(make())
    return model, forced(copy.deepcopy(model), torch.randn(size))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("layer", ["conv2d", "conv2d stride", "conv3d", "linear", "unit"])
def test_every_input_gives_what_torch_gives(layer: str, kind: str):
    torch.manual_seed(0)
    model, fast = _pair(layer)
    x = INPUTS[kind](torch.randn(LAYERS[layer][1]))
    for records in (True, False):
        with torch.set_grad_enabled(records):
            plain = _outcome(model.train(records), x)
            for _ in range(2):  # the second call may be prepared
                _assert_as(plain, _outcome(fast.train(records), x))


def _saved(y: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(y, file)
    loaded: Tensor = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return loaded


def _in_place(change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def changed(y: Tensor) -> Tensor:
        change(y)
        return y

    return changed


def _set(y: Tensor) -> None:
    y[:, 0] = 0


def _shifted_under_the_tensor(y: Tensor) -> None:
    y.numpy()[:] += 1


# fmt: off
USES: dict[str, Callable[[Tensor], Any]] = {
    "set an item": _in_place(_set),
    "add_": _in_place(lambda y: y.add_(1)),
    "relu_": _in_place(torch.relu_),
    "out": _in_place(lambda y: torch.add(y, 1, out=y)),
    "clamp_": _in_place(lambda y: y.clamp_(min=0)),
    "copy_": _in_place(lambda y: y.copy_(torch.ones(y.shape))),
    "fill a view": _in_place(lambda y: y.view(-1)[::2].fill_(3)),
    "fill a part": _in_place(lambda y: y[:, 1].mul_(2)),
    "fill a flat one": _in_place(lambda y: y.flatten()[5:].zero_()),
    "fill the data": _in_place(lambda y: y.data.mul_(2)),
    "fill what is detached": _in_place(lambda y: y.detach().mul_(2)),
    "fill in numpy": _in_place(_shifted_under_the_tensor),
    "fill by dlpack": _in_place(lambda y: torch.from_dlpack(y).mul_(2)),
    "foreach": _in_place(lambda y: torch._foreach_add_([y], 1)),
    "leaky ReLU in place": _in_place(nn.LeakyReLU(0.3, inplace=True)),
    "other data": _in_place(lambda y: setattr(y, "data", torch.ones(y.shape))),
    "add": lambda y: y + 1,
    "cat": lambda y: torch.cat([y, y]),
    "data": lambda y: y.data,
    "numpy": lambda y: y.numpy(),
    "asarray": lambda y: np.asarray(y),
    "to a list": lambda y: y.tolist(),
    "an item": lambda y: y.sum().item(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "save": _saved,
    "pickle": lambda y: pickle.loads(pickle.dumps(y)),
    "detach": lambda y: y.detach(),
    "clone": lambda y: y.clone(),
    "to a type": lambda y: y.double(),
    "contiguous": lambda y: y.contiguous(),
    "is_contiguous": lambda y: y.is_contiguous(),
    "stride": lambda y: y.stride(),
    "iterate": lambda y: next(iter(y)),
    "transpose": lambda y: y.mT,
    "real": lambda y: y.real,
    "a new tensor": lambda y: y.new_tensor(y.tolist()),
    "parameter": lambda y: nn.Parameter(y) + 0,
    "string": str,
    "requires_grad_": lambda y: y.requires_grad_(),
    "set_": lambda y: y.set_(torch.ones(y.shape)),
    "storage": lambda y: y.untyped_storage().nbytes() >= 4 * y.numel(),
    "compare": lambda y: torch.equal(y, y),
    "bytes": lambda y: memoryview(y.numpy()).nbytes,
}
# fmt: on


def _assert_alike(plain: Any, found: Any) -> None:
    if isinstance(plain, Tensor):
        assert type(found) is type(plain)
        _assert_as(plain.detach(), found.detach())
    elif isinstance(plain, np.ndarray | list | float):
        np.testing.assert_allclose(np.asarray(found), np.asarray(plain), atol=1e-4)  # rounding of values of about 1
    elif not isinstance(plain, str):
        assert found == plain


def test_other_channels_are_told_without_sizes_that_nobody_passed():
    """A layer of two axes computes its samples as depths, which its user has never heard of."""
    fast = forced(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), torch.randn(1, 4, 5, 5))
    with pytest.raises(InputError, match=r"^maps of conv\(\): expected 4 channels in all, got 7\. Pass"):
        fast(torch.randn(2, 7, 5, 5))


@pytest.mark.parametrize("use", USES)
def test_what_a_unit_gives_is_a_tensor(use: str):
    """Before anybody else has read it, to whoever does something with it, and to its readers afterwards."""
    torch.manual_seed(0)
    unit, x = Unit(4, 6, kernel_size=(1, 3, 3)), torch.randn(2, 4, 5, 7, 6)
    reader = Unit(6, 3, kernel_size=(1, 3, 3))
    plain = nn.Sequential(unit, reader)
    fast = forced(copy.deepcopy(plain), x)
    with torch.no_grad():
        for _ in range(2):
            outputs = []
            for layers in (plain, fast):
                y = layers[0](x)
                used = USES[use](y)
                outputs.append((used, layers[1](y), y))
            expected, found = outputs
            for one, other in zip(expected, found, strict=True):
                _assert_alike(one, other + 0 if one is expected[1] else other)
            assert type(found[2]) is Tensor


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_recorded_in_inference_mode(layer: str):
    """Whatever the grad mode inside of it says."""
    model, fast = _pair(layer)
    with torch.inference_mode(), torch.enable_grad():
        x = torch.randn(LAYERS[layer][1])
        _assert_as(model(x), fast(x))


def test_what_a_model_gives_is_plain():
    unit, x = Unit(4, 6, kernel_size=(1, 3, 3)), torch.randn(2, 4, 5, 7, 6)
    fast = forced(nn.Sequential(unit, nn.Identity()), x)
    for records in (True, False):
        with torch.set_grad_enabled(records):
            assert type(fast[0](x)) is Pending
            assert type(fast(x)) is Tensor
            assert fast(x).is_contiguous()


def _with_some(x: Tensor, kind: float) -> Tensor:
    x = x.clone()
    x[0, 1, ..., 2, 3] = kind
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "layer", ["conv2d", "conv2d by one", "conv2d stride", "conv3d", "unit", "shifted unit", "linear"]
)
@pytest.mark.parametrize("records", [True, False])
def test_what_is_not_finite_in_torch_is_not_here(layer: str, value: float, records: bool):
    """Without zero weights; a tile of four by four results of a 3 x 3 kernel is not finite together, and Inf is NaN."""
    torch.manual_seed(0)
    model, fast = _pair(layer)
    x = torch.randn(LAYERS[layer][1])
    x = _with_some(x, value) if x.ndim > 2 else torch.where(torch.arange(len(x))[:, None] == 1, value, x)
    with torch.set_grad_enabled(records):
        expected, found = model(x), fast(x)
    assert not expected.isfinite().all()
    assert not found[~expected.isfinite()].isfinite().any()
    same = found.isfinite()
    torch.testing.assert_close(found[same], expected[same], rtol=0, atol=1e-4 * expected[same].abs().max().item())
    if layer not in ("unit", "shifted unit"):  # whose norm reads all
        lost = expected.isfinite() & ~same
        rows, columns = lost.flatten(0, -3).any(0).nonzero().T if lost.ndim > 2 else (torch.zeros(0), torch.zeros(0))
        assert not len(rows) or (rows.max() < 8 and columns.max() < 8 and layer in ("conv2d", "conv3d"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_max_pooling_and_activations_pass_on_what_is_not_finite(value: float):
    x = _with_some(torch.randn(1, 2, 4, 6, 6), value)
    norm = (torch.full((1, 2), 2.0), torch.full((1, 2), -1.0), 0.1)
    values = nn.functional.leaky_relu(2 * x - 1, 0.1)
    torch.testing.assert_close(materialise(FeatureMap(x, norm)), values, equal_nan=True)
    pooled = nn.functional.max_pool3d(values, (2, 2, 2))
    torch.testing.assert_close(max_pool(FeatureMap(x, norm), (2, 2, 2)).raw, pooled, equal_nan=True)


def test_zero_weights_times_infinity_are_skipped():
    """The one difference that sparse kernels have by nature: torch multiplies by the zeros, and finds NaN."""
    linear, conv = nn.Linear(4, 2), nn.Conv2d(4, 2, 3, padding=1)
    with torch.no_grad():
        linear.weight[0, 1] = 0
        conv.weight[0, 1] = 0
    for layer, x in ((linear, torch.randn(3, 4)), (conv, torch.randn(1, 4, 6, 6))):
        x[:, 1] = torch.inf
        fast = forced(nn.Sequential(copy.deepcopy(layer)), torch.zeros_like(x))
        with torch.no_grad():
            assert layer(x)[..., 0].isnan().any() or layer(x)[:, 0].isnan().any()
            found = fast(x)
        assert (found[:, 0] if x.ndim == 4 else found[..., 0]).isfinite().all()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Unit(4, 6, kernel_size=(1, 3, 3)), nn.Conv3d(6, 4, **FLAT))
        self.head = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean((2, 3, 4)))
        return y


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", [True, False], ids=["alone", "behind a plain layer"])
def test_autocast_computes_in_the_type_of_the_weights(dtype: torch.dtype, first: bool):
    """On a CPU: so outputs are nearer to those without autocast than torch's are, and of float32."""
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 4, 5, 7, 6)
    fast = forced(copy.deepcopy(model), x)
    front = nn.Identity() if first else nn.Conv3d(4, 4, 3, padding=1)
    with torch.autocast("cpu", dtype):
        y = fast(front(x))
        assert y.dtype == torch.float32
        y.square().mean().backward()
    expected = model(front(x))
    error = 1e-4 if first else 0.05  # the rounding of the plain layer in front to 8 bits
    torch.testing.assert_close(y, expected, rtol=0, atol=error * expected.abs().max().item())
    expected.square().mean().backward()
    for one, other in zip(fast.parameters(), model.parameters(), strict=True):
        most = max(other.grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=(1e-3 if first else 0.3) * most)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_lie_in_memory_as_torchs_do(name: str, samples: int):
    """So that they can be viewed as vectors, one a sample."""
    model, fast = _pair(name)
    given = torch.randn(samples, *LAYERS[name][1][1:])
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert fast(given).stride() == model(given).stride()
            assert torch.equal(fast(given).view(samples, -1), fast(given).reshape(samples, -1))
    x = given.clone().requires_grad_()
    fast(x).square().sum().backward()
    assert x.grad.is_contiguous()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("is_wide", [True, False], ids=["a layer", "an input"])
def test_autocast_leaves_double_precision_alone(name: str, is_wide: bool):
    model, fast = _pair(name)
    x = torch.randn(LAYERS[name][1])
    for each in (model, fast):
        each.to(torch.float64 if is_wide else torch.float32)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            each(x if is_wide else x.double())


@pytest.mark.parametrize("what", ["dtype", "device"])
def test_defaults_of_torch_change_nothing(what: str):
    torch.manual_seed(0)
    model, fast = _pair("unit")
    x = torch.randn(LAYERS["unit"][1])
    small, large = x, torch.randn(1, 4, 16, 128, 64)  # torch's memory, and the engine's
    for each in (small, large):
        with torch.no_grad():
            expected = model(each)
            torch.set_default_dtype(torch.float64) if what == "dtype" else torch.set_default_device("meta")
            try:
                found = fast(each)
            finally:
                torch.set_default_dtype(torch.float32)
                torch.set_default_device(None)
        _assert_as(expected, found)

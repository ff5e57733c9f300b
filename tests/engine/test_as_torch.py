"""Layers on the engine take what torch's layers take, with their results, and refuse what these refuse."""

import copy
import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dstlib.engine import Decision, Decisions, accelerate
from dstlib.engine.registry import obstacle
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
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["train", "no_grad"])
def test_every_input_gives_what_torch_gives(layer: str, kind: str, mode: str):
    torch.manual_seed(0)
    model, fast = _pair(layer)
    x = INPUTS[kind](torch.randn(LAYERS[layer][1]))
    for each in (model, fast):
        each.train(mode == "train")
    with torch.set_grad_enabled(mode == "train"):
        plain = _outcome(model, x)
        for _ in range(2):  # the second call may be prepared
            _assert_as(plain, _outcome(fast, x))

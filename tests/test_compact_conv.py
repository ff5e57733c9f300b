"""Compact storage of convolutions: the masks, losses and state of masked storage, kernel for kernel."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import dstlib
from dstlib import masking
from dstlib.engine.layers.compact import make_compact
from dstlib.engine.layers.compact_conv import CompactConv
from dstlib.errors import StateError
from dstlib.sparsifier import by_tiles

Optimize = Callable[[nn.Module], torch.optim.Optimizer]

SGD: Optimize = lambda model: torch.optim.SGD(model.parameters(), lr=2**-6, momentum=0.5)  # noqa: E731
ADAM: Optimize = lambda model: torch.optim.Adam(model.parameters(), lr=2**-6)  # noqa: E731


def _images(*, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Module:
    half = kernel // 2
    layers = nn.Conv2d(4, 8, kernel, stride, half, bias=bias), nn.Conv2d(8, 8, kernel, 1, half, bias=bias)
    return _whole(nn.Sequential(layers[0], nn.ReLU(), layers[1]))


def _volumes(*, stride: int = 1) -> nn.Module:
    first = nn.Conv3d(4, 8, (1, 3, 3), stride, (0, 1, 1))
    return _whole(nn.Sequential(first, nn.ReLU(), nn.Conv3d(8, 4, (1, 3, 3), 1, (0, 1, 1))))


def _whole(model: nn.Module) -> nn.Module:
    """Returns the model with weights in sixteenths, none of them zero: their sums are exact, in whatever order."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        parameter.data = sign * torch.randint(1, 9, parameter.shape, generator=generator) / 16
    return model


def _data(model: nn.Module, num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (2, 4, 6, 6) if isinstance(model[0], nn.Conv2d) else (2, 4, 3, 5, 4)
    return [torch.randint(-2, 3, size, generator=generator).float() for _ in range(num)]


def _method(name: str, granularity: masking.Granularity) -> dstlib.Method:
    return replace(dstlib.METHODS[name], granularity=granularity)


def _start(model: nn.Module, method: dstlib.Method, storage: str, optimize: Optimize):
    sparsifier = dstlib.sparsify(
        model, sparsity=0.5, method=method, total_steps=40, update_interval=2, seed=3, storage=storage
    )
    return sparsifier, optimize(model)

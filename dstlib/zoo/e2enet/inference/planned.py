"""Networks of a prediction as recorded plans, which a CPU computes with no Python between the layers."""

import os
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor, nn

from dstlib.bounds import trim_heap
from dstlib.errors import DstlibError, SettingError
from dstlib.export import save_plan
from dstlib.runtime import VARIABLE, load_plan
from dstlib.zoo.e2enet.data.cases import Shape, three
from dstlib.zoo.e2enet.inference.predict import Trained
from dstlib.zoo.e2enet.inference.sliding_window import predicting
from dstlib.zoo.e2enet.network import E2ENet

EXTENT = 32  # voxels along each axis of the image that a network is followed and timed with, or what it takes at least
TRIES = 3


def on_plans(trained: Trained) -> Trained:
    """Returns the same networks, computed on the engine as the plans that :func:`dstlib.export.save_plan` makes.

    Weights, names and modes are those of the networks, of which the weights must not change from here on.

    Raises:
        SettingError: A network cannot be a plan; the layer that is in the way is named.
        StateError: The kernels were not built, say.
    """
    return replace(trained, models=tuple(map(_on_plan, trained.models)))


def faster_of(trained: Trained) -> tuple[Trained, str]:
    """Returns the networks on the engine, if that computes them faster on this CPU, and says which it is, and why.

    Both are timed in turns on a small image, by the fastest of three tries, which other programs lengthen least.
    """
    try:
        if os.environ.get(VARIABLE) == "torch":
            return trained, f"Computed in torch, as {VARIABLE} says."
        planned = on_plans(trained)
    except DstlibError as error:
        return trained, f"Computed in torch: {error}"
    image = torch.zeros(1, len(trained.channels), *_extents(trained.models[0]))
    seconds = _fastest(trained.models[0], planned.models[0], image)
    trim_heap()  # of what torch's passes have left
    size, ratio = "×".join(map(str, image.shape[2:])), seconds[0] / seconds[1]
    if ratio <= 1:
        return trained, f"Computed in torch, where {size} voxels take {ratio:.2f} times as long as on the engine."
    return planned, f"Computed on the engine, {ratio:.1f} times as fast as in torch on {size} voxels."


def _on_plan(model: nn.Module) -> nn.Module:
    image = torch.zeros(1, _channels(model), *_extents(model))
    with TemporaryDirectory() as folder, predicting(model):
        save_plan(model, image, file := Path(folder) / "model.plan")
        plan = load_plan(file)

    def forward(x_BCDHW: Tensor) -> Tensor:
        outputs = plan(x_BCDHW.numpy(), threads=torch.get_num_threads())
        assert not isinstance(outputs, tuple)  # without deep supervision there is one
        return torch.from_numpy(outputs)

    planned = copy(model)  # the same parameters, by the same names
    object.__setattr__(planned, "forward", forward)
    return planned


def _channels(model: nn.Module) -> int:
    return _checked(model).config.in_channels


def _extents(model: nn.Module) -> Shape:
    """Returns the size of a small image that a network takes."""
    divisor = _checked(model).config.divisor
    extents = [max(step, EXTENT // step * step) for step in divisor]
    if extents == list(divisor):  # whose coarsest feature map would be one voxel
        extents[0] *= 2
    return three(extents)


def _checked(model: nn.Module) -> E2ENet:
    if not isinstance(model, E2ENet):
        given, remedy = type(model).__name__, "It is computed in torch."
        raise SettingError.of("network", "a prediction by plans", allowed="E2ENet", given=given, remedy=remedy)
    return model


@torch.inference_mode()
def _fastest(one: nn.Module, other: nn.Module, image: Tensor) -> tuple[float, float]:
    """Measures the seconds of the fastest pass of each."""
    with predicting(one), predicting(other):
        taken = [(_seconds(lambda: one(image)), _seconds(lambda: other(image))) for _ in range(TRIES)]
    first, second = map(min, zip(*taken, strict=True))
    return first, second


def _seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start

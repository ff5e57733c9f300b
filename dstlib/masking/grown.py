"""What weights start from when they grow: functions from a site to values of the weight's shape.

They see the new mask. Where a bound depends on the number of inputs, those that are active count, each output's
for itself: a sparse neuron that starts as if it were dense hears too little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.errors import require
from dstlib.masking.site import Site

GrownInit = Callable[[Site], Tensor]


def zeros(site: Site) -> Tensor:
    """Starts from zero: the network's output does not change at an update, but for what was dropped."""
    return torch.zeros_like(site.weight)


def uniform_fan_out(site: Site) -> Tensor:
    """Starts uniformly in ±√(6 / number of outputs): far above trained weights where outputs are few.

    Reference: He et al. 2015, by outputs: variance 2 / number of outputs. Deviates: kernel taps are not counted.
    """
    bound = (6 / site.weight.shape[0]) ** 0.5
    return ((2 * site.rand() - 1) * bound).to(site.weight.dtype)


def uniform_fan_in(site: Site) -> Tensor:
    """Starts uniformly in ±1/√fan-in, the active inputs of each output being its fan-in.

    Reference: the default of torch's linear and convolution layers, with the fan-in of Evci et al. 2022
    ("Gradient flow in sparse neural networks and how lottery tickets win").
    """
    return ((2 * site.rand() - 1) * _fan_in(site) ** -0.5).to(site.weight.dtype)


@dataclass(frozen=True)
class NormalFanIn:
    """Starts normal with mean 0 and variance ``gain``² / fan-in, the active inputs of each output being its fan-in.

    Raises:
        SettingError: The gain is negative or infinite.

    Reference: Evci et al. 2022 ("Gradient flow in sparse neural networks and how lottery tickets win"), after He
    et al. 2015, whose gain is √2 for a layer before a ReLU.
    """

    gain: float = 2**0.5

    def __post_init__(self) -> None:
        allowed = "a number, 0 or more"
        remedy = "√2 suits a layer before a ReLU."
        require(0 <= self.gain < float("inf"), "gain", "NormalFanIn", allowed=allowed, given=self.gain, remedy=remedy)

    def __call__(self, site: Site) -> Tensor:
        shape, dtype = site.weight.shape, torch.float32
        z = torch.randn(shape, generator=site.generator, dtype=dtype, device="cpu").to(site.weight.device)
        return (z * self.gain * _fan_in(site) ** -0.5).to(site.weight.dtype)


def stored(site: Site) -> Tensor:
    """Starts from the weight itself: under a method's dense storage it resumes the value it had under the mask.

    Without such storage the weights under a mask are zero, and this is ``zeros``. Not a copy.
    """
    return site.weight


def _fan_in(site: Site) -> Tensor:
    """Counts the active inputs of each output, 1 at least; (O, 1, ..., 1), in single precision."""
    num_O = site.mask.flatten(1).sum(dim=1).clamp(min=1).float()
    return num_O.view(-1, *(1,) * (site.mask.dim() - 1))

"""What a weight starts from when it grows: functions from a site to values of the weight's shape."""

from collections.abc import Callable

import torch
from torch import Tensor

from dstlib.masking.site import Site

GrownInit = Callable[[Site], Tensor]


def zeros(site: Site) -> Tensor:
    """Zero: the output of the network does not change at an update, but for what was dropped."""
    return torch.zeros_like(site.weight)


def uniform_fan_out(site: Site) -> Tensor:
    """Uniform in ±√(6 / number of outputs).

    Reference: Mocanu et al. 2018 (SET).
    """
    bound = (6 / site.weight.shape[0]) ** 0.5
    return ((2 * site.rand() - 1) * bound).to(site.weight.dtype)

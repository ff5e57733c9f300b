"""Factors of first weights, by which a sparse layer begins at the scale of the dense one: functions of its mask.

Shapes: O out, I in, K kernel taps.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

InitScale = Literal["fan_in", "density"]


def fan_in_factor(mask: Tensor) -> Tensor:
    """Returns √(all inputs / active inputs) of each output, (O, I, *K) → (O, 1, ..., 1); 1 where none is active.

    With inputs of one scale, independent weights of mean zero and this factor, each output has the variance that it
    has in the dense layer, however few inputs it is left with.

    Reference: Evci et al. 2022, Gradient flow in sparse neural networks and how lottery tickets win, AAAI, whose
    program draws the weights of each output anew, with the variance of its active inputs.

    >>> fan_in_factor(torch.tensor([[True, False, False, False], [True, True, True, True]]))
    tensor([[2.],
            [1.]])
    """
    num_O = mask.flatten(1).sum(dim=1)
    factor_O = (mask[0].numel() / num_O.clamp(min=1).float()).sqrt()
    return torch.where(num_O > 0, factor_O, 1.0).view(-1, *(1,) * (mask.dim() - 1))


def density_factor(mask: Tensor) -> Tensor:
    """Returns 1 / √density of a mask (O, I, *K), one number for all of the layer; 1 where none is active.

    Reference: Dey et al. 2024, Sparse maximal update parameterization, NeurIPS (SμPar): the variance of hidden weights
    goes with 1 / density. The program of Evci et al. 2022 has it, too, as another choice.

    >>> density_factor(torch.tensor([[True, False, False, False], [True, False, False, False]]))
    tensor(2.)
    """
    num = mask.sum()
    return torch.where(num > 0, (mask.numel() / num.clamp(min=1).float()).sqrt(), 1.0)


INIT_SCALES: Mapping[InitScale, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"fan_in": fan_in_factor, "density": density_factor}
)

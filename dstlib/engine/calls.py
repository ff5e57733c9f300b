"""Whether and how to call a kernel: past torch's dispatcher where nothing is recorded, which saves more than it costs.

The value of a map with a norm is, for autograd, what its readers see: gradients are those of the activated map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dstlib.engine.library import Kernels, kernels
from dstlib.engine.maps import Norm


def is_plain(*tensors: Tensor) -> bool:
    """Whether the tensors hold numbers and nobody records what becomes of them: neither autograd nor a compiler.

    >>> is_plain(torch.zeros(1)), is_plain(torch.zeros(1, requires_grad=True))
    (True, False)
    """
    if torch.compiler.is_compiling():
        return False
    records = torch.is_grad_enabled()
    return all(type(x) in (Tensor, nn.Parameter) and not (records and x.requires_grad) for x in tensors)


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The kernels, where there are any and they can read these tensors; None where torch has to do."""
    found = kernels()
    readable = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    return found if readable else None


def flat(norm: Norm | None) -> tuple[list[Tensor], float]:
    """A norm as operators take it: [scale, offset] or nothing, and the slope.

    >>> flat(None)
    ([], 1.0)
    """
    return ([norm[0], norm[1]], norm[2]) if norm else ([], 1.0)


def norm_of(tensors: Sequence[Tensor], slope: float) -> Norm | None:
    """The reverse of :func:`flat`."""
    return (tensors[0], tensors[1], slope) if tensors else None

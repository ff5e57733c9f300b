"""First masks from what each weight is multiplied by, one weight after the other, in the order of the forward.

Shapes: O outputs, I inputs, *K kernel taps, N = I·K; G groups, U units per group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dstlib.masking.granularity import Granularity
from dstlib.masking.selection import select_top
from dstlib.masking.update import unit_mask, unit_score

# from the matrices, by name, of all sparse weights, by name, in their memory, to one weight after the other and what is
# known of the inputs of its matrices: None if none reach it any more
Looks = Callable[[Mapping[str, Mapping[str, Tensor]]], Iterator[tuple[str, Mapping[str, Tensor | None]]]]
# from a matrix, what is known of its inputs, and the number of units to keep in each group to a mask and the weights
Prune = Callable[[Tensor, Tensor, Granularity, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class InTurn:
    """First masks from what each weight is multiplied by, as a method's ``init``.

    ``looks`` maps the matrices (O, I, *K) of all sparse weights to one weight after the other, each with what is known
    of the inputs of its matrices: before it is asked for the next one, the one before is pruned. ``prune`` chooses the
    mask of a matrix, and may move its weights. Each keeps the number of units that its own density asks for.
    :mod:`dstlib.at_init` makes these from a model.
    """

    name: str
    looks: Looks
    prune: Prune


def best_units(score: Tensor, granularity: Granularity, num_kept: int | Tensor) -> Tensor:
    """Marks the ``num_kept`` highest units of each group, a number or one per group, by scores of a weight's shape.

    >>> from dstlib.masking import FanIn
    >>> best_units(torch.tensor([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]]), FanIn(), 1)
    tensor([[False,  True, False],
            [ True, False, False]])
    """
    score_GU = unit_score(score, score.shape, granularity)
    num_G = torch.as_tensor(num_kept, device=score.device).expand(len(score_GU))
    best_GU = select_top(score_GU, num_G, among_GU=torch.ones_like(score_GU, dtype=torch.bool))
    return unit_mask(best_GU, granularity, score.shape)


def places(score: Tensor) -> Tensor:
    """Scores by the place within an output: the highest of N scores 1, the lowest 1/N; ties go to the lower index.

    The best of a whole weight are as many in each output then, but for one where that does not divide.

    >>> places(torch.tensor([[1.0, 3.0], [90.0, 80.0]]))
    tensor([[0.5000, 1.0000],
            [1.0000, 0.5000]])
    """
    score_ON = score.flatten(1)
    best_first_ON = score_ON.argsort(dim=1, descending=True, stable=True)
    steps_N = torch.arange(score_ON.shape[1], device=score.device)
    by_place_ON = (1 - steps_N / score_ON.shape[1]).expand_as(best_first_ON)
    return torch.empty_like(by_place_ON).scatter(1, best_first_ON, by_place_ON).view(score.shape)

"""Masks at initialisation that rank all weights of a model together, from one look at it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dstlib.masking.allocation import global_units
from dstlib.masking.budget import Allocator

Ranking = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class AtInit:
    """Scores of all sparse weights at once, in place of a method's ``init``; how many each keeps follows from them.

    ``scores`` maps the parameters, with zeros where units are gone already, to a score for each entry; None for
    a parameter that it has nothing to say of, which is an error. Over ``rounds`` the density falls
    geometrically to the target, and scores are taken anew each time. What ``allocate`` gives each weight is its
    number from then on. :mod:`dstlib.at_init` makes these from a model.
    """

    name: str
    scores: Ranking
    rounds: int = 1
    allocate: Allocator = global_units


def falling(num_all: int, num_last: int, rounds: int) -> list[int]:
    """Units left after each round, a geometric sequence that ends exactly at ``num_last``.

    >>> falling(1000, 10, 2)
    [100, 10]
    """
    ratio = num_last / num_all
    return [max(round(num_all * ratio ** (k / rounds)), num_last) for k in range(1, rounds)] + [num_last]

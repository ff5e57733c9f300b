"""What a fast layer is: a layer type, its fast form, and what stands in the way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class FastLayer:
    """A layer type and its fast form.

    ``obstacle`` says of a layer of this ``kind`` why it has none, in words that follow "plain: ", and returns None of
    one that ``make`` can make it of. The fast form takes what the layer takes, and holds its very parameters under the
    same names.
    """

    kind: type[nn.Module] | UnionType
    obstacle: Callable[[Any], str | None]
    make: Callable[[Any], nn.Module]


@runtime_checkable
class FollowsMask(Protocol):
    """A fast layer that computes with the active part of a weight alone.

    ``weight`` is the parameter; ``set_mask`` takes a mask of its shape, True = active, each time that it has changed;
    ``dense_gradient`` is set before each pass: whether it is to give the gradients of the inactive part too.
    """

    dense_gradient: bool

    @property
    def weight(self) -> Tensor:
        """The weight whose mask the layer follows."""
        ...

    def set_mask(self, mask: Tensor) -> None:
        """Follows a mask of the weight that has changed."""
        ...


def three(sizes: int | Sequence[int]) -> tuple[int, int, int]:
    """Returns sizes along depth, height and width, of what has one for all, or two, being flat along depth.

    >>> three(2), three((2, 2))
    ((2, 2, 2), (1, 2, 2))
    """
    depth, height, width = (sizes,) * 3 if isinstance(sizes, int) else ([1] * 3 + list(sizes))[-3:]
    return depth, height, width

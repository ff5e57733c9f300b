"""Granularities: what is kept or dropped as one, a weight folded into groups × units × elements.

Shapes: O out, I in, K all kernel taps (any number of axes, also none); G groups, U units per group, E
elements per unit. Units compete within their group; the elements of a unit share its fate. Everything else
in this package sees (G, U, E) only, so every method works at every granularity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor

from dstlib.errors import SettingError, require


@runtime_checkable
class Granularity(Protocol):
    """What is kept or dropped as one: two exact inverses, ``fold`` and ``unfold``."""

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (G, U, E).

        Raises:
            SettingError: The shape does not divide.
        """

    def unfold(self, x_GUE: Tensor, shape: torch.Size) -> Tensor:
        """Turns (G, U, E) back into (O, I, *K), which is ``shape``."""


def folded_shape(granularity: Granularity, shape: Sequence[int]) -> torch.Size:
    """Returns (G, U, E) of a weight of a shape (O, I, *K), without its values.

    Raises:
        SettingError: The shape does not divide.

    >>> tuple(folded_shape(Kernel(), (4, 3, 5, 5)))
    (1, 12, 25)
    """
    return granularity.fold(torch.empty(shape, device="meta")).shape


class _InOrder:
    """Units whose weights, one after the other, are in the order of memory."""

    def unfold(self, x_GUE: Tensor, shape: torch.Size) -> Tensor:
        """Inverts ``fold``."""
        return x_GUE.reshape(shape)


@dataclass(frozen=True)
class Element(_InOrder):
    """Each weight for itself, all competing: unstructured sparsity.

    >>> tuple(Element().fold(torch.zeros(4, 3, 5, 5)).shape)
    (1, 300, 1)
    """

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (1, O·I·K, 1)."""
        return rearrange(x_OIK, "o i ... -> 1 (o i ...) 1")


@dataclass(frozen=True)
class Kernel(_InOrder):
    """One connection between an input and an output channel, with all its taps.

    Reference: Wu et al. 2024 (E2ENet), DSFF.

    >>> tuple(Kernel().fold(torch.zeros(4, 3, 5, 5)).shape)
    (1, 12, 25)
    """

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (1, O·I, K)."""
        return rearrange(x_OIK, "o i ... -> 1 (o i) (...)")


@dataclass(frozen=True)
class Channel(_InOrder):
    """A whole output channel (a row of a linear layer).

    >>> tuple(Channel().fold(torch.zeros(4, 3, 5, 5)).shape)
    (1, 4, 75)
    """

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (1, O, I·K)."""
        return rearrange(x_OIK, "o i ... -> 1 o (i ...)")


@dataclass(frozen=True)
class Block:
    """A rectangle of ``out`` output channels × ``into`` input channels, with all taps.

    Raises:
        SettingError: One of them is less than 1.

    >>> tuple(Block(2, 4).fold(torch.zeros(6, 8, 3)).shape)
    (1, 6, 24)
    """

    out: int
    into: int

    def __post_init__(self) -> None:
        given = (self.out, self.into)
        remedy = "Pass Block(4, 4), say."
        require(min(given) >= 1, "out and into", "Block", allowed="1 or more", given=given, remedy=remedy)

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (1, O/out · I/into, out·into·K)."""
        _check_divides(x_OIK.shape[0], self.out, f"output channels for {self}")
        _check_divides(x_OIK.shape[1], self.into, f"input channels for {self}")
        return rearrange(x_OIK, "(o p) (i q) ... -> 1 (o i) (p q ...)", p=self.out, q=self.into)

    def unfold(self, x_GUE: Tensor, shape: torch.Size) -> Tensor:
        """Inverts ``fold``."""
        x = rearrange(x_GUE, "1 (o i) (p q k) -> (o p) (i q) k", o=shape[0] // self.out, p=self.out, q=self.into)
        return x.reshape(shape)


@dataclass(frozen=True)
class FanIn(_InOrder):
    """Weights of one output compete among themselves: each output keeps the same number of inputs.

    Reference: Lasby et al. 2024 (SRigL), constant fan-in.

    >>> tuple(FanIn().fold(torch.zeros(4, 3, 5, 5)).shape)
    (4, 75, 1)
    """

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (O, I·K, 1)."""
        return rearrange(x_OIK, "o i ... -> o (i ...) 1")


@dataclass(frozen=True)
class SharedFanIn:
    """Outputs in groups of ``out``, one after the other, read the same inputs, each with weights of its own.

    A unit is what a group has of one input, at one tap; units of a group compete, and all groups keep the same number.

    Raises:
        SettingError: ``out`` is less than 1.

    Reference: Ullah et al. 2026 (HASTE), group-shared fixed fan-in. Its groups are of labels that resemble each other:
    order the outputs so.

    >>> tuple(SharedFanIn(2).fold(torch.zeros(4, 3, 5, 5)).shape)
    (2, 75, 2)
    """

    out: int

    def __post_init__(self) -> None:
        remedy = "Pass SharedFanIn(16), say."
        require(self.out >= 1, "out", "SharedFanIn", allowed="1 or more", given=self.out, remedy=remedy)

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (O/out, I·K, out)."""
        _check_divides(x_OIK.shape[0], self.out, f"output channels for {self}")
        return rearrange(x_OIK, "(o p) i ... -> o (i ...) p", p=self.out)

    def unfold(self, x_GUE: Tensor, shape: torch.Size) -> Tensor:
        """Inverts ``fold``."""
        return rearrange(x_GUE, "o n p -> (o p) n").reshape(shape)


@dataclass(frozen=True)
class Diagonal:
    """A diagonal that goes on at the other side, with all taps: of as many entries as the shorter side is long.

    Where there are more inputs than outputs, diagonal d holds the weights from input (o + d) mod I to each output o;
    else those from each input i to output (i + d) mod O. All of them compete; any shape folds.

    Reference: Tyagi et al. 2025 (DynaDiag), whose program numbers them so.

    >>> x = torch.tensor([[0, 1, 2], [10, 11, 12]])
    >>> Diagonal().fold(x).squeeze(0)
    tensor([[ 0, 11],
            [ 1, 12],
            [ 2, 10]])
    """

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (1, max(O, I), min(O, I)·K)."""
        x_OIK = x_OIK.reshape(*x_OIK.shape[:2], -1)
        x_SLK = x_OIK if x_OIK.shape[0] < x_OIK.shape[1] else x_OIK.transpose(0, 1)
        return rearrange(_slanted(x_SLK, 1), "s l k -> 1 l (s k)")

    def unfold(self, x_GUE: Tensor, shape: torch.Size) -> Tensor:
        """Inverts ``fold``."""
        num_out, num_in = shape[:2]
        x_SLK = _slanted(rearrange(x_GUE, "1 l (s k) -> s l k", s=min(num_out, num_in)), -1)
        return (x_SLK if num_out < num_in else x_SLK.transpose(0, 1)).reshape(shape)


@dataclass(frozen=True)
class NM:
    """``n`` of every ``m`` consecutive inputs stay active (2:4 on recent GPUs); the sparsity is 1 - n/m.

    Raises:
        SettingError: Not 1 ≤ n ≤ m.

    >>> tuple(NM(2, 4).fold(torch.zeros(6, 8, 3, 3)).shape)
    (108, 4, 1)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        given = (self.n, self.m)
        require(1 <= self.n <= self.m, "n and m", "NM", allowed="1 ≤ n ≤ m", given=given, remedy="Pass NM(2, 4), say.")

    def fold(self, x_OIK: Tensor) -> Tensor:
        """Turns (O, I, *K) into (O · I/m · K, m, 1)."""
        _check_divides(x_OIK.shape[1], self.m, f"input channels for {self}")
        return rearrange(x_OIK, "o (i m) ... -> (o i ...) m 1", m=self.m)

    def unfold(self, x_GUE: Tensor, shape: torch.Size) -> Tensor:
        """Inverts ``fold``."""
        x = rearrange(x_GUE, "(o i k) m 1 -> o (i m) k", o=shape[0], i=shape[1] // self.m)
        return x.reshape(shape)


def _slanted(x_SLK: Tensor, by: int) -> Tensor:
    """Turns row s round by s places, to the left (``by`` = 1) or back (-1), (S, L, K), S ≤ L: x[s, (l + by·s) mod L].

    Of rows that are written twice, each one is read a place further on: no index of each entry.
    """
    _, num_long, num_taps = x_SLK.shape
    twice = torch.cat([x_SLK, x_SLK], dim=1).contiguous()
    strides = ((2 * num_long + by) * num_taps, num_taps, 1)
    return twice.as_strided(x_SLK.shape, strides, 0 if by > 0 else num_long * num_taps)


def _check_divides(size: int, divisor: int, what: str) -> None:
    if size % divisor:
        where, allowed = f"a weight with {size} of them", f"a multiple of {divisor}"
        remedy = "Choose another granularity, or leave this weight out by exclude=."
        raise SettingError.of(f"number of {what}", where, allowed=allowed, given=size, remedy=remedy)

"""Which blocks of channels are connected, and the tables by which the GPU kernels walk them.

Shapes: O output channels, C input channels, G blocks of outputs, J blocks of inputs, K entries of a table, N columns
of a row, M chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from dstlib.engine.gpu.tables import Plan, make_plan, plan_tiles
from dstlib.errors import SettingError

LARGEST = 64
_SIZES = tuple(2**i for i in range(LARGEST.bit_length()))
_WHERE = "Blocks.of()"


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of ``size`` = (outputs, inputs) channels in which there is any connection.

    Every kernel visits whole blocks: (16, 16) and above suit the matrix units of a GPU best, (16, 1) shares each
    connection among 16 outputs. A finer mask than the blocks is covered by them; its zeros are then computed with.
    The last blocks may reach beyond the channels.

    >>> mask = torch.zeros(32, 64, 1, 3, 3, dtype=torch.bool)
    >>> mask[:16, 16:32] = True
    >>> blocks = Blocks.of(mask, (16, 16))
    >>> blocks.active.tolist(), blocks.density
    ([[False, True, False, False], [False, False, False, False]], 0.125)
    """

    active: Tensor  # (G, J) bool
    size: tuple[int, int]
    channels: tuple[int, int]  # O, C
    _plans: dict[tuple[tuple[int, ...], torch.device, bool], Plan] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, mask: Tensor, size: tuple[int, int]) -> "Blocks":
        """The blocks that cover the True entries of a mask (O, C, \\*taps)."""
        if len(size) != 2 or not all(extent in _SIZES for extent in size):
            allowed, remedy = f"two powers of two up to {LARGEST}", "Cover a mask of Block(48, 24) by (16, 8), say."
            raise SettingError.of("size", _WHERE, allowed=allowed, given=size, remedy=remedy)
        if mask.ndim < 2 or mask.dtype != torch.bool:
            given, remedy = f"{mask.dtype} {tuple(mask.shape)}", "Pass sparsifier.masks[name], or weight != 0."
            raise SettingError.of("mask", _WHERE, allowed="bool (O, C, *taps)", given=given, remedy=remedy)
        outputs, inputs = mask.shape[:2]
        out, into = size
        connected = mask.detach().reshape(outputs, inputs, -1).any(dim=2)
        whole = pad(connected, (0, -inputs % into, 0, -outputs % out))
        active = whole.unflatten(1, (-1, into)).unflatten(0, (-1, out)).any(dim=3).any(dim=1)
        return cls(active, (out, into), (outputs, inputs))

    @cached_property
    def density(self) -> float:
        """The share of blocks that are active: what there is to compute, relative to a dense layer."""
        return float(self.active.float().mean())

    @property
    def cover(self) -> Tensor:
        """The connections (O, C) inside active blocks."""
        out, into = self.size
        outputs, inputs = self.channels
        return self.active.repeat_interleave(out, 0).repeat_interleave(into, 1)[:outputs, :inputs]

    def plan(self, shifts: Sequence[int], device: torch.device, *, tiled: bool = False) -> Plan:
        """The kernels' tables on a device, made once; groups of input channels move by ``shifts`` along depth.

        ``tiled``: for the kernels that compute tiles, which take blocks of multiples of 16.
        """
        key = (tuple(shifts), device, tiled)
        if key not in self._plans:
            make = plan_tiles if tiled else make_plan
            self._plans[key] = make(self.active.cpu(), self.size, self.channels, key[0]).to(device)
        return self._plans[key]

"""What an E2ENet is made of, as one value.

Triples are (depth, height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, get_args

from dstlib.axes import AXES, Axis, Triple
from dstlib.errors import require

ShiftKind = Literal["fixed", "interpolated", "rounded"]
KINDS = get_args(ShiftKind)


@dataclass(frozen=True, kw_only=True)
class E2ENetConfig:
    """The shape of an E2ENet; the defaults are the paper's network for AMOS.

    - ``num_classes``: the channels of each head. The published counts take the foreground classes only (15
      for AMOS); training takes them and the background, one more.
    - ``channels``: one number per level, finest first. L levels make L · (L - 1) / 2 fusion nodes.
    - ``strides``: from each level to the next coarser one, so L - 1 of them.
    - ``kernel_size``: of every convolution before which the channels are shifted.
    - ``outer_kernel_size``: if given, the kernel of the encoder and of the last diagonal of fusion nodes,
      which are then not shifted: the paper's variant with 3×3×3 kernels there.
    - ``shift``: how far each group of channels moves along ``shift_axis`` before a convolution, in voxels;
      None for no shift. See :func:`dstlib.layers.shift.shift`.
    - ``shift_kind``: "fixed" moves by ``shift`` for good. "interpolated" and "rounded" learn it: every
      convolution has offsets of its own, one per group of channels, that start at ``shift``; they move by
      fractions of a voxel, or by the nearest whole number. The offsets are parameters (vectors, hence never
      sparse, and counted). Weight decay pulls them to 0 as it does any other parameter. See
      :func:`dstlib.layers.shift.learned_shift`.
    - ``heads``: how many of the finest levels have a head; at most L - 1.

    Raises:
        SettingError: A setting is out of range, or does not fit the number of levels.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024, arXiv:2312.04727). Its text starts with stride (1, 2, 2);
    all its published counts belong to (2, 2, 2) throughout, the default here. A learned shift is what the
    paper leaves to future work.

    >>> E2ENetConfig(channels=(16, 32, 64), strides=((1, 2, 2), (2, 2, 2)), heads=2).divisor
    (2, 4, 4)
    >>> E2ENetConfig(channels=(16, 32), strides=((2, 2, 2),), heads=4)
    Traceback (most recent call last):
        ...
    dstlib.errors.SettingError: heads of E2ENetConfig: expected a whole number from 1 up, less than the \
number of channels, got 4. The coarsest level has no head.
    """

    in_channels: int = 1
    num_classes: int = 15
    channels: tuple[int, ...] = (48, 96, 192, 320, 320, 320)
    strides: tuple[Triple, ...] = ((2, 2, 2),) * 5
    kernel_size: Triple = (1, 3, 3)
    outer_kernel_size: Triple | None = None
    shift: tuple[int, ...] | None = (-1, 0, 1)
    shift_axis: Axis = "depth"
    shift_kind: ShiftKind = "fixed"
    heads: int = 4

    def __post_init__(self) -> None:
        edges, outer, shift = len(self.channels) - 1, self.outer_kernel_size, self.shift
        count, odd = "a whole number from 1 up", "three odd numbers from 1 up"
        widths = "two or more whole numbers from 1 up"
        triples = "one triple of whole numbers from 1 up for each of channels but the first"
        kinds = f"{' or '.join(KINDS)}, and fixed where shift is None"
        has_levels = edges >= 1 and are_counts(self.channels)
        has_strides = len(self.strides) == edges and all(map(is_triple, self.strides))
        is_outer = outer is None or _is_kernel(outer)
        is_shift = shift is None or (len(shift) > 0 and all(type(size) is int for size in shift))
        is_kind = self.shift_kind in (KINDS if shift is not None else ("fixed",))
        has_heads = are_counts([self.heads]) and self.heads <= edges
        checks = (
            ("in_channels", are_counts([self.in_channels]), count, "Count the modalities of an image."),
            ("num_classes", are_counts([self.num_classes]), count, "Count the channels of a head."),
            ("channels", has_levels, widths, "Give the width of each level, finest first."),
            ("strides", has_strides, triples, "Give the stride from each level to the next."),
            ("kernel_size", _is_kernel(self.kernel_size), odd, "Flat across depth is (1, 3, 3)."),
            ("outer_kernel_size", is_outer, f"None, or {odd}", "The paper's variant has (3, 3, 3)."),
            ("shift", is_shift, "None, or at least one whole number of voxels", "The paper's is (-1, 0, 1)."),
            ("shift_axis", self.shift_axis in AXES, " or ".join(AXES), "Name the axis to shift along."),
            ("shift_kind", is_kind, kinds, "A learned shift starts from the sizes in shift."),
            ("heads", has_heads, f"{count}, less than the number of channels", "The coarsest level has no head."),
        )
        for name, holds, allowed, remedy in checks:
            require(holds, name, "E2ENetConfig", allowed=allowed, given=getattr(self, name), remedy=remedy)

    @property
    def divisor(self) -> Triple:
        """What depth, height and width of the input must be multiples of: the product of the strides."""
        depth, height, width = (prod(steps) for steps in zip(*self.strides, strict=True))
        return depth, height, width


def are_counts(numbers: Sequence[int]) -> bool:
    """Returns whether all are whole numbers from 1 up."""
    return all(type(number) is int and number >= 1 for number in numbers)


def is_triple(numbers: object) -> bool:
    """Returns whether these are three whole numbers from 1 up."""
    return isinstance(numbers, Sequence) and len(numbers) == 3 and are_counts(numbers)


def _is_kernel(size: Sequence[int]) -> bool:
    return is_triple(size) and all(extent % 2 == 1 for extent in size)


AMOS = E2ENetConfig()
BRATS = replace(AMOS, in_channels=4, num_classes=3)
BTCV = replace(AMOS, num_classes=13)

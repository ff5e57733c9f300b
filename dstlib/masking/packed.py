"""Masks between updates: one bit for each entry, spread to truth values where somebody looks."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

# times eight bytes of 0 and 1 in a word: their bits are the highest byte, the first in the lowest bit, none carried
_GATHER = 0x0102040810204080


@dataclass(eq=False)
class PackedMask:
    """A mask that may change, of a bit for each entry, in the order in which the entries of its weight lie in memory.

    ``bits`` are bytes, ceil(entries / 8) of them, the first entry in the lowest bit of the first. ``shape`` and
    ``stride`` are the weight's; what does not fill its memory, as a part of another tensor, is taken as a copy of it
    would lie. ``version`` is another one after each change.

    >>> packed = PackedMask.of(torch.tensor([[True, False, True], [False, False, True]]))
    >>> packed.bits, packed.num_active
    (tensor([37], dtype=torch.uint8), 3)
    >>> with packed.opened() as mask:
    ...     mask[1, 0] = True
    >>> packed.dense(), packed.version
    (tensor([[ True, False,  True],
            [ True, False,  True]]), 1)
    """

    bits: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    version: int = 0
    _open: Tensor | None = field(default=None, repr=False)
    _first: tuple[int, int] = field(default=(-1, 0), repr=False)  # of a version

    @classmethod
    def of(cls, mask: Tensor) -> "PackedMask":
        """Packs a boolean tensor."""
        return cls(_packed(mask), mask.shape, _own_stride(mask))

    @classmethod
    def full(cls, weight: Tensor) -> "PackedMask":
        """Returns the mask of a weight that is all active."""
        return cls.of(torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    @property
    def seen(self) -> Tensor:
        """The tensor in which a change shows."""
        return self.bits

    @property
    def num_active(self) -> int:
        """Counts the active entries."""
        return int(self.current().count_nonzero())

    @property
    def is_full(self) -> bool:
        """Whether all entries are active."""
        return self.num_active == self.numel

    @property
    def first_word(self) -> int:
        """The first entry of the first 64 bits of which one is not set, or those at the end; none before is outside."""
        version, first = self._first
        if version != self.version:
            first = 64 * (int((self.bits != 255).byte().argmax()) // 8)
            self._first = self.version, first
        return first

    @property
    def is_open(self) -> bool:
        """Whether the mask is being written, and the bits are still those from before."""
        return self._open is not None

    @property
    def numel(self) -> int:
        """Counts all entries."""
        return self.shape.numel()

    def dense(self) -> Tensor:
        """Returns the mask as truth values, as a tensor of the caller's own."""
        return _unpacked(self) if self._open is None else self._open.clone()

    def current(self) -> Tensor:
        """Returns the mask as truth values to be read now: where it is being written, the very tensor."""
        return _unpacked(self) if self._open is None else self._open

    @contextmanager
    def opened(self) -> Iterator[Tensor]:
        """Yields the mask as truth values to be written; they are packed when the outermost of these contexts ends."""
        outer = self._open
        mask = self._open = self.current()
        try:
            yield mask
        finally:
            self._open = outer
            self.version += 1
            if outer is None:
                self.bits = _packed(mask)

    def write(self, mask: Tensor) -> None:
        """Takes over a boolean tensor of the mask's shape."""
        with self.opened() as own:
            own.copy_(mask)

    def follow(self, weight: Tensor) -> None:
        """Goes to where a weight is now, and to the order in which it lies there."""
        if self.bits.device != weight.device:
            self.bits = self.bits.to(weight.device)
            self.version += 1
        if not self.lies_as(weight):
            mask = torch.empty_like(weight, dtype=torch.bool, requires_grad=False).copy_(self.current())
            self.stride, self.bits = _own_stride(mask), _packed(mask)
            self.version += 1

    def lies_as(self, x: Tensor) -> bool:
        """Whether a tensor of the mask's shape has its entries in the mask's order, one after the other in memory.

        >>> mask = PackedMask.of(torch.ones(2, 3, dtype=torch.bool))
        >>> mask.lies_as(torch.zeros(2, 3)), mask.lies_as(torch.zeros(3, 2).t()), mask.lies_as(torch.zeros(2, 4)[:, 1:])
        (True, False, False)
        """
        if (stride := x.stride()) == self.stride:
            return True
        return all(a == b or n == 1 for a, b, n in zip(stride, self.stride, self.shape, strict=True))

    def copy(self) -> "PackedMask":
        """Returns another mask that is the same now."""
        return self.like(self.current())

    def like(self, mask: Tensor) -> "PackedMask":
        """Packs a boolean tensor of the mask's shape in its order, on its device."""
        return PackedMask.of(torch.empty_like(self.current()).copy_(mask))


class Masks(Mapping[str, Tensor]):
    """Masks by the names of their weights, each made when it is asked for, as it is at that moment.

    >>> packed = {"weight": PackedMask.of(torch.tensor([[True, False]]))}
    >>> masks = Masks(packed)
    >>> packed["weight"].write(torch.tensor([[False, True]]))
    >>> masks["weight"], list(masks)
    (tensor([[False,  True]]), ['weight'])
    """

    def __init__(self, held: Mapping[str, PackedMask | Callable[[], PackedMask]]) -> None:
        self._held = dict(held)

    @property
    def packed(self) -> dict[str, PackedMask]:
        """The masks in bits: those that weights have, which change, and others as they are now."""
        return {name: self._packed(name) for name in self._held}

    def __getitem__(self, name: str) -> Tensor:
        return self._packed(name).dense()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _packed(self, name: str) -> PackedMask:
        held = self._held[name]
        return held if isinstance(held, PackedMask) else held()

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor]]]:
        """Is saved and sent as the masks of this moment, in a dictionary that ``torch.load`` takes for data alone."""
        return OrderedDict, (dict(self),)

    def __repr__(self) -> str:
        active = (f"{name!r}: {m.num_active:,} of {m.numel:,}" for name, m in self.packed.items())
        return f"Masks({', '.join(active)} active)"


def _packed(mask: Tensor) -> Tensor:
    """Returns the bits of a boolean tensor, in the order in which it lies in memory."""
    own = mask if _fills(mask) else torch.empty_like(mask).copy_(mask)
    num = own.numel()
    flat = own.as_strided((num,), (1,)).view(torch.uint8)
    num_bytes = -(-num // 8)
    if num % 8 or own.storage_offset() % 8:
        whole = flat.new_zeros(8 * num_bytes)
        whole[:num] = flat
        flat = whole
    return (flat.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def _unpacked(packed: PackedMask) -> Tensor:
    """Returns the truth values of bits."""
    words = _table(packed.bits.device).index_select(0, packed.bits.int())
    return words.view(torch.bool).as_strided(packed.shape, packed.stride)


@cache
def _table(device: torch.device) -> Tensor:
    """Returns eight truth values for each byte, as a word of 64 bits."""
    with torch.inference_mode(False):
        bits = torch.arange(256, dtype=torch.int64, device=device)[:, None] >> torch.arange(8, device=device) & 1
        return bits.to(torch.uint8).view(torch.int64)[:, 0]


def _own_stride(x: Tensor) -> tuple[int, ...]:
    """Returns the strides of a tensor, or those of a copy where it does not fill its memory."""
    stride: Sequence[int] = x.stride() if _fills(x) else torch.empty_like(x, device="meta").stride()
    return tuple(stride)


def _fills(x: Tensor) -> bool:
    """Whether the entries of a tensor lie one after the other in memory, in whichever order of its axes."""
    if x.is_contiguous():
        return True
    expected = 1
    for step, extent in sorted((step, extent) for step, extent in zip(x.stride(), x.shape, strict=True) if extent != 1):
        if step != expected:
            return False
        expected *= extent
    return True

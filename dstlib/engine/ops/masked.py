"""What weights and all that belongs to them hold outside of packed masks: counted, and written over.

In one pass over memory by the kernels, for tensors on the CPU that lie as their masks do; else by torch.
"""

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dstlib.engine.runtime import structs
from dstlib.engine.runtime.library import Kernels, check, kernels
from dstlib.masking.packed import PackedMask
from dstlib.masking.update import bit_patterns, zero_outside_each_
from dstlib.masking.update import count_outside as count_with_torch

_PLAIN = (Tensor, nn.Parameter)
_ALL = -1  # the bits of a number that may differ


def zero_outside_each(pairs: Iterable[tuple[Tensor, PackedMask]]) -> None:
    """Sets tensors to +0.0 outside their masks, in place; what is inside keeps its bits.

    >>> x = torch.tensor([1.5, -2.0, float("inf")])
    >>> zero_outside_each([(x, PackedMask.of(torch.tensor([True, False, False])))]); x
    tensor([1.5000, 0.0000, 0.0000])
    """
    fill_outside_each((x, mask, 0) for x, mask in pairs)


def fill_outside_each(triples: Iterable[tuple[Tensor, PackedMask, float]]) -> None:
    """Sets tensors to a number of their own outside their masks, in place; what is inside keeps its bits.

    A version counts on where something was written.

    >>> x = torch.tensor([1.5, -2.0])
    >>> fill_outside_each([(x, PackedMask.of(torch.tensor([True, False])), 0.5)]); x
    tensor([1.5000, 0.5000])
    """
    found = kernels()
    mine, jobs, others = [], [], []
    for x, mask, value in triples:
        if found is not None and _is_for_kernels(x, mask):
            mine.append(x)
            jobs.append(_job(x, mask, _bits_of(value, x.dtype), _ALL))
        else:
            others.append((x, mask, value))
    if found is not None and jobs:
        written = [x for x, num in zip(mine, _run(found, "masked_fill", jobs), strict=True) if num]
        if written:
            increment_version(written)
    if others:
        _fill_with_torch(others)


def glance_outside(triples: Iterable[tuple[Tensor, PackedMask, float]]) -> list[bool]:
    """Looks at one place outside each mask; returns which tensors have, or may have, something else than their number.

    >>> mask = PackedMask.of(torch.tensor([True, False, False]))
    >>> glance_outside([(torch.tensor([1.0, 0.0, 0.0]), mask, 0.0), (torch.tensor([1.0, 2.0, 0.0]), mask, 0.0)])
    [False, True]
    """
    found = kernels()
    jobs, answers = [], []
    for x, mask, value in triples:
        may_be_looked_at = found is not None and _is_for_kernels(x, mask)
        answers.append(None if may_be_looked_at else True)
        if may_be_looked_at:
            jobs.append(_job(x, mask, _bits_of(value, x.dtype), _ALL, only=mask.first_word))
    seen = iter(_run(found, "masked_count", jobs) if found is not None and jobs else ())
    return [next(seen) > 0 if answer is None else answer for answer in answers]


def count_outside(x: Tensor, mask: PackedMask) -> int:
    """Counts the entries of ``x`` that are not zero outside a mask; NaN and inf are not, -0.0 is.

    >>> count_outside(torch.tensor([1.5, -2.0, -0.0]), PackedMask.of(torch.tensor([True, False, False])))
    1
    """
    found = kernels()
    if found is None or not x.is_floating_point() or not _is_for_kernels(x, mask):
        return count_with_torch(x, mask.current())
    without_sign = (1 << (8 * x.element_size() - 1)) - 1
    (num,) = _run(found, "masked_count", [_job(x, mask, 0, without_sign)])
    return num


def _is_for_kernels(x: Tensor, mask: PackedMask) -> bool:
    return (
        type(x) in _PLAIN
        and x.is_cpu
        and mask.bits.is_cpu
        and not mask.is_open
        and x.layout is torch.strided
        and x.shape == mask.shape
        and mask.lies_as(x)
        and x.element_size() <= 8
        and x.data_ptr() != 0
        and not (x.is_inference() or x.is_neg())
    )


def _job(x: Tensor, mask: PackedMask, value: int, counts: int, only: int | None = None) -> tuple[int, ...]:
    """Returns the fields of a job: all of a tensor, or ``only`` the 64 numbers from one on."""
    first, num, width = only or 0, mask.numel, x.element_size()
    if only is not None:
        num = min(64, num - first)
    return x.data_ptr() + first * width, mask.bits.data_ptr() + first // 8, num, width, value, counts, 0, 0


def _run(found: Kernels, name: str, jobs: Sequence[tuple[int, ...]]) -> list[int]:
    """Runs a kernel over all; returns what it found in each."""
    array = (structs.Masked * len(jobs))(*jobs)
    problem = structs.MaskedEach(tensors=ctypes.addressof(array), num_tensors=len(jobs))
    check(getattr(found, name)(problem, torch.get_num_threads()), name)
    return [job.found for job in array]


def _bits_of(value: float, dtype: torch.dtype) -> int:
    return int(bit_patterns(torch.tensor(value, dtype=dtype))) if value else 0


def _fill_with_torch(triples: Sequence[tuple[Tensor, PackedMask, float]]) -> None:
    dense: dict[int, Tensor] = {}
    zeros = []
    for x, mask, value in triples:
        there = dense.setdefault(id(mask), mask.current())
        if value == 0:
            zeros.append((x, there))
        else:
            x.masked_fill_(~there.to(x.device), value)
    zero_outside_each_(zeros)

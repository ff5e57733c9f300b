"""Masks of replicas: they agree by construction, and this checks that they do."""

import json
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dstlib.errors import SettingError, StateError
from dstlib.sparsifier.state import MaskedWeight

PATIENCE = 10.0  # seconds
# How many sparsifiers of the same weights this process has made: twins must not be taken for each other.
_MADE: Counter[int] = Counter()


class Replicas:
    """Compares the masks of a model over the ranks that hold it, through the store that they found each other by.

    No collective: a rank that has no more data (``Join``), or that trains something of its own, keeps nobody
    waiting for long. Each rank leaves its checksums and reads those of the others; those that do not come within
    ``PATIENCE`` are waited for no more, but are compared whenever they come, by themselves.
    """

    def __init__(self, names: Sequence[str], group: ProcessGroup | None) -> None:
        tag = zlib.crc32("\n".join(names).encode())
        _MADE[tag] += 1
        self._group = group
        self._key = f"dstlib/{tag}/{_MADE[tag]}"
        self._num_checks = 0
        self._absent: set[int] = set()

    def check_equal(self, changed: Sequence[MaskedWeight]) -> None:
        """Checks that all ranks hold the same masks of these weights; does nothing without any, or with one process.

        Raises:
            StateError: Masks differ, on every rank: gradients were not reduced before the optimizer step, or ranks
                were given other seeds, masks or weights.
        """
        if not changed or not self._are_several():
            return
        mine = {m.weight.name: zlib.crc32(m.mask.cpu().contiguous().numpy().tobytes()) for m in changed}
        step = max(m.step for m in changed) + 1
        theirs = self._exchange(mine, step)
        differing = [name for name in mine if any(other.get(name) != mine[name] for other in theirs)]
        if differing or any(set(other) != set(mine) for other in theirs):
            raise StateError.of(
                "masks",
                f"{', '.join(differing) or 'some weights'} at step {step}",
                allowed=f"the same on all {dist.get_world_size(self._group)} ranks",
                given="different ones",
                remedy="Give every rank the same seed, masks=, weights and reduced gradients (DistributedDataParallel "
                "does the last two); if ranks train models of their own, pass process_group= to sparsify().",
            )

    def tell(self, mine: Mapping[str, int], step: int) -> list[dict[str, int]]:
        """Returns the numbers that the other ranks have for the same weights, and lets them have these."""
        return self._exchange(mine, step) if self._are_several() else []

    def average_(self, x: Tensor) -> Tensor:
        """Takes the mean of a tensor over the ranks, in place: a collective, for which all of them have to be here."""
        if self._are_several():
            dist.all_reduce(x, group=self._group)
            x /= dist.get_world_size(self._group)
        return x

    def check_size(self, name: str, before: int, now: int) -> None:
        """Checks that a compact weight has as many values as before, where ranks send its gradients to each other.

        Raises:
            SettingError: It has more or fewer: DistributedDataParallel has made its buckets, and loses the weight.
        """
        if before != now and self._are_several():
            raise SettingError.of(
                "storage",
                f"sparsify(), {name}",
                allowed='"masked", where ranks hold replicas and a method changes how many weights are active',
                given=f'"compact", {before:,} values before a mask update and {now:,} after',
                remedy="Leave storage= out, or choose a method of constant density; a rank that trains a model of its "
                "own passes process_group=.",
            )

    def _are_several(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_rank(self._group) >= 0 and dist.get_world_size(self._group) > 1

    def _exchange(self, mine: Mapping[str, int], step: int) -> list[dict[str, int]]:
        """Leaves what is mine, and returns what the other ranks have left for the same check."""
        rank, num_ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        group = self._group or dist.distributed_c10d._get_default_group()
        store = dist.distributed_c10d._get_process_group_store(group)
        self._num_checks += 1
        key = f"{self._key}/{self._num_checks}"
        store.set(f"{key}/{rank}", json.dumps(mine))
        others = set(range(num_ranks)) - {rank}
        self._absent = {other for other in self._absent if not store.check([f"{key}/{other}"])}
        late = {other for other in others - self._absent if not _comes(store, f"{key}/{other}")}
        if late:
            self._absent |= late
            warnings.warn(
                f"masks at step {step}: rank {', '.join(map(str, sorted(late)))} did not come to compare them within "
                f"{PATIENCE:g} s, and is waited for no more. If this rank trains alone, pass process_group= to "
                "sparsify(): the ranks that hold a replica, or a group of this rank only.",
                stacklevel=2,
            )
        if not self._absent:  # all have set this key, so they have read the last one
            store.delete_key(f"{self._key}/{self._num_checks - 1}/{rank}")
        there = (f"{key}/{other}" for other in sorted(others))
        return [json.loads(store.get(name)) for name in there if store.check([name])]


def _comes(store: Any, key: str) -> bool:
    """Waits for a key, by asking: to wait in the store itself would leave its complaint in the log."""
    deadline = time.monotonic() + PATIENCE
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True

"""Training on several devices: the rank of this process, and what all processes must agree on.

``torchrun --nproc-per-node 4 examples/e2enet_amos.py ...`` starts four processes; each draws its share of every
batch, and together they train as one would.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from dstlib.errors import StateError


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among ``num``; the first one leads: it alone writes files and prints."""

    rank: int = 0
    num: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mean(self, value: float, device: torch.device) -> float:
        """Returns the mean over all processes."""
        return self._sum(value, device) / self.num

    def average(self, tensor: Tensor) -> Tensor:
        """Returns the mean of a tensor over all processes, in the place of the given one."""
        if self.num > 1:
            distributed.all_reduce(tensor)
            tensor /= self.num
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Returns whether one of the processes says so."""
        return self._sum(float(flag), device) > 0

    def wait(self) -> None:
        """Waits until all processes have come here.

        Raises:
            StateError: One of them has ended.
        """
        if self.num == 1:
            return
        try:
            distributed.barrier()
        except RuntimeError as error:  # its own message says what happened
            given, remedy = "one that has ended", "Look for the message of the first process above."
            raise StateError.of("processes", "torchrun", allowed="all of them", given=given, remedy=remedy) from error

    def _sum(self, value: float, device: torch.device) -> float:
        if self.num == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return float(total)


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """Joins, within the block, the group that torchrun started, if it did; ``device`` is that of this process.

    >>> with process_group("cpu") as ranks:
    ...     ranks.leads, ranks.num
    (True, 1)
    """
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    # the others wait while the first one prepares the scans, which takes hours for a large set
    distributed.init_process_group(backend, timeout=timedelta(days=2))
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()

"""Batches drawn ahead: the same whether this process draws them, or others do while it trains."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dstlib.errors import DstlibError, require
from dstlib.workers import leave_signals_to_the_parent
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import PatchSettings, draw_batch

Batch = tuple[Tensor, Tensor]


def batches(
    cases: Sequence[Case],
    settings: PatchSettings,
    *,
    seed: int,
    start: int,
    stop: int,
    workers: int = 0,
    ranks: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Draws the batches of iterations ``start`` to ``stop - 1``, as :func:`draw_batch` draws them, in this order.

    ``workers`` processes draw them ahead, two each; with 0 this one does, when asked for the next. The batches
    do not depend on it. Closing the iterator, or dropping it, ends the workers.

    Raises:
        SettingError: ``workers`` is negative.
        DstlibError: See :func:`draw_batch`, also where a worker met it.

    >>> import numpy as np
    >>> case = Case("a", np.zeros((1, 4, 9, 9), np.float32), np.ones((4, 9, 9), np.uint8), (1.0, 1.0, 1.0))
    >>> [len(images) for images, _ in batches([case], PatchSettings(patch_size=(4, 8, 8)), seed=0, start=3, stop=5)]
    [2, 2]
    """
    remedy = "0 draws the batches in this process."
    require(workers >= 0, "workers", "batches()", allowed="a whole number from 0 up", given=workers, remedy=remedy)
    draws = _Draws(cases, settings, seed, ranks)
    iterations = range(start, stop)
    return _drawn_ahead(draws, iterations, workers) if workers and iterations else map(draws.draw, iterations)


@dataclass(frozen=True, eq=False)
class _Draws(Dataset[Batch | DstlibError]):
    """The batches of a training, by their iteration."""

    cases: Sequence[Case]
    settings: PatchSettings
    seed: int
    ranks: tuple[int, int]

    def draw(self, iteration: int) -> Batch:
        return draw_batch(self.cases, self.settings, seed=self.seed, iteration=iteration, ranks=self.ranks)

    def __getitem__(self, iteration: int) -> Batch | DstlibError:
        """Draws what a worker sends, labels as bytes: it goes through shared memory, which is scarce in containers."""
        try:
            images, labels = self.draw(iteration)
        except DstlibError as error:
            return error  # raised, it would arrive with a traceback for its message
        return images, labels.byte()


def _drawn_ahead(draws: _Draws, iterations: range, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        draws,
        batch_size=None,  # an item is a batch already
        sampler=iterations,
        num_workers=min(workers, len(iterations)),
        worker_init_fn=_begin,
        # A fork shares the cases, and those in memory-mapped files with all other processes; anything else pickles
        # them. OpenMP does not survive a fork with more than one thread, so workers have one.
        multiprocessing_context="fork",
        generator=torch.Generator(),  # it draws seeds for workers, which the global generator need not notice
    )
    for drawn in loader:
        if isinstance(drawn, DstlibError):
            raise drawn
        images, labels = drawn
        yield images, labels.long()


def _begin(worker: int) -> None:
    """Begins a worker in a group of its own: most schedulers address the whole group; the parent ends its workers."""
    os.setpgid(0, 0)
    leave_signals_to_the_parent()

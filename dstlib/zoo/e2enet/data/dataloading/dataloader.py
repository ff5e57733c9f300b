"""Batches drawn ahead: the same whether this process draws them, or others do while it trains."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dstlib.errors import DstlibError, require
from dstlib.workers import leave_signals_to_the_parent
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import draw_batch
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings

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
    remedy = "Pass 0 (--workers 0) to draw them in this process."
    require(workers >= 0, "workers", "the batches", allowed="a whole number from 0 up", given=workers, remedy=remedy)
    draw, iterations = partial(draw_batch, cases, settings, seed=seed, ranks=ranks), range(start, stop)
    if workers and iterations:
        return _drawn_ahead(_Sent(draw), iterations, workers)
    return (draw(iteration=iteration) for iteration in iterations)


@dataclass(frozen=True, eq=False)
class _Sent(Dataset[Batch | DstlibError]):
    """The batches as a worker sends them, by their iteration."""

    draw: Callable[..., Batch]

    def __getitem__(self, iteration: int) -> Batch | DstlibError:
        """Draws one, its labels as bytes: it goes through shared memory, which is scarce in containers."""
        try:
            images, labels = self.draw(iteration=iteration)
        except DstlibError as error:
            return error  # raised, it would arrive with a traceback for its message
        return images, labels.byte()


def _drawn_ahead(sent: _Sent, iterations: range, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        sent,
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

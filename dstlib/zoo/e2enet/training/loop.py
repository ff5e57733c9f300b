"""The training loop of the E2ENet recipes, by the settings alone dense, static or dynamic sparse; and Ctrl-C in it.

Shapes: B batch, C channels, K classes with the background, D, H, W depth, height, width in voxels.
"""

import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dstlib.bounds import is_out_of_memory
from dstlib.errors import DstlibError, SettingError
from dstlib.workers import loader_deaths
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.dataloading.dataloader import Batch, batches
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.inference.sliding_window import predicting
from dstlib.zoo.e2enet.training.loss import belonging, deep_supervision_loss
from dstlib.zoo.e2enet.training.search import Search, first_iteration, halves
from dstlib.zoo.e2enet.training.state import Training, as_trained, autocast, parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTICE = b"\nStopping after this iteration, to save a checkpoint. Once more to stop at once.\n"


def train(
    training: Training,
    cases: Sequence[Case],
    *,
    patches: PatchSettings,
    held_out: Sequence[Case] = (),
    save: Callable[[Training], None] = lambda training: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains to the end and returns True; once ``should_stop()``, only to the end of the iteration under way.

    ``save`` is called after each epoch, and before stopping. What iteration ``i`` draws, batch and dropout
    alike, is a function of the seed and ``i`` alone, so a training that is continued meets the same.

    Raises:
        DstlibError: The loss is not a finite number, or memory is out. Nothing is saved then.
    """
    settings, ranks = training.settings, training.ranks
    network, total = None, settings.num_iterations
    if training.iteration == 0:
        training.count_flows()
    drawn, start = _drawn(training, cases, patches), training.iteration
    bar = tqdm(total=total, initial=start, desc="train", unit="it", mininterval=1.0, disable=not ranks.leads)
    with bar, loader_deaths(), _memory_told():
        for (images, labels), for_search in drawn:
            if network is None:
                network = parallel(training, _on_device(images, training))
            loss = _iterate(training, network, images, labels)
            if training.search and for_search:
                _search(training, training.search, *for_search)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if training.iteration % settings.iterations == 0:
                _end_epoch(training, held_out, patches)
                save(training)
            if ranks.any(should_stop(), training.device):
                save(training)
                return False
    return True


@contextmanager
def _memory_told() -> Iterator[None]:
    """Tells in our words what torch says where a batch does not fit into memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        allowed, given = "a batch that fits into it", str(error).partition("\n")[0].rstrip(".") or "a larger one"
        remedy = "Choose a smaller --patch-size or --batch-size, or a narrower network."
        raise SettingError.of("memory", "the training", allowed=allowed, given=given, remedy=remedy) from error


def _drawn(training: Training, cases: Sequence[Case], patches: PatchSettings) -> Iterator[tuple[Batch, Batch | None]]:
    """Draws the batch of each iteration that is left, and the second one of those that search an architecture."""
    settings, ranks, start = training.settings, training.ranks, training.iteration
    share, workers, total = (ranks.rank, ranks.num), training.execution.workers, settings.num_iterations

    def draw(cases: Sequence[Case], start: int) -> Iterator[Batch]:
        return batches(cases, patches, seed=settings.seed, start=start, stop=total, workers=workers, ranks=share)

    if training.search is None:
        return zip(draw(cases, start), repeat(None))
    for_weights, for_search = halves(cases, settings.seed)
    first = max(start, first_iteration(settings))
    return zip(draw(for_weights, start), chain(repeat(None, first - start), draw(for_search, first)), strict=True)


def _iterate(training: Training, network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Makes one optimizer step with one batch, and returns the loss as the mean over the ranks."""
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    settings = training.settings
    as_trained(model)
    torch.manual_seed(hash((settings.seed, training.iteration, training.ranks.rank)) % 2**63)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(training.iteration // settings.iterations)
    optimizer.zero_grad(set_to_none=True)
    loss, value = _loss(training, network, images, labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if training.sparsifier:
        training.sparsifier.before_step()  # masks the gradients first: the norm to clip is of what trains
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    scaler.step(optimizer)
    scaler.update()
    training.iteration += 1
    training.loss_sum += value
    return value


def _search(training: Training, search: Search, images: Tensor, labels: Tensor) -> None:
    """Makes the step of the architecture that follows one of the weights."""
    settings = training.settings
    first = first_iteration(settings)
    progress = (training.iteration - 1 - first) / (settings.num_iterations - first)
    with search.thawed():
        # not through DDP, which would wait for gradients of the weights
        loss, _ = _loss(training, training.model, images, labels)
        search.step(loss + search.charge(images.shape, progress), training.scaler, training.ranks)


def _loss(training: Training, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Computes the loss of one batch, and its mean over the ranks as a number, which must be finite."""
    with autocast(training):
        logits = network(_on_device(images, training))
    device = training.device
    loss = deep_supervision_loss(logits, labels.to(device, non_blocking=True), training.labels)
    value = training.ranks.mean(float(loss.detach()), device)
    if not math.isfinite(value):
        rate = training.settings.learning_rate
        remedy = f"Lower the learning rate ({rate}) and look for odd intensities in the data; "
        remedy += "the last checkpoint is untouched."
        where = f"iteration {training.iteration + 1}"
        raise DstlibError.of("loss", where, allowed="a finite number", given=value, remedy=remedy)
    return loss, value


def _on_device(images: Tensor, training: Training) -> Tensor:
    images = images.to(training.device, non_blocking=True)
    return images.contiguous(memory_format=torch.channels_last_3d) if training.execution.channels_last else images


def _end_epoch(training: Training, held_out: Sequence[Case], patches: PatchSettings) -> None:
    settings, epoch = training.settings, training.iteration // training.settings.iterations
    rate, loss = settings.learning_rate_at(epoch - 1), training.loss_sum / settings.iterations
    row = {"epoch": epoch, "iteration": training.iteration, "learning_rate": rate, "loss": loss}
    if settings.val_iterations and held_out and training.ranks.leads:
        row["val_dice"] = validate(training, held_out, patches)
    if training.search:
        row["memory"] = training.search.memory_share((1, 1, *patches.patch_size))
    training.metrics.append(row)
    training.count_flows()
    training.loss_sum = 0.0


@torch.no_grad()
def validate(training: Training, held_out: Sequence[Case], patches: PatchSettings) -> float:
    """Computes the mean foreground Dice over patches of the held-out cases, always the same ones, pooled per class.

    It tells how the training goes, and is not the Dice of whole cases. Regions take the place of classes, and voxels
    that are ignored count nowhere. NaN where the patches show no class.

    Reference: the online evaluation of nnU-Net: one Dice per class from the voxels of all patches.
    """
    settings, counts = training.settings, np.zeros((2, 255), np.int64)
    drawn = batches(held_out, patches.plain(), seed=settings.seed, start=0, stop=settings.val_iterations)
    with predicting(training.predictor) as model, autocast(training):
        for images, labels in drawn:
            counts += _count(model(_on_device(images, training)), labels, training.labels)
    overlap, sizes = counts[:, counts[1] > 0]
    return float(np.mean(2 * overlap / sizes)) if len(sizes) else math.nan


def _count(logits: Tensor, labels: Tensor, meaning: Labels) -> NDArray[np.int64]:
    """Counts, of each class or region (2, 255), the voxels in answer and label, and those of either added up."""
    counted = labels != (meaning.ignored_number or -1)
    if meaning.regions is None:
        found, truth = (x[counted[:, 0]].numpy() for x in (logits.argmax(dim=1).cpu(), labels[:, 0]))
        both, *either = (np.bincount(x, minlength=256)[1:] for x in (truth[truth == found], found, truth))
        return np.stack([both, sum(either)])
    found_BK, truth_BK = (logits.float().sigmoid() > 1 / 2).cpu() & counted, belonging(labels, meaning) & counted
    both, *either = (x.sum((0, 2, 3, 4)).numpy() for x in (truth_BK & found_BK, found_BK, truth_BK))
    return np.pad(np.stack([both, sum(either)]), ((0, 0), (0, 255 - len(both))))


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Lets SIGINT (Ctrl-C), SIGTERM or SIGHUP only ask to stop within the block; the second one ends the process.

    Yields the question whether one came. To be entered in the main thread, as only that may handle signals.

    >>> with interruptible() as should_stop:
    ...     before = should_stop()
    ...     signal.raise_signal(signal.SIGINT)
    ...     before, should_stop()
    (False, True)
    """
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        came.append(number)
        os.write(2, NOTICE)  # unlike print, it may come in the middle of another print
        for each in heard:
            signal.signal(each, signal.SIG_DFL)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

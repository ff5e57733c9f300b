"""One training on CIFAR-10 for examples/cifar10.py and benchmarks/cifar10.py."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cifar10_data import NUM_CLASSES, Images, augmented, batch_indices, normalized
from cifar10_models import MODELS
from cifar10_settings import UPDATES, VARIANTS, Settings
from torch import nn
from torch.nn import functional

import dstlib
from dstlib.errors import require
from dstlib.files import make_folder, write_whole
from dstlib.masking import erk, uniform

DISTRIBUTIONS = {"erk": erk, "uniform": uniform}
PUBLISHED_DROP, PUBLISHED_STEPS = 30_000, 97_656


def learning_rate(settings: Settings, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step, from 0.

    >>> from cifar10_settings import PRESETS
    >>> rates = [learning_rate(PRESETS["published"], step, 97_656) for step in (0, 29_999, 30_000, 97_655)]
    >>> [round(rate, 6) for rate in rates]
    [0.1, 0.1, 0.02, 0.0008]
    """
    rising = settings.warmup * total_steps
    if step + 1 < rising:
        return settings.learning_rate * (step + 1) / rising
    if settings.schedule == "step":
        return settings.learning_rate * 0.2 ** (step * PUBLISHED_STEPS // (PUBLISHED_DROP * total_steps))
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (total_steps - rising)))


def method_of(settings: Settings, total_steps: int) -> dstlib.Method:
    """Returns the method as this run uses it: intervals are for long runs, so the same rule shortens all of them."""
    name, changed = VARIANTS.get(settings.method, (settings.method, {}))
    method = replace(dstlib.METHODS[name], **changed)
    if method.interval is not None:
        scaled = min(method.interval, max(1, total_steps // UPDATES))  # a share of the run, below 1, stays what it is
        method = replace(method, interval=settings.interval or scaled)
    return replace(method, distribution=DISTRIBUTIONS.get(settings.distribution, method.distribution))


def train(settings: Settings, images: Images, *, device: str = "cpu", show: bool = True) -> dict[str, Any]:
    """Trains one network and returns what there is to tell: settings, losses and accuracies by epoch, costs.

    ``show`` prints a line per epoch, below a progress bar where tqdm is installed. ``accuracy`` is that of the last
    step, never the best of several.

    Raises:
        DstlibError: The settings do not fit the model or the images, or the loss is not a number.
    """
    torch.manual_seed(settings.seed)
    model = MODELS[settings.model](NUM_CLASSES).to(device, memory_format=torch.channels_last)
    images = images.to(device, first=settings.images)
    ends = _ends(settings, len(images.train))
    optimizer = _optimizer(model, settings)
    sparsifier = _sparsified(model, optimizer, settings, ends[-1])
    started, started_cpu, epochs = time.perf_counter(), time.process_time(), []
    for epoch, (first, end) in enumerate(pairwise([0, *ends]), 1):
        losses = []
        for step in _with_bar(range(first, end), f"epoch {epoch} of {len(ends)}", show=show):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, ends[-1])
            chosen = batch_indices(len(images.train), settings.batch_size, seed=settings.seed, step=step).to(device)
            x = normalized(augmented(images.train[chosen], crop=settings.crop, seed=settings.seed, step=step))
            loss = functional.cross_entropy(model(x), images.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean_loss, accuracy = float(torch.stack(losses).mean()), accuracy_on(model, images)
        _check_loss(mean_loss, epoch)
        epochs.append({"epoch": epoch, "step": end, "loss": mean_loss, "accuracy": accuracy})
        if show:
            print(f"epoch {epoch:>3}  loss {mean_loss:.3f}  test accuracy {accuracy:6.2%}", flush=True)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    told = {
        "settings": asdict(settings),
        "data": images.name,
        "num_steps": ends[-1],
        "interval": sparsifier.plan.method.interval if sparsifier else None,
        "num_train": len(images.train),
        "num_test": len(images.test),
    }
    return {**told, **_costs(model, sparsifier), **seconds, "accuracy": epochs[-1]["accuracy"], "epochs": epochs}


@torch.no_grad()
def accuracy_on(model: nn.Module, images: Images) -> float:
    """Returns the share of test images that the model names rightly; the model is left in training mode."""
    model.eval()
    right = sum(
        int((model(normalized(x)).argmax(1) == y).sum())
        for x, y in zip(images.test.split(500), images.test_labels.split(500), strict=True)
    )
    model.train()
    return right / len(images.test)


def _ends(settings: Settings, num: int) -> list[int]:
    """Returns the step at which each epoch ends; batches run on over the ends, so that no image is left out."""
    given, remedy = settings.batch_size, "Lower it, or take more images."
    require(settings.batch_size <= num, "batch_size", "the run", allowed=f"at most {num}", given=given, remedy=remedy)
    return [epoch * num // settings.batch_size for epoch in range(1, settings.epochs + 1)]


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)


def _sparsified(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, total_steps: int
) -> dstlib.Sparsifier | None:
    if settings.method == "dense":
        return None
    method = method_of(settings, total_steps)
    sparsity, seed = settings.sparsity, settings.seed
    return dstlib.sparsify(model, optimizer, sparsity=sparsity, method=method, total_steps=total_steps, seed=seed)


def _costs(model: nn.Module, sparsifier: dstlib.Sparsifier | None) -> dict[str, Any]:
    """Counts parameters and FLOPs of the trained network, beside those of its dense twin; ends the masking."""
    dense, trained = (dstlib.profile(model, (1, 3, 32, 32), sparsifier=masks) for masks in (None, sparsifier))
    density = sparsifier.summary().density if sparsifier else 1.0
    if sparsifier:
        sparsifier.detach()
    shares = {"params": trained.params, "flops": trained.flops, "flops_share": trained.flops / dense.flops}
    return {"density": density, **shares, "torch": torch.__version__}


def _check_loss(loss: float, epoch: int) -> None:
    remedy = "Lower --learning-rate, or raise --warmup."
    require(math.isfinite(loss), "loss", f"epoch {epoch}", allowed="a finite number", given=loss, remedy=remedy)


def _with_bar(steps: range, title: str, *, show: bool) -> Iterable[int]:
    """Returns the steps, behind a progress bar where one is wanted and tqdm is installed."""
    if not show or find_spec("tqdm") is None:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc=title, unit="it", leave=False)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON, whole or not at all.

    Raises:
        StateError: The folder cannot be made, or written to.
    """
    make_folder(path.parent)
    write_whole(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())

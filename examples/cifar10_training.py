"""One training on CIFAR-10 for examples/cifar10.py and benchmarks/cifar10.py: the settings, and what they do."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from cifar10_data import NUM_CLASSES, Images, augmented, batch_indices, normalized
from cifar10_models import MODELS
from torch import nn
from torch.nn import functional

import dstlib
from dstlib.errors import require
from dstlib.files import make_folder, write_whole
from dstlib.masking import erk, uniform

UPDATES = 60  # mask updates that a short run would have, if they went on to its end
DISTRIBUTIONS = {"erk": erk, "uniform": uniform}
PUBLISHED_DROP, PUBLISHED_STEPS = 30_000, 97_656
CHOICES: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "model": tuple(MODELS),
        "method": ("dense", *dstlib.METHODS),
        "distribution": (None, *DISTRIBUTIONS),
        "optimizer": ("sgd", "adamw"),
        "schedule": ("cosine", "step"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what a run learns. ``sparsity`` does not count where the method is dense.

    Raises:
        SettingError: A setting is out of range.
    """

    model: str = "small"
    method: str = "rigl"
    sparsity: float = 0.9
    distribution: str | None = None
    interval: int | None = None
    epochs: int = 3
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    crop: int = 0
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("interval", "epochs", "batch_size", "images")
        checks = [(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more") for name in counts]
        checks += [
            (name, getattr(self, name) in known, f"one of {', '.join(map(str, known))}")
            for name, known in CHOICES.items()
        ]
        checks += [
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0 up"),
            ("warmup", 0 <= self.warmup < 1, "a share of the run in [0, 1)"),
            ("crop", 0 <= self.crop <= 8, "pixels from 0 to 8"),
            ("sparsity", 0 <= self.sparsity < 1, "a share in [0, 1)"),
        ]
        for name, holds, allowed in checks:
            require(holds, name, "the run", allowed=allowed, given=repr(getattr(self, name)), remedy="See --help.")


PRESETS: Mapping[str, Settings] = MappingProxyType(
    {
        "quick": Settings(),
        "published": Settings(
            model="wrn-22-2", epochs=250, batch_size=128, learning_rate=0.1, schedule="step", warmup=0.0, crop=4
        ),
        "vit": Settings(model="vit", optimizer="adamw", learning_rate=1e-3, weight_decay=0.05),
    }
)


def learning_rate(settings: Settings, step: int, total_steps: int) -> float:
    """Returns the learning rate of a step, from 0.

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
    method = dstlib.METHODS[settings.method]
    if method.interval is not None:
        scaled = min(method.interval, max(1, total_steps // UPDATES))
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

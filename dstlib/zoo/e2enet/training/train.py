"""The training loop of the E2ENet recipes: dense, static or dynamic sparse, by the settings alone.

Shapes: B batch, C channels, K classes with the background, D, H, W depth, height, width in voxels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dstlib.door import sparsify
from dstlib.errors import DstlibError, SettingError, StateError, explain
from dstlib.masking.site import Site
from dstlib.masking.update import MaskUpdate
from dstlib.schedules import Every
from dstlib.sparsifier import Sparsifier
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.patches import PatchSettings, draw_batch
from dstlib.zoo.e2enet.network import E2ENet
from dstlib.zoo.e2enet.training.settings import TrainSettings, kernel_method

# Dice over the foreground plus cross-entropy over all classes, as in nnU-Net's and E2ENet's published code.
_dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_nr=1e-5, smooth_dr=1e-5)


@dataclass
class Training:
    """All that a training changes, hence all that a checkpoint holds.

    ``metrics`` has one row per finished epoch. ``updates`` has one row per mask update: the iteration, and
    over all sparse weights how many were active and how many of them had just grown.
    """

    model: E2ENet
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    sparsifier: Sparsifier | None
    iteration: int = 0
    loss_sum: float = 0.0  # over the epoch under way
    metrics: list[dict[str, float]] = field(default_factory=list)
    updates: list[dict[str, int]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from, bit for bit on a CPU."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else None,
            "iteration": self.iteration,
            "loss_sum": self.loss_sum,
            "metrics": self.metrics,
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where the training stood that ``state`` was taken from.

        Raises:
            StateError: It was taken from another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.sparsifier:
                self.sparsifier.load_state_dict(state["sparsifier"])
            self.iteration, self.loss_sum = state["iteration"], state["loss_sum"]
            self.metrics, self.updates = list(state["metrics"]), list(state["updates"])
        except (KeyError, TypeError, RuntimeError) as error:
            allowed = "the state of a training of the same network with the same settings"
            remedy = "Resume with the configuration that the run was started with."
            raise StateError(explain("state", "Training", allowed=allowed, given=error, remedy=remedy)) from error

    def observe(self, site: Site, update: MaskUpdate) -> None:
        """Books one weight's share of a mask update."""
        if not self.updates or self.updates[-1]["iteration"] != site.step:
            self.updates.append({"iteration": site.step, "active": 0, "grown": 0})
        self.updates[-1]["active"] += int(update.mask.sum())
        self.updates[-1]["grown"] += int(update.grown.sum())


def start(model: E2ENet, settings: TrainSettings) -> Training:
    """The optimizer, and the sparsifier where ``sparsity`` is not 0, of a model on its device."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    device = _device(model)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    sparsifier = None
    if settings.sparsity > 0:
        _refuse_late_updates(settings)
        sparsifier = sparsify(
            model,
            optimizer,
            sparsity=settings.sparsity,
            method=kernel_method(settings.method, settings.interval),
            total_steps=settings.num_iterations,
            include=E2ENet.FUSION,
            seed=settings.seed,
        )
    training = Training(model, optimizer, scaler, sparsifier)
    if sparsifier:
        sparsifier.observers.append(training.observe)
    return training


def _refuse_late_updates(settings: TrainSettings) -> None:
    """In the words of the command line; sparsify() would say the same of its own arguments."""
    method = kernel_method(settings.method, settings.interval)
    clock = method.clock(settings.num_iterations)
    if isinstance(clock, Every) and clock.last == clock.start:
        given = f"{settings.interval}, in a training of {settings.num_iterations} iterations"
        remedy = "Lower --interval, or raise --epochs or --iterations."
        raise SettingError(
            explain("interval", f"method {method.name}", allowed=f"at most {clock.stop}", given=given, remedy=remedy)
        )


def train(
    training: Training,
    cases: Sequence[Case],
    *,
    settings: TrainSettings,
    patches: PatchSettings,
    save: Callable[[Training], None] = lambda training: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains to the end and returns True; once ``should_stop()``, only to the end of the iteration under way.

    ``save`` is called after each epoch, and before stopping. Batch ``i`` is a function of the seed and ``i``
    alone, so a training that is continued meets the same batches.

    Raises:
        DstlibError: The loss is not a finite number. Nothing is saved then.
    """
    training.model.train()
    training.model.deep_supervision = True
    total = settings.num_iterations
    with tqdm(total=total, initial=training.iteration, desc="train", unit="it", mininterval=1.0) as bar:
        while training.iteration < total:
            loss = _iterate(training, cases, settings=settings, patches=patches)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if training.iteration % settings.iterations == 0:
                _end_epoch(training, settings)
                save(training)
            if should_stop():
                save(training)
                return False
    return True


def _iterate(training: Training, cases: Sequence[Case], *, settings: TrainSettings, patches: PatchSettings) -> float:
    """One batch, one optimizer step; the loss."""
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    device = _device(model)
    images, labels = draw_batch(cases, patches, seed=settings.seed, iteration=training.iteration)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate_at(training.iteration // settings.iterations)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, enabled=scaler.is_enabled()):
        logits = model(images.to(device))
    loss = deep_supervision_loss(logits, labels.to(device))
    value = float(loss.detach())
    _refuse_divergence(value, training.iteration + 1, settings)
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


def deep_supervision_loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Dice plus cross-entropy at each head, the weights halving per head and summing to 1.

    Shapes: logits (B, K, D / s, H / s, W / s), each with its own stride s; labels (B, 1, D, H, W).
    """
    # "nearest" takes voxels 0, s, 2s, ..., the ones that a strided convolution is centred on.
    losses = [_dice_ce(x.float(), functional.interpolate(labels.float(), x.shape[2:], mode="nearest")) for x in logits]
    weights = [0.5**i for i in range(len(losses))]
    total: Tensor = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    return total


def _end_epoch(training: Training, settings: TrainSettings) -> None:
    epoch = training.iteration // settings.iterations
    training.metrics.append(
        {
            "epoch": epoch,
            "iteration": training.iteration,
            "learning_rate": settings.learning_rate_at(epoch - 1),
            "loss": training.loss_sum / settings.iterations,
        }
    )
    training.loss_sum = 0.0


def _refuse_divergence(loss: float, iteration: int, settings: TrainSettings) -> None:
    if not math.isfinite(loss):
        remedy = (
            f"Lower the learning rate ({settings.learning_rate}) and look for odd intensities in the data; "
            "the last checkpoint is untouched."
        )
        where = f"iteration {iteration}"
        raise DstlibError(explain("loss", where, allowed="a finite number", given=loss, remedy=remedy))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

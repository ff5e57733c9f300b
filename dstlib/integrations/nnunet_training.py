"""Sparse training inside a trainer of nnU-Net v2, as a class to mix into one.

nnU-Net itself is not imported here: a class that comes after these in a list of bases brings it in.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import dstlib.integrations.nnunet_checkpoint as checkpoints
from dstlib.errors import SettingError
from dstlib.files import write_json
from dstlib.integrations.training import refuse_other_settings
from dstlib.masking import MaskUpdate, Site
from dstlib.masking.update import count_outside
from dstlib.methods import find_method
from dstlib.methods.method import Method
from dstlib.sparsifier import Sparsifier
from dstlib.sparsifier.api import sparsify
from dstlib.targets import plain_name, unwrap
from dstlib.torch_files import write_torch

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Host
else:
    Host = object

_CUDA = torch.device("cuda")  # nnU-Net's default
_CLIP = 12.0  # nnU-Net's bound on the norm of the gradient


def ends(network: nn.Module) -> tuple[str, ...]:
    """Names the weights of a U-Net of nnU-Net that read the image or write the classes.

    They are few, and each connection that one of them loses is an image or a class unseen; as in E2ENet, they
    stay dense.
    """
    names = [plain_name(name) for name, p in unwrap(network).named_parameters() if p.ndim > 1]
    return (names[0], *(name for name in names[1:] if ".seg_layers." in name))


class Training(Host):
    """What all trainers of dstlib share: a length that may be set by class, and a check that nnU-Net lacks.

    ``epochs``: how many, or None for nnU-Net's thousand.
    """

    epochs: int | None = None

    def __init__(  # nnU-Net reads the names of these arguments
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = _CUDA,
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.epochs is not None:
            self.num_epochs = self.epochs

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Returns nnU-Net's scales, unless all weights in the loss would be 0 / 0, as the coarsest is left out."""
        scales: list[list[float]] | None = super()._get_deep_supervision_scales()
        if scales is not None and len(scales) < 2:
            where = f"configuration {self.configuration_name}"
            allowed = "3 or more, as nnU-Net's deep supervision leaves out the coarsest output"
            remedy = "Plan with a larger patch, or set enable_deep_supervision = False in a trainer of yours."
            raise SettingError.of("n_stages", where, allowed=allowed, given=len(scales) + 1, remedy=remedy)
        return scales


class SparseTraining(Training):
    """Trains the network of a trainer of nnU-Net sparse from the first step to the last.

    Settings, as class attributes: ``method``, ``sparsity``, ``include``, ``exclude`` and ``seed`` are those of
    :func:`dstlib.sparsify`; ``exclude = None`` leaves the first convolution and the heads dense. ``interval``
    counts the optimizer steps between mask updates, None being the method's own.
    """

    method: str | Method = "dsff"
    sparsity: float = 0.8
    interval: int | None = None
    include: str | Sequence[str] = "*"
    exclude: Sequence[str] | None = None
    seed: int = 0

    def configure_optimizers(self) -> tuple[Optimizer, Any]:
        """Makes nnU-Net's optimizer and schedule. The network, compiled but not yet wrapped by DDP, becomes sparse."""
        optimizer, schedule = super().configure_optimizers()
        self._sparsify(optimizer)
        return optimizer, schedule

    def on_train_start(self) -> None:
        """Chooses the masks anew where ``-pretrained_weights`` has put in other weights, and logs what is sparse."""
        super().on_train_start()
        if self._num_outside():
            self.sparsifier.detach()
            self._sparsify(self.optimizer)
        self.print_to_log_file(f"dstlib: {self.sparse_settings()}\n{self.sparsifier.summary()}")

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Makes one optimizer step, as nnU-Net does, but masks gradients before their norm is clipped."""
        data, target = (_to(batch[key], self.device) for key in ("data", "target"))
        self.optimizer.zero_grad(set_to_none=True)
        is_cuda = self.device.type == "cuda"  # nnU-Net computes in half precision there alone
        with torch.autocast("cuda") if is_cuda else nullcontext():
            loss = self.loss(self.network(data), target)
        scaler = self.grad_scaler or torch.amp.GradScaler(enabled=False)
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        self.sparsifier.before_step(self.optimizer)  # else the norm would be that of the dense gradient
        clip_grad_norm_(self.network.parameters(), _CLIP)
        scaler.step(self.optimizer)
        scaler.update()
        return {"loss": loss.detach().cpu().numpy()}

    def on_epoch_end(self) -> None:
        """Logs the density, entries outside the masks (there are none) and the mask updates of the epoch."""
        moved = f", {self._num_grown / self._num_active:.1%} of the active entries moved" if self._num_active else ""
        self.print_to_log_file(
            f"dstlib: step {self.sparsifier.step}, density {self.sparsifier.density:.6f}, "
            f"{self._num_outside()} entries outside the masks, {len(self._steps)} mask updates{moved}"
        )
        self._forget_updates()
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Leaves ``dstlib_summary.json`` beside the final checkpoint."""
        super().on_train_end()
        if self.local_rank == 0:
            summary = self.sparsifier.summary()
            rows = {r.name: {"active": r.num_active, "total": r.num_total, "dense": r.reason} for r in summary.rows}
            counts = {"density": summary.density, "params": summary.params, "steps": self.sparsifier.step}
            content = {"settings": self.sparse_settings(), **counts, "weights": rows}
            write_json(Path(self.output_folder) / "dstlib_summary.json", content)
            self.print_to_log_file(f"dstlib: {summary}")

    def sparse_settings(self) -> dict[str, Any]:
        """Returns what a continued training must share with the one that was saved."""
        plan = self.sparsifier.plan
        return {
            "method": plan.method.name,
            "granularity": repr(plan.method.granularity),
            "interval": plan.method.interval,
            "sparsity": self.sparsity,
            "sparse": [weight.name for weight in self.sparsifier.weights],
            "seed": self.seed,
            "total_steps": self.num_epochs * self.num_iterations_per_epoch,
        }

    def save_checkpoint(self, filename: str) -> None:
        """Writes nnU-Net's checkpoint with the masks under one key of its own, whole or not at all."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        partial = Path(f"{filename}.partial")
        partial.unlink(missing_ok=True)  # nnU-Net would write through a link
        try:
            super().save_checkpoint(str(partial))
            checkpoint = checkpoints.read_checkpoint(partial)
        finally:
            partial.unlink(missing_ok=True)
        settings, state = self.sparse_settings(), self.sparsifier.state_dict()
        part = {"version": checkpoints.VERSION, "settings": settings, "sparsifier": state}
        write_torch(Path(filename), {**checkpoint, checkpoints.KEY: part})

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Continues from a checkpoint of a sparse training of the same settings.

        Raises:
            StateError: The checkpoint has no masks, or its settings differ; nothing has been loaded then.
        """
        if not self.was_initialized:
            self.initialize()
        path = Path(filename_or_checkpoint)
        part = checkpoints.sparse_part(checkpoints.read_checkpoint(path), path.name)
        refuse_other_settings(part["settings"], self.sparse_settings(), path.name)
        super().load_checkpoint(filename_or_checkpoint)
        self.sparsifier.load_state_dict(part["sparsifier"])

    def _sparsify(self, optimizer: Optimizer) -> None:
        method = find_method(self.method)
        self.sparsifier: Sparsifier = sparsify(
            self.network,
            optimizer,
            sparsity=self.sparsity,
            method=method if self.interval is None else replace(method, interval=self.interval),
            total_steps=self.num_epochs * self.num_iterations_per_epoch,
            include=self.include,
            exclude=ends(self.network) if self.exclude is None else self.exclude,
            seed=self.seed,
        )
        self._forget_updates()
        self.sparsifier.observers.append(self._observe)

    def _num_outside(self) -> int:
        masks = self.sparsifier.masks
        return sum(count_outside(w.parameter, masks[w.name]) for w in self.sparsifier.weights)

    def _forget_updates(self) -> None:
        self._steps: set[int] = set()
        self._num_grown = self._num_active = 0

    def _observe(self, site: Site, update: MaskUpdate) -> None:
        self._steps.add(site.step)
        self._num_grown += int(update.grown.sum())
        self._num_active += int(update.mask.sum())


def _to(x: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    if isinstance(x, list):
        return [part.to(device, non_blocking=True) for part in x]
    return x.to(device, non_blocking=True)

"""Sparse training as a callback of Lightning.

    trainer = Trainer(callbacks=[SparseTraining(sparsity=0.9, method="rigl")])

Needs ``lightning``, or else ``pytorch_lightning``; with both installed, it works in the trainers of either.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from dstlib.errors import SettingError, StateError
from dstlib.integrations.training import Adapter

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")  # a rank holds a part of each weight
_MANY = 1_000_000


class SparseTraining(Adapter, Callback):
    """Keeps the network of a Lightning trainer sparse from the first step to the last, and in its checkpoints.

    The settings are those of :func:`dstlib.sparsify`; without ``total_steps``, Lightning's own count of the optimizer
    steps is taken. The network becomes sparse when ``fit`` has its optimizers. From then on, ``sparsifier`` tells what
    is sparse.

    >>> SparseTraining(sparsity=0.9, method="rigl", exclude="head.*").sparsifier
    Traceback (most recent call last):
    dstlib.errors.StateError: sparsifier of SparseTraining: expected a training that has begun in this process, got \
none. It is made when the trainer begins to train, in the very processes that train.
    """

    _num_epochs = 0
    _has_begun = False  # in this fit

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Takes its place behind the other callbacks, whose averages it masks, and before those that save.

        Raises:
            SettingError: The strategy shards the weights.
        """
        self._has_begun = False
        self._num_epochs = trainer.max_epochs or 0  # before others add to them; -1: without end
        strategy = next((cls.__name__ for cls in type(trainer.strategy).__mro__ if cls.__name__ in _SHARDED), None)
        if strategy is not None:
            raise SettingError.of(
                "strategy",
                "Trainer with SparseTraining",
                allowed="one that keeps whole weights on each rank",
                given=strategy,
                remedy='Pass strategy="ddp", or train on one device.',
            )
        others = [callback for callback in trainer.callbacks if callback is not self]
        saving = [callback for callback in others if callback in trainer.checkpoint_callbacks]
        trainer.callbacks = [*(callback for callback in others if callback not in saving), self, *saving]

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Makes the network sparse: optimizers exist, DDP has sent the same weights to all ranks, no step was taken.

        Raises:
            SettingError: A setting is out of range.
            SelectionError: Weights do not exist, cannot be sparse or are sparse already.
            StateError: Weights were loaded from a checkpoint without the masks that they belong to.
        """
        if not trainer.ckpt_path:
            self._training.loaded = None  # of a fit that failed before it came to this
        elif self._training.is_of(pl_module):
            return  # nothing is to begin, and the steps can only be counted later: see on_train_start
        elif self._training.loaded is None:
            self._load(None, trainer, pl_module)  # of weights alone, for which Lightning calls no callback: refused
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Follows the steps of this run, if a resumed one is longer or shorter than the one that was saved.

        Not before: to count them, Lightning makes loaders, and one that is made before its place in the data has been
        restored starts at the beginning (its issue 20550).
        """
        if trainer.ckpt_path:
            self._begin(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: "Trainer", pl_module: "LightningModule", optimizer: Optimizer) -> None:
        """Masks the gradients, if need be after changing the masks, before Lightning clips them."""
        self.sparsifier.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Masks averages: they are validated, saved and put into the network as sparse as it is."""
        self._mask_averages(trainer)

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Masks the network, into which a callback of the user may have put an average of its own."""
        self.sparsifier.mask_model(pl_module)

    def on_save_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Adds masks and settings to a checkpoint, among the states of the callbacks.

        Raises:
            StateError: A sparse layer was replaced since the fit began.
        """
        if self._has_begun:
            self._training.refuse_replaced(pl_module, "the network to save")
        elif trainer.training and not self._training.is_of(pl_module):
            # lr_find and the batch-size finder save before other callbacks hear of the fit, try steps, and load again
            self._begin(trainer, pl_module)
        if self._training.is_of(pl_module):
            checkpoint["callbacks"][self.state_key] = self._training.state_dict()

    def on_load_checkpoint(self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]) -> None:
        """Takes the masks that belong to the weights of a checkpoint, be it resumed or evaluated.

        Raises:
            StateError: The checkpoint to resume has no masks, or was saved under other settings; one that is only
                evaluated is evaluated all the same, with a warning.
        """
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn == "fit":
            self._load(state, trainer, pl_module)
        elif self._training.is_of(pl_module):
            try:
                self._load(state, trainer, pl_module)
            except StateError as error:
                warnings.warn(f"The sparsifier keeps masks that are not those of the weights: {error}", stacklevel=2)

    def _load(self, state: Any, trainer: "Trainer", pl_module: "LightningModule") -> None:
        self._training.load_state_dict(state, pl_module, where=str(trainer.ckpt_path))

    def _begin(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        training = self._training
        if training.loaded is not None:
            total_steps = training.loaded["total_steps"]
        elif training.settings.total_steps is None:
            total_steps = self._count_steps(trainer, pl_module)
        else:
            total_steps = training.settings.total_steps
        training.begin(pl_module, *trainer.optimizers, total_steps=total_steps)
        self._has_begun = True
        self._mask_averages(trainer)

    def _count_steps(self, trainer: "Trainer", pl_module: "LightningModule") -> int | None:
        """Counts the steps that an optimizer takes in the whole run; None where it has no end."""
        if trainer.fast_dev_run:
            return _MANY  # a few steps of a run of whatever length: too few for a method
        steps = trainer.estimated_stepping_batches  # which makes the loaders, if need be
        if self._num_epochs > 0 and math.isfinite(num_batches := trainer.num_training_batches):
            # Lightning's count takes in the epoch that SWA adds for batch norm, and leaves out a changing accumulation
            schedules = (getattr(callback, "get_accumulate_grad_batches", None) for callback in trainer.callbacks)
            factor = next(filter(None, schedules), lambda epoch: trainer.accumulate_grad_batches)
            steps = min(steps, sum(math.ceil(num_batches / factor(epoch)) for epoch in range(self._num_epochs)))
        if not 0 < steps < math.inf:
            return None
        if not pl_module.automatic_optimization:
            warnings.warn(
                "Under manual optimization, only the training step knows how often an optimizer steps: total_steps of "
                f"SparseTraining is taken as {steps}, one for each batch. Pass total_steps= if that is not so.",
                stacklevel=2,
            )
        return int(steps)

    def _mask_averages(self, trainer: "Trainer") -> None:
        """Masks what Lightning's weight averaging has gathered, which it shows to nobody."""
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                self.sparsifier.mask_model(average)

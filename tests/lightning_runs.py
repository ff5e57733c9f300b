"""A network, its batches and its trainer for the tests of Lightning, and a program that trains it, to be killed.

python lightning_runs.py FOLDER STRATEGY
"""

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401 - first, for what torchvision may lack, also in the processes that Lightning starts
import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import dstlib
from dstlib.integrations.lightning import SparseTraining

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
RIGL = replace(dstlib.RIGL, interval=3)
NUM_BATCHES = 8


class Net(pl.LightningModule):
    """Two layers; what it saw of its own weights is kept by moment."""

    def __init__(self, *, batch_norm=False, optimizer=torch.optim.Adam, lr=0.05, batch_size=4):
        super().__init__()
        torch.manual_seed(0)
        self.lr, self.batch_size, self.optimizer = lr, batch_size, optimizer
        norm = [nn.BatchNorm1d(24)] if batch_norm else []
        self.net = nn.Sequential(nn.Linear(12, 24), *norm, nn.ReLU(), nn.Linear(24, 3))
        self.num_nonzero = {"train": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.num_nonzero["train"].append(nonzero(self))
        x, y = batch
        return mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.num_nonzero["validation"].append(nonzero(self))
        x, y = batch
        self.log("val", mse_loss(self.net(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), self.lr)

    def train_dataloader(self):
        return batches(self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def batches(size=4):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4 * NUM_BATCHES, n, generator=generator) for n in (12, 3))
    return DataLoader(TensorDataset(x, y), batch_size=size)


class Loader:
    """Batches that tell and take up their place, as Lightning asks of what it resumes within an epoch."""

    def __init__(self):
        self.place = 0

    def __len__(self):
        return NUM_BATCHES

    def __iter__(self):
        everything = list(batches())
        for i in range(self.place % NUM_BATCHES, NUM_BATCHES):
            self.place = i + 1
            yield everything[i]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def sparse_training(**settings):
    return SparseTraining(**{"sparsity": 0.8, "method": RIGL, **settings})


def make_trainer(folder, *callbacks, **settings):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    basics = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "enable_checkpointing": saves}
    return pl.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**quiet, **basics, **settings})


def nonzero(model):
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.ndim > 1)


class TellingIO(TorchCheckpointIO):
    """Tells when it begins to save."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        print(f"save {checkpoint.get('global_step')}", flush=True)
        super().save_checkpoint(checkpoint, path, storage_options)


class Reporting(pl.Callback):
    """Tells each step, and leaves what each rank has at the end."""

    def __init__(self, folder, sparse):
        self.folder, self.sparse = folder, sparse

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print(f"step {trainer.global_step}", flush=True)

    def on_fit_end(self, trainer, pl_module):
        content = {"weights": pl_module.state_dict(), "masks": self.sparse.sparsifier.masks}
        torch.save({**content, "step": self.sparse.sparsifier.step}, self.folder / f"rank{trainer.global_rank}.pt")


def main(folder, strategy):
    """Trains, or goes on from the last checkpoint, with an average and masks that move often."""
    warnings.simplefilter("ignore")
    sparse = sparse_training()
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    is_alone = strategy == "auto"
    average = EMAWeightAveraging(decay=0.8) if is_alone else WeightAveraging()  # an EMA cannot be sent to a process
    callbacks = [sparse, average, Reporting(folder, sparse), saving]
    trainer = make_trainer(
        folder,
        *callbacks,
        strategy=strategy,
        devices=1 if is_alone else 2,
        max_epochs=5,
        gradient_clip_val=0.1,
        use_distributed_sampler=False,
        plugins=TellingIO(),
    )
    trainer.fit(Net(), Loader(), ckpt_path="last")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""Trainings by Hugging Face's Trainer, small enough for tests; as a program, one that may be killed at any moment."""

import sys
from dataclasses import replace
from pathlib import Path

import conftest  # noqa: F401 - where torchvision does not match the torch build, transformers needs its operators too
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

import dstlib
from dstlib.integrations.transformers import SparseTraining, last_checkpoint

logging.set_verbosity_error()
RIGL = replace(dstlib.RIGL, interval=3)


class Net(nn.Module):
    """A classifier as a Trainer wants it: its loss is the first that it returns."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(size: int = 60) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 12, generator=generator)
    labels = x[:, :4].argmax(dim=1)
    return [{"x": x[i], "labels": labels[i]} for i in range(size)]


def net(dropout: float = 0.0) -> Net:
    set_seed(0)
    return Net(dropout)


def sparse(**settings: object) -> SparseTraining:
    return SparseTraining(**{"sparsity": 0.8, "method": RIGL, **settings})


def trainer(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **settings: object) -> Trainer:
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 0.01,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    others = {
        key: settings.pop(key)
        for key in ("optimizers", "model_init", "eval_dataset", "compute_metrics")
        if key in settings
    }
    args = TrainingArguments(**{**given, **settings})
    if "model_init" not in others:
        others["model"] = net(dropout=0.2) if model is None else model
    made = Trainer(args=args, train_dataset=data(), callbacks=list(callbacks), **others)
    made.remove_callback(PrinterCallback)
    return made


def run(folder: Path, steps: int, save_steps: int) -> None:
    """Trains, or continues from what is there, and leaves what it came to."""
    callback = sparse()
    made = trainer(folder / "run", callback, max_steps=steps, save_steps=save_steps, save_total_limit=2)
    made.train(resume_from_checkpoint=last_checkpoint(folder / "run"))
    state = {"model": made.model.state_dict(), "optimizer": made.optimizer.state_dict()}
    torch.save({**state, "sparsifier": callback.sparsifier.state_dict()}, folder / "end.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), *map(int, sys.argv[2:]))

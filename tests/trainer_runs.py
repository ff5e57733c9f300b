"""Trainings by Hugging Face's Trainer, small enough for tests; as a program, a run, or runs that are killed."""

import gc
import json
import random
import sys
import time
from dataclasses import replace
from multiprocessing import Process, get_context
from pathlib import Path

import conftest  # noqa: F401 - where torchvision does not match the torch build, transformers needs its operators too
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

import dstlib
from dstlib.integrations.transformers import SparseTraining, last_checkpoint

logging.set_verbosity_error()
gc.freeze()  # each train() has all garbage collected, which takes a second with all that transformers imports
RIGL = replace(dstlib.RIGL, interval=3)


class Net(nn.Module):
    """A classifier as a Trainer wants it: its loss is the first that it returns."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x.to(self.head.weight.dtype)))
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
    names = ("train_dataset", "eval_dataset", "optimizers", "model_init", "compute_metrics")  # of the Trainer itself
    others = {"train_dataset": data()} | {name: settings.pop(name) for name in names if name in settings}
    args = TrainingArguments(**{**given, **settings})
    if "model_init" not in others:
        others["model"] = net(dropout=0.2) if model is None else model
    made = Trainer(args=args, callbacks=list(callbacks), **others)
    made.remove_callback(PrinterCallback)
    return made


def run(folder: Path, *, is_double: bool = False, **settings: object) -> None:
    """Trains, or continues from the last whole checkpoint, and leaves what it came to."""
    callback = sparse()
    made = trainer(folder / "run", callback, model=net().double() if is_double else None, **settings)
    made.train(resume_from_checkpoint=last_checkpoint(folder / "run"))
    if made.is_world_process_zero():
        end = {
            "model": made.model.state_dict(),
            "optimizer": made.optimizer.state_dict(),
            "sparsifier": callback.sparsifier.state_dict(),
            "norms": {entry["step"]: entry["grad_norm"] for entry in made.state.log_history if "grad_norm" in entry},
        }
        torch.save(end, folder / "unfinished.pt")
        (folder / "unfinished.pt").replace(folder / "end.pt")


def kill(folder: Path, trials: int) -> None:
    """Kills trainings at random moments, again and again, and prints of each how often, and how often in a save."""
    begin, draw = get_context("fork").Process, random.Random(0)

    def start(where: Path) -> Process:
        where.mkdir(exist_ok=True)
        # by epochs: with max_steps, a run that is resumed from its very end takes one step more (transformers 5.24)
        settings = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 3, "save_total_limit": 2}
        process = begin(target=run, args=(where,), kwargs=settings)
        process.start()
        return process

    start(folder / "whole").join()
    started = time.monotonic()
    start(folder / "timed").join()
    duration = time.monotonic() - started
    for trial in range(trials):
        where, kills, partial = folder / str(trial), 0, 0
        while not (where / "end.pt").exists():
            process = start(where)
            process.join(draw.uniform(0.2, 1.0) * duration if kills < 3 else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                saved = (where / "run").is_dir() and get_last_checkpoint(where / "run")
                partial += bool(saved) and saved != last_checkpoint(where / "run")
        print(trial, kills, partial, flush=True)


if __name__ == "__main__":
    target, where, *arguments = sys.argv[1:]
    if target == "kill":
        kill(Path(where), int(arguments[0]))
    else:
        run(Path(where), **json.loads(arguments[0]))

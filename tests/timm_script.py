"""A training script after timm's own, small and on data of its own: python timm_script.py FOLDER [--resume].

Lines that a sparse training adds are marked "sparse".
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import Tensor

import dstlib
from dstlib.integrations.timm import SparseTraining

EPOCHS, BATCHES, ACCUMULATION = 4, 6, 2
METHOD = replace(dstlib.RIGL, interval=3)


def batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.randint(0, 4, (4,), generator=generator)


def main(folder: Path, resume: bool = False, name: str = "test_resnet", opt: str = "adamw", amp: bool = True) -> Any:
    """Trains, and returns model, optimizer, average, saver and the sparse training."""
    args = argparse.Namespace(model=name, opt=opt)
    torch.manual_seed(1 if resume else 0)
    model = timm.create_model(name, num_classes=4).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.01, weight_decay=0.05)
    loss_scaler = sparse = SparseTraining(sparsity=0.8, method=METHOD).around(
        NativeScaler("cpu") if amp else None
    )  # sparse

    last, start_epoch = folder / "last.pth.tar", 0
    if resume:
        start_epoch = resume_checkpoint(model, str(last), optimizer, loss_scaler, log_info=False)
    model_ema = ModelEmaV3(model, decay=0.9)
    if resume:
        load_checkpoint(model_ema.module, str(last), use_ema=True)

    saver = CheckpointSaver(
        model, optimizer, args, model_ema, loss_scaler, checkpoint_dir=str(folder), decreasing=True, max_history=EPOCHS
    )
    num_updates = BATCHES // ACCUMULATION
    scheduler, num_epochs = create_scheduler_v2(
        optimizer, num_epochs=EPOCHS, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=num_updates
    )
    sparse.begin(model, optimizer, total_steps=num_epochs * num_updates)  # sparse
    sparse.mask_average(model_ema)  # sparse

    loss_fn = LabelSmoothingCrossEntropy()
    scheduler.step_update(start_epoch * num_updates)
    for epoch in range(start_epoch, num_epochs):
        model.train()
        for i in range(BATCHES):
            x, target = batch(epoch * BATCHES + i)
            need_update = (i + 1) % ACCUMULATION == 0
            loss = loss_fn(model(x.contiguous(memory_format=torch.channels_last)), target) / ACCUMULATION
            loss_scaler(loss, optimizer, clip_grad=0.1, parameters=model.parameters(), need_update=need_update)
            if need_update:
                optimizer.zero_grad()
                model_ema.update(model, step=(update := epoch * num_updates + (i + 1) // ACCUMULATION))
                scheduler.step_update(update)
        model_ema.module.eval()
        with torch.no_grad():
            metric = float(loss_fn(model_ema(batch(0)[0]), batch(0)[1]))
        saver.save_checkpoint(epoch, metric)
    return model, optimizer, model_ema, saver, sparse


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    torch.set_num_threads(1)
    main(**vars(parser.parse_args()))

"""A loop of one's own under Accelerate: its accumulation, loss scaler, saved state and several processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import assert_same, assert_zero_outside, small
from pages import run_page
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dstlib

pytest.importorskip("accelerate")

from accelerate import Accelerator

RIGL = replace(dstlib.RIGL, interval=3)
NORM = 0.1


def network(scaler):
    """In double precision, or, to be scaled, in single and with a large loss, which overflows now and then."""
    model = small()
    with torch.no_grad():
        model.head.weight.mul_(1 if scaler is None else 1000)
    return model.double() if scaler is None else model


def batches(batch_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (60,), generator=generator)
    return DataLoader(TensorDataset(x, labels), batch_size=batch_size)


def train(*, batch_size=4, accumulation=1, epochs=1, make=torch.optim.AdamW, scaler=None, folder=None, resume=None):
    """Trains as docs/accelerate.md does, and saves after each epoch; returns what it came to."""
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    model, dtype = network(scaler), torch.float64 if scaler is None else torch.float32
    model, optimizer, loader = accelerator.prepare(model, make(model.parameters(), lr=0.01), batches(batch_size))
    if scaler is not None:
        accelerator.scaler = optimizer.scaler = scaler
        optimizer.__setstate__(optimizer.__getstate__())  # as if it had been there before
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=RIGL, total_steps=40)
    accelerator.register_for_checkpointing(sparsifier)
    if resume is not None:
        accelerator.load_state(resume)
    norms = []
    for epoch in range(epochs):
        for x, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x.to(dtype)), labels))
                if accelerator.sync_gradients:
                    if scaler is not None:
                        scaler.unscale_(optimizer.optimizer)  # unscale_gradients() looks for fp16, which CPUs lack
                    sparsifier.before_step(optimizer)
                    norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), NORM)))
                optimizer.step()
                optimizer.zero_grad()
        if folder is not None:
            accelerator.save_state(f"{folder}/{epoch}")
    model = accelerator.unwrap_model(model)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
    assert_zero_outside(model, sparsifier.masks, optimizer.optimizer)
    return {**state, "norms": norms}


def by_hand(*, accumulation=1, make=torch.optim.AdamW, scaler=None):
    """The same in plain torch."""
    model, dtype = network(scaler), torch.float64 if scaler is None else torch.float32
    optimizer = make(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=RIGL, total_steps=40)
    given, norms = list(batches(4)), []
    for first in range(0, len(given), accumulation):
        for x, labels in given[first : first + accumulation]:
            loss = nn.functional.cross_entropy(model(x.to(dtype)), labels) / accumulation
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        sparsifier.before_step()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), NORM)))
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sparsifier": sparsifier.state_dict()}
    return {**state, "norms": norms}


@pytest.mark.parametrize("accumulation", [1, 4])  # 15 batches: the last step has three
def test_a_loop_equals_one_without_accelerate(accumulation):
    ours, theirs = train(accumulation=accumulation), by_hand(accumulation=accumulation)
    assert min(ours["norms"]) > NORM  # each is clipped, as the masked norm is above the bound
    assert_same(ours, theirs)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)])
def test_a_step_that_the_loss_scaler_skips_is_not_counted(make):
    """Accelerate skips it in its own wrapper; a fused optimizer is called all the same."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)

    ours, theirs = train(make=make, scaler=scaler()), by_hand(make=make, scaler=scaler())
    finite = [norm for norm in ours["norms"] if norm < float("inf")]
    assert 0 < len(finite) < 15
    assert max(weight["step"] for weight in ours["sparsifier"]["weights"].values()) == len(finite)
    assert_same({k: v for k, v in ours.items() if k != "norms"}, {k: v for k, v in theirs.items() if k != "norms"})


def test_a_resumed_loop_equals_an_uninterrupted_one(tmp_path):
    whole = train(epochs=3, accumulation=2, folder=tmp_path)
    resumed = train(epochs=2, accumulation=2, resume=str(tmp_path / "0"))
    del whole["norms"], resumed["norms"]
    assert_same(resumed, whole)


def test_a_folder_without_masks_is_refused(tmp_path):
    train(folder=tmp_path)
    (tmp_path / "0" / "custom_checkpoint_0.pkl").unlink()
    with pytest.raises(RuntimeError, match="Number of custom checkpoints"):
        train(resume=str(tmp_path / "0"))


def test_the_page_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(Path(__file__).parents[1] / "docs" / "accelerate.md", {}, least=2, host="accelerate")


@pytest.mark.long
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """Masks bit for bit; the masked norm and the weights up to the order of sums, in double precision."""
    for processes, size in ((1, 4), (2, 2)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [__file__, str(tmp_path / str(processes)), json.dumps({"batch_size": size, "accumulation": 2})]
        subprocess.run([*launcher, *command], check=True)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in "12")
    for name, weight in one["sparsifier"]["weights"].items():
        assert torch.equal(weight["mask"], two["sparsifier"]["weights"][name]["mask"])
        torch.testing.assert_close(two["model"][name], one["model"][name], rtol=1e-9, atol=1e-12)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-9)


if __name__ == "__main__":
    result = train(**json.loads(sys.argv[2]))
    if Accelerator(cpu=True).is_main_process:
        torch.save(result, sys.argv[1])

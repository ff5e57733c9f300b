"""A training script of timm's kind, sparse: its own clipping, averages, checkpoints and resumption."""

import copy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import assert_same, assert_zero_outside
from pages import run_page

import dstlib
from dstlib import StateError

pytest.importorskip("timm")

import timm
import timm_script
from timm.models import load_checkpoint, load_state_dict, resume_checkpoint
from timm.utils import NativeScaler, dispatch_clip_grad

from dstlib.integrations.timm import SparseTraining

SCRIPT = Path(timm_script.__file__)


def states(run):
    model, optimizer, average, _, sparse = run
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "average": average.state_dict(),
        "sparse": sparse.state_dict(),
    }


def density(sparsifier, model):
    """The share of entries of the sparse weights that are not zero in a model."""
    weights = [model.get_parameter(name) for name in sparsifier.masks]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


class StoppedError(Exception):
    pass


def stop_after(monkeypatch, epoch):
    """Lets the script end as a killed one does, after what an epoch has saved."""
    save = timm_script.CheckpointSaver.save_checkpoint

    def save_and_stop(self, at, metric=None):
        save(self, at, metric)
        if at == epoch:
            raise StoppedError

    monkeypatch.setattr(timm_script.CheckpointSaver, "save_checkpoint", save_and_stop)


@pytest.mark.parametrize(
    ("name", "opt", "amp"),
    [("test_resnet", "adamw", True), pytest.param("test_vit", "lamb", False, marks=pytest.mark.long)],
)
def test_a_resumed_script_is_the_uninterrupted_one(name, opt, amp, tmp_path, monkeypatch):
    settings = {"name": name, "opt": opt, "amp": amp}
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole = timm_script.main(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(StoppedError):
            timm_script.main(tmp_path / "parts", **settings)
    resumed = timm_script.main(tmp_path / "parts", resume=True, **settings)
    assert_same(states(whole), states(resumed))
    model, optimizer, average, _, sparse = whole
    assert sparse.sparsifier.step == 12
    assert_zero_outside(model, sparse.sparsifier.masks, optimizer)
    for part in (model, average.module, timm.utils.reparameterize_model(model)):
        assert density(sparse.sparsifier, part) == sparse.sparsifier.density == pytest.approx(0.2, abs=1e-4)


@pytest.mark.long
def test_a_script_that_is_killed_at_any_step_resumes_bit_for_bit(tmp_path):
    whole = timm_script.main(tmp_path)
    moments = torch.rand(8, generator=torch.Generator().manual_seed(0)).tolist()
    for number, moment in enumerate(moments):
        folder = tmp_path / str(number)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, SCRIPT, folder])
        while not (folder / "last.pth.tar").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moment)  # some 0.3 s an epoch, on one core
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_same(states(whole), states(timm_script.main(folder, resume=True)))


@pytest.mark.parametrize("scaler", [None, NativeScaler("cpu")], ids=["bare", "NativeScaler"])
@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping_sees_the_masked_gradient(scaler, mode):
    """The step is that of a loop in which gradients are masked by hand."""
    x, target = timm_script.batch(0)
    torch.manual_seed(0)
    models = [timm.create_model("test_vit", num_classes=4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    settings = {"sparsity": 0.8, "method": "static"}
    sparse = SparseTraining(**settings).around(scaler)
    sparse.begin(models[0], optimizers[0])
    loss = torch.nn.functional.cross_entropy(models[0](x), target)
    sparse(loss, optimizers[0], clip_grad=0.01, clip_mode=mode, parameters=models[0].parameters())

    masks = dstlib.sparsify(models[1], **settings).masks
    torch.nn.functional.cross_entropy(models[1](x), target).backward()
    for name, parameter in models[1].named_parameters():
        parameter.grad.mul_(masks.get(name, torch.ones(())))
    dispatch_clip_grad(models[1].parameters(), 0.01, mode=mode)
    optimizers[1].step()
    # the loss scale is a power of two, and goes without rounding
    assert_same(models[0].state_dict(), models[1].state_dict())


def test_an_average_of_checkpoints_is_masked_by_those_of_the_last(tmp_path):
    """As timm's avg_checkpoints.py makes it: in double precision, of the averages that the checkpoints hold."""
    *_, sparse = timm_script.main(tmp_path)
    parts = [load_state_dict(str(tmp_path / f"checkpoint-{epoch}.pth.tar"), use_ema=True) for epoch in (0, 3)]
    averaged = {name: sum(part[name].double() for part in parts).div(2).float() for name in parts[0]}
    torch.save(averaged, tmp_path / "averaged.pth")
    model = timm.create_model("test_resnet", num_classes=4)
    load_checkpoint(model, str(tmp_path / "averaged.pth"))
    assert density(sparse.sparsifier, model) > sparse.sparsifier.density
    sparse.sparsifier.mask_model(model)
    assert density(sparse.sparsifier, model) == sparse.sparsifier.density


def test_without_begin_nothing_is_trained_dense_in_silence():
    model = timm.create_model("test_vit", num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StateError, match=r"has begun .* Call begin\(model"):
        SparseTraining(sparsity=0.8)(model(timm_script.batch(0)[0]).sum(), optimizer)


def test_a_script_that_steps_past_it_is_told_so_once(recwarn):
    model = timm.create_model("test_vit", num_classes=4)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=1e-3)
    sparse = SparseTraining(sparsity=0.8, method="static")
    sparse.begin(model, optimizer)
    for _ in range(2):
        model(timm_script.batch(0)[0]).sum().backward()
        optimizer.step()
    (told,) = [str(w.message) for w in recwarn if "SparseTraining" in str(w.message)]
    assert "loss_scaler = sparse.around(loss_scaler)" in told


def test_a_dense_checkpoint_starts_a_sparse_training(tmp_path):
    model = timm.create_model("test_vit", num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    weights = copy.deepcopy(model.state_dict())
    sparse = SparseTraining(sparsity=0.8, method="static").around(None)
    resume_checkpoint(model, str(tmp_path / "last.pth.tar"), optimizer, sparse)
    masks = sparse.begin(model, optimizer).masks
    assert all(torch.equal(model.get_parameter(name), weights[name] * mask) for name, mask in masks.items())


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(Path(__file__).parents[1] / "docs" / "timm.md", {}, least=2)

"""Sparse training as a callback of Lightning, against the real package."""

import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pages import run_page
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import dstlib
from dstlib.errors import SettingError, StateError

pl = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import (  # noqa: E402
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.strategies import FSDPStrategy  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402
from lightning_runs import NUM_BATCHES, RIGL, Loader, Net, batches, make_trainer, nonzero, sparse_training  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore::UserWarning:pytorch_lightning",
    "ignore::FutureWarning",
    "error::UserWarning:dstlib",
)

NUM_ACTIVE = 72  # a fifth of 12·24 + 24·3


def outside(sparsifier):
    return sum(int(w.parameter.detach()[~sparsifier.masks[w.name]].count_nonzero()) for w in sparsifier.weights)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def masks_of(callback):
    return {name: mask.clone() for name, mask in callback.sparsifier.masks.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def manual(model, *, clip=None, accumulate=1, masked=True, num_epochs=3):
    """The same training as a loop of one's own."""
    (optimizer,) = [model.configure_optimizers()]
    total_steps = num_epochs * NUM_BATCHES // accumulate
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=RIGL, total_steps=total_steps)
    for _ in range(num_epochs):
        for i, (x, y) in enumerate(model.train_dataloader()):
            if i % accumulate == 0:
                optimizer.zero_grad()
            (mse_loss(model.net(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if masked:
                    sparsifier.before_step(optimizer)
                if clip is not None:
                    clip(model.parameters(), 0.05)
                optimizer.step()
    return sparsifier


def train_one_epoch(model):
    optimizer = model.configure_optimizers()
    for x, y in model.train_dataloader():
        optimizer.zero_grad()
        mse_loss(model.net(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("algorithm", "clip"),
    [(None, None), ("norm", nn.utils.clip_grad_norm_), ("value", nn.utils.clip_grad_value_)],
)
def test_it_is_a_loop_of_ones_own_bit_for_bit(tmp_path, algorithm, clip, accumulate):
    """With clipping, the norm is that of the masked gradients: Lightning clips after the callback, before the step."""
    callback, model, other = sparse_training(), Net(optimizer=torch.optim.SGD), Net(optimizer=torch.optim.SGD)
    clipping = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm} if algorithm else {}
    make_trainer(tmp_path, callback, accumulate_grad_batches=accumulate, **clipping).fit(model)
    expected = manual(other, clip=clip, accumulate=accumulate)
    assert callback.sparsifier.step == expected.step == 24 // accumulate
    assert equal(snapshot(model), snapshot(other))
    assert equal(callback.sparsifier.masks, expected.masks)
    if algorithm == "norm":
        dense_norm = Net(optimizer=torch.optim.SGD)
        manual(dense_norm, clip=clip, accumulate=accumulate, masked=False)
        assert not equal(snapshot(model), snapshot(dense_norm))


def test_every_moment_of_a_fit_is_sparse(tmp_path):
    callback, model = sparse_training(), Net()
    make_trainer(tmp_path, callback, num_sanity_val_steps=2).fit(model)
    assert set(model.num_nonzero["train"]) | set(model.num_nonzero["validation"]) <= set(range(60, NUM_ACTIVE + 1))
    assert nonzero(model) == NUM_ACTIVE
    assert outside(callback.sparsifier) == 0
    assert callback.sparsifier.summary().num_active == NUM_ACTIVE


class TwoOptimizers(pl.LightningModule):
    """Manual optimization: the first half steps at every batch, the second at every other one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())

    def configure_optimizers(self):
        return [torch.optim.Adam(half.parameters(), 0.05) for half in (self.first, self.second)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        for i, optimizer in enumerate(self.optimizers()):
            if batch_idx % (i + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(mse_loss(self(x), y))
                optimizer.step()


def test_several_optimizers_step_apart(tmp_path):
    callback, model, other = sparse_training(total_steps=24), TwoOptimizers(), TwoOptimizers()
    make_trainer(tmp_path, callback).fit(model, batches())
    optimizers = other.configure_optimizers()
    sparsifier = dstlib.sparsify(other, *optimizers, sparsity=0.8, method=RIGL, total_steps=24)
    for _ in range(3):
        for batch_idx, (x, y) in enumerate(batches()):
            for i, optimizer in enumerate(optimizers):
                if batch_idx % (i + 1) == 0:
                    optimizer.zero_grad()
                    mse_loss(other(x), y).backward()
                    optimizer.step()
    steps = {name: w["step"] for name, w in callback.sparsifier.state_dict()["weights"].items()}
    assert steps == {"first.weight": 24, "second.weight": 12}
    assert equal(snapshot(model), snapshot(other))
    assert equal(callback.sparsifier.masks, sparsifier.masks)


def test_under_manual_optimization_a_warning_tells_that_steps_are_guessed(tmp_path):
    with pytest.warns(UserWarning, match="total_steps of SparseTraining is taken as 24, one for each batch"):
        make_trainer(tmp_path, sparse_training()).fit(TwoOptimizers(), batches())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, precision):
    callback, model = sparse_training(), Net()
    make_trainer(tmp_path, callback, precision=precision, gradient_clip_val=0.1).fit(model)
    assert callback.sparsifier.step == 24
    assert outside(callback.sparsifier) == 0
    assert callback.sparsifier.summary().num_active == NUM_ACTIVE


class Overflowing(Net):
    """Its sixth loss is infinite, so the scaler leaves that step out."""

    def training_step(self, batch, batch_idx):
        is_sixth = self.trainer.global_step == 5
        return super().training_step(batch, batch_idx) * (float("inf") if is_sixth else 1)


def test_a_step_that_the_scaler_leaves_out_is_not_counted_and_moves_no_mask(tmp_path):
    callback, model = sparse_training(), Overflowing()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # by its name alone, a CPU has no scaler
    trainer = make_trainer(tmp_path, callback, plugins=precision, gradient_clip_val=0.1)
    updates = []
    watch = pl.callbacks.LambdaCallback(
        on_train_start=lambda *_: callback.sparsifier.observers.append(lambda site, _: updates.append(site.step))
    )
    trainer.callbacks.append(watch)
    trainer.fit(model)
    assert trainer.global_step == 24
    assert callback.sparsifier.step == 23
    assert sorted(set(updates)) == [3, 6, 9, 12, 15, 18]
    assert outside(callback.sparsifier) == 0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


class Endless(IterableDataset):
    def __iter__(self):
        return iter(batches().dataset)


@pytest.mark.parametrize(
    ("settings", "callbacks", "expected"),
    [
        ({}, [], 24),
        ({"accumulate_grad_batches": 3}, [], 9),  # the last batch of an epoch steps too
        ({"max_steps": 10}, [], 10),
        ({"limit_train_batches": 5}, [], 15),
        ({}, [GradientAccumulationScheduler({0: 1, 1: 4})], 8 + 2 + 2),
        ({"max_epochs": 3}, [StochasticWeightAveraging(0.01, swa_epoch_start=1)], 24),
    ],
)
def test_steps_are_those_that_are_taken(tmp_path, settings, callbacks, expected):
    callback, model = sparse_training(), Net(batch_norm=True)
    trainer = make_trainer(tmp_path, *map(deepcopy, callbacks), callback, **settings)
    trainer.fit(model)
    # SWA goes through the data once more for batch norm, at the end of which Lightning takes a step that is none
    num_extra = 1 if any(isinstance(c, StochasticWeightAveraging) for c in callbacks) else 0
    assert callback.sparsifier.step == trainer.global_step == expected + num_extra
    assert callback.sparsifier.plan.clock.stop == pytest.approx(0.75 * expected, abs=1)


def test_a_run_without_end_says_so(tmp_path):
    model, loader = Net(), DataLoader(Endless(), batch_size=4)
    with pytest.warns(UserWarning, match="Without total_steps, rigl changes masks each 3 steps for ever"):
        make_trainer(tmp_path, sparse_training(), max_epochs=1).fit(model, loader)
    with pytest.raises(SettingError, match="total_steps of sparsify"):
        make_trainer(tmp_path, sparse_training(method="gmp"), max_epochs=1).fit(Net(), loader)


class OwnAverage(pl.Callback):
    """An average as users write it."""

    def on_train_start(self, trainer, pl_module):
        self.mine = torch.optim.swa_utils.AveragedModel(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mine.update_parameters(pl_module)

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.mine.module.state_dict())


AVERAGES = [
    OwnAverage(),
    WeightAveraging(),
    EMAWeightAveraging(decay=0.8, update_every_n_steps=100, update_starting_at_epoch=0),  # once per epoch
    EMAWeightAveraging(decay=0.8, update_starting_at_step=5),
    StochasticWeightAveraging(0.01, swa_epoch_start=1),
]


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("average", AVERAGES, ids=lambda average: type(average).__name__)
def test_averages_are_as_sparse_as_the_network(tmp_path, average, is_first):
    """Also when they are validated and saved, and whatever the order in which the callbacks were given."""
    callback, model = sparse_training(), Net(batch_norm=is_first)
    by_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)  # as often as masks change
    by_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    given = [deepcopy(average), by_step, by_epoch, callback]
    make_trainer(tmp_path, *(given[::-1] if is_first else given)).fit(model)
    assert nonzero(model) == NUM_ACTIVE
    assert outside(callback.sparsifier) == 0
    assert max(model.num_nonzero["validation"]) <= NUM_ACTIVE
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.glob("*.ckpt")]
    assert len(saved) >= 8 + 3
    assert all(sum(int(w.count_nonzero()) for w in state.values() if w.ndim > 1) <= NUM_ACTIVE for state in saved)


def test_an_average_of_moving_masks_would_be_denser():
    """Why they are masked: the test above fails without it."""
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)
    sparsifier = dstlib.sparsify(model, sparsity=0.8, method=RIGL, total_steps=24)
    optimizer = model.configure_optimizers()
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model.net(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
    assert nonzero(average) > NUM_ACTIVE
    assert outside(sparsifier) == 0


@pytest.mark.parametrize("tune", ["callback", "tuner"])
def test_lr_find_tries_the_sparse_network_and_leaves_it_as_it_was(tmp_path, tune):
    callback, model = sparse_training(), Net()
    if tune == "callback":
        finder = LearningRateFinder(num_training_steps=12, update_attr=False)
        make_trainer(tmp_path, finder, callback).fit(model)
        tried = model.num_nonzero["train"][:12]
        other = sparse_training()
        make_trainer(tmp_path, other).fit(unfound := Net())
        assert equal(snapshot(model), snapshot(unfound))
        assert equal(callback.sparsifier.masks, other.sparsifier.masks)
    else:
        trainer = make_trainer(tmp_path, callback)
        Tuner(trainer).lr_find(model, num_training=12, update_attr=False)
        tried = model.num_nonzero["train"]
        assert callback.sparsifier.step == 0
        fresh = Net()
        sparsifier = dstlib.sparsify(fresh, sparsity=0.8, method=RIGL, total_steps=24)
        assert equal(callback.sparsifier.masks, sparsifier.masks)
        assert equal(snapshot(model), snapshot(fresh))
        trainer.fit(model)
    assert callback.sparsifier.step == 24
    assert len(tried) >= 12
    assert max(tried) <= NUM_ACTIVE
    assert outside(callback.sparsifier) == 0


@pytest.mark.parametrize("method", [RIGL, "gmp", "rigl"])
def test_a_fast_dev_run_is_a_trial_of_a_long_run(tmp_path, method):
    callback = sparse_training(method=method)
    make_trainer(tmp_path, callback, fast_dev_run=2).fit(Net())
    assert callback.sparsifier.step == 2


def test_the_batch_size_finder_leaves_the_masks_and_their_steps_follow_it(tmp_path):
    callback, model = sparse_training(), Net(batch_size=2)
    finder = BatchSizeFinder(steps_per_trial=4, init_val=4, max_trials=1)
    trainer = make_trainer(tmp_path, finder, callback)
    trainer.fit(model)
    assert model.batch_size == 4
    assert callback.sparsifier.step == trainer.global_step == 3 * 8
    assert callback.sparsifier.plan.clock.stop == 18  # three quarters of them
    assert outside(callback.sparsifier) == 0


@pytest.fixture
def saved(tmp_path):
    """A run that was saved every 5 steps: its callback, its model and the folder."""
    callback, model = sparse_training(), Net()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True)
    make_trainer(tmp_path, callback, saving).fit(model, Loader())
    return callback, model, tmp_path


@pytest.mark.parametrize(
    ("path", "average"),
    [
        ("step=5.ckpt", []),
        ("step=20.ckpt", [EMAWeightAveraging(decay=0.8)]),
        ("last", [StochasticWeightAveraging(0.01, swa_epoch_start=1)]),
    ],
)
def test_a_resumed_run_is_the_one_that_never_stopped(tmp_path, path, average):
    """From any checkpoint, within an epoch or at its end: weights, masks and averages, bit for bit."""
    runs = []
    for resumed in (None, path):
        callback, model = sparse_training(), Net()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True)
        trainer = make_trainer(tmp_path, callback, *deepcopy(average), saving)
        where = resumed if resumed in (None, "last") else tmp_path / resumed
        trainer.fit(model, Loader(), ckpt_path=where)
        runs.append((snapshot(model), masks_of(callback), callback.sparsifier.step))
    assert equal(runs[0][0], runs[1][0])
    assert equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2] == 24


def test_the_same_objects_resume_too(saved):
    """As in a notebook, after Ctrl-C: the trained model goes back, and so do masks and the place in the data."""
    callback, model, folder = saved
    weights, masks = snapshot(model), masks_of(callback)
    make_trainer(folder, callback).fit(model, Loader(), ckpt_path=folder / "step=5.ckpt")
    assert equal(snapshot(model), weights)
    assert equal(callback.sparsifier.masks, masks)
    assert callback.sparsifier.step == 24


def test_a_resumed_run_that_is_longer_says_so_and_goes_on(saved):
    callback, _, folder = saved
    other = sparse_training()
    with pytest.warns(UserWarning, match="a training of 24 optimizer steps, which now has 40"):
        make_trainer(folder, other, max_epochs=5).fit(Net(), Loader(), ckpt_path=folder / "step=20.ckpt")
    assert other.sparsifier.step == 40
    assert other.sparsifier.plan.clock.stop == 30
    assert not equal(other.sparsifier.masks, callback.sparsifier.masks)


def test_a_checkpoint_holds_masks_that_any_reader_can_take(saved):
    *_, folder = saved
    checkpoint = torch.load(folder / "step=20.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["SparseTraining"]["sparsifier"]["weights"]
    assert {weight["step"] for weight in state.values()} == {20}
    loaded = Net.load_from_checkpoint(folder / "step=20.ckpt")
    for name, weight in state.items():
        assert not loaded.get_parameter(name)[~weight["mask"]].any()


@pytest.mark.parametrize("how", ["best", "path", "validate", "predict"])
def test_evaluated_weights_bring_their_masks(tmp_path, how):
    callback, model = sparse_training(), Net()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = make_trainer(tmp_path, callback, saving)
    trainer.fit(model, Loader())
    before = masks_of(callback)
    saving.best_model_path = path = str(tmp_path / "step=5.ckpt")  # as a monitored metric might have it
    if how == "predict":
        model.predict_step = lambda batch, batch_idx: model.net(batch[0])
        trainer.predict(model, batches(), ckpt_path=path)
    else:
        evaluate = trainer.validate if how == "validate" else trainer.test
        evaluate(model, ckpt_path="best" if how == "best" else path, verbose=False)
    checkpoint = torch.load(path, weights_only=True)
    assert not equal(callback.sparsifier.masks, before)
    assert callback.sparsifier.step == 5
    assert equal(snapshot(model), checkpoint["state_dict"])
    assert outside(callback.sparsifier) == 0


def test_evaluating_another_model_leaves_the_trained_one_alone(saved):
    callback, model, folder = saved
    weights, masks, other = snapshot(model), masks_of(callback), Net()
    make_trainer(folder, callback).test(other, ckpt_path=folder / "step=5.ckpt", verbose=False)
    assert equal(snapshot(model), weights)
    assert equal(callback.sparsifier.masks, masks)
    assert equal(snapshot(other), torch.load(folder / "step=5.ckpt", weights_only=True)["state_dict"])


@pytest.fixture
def dense(tmp_path):
    """Checkpoints of a run without masks: one whole, one of weights alone."""
    trainer = make_trainer(tmp_path, enable_checkpointing=True, max_epochs=1)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    return tmp_path


@pytest.mark.parametrize("name", ["dense.ckpt", "weights.ckpt"])
def test_a_checkpoint_without_masks_is_refused_and_no_weight_is_lost(dense, name):
    model = Net()
    with pytest.raises(StateError, match=rf"masks of .*{name}: expected the masks of a sparse training.* got none"):
        make_trainer(dense, sparse_training()).fit(model, ckpt_path=dense / name)
    assert equal(snapshot(model), torch.load(dense / name, weights_only=True)["state_dict"])


def test_other_settings_are_refused(saved):
    *_, folder = saved
    with pytest.raises(StateError, match=r"settings of .*: expected sparsity 0.8, got sparsity 0.9"):
        make_trainer(folder, sparse_training(sparsity=0.9)).fit(Net(), Loader(), ckpt_path=folder / "step=5.ckpt")


def test_evaluating_weights_without_masks_warns(dense):
    callback, model = sparse_training(), Net()
    trainer = make_trainer(dense, callback)
    trainer.fit(model)
    with pytest.warns(UserWarning, match=r"masks that are not those of the weights: masks of .*dense.ckpt"):
        trainer.test(model, ckpt_path=dense / "dense.ckpt", verbose=False)
    assert equal(snapshot(model), torch.load(dense / "dense.ckpt", weights_only=True)["state_dict"])


def test_weights_alone_leave_a_summary_that_tells_what_is(tmp_path):
    """A checkpoint with save_weights_only has no states, and Lightning tells no callback that it was loaded."""
    callback, model = sparse_training(), Net()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_weights_only=True)
    trainer = make_trainer(tmp_path, callback, saving)
    trainer.fit(model)
    trainer.test(model, ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    summary = callback.sparsifier.summary()
    assert summary.num_active == NUM_ACTIVE + outside(callback.sparsifier) > NUM_ACTIVE
    assert "non-zeros outside the mask" in str(summary)


def test_a_sparse_network_that_was_loaded_keeps_its_places(saved):
    """Fine-tuning: a new run, whose first masks are where the weights are."""
    *_, folder = saved
    loaded = Net.load_from_checkpoint(folder / "step=20.ckpt")
    before, callback = snapshot(loaded), sparse_training(seed=9)
    make_trainer(folder, callback, max_epochs=1).fit(loaded)
    fresh = Net.load_from_checkpoint(folder / "step=20.ckpt")
    sparsifier = dstlib.sparsify(fresh, sparsity=0.8, method=RIGL, total_steps=8, seed=9)
    assert all(torch.equal(before[name], w) for name, w in snapshot(fresh).items())
    train_one_epoch(fresh)
    assert callback.sparsifier.step == sparsifier.step == 8
    assert equal(snapshot(fresh), snapshot(loaded))


def test_after_an_exception_the_same_objects_go_on(tmp_path):
    callback, model = sparse_training(), Net()
    model.training_step, step = None, model.training_step
    calls = []

    def failing(batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 7:
            raise RuntimeError("out of luck")
        return step(batch, batch_idx)

    model.training_step = failing
    with pytest.raises(RuntimeError, match="out of luck"):
        make_trainer(tmp_path, callback).fit(model)
    assert callback.sparsifier.step == 6
    assert outside(callback.sparsifier) == 0
    sparsifier = callback.sparsifier
    make_trainer(tmp_path, callback).fit(model)
    assert callback.sparsifier is sparsifier
    assert outside(sparsifier) == 0


def test_a_layer_that_is_replaced_while_it_trains_is_named_when_a_checkpoint_is_to_be_saved(tmp_path):
    class Replace(pl.Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                model.net[-1] = nn.Linear(24, 3)

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    with (
        pytest.warns(UserWarning, match="its module is no longer in the model"),
        pytest.raises(StateError, match=r"the network to save: .* in the place of net.*weight\. Replace layers before"),
    ):
        make_trainer(tmp_path, sparse_training(), Replace(), saving).fit(Net())


def test_a_state_whose_fit_failed_is_not_for_another_one(saved):
    *_, folder = saved
    callback, failing = sparse_training(), Net()
    failing.configure_optimizers = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        make_trainer(folder, callback).fit(failing, Loader(), ckpt_path=folder / "step=20.ckpt")
    make_trainer(folder, callback).fit(model := Net(), Loader())
    make_trainer(folder, other := sparse_training()).fit(fresh := Net(), Loader())
    assert callback.sparsifier.step == other.sparsifier.step == 24
    assert equal(snapshot(model), snapshot(fresh))


def test_stopping_early_leaves_it_whole(tmp_path):
    callback, model = sparse_training(), Net(lr=0.0)
    trainer = make_trainer(tmp_path, EarlyStopping("val", patience=1), callback, max_epochs=9)
    trainer.fit(model)
    assert trainer.global_step == callback.sparsifier.step == 16
    assert outside(callback.sparsifier) == 0


class Halves(Net):
    """Each of two ranks has half of each batch."""

    def train_dataloader(self):
        dataset = batches().dataset
        sampler = DistributedSampler(dataset, num_replicas=2, rank=self.trainer.global_rank, shuffle=False)
        return DataLoader(dataset, batch_size=2, sampler=sampler)


def test_two_forked_processes_train_as_one_on_all_of_the_batch(tmp_path):
    """The mean of their gradients is that of the whole batch."""
    callback, model, other = sparse_training(), Halves(optimizer=torch.optim.SGD), Net(optimizer=torch.optim.SGD)
    settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "gradient_clip_val": 0.05}
    make_trainer(tmp_path, callback, **settings).fit(model)
    assert nonzero(model) == NUM_ACTIVE
    with pytest.raises(StateError, match="a training that has begun in this process"):
        callback.sparsifier
    manual(other, clip=nn.utils.clip_grad_norm_)
    for name, weight in snapshot(other).items():
        # the mean of two means of two samples is rounded otherwise than the mean of four: 1e-6 per step, 24 steps
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=3e-5)


def run(folder, strategy, *, kill_at=None, delay=0.0):
    """Runs the program, to its end or until it is killed some seconds after it has told this: "step 7", "save 8"."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("lightning_runs.py")), str(folder), strategy]
    # the file that Lightning is writing lies in TMPDIR: on the file system of the folder, it is moved there in one step
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.strip() == kill_at:
                time.sleep(delay)
                process.kill()
        process.wait()
    return process.returncode


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_ranks_agree(tmp_path, strategy):
    assert run(tmp_path, strategy) == 0
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(first["weights"], second["weights"])
    assert equal(first["masks"], second["masks"])
    assert first["step"] == second["step"] == 40
    assert sum(int(w.count_nonzero()) for w in first["weights"].values() if w.ndim > 1) <= NUM_ACTIVE


@pytest.mark.long
def test_killed_twenty_times_it_ends_as_if_it_had_never_been(tmp_path):
    """At random steps, in the middle of one or of saving; each is resumed by Lightning's own ckpt_path="last"."""
    whole = tmp_path / "whole"
    assert run(whole, "auto") == 0
    expected, draw = torch.load(whole / "rank0.pt", weights_only=True), random.Random(0)
    steps = [f"step {draw.randrange(40)}" for _ in range(10)]
    saves = [f"save {draw.randrange(2, 41, 2)}" for _ in range(10)]
    for number, moment in enumerate(steps + saves):
        folder, delay = tmp_path / str(number), draw.uniform(0, 0.005)
        assert run(folder, "auto", kill_at=moment, delay=delay) == -signal.SIGKILL, moment
        assert run(folder, "auto") == 0, moment
        resumed = torch.load(folder / "rank0.pt", weights_only=True)
        assert equal(resumed["weights"], expected["weights"]), moment
        assert equal(resumed["masks"], expected["masks"]), moment
        assert resumed["step"] == expected["step"] == 40, moment


@pytest.mark.parametrize("strategy", [FSDPStrategy])
def test_sharded_weights_are_refused_by_name(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy), max_epochs=1)
    with pytest.raises(SettingError, match=r"strategy of Trainer with SparseTraining: .* got FSDPStrategy"):
        sparse_training().setup(trainer, Net(), "fit")


def test_trainers_of_the_other_package_take_it_too(tmp_path):
    """Each has classes of its own, under other names; a callback of one need not be a Callback of the other."""
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(12, 3)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return mse_loss(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    callback, model = sparse_training(), Model()
    average = other.callbacks.EMAWeightAveraging(decay=0.8)
    saving = other.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = other.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[callback, average, saving], default_root_dir=tmp_path, **quiet
    )
    trainer.fit(model, batches())
    assert nonzero(model) == 8  # a fifth of 12·3, rounded up
    assert outside(callback.sparsifier) == 0
    resumed = sparse_training()
    other.Trainer(max_epochs=3, accelerator="cpu", callbacks=[resumed], default_root_dir=tmp_path, **quiet).fit(
        Model(), batches(), ckpt_path=tmp_path / "step=5.ckpt"
    )
    assert resumed.sparsifier.step == 24


def test_the_page_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(Path(__file__).parents[1] / "docs" / "lightning.md", {}, least=5, host="lightning")

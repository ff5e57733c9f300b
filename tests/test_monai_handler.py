"""Sparse training as a handler of MONAI's trainers: its own checkpoints, clipping, averages and schedules."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import assert_same, assert_zero_outside, batch, small
from pages import run_page
from torch import nn
from torch.nn.utils import clip_grad_norm_

import dstlib
from dstlib import RIGL, SettingError, StateError, uniform

pytest.importorskip("ignite")
pytest.importorskip("monai")

from ignite.engine import Events
from ignite.handlers import EMAHandler
from ignite.metrics import Average
from monai.engines import GanTrainer, SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader, CheckpointSaver, EarlyStopHandler, LrScheduleHandler, ValidationHandler

from dstlib.integrations.monai import SparseTraining

METHOD = replace(RIGL, interval=2, distribution=uniform)
BATCHES = [dict(zip(("image", "label"), batch(i), strict=True)) for i in range(5)]


class Run:
    """A trainer of MONAI with all that its checkpoint holds; ``load`` is a checkpoint to begin with."""

    def __init__(self, *handlers, sparse=None, seed=0, epochs=4, load=None, **settings):
        self.network = small(seed)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.7)
        self.sparse = SparseTraining(sparsity=0.8, method=METHOD) if sparse is None else sparse
        self.parts = {"net": self.network, "opt": self.optimizer, "lr": self.schedule, "sparse": self.sparse}
        loaders = [] if load is None else [CheckpointLoader(str(load), self.parts)]
        self.trainer = SupervisedTrainer(
            "cpu",
            epochs,
            BATCHES,
            self.network,
            self.optimizer,
            nn.functional.cross_entropy,
            train_handlers=[*loaders, self.sparse, LrScheduleHandler(self.schedule, print_lr=False), *handlers],
            decollate=False,
            **settings,
        )
        self.parts["trainer"] = self.trainer

    def states(self):
        return {name: part.state_dict() for name, part in self.parts.items()}


def evaluate(network, *handlers):
    """An evaluator, its metric falls in training."""
    metric = {"score": Average(lambda output: -output["pred"].mean())}
    return SupervisedEvaluator("cpu", BATCHES, network, key_val_metric=metric, decollate=False, val_handlers=handlers)


def density(sparsifier, network):
    """The share of entries of the sparse weights that are not zero in a network."""
    weights = [network.get_parameter(name) for name in sparsifier.masks]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 20), (2, 12), (3, 8), (7, 4)])
def test_the_run_is_that_of_a_loop_written_by_hand(accumulation, steps):
    """The trainer's own accumulation, whose last step of an epoch takes what is left; the plan ends with the run."""
    run = Run(accumulation_steps=accumulation)
    run.trainer.run()
    assert run.sparse.sparsifier.step == steps

    other = small()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    sparsifier = dstlib.sparsify(other, optimizer, sparsity=0.8, method=METHOD, total_steps=steps)
    for _ in range(4):
        for i, data in enumerate(BATCHES):
            if i % accumulation == 0:
                optimizer.zero_grad()
            (nn.functional.cross_entropy(other(data["image"]), data["label"]) / accumulation).backward()
            if (i + 1) % accumulation == 0 or i == len(BATCHES) - 1:
                optimizer.step()
        schedule.step()
    assert_same(run.network.state_dict(), other.state_dict())
    assert_same(run.sparse.sparsifier.state_dict(), sparsifier.state_dict())
    assert_zero_outside(run.network, sparsifier.masks, run.optimizer)


@pytest.mark.parametrize(
    ("method", "loads"),
    [
        *(("rigl", loads) for loads in ("by hand", "before the handler", "after the handler")),
        *((method, "before the handler") for method in ("gmp", "snfs", "topkast")),
    ],
)
def test_a_run_resumed_from_its_checkpoint_is_the_uninterrupted_one(method, loads, tmp_path):
    method = replace(dstlib.METHODS[method], interval=2, distribution=uniform)

    def make(**kwargs):
        return Run(sparse=SparseTraining(sparsity=0.8, method=method), **kwargs)

    whole = make()
    whole.trainer.run()
    first = make()
    CheckpointSaver(str(tmp_path), first.parts, save_interval=1).attach(first.trainer)
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda engine: engine.terminate())
    first.trainer.run()
    path = tmp_path / "checkpoint_epoch=2.pt"
    second = make(seed=1, load=path if loads == "before the handler" else None)
    if loads == "after the handler":
        CheckpointLoader(str(path), second.parts).attach(second.trainer)
    elif loads == "by hand":
        CheckpointLoader(str(path), second.parts)(second.trainer)
    second.trainer.run()
    assert second.trainer.state.epoch == 4
    assert_same(whole.states(), second.states())


def test_clipping_sees_the_norm_of_the_masked_gradient():
    """At each step, also where the masks change; the gradients in between are left to gather."""
    run, norms, expected = Run(accumulation_steps=2), [], []

    @run.trainer.on(IterationEvents.BACKWARD_COMPLETED)
    def clip(engine):
        if engine.state.iteration % 5 in (0, 2, 4):  # as the trainer steps: see accumulation_steps
            masks = run.sparse.sparsifier.masks
            grads = [p.grad * masks.get(n, 1) for n, p in run.network.named_parameters()]
            expected.append(float(torch.stack([g.norm() for g in grads]).norm()))
            norms.append(float(clip_grad_norm_(run.network.parameters(), 0.1)))

    run.trainer.run()
    assert norms == pytest.approx(expected, rel=1e-6)  # float32, added in another order
    assert len(norms) == run.sparse.sparsifier.step == 12


class Scaled:
    """Brings to the CPU what MONAI's trainers do in half precision on a GPU alone: a scaler of the loss."""

    def __init__(self, overflow_at=()):
        self.overflow_at = overflow_at

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.overflow)

    def start(self, engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflow(self, engine):
        if engine.state.iteration in self.overflow_at:
            engine.state.output["loss"] = engine.state.output["loss"] * torch.inf


@pytest.mark.filterwarnings("ignore:.*(CUDA|cuda).*")
def test_under_amp_gradients_are_unscaled_and_masked_before_they_are_clipped():
    plain, scaled = Run(), Run(Scaled(), amp=True)
    for run in (plain, scaled):
        run.trainer.add_event_handler(
            IterationEvents.BACKWARD_COMPLETED, lambda _, run=run: clip_grad_norm_(run.network.parameters(), 0.1)
        )
        run.trainer.run()
    assert_same(plain.states(), scaled.states())  # the scale is a power of two


@pytest.mark.filterwarnings("ignore:.*(CUDA|cuda).*")
def test_a_step_that_overflowed_is_not_counted():
    run = Run(Scaled(overflow_at=(2, 7)), amp=True)
    masks = {}

    @run.trainer.on(Events.ITERATION_COMPLETED)
    def record(engine):
        masks[engine.state.iteration] = {n: m.clone() for n, m in run.sparse.sparsifier.masks.items()}

    run.trainer.run()
    assert run.sparse.sparsifier.step == 20 - 2
    assert_same(masks[1], masks[2])
    assert_same(masks[6], masks[7])
    assert_zero_outside(run.network, run.sparse.sparsifier.masks, run.optimizer)


@pytest.mark.parametrize("event", [IterationEvents.MODEL_COMPLETED, Events.ITERATION_COMPLETED(every=3)])
def test_an_average_is_as_dense_as_the_network_whenever_it_is_read(event):
    """Updated before the handler or after it; validated, saved and left over at the end."""
    run, densities = Run(), []
    average = EMAHandler(run.network, momentum=0.3)
    average.attach(run.trainer, event=event)
    run.sparse.mask_average(average.ema_model)
    evaluator = evaluate(average.ema_model)
    ValidationHandler(1, evaluator).attach(run.trainer)

    @evaluator.on(Events.STARTED)
    def look(engine):
        densities.append(density(run.sparse.sparsifier, average.ema_model))

    run.trainer.run()
    assert max(densities) <= run.sparse.sparsifier.density  # what has just grown is not in the average yet
    assert density(run.sparse.sparsifier, average.ema_model) == run.sparse.sparsifier.density
    assert not torch.equal(average.ema_model.head.weight, run.network.head.weight)


def test_validation_moves_nothing_and_the_best_checkpoint_brings_its_masks(tmp_path):
    run, saved = Run(), {}
    saver = CheckpointSaver(
        str(tmp_path),
        {"net": run.network, "sparse": run.sparse},
        save_key_metric=True,
        key_metric_filename="best.pt",
    )
    evaluator = evaluate(run.network, saver)
    ValidationHandler(1, evaluator).attach(run.trainer)

    @evaluator.on(Events.STARTED)
    def record(engine):
        saved[run.trainer.state.epoch] = copy.deepcopy(run.states())

    @evaluator.on(Events.COMPLETED)
    def compare(engine):
        assert_same(saved[run.trainer.state.epoch], run.states())
        scores[run.trainer.state.epoch] = engine.state.metrics["score"]

    scores = {}
    run.trainer.run()
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    epoch = max(scores, key=scores.get)
    assert_same(best, {name: saved[epoch][name] for name in ("net", "sparse")})
    assert epoch < 4, "else the last masks would do as well"
    CheckpointLoader(str(tmp_path / "best.pt"), {"net": run.network, "sparse": run.sparse})(run.trainer)
    assert_same(best["net"], run.network.state_dict())
    assert_zero_outside(run.network, run.sparse.sparsifier.masks)
    plain = small(3)  # without dstlib
    CheckpointLoader(str(tmp_path / "best.pt"), {"net": plain})(run.trainer)
    assert_same(best["net"], plain.state_dict())


def test_a_run_that_goes_on_keeps_its_masks():
    run = Run(epochs=2, sparse=SparseTraining(sparsity=0.8, method=METHOD, total_steps=20))
    run.trainer.run()
    run.trainer.state.max_epochs = 4
    run.trainer.run()
    whole = Run()
    whole.trainer.run()
    assert_same(whole.states(), run.states())


def test_a_run_that_is_made_longer_changes_its_schedule_and_says_so():
    run = Run(epochs=2)
    run.trainer.run()
    run.trainer.state.max_epochs = 4
    with pytest.warns(UserWarning, match="training of 10 optimizer steps, which now has 20"):
        run.trainer.run()
    assert run.sparse.sparsifier.plan.clock.stop == 15
    assert run.sparse.sparsifier.step == 20
    assert_zero_outside(run.network, run.sparse.sparsifier.masks, run.optimizer)


def test_a_run_that_stops_early_ends_sparse():
    run = Run(epochs=50)
    evaluator = evaluate(run.network)
    EarlyStopHandler(patience=2, score_function=lambda engine: 0.0, trainer=run.trainer).attach(evaluator)
    ValidationHandler(1, evaluator).attach(run.trainer)
    run.trainer.run()
    assert run.trainer.state.epoch == 3
    assert density(run.sparse.sparsifier, run.network) == run.sparse.sparsifier.density == pytest.approx(0.2, abs=0.01)


def test_the_settings_are_those_of_sparsify():
    settings = {"include": ("conv", "head"), "exclude": "head", "overrides": {"conv": 0.5}, "seed": 3}
    run = Run(sparse=SparseTraining(sparsity=0.8, method="static", **settings))
    run.trainer.run()
    sparsifier = dstlib.sparsify(small(), sparsity=0.8, method="static", **settings)
    assert_same(run.sparse.sparsifier.masks, sparsifier.masks)


def make_gan(*handlers):
    generator, critic = nn.Linear(8, 16), nn.Linear(16, 4)
    return GanTrainer(
        "cpu",
        2,
        torch.utils.data.DataLoader(torch.ones(8, 16), batch_size=4),
        generator,
        torch.optim.SGD(generator.parameters(), lr=0.1),
        lambda fakes: critic(fakes).mean(),
        critic,
        torch.optim.SGD(critic.parameters(), lr=0.1),
        lambda fakes, reals: critic(reals).mean() - critic(fakes.detach()).mean(),
        d_prepare_batch=lambda batch, *_: batch,
        latent_shape=8,
        train_handlers=handlers,
    )


def test_two_networks_are_made_sparse_by_hand_and_saved_beside(tmp_path):
    """As the error that names such a trainer advises."""
    trainer = make_gan()
    networks = {"g": trainer.g_network, "d": trainer.d_network}
    method = replace(METHOD, interval=1)
    masks = {f"{n}_masks": dstlib.sparsify(m, sparsity=0.5, method=method, total_steps=4) for n, m in networks.items()}
    CheckpointSaver(str(tmp_path), {**networks, **masks}, save_final=True, final_filename="a.pt").attach(trainer)
    trainer.run()
    assert {name: sparsifier.step for name, sparsifier in masks.items()} == {"g_masks": 4, "d_masks": 4}
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    for name, network in networks.items():
        assert_zero_outside(network, masks[f"{name}_masks"].masks)
        assert_same(saved[f"{name}_masks"], masks[f"{name}_masks"].state_dict())


def test_it_says_what_it_cannot_do():
    with pytest.raises(SettingError, match=r"a network and an optimizer.*GanTrainer.*sparsify"):
        make_gan(SparseTraining(sparsity=0.8)).run()
    endless = Run()
    endless.trainer.state.epoch_length, endless.trainer.data_loader = None, (data for data in BATCHES)
    with pytest.raises(SettingError, match=r"epoch_length of SupervisedTrainer.*total_steps="):
        endless.trainer.run()


def test_masks_of_other_settings_are_refused(tmp_path):
    run = Run(epochs=1)
    CheckpointSaver(str(tmp_path), run.parts, save_final=True, final_filename="last.pt").attach(run.trainer)
    run.trainer.run()
    other = Run(sparse=SparseTraining(sparsity=0.9, method=METHOD), load=tmp_path / "last.pt")
    with pytest.raises(StateError, match=r"sparsity 0\.8, got sparsity 0\.9"):
        other.trainer.run()


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(Path(__file__).parents[1] / "docs" / "monai.md", {}, least=4)

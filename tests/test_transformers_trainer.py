"""Sparse training by Hugging Face's own Trainer: its clipping, accumulation, saving, resumption and best model."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import assert_same, assert_zero_outside
from pages import run_page
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpoint_activations

import dstlib
from dstlib import SettingError, StateError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import trainer_runs
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from trainer_runs import RIGL, Net, data, net, sparse, trainer
from transformers import EarlyStoppingCallback, MixtralConfig, MixtralForCausalLM, TrainerCallback, set_seed

import dstlib.integrations.transformers as adapter
from dstlib.integrations.transformers import FILE, last_checkpoint


def logged(made, *names):
    return [[entry.get(name) for name in names] for entry in made.state.log_history if "grad_norm" in entry]


def test_a_model_is_sparse_from_the_first_step_to_the_last(tmp_path):
    callback = sparse()
    made = trainer(tmp_path, callback)
    made.train()
    sparsifier = callback.sparsifier
    assert sparsifier.step == 12 == made.state.max_steps
    assert sparsifier.density == pytest.approx(0.2, abs=1 / 1536)  # whole units
    assert_zero_outside(made.model, sparsifier.masks, made.optimizer.optimizer)


def backward(model):
    x, labels = (torch.stack([item[key] for item in data(4)]) for key in ("x", "labels"))
    model(x, labels)["loss"].backward()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def fused_adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def by_hand(made, model, optimizer, *, accumulation, max_norm, scaler=None, method=RIGL):
    """What a Trainer does, in a loop that masks gradients before it clips them; returns the sparsifier and norms."""
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=method, total_steps=12)
    batches, norms = [list(made.get_train_dataloader())] * 5, []
    for epoch in batches:
        for first in range(0, len(epoch), accumulation):
            if len(norms) == 12:
                return sparsifier, norms
            group = epoch[first : first + accumulation]
            for batch in group:
                loss = model(**batch)["loss"] / len(group)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            sparsifier.before_step(optimizer)
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    raise AssertionError("too few batches")


def made_for(tmp_path, callback, model, optimizer, *, accumulation, **settings):
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return trainer(
        tmp_path,
        callback,
        model=model,
        optimizers=(optimizer, constant),
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        save_strategy="no",
        **settings,
    )


@pytest.mark.parametrize("accumulation", [1, 4])  # 15 batches an epoch: the last group of four has three
def test_clipping_sees_the_masked_norm_and_equals_a_loop_by_hand(tmp_path, accumulation):
    callback, model, hand = sparse(), net(), net()
    made = made_for(tmp_path, callback, model, sgd(model), accumulation=accumulation, max_grad_norm=0.1)
    sparsifier, norms = by_hand(made, hand, sgd(hand), accumulation=accumulation, max_norm=0.1)
    made.train()
    assert min(norms) > 0.1  # each is clipped
    assert logged(made, "grad_norm") == [[norm] for norm in norms]
    assert_same(model.state_dict(), hand.state_dict())
    assert_same(callback.sparsifier.state_dict(), sparsifier.state_dict())


@pytest.mark.parametrize("make", [sgd, fused_adam])
@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_a_step_that_the_loss_scaler_skips_is_not_counted(tmp_path, monkeypatch, make, max_grad_norm):
    """As with fp16 on a GPU: the scaler is real, and so is what Accelerate does with it."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=4)

    method = replace(dstlib.METHODS["mest"], interval=3)  # adds weights and gradients, so that their scale matters
    callback, model, hand = sparse(method=method), net(), net()
    with torch.no_grad():
        for either in (model, hand):
            either.head.weight.mul_(100)  # a large loss, which overflows at first, and whenever the scale grows
    made = made_for(tmp_path, callback, model, make(model), accumulation=1, max_grad_norm=max_grad_norm)
    accelerator = made.accelerator
    monkeypatch.setattr(accelerator, "scaler", scaler())
    # what it does under fp16, which autocast would make of the forward pass as well
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: accelerator.scaler.unscale_(made.optimizer.optimizer))
    norm = max_grad_norm or float("inf")
    sparsifier, norms = by_hand(made, hand, make(hand), accumulation=1, max_norm=norm, scaler=scaler(), method=method)
    made.train()
    finite = [norm for norm in norms if norm < float("inf")]
    assert 0 < len(finite) < 12
    assert callback.sparsifier.step == len(finite)
    assert_same(callback.sparsifier.state_dict(), sparsifier.state_dict())
    assert_same(model.state_dict(), hand.state_dict())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, first, again, elsewhere = (sparse() for _ in range(4))
    made = trainer(tmp_path / "whole", whole)
    made.train()
    stopped = trainer(tmp_path / "run", first, EarlyStop(at=7))  # between an update and the next
    stopped.train()
    assert first.sparsifier.step == 7
    # by the trainer's own search, and from a folder that was moved
    last = trainer(tmp_path / "run", again)
    last.train(resume_from_checkpoint=True)
    moved = shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "kept" / "of_step_8")
    other = trainer(tmp_path / "other", elsewhere)
    other.train(resume_from_checkpoint=str(moved))
    for resumed, callback in ((last, again), (other, elsewhere)):
        assert_same(resumed.model.state_dict(), made.model.state_dict())
        assert_same(callback.sparsifier.state_dict(), whole.sparsifier.state_dict())
        assert_same(resumed.optimizer.state_dict(), made.optimizer.state_dict())
        assert logged(resumed, "step", "loss", "grad_norm") == logged(made, "step", "loss", "grad_norm")


class EarlyStop(TrainerCallback):
    """Stops at a step, and saves."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **others):
        control.should_training_stop |= state.global_step == self.at
        control.should_save |= state.global_step == self.at


@pytest.fixture
def checkpoint(tmp_path):
    trainer(tmp_path / "run", sparse(), max_steps=4).train()
    return tmp_path / "run" / "checkpoint-4"


def without(folder):
    (folder / FILE).unlink()


def damaged(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:1000])


def of_another_run(folder):
    callback = sparse(seed=1)
    trainer(folder.parent.parent / "another", callback, max_steps=4).train()
    saved = torch.load(folder / FILE, weights_only=True)
    torch.save({**saved, "sparsifier": callback.sparsifier.state_dict()}, folder / FILE)


@pytest.mark.parametrize(
    ("harm", "settings", "message"),
    [
        (without, {}, f"expected {FILE} beside trainer_state.json, got only model.safetensors, optimizer.pt"),
        (damaged, {}, "a damaged or foreign file"),
        (of_another_run, {}, "expected zeros outside the masks of dstlib_state.pt, got [0-9,]+ non-zeros"),
        (lambda folder: None, {"sparsity": 0.9}, "expected sparsity 0.8, got sparsity 0.9"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused_and_nothing_erased(
    tmp_path, checkpoint, harm, settings, message
):
    harm(checkpoint)
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    made = trainer(tmp_path / "run", sparse(**settings))
    with pytest.raises(StateError, match=message):
        made.train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert_same(made.model.state_dict(), load_file(checkpoint / "model.safetensors"))


def accuracy_falls():
    """A metric that is best at the second evaluation."""
    calls = []

    def metrics(prediction):
        calls.append(prediction)
        return {"accuracy": [0.5, 0.9, 0.6, 0.4][len(calls) - 1]}

    return metrics


@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_the_best_model_at_the_end_has_the_masks_that_belong_to_it(tmp_path, save_strategy):
    callback = sparse()
    made = trainer(
        tmp_path,
        callback,
        EarlyStoppingCallback(early_stopping_patience=2),
        eval_dataset=data(8),
        compute_metrics=accuracy_falls(),
        max_steps=20,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy=save_strategy,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    made.train()
    best = tmp_path / "checkpoint-8"
    assert made.state.best_model_checkpoint == str(best)
    assert made.state.global_step == 16  # stopped early
    assert callback.sparsifier.step == 8
    assert_same(made.model.state_dict(), load_file(best / "model.safetensors"))
    assert_zero_outside(made.model, callback.sparsifier.masks)
    active = sum(int(mask.sum()) for mask in callback.sparsifier.masks.values())
    assert active == sum(int(made.model.state_dict()[name].count_nonzero()) for name in callback.sparsifier.masks)


def experts():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    set_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=30, max_position_embeddings=16, **sizes, **heads))


def test_weights_that_the_trainer_has_not_loaded_are_told_of(tmp_path):
    """transformers 5.24 saves experts under names that its Trainer does not load; from_pretrained does."""
    tokens = torch.randint(0, 30, (60, 8), generator=torch.Generator().manual_seed(0))
    settings = {"train_dataset": [{"input_ids": row, "labels": row} for row in tokens], "eval_steps": 4}
    settings |= {"eval_dataset": settings["train_dataset"][:8], "eval_strategy": "steps"}
    whole, again = sparse(), sparse()
    made = trainer(tmp_path, whole, model=experts(), **settings)
    made.train()
    folder = str(tmp_path / "checkpoint-8")
    with pytest.raises(StateError, match=r"non-zeros. .* by from_pretrained"):
        trainer(tmp_path, sparse(), model=experts(), **settings).train(resume_from_checkpoint=folder)
    resumed = trainer(tmp_path, again, model=MixtralForCausalLM.from_pretrained(folder), **settings)
    resumed.train(resume_from_checkpoint=folder)
    assert_same(resumed.model.state_dict(), made.model.state_dict())
    assert_same(again.sparsifier.state_dict(), whole.sparsifier.state_dict())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # an early one
    with pytest.raises(StateError, match=r"non-zeros. .* by from_pretrained"):
        trainer(tmp_path, sparse(), model=experts(), **settings, **best).train()


def test_a_model_that_was_not_loaded_at_the_end_keeps_its_own_masks(tmp_path):
    """As in a trial that a search prunes: the training ends, but nobody loads the best model."""
    callback = sparse()
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps"}
    made = trainer(tmp_path, callback, eval_dataset=data(8), eval_steps=4, **settings)
    made._load_best_model = lambda: None
    made.train()
    made.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    made.callback_handler.on_train_end(made.args, made.state, made.control)
    assert callback.sparsifier.step == 12
    assert_zero_outside(made.model, callback.sparsifier.masks)


def test_evaluation_and_other_backward_passes_move_nothing(tmp_path):
    class Look(TrainerCallback):
        """Computes gradients of its own between the steps, as those who watch a training do."""

        def on_step_end(self, args, state, control, *, model, **others):
            backward(model)
            model.zero_grad()

    def end(folder, *others, **settings):
        callback = sparse()
        made = trainer(folder, callback, *others, model=net(), eval_dataset=data(8), **settings)
        made.train()
        return {"model": made.model.state_dict(), "sparsifier": callback.sparsifier.state_dict()}

    plain = end(tmp_path / "plain", save_strategy="no")
    watched = end(
        tmp_path / "watched", Look(), save_strategy="no", eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    assert_same(watched, plain)


def test_each_model_of_model_init_is_made_sparse_anew(tmp_path):
    callback = sparse()
    made = trainer(tmp_path, callback, model_init=lambda: net(), save_strategy="no")
    ends = []
    for _ in range(2):
        made.train()
        ends.append((made.model, callback.sparsifier))
    (first, before), (second, after) = ends
    assert first is not second
    assert_same(before.state_dict(), after.state_dict())
    for model, sparsifier in ends:  # the first one's zeros still hold for whoever trains it on
        optimizer = sgd(model)
        backward(model)
        optimizer.step()
        assert_zero_outside(model, sparsifier.masks)


@pytest.mark.parametrize("method", ["rigl", "snfs"])  # the latter moves budgets between the layers
def test_a_second_training_goes_on_from_the_weights_of_the_first_with_a_clock_of_its_own(tmp_path, method):
    begun = []

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, *, model, **others):
            if state.global_step == 0:
                begun.append(({name: p.detach().clone() for name, p in model.named_parameters()}, callback.sparsifier))

    callback = sparse(method=replace(dstlib.METHODS[method], interval=3))
    made = trainer(tmp_path, callback, Look(), save_strategy="no")
    made.train()
    first, at_end = callback.sparsifier, {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    weights, second = begun[-1]
    assert_same(weights, at_end)
    assert second is callback.sparsifier is not first
    assert second.step == 12
    assert max(weight["updated_at"] for weight in second.state_dict()["weights"].values()) == 9
    assert_zero_outside(made.model, second.masks)


def test_a_head_that_is_replaced_between_two_trainings_is_sparse_in_the_second(tmp_path):
    made = trainer(tmp_path, callback := sparse(), save_strategy="no")
    made.train()
    name = callback.sparsifier.weights[-1].name.removesuffix(".weight")
    layer = made.model.get_submodule(name)
    made.model.set_submodule(name, nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
    made.optimizer = made.lr_scheduler = None  # the Trainer's next one holds the new head
    made.train()
    assert callback.sparsifier.weights[-1].parameter is made.model.get_submodule(name).weight
    assert_zero_outside(made.model, callback.sparsifier.masks)


def test_a_batch_that_is_too_large_is_halved_and_the_training_begun_again(tmp_path):
    class Small(Net):
        """Has no memory for more than two."""

        def forward(self, x, labels):
            if len(x) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(x, labels)

    found, given = sparse(), sparse()
    halved = trainer(tmp_path, found, model=Small(), auto_find_batch_size=True, save_strategy="no")
    plain = trainer(tmp_path, given, model=Small(), per_device_train_batch_size=2, save_strategy="no")
    for made in (halved, plain):
        made.model.load_state_dict(net().state_dict())
        set_seed(0)
        made.train()
    assert_same(found.sparsifier.state_dict(), given.sparsifier.state_dict())
    assert found.sparsifier.step == 12


def test_a_training_that_is_refused_leaves_the_one_before_it_alone(tmp_path, checkpoint):
    callback, model = sparse(), net()
    made = trainer(tmp_path / "other", callback, model=model, save_strategy="no")
    made.train()
    trained, at_end = callback.sparsifier, {name: weight.clone() for name, weight in model.state_dict().items()}
    without(checkpoint)
    with pytest.raises(StateError, match="got only"):
        made.train(resume_from_checkpoint=str(checkpoint))
    assert callback.sparsifier is trained
    model.load_state_dict(at_end)
    optimizer = sgd(model)
    backward(model)
    optimizer.step()
    assert_zero_outside(model, trained.masks)


def trains_and_resumes(folder, **settings):
    """Trains, holds zeros in weights and optimizer state, and resumes bit for bit; returns the Trainer."""
    callback, again = sparse(), sparse()
    made = trainer(folder, callback, **settings)
    made.train()
    assert callback.sparsifier.step == 12
    assert_zero_outside(made.model, callback.sparsifier.masks, made.optimizer.optimizer)
    for file in folder.glob(f"checkpoint-*/{FILE}"):
        weights = load_file(file.with_name("model.safetensors"))
        for name, weight in torch.load(file, weights_only=True)["sparsifier"]["weights"].items():
            assert not weights[name][~weight["mask"]].any()
    resumed = trainer(folder.with_name("again"), again, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same(resumed.model.state_dict(), made.model.state_dict())
    assert_same(again.sparsifier.state_dict(), callback.sparsifier.state_dict())


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adagrad", "rmsprop"])
def test_optimizers_by_their_names(tmp_path, optim):
    trains_and_resumes(tmp_path / "run", optim=optim)


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "optim"),
    [
        *(("schedulefree", f"schedule_free_{name}") for name in ("adamw", "radam", "sgd")),
        *(("bitsandbytes", name) for name in ("lion_32bit", "ademamix", "adamw_8bit", "rmsprop_bnb")),
        *(("torchao", f"adamw_torch_{bits}bit") for bits in (4, 8)),
    ],
)
def test_optimizers_of_other_packages_by_their_names(tmp_path, package, optim):
    """Those without a schedule are evaluated and saved as averages, which are as sparse as the weights."""
    pytest.importorskip(package)
    settings = {"lr_scheduler_type": "constant", "eval_dataset": data(8), "eval_strategy": "steps", "eval_steps": 4}
    trains_and_resumes(tmp_path / "run", optim=optim, **settings)


def test_half_precision(tmp_path):
    trains_and_resumes(tmp_path / "run", bf16=True)


class Checkpointed(Net):
    """Computes its body again in the backward pass; if ``reentrant``, by a backward pass within the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.load_state_dict(net().state_dict())

    def forward(self, x, labels):
        hidden = checkpoint_activations(self.body, x.clone().requires_grad_(), use_reentrant=self.reentrant)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_checkpointed_activations(tmp_path):
    made, plain = (
        trainer(tmp_path, sparse(), model=model, save_strategy="no") for model in (Checkpointed(False), net())
    )
    for each in (made, plain):
        each.train()
    assert_same(made.model.state_dict(), plain.model.state_dict())
    assert logged(made, "grad_norm") == logged(plain, "grad_norm")
    with pytest.raises(SettingError, match="use_reentrant=False"):
        trainer(tmp_path, sparse(), model=Checkpointed(True), save_strategy="no").train()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused(tmp_path, monkeypatch, name):
    made = trainer(tmp_path, sparse())
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType[name])
    with pytest.raises(SettingError, match=f"got {name}"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


def test_the_last_whole_checkpoint_is_found(tmp_path, checkpoint):
    run = checkpoint.parent
    assert last_checkpoint(tmp_path / "nothing") is None
    assert last_checkpoint(run) == str(checkpoint)
    shutil.copytree(checkpoint, run / "checkpoint-30")
    shutil.copytree(checkpoint, run / "checkpoint-old")
    assert last_checkpoint(run) == str(run / "checkpoint-30")
    state = run / "checkpoint-30" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])  # killed while it was written
    assert last_checkpoint(run) == str(checkpoint)
    state.write_text("[" * 100_000)  # which would take more of Python's stack than there is
    assert last_checkpoint(run) == str(checkpoint)
    state.unlink()
    assert last_checkpoint(run) == str(checkpoint)
    without(checkpoint)
    assert last_checkpoint(run) is None


def test_masks_are_written_before_what_makes_a_checkpoint_whole(tmp_path):
    """And before the Trainer deletes older ones."""
    callback = sparse()
    made = trainer(tmp_path, callback, save_total_limit=1)
    orders = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **others):
            save = state.save_to_json

            def watched(path):
                save(path)
                folder = Path(path).parent
                times = {
                    name: (folder / name).stat().st_mtime_ns for name in ("model.safetensors", FILE, Path(path).name)
                }
                orders.append(sorted(times, key=times.get))

            state.save_to_json = watched

    made.add_callback(Watch())
    made.train()
    assert orders == [["model.safetensors", FILE, "trainer_state.json"]] * 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-12"]


@pytest.mark.long
def test_runs_that_are_killed_at_any_moment_end_as_if_they_had_not_been(tmp_path):
    """By SIGKILL, up to three times each; some of them within a save, which ``last_checkpoint`` steps over."""
    command = [sys.executable, trainer_runs.__file__, "kill", str(tmp_path), "20"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    trials = [[int(number) for number in line.split()] for line in printed.splitlines()]
    assert len(trials) == 20
    assert sum(kills for _, kills, _ in trials) >= 20
    assert sum(partial for *_, partial in trials) >= 1
    whole = torch.load(tmp_path / "whole" / "end.pt", weights_only=True)
    for trial, _, _ in trials:
        assert_same(torch.load(tmp_path / str(trial) / "end.pt", weights_only=True), whole, f"trial {trial}")


def launched(folder, processes, **settings):
    folder.mkdir(exist_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [trainer_runs.__file__, "run", str(folder), json.dumps(settings)]
    subprocess.run([*(launcher if processes > 1 else [sys.executable]), *command], check=True)
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.long
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    """Masks bit for bit; the masked norm and the weights up to the order of sums, in double precision."""
    settings = {
        "is_double": True,
        "optim": "sgd",
        "max_grad_norm": 0.1,
        "train_sampling_strategy": "sequential",
        "gradient_accumulation_steps": 2,
    }
    one = launched(tmp_path / "one", 1, per_device_train_batch_size=4, **settings)
    two = launched(tmp_path / "two", 2, per_device_train_batch_size=2, **settings)
    for name, weight in one["sparsifier"]["weights"].items():
        assert torch.equal(weight["mask"], two["sparsifier"]["weights"][name]["mask"])
    assert min(one["norms"].values()) > 0.1
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-12)
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-12, atol=1e-14)


@pytest.mark.long
def test_two_processes_resume_as_if_they_had_not_stopped(tmp_path):
    whole = launched(tmp_path, 2, gradient_accumulation_steps=2)  # with dropout, which differs between ranks
    (tmp_path / "end.pt").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    assert_same(launched(tmp_path, 2, gradient_accumulation_steps=2), whole)


def test_the_page_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(Path(__file__).parents[1] / "docs" / "transformers.md", {}, least=4, host="transformers")


def test_a_trainer_that_tells_nothing_of_its_checkpoint_is_refused():
    """Its folder is read off the stack; a release that has it elsewhere must not make masks begin anew."""
    with pytest.raises(StateError, match="checkpoint to resume of Trainer with SparseTraining"):
        adapter._resumed_from()

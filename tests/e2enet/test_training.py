"""The training loop: the same bits whether or not it was interrupted, and the arithmetic of the recipe."""

import copy
import math
import signal
from dataclasses import replace

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from dstlib.errors import DstlibError, SettingError, StateError
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.phantoms.ct import phantoms
from dstlib.zoo.e2enet.network import flow_counts
from dstlib.zoo.e2enet.training import loop as module
from dstlib.zoo.e2enet.training.execution import Execution
from dstlib.zoo.e2enet.training.loop import interruptible, train, validate
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss
from dstlib.zoo.e2enet.training.methods import kernel_method
from dstlib.zoo.e2enet.training.run_directory import open_run
from dstlib.zoo.e2enet.training.settings import TrainSettings
from dstlib.zoo.e2enet.training.state import begin_from, start

CASES = phantoms(2, shape=(32, 40, 40)).cases
PATCHES = PatchSettings(patch_size=(8, 16, 16), mirror=())
NETWORK = E2ENetConfig(channels=(4, 6, 8), strides=((1, 2, 2),) * 2, heads=2, num_classes=16)
SETTINGS = {
    "dsff": TrainSettings(epochs=2, iterations=3, interval=2, momentum=0.9),
    "rigl": TrainSettings(epochs=2, iterations=3, interval=2, momentum=0.9, method="rigl"),
    "static": TrainSettings(epochs=2, iterations=3, momentum=0.9, method="static"),
    "dense": TrainSettings(epochs=2, iterations=3, momentum=0.9, sparsity=0.0),
    "adamw": TrainSettings(epochs=2, iterations=3, interval=2, optimizer="adamw", learning_rate=1e-3),
}


@pytest.fixture
def begin():
    """Starts trainings, and ends what they listen to."""
    started = []

    def begin(settings, network=NETWORK, execution=None):
        torch.manual_seed(settings.seed)
        started.append(start(E2ENet(network), settings, execution))
        return started[-1]

    yield begin
    for training in started:
        if training.sparsifier:
            training.sparsifier.detach()


def go(training, **options):
    return train(training, CASES, patches=PATCHES, **options)


def batches_changed(monkeypatch, change):
    """Lets ``change(iteration, images, labels)`` have a look at each batch before the training does."""
    draw = module.batches

    def changed(*arguments, start, **options):
        for iteration, (images, labels) in enumerate(draw(*arguments, start=start, **options), start):
            yield change(iteration, images, labels)

    monkeypatch.setattr(module, "batches", changed)


def assert_same(a, b, where="state"):
    """Raises unless two nested states are equal in every bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("stop", [2, 3, 4], ids=["in an epoch, at an update", "between epochs", "in an epoch"])
def test_resumed_equals_uninterrupted_bit_for_bit(begin, tmp_path, method, stop):
    settings = SETTINGS[method]
    whole = begin(settings)
    assert go(whole)

    first = begin(settings)
    with open_run(tmp_path / "run", {}) as run:
        stopped = go(
            first,
            save=lambda t: run.save_checkpoint(t.state_dict()),
            should_stop=lambda: first.iteration == stop,
        )
    assert not stopped
    assert first.iteration == stop

    second = begin(settings)
    with open_run(tmp_path / "run", {}, resume=True) as run:
        second.load_state_dict(run.load_checkpoint())
    assert go(second)
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("method", ["dsff", "static", "dense"])
def test_the_flows_of_each_epoch_are_counted(begin, method):
    training = begin(SETTINGS[method])
    go(training)
    if method == "dense":
        assert training.flows == []
        return
    first, *_, last = training.flows
    assert [row["epoch"] for row in training.flows] == [0, 1, 2]
    kept = training.sparsifier.masks["fusion.stage1_level1.units.0.conv.weight"].flatten(2).any(dim=2).sum()
    for row in training.flows:
        assert row["stage1_level1.forward"] + row["stage1_level1.upward"] == kept, "an update only exchanges"
    assert last == {"epoch": 2, **flat(flow_counts(training.model, training.sparsifier.masks))}
    assert ({**first, "epoch": 2} == last) == (method == "static")


def flat(counts):
    return {f"{node}.{flow}": count for node, flows in counts.items() for flow, count in flows.items()}


def test_a_training_that_was_saved_before_flows_were_counted_counts_them_from_there_on(begin):
    first = begin(SETTINGS["dsff"])
    go(first, should_stop=lambda: first.iteration == 4)
    state = first.state_dict()
    del state["flows"]
    second = begin(SETTINGS["dsff"])
    second.load_state_dict(state)
    go(second)
    assert [row["epoch"] for row in second.flows] == [2]


def test_a_signal_in_the_middle_of_an_epoch_finishes_the_iteration_and_saves(begin, monkeypatch):
    settings = SETTINGS["dsff"]
    training, saved = begin(settings), []

    def interrupt(iteration, images, labels):
        if iteration == 4:
            signal.raise_signal(signal.SIGINT)
        return images, labels

    batches_changed(monkeypatch, interrupt)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interruptible() as should_stop:
        finished = go(training, save=lambda t: saved.append(t.iteration), should_stop=should_stop)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second Ctrl-C ends the process
    assert not finished
    assert saved == [3, 5]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_another_seed_trains_another_network(begin):
    losses = []
    for seed in (0, 0, 1):
        settings = TrainSettings(epochs=1, iterations=2, momentum=0.9, method="static", seed=seed)
        training = begin(settings)
        go(training)
        losses.append(training.metrics[-1]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_one_row_per_epoch_and_the_learning_rate_of_the_recipe(begin):
    settings = SETTINGS["dense"]
    training = begin(settings)
    go(training)
    assert [row["epoch"] for row in training.metrics] == [1, 2]
    assert [row["iteration"] for row in training.metrics] == [3, 6]
    assert [row["learning_rate"] for row in training.metrics] == [0.01, 0.01 * 0.5**0.9]
    assert training.optimizer.param_groups[0]["lr"] == 0.01 * 0.5**0.9


def test_zeros_stay_zero_and_every_update_is_booked(begin):
    settings = SETTINGS["dsff"]
    training = begin(settings)
    first = {name: mask.clone() for name, mask in training.sparsifier.masks.items()}
    go(training)
    weights = dict(training.model.named_parameters())
    for name, mask in training.sparsifier.masks.items():
        assert name.startswith("fusion.")
        assert not weights[name][~mask].any()
        assert mask.sum() == first[name].sum()
    assert [row["iteration"] for row in training.updates] == [2, 4, 6]
    active = sum(int(mask.sum()) for mask in first.values())
    assert all(row["active"] == active for row in training.updates)
    assert training.updates[0]["grown"] > 0


def test_the_norm_that_is_clipped_is_of_the_active_weights(begin, monkeypatch):
    settings = SETTINGS["static"]
    training, seen = begin(settings), []

    def look(parameters, max_norm):
        seen.append(max_norm)
        weights = dict(training.model.named_parameters())
        assert all(not weights[n].grad[~mask].any() for n, mask in training.sparsifier.masks.items())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", look)
    go(training)
    assert seen == [12.0] * 6


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs"),
            "got CUDA out of memory",
        ),
        (MemoryError(), "got a larger one"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_told(begin, error, told):
    def save(training):
        raise error

    with pytest.raises(SettingError, match=f"memory of the training: expected a batch that fits into it, {told}"):
        go(begin(SETTINGS["dsff"]), save=save)


def test_a_loss_that_is_no_number_ends_the_training_and_saves_nothing_more(begin, monkeypatch):
    settings = SETTINGS["dsff"]
    training, saved = begin(settings), []
    batches_changed(monkeypatch, lambda i, images, labels: (images * (math.nan if i == 4 else 1), labels))
    with pytest.raises(DstlibError, match=r"loss of iteration 5: expected a finite number, got nan"):
        go(training, save=lambda t: saved.append(t.iteration))
    assert saved == [3]
    assert all(p.isfinite().all() for p in training.model.parameters())


@pytest.mark.parametrize(
    "network",
    [
        E2ENetConfig(channels=(4, 8, 8), strides=((1, 2, 2),) * 2, heads=2, num_classes=16),
        E2ENetConfig(channels=(4, 6), strides=((1, 2, 2),), heads=1, num_classes=16),
    ],
    ids=["wider", "fewer levels"],
)
def test_the_state_of_another_network_is_refused(begin, network):
    state = begin(SETTINGS["dsff"]).state_dict()
    with pytest.raises(StateError, match="model of the saved training: expected"):
        begin(SETTINGS["dsff"], network).load_state_dict(state)


def test_the_state_of_a_dense_training_is_refused_by_a_sparse_one(begin):
    state = begin(SETTINGS["dense"]).state_dict()
    with pytest.raises(StateError, match="contents of the saved state"):
        begin(SETTINGS["dsff"]).load_state_dict(state)


def change(*path):
    """Returns what puts another value, the last of these, to where the others lead in a state; or takes it out."""
    *keys, last, value = path

    def changed(state):
        place = state
        for key in keys:
            place = place[key]
        if value is GONE:
            del place[last]
        else:
            place[last] = value

    return changed


def shown_often(state):
    """Puts a moment of the right shape that is one number in memory."""
    kept = state["optimizer"]["state"][0]
    kept["exp_avg"] = torch.zeros(1).expand(kept["exp_avg"].shape)


GONE = object()
BROKEN = {
    "no iteration": (change("iteration", GONE), "parts"),
    "half an iteration": (change("iteration", 3.0), "iteration"),
    "an iteration to come": (change("iteration", 7), "iteration"),
    "an iteration that is a truth value": (change("iteration", True), "iteration"),
    "no loss": (change("loss_sum", math.nan), "loss_sum"),
    "a loss of text": (change("loss_sum", "3"), "loss_sum"),
    "a loss of the epoch before": (change("iteration", 3), "loss_sum"),
    "metrics of an epoch to come": (change("metrics", [{}, {}]), "metrics"),
    "metrics of another shape": (change("metrics", 0, [1, 2]), "metrics"),
    "metrics of another epoch": (change("metrics", 0, "epoch", 2), "metrics"),
    "metrics of a large iteration": (change("metrics", 0, "iteration", 2**63), "metrics"),
    "metrics without a loss": (change("metrics", 0, "loss", GONE), "metrics"),
    "metrics of an infinite loss": (change("metrics", 0, "loss", math.inf), "metrics"),
    "metrics of another rate": (change("metrics", 0, "learning_rate", 0.5), "metrics"),
    "metrics of a Dice above 1": (change("metrics", 0, "val_dice", 1.5), "metrics"),
    "metrics of more": (change("metrics", 0, "evil", 1), "metrics"),
    "updates of text": (change("updates", "none"), "updates"),
    "updates to come": (change("updates", 0, "iteration", 5), "updates"),
    "updates of more than all": (change("updates", 0, "grown", 10**9), "updates"),
    "flows of text": (change("flows", "none"), "flows"),
    "flows to come": (change("flows", -1, "epoch", 5), "flows"),
    "flows of no epoch": (change("flows", 0, "epoch", GONE), "flows"),
    "flows of less than none": (change("flows", 0, "stage1_level1.forward", -1), "flows"),
    "flows of another network": (change("flows", 0, "stage9_level1.forward", 1), "flows"),
    "a scaler of text": (change("scaler", "fp16"), "scaler"),
    "half a scaler": (change("scaler", {"scale": 1.0}), "scaler"),
    "no optimizer": (change("optimizer", {}), "optimizer"),
    "an optimizer of no groups": (change("optimizer", "param_groups", []), "optimizer"),
    "an optimizer of other parameters": (change("optimizer", "param_groups", 0, "params", [0]), "optimizer"),
    "an optimizer of another decay": (
        change("optimizer", "param_groups", 0, "weight_decay", 0.5),
        "optimizer's weight_decay",
    ),
    "a tensor among parameters": (change("optimizer", "param_groups", 0, "params", 0, torch.ones(2)), "optimizer"),
    "a tensor for a setting": (
        change("optimizer", "param_groups", 0, "weight_decay", torch.ones(2)),
        "optimizer's weight_decay",
    ),
    "an optimizer without a rate": (change("optimizer", "param_groups", 0, "lr", None), "optimizer's lr"),
    "an optimizer of one parameter more": (change("optimizer", "state", 99, {}), "optimizer"),
    "an optimizer that keeps nothing": (change("optimizer", "state", 0, {}), "optimizer"),
    "a moment of another shape": (change("optimizer", "state", 0, "exp_avg", torch.ones(2)), "optimizer's exp_avg"),
    "a moment of one value": (shown_often, "optimizer's exp_avg"),
    "a moment of truth values": (change("optimizer", "state", 0, "exp_avg", torch.ones(2) > 0), "optimizer's exp_avg"),
    "a step to come": (change("optimizer", "state", 0, "step", torch.tensor(9.0)), "optimizer's step"),
    "a weight of another shape": (change("model", "heads.0.weight", torch.ones(2)), "model"),
    "a weight less": (change("model", "heads.0.weight", GONE), "model"),
    "no masks": (change("sparsifier", None), "contents"),
}


@pytest.fixture(scope="module")
def saved():
    """The state of a training in its second epoch, at iteration 4."""
    torch.manual_seed(0)
    training = start(E2ENet(NETWORK), SETTINGS["adamw"])
    go(training, should_stop=lambda: training.iteration == 4)
    training.sparsifier.detach()
    return training.state_dict()


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_no_training_saved_is_refused_by_name(begin, saved, case):
    break_it, what = BROKEN[case]
    state = copy.deepcopy(saved)
    break_it(state)
    training = begin(SETTINGS["adamw"])
    with pytest.raises(StateError, match=f"^{what} of the saved "):
        training.load_state_dict(state)
    assert training.iteration == 0


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_moments_that_no_optimizer_keeps_are_refused(begin, saved, name):
    for value in (math.nan, math.inf, *([-1.0] * (name == "exp_avg_sq"))):
        state = copy.deepcopy(saved)
        state["optimizer"]["state"][0][name].view(-1)[0] = value
        with pytest.raises(StateError, match=f"^optimizer's {name} of the saved training"):
            begin(SETTINGS["adamw"]).load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.0}, {"scale": math.inf}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"_growth_tracker": -1}],
)
def test_a_scaler_that_does_not_work_is_refused(begin, saved, change):
    sound = torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()
    begin(SETTINGS["adamw"]).load_state_dict({**saved, "scaler": sound})
    with pytest.raises(StateError, match=rf"^scaler\.{next(iter(change))} of the saved training"):
        begin(SETTINGS["adamw"]).load_state_dict({**saved, "scaler": {**sound, **change}})


def test_the_loss_is_dice_and_cross_entropy_at_each_head_on_every_second_voxel():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 1, 4, 8, 8), generator=generator)
    fine = torch.randn(2, 3, 4, 8, 8, generator=generator)
    coarse = torch.randn(2, 3, 2, 4, 4, generator=generator)
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = 2 / 3 * loss(fine, labels) + 1 / 3 * loss(coarse, labels[:, :, ::2, ::2, ::2])
    torch.testing.assert_close(deep_supervision_loss((fine, coarse), labels), expected)  # one order of sums


def test_dice_and_cross_entropy_by_hand():
    # one voxel of class 1 with probability 3/4: Dice 2·(3/4) / (1 + 3/4), cross-entropy -log(3/4)
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1, 1)
    loss = deep_supervision_loss((logits,), torch.ones(1, 1, 1, 1, 1, dtype=torch.long))
    # 1e-5: the smoothing of Dice moves it by that order
    assert float(loss) == pytest.approx(1 - 1.5 / 1.75 - math.log(0.75), abs=1e-5)


def test_methods_differ_in_their_rule_alone():
    dsff, static = kernel_method("dsff", 50), kernel_method("static", 50)
    assert (dsff.interval, static.interval) == (50, None)
    assert (dsff.granularity, dsff.distribution) == (static.granularity, static.distribution)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"iterations": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"clip": 0.0},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"method": "rigle"},
        {"interval": 0},
        {"seed": -1},
        {"clip": math.inf},
        {"poly_exponent": math.nan},
        {"poly_exponent": -1.0},
        {"val_iterations": -1},
        {"optimizer": "adam"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(wrong):
    with pytest.raises(SettingError, match=f"{next(iter(wrong))} of TrainSettings"):
        TrainSettings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "fp8"}, "precision of Execution: expected float32 or bf16 or fp16"),
        ({"workers": -1}, "workers of Execution"),
        ({"device": "abacus"}, "device of Execution: expected one that torch can use"),
        ({"engine": True, "precision": "bf16"}, "engine of Execution: expected float32 on a CPU"),
        ({"engine": True, "device": "cuda"}, "engine of Execution.*half precision on a GPU"),
        ({"engine": True, "compile": True}, "engine of Execution"),
    ],
    ids=str,
)
def test_an_execution_that_is_not_possible_is_named(wrong, message):
    with pytest.raises(SettingError, match=message):
        Execution(**wrong)


def test_workers_and_layout_change_the_time_alone(begin):
    settings = TrainSettings(epochs=1, iterations=2, interval=1, momentum=0.9)
    plain, other = begin(settings), begin(settings, execution=Execution(workers=2))
    go(plain)
    go(other)
    assert_same(other.state_dict(), plain.state_dict())
    last = begin(settings, execution=Execution(channels_last=True))
    go(last)
    # another order of sums in the convolutions
    assert last.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-4)
    for name, mask in last.sparsifier.masks.items():
        assert mask.sum() == plain.sparsifier.masks[name].sum()
        assert not last.model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("sparsity", [0.8, 0.0])
def test_the_engine_changes_the_time_and_the_rounding_alone(begin, sparsity):
    settings = TrainSettings(
        epochs=2, iterations=2, interval=2, momentum=0.9, sparsity=sparsity, val_iterations=1, learning_rate=1e-3
    )
    plain, fast = begin(settings), begin(settings, execution=Execution(engine=True))
    for training in (plain, fast):
        go(training, held_out=CASES)
    assert type(fast.on_engine) is E2ENet
    assert fast.predictor is not fast.model
    assert plain.predictor is plain.model
    for ours, theirs in zip(fast.metrics, plain.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # rounding grows by each step
        assert ours["val_dice"] == pytest.approx(theirs["val_dice"], abs=0.01)
    if sparsity:
        assert_same(dict(fast.sparsifier.masks), dict(plain.sparsifier.masks))  # random growth, drawn by the same seed
    go_on = begin(settings)
    go_on.load_state_dict(fast.state_dict())
    assert_same(go_on.model.state_dict(), fast.on_engine.state_dict())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_training_that_computes_maps_once_more_is_the_same_bit_for_bit(begin, precision):
    """Masks change in it, and validation comes between."""
    settings = TrainSettings(epochs=2, iterations=2, interval=2, momentum=0.9, val_iterations=1)
    kept, again = (begin(settings, execution=Execution(precision=precision, recompute=on)) for on in (False, True))
    for training in (kept, again):
        go(training, held_out=CASES)
    assert [again.model.recompute, kept.model.recompute] == [True, False]
    assert [each["loss"] for each in again.metrics] == [each["loss"] for each in kept.metrics]
    assert_same(again.model.state_dict(), kept.model.state_dict())


def test_blocks_of_channels_are_connected_or_not(begin):
    settings = TrainSettings(epochs=1, iterations=3, interval=2, momentum=0.9, sparsity=0.5, block=2)
    training = begin(settings)
    go(training)
    for mask in training.sparsifier.masks.values():
        outputs, inputs = mask.shape[:2]
        blocks = mask.reshape(outputs // 2, 2, inputs // 2, -1).transpose(1, 2).flatten(2)
        assert torch.equal(blocks.any(2), blocks.all(2))


def test_half_precision_trains_and_keeps_every_zero(begin):
    settings = TrainSettings(epochs=1, iterations=3, interval=2, momentum=0.9)
    full = begin(settings)
    go(full)
    training = begin(settings, execution=Execution(precision="bf16"))
    go(training)
    # bf16 has eight bits: a relative rounding of 1/256 per operation, much of which averages out in the loss
    assert training.metrics[0]["loss"] == pytest.approx(full.metrics[0]["loss"], rel=0.05)
    assert all(p.dtype == torch.float32 for p in training.model.parameters())
    assert all(not training.model.get_parameter(n)[~m].any() for n, m in training.sparsifier.masks.items())


def test_a_training_that_is_validated_is_the_same_training(begin):
    plain = begin(SETTINGS["dsff"])
    go(plain)
    watched = begin(TrainSettings(epochs=2, iterations=3, interval=2, momentum=0.9, val_iterations=2))
    go(watched, held_out=CASES)
    assert [0 <= row.pop("val_dice") <= 1 for row in watched.metrics] == [True, True]
    assert_same(watched.state_dict(), plain.state_dict())
    assert watched.model.deep_supervision


def test_validation_of_a_network_that_knows_the_labels_is_one(begin):
    training = begin(TrainSettings(val_iterations=2, sparsity=0.0))
    seen = []

    class Oracle(nn.Module):
        deep_supervision = True

        def __init__(self):
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return nn.functional.one_hot(seen.pop(0), 16).movedim(-1, 1).float()

    plain = PATCHES.plain()
    for _, labels in module.batches(CASES, plain, seed=0, start=0, stop=2):
        seen.append(labels[:, 0])
    training.model = Oracle()
    assert validate(training, CASES, PATCHES) == 1.0


def test_beginning_from_another_run_takes_weights_and_masks_and_keeps_them_if_frozen(begin):
    first = begin(SETTINGS["dsff"])
    go(first)
    other_classes = E2ENetConfig(channels=(4, 6, 8), strides=((1, 2, 2),) * 2, heads=2, num_classes=17)
    masks = {name: mask.clone() for name, mask in first.sparsifier.masks.items()}
    same = begin(replace(SETTINGS["dsff"], seed=1))  # another seed: or the same units would be drawn again
    assert begin_from(same, first.state_dict(), freeze=False) == []
    assert same.sparsifier.step == 0
    assert_same(same.model.state_dict(), first.model.state_dict())
    go(same)
    assert any(not torch.equal(mask, masks[name]) for name, mask in same.sparsifier.masks.items())

    frozen = begin(SETTINGS["dsff"], other_classes)
    assert begin_from(frozen, first.state_dict(), freeze=True) == ["heads.0.weight", "heads.1.weight"]
    go(frozen)
    assert all(torch.equal(mask, masks[name]) for name, mask in frozen.sparsifier.masks.items())
    assert frozen.updates == []


def test_beginning_from_what_does_not_fit_is_refused(begin):
    dense, sparse = begin(SETTINGS["dense"]), begin(SETTINGS["dsff"])
    with pytest.raises(StateError, match="expected a sparse run, got a dense one"):
        begin_from(sparse, dense.state_dict(), freeze=False)
    wider = begin(
        SETTINGS["dense"], E2ENetConfig(channels=(4, 8, 8), strides=((1, 2, 2),) * 2, num_classes=16, heads=2)
    )
    with pytest.raises(StateError, match="weights of --from: expected those of this network"):
        begin_from(wider, dense.state_dict(), freeze=False)


def test_a_loader_process_that_was_killed_is_one_clear_error(begin, monkeypatch):
    def die(*arguments, **options):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        yield

    training = begin(SETTINGS["dense"])
    monkeypatch.setattr(module, "batches", die)
    with pytest.raises(DstlibError, match=r"workers of the loader.*killed by signal.*fewer by --workers"):
        go(training)

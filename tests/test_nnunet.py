"""Sparse training inside nnU-Net: all that can be checked without it. tests/test_nnunet_runs.py has the real thing."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dstlib
from dstlib.errors import SettingError, StateError
from dstlib.integrations.nnunet import TRAINERS, name_settings, trainer_named
from dstlib.integrations.nnunet_checkpoint import KEY, export_checkpoint, read_checkpoint
from dstlib.integrations.nnunet_cli import SHIM, main, search_path
from dstlib.integrations.nnunet_network import E2ENetTraining, planned_config
from dstlib.integrations.nnunet_training import SparseTraining, ends
from dstlib.masking import magnitude
from dstlib.methods import METHODS
from dstlib.zoo.e2enet.network import E2ENet

PLAN = {
    "n_stages": 4,
    "features_per_stage": [4, 8, 16, 16],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
}


class StandIn:
    """The parts of nnU-Net's trainer that the mixed-in classes meet, around a network of three convolutions."""

    def __init__(self, plans, configuration, fold, dataset_json, device):
        self.output_folder, self.configuration_name, self.device = plans["folder"], configuration, device
        self.num_epochs, self.num_iterations_per_epoch, self.current_epoch, self.local_rank = 1000, 4, 0, 0
        self.disable_checkpointing = self.was_initialized = False
        self.grad_scaler, self.loss, self.logged, self.stages = None, lambda y, t: (y - t).square().sum(), [], 4

    def initialize(self):
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1), nn.Conv3d(8, 2, 1)
        ).to(self.device)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.was_initialized = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), 1e-3, momentum=0.99, nesterov=True), None

    def _get_deep_supervision_scales(self):
        return [[1.0] * 3] * (self.stages - 1)

    def print_to_log_file(self, *words):
        self.logged.append(" ".join(map(str, words)))

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()

    def on_epoch_end(self):
        self.current_epoch += 1

    def on_train_end(self):
        self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_final.pth"))

    def save_checkpoint(self, filename):
        if not self.disable_checkpointing:
            state = {"network_weights": self.network.state_dict(), "optimizer_state": self.optimizer.state_dict()}
            torch.save({**state, "current_epoch": self.current_epoch, "trainer_name": type(self).__name__}, filename)

    def load_checkpoint(self, filename):
        checkpoint = torch.load(filename, weights_only=True)
        self.network.load_state_dict(checkpoint["network_weights"])
        self.optimizer.load_state_dict(checkpoint["optimizer_state"])
        self.current_epoch = checkpoint["current_epoch"]


class Trainer(SparseTraining, StandIn):
    epochs, interval, sparsity, include = 5, 3, 0.75, ("1", "1.*")

    def epoch(self, scale=1.0):
        for i in range(4):
            generator = torch.Generator().manual_seed(self.current_epoch * 4 + i)
            data = torch.rand(1, 1, 4, 4, 4, generator=generator)
            self.train_step({"data": data * scale, "target": data})
        self.on_epoch_end()


@pytest.fixture
def trainer(tmp_path):
    return started(tmp_path)


def started(folder, kind=Trainer):
    trainer = kind({"folder": str(folder)}, "3d_fullres", 0, {}, torch.device("cpu"))
    trainer.on_train_start()
    return trainer


@pytest.fixture
def checkpoint(trainer, tmp_path):
    trainer.epoch()
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    return tmp_path / "checkpoint_latest.pth"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("nnUNetTrainerDST", {}),
        ("nnUNetTrainerDST_90", {"sparsity": 0.9}),
        ("nnUNetTrainerE2ENetDST_975", {"sparsity": 0.975}),
        ("nnUNetTrainerDST_05_static_1epoch", {"sparsity": 0.05, "method": "static", "epochs": 1}),
        ("nnUNetTrainerE2ENet_250epochs", {"epochs": 250}),
    ],
)
def test_a_name_holds_the_settings(name, settings):
    assert name_settings(name) == (name.split("_")[0], settings)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nnUNetTrainer", r"similar: 'nnUNetTrainerDST'"),
        ("nnUNetTrainerDST_riggl", r"'riggl' in .*a method \(static, set, .*, dsff\)"),
        ("nnUNetTrainerDST_9", r"a sparsity \(90, 975\)"),
        ("nnUNetTrainerDST_0epochs", r"a length \(250epochs\)"),
        ("nnUNetTrainerDST_80_90", "gives the sparsity twice"),
        ("nnUNetTrainerE2ENet_80", "is dense; nnUNetTrainerE2ENetDST is"),
        ("__path__", "no trainer"),
    ],
)
def test_a_name_of_another_grammar_is_not_found(name, told):
    with pytest.raises(AttributeError, match=told):
        trainer_named(name)


@given(st.sampled_from(sorted(METHODS)), st.integers(1, 999), st.integers(1, 5000), st.permutations([0, 1, 2]))
def test_the_parts_of_a_name_come_in_any_order(method, thousandths, epochs, order):
    parts = [method, f"{thousandths:03}", f"{epochs}epochs"]
    _, settings = name_settings("_".join(["nnUNetTrainerDST", *(parts[i] for i in order)]))
    assert settings == {"method": method, "sparsity": thousandths / 1000, "epochs": epochs}


def test_without_nnunet_a_trainer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnunetv2", None)
    trainer_named.cache_clear()
    with pytest.raises(ImportError, match=r"need nnU-Net v2 .*pip install 'dstlib\[nnunet\]'"):
        trainer_named("nnUNetTrainerDST")


def test_the_folder_is_named_once_and_after_those_of_others():
    assert search_path(None) == str(SHIM)
    assert search_path("/mine") == search_path(search_path("/mine")) == f"/mine{os.pathsep}{SHIM}"
    assert [file.name for file in SHIM.glob("*.py")] == ["dstlib_trainers.py"]


def test_env_prints_a_line_for_the_shell(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/my trainers")
    main(["env"])
    assert capsys.readouterr().out == f"export nnUNet_extTrainer='/my trainers{os.pathsep}{SHIM}'\n"


def test_an_error_of_the_command_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"dstlib-nnunet: no\.pth of folder .*no such file"):
        main(["export", str(tmp_path / "no.pth"), str(tmp_path / "out.pth")])


def test_the_plan_gives_levels_widths_and_strides():
    config = planned_config(PLAN, in_channels=2, num_classes=3)
    assert (config.channels, config.strides) == ((4, 8, 16, 16), ((1, 2, 2), (2, 2, 2), (2, 2, 2)))
    assert (config.in_channels, config.num_classes, config.heads, config.kernel_size) == (2, 3, 3, (1, 3, 3))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strides": [[1, 1], [2, 2], [2, 2], [2, 2]]}, "strides of the plan: expected three axes"),
        ({"strides": [[2, 2, 2]] * 4}, r"strides\[0\] of the plan: expected 1 on each axis"),
        ({"n_stages": 2, "strides": [[1, 1, 1], [2, 2, 2]]}, "n_stages of the plan: expected 3 or more, got 2"),
    ],
)
def test_a_plan_that_no_e2enet_fits_is_refused(change, told):
    with pytest.raises(SettingError, match=told):
        planned_config({**PLAN, **change}, in_channels=1, num_classes=3)


def test_the_heads_have_the_sizes_of_the_supervised_scales():
    class E2ENetTrainer(E2ENetTraining, StandIn):
        pass

    trainer = E2ENetTrainer({"folder": ""}, "3d_fullres", 0, {}, torch.device("cpu"))
    configuration = SimpleNamespace(network_arch_init_kwargs=PLAN)
    trainer.network = trainer.build_network_architecture(None, configuration, 1, 3)
    x = torch.rand(1, 1, 8, 16, 16)
    assert [tuple(y.shape[2:]) for y in trainer.network(x)] == [(8, 16, 16), (8, 8, 8), (4, 4, 4)]
    assert len(trainer._get_deep_supervision_scales()) == 3
    trainer.stages = 6  # five scales, of which four have a head
    assert len(trainer._get_deep_supervision_scales()) == 4
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network(x).shape == (1, 3, 8, 16, 16)
    assert isinstance(trainer.network, E2ENet)


def test_two_stages_are_refused_where_nnunet_would_divide_by_zero(trainer):
    trainer.stages = 2
    with pytest.raises(SettingError, match="n_stages of configuration 3d_fullres: expected 3 or more"):
        trainer._get_deep_supervision_scales()


def test_the_ends_of_a_unet_stay_dense():
    network = nn.ModuleDict(
        {"encoder": nn.Conv3d(1, 4, 3), "decoder": nn.ModuleDict({"seg_layers": nn.Conv3d(4, 2, 1)})}
    )
    network["middle"] = nn.Conv3d(4, 4, 3)
    assert ends(network) == ("encoder.weight", "decoder.seg_layers.weight")
    assert ends(torch.compile(network, backend="eager")) == ends(network)


def test_the_number_of_active_weights_never_changes(trainer):
    weight, first = trainer.network[1].weight, trainer.sparsifier.masks["1.weight"].clone()
    for _ in range(5):
        trainer.epoch()
        mask = trainer.sparsifier.masks["1.weight"]
        assert int(mask.sum()) == 16 * 27  # a quarter of 8 · 8 kernels
        assert not weight[~mask].any()
    assert not torch.equal(mask, first)
    assert sum("0 entries outside the masks, 1 mask updates, " in line for line in trainer.logged) == 4
    assert "0 entries outside the masks, 2 mask updates, " in "".join(trainer.logged)


def test_the_norm_that_is_clipped_is_that_of_the_sparse_gradient(trainer):
    trainer.epoch(scale=100.0)
    norm = torch.stack([p.grad.norm() for p in trainer.network.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(12.0))  # less, if the dense gradient had been clipped


def test_a_step_that_overflows_counts_for_nothing_and_the_next_is_clipped_all_the_same(trainer):
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = trainer.network[1].weight.detach().clone()
    trainer.epoch(scale=1000.0)
    assert trainer.sparsifier.step == 0
    assert torch.equal(trainer.network[1].weight, before)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.epoch(scale=100.0)
    assert trainer.sparsifier.step == 4
    norm = torch.stack([p.grad.norm() for p in trainer.network.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(12.0))
    assert int(trainer.sparsifier.masks["1.weight"].sum()) == 16 * 27


def test_the_first_masks_are_chosen_from_pretrained_weights(tmp_path):
    """A method that begins with the largest weights begins with those that were loaded, not with those drawn before."""

    class Largest(Trainer):
        method = replace(dstlib.DSFF, init=magnitude)

    trainer = started(tmp_path, Largest)
    before = trainer.sparsifier
    with torch.no_grad():
        trainer.network[1].weight.fill_(0.1)[:2] = 1.0  # 2 · 8 kernels, a quarter of them
    trainer.on_train_start()
    mask = trainer.sparsifier.masks["1.weight"]
    assert mask[:2].all()
    assert not mask[2:].any()
    assert int(trainer.network[1].weight.sum()) == 16 * 27
    trainer.epoch()
    assert (before.step, trainer.sparsifier.step) == (0, 4)


def test_pretrained_weights_that_are_sparse_keep_their_topology(trainer, tmp_path):
    trainer.epoch()
    fresh = started(tmp_path)
    fresh.network.load_state_dict(trainer.network.state_dict())
    fresh.on_train_start()
    assert torch.equal(fresh.network[1].weight, trainer.network[1].weight)
    assert torch.equal(fresh.sparsifier.masks["1.weight"], trainer.sparsifier.masks["1.weight"])


def test_a_training_that_is_continued_equals_one_that_never_stopped(trainer, checkpoint, tmp_path):
    continued = started(tmp_path)
    continued.load_checkpoint(str(checkpoint))
    for t in (trainer, continued):
        t.epoch()
        t.epoch()
    for (name, a), b in zip(trainer.network.state_dict().items(), continued.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(trainer.sparsifier.masks["1.weight"], continued.sparsifier.masks["1.weight"])


def test_a_link_in_the_place_of_a_half_written_checkpoint_is_not_followed(trainer, tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "checkpoint_latest.pth.partial").symlink_to(tmp_path / "victim")
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint_latest.pth", "victim"]


def test_nothing_but_the_checkpoint_is_left_in_the_folder(trainer, checkpoint, tmp_path):
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.name]
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "other.pth"))
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.name]


def test_a_checkpoint_without_masks_is_not_continued(trainer, checkpoint):
    torch.save({k: v for k, v in read_checkpoint(checkpoint).items() if k != KEY}, checkpoint)
    with pytest.raises(StateError, match=r"key 'dstlib' of checkpoint_latest\.pth: .*got none\. Trainer wrote it"):
        trainer.load_checkpoint(str(checkpoint))


def test_other_settings_are_named_and_nothing_is_loaded(checkpoint, tmp_path):
    class Sparser(Trainer):
        sparsity, epochs = 0.5, 10

    other = started(tmp_path, Sparser)
    before = other.network[1].weight.detach().clone()
    with pytest.raises(StateError, match=r"expected sparsity 0\.75, total_steps 20, got sparsity 0\.5, total_steps 40"):
        other.load_checkpoint(str(checkpoint))
    assert torch.equal(other.network[1].weight, before)


def test_the_summary_counts_what_is_sparse(trainer, tmp_path):
    trainer.epoch()
    trainer.on_train_end()
    text = (tmp_path / "dstlib_summary.json").read_text()
    assert '"density": 0.25' in text
    assert '"active": 432' in text


def test_an_export_holds_the_same_weights_for_the_stock_trainer(checkpoint, tmp_path, capsys):
    main(["export", str(checkpoint), str(tmp_path / "deep" / "out.pth")])
    assert "432 of 1,728 entries active in 1 sparse weights, every weight verified" in capsys.readouterr().out
    given, stock = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "deep" / "out.pth")
    assert (stock["trainer_name"], set(given) - set(stock)) == ("nnUNetTrainer", {KEY})
    for name, weight in given["network_weights"].items():
        assert torch.equal(stock["network_weights"][name], weight)


def spoilt_network(checkpoint):
    checkpoint["network_weights"]["fusion.stage1_level1.upward.weight"] = torch.zeros(1)


def spoilt_weight(checkpoint):
    checkpoint["network_weights"]["1.weight"].fill_(1.0)


def spoilt_version(checkpoint):
    checkpoint[KEY]["version"] = 2


def spoilt_kind(checkpoint):
    del checkpoint["trainer_name"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            spoilt_network,
            "expected one that nnUNetTrainer builds from the plans, got an E2ENet. Predict with .* Trainer",
        ),
        (spoilt_weight, "expected zeros outside the mask, got 1296"),
        (spoilt_version, "version 1, got version 2"),
        (spoilt_kind, "a dict of something else"),
    ],
)
def test_what_the_stock_trainer_could_not_use_is_not_exported(spoil, told, checkpoint, tmp_path):
    state = read_checkpoint(checkpoint)
    spoil(state)
    torch.save(state, checkpoint)
    with pytest.raises(StateError, match=told):
        export_checkpoint(checkpoint, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(content=st.binary(max_size=64))
def test_a_foreign_file_is_refused_in_words(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "foreign.pth"
    file.write_bytes(content)
    with pytest.raises(StateError, match=r"foreign\.pth of folder"):
        read_checkpoint(file)


def test_an_export_overwrites_nothing(checkpoint):
    with pytest.raises(StateError, match="expected a new file"):
        export_checkpoint(checkpoint, checkpoint)


def test_the_three_trainers_are_what_the_command_looks_for():
    assert TRAINERS == ("nnUNetTrainerDST", "nnUNetTrainerE2ENet", "nnUNetTrainerE2ENetDST")

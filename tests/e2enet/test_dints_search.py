"""The search of DiNTS: what it decodes, what it is charged for, on which cases, and that it goes on where it stood."""

import copy
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dstlib.errors import DataError, SettingError, StateError
from dstlib.zoo.e2enet import AMOS
from dstlib.zoo.e2enet.baselines.architecture import ARCHITECTURE, Architecture, read_architecture
from dstlib.zoo.e2enet.baselines.dints import Supernet
from dstlib.zoo.e2enet.baselines.dints_decoding import decode, probabilities
from dstlib.zoo.e2enet.baselines.segmenter import Request
from dstlib.zoo.e2enet.checkpoint import load_trained
from dstlib.zoo.e2enet.cli import read_config
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.phantoms.ct import phantoms
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.run import run_recipe
from dstlib.zoo.e2enet.training.execution import Execution
from dstlib.zoo.e2enet.training.loop import train
from dstlib.zoo.e2enet.training.records import config_of
from dstlib.zoo.e2enet.training.search import Search, first_iteration, halves, start_search
from dstlib.zoo.e2enet.training.settings import TrainSettings
from dstlib.zoo.e2enet.training.state import Training, start

pytest.importorskip("monai")

CASES = phantoms(4, shape=(32, 40, 40)).cases
# torch 2.13's gradients of kernels in bf16 are garbage at a depth of 2, so the coarsest has 3
PATCHES = PatchSettings(patch_size=(12, 8, 8), mirror=(), augment=None)
SETTINGS = TrainSettings(epochs=3, iterations=2, sparsity=0.0, momentum=0.9)
SHAPE = (2, 1, 16, 16, 16)


def supernet(num_blocks: int = 2, num_depths: int = 2, seed: int = 0) -> Supernet:
    torch.manual_seed(seed)
    asked = Request(in_channels=1, num_classes=16, patch_size=(12, 8, 8), config=AMOS, width=1 / 8)
    return Supernet(asked, num_blocks=num_blocks, num_depths=num_depths)


def begun(**changes: Any) -> Training:
    return start(supernet(), SETTINGS, **changes)


def go(training: Training, **options: Any) -> bool:
    return train(training, CASES, patches=PATCHES, **options)


def logits(training: Training) -> list[torch.Tensor]:
    assert training.search
    return [x.detach().clone() for x in training.search.logits]


def weights(training: Training) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in training.model.named_parameters() if "log_alpha" not in name}


# ---- decoding ----


@given(depths=st.integers(1, 3), blocks=st.integers(1, 3), seed=st.integers(0, 2**16), scale=st.sampled_from([0.5, 4]))
@settings(deadline=None, max_examples=10)
def test_what_is_decoded_is_what_monais_shortest_path_finds(depths: int, blocks: int, seed: int, scale: float) -> None:
    from monai.networks.nets import TopologySearch

    with redirect_stdout(StringIO()):
        space = TopologySearch(channel_mul=1 / 32, num_blocks=blocks, num_depths=depths)
    torch.manual_seed(seed)
    for alpha in (space.log_alpha_a, space.log_alpha_c):
        torch.nn.init.normal_(alpha, std=scale)
    node_a, code_a, code_c, _ = space.decode()
    found = decode(space.log_alpha_a.detach().numpy(), space.log_alpha_c.detach().numpy())
    assert found == Architecture.of(code_a, code_c)
    assert np.array_equal(found.node_a, node_a)


@given(seed=st.integers(0, 2**16), scale=st.sampled_from([0.01, 1, 30]))
@settings(deadline=None, max_examples=5)
def test_what_is_decoded_from_the_published_space_is_feasible(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    # an Architecture that is not feasible cannot be made
    found = decode(rng.normal(0, scale, (12, 10)), rng.normal(0, scale, (12, 10, 5)))
    assert (found.num_blocks, found.num_depths) == (12, 4)


def test_probabilities_of_children_sum_to_one_and_are_monais() -> None:
    space = supernet(num_depths=3).space
    children = space.child_list
    own = probabilities(space.log_alpha_a.detach().numpy(), children)
    # 1e-6: single precision against double
    torch.testing.assert_close(torch.from_numpy(own).float(), space.get_prob_a(child=True)[0], atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(own.sum(-1), 1, rtol=1e-12)


# ---- what the search is charged for ----


def searching(memory_budget: float = 0.8) -> Search:
    return start_search(supernet(), memory_budget)


def charged(search: Search, progress: float = 1.0) -> float:
    with torch.no_grad():
        return float(search.charge(SHAPE, progress))


def test_charges_grow_from_nothing_in_proportion() -> None:
    search = searching()
    assert charged(search, 0.0) == 0
    assert charged(search, 0.5) == pytest.approx(charged(search) / 2, rel=1e-6)


def test_fewer_paths_take_less_memory_and_the_nearer_to_the_budget_the_less_is_charged() -> None:
    search = searching(memory_budget=0.2)
    shares, excess = [], []
    for level in (4.0, 1.0, 0.0, -0.5):
        search.space.log_alpha_a.data.fill_(level)
        shares.append(search.memory_share(SHAPE))
        excess.append(abs(shares[-1] - 0.2))
    assert shares == sorted(shares, reverse=True)
    assert excess == sorted(excess, reverse=True)


def test_cheaper_operations_take_less_memory() -> None:
    """MONAI's estimate, of which the share is of all paths with the operations as likely as they are."""
    space = searching().space
    usage = []
    for operation in range(5):
        space.log_alpha_c.data.fill_(0.0)
        space.log_alpha_c.data[..., operation] = 20.0
        usage.append(float(space.get_ram_cost_usage(SHAPE).detach()))
    skip, full, *flat = usage
    assert skip < full < min(flat)  # a flat kernel is followed by another, with features in between


def test_decided_and_feasible_logits_are_charged_least() -> None:
    search = searching()
    search.space.log_alpha_c.data.fill_(0.0)
    search.space.log_alpha_a.data.fill_(0.0)
    undecided = charged(search)
    search.space.log_alpha_c.data[..., 1] = 20.0
    search.space.log_alpha_a.data.fill_(20.0)
    decided = charged(search)
    search.space.log_alpha_a.data.copy_(torch.tensor([[20.0, -20, -20, -20], [-20.0, -20, -20, 20]]))
    torn = charged(search)  # to the finer node, and on from the coarser one
    with torch.no_grad():
        memory = abs(0.8 - search.memory_share(SHAPE)) - 0.2
    assert decided < undecided
    assert torn - memory > decided


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan")])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(SettingError, match="memory_budget of the search: expected a number in"):
        searching(budget)


def test_a_budget_for_a_network_that_is_not_searched_is_refused() -> None:
    with pytest.raises(SettingError, match="memory_budget of the network: expected none"):
        start(torch.nn.Conv3d(1, 2, 1), SETTINGS, memory_budget=0.5)


# ---- who trains on what ----


@given(num=st.integers(2, 9), seed=st.integers(0, 99))
def test_no_case_is_in_both_halves(num: int, seed: int) -> None:
    cases: list[Any] = list(range(num))
    some, others = halves(cases, seed)
    assert sorted(some + others) == cases
    assert (len(some), len(others)) == (num // 2, num - num // 2)


def test_one_case_is_too_few() -> None:
    with pytest.raises(DataError, match="cases of the search: expected at least 2 to train on, got 1"):
        halves(CASES[:1], 0)


def test_each_step_moves_its_own_parameters_on_its_own_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    from dstlib.zoo.e2enet.training import loop

    drawn = []

    def batches(cases: Any, *arguments: Any, **options: Any) -> Any:
        drawn.append(([case.name for case in cases], options["start"]))
        return original(cases, *arguments, **options)

    original = loop.batches
    monkeypatch.setattr(loop, "batches", batches)
    training, steps = begun(), []
    step = loop._loss

    def noted(training: Training, *arguments: Any) -> Any:
        steps.append((training.iteration, logits(training), weights(training)))
        return step(training, *arguments)

    monkeypatch.setattr(loop, "_loss", noted)
    go(training)
    (some, begin), (others, first) = drawn
    assert sorted(some + others) == sorted(case.name for case in CASES)
    assert (begin, first) == (0, 2) == (0, first_iteration(SETTINGS))
    # two iterations of weights alone, then by turns
    assert [iteration for iteration, *_ in steps] == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6]
    steps.append((6, logits(training), weights(training)))
    for turn, ((_, a, w), (_, b, v)) in enumerate(pairwise(steps)):
        of_architecture = turn >= 3 and turn % 2 == 1  # turns 0 to 2 are of weights, then 3, 5, ... of logits
        assert all(map(torch.equal, a, b)) != of_architecture, turn
        assert all(torch.equal(w[name], v[name]) for name in w) == of_architecture, turn


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}])
def test_a_search_goes_on_to_the_same_bits(changes: dict[str, Any]) -> None:
    execution = Execution(**changes)
    whole = begun(execution=execution)
    go(whole)
    part = begun(execution=execution)
    assert not go(part, should_stop=lambda: part.iteration == 5)
    saved = copy.deepcopy(part.state_dict())
    rest = begun(execution=execution)
    rest.load_state_dict(saved)
    go(rest)
    ours, theirs = whole.state_dict()["model"], rest.state_dict()["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.search
    assert rest.search
    assert whole.search.found() == rest.search.found()
    assert whole.metrics == rest.metrics
    assert [0 < row["memory"] < 1 for row in whole.metrics] == [True] * 3


def test_a_checkpoint_without_the_search_is_refused() -> None:
    training = begun()
    state = training.state_dict()
    with pytest.raises(StateError, match=r"parts of the saved training: .* got 'no search'"):
        begun().load_state_dict({name: state[name] for name in state if name != "search"})
    go(training)
    state = copy.deepcopy(training.state_dict())
    state["search"]["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(StateError, match="optimizer's exp_avg"):
        begun().load_state_dict(state)


def test_the_logits_of_an_architecture_stay_dense() -> None:
    sparse = TrainSettings(epochs=3, iterations=2, sparsity=0.8, method="static", momentum=0.9)
    training = start(supernet(), sparse)
    assert training.sparsifier
    try:
        go(training)
        assert not [name for name in training.sparsifier.masks if "log_alpha" in name]
        assert all(bool(x.all()) for x in logits(training))
        parameters = dict(training.model.named_parameters())
        assert all(not parameters[n].detach()[~mask].any() for n, mask in training.sparsifier.masks.items())
    finally:
        training.sparsifier.detach()


def test_the_loss_falls_while_the_architecture_is_searched() -> None:
    training = start(supernet(), TrainSettings(epochs=4, iterations=3, sparsity=0.0, optimizer="adamw"))
    go(training)
    assert training.metrics[-1]["loss"] < training.metrics[0]["loss"]


# ---- by the command ----


@pytest.mark.long
def test_a_search_and_the_network_it_finds_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dstlib.zoo.e2enet.baselines.dints.BLOCKS", 2)
    monkeypatch.setattr("dstlib.zoo.e2enet.baselines.dints.DEPTHS", 2)

    def run(*arguments: str) -> None:
        short = ("--scans", "5", "--epochs", "2", "--iterations", "1", "--width", "0.0625")
        run_recipe(read_config(HIPPOCAMPUS_RECIPE, [*short, "--patch-size", "16", "16", "16", *arguments]))

    run("--model", "dints_search", "--memory-budget", "0.5", "--run-dir", "search")
    run("--model", "dints", "--architecture", "search", "--run-dir", "found")
    found = read_architecture(Path("search"))
    assert (found.num_blocks, found.num_depths) == (2, 2)
    assert (config_of(Path("search")).memory_budget, config_of(Path("search")).architecture) == (0.5, None)
    assert config_of(Path("found")).architecture == found
    (Path("search") / ARCHITECTURE).unlink()  # the run holds all that it needs
    (network,) = load_trained([Path("found")]).models
    assert network(torch.zeros(1, 1, 16, 16, 16))[0].shape == (1, 3, 16, 16, 16)

"""The same bits as before: what tests/golden holds is computed again, and gone on with.

Where results are meant to change, tests/golden/write.py writes them anew.
"""

import shutil

import pytest
import torch
from golden import engine, recipe, runs
from golden.files import HERE, read

RUNS, ENGINE, RECIPE = read("runs.json"), read("engine.json"), read("recipe.json")


@pytest.mark.parametrize("name", RUNS)
def test_every_method_trains_as_before(name):
    assert runs.Training(name).train() == RUNS[name]


@pytest.mark.parametrize("name", runs.SAVED)
def test_a_saved_state_is_gone_on_with(name):
    saved = torch.load(HERE / "state_v2.pt", weights_only=True)[name]
    training = runs.Training(name)
    for part, holder in training.parts.items():
        holder.load_state_dict(saved[part])
    rest = {what: checksums[runs.SAVED_AT // runs.EVERY :] for what, checksums in RUNS[name].items()}
    assert training.train(start=runs.SAVED_AT) == rest


@pytest.mark.parametrize("instructions", ENGINE["sets"])
def test_the_engine_computes_as_before(instructions):
    """All cases at once, as the process that computes them takes longer to begin."""
    if instructions not in engine.instruction_sets():
        pytest.skip(f"no kernels for {instructions} here")
    if (here := engine.compiler()) != ENGINE["compiler"]:
        pytest.skip(f"kernels by {here}, which may fuse other products and sums than {ENGINE['compiler']}")
    assert engine.by_instruction_set(instructions) == ENGINE["sets"][instructions]


def test_every_case_of_the_engine_is_held():
    assert all(list(cases) == list(engine.CASES) for cases in ENGINE["sets"].values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The scans of the recipe's run."""
    return recipe.write_scans(tmp_path_factory.mktemp("golden") / "data")


def test_a_run_that_was_stopped_is_resumed(data, tmp_path):
    run = shutil.copytree(HERE / "checkpoint", tmp_path / "run")
    recipe.train(run, data, "--resume")
    found = recipe.came_to(run)
    assert found["masks"] == RECIPE["masks"]
    skip_on_another_machine()
    assert found["weights"] == RECIPE["weights"]


def test_a_run_that_was_trained_predicts(data, tmp_path):
    found = recipe.predict(HERE / "trained", data, tmp_path / "labels")
    skip_on_another_machine()
    assert found == RECIPE["labels"]


def skip_on_another_machine():
    """Ends a test whose last bits are those of one machine."""
    here = recipe.machine()
    if differing := [
        f"{name} {here[name]}, not {there}" for name, there in RECIPE["machine"].items() if here[name] != there
    ]:
        pytest.skip(f"torch rounds by its machine: {'; '.join(differing)}")

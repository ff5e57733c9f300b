"""What the example scripts share: settings from the command line, and data → training → evaluation → report."""

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from dstlib.errors import DstlibError, SettingError, explain
from dstlib.methods import METHODS
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.data.cases import Cases
from dstlib.zoo.e2enet.data.patches import PatchSettings
from dstlib.zoo.e2enet.evaluation.evaluate import Evaluation, evaluate
from dstlib.zoo.e2enet.evaluation.results import write_report
from dstlib.zoo.e2enet.network import E2ENet
from dstlib.zoo.e2enet.training.interrupt import interruptible
from dstlib.zoo.e2enet.training.run import Run, open_run
from dstlib.zoo.e2enet.training.settings import TrainSettings
from dstlib.zoo.e2enet.training.train import Training, start, train

HELP = {
    "epochs": "number of epochs; after each the learning rate falls and a checkpoint is written",
    "iterations": "optimizer steps per epoch",
    "learning_rate": "of SGD at the start; the paper's is 0.01, for a far longer run",
    "momentum": "of SGD, with Nesterov; the paper's is 0.99",
    "weight_decay": "of SGD, on all weights",
    "clip": "gradients of a larger norm are scaled down to this one",
    "poly_exponent": "the learning rate falls by epoch as (1 - epoch / epochs) to this power",
    "sparsity": "share of the fusion's connections that stay off, in [0, 1); 0 trains a dense network",
    "method": "how the sparse connections are chosen; 'dense' is the same as --sparsity 0",
    "interval": "iterations between mask updates, for the methods that have any",
    "seed": "of the weights, the batches and the masks",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network, what it is fed, and how it is trained; channels in and classes out follow the data."""

    name: str
    network: E2ENetConfig
    patches: PatchSettings
    training: TrainSettings


def parser(description: str | None, recipe: Recipe) -> argparse.ArgumentParser:
    """A command line with one option per training setting, and the recipe's values as defaults."""
    lines = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    lines.add_argument(
        "--run", type=Path, help=f"folder for the results (default: runs/{recipe.name}-DATE-TIME)", metavar="DIR"
    )
    lines.add_argument("--resume", action="store_true", help="continue the run in --run, with the same settings")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines.add_argument("--device", default=device, help="where to train (default: %(default)s)")
    settings = lines.add_argument_group("training")
    for name, value in asdict(recipe.training).items():
        settings.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            choices=("dense", *METHODS) if name == "method" else None,
            metavar=None if name == "method" else "N",
            help=f"{HELP[name]} (default: %(default)s)",
        )
    return lines


def follow(recipe: Recipe, options: argparse.Namespace, *, train_on: Cases, held_out: Cases) -> Evaluation:
    """Trains, evaluates on the held-out cases, prints a report and leaves a run directory.

    Raises:
        KeyboardInterrupt: The training was asked to stop, and its checkpoint is written.
        DstlibError: See :func:`open_run` and :func:`train`.
    """
    if options.run == Path():
        remedy = "Leave --run out for a folder named by the date."
        raise SettingError(explain("--run", "the command line", allowed="a folder", given="''", remedy=remedy))
    if options.resume and options.run is None:
        remedy = "Pass the folder that the run was started in."
        raise SettingError(
            explain("--resume", "the command line", allowed="--run with it", given="none", remedy=remedy)
        )
    recipe = _chosen(recipe, options)
    network = replace(recipe.network, in_channels=len(train_on.channels), num_classes=len(train_on.classes) + 1)
    recipe = replace(recipe, network=network)
    # Before the directory is opened: settings that cannot be used must not leave a run behind.
    torch.manual_seed(recipe.training.seed)
    training = start(E2ENet(network).to(_usable(options.device)), recipe.training)
    path = options.run or Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    data = {
        "name": train_on.name,
        "train_on": [case.name for case in train_on.cases],
        "held_out": [case.name for case in held_out.cases],
    }
    with open_run(path, {**asdict(recipe), "data": data}, resume=options.resume) as run:
        # A run that was stopped before its first checkpoint starts again: its batches are the same.
        if options.resume and (run.checkpoint.exists() or run.metrics.exists()):
            training.load_state_dict(run.load_checkpoint())
        print(f"{train_on.name}: {len(train_on.cases)} cases to train on, {len(held_out.cases)} held out; in {path}")
        if absent := _absent(train_on):
            print(f"Note: no case to train on has {', '.join(absent)}.")
        if training.sparsifier:
            print(*str(training.sparsifier.summary()).splitlines()[-2:], sep="\n")
        _train(training, train_on, recipe, run)
        try:
            scores = evaluate(training.model, held_out, patch_size=recipe.patches.patch_size)
            write_report(run, training, scores, held_out, patch_size=recipe.patches.patch_size)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped("The training is finished and saved", path)) from None
        if training.sparsifier:
            training.sparsifier.detach()
        return scores


def run_command(main: Callable[[], object]) -> int:
    """Runs a script: the exit code, with an error in one line on stderr instead of a traceback.

    0 done; 2 something given cannot be used; 130 interrupted.
    """
    try:
        main()
    except DstlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\n{interruption if interruption.args else 'Interrupted.'}", file=sys.stderr)
        return 130
    return 0


def _chosen(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with the training settings of the command line."""
    values = {name: getattr(options, name) for name in asdict(recipe.training)}
    if values["method"] == "dense":
        if values["sparsity"] not in (0.0, recipe.training.sparsity):
            given = f"--method dense with --sparsity {values['sparsity']}"
            remedy = "Leave one of them out."
            raise SettingError(
                explain("--method", "the command line", allowed="no sparsity with dense", given=given, remedy=remedy)
            )
        values |= {"method": recipe.training.method, "sparsity": 0.0}
    return replace(recipe, training=TrainSettings(**values))


def _absent(cases: Cases) -> list[str]:
    """The classes that no case has."""
    present = set().union(*(set(np.unique(case.label).tolist()) for case in cases.cases))
    return [name for label, name in enumerate(cases.classes, start=1) if label not in present]


def _usable(device: str) -> torch.device:
    """The device, once it has taken a tensor."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # no such device; none that this build of torch knows
        reason = str(error).splitlines()[0]
        remedy = "Leave --device out, or pass cpu or cuda."
        raise SettingError(
            explain("device", "the command line", allowed="one that torch can use", given=reason, remedy=remedy)
        ) from error


def _train(training: Training, train_on: Cases, recipe: Recipe, run: Run) -> None:
    def save(training: Training) -> None:
        run.save_checkpoint(training.state_dict())
        run.write_metrics(training.metrics)

    with interruptible() as should_stop:
        finished = train(
            training,
            train_on.cases,
            settings=recipe.training,
            patches=recipe.patches,
            save=save,
            should_stop=should_stop,
        )
    if not finished:
        done = f"Stopped after iteration {training.iteration} of {recipe.training.num_iterations}; nothing is lost"
        raise KeyboardInterrupt(_stopped(done, run.path))


def _stopped(done: str, path: Path) -> str:
    """What was done, and the command that continues this one."""
    arguments = [a for a in sys.argv if a != "--resume"]
    if not any(a == "--run" or a.startswith("--run=") for a in arguments):
        arguments += ["--run", str(path)]
    return f"{done}. Continue with:\n  {shlex.join([sys.executable, *arguments, '--resume'])}"

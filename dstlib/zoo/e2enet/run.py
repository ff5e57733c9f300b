"""A recipe from end to end: data → training → prediction → evaluation → report, in one run directory."""

import argparse
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import torch

from dstlib.errors import SettingError
from dstlib.profile import profile
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.dataset import Dataset, open_dataset
from dstlib.zoo.e2enet.evaluation.evaluate import Evaluation, evaluate_folder
from dstlib.zoo.e2enet.inference.predict import Trained, outcome_table, predict_scans
from dstlib.zoo.e2enet.recipes import Preset, Recipe
from dstlib.zoo.e2enet.report import write_report
from dstlib.zoo.e2enet.training.interrupt import interruptible
from dstlib.zoo.e2enet.training.log import Log
from dstlib.zoo.e2enet.training.ranks import process_group
from dstlib.zoo.e2enet.training.run_directory import Run, open_run, read_checkpoint
from dstlib.zoo.e2enet.training.settings import Execution, chosen_device, usual_precision
from dstlib.zoo.e2enet.training.state import Training, begin_from, start
from dstlib.zoo.e2enet.training.train import train

RESTART = "Start the run afresh in another folder, or restore the file."


def follow(recipe: Recipe, options: argparse.Namespace) -> Evaluation | None:
    """Trains, evaluates on the held-out cases, prints a report and leaves a run directory.

    ``options`` are of :func:`dstlib.zoo.e2enet.cli.parser`. Under torchrun each process trains its share and
    the first one does the rest; the others return None, as does a run that holds no case out.

    Raises:
        KeyboardInterrupt: The training was asked to stop, and its checkpoint is written.
        DstlibError: The options, the data or the directory cannot be used; the loss is not a number.
    """
    _check_options(options)
    preset = chosen_preset(recipe, options)
    with process_group(chosen_device(options.device)) as (ranks, device):
        execution = Execution(
            device=device,
            precision=options.precision or usual_precision(device),
            channels_last=options.channels_last,
            compile=options.compile,
            engine=options.engine,
            workers=options.workers,
        )
        _refuse_unequal_shares(preset.patches.batch_size, ranks.num)
        data = open_dataset(recipe, options, ranks=ranks)
        network = replace(preset.network, in_channels=len(data.channels), num_classes=len(data.classes) + 1)
        preset = replace(preset, network=network)
        # Before the directory is opened: settings that cannot be used must not leave a run behind.
        torch.manual_seed(preset.training.seed)
        model = build_model(
            options.model,
            in_channels=network.in_channels,
            num_classes=network.num_classes,
            patch_size=preset.patches.patch_size,
            config=network,
            width=options.width,
        )
        profile(model, (1, network.in_channels, *preset.patches.patch_size))  # refuses a patch that does not fit
        training = start(model, preset.training, execution, ranks)
        if options.begin_from is not None and not (options.resume and (options.run / "checkpoint.pt").exists()):
            _begin_from(training, options)
        try:
            return _in_directory(recipe, options, preset, training, data)
        finally:
            if training.sparsifier:
                training.sparsifier.detach()


def chosen_preset(recipe: Recipe, options: argparse.Namespace) -> Preset:
    """The preset with the settings of the command line."""
    preset = recipe.presets[options.preset or ("quick" if options.data else "demo")]
    given = {name: getattr(options, name) for name in asdict(preset.training)}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("method") == "dense":
        if given.get("sparsity"):
            text = f"--method dense with --sparsity {given['sparsity']}"
            remedy = "Leave one of them out."
            raise SettingError.of(
                "--method", "the command line", allowed="no sparsity with dense", given=text, remedy=remedy
            )
        given = {**given, "method": preset.training.method, "sparsity": 0.0}
    if options.model != "e2enet":
        given.setdefault("sparsity", 0.0)  # as published; sparse on request
    patches = {
        **({"patch_size": tuple(options.patch_size)} if options.patch_size else {}),
        **({"batch_size": options.batch_size} if options.batch_size is not None else {}),
    }
    return replace(preset, training=replace(preset.training, **given), patches=replace(preset.patches, **patches))


def _in_directory(
    recipe: Recipe, options: argparse.Namespace, preset: Preset, training: Training, data: Dataset
) -> Evaluation | None:
    path = options.run or Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    config = {
        "recipe": recipe.name,
        "model": options.model,
        "width": options.width,
        **asdict(preset),
        "begin_from": str(options.begin_from) if options.begin_from else None,
        "freeze_topology": options.freeze_topology,
        "data": data.to_json(),
    }
    leads = training.ranks.leads
    with open_run(path, config, resume=options.resume) if leads else nullcontext() as run:
        training.ranks.wait()  # the leader has the directory
        checkpoint = path / "checkpoint.pt"
        # A run that was stopped before its first checkpoint starts again: its batches are the same.
        if options.resume and (checkpoint.exists() or (path / "metrics.csv").exists()):
            state = run.load_checkpoint() if run else read_checkpoint(checkpoint, remedy=RESTART)["state"]
            training.load_state_dict(state)
        if run:
            _say(training, data, path)
        _train(training, data, preset, run, path, tensorboard=options.tensorboard)
        if run is None:
            return None
        run.write_model(training.model.state_dict())
        if not data.held_out_files:
            print(f"No case is held out, so nothing is evaluated. The network is in {run.model}.")
            return None
        try:
            return _evaluate(training, data, preset, run, workers=options.workers)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped("The training is finished and saved", path)) from None


def _say(training: Training, data: Dataset, path: Path) -> None:
    print(f"{data.name}: {len(data.train_on.cases)} cases to train on, {len(data.held_out.cases)} held out; in {path}")
    if absent := data.absent_classes():
        print(f"Note: no case to train on has {', '.join(absent)}.")
    if training.sparsifier:
        print(*str(training.sparsifier.summary()).splitlines()[-2:], sep="\n")


def _train(
    training: Training, data: Dataset, preset: Preset, run: Run | None, path: Path, *, tensorboard: bool
) -> None:
    log = Log(path, tensorboard=tensorboard) if run else None
    if log:
        log.session(training.iteration, {**asdict(training.execution), "ranks": training.ranks.num})

    def save(training: Training) -> None:
        if run and log:
            run.save_checkpoint(training.state_dict())
            run.write_metrics(training.metrics)
            if training.metrics:
                log.epoch(training.metrics[-1], training.device)

    with interruptible() as should_stop:
        finished = train(
            training,
            data.train_on.cases,
            patches=preset.patches,
            held_out=data.held_out.cases,
            save=save,
            should_stop=should_stop,
        )
    if not finished:
        done = f"Stopped after iteration {training.iteration} of {preset.training.num_iterations}; nothing is lost"
        raise KeyboardInterrupt(_stopped(done, path))


def _evaluate(training: Training, data: Dataset, preset: Preset, run: Run, *, workers: int) -> Evaluation:
    """Predicts the held-out scans as files in their own geometry, and scores the files."""
    trained = Trained(
        models=(training.predictor,),
        preparation=data.preparation,
        patch_size=preset.patches.patch_size,
        mirror=preset.patches.mirror,
        channels=data.channels,
        classes=data.classes,
    )
    outcomes = predict_scans(trained, data.held_out_files, run.predictions)
    if any(outcome.error for outcome in outcomes):
        print(outcome_table(outcomes))
    scores = evaluate_folder(run.predictions, data.held_out_files, data.classes, workers=workers)
    write_report(run, training, scores, data.held_out_files, patch_size=preset.patches.patch_size)
    return scores


def _begin_from(training: Training, options: argparse.Namespace) -> None:
    remedy = "Pass --from the folder of a run that a recipe has written."
    saved = read_checkpoint(options.begin_from / "checkpoint.pt", remedy=remedy)
    fresh = begin_from(training, saved["state"], freeze=options.freeze_topology)
    if fresh and training.ranks.leads:
        print(f"Begun from {options.begin_from}, but for {', '.join(fresh)}: other classes, so they start afresh.")


def _check_options(options: argparse.Namespace) -> None:
    """What argparse cannot say."""
    checks = [
        ("--run-dir", options.run != Path(), "a folder", "''", "Leave --run-dir out for a folder named by the date."),
        (
            "--resume",
            not options.resume or options.run is not None,
            "--run-dir with it",
            "none",
            "Pass the folder that the run was started in.",
        ),
        (
            "--freeze-topology",
            not options.freeze_topology or options.begin_from is not None,
            "--from with it",
            "none",
            "Pass --from the run whose topology is to be kept, or --method static for a random one.",
        ),
        (
            "--tensorboard",
            not options.tensorboard or find_spec("tensorboard") is not None,
            "tensorboard installed",
            "none",
            "pip install tensorboard, or leave it out: log.jsonl has the same numbers.",
        ),
    ]
    for what, holds, allowed, given, remedy in checks:
        if not holds:
            raise SettingError.of(what, "the command line", allowed=allowed, given=given, remedy=remedy)


def _refuse_unequal_shares(batch_size: int, num_ranks: int) -> None:
    if batch_size % num_ranks:
        remedy = "It counts the patches of all processes, and each takes as many."
        where, allowed = "the command line", f"a multiple of {num_ranks}, the number of processes"
        raise SettingError.of("--batch-size", where, allowed=allowed, given=batch_size, remedy=remedy)


def _stopped(done: str, path: Path) -> str:
    """What was done, and the command that continues this one."""
    arguments = [a for a in sys.argv if a != "--resume"]
    if not any(a == "--run-dir" or a.startswith("--run-dir=") for a in arguments):
        arguments += ["--run-dir", str(path)]
    launcher = [sys.executable]
    if num := os.environ.get("WORLD_SIZE"):
        launcher = ["torchrun", "--nproc-per-node", num]
    return f"{done}. Continue with:\n  {shlex.join([*launcher, *arguments, '--resume'])}"

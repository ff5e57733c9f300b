"""A recipe from end to end: data → training → prediction → evaluation → report, in one run directory."""

import os
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dstlib.errors import SettingError, printable, require
from dstlib.files import write_json, write_whole
from dstlib.profile import profile
from dstlib.report import on_one_line
from dstlib.torch_files import is_same
from dstlib.typed_json import sealed
from dstlib.zoo.e2enet.baselines import build_model, check_name
from dstlib.zoo.e2enet.baselines.architecture import ARCHITECTURE, Architecture
from dstlib.zoo.e2enet.baselines.segmenter import check_width
from dstlib.zoo.e2enet.data.layouts.manifest import Geometry
from dstlib.zoo.e2enet.dataset import Dataset, DataSettings, open_dataset
from dstlib.zoo.e2enet.evaluation.challenges import challenge_of
from dstlib.zoo.e2enet.evaluation.evaluate import Evaluation, evaluate_folder
from dstlib.zoo.e2enet.inference.predict import Trained, outcome_table, predict_scans
from dstlib.zoo.e2enet.recipes import Preset
from dstlib.zoo.e2enet.report import write_report
from dstlib.zoo.e2enet.training.execution import Execution
from dstlib.zoo.e2enet.training.log import Log
from dstlib.zoo.e2enet.training.loop import interruptible, train
from dstlib.zoo.e2enet.training.ranks import Ranks, process_group
from dstlib.zoo.e2enet.training.records import CONFIG, ConfigRecord, config_of
from dstlib.zoo.e2enet.training.run_directory import Run, open_run, read_checkpoint
from dstlib.zoo.e2enet.training.search import check_budget
from dstlib.zoo.e2enet.training.settings import SPARSE_MODELS
from dstlib.zoo.e2enet.training.state import Training, begin_from, start

RESTART = "Start the run afresh in another folder, or restore the file."


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that is asked of a run.

    - ``recipe``: its name, which stands in the run's ``config.json``.
    - ``preset``: network, patches and training; the channels and classes of the network follow the data.
    - ``model``: "e2enet", or the name of a baseline; ``width`` multiplies the channels of a baseline.
    - ``architecture``: of a model whose own is the result of a search; ``memory_budget``: of such a search.
    - ``data``: the scans, and how they are divided.
    - ``execution``: where and how it is computed, which does not change what the run is.
    - ``folder``: the run directory; None for one under ``runs``, named by recipe and date.
    - ``resume``: whether to continue the run there, with the same settings.
    - ``begin_from``: the run whose weights and masks to begin with; with ``freeze_topology`` the masks stay so.
    - ``tensorboard``: whether to write its scalars too.

    Raises:
        SettingError: One of them contradicts another, or wants what is not installed.
    """

    recipe: str
    preset: Preset
    data: DataSettings
    model: str = "e2enet"
    width: float = 1.0
    architecture: Architecture | None = None
    memory_budget: float | None = None
    execution: Execution = field(default_factory=Execution)
    folder: Path | None = None
    resume: bool = False
    begin_from: Path | None = None
    freeze_topology: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        where = "the command line"
        check_name(self.model, self.architecture)
        check_width(self.width)
        if self.memory_budget is not None:
            check_budget(self.memory_budget)
        remedy = "Leave --run-dir out for a folder named by the date."
        require(self.folder != Path(), "--run-dir", where, allowed="a folder", given="''", remedy=remedy)
        if self.resume and self.folder is None:
            remedy = "Pass the folder that the run was started in."
            raise SettingError.of("--resume", where, allowed="--run-dir with it", given="none", remedy=remedy)
        if self.freeze_topology and self.begin_from is None:
            remedy = "Pass --from the run whose topology is to be kept, or --method static for a random one."
            raise SettingError.of("--freeze-topology", where, allowed="--from with it", given="none", remedy=remedy)
        if self.execution.recompute and self.model not in SPARSE_MODELS:
            allowed, remedy = f"the model {' or '.join(SPARSE_MODELS)}", "Leave it out, or pass a smaller --patch-size."
            raise SettingError.of("--recompute", where, allowed=allowed, given=self.model, remedy=remedy)
        if self.tensorboard and find_spec("tensorboard") is None:
            remedy = "pip install tensorboard, or leave it out: log.jsonl has the same numbers."
            raise SettingError.of("--tensorboard", where, allowed="tensorboard installed", given="none", remedy=remedy)

    def fitted(self, data: Dataset) -> "RunConfig":
        """Returns this with a network of the data's channels and classes."""
        network = replace(self.preset.network, in_channels=len(data.channels), num_classes=data.labels.num_outputs)
        return replace(self, preset=replace(self.preset, network=network))

    def to_json(self, data: Dataset) -> dict[str, object]:
        """Returns what settles the result, as ``config.json`` holds it: not where files lie, nor how it is computed."""
        record = ConfigRecord(
            recipe=self.recipe,
            model=self.model,
            width=self.width,
            network=self.preset.network,
            patches=self.preset.patches,
            training=self.preset.training,
            begin_from=printable(str(self.begin_from)) if self.begin_from else None,  # which may be no text
            freeze_topology=self.freeze_topology,
            data=data.record(),
            architecture=self.architecture,
            memory_budget=self.memory_budget,
        )
        return asdict(record)


def run_recipe(config: RunConfig) -> Evaluation | None:
    """Trains, evaluates on the held-out cases, prints a report and leaves a run directory.

    Under torchrun each process trains its share and the first one does the rest; the others return None, as does
    a run that holds no case out.

    Raises:
        KeyboardInterrupt: The training was asked to stop, and its checkpoint is written.
        DstlibError: The settings, the data or the directory cannot be used; the loss is not a number.
    """
    with process_group(config.execution.device) as ranks:
        size, allowed = config.preset.patches.batch_size, f"a multiple of {ranks.num}, the number of processes"
        remedy = "It counts the patches of all processes, and each takes as many."
        is_shared = size % ranks.num == 0
        require(is_shared, "--batch-size", "the command line", allowed=allowed, given=size, remedy=remedy)
        settings = replace(config.data, geometry=_geometry(config))
        data = open_dataset(settings, workers=config.execution.workers, ranks=ranks)
        config = config.fitted(data)
        # Before the directory is opened: settings that cannot be used must not leave a run behind.
        training = begin(config, data, ranks)
        try:
            return _run_in_directory(config, training, data)
        finally:
            if training.sparsifier:
                training.sparsifier.detach()


def _geometry(config: RunConfig) -> Geometry | None:
    """Returns the rule by which headers are read: as asked for, or as the run was begun that is resumed."""
    asked, folder = config.data.geometry, config.folder
    if asked is None and config.resume and folder is not None and (folder / CONFIG).exists():
        return config_of(folder).data.rule
    return asked


def begin(config: RunConfig, data: Dataset, ranks: Ranks) -> Training:
    """Builds the network of a run and puts it into training, from the weights of another run where it asks for that.

    ``config`` is that of the data, see :meth:`RunConfig.fitted`.

    Raises:
        SettingError: The settings do not fit each other, or the patch does not fit the network.
        StateError: The run to begin from is none, or is of another network.
    """
    network, size = config.preset.network, config.preset.patches.patch_size
    channels = network.in_channels
    torch.manual_seed(config.preset.training.seed)
    model = build_model(
        config.model,
        in_channels=channels,
        num_classes=network.num_classes,
        patch_size=size,
        config=network,
        width=config.width,
        architecture=config.architecture,
    )
    profile(model, (1, channels, *size))  # refuses a patch that does not fit, before anything is written
    training = start(model, config.preset.training, config.execution, ranks, data.labels, config.memory_budget)
    goes_on = config.folder and config.resume and (config.folder / "checkpoint.pt").exists()
    if config.begin_from is not None and not goes_on:
        remedy = "Pass --from the folder of a run that a recipe has written."
        saved = read_checkpoint(config.begin_from / "checkpoint.pt", remedy=remedy)
        is_same = _has_classes_of(saved["config"].get("data"), data)
        fresh = begin_from(training, saved["state"], freeze=config.freeze_topology, has_same_classes=is_same)
        if fresh and ranks.leads:
            told = f"Begun from {config.begin_from}, but for {', '.join(fresh)}: other classes, so they start afresh."
            print(on_one_line(told))
    return training


def _has_classes_of(saved: Any, data: Dataset) -> bool:
    """Says whether the heads of a saved run answer with the same classes, or with the same regions."""
    if not isinstance(saved, dict):
        return False
    labels = saved.get("labels")
    regions = labels.get("regions") if isinstance(labels, dict) else None
    has_regions = isinstance(regions, list | tuple | dict) and len(regions) > 0
    return is_same(list(data.classes), saved.get("classes")) and has_regions == (data.labels.regions is not None)


def _run_in_directory(config: RunConfig, training: Training, data: Dataset) -> Evaluation | None:
    path = config.folder or Path("runs") / f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    leads = training.ranks.leads
    with open_run(path, config.to_json(data), resume=config.resume) if leads else nullcontext() as run:
        training.ranks.wait()  # the leader has the directory
        # A run that was stopped before its first checkpoint starts again: its batches are the same.
        if config.resume and ((path / "checkpoint.pt").exists() or (path / "metrics.csv").exists()):
            state = run.load_checkpoint() if run else read_checkpoint(path / "checkpoint.pt", remedy=RESTART)["state"]
            training.load_state_dict(state)
        if run:
            _print_beginning(training, data, path)
        _train(config, training, data, run, path)
        if run is None:
            return None
        run.write_model(training.model.state_dict())
        if training.search:
            write_json(path / ARCHITECTURE, sealed(asdict(training.search.found())))
            print(on_one_line(f"The architecture is in {path / ARCHITECTURE}: --model dints --architecture {path}."))
        if not data.held_out_files:
            told = f"No case is held out, so nothing is evaluated. The network is in {path / 'model.pt'}."
            print(on_one_line(told))
            return None
        try:
            return _evaluate(config, training, data, run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped("The training is finished and saved", path)) from None


def _print_beginning(training: Training, data: Dataset, path: Path) -> None:
    numbers = f"{len(data.train_on.cases)} cases to train on, {len(data.held_out.cases)} held out"
    print(on_one_line(f"{data.name}: {numbers}; in {path}"))
    for note in data.labels.notes(data.classes):
        print(on_one_line(f"Note: {note}."))
    if absent := data.absent_classes():
        print(f"Note: no case to train on has {', '.join(absent)}.")
    if training.sparsifier:
        print(training.sparsifier.summary().totals())


def _train(config: RunConfig, training: Training, data: Dataset, run: Run | None, path: Path) -> None:
    log = Log(path, tensorboard=config.tensorboard) if run else None
    if run and log:
        if training.metrics:  # a process that was killed behind its checkpoint has not come to these
            run.write_metrics(training.metrics)
            run.write_flows(training.flows)
            log.complete(training.metrics)
        log.session(training.iteration, {**asdict(training.execution), "ranks": training.ranks.num})

    def save(training: Training) -> None:
        cpu = time.process_time()
        if run and log:
            run.save_checkpoint(training.state_dict())
            run.write_metrics(training.metrics)
            run.write_flows(training.flows)
            if training.metrics:
                log.epoch(training.metrics[-1], training.device, cpu=cpu)

    cases, held_out, patches = data.train_on.cases, data.held_out.cases, config.preset.patches
    with interruptible() as should_stop:
        finished = train(training, cases, patches=patches, held_out=held_out, save=save, should_stop=should_stop)
    if not finished:
        at = f"iteration {training.iteration} of {config.preset.training.num_iterations}"
        raise KeyboardInterrupt(_stopped(f"Stopped after {at}; nothing is lost", path))


def _evaluate(config: RunConfig, training: Training, data: Dataset, run: Run) -> Evaluation:
    """Predicts the held-out scans as files in their own geometry, and scores the files."""
    patches, predictions = config.preset.patches, run.path / "predictions"
    trained = Trained(
        models=(training.predictor,),
        preparation=data.preparation,
        patch_size=patches.patch_size,
        mirror=patches.mirror,
        channels=data.channels,
        classes=data.classes,
        labels=data.labels,
        geometry=data.geometry,
    )
    outcomes = predict_scans(trained, data.held_out_files, predictions)
    if any(outcome.error or outcome.odd for outcome in outcomes):
        print(outcome_table(outcomes))
    files, labels, workers = data.held_out_files, data.labels, config.execution.workers
    scores = evaluate_folder(predictions, files, data.classes, labels=labels, workers=workers)
    challenge = challenge_of(data.classes, labels)
    if challenge:
        ranked = evaluate_folder(
            predictions, files, challenge.classes, labels=challenge.labels, scoring=challenge.scoring, workers=workers
        )
        write_whole(run.path / "challenge.csv", ranked.csv().encode())
        write_json(run.path / "challenge.json", ranked.to_json())
        print(f"\n{challenge.told(ranked)}")
    write_report(run, training, scores, files, labels=labels, patch_size=patches.patch_size)
    return scores


def _stopped(done: str, path: Path) -> str:
    """Says what was done, and the command that continues this one."""
    arguments = [a for a in sys.argv if a != "--resume"]
    if not any(a == "--run-dir" or a.startswith("--run-dir=") for a in arguments):
        arguments += ["--run-dir", str(path)]
    num = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", num] if num else [sys.executable]
    return f"{done}. Continue with:\n  {shlex.join([*launcher, *arguments, '--resume'])}"

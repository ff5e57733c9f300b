"""The runs behind tables and figures: each trained once, continued where it was stopped, and read back when finished.

A run is one (system, fold, seed) of a plan, in a folder that is named by them::

    RUNS/RECIPE-DATA-SCALE/SYSTEM/budget.json            where CPU time is budgeted
    RUNS/RECIPE-DATA-SCALE/SYSTEM/fold0-seed0/           a run directory as any
    RUNS/RECIPE-DATA-SCALE/on-MRI/SYSTEM/fold0-seed0/    of Table 6
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

from dstlib.errors import DstlibError, StateError, few, require, shown
from dstlib.files import write_json
from dstlib.report import on_one_line
from dstlib.typed_json import read_json
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.dataset import Dataset, DataSettings, open_dataset
from dstlib.zoo.e2enet.evaluation.evaluate import evaluate_folder
from dstlib.zoo.e2enet.evaluation.metrics import Scoring
from dstlib.zoo.e2enet.evaluation.scores import Evaluation
from dstlib.zoo.e2enet.paper.budget import Budget, in_proportion, read_budget, seconds_per_iteration, settled_budget
from dstlib.zoo.e2enet.paper.scale import SCALES, TINY_WIDTH, Scale
from dstlib.zoo.e2enet.paper.systems import ONE_WIDTH, SYSTEMS, Source, System, refusal
from dstlib.zoo.e2enet.recipes import Preset, Recipe, short_name
from dstlib.zoo.e2enet.run import RunConfig, run_recipe
from dstlib.zoo.e2enet.training.epochs import metrics_of
from dstlib.zoo.e2enet.training.log import epochs_of
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.records import (
    CONFIG,
    RESULT,
    ConfigRecord,
    DataRecord,
    ResultRecord,
    config_of,
    result_of,
)

ReadConfig = Callable[[Recipe, Sequence[str]], RunConfig]
SETTLED = (
    "--preset",
    "--model",
    "--width",
    "--sparsity",
    "--method",
    "--architecture",
    "--fold",
    "--seed",
    "--run-dir",
    "--resume",
    "--from",
    "--freeze-topology",
)
TRANSFER = 4  # CT to MRI trains for 250 epochs of the paper's 1000: a quarter
AGAIN = "Give the options it was trained with, or another --runs; or remove {folder} to train it anew."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all runs of a comparison have in common.

    - ``read``: makes a run of a recipe's command line: :func:`dstlib.zoo.e2enet.cli.read_config`.
    - ``runs``: the folder of all; ``data`` and ``mri`` those of the scans, None for phantoms, or no MRI.
    - ``width``: multiplies the channels of baselines; None for the scale's.
    - ``cpu_minutes``: of training for each run, in the place of the scale's epochs.
    - ``architecture``: of the row that wants one, in the place of a search; ``memory_budget``: of that search.
    - ``options``: further ones of the recipe's command line.
    - ``sources``: the options that take the scans of Table 6, see :func:`.scans.with_mri`.

    Raises:
        SettingError: One of the options is settled by the rows.
    """

    recipe: Recipe
    scale: Scale
    read: ReadConfig
    runs: Path
    data: Path | None = None
    mri: Path | None = None
    folds: tuple[str, ...] = ("0",)
    seeds: tuple[int, ...] = (0,)
    width: float | None = None
    cpu_minutes: float | None = None
    architecture: Path | None = None
    memory_budget: float | None = None
    options: tuple[str, ...] = ()
    sources: Mapping[Source, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [option for option in self.options if _name(option) in SETTLED]
        allowed, remedy = "options that all rows share", "Choose rows by --rows, runs by --folds and --seeds."
        require(not given, "options", "the command line", allowed=allowed, given=few(given), remedy=remedy)
        is_budget = self.cpu_minutes is None or 0 < self.cpu_minutes < float("inf")
        remedy = "It is what each run trains for; leave it out for the epochs of the scale."
        require(
            is_budget, "--cpu-minutes", "the command line", allowed="minutes", given=self.cpu_minutes, remedy=remedy
        )

    @property
    def folder(self) -> Path:
        data = self.data.resolve().name if self.data else "phantoms"
        budget = f"-{self.cpu_minutes:g}min" if self.cpu_minutes else ""
        return self.runs / f"{short_name(self.recipe.name)}-{data}-{self.scale}{budget}"

    @property
    def preset(self) -> Preset:
        """The recipe's preset of the scale."""
        return self.recipe.presets[SCALES[self.scale][1]]

    def has(self, option: str) -> bool:
        """Says whether an option of the recipe's command line was given, as "--interval 5" or "--interval=5"."""
        return any(_name(given) == option for given in self.options)


def _name(argument: str) -> str:
    """Returns the name of an option, without a value that is joined to it."""
    return argument.partition("=")[0]


@dataclass(frozen=True, kw_only=True)
class Key:
    """Which run of a plan."""

    system: System
    fold: str
    seed: int

    def folder(self, plan: Plan) -> Path:
        """Returns its run directory."""
        return system_folder(plan, self.system) / f"fold{self.fold}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that has been trained and scored.

    ``folder`` is its run directory; ``files`` are the held-out cases, whose predictions lie in it.
    """

    system: System
    fold: str
    seed: int
    folder: Path
    config: ConfigRecord
    result: ResultRecord
    files: tuple[CaseFiles, ...]

    @cached_property
    def evaluation(self) -> Evaluation:
        """The scores of each held-out case and class."""
        return Evaluation.from_json(asdict(self.result))

    @cached_property
    def metrics(self) -> tuple[dict[str, float], ...]:
        """A row per epoch: epoch, iteration, learning_rate, loss and, where validated, val_dice."""
        return metrics_of(self.folder, num_epochs=self.config.training.epochs)


def system_folder(plan: Plan, system: System) -> Path:
    """Returns where the runs of a system lie."""
    if system.source == "set":
        return plan.folder / system.name
    return plan.folder / f"on-{plan.mri.resolve().name if plan.mri else 'phantoms'}" / system.name


def keys(plan: Plan, systems: Sequence[System]) -> Iterator[Key]:
    """Yields every run of the systems, one system after another."""
    for system in systems:
        for seed in plan.seeds:
            for fold in plan.folds:
                yield Key(system=system, fold=fold, seed=seed)


def before(plan: Plan, system: System) -> tuple[System, ...]:
    """Returns the systems whose runs a system begins from, or is built by."""
    names = (system.base, "" if plan.architecture else system.search)
    return tuple(SYSTEMS[name] for name in names if name)


def asked(plan: Plan, key: Key, budget: Budget | None = None) -> RunConfig:
    """Returns the run that a key stands for, of so many iterations where there is a budget."""
    system, folder = key.system, key.folder(plan)
    width = TINY_WIDTH if plan.width is None and plan.scale == "tiny" else plan.width
    options = [*SCALES[plan.scale], *plan.options, "--model", system.model, *system.options]
    if width is not None and system.model not in ONE_WIDTH:
        options += ["--width", f"{width:g}"]
    if plan.memory_budget is not None and system.model == "dints_search":
        options += ["--memory-budget", str(plan.memory_budget)]
    if system.source != "set":
        options += _source_of(plan, system)
    elif plan.data is not None:
        options += ["--data", str(plan.data)]
    if system.base:
        options += ["--from", str(replace(key, system=SYSTEMS[system.base]).folder(plan))]
    if system.search:
        found = plan.architecture or replace(key, system=SYSTEMS[system.search]).folder(plan)
        options += ["--architecture", str(found)]
    options += ["--fold", key.fold, "--seed", str(key.seed), "--run-dir", str(folder)]
    if (folder / CONFIG).exists():
        options.append("--resume")
    config = plan.read(plan.recipe, options)
    preset = config.preset
    settings = preset.training
    if plan.cpu_minutes is not None:
        budget = budget or read_budget(system_folder(plan, system))
        settings = replace(settings, val_iterations=settings.val_iterations if plan.has("--val-iterations") else 0)
    if budget is not None:
        settings = replace(settings, epochs=budget.epochs, iterations=budget.iterations)
    elif system.base:
        settings = replace(settings, epochs=max(1, settings.epochs // TRANSFER))
    if plan.has("--interval"):
        settings = replace(settings, interval=max(1, round(system.interval * settings.interval)))
    else:
        settings = in_proportion(settings, plan.preset.training, times=system.interval)
    return replace(config, preset=replace(preset, training=settings, network=system.changed(preset.network)))


def _source_of(plan: Plan, system: System) -> tuple[str, ...]:
    given, remedy = f"--rows {system.name}", "Choose it with --table 6."
    is_there = system.source in plan.sources
    require(is_there, "--rows", "the command line", allowed="rows on the set itself", given=given, remedy=remedy)
    return plan.sources[system.source]


def finished_runs(plan: Plan, systems: Sequence[System], sets: "Sets") -> tuple[FinishedRun, ...]:
    """Reads the runs of a plan that are finished, in the order of systems, seeds and folds.

    Raises:
        StateError: One of them has other settings than the plan, or other data.
    """
    found = []
    for key in keys(plan, systems):
        folder = key.folder(plan)
        if not (folder / RESULT).exists():
            continue
        config = config_of(folder)
        _refuse_other_settings(plan, key, config)
        data = sets.of(key)
        _refuse_other_data(plan, key, config.data, data.record())
        found.append(
            FinishedRun(
                system=key.system,
                fold=key.fold,
                seed=key.seed,
                folder=folder,
                config=config,
                result=result_of(folder),
                files=data.held_out_files,
            )
        )
    return tuple(found)


def post_processed_scores(run: FinishedRun) -> Evaluation:
    """Scores the predictions of a run with the largest component alone of the classes that gain by it.

    What was found is kept in the run, as ``postprocessed.json``.
    """
    if not run.result.postprocessing:
        return run.evaluation
    file = run.folder / "postprocessed.json"
    if file.exists():
        remedy = "Remove it to have it computed anew."
        return Evaluation.from_json(read_json(file, dict[str, Any], remedy=remedy))
    scores = evaluate_folder(
        run.folder / "predictions",
        run.files,
        run.result.classes,
        labels=run.config.data.meaning,
        scoring=Scoring(tolerance=run.result.tolerances_mm, postprocessing=run.result.postprocessing),
    )
    write_json(file, scores.to_json())
    return scores


def cpu_minutes(run: FinishedRun) -> float | None:
    """Returns the CPU time of a run's training, as its log has it; None where a part of it is not known."""
    spent, done = 0.0, 0
    for epoch in epochs_of(run.folder):
        seconds, iteration = epoch.cpu_seconds_per_iteration, epoch.iteration
        if seconds is None:
            return None
        spent, done = spent + seconds * (iteration - done), iteration
    return spent / 60 if done == run.config.training.num_iterations else None


def train_missing(plan: Plan, systems: Sequence[System], sets: "Sets") -> dict[str, str]:
    """Trains and scores every run that is not finished, one system after another, and says which could not be, and why.

    The scans are read before anything is trained. A system that is then refused, by its network say, or whose loss is
    no number, does not keep the others from running.

    Raises:
        KeyboardInterrupt: It was asked to stop; what was done is kept.
        DataError: The scans cannot be used.
        SettingError: A fold holds no case out.
        StateError: A run that is there has other settings, or its files are damaged.
    """
    runnable = [system for system in systems if not refusal(system)]
    runnable = [*dict.fromkeys(each for system in runnable for each in (*before(plan, system), system))]
    missing = [key for key in keys(plan, runnable) if not (key.folder(plan) / RESULT).exists()]
    # What cannot be used is refused before anything is trained.
    finished_runs(plan, runnable, sets)
    for key in missing:
        if (key.folder(plan) / CONFIG).exists():
            _refuse_other_settings(plan, key, config_of(key.folder(plan)))
    for key in {(key.fold, key.system.source): key for key in missing}.values():
        data = sets.of(key)
        allowed, remedy = "folds that hold out cases", "Choose some of 0 to 4: scores are those of held-out cases."
        has_any = bool(data.held_out_files)
        require(has_any, "--folds", "the command line", allowed=allowed, given=key.fold, remedy=remedy)
    failed: dict[str, str] = {}
    for number, key in enumerate(missing, start=1):
        if key.system.name in failed:
            continue
        if first := next((each for each in before(plan, key.system) if each.name in failed or refusal(each)), None):
            failed[key.system.name] = f"it wants a run of {first.name}, which cannot be trained"
            continue
        told = (
            f"{key.system.title}, fold {key.fold}, seed {key.seed} ({number} of {len(missing)} runs that are missing)"
        )
        print(f"\n{told}", flush=True)
        try:
            _train(plan, key, sets)
        except KeyboardInterrupt:
            told = "Stopped; what is finished is kept. Give the same command again to continue."
            raise KeyboardInterrupt(told) from None
        except StateError:
            raise
        except DstlibError as error:
            failed[key.system.name] = str(error)
            print(on_one_line(f"{key.system.title} cannot be trained: {error}"), flush=True)
    return failed


def _train(plan: Plan, key: Key, sets: "Sets") -> None:
    budget = None
    if plan.cpu_minutes is not None:
        budget = settled_budget(system_folder(plan, key.system), lambda: _measured_budget(plan, key, sets))
    run_recipe(asked(plan, key, budget))


def _measured_budget(plan: Plan, key: Key, sets: "Sets") -> Budget:
    """Measures how long an iteration of a system takes, and returns what its budget comes to."""
    assert plan.cpu_minutes is not None
    config = asked(plan, key)
    minutes = plan.cpu_minutes / (TRANSFER if key.system.base else 1)
    seconds = seconds_per_iteration(config, sets.of(key), cpu_minutes=minutes)
    budget = Budget.of(minutes, seconds, epochs=config.preset.training.epochs)
    total = budget.epochs * budget.iterations
    print(f"{seconds:.3f} CPU s an iteration, so {total} iterations in {minutes:g} CPU min.", flush=True)
    return budget


def _refuse_other_settings(plan: Plan, key: Key, found: ConfigRecord) -> None:
    """Refuses a run that was trained in another way than the plan has it."""
    config = asked(plan, key)
    network = replace(
        config.preset.network, in_channels=found.network.in_channels, num_classes=found.network.num_classes
    )
    is_asked = {
        "recipe": config.recipe,
        "model": config.model,
        "width": config.width,
        **asdict(config.preset.patches),
        **asdict(network),
        **asdict(config.preset.training),
        "freeze_topology": config.freeze_topology,
        "architecture": config.architecture,
        "memory_budget": config.memory_budget,
    }
    was = {
        "recipe": found.recipe,
        "model": found.model,
        "width": found.width,
        **asdict(found.patches),
        **asdict(found.network),
        **asdict(found.training),
        "freeze_topology": found.freeze_topology,
        "architecture": found.architecture,
        "memory_budget": found.memory_budget,
    }
    _refuse_differing("settings", plan, key, was=was, asked=is_asked)


def _refuse_other_data(plan: Plan, key: Key, found: DataRecord, there: DataRecord) -> None:
    """Refuses a run on other cases than the plan's, or on the same ones, read, labelled or normalised otherwise."""
    was, is_asked = ({f.name: getattr(of, f.name) for f in fields(of)} for of in (found, there))
    _refuse_differing("data", plan, key, was=was, asked=is_asked)


def _refuse_differing(
    what: str, plan: Plan, key: Key, *, was: Mapping[str, object], asked: Mapping[str, object]
) -> None:
    differing = [name for name, value in asked.items() if was[name] != value]
    allowed, given = (", ".join(f"{name} {shown(values[name])}" for name in differing) for values in (was, asked))
    folder = key.folder(plan)
    # with budgets, a new training takes a new measurement
    anew = folder if plan.cpu_minutes is None else system_folder(plan, key.system)
    remedy = AGAIN.format(folder=anew)
    require(not differing, what, f"run {folder}", allowed=allowed, given=given, remedy=remedy, error=StateError)


class Sets:
    """The data sets of a plan, each opened once."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._opened: dict[DataSettings, Dataset] = {}

    def of(self, key: Key) -> Dataset:
        """Returns the scans of a run, divided by its fold.

        Raises:
            DataError: They cannot be used.
            SettingError: There is no such fold.
        """
        plain = System(name=key.system.name, title="", source=key.system.source)  # the data alone is of interest
        config = asked(self._plan, replace(key, system=plain))
        if config.data not in self._opened:
            with redirect_stdout(StringIO()):  # each run says of its data what is to be known
                opened = open_dataset(config.data, workers=config.execution.workers, ranks=Ranks())
            self._opened[config.data] = opened
        return self._opened[config.data]

"""Trainings of equal CPU time: how many iterations of a network a budget buys, measured before it is trained.

The number of iterations is settled before the first of them, so that the learning rate falls to its end and a training
that is stopped goes on as it began. Only iterations are in the budget: neither the preparation of the scans, nor
validation, prediction and scores.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from dstlib.errors import StateError
from dstlib.files import locked, make_folder, write_json
from dstlib.typed_json import read_json, sealed
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.dataset import Dataset
from dstlib.zoo.e2enet.run import RunConfig, begin
from dstlib.zoo.e2enet.training.loop import train
from dstlib.zoo.e2enet.training.ranks import Ranks
from dstlib.zoo.e2enet.training.search import first_iteration
from dstlib.zoo.e2enet.training.settings import TrainSettings
from dstlib.zoo.e2enet.training.state import Training

FILE = "budget.json"
WARM_UP, LEAST = 2, 4  # iterations: the first ones allocate; few of them say little, as augmentation varies
SHARE = 0.05  # of the budget, that the calibration takes on top of it


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one iteration of a network takes in CPU seconds, and the training of so many minutes that follows."""

    cpu_minutes: float
    seconds_per_iteration: float
    epochs: int
    iterations: int

    @staticmethod
    def of(cpu_minutes: float, seconds: float, *, epochs: int) -> "Budget":
        """Divides the budget into about so many epochs, the steps in which the learning rate falls, and one at least.

        >>> Budget.of(3.0, 0.9, epochs=24)
        Budget(cpu_minutes=3.0, seconds_per_iteration=0.9, epochs=25, iterations=8)
        """
        total = max(1, int(60 * cpu_minutes / seconds))
        each = max(1, total // epochs)
        return Budget(cpu_minutes=cpu_minutes, seconds_per_iteration=seconds, epochs=total // each, iterations=each)


def settled_budget(folder: Path, measure: Callable[[], Budget]) -> Budget:
    """Returns the budget in the folder of a system's runs; measures it where there is none, and keeps it there.

    Two commands at once settle on one: the second waits for what the first one measures.

    Raises:
        StateError: The file is damaged, or cannot be written.
    """

    def refuse(error: OSError) -> NoReturn:
        allowed, remedy = "a folder to write to", "Choose another one by --runs."
        raise StateError.of(FILE, f"folder {folder}", allowed=allowed, given=error, remedy=remedy) from error

    make_folder(folder)
    with locked(folder, if_held=lambda: None, refuse=refuse):
        budget = read_budget(folder)
        if budget is None:
            budget = measure()
            write_json(folder / FILE, sealed(asdict(budget)))
    return budget


def read_budget(folder: Path) -> Budget | None:
    """Returns the budget of a system, if it was measured.

    Raises:
        StateError: The file is damaged.
    """
    file = folder / FILE
    remedy = "Restore it, or remove it with the runs beside it, to measure and train anew."
    return read_json(file, Budget, remedy=remedy) if file.exists() else None


def seconds_per_iteration(config: RunConfig, data: Dataset, *, cpu_minutes: float) -> float:
    """Measures the CPU seconds of this process, all threads together, that an iteration of a run takes on the average.

    A batch drawn, both passes and the step, as in the training itself; weights and masks are thrown away. Of a search
    it is the mean over both halves: in the second one, each step is followed by one of the architecture.
    """
    config = config.fitted(data)
    settings = replace(config.preset.training, epochs=1000, val_iterations=0)  # it is stopped long before
    config = replace(config, preset=replace(config.preset, training=settings))
    training = begin(config, data, Ranks())
    starts = [0, first_iteration(settings)] if training.search else [0]
    share = SHARE * 60 * cpu_minutes / len(starts)
    try:
        found = [_measured(training, start, data, config.preset.patches, share=share) for start in starts]
    finally:
        if training.sparsifier:
            training.sparsifier.detach()
    return sum(found) / len(found)


def _measured(training: Training, start: int, data: Dataset, patches: PatchSettings, *, share: float) -> float:
    """Trains from an iteration on, for a share of CPU seconds at least; returns what one takes after the warm-up."""
    marks: list[float] = []

    def enough() -> bool:
        marks.append(time.process_time())
        return len(marks) >= WARM_UP + LEAST and marks[-1] - marks[WARM_UP - 1] >= share

    training.iteration = start
    train(training, data.train_on.cases, patches=patches, should_stop=enough)
    return (marks[-1] - marks[WARM_UP - 1]) / (len(marks) - WARM_UP)


def in_proportion(settings: TrainSettings, preset: TrainSettings, *, times: float) -> TrainSettings:
    """Returns settings with updates of the masks at as many shares of the training as the preset's have.

    ``times`` multiplies the interval between them.
    """
    share = times * preset.interval / preset.num_iterations
    return replace(settings, interval=max(1, round(share * settings.num_iterations)))

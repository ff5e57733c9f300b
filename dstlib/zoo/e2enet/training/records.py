"""What a run says of itself, as types: its ``config.json``, and its ``result.json``."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dstlib.errors import StateError
from dstlib.typed_json import OPTIONAL, read_json
from dstlib.zoo.e2enet.baselines.architecture import Architecture
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.data.cases import Shape
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.layouts.channels import Modality
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import Geometry
from dstlib.zoo.e2enet.data.layouts.names import refuse_repeated
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.training.settings import TrainSettings

CONFIG, RESULT, MODEL = "config.json", "result.json", "model.pt"
METRICS, FLOWS = "metrics.csv", "flows.csv"

_REMEDY = "Pass the folder of a run that a recipe has finished; --resume finishes one that was stopped."


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """The data of a run, without where the files lie: what settles the result.

    ``modality`` sums up how the channels are normalised, "declared" where not all alike as CT or as MRI. ``labels`` is
    None where class i has the value i + 1, and ``geometry`` where headers are read by the rule "sform": as in runs of
    before.

    Raises:
        StateError: Two classes share a name.
    """

    name: str
    modality: Modality | Literal["declared"]
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    preparation: Preparation
    train_on: tuple[str, ...]
    held_out: tuple[str, ...]
    labels: Labels | None = field(default=None, metadata={OPTIONAL: True})
    geometry: Geometry | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        _refuse_repeated(self.classes)

    @property
    def meaning(self) -> Labels:
        """What the values of label files mean."""
        return self.labels or Labels.consecutive(len(self.classes))

    @property
    def rule(self) -> Geometry:
        """The rule by which NIfTI headers are read."""
        return self.geometry or "sform"


@dataclass(frozen=True, kw_only=True)
class ConfigRecord:
    """All that settles what a run comes to; not where files lie, nor how it is computed.

    ``architecture`` is that of a network whose own is the result of a search; None for any other. ``memory_budget`` is
    that of a search, None for the published one.

    Raises:
        StateError: The network has other channels or classes than the data.
    """

    recipe: str
    model: str
    width: float
    network: E2ENetConfig
    patches: PatchSettings
    training: TrainSettings
    begin_from: str | None
    freeze_topology: bool
    data: DataRecord
    architecture: Architecture | None = field(default=None, metadata={OPTIONAL: True})
    memory_budget: float | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        data, labels = self.data, self.data.meaning
        ends, allowed = (self.network.in_channels, self.network.num_classes), (len(data.channels), labels.num_outputs)
        if (
            len(data.classes) != labels.num_classes
            or ends != allowed
            or len(data.preparation.normalization) != len(data.channels)
        ):
            remedy = "They follow the data."
            raise StateError.of("channels and classes", "network", allowed=str(allowed), given=ends, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one patch, by both conventions."""

    exact: int
    paper: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a network costs."""

    params: int
    flops: Flops


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a network costs, dense and, if it is, sparse."""

    dense: Cost
    sparse: Cost | None = field(default=None, metadata={OPTIONAL: True})

    @property
    def as_trained(self) -> Cost:
        """That of the network as it was trained."""
        return self.sparse or self.dense


Means = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class ResultRecord:
    """What a run came to: the scores of the held-out cases, costs, and what `predict` is to do.

    - ``cases``: by case, metric or volume, and class; None where there is no value.
    - ``model_sha256``: of ``model.pt``, to which all of it belongs; runs of before have none.

    Raises:
        StateError: Two classes share a name.
    """

    mean_dice: float | None
    mean_nsd: float | None
    mean_hd95: float | None
    mean_hd: float | None
    class_dice: Means
    class_nsd: Means
    class_hd95: Means
    class_hd: Means
    num_cases: dict[str, int]
    num_missed: dict[str, int]
    num_false: dict[str, int]
    num_left_out: int
    classes: tuple[str, ...]
    tolerances_mm: tuple[float, ...]
    cases: dict[str, dict[str, Means]]
    not_scored: dict[str, str]
    definition: str
    cost: Costs
    patch_size: Shape
    postprocessing: tuple[int, ...]
    flows: dict[str, dict[str, float]]
    final_loss: float
    mask_updates: tuple[dict[str, int], ...]
    versions: dict[str, str]
    model_sha256: str | None = field(default=None, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        _refuse_repeated(self.classes)


def config_of(run: Path) -> ConfigRecord:
    """Reads what a run is.

    Raises:
        StateError: There is no such file, or it is damaged or of something else.
    """
    return read_json(run / CONFIG, ConfigRecord, where=f"{CONFIG} of run {run}", remedy=_REMEDY)


def result_of(run: Path) -> ResultRecord:
    """Reads what a run came to.

    Raises:
        StateError: There is no such file, or it is damaged or of something else.
    """
    return read_json(run / RESULT, ResultRecord, where=f"{RESULT} of run {run}", remedy=_REMEDY)


def sha256_of(file: Path) -> str:
    """Computes the SHA-256 of a file."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _refuse_repeated(classes: Sequence[str]) -> None:
    """Refuses two classes of one name: what a run says of its classes, it says by their names."""
    allowed, remedy = "each name once", "Restore the file: no run writes such."
    refuse_repeated(classes, "classes", "a run", allowed=allowed, remedy=remedy, error=StateError)

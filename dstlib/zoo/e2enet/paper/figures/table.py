"""Which figures of the paper there are, and what each is drawn of; nothing heavy is loaded before one is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from dstlib.errors import require
from dstlib.zoo.e2enet.paper.systems import System, refusal

if TYPE_CHECKING:
    from dstlib.zoo.e2enet.paper.runs import FinishedRun

Kind = Literal["panels", "flows", "ranks", "trade-off", "updates", "learning", "volumes"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the paper.

    - ``recipe``: of the data set that it is of in the paper, "amos", say.
    - ``systems``: the names of those that it compares there.
    - ``kind``: what is drawn; ``num_cases`` says of how many cases, where cases are shown.
    """

    number: int
    title: str
    recipe: str
    systems: tuple[str, ...]
    kind: Kind
    num_cases: int = 0

    def refuse_unfit(self, systems: Sequence[System]) -> None:
        """Refuses systems that it cannot be drawn of, before any is trained.

        Raises:
            SettingError: They are too few to compare, or none of their masks are such as it shows.
        """
        where, given = f"figure {self.number}", ", ".join(system.name for system in systems)
        if self.kind in ("flows", "updates"):
            is_fit = all(system.has_updates if self.kind == "updates" else system.sparsity for system in systems)
            allowed = "sparse rows whose masks are updated" if self.kind == "updates" else "sparse rows"
            remedy = "Leave the others out by --rows."
        else:
            number = sum(not refusal(system) for system in systems)
            is_fit = number > 1 or (self.kind == "trade-off" and number == 0)  # the paper's rows alone
            allowed, remedy = "two or more that can be run", "Name others by --rows."
        require(is_fit, "rows", where, allowed=allowed, given=given, remedy=remedy)

    def draw(self, folder: Path, runs: Sequence["FinishedRun"]) -> tuple[Path, ...]:
        """Draws it of finished runs, and returns the files that were written into the folder.

        Raises:
            DataError: The runs do not match, or lack what the figure shows.
            SettingError: matplotlib is not installed.
        """
        from dstlib.zoo.e2enet.paper.figures import from_runs

        match self.kind:
            case "panels":
                return from_runs.draw_panels(self.number, folder, runs, num_cases=self.num_cases)
            case "flows":
                return from_runs.draw_flows(self.number, folder, runs)
            case "ranks":
                return from_runs.draw_ranks(self.number, folder, runs)
            case "trade-off":
                return from_runs.draw_trade_off(self.number, folder, runs, recipe=self.recipe)
            case "updates":
                return from_runs.draw_updates(self.number, folder, runs)
            case "learning":
                return from_runs.draw_learning(self.number, folder, runs)
            case "volumes":
                return from_runs.draw_volumes(self.number, folder, runs)


_PAIR = ("nnunet", "e2enet-0.8")
_SPARSE = ("nnunet", "e2enet-0.7", "e2enet-0.8", "e2enet-0.9")
_VARIANTS = ("dense-no-shift", "e2enet-dense", "dsff-no-shift", "e2enet-0.7")
_TABLE_1 = ("cotr", "nnformer", "unetr", "swin_unetr", "vnet", *_SPARSE)
_LEARNING = ("e2enet-0.8", "nnunet", "nnunet-minus", "every-600", "e2enet-0.7", "every-1800")

_ALL = (
    Figure(number=5, title="predictions of some cases", recipe="amos", systems=_PAIR, kind="panels", num_cases=3),
    Figure(number=6, title="flows in each fusion node, by epoch", recipe="amos", systems=_PAIR[1:], kind="flows"),
    Figure(number=7, title="average ranks over the cases", recipe="amos", systems=_VARIANTS, kind="ranks"),
    Figure(number=8, title="PT scores by weights", recipe="amos", systems=_TABLE_1, kind="trade-off"),
    Figure(number=9, title="predictions of more cases", recipe="amos", systems=_PAIR, kind="panels", num_cases=5),
    Figure(number=10, title="predictions of some cases", recipe="brats", systems=_PAIR, kind="panels", num_cases=4),
    Figure(number=11, title="learning and mask updates", recipe="amos", systems=_PAIR[1:], kind="updates"),
    Figure(number=12, title="learning beside others", recipe="amos", systems=_LEARNING, kind="learning"),
    Figure(number=13, title="volume and Dice by class", recipe="amos", systems=_SPARSE, kind="volumes"),
    Figure(number=14, title="volume and Dice by class", recipe="btcv", systems=_SPARSE[:2], kind="volumes"),
    Figure(number=15, title="volume and Dice by class", recipe="brats", systems=_SPARSE, kind="volumes"),
)

FIGURES: Mapping[int, Figure] = MappingProxyType({figure.number: figure for figure in _ALL})
"""Every figure by its number."""

"""What was measured of each layer, and which form of it runs."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from dstlib.engine.runtime.library import info
from dstlib.errors import SettingError
from dstlib.files import write_json
from dstlib.report import on_one_line
from dstlib.typed_json import read_json, sealed

BUSY = "Others took the cores meanwhile: layers were timed on one thread, by how long that ran."


@dataclass(frozen=True)
class Tries:
    """What a layer took in passes that followed each other, milliseconds, as it was and on the engine."""

    plain: list[float]
    fast: list[float]


def spread(tries: Tries) -> float:
    """Returns how many times as long as the fastest try the middle one took, of the form where that is more.

    >>> spread(Tries([2.0, 3.0, 9.0], [1.0, 1.0, 7.0]))
    1.5
    """
    return max(median(each) / min(each) for each in (tries.plain, tries.fast))


FEW = 1 / 3
"""At such a share of the products each layer of docs/performance.md gains, by 1.7 × or more."""
TIE = 1.1
"""Up to such a ratio what lies within the spread is the engine's, which waits for no thread that has not begun."""


@dataclass(frozen=True)
class Decision:
    """One layer: milliseconds as it was and on the engine, or why the engine cannot compute it.

    The milliseconds are the least of some tries, which other programs lengthen least. ``spread`` is how many times as
    long as that the middle try took, of the form where that is more, and ``active`` the share of the products that the
    engine computes. The layer runs on the engine where that was faster. It also does where the difference is within the
    spread, and small, or the products are few: a tenth, or at most a third.

    Raises:
        SettingError: The numbers are none that were measured.

    >>> clear = Decision("a", "Linear", 1.0, 1.2, None, spread=1.1, active=0.1)
    >>> busy = Decision("b", "Linear", 1.0, 1.2, None, spread=1.5, active=0.1)
    >>> clear.is_fast, busy.is_fast
    (False, True)
    """

    name: str
    kind: str
    plain_ms: float | None
    fast_ms: float | None
    obstacle: str | None
    spread: float = 1.0
    active: float = 1.0

    @classmethod
    def of(cls, name: str, kind: str, tries: "Tries", active: float) -> "Decision":
        """Returns the decision on a layer by tries of both of its forms, of which there may be none.

        >>> print(Decision.of("a", "Linear", Tries([2.0, 9.0, 2.5], [1.0, 1.1, 7.0]), active=0.1))
        a                                Linear            2.00 ms →      1.00 ms  ± 25 %   2.00× engine
        """
        if not tries.plain:
            return cls(name, kind, None, None, None)
        return cls(name, kind, min(tries.plain), min(tries.fast), None, spread(tries), active)

    def __post_init__(self) -> None:
        times = (self.plain_ms, self.fast_ms)
        measured = [ms for ms in times if ms is not None]
        if len(measured) == 1 or (measured and self.obstacle) or not all(0 < ms < math.inf for ms in measured):
            allowed = "two, finite and above 0, or none, as where there is an obstacle"
            given, remedy = f"{times} and the obstacle {self.obstacle!r}", "accelerate() measures them."
            raise SettingError.of("times", f"decision {self.name!r}", allowed=allowed, given=given, remedy=remedy)
        if not (1 <= self.spread < math.inf and 0 <= self.active <= 1):
            what, where = "spread and share of products", f"decision {self.name!r}"
            allowed, numbers, remedy = "1 or more, and 0 to 1", (self.spread, self.active), "accelerate() finds them."
            raise SettingError.of(what, where, allowed=allowed, given=numbers, remedy=remedy)

    @property
    def is_fast(self) -> bool:
        """Whether the layer runs on the engine."""
        if self.plain_ms is None or self.fast_ms is None:
            return False
        within = self.spread if self.active <= FEW else min(self.spread, TIE)
        return self.fast_ms < self.plain_ms * within

    def __str__(self) -> str:
        if self.obstacle:
            return f"{self.name:32} {self.kind:12} plain: {self.obstacle}"
        if self.plain_ms is None or self.fast_ms is None:
            return f"{self.name:32} {self.kind:12} plain: the example did not reach it"
        ratio, around = self.plain_ms / self.fast_ms, f"± {100 * (self.spread - 1):.0f} %"
        why = "" if ratio > 1 else ": a tie" if ratio * TIE > 1 else f": {self.active:.0%} of the products"
        form = f"engine{why}" if self.is_fast else "plain"
        times = f"{self.plain_ms:9.2f} ms → {self.fast_ms:9.2f} ms {around:>7}"
        return f"{self.name:32} {self.kind:12} {times} {ratio:6.2f}× {form}"


@dataclass(frozen=True)
class Decisions(Mapping[str, Decision]):
    """The decisions about a model, layer by layer, and the machine on which they were taken; printable.

    >>> print(Decisions.of([Decision("conv", "Conv2d", 2.0, 1.0, None)]))  # doctest: +ELLIPSIS
    conv                             Conv2d            2.00 ms →      1.00 ms   ± 0 %   2.00× engine
    dstlib engine: ...
    """

    rows: tuple[Decision, ...]
    machine: str
    busy: bool = False  # other programs took the cores meanwhile

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(row.name for row in self.rows).items() if count > 1]
        if twice:
            remedy = "accelerate() takes them."
            raise SettingError.of("decisions", "a model", allowed="one a layer", given=twice, remedy=remedy)

    @classmethod
    def of(cls, rows: Iterable[Decision], *, busy: bool = False) -> "Decisions":
        """Decisions taken here and now."""
        return cls(tuple(rows), str(info()), busy)

    def check(self, layers: Iterable[str]) -> None:
        """A SettingError unless the decisions are about these layers."""
        if set(layers) != set(self):
            allowed, remedy = "those of this model", "Leave them out to measure anew."
            raise SettingError.of("decisions", "accelerate()", allowed=allowed, given=list(self), remedy=remedy)

    def save(self, path: Path) -> None:
        """Writes the decisions as JSON, with a checksum."""
        write_json(path, sealed(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Decisions":
        """Reads what :meth:`save` has written.

        Raises:
            StateError: The file is another one, or damaged.
        """
        return read_json(path, cls, remedy="Measure anew, and save the decisions.")

    def __getitem__(self, name: str) -> Decision:
        return {row.name: row for row in self.rows}[name]

    def __iter__(self) -> Iterator[str]:
        return (row.name for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        remark = [BUSY] if self.busy else []
        return "\n".join(map(on_one_line, [*map(str, self.rows), *remark, self.machine]))

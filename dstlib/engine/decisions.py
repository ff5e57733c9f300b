"""What was measured of each layer, and which form of it runs."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dstlib.engine.runtime.library import info
from dstlib.errors import SettingError
from dstlib.files import write_json
from dstlib.report import on_one_line
from dstlib.typed_json import read_json, sealed


@dataclass(frozen=True)
class Decision:
    """One layer: milliseconds as it was and on the engine, or why the engine cannot compute it.

    Raises:
        SettingError: The times are none that were measured.
    """

    name: str
    kind: str
    plain_ms: float | None
    fast_ms: float | None
    obstacle: str | None

    def __post_init__(self) -> None:
        times = (self.plain_ms, self.fast_ms)
        measured = [ms for ms in times if ms is not None]
        if len(measured) == 1 or (measured and self.obstacle) or not all(0 < ms < math.inf for ms in measured):
            allowed = "two, finite and above 0, or none, as where there is an obstacle"
            given, remedy = f"{times} and the obstacle {self.obstacle!r}", "accelerate() measures them."
            raise SettingError.of("times", f"decision {self.name!r}", allowed=allowed, given=given, remedy=remedy)

    @property
    def is_fast(self) -> bool:
        """Whether the layer runs on the engine."""
        return self.plain_ms is not None and self.fast_ms is not None and self.fast_ms < self.plain_ms

    def __str__(self) -> str:
        if self.obstacle:
            return f"{self.name:32} {self.kind:12} plain: {self.obstacle}"
        if self.plain_ms is None or self.fast_ms is None:
            return f"{self.name:32} {self.kind:12} plain: the example did not reach it"
        form = "engine" if self.is_fast else "plain"
        ratio = self.plain_ms / self.fast_ms
        return f"{self.name:32} {self.kind:12} {self.plain_ms:9.2f} ms → {self.fast_ms:9.2f} ms {ratio:6.2f}× {form}"


@dataclass(frozen=True)
class Decisions(Mapping[str, Decision]):
    """The decisions about a model, layer by layer, and the machine on which they were taken; printable.

    >>> print(Decisions.of([Decision("conv", "Conv2d", 2.0, 1.0, None)]))  # doctest: +ELLIPSIS
    conv                             Conv2d            2.00 ms →      1.00 ms   2.00× engine
    dstlib engine: ...
    """

    rows: tuple[Decision, ...]
    machine: str

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(row.name for row in self.rows).items() if count > 1]
        if twice:
            remedy = "accelerate() takes them."
            raise SettingError.of("decisions", "a model", allowed="one a layer", given=twice, remedy=remedy)

    @classmethod
    def of(cls, rows: Iterable[Decision]) -> "Decisions":
        """Decisions taken here and now."""
        return cls(tuple(rows), str(info()))

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
        return "\n".join(map(on_one_line, [*map(str, self.rows), self.machine]))

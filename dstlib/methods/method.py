"""What a method of sparse training is: a value that says what drops, what grows, as which units, how much and when.

A variant is ``dataclasses.replace(RIGL, interval=500)``; a method of your own is a ``Method``. There is no
class per method and nothing to register. The field's methods are in :mod:`dstlib.methods`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from dstlib import masking
from dstlib.errors import require
from dstlib.masking import (
    NM,
    Allocator,
    AtInit,
    Criterion,
    DenseStorage,
    Distribution,
    Granularity,
    GrownInit,
    InTurn,
    Trace,
)
from dstlib.schedules import Alternating, Clock, Constant, Cosine, Curve, Every, Never

GrownState = Literal["birth", "mean", "gradient"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of sparse training: how masks start and change.

    At each update the lowest-scoring share ``drop_fraction(progress)`` of the active units, by ``drop``, is
    dropped, and the highest by ``grow`` fill the target up. ``interval`` counts optimizer steps between updates, or is
    a share of the run, such as 0.05, and is never longer than a phase of an ``Alternating`` ramp; None means that the
    topology never changes. ``stop`` is the share of the run after which it is fixed.
    ``init`` chooses the first mask; ``grown_init`` gives grown weights their values.

    **Densities.** The density of a weight moves from ``start_density`` (``ramp`` = 0) to its final one (``ramp`` = 1):
    1 starts dense, ``Times(3)`` at three times the final one. ``surplus(progress)`` is the share of units beyond it
    that are grown at an update and dropped again at the next. ``allocate`` shares the active units out among the
    weights at each update; without it, each keeps its own number.

    ``prune`` scores what a density that falls takes first, on its own; the drop fraction is then of what is left, and
    ``drop`` sees that alone. Without it, what is dropped counts towards the fall, by ``drop``.

    **Details.** ``trace`` gathers gradients between updates for ``drop`` and ``grow`` to read. ``storage`` keeps
    the weights that are not active, under the mask. ``round_up`` drops ceil(f·A) units instead of floor(f·A), so that
    a few move too. ``regrow=False`` bars what an update drops from growing in it, ``early_stop`` ends the updates of a
    weight once more than this share of what grows had just been dropped, ``skip_step`` leaves the optimizer's step out
    at an update, ``reset_state`` starts the optimizer's state of a weight afresh when its number of active units rises.

    **Grown weights** start in what an optimizer divides its steps by, such as Adam's second moment, as ``grown_state``
    says: "mean", the mean of the active ones in the layer; "gradient", that and more where the own gradient is larger
    than theirs; "birth", what the optimizer itself begins with, which under Adam's old step count makes steps of up to
    six learning rates. Under any optimizer, the k-th move of a grown weight is k / ``grown_warmup`` of what it makes
    it, until it is all of it or weights grow anew.

    **Progress.** A drop fraction is a curve of ``Every.progress``, measured against ``stop`` as papers do; ``ramp``
    and ``surplus`` are curves of ``Every.approach``, measured against the last update, by which they have arrived.

    Raises:
        SettingError: A part is not of its kind, or out of range, or parts exclude each other.

    >>> from dataclasses import replace
    >>> from dstlib.methods import RIGL
    >>> long = replace(RIGL, name="itop", interval=1500, drop_fraction=Constant(0.5), stop=1.0)
    >>> long.clock(total_steps=4000).due(3000), long.density(0.1, progress=0.5)
    (True, 0.1)
    """

    name: str
    reference: str
    drop: Criterion = masking.magnitude
    prune: Criterion | None = None
    grow: Criterion = masking.random
    granularity: Granularity = masking.Element()
    distribution: Distribution = masking.erk
    drop_fraction: Curve = Cosine(0.3)
    ramp: Curve = Constant(1.0)
    start_density: float | Callable[[float], float] = 1.0
    surplus: Curve = Constant(0.0)
    allocate: Allocator | None = None
    interval: int | float | None = 100
    stop: float = 0.75
    init: Criterion | AtInit | InTurn = masking.random
    grown_init: GrownInit = masking.zeros
    trace: Trace | None = None
    storage: DenseStorage | None = None
    regrow: bool = True
    early_stop: float | None = None
    round_up: bool = False
    skip_step: bool = False
    reset_state: bool = False
    grown_state: GrownState = "gradient"
    grown_warmup: int = 0

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, allowed: str, remedy: str) -> None:
            given = repr(getattr(self, name))
            require(holds, name, f"method {self.name}", allowed=allowed, given=given, remedy=remedy)

        _check_kinds(self, check)
        _check_numbers(self, check)
        _check_together(self, check)

    def clock(self, total_steps: int | None) -> Clock:
        """Returns when this method updates in a run of ``total_steps`` optimizer steps (None: of unknown length)."""
        if self.interval is None:
            return Never()
        interval = self.interval
        if isinstance(interval, float):
            where, remedy = f"method {self.name}", "Pass total_steps=, or replace(method, interval=100), say."
            given, allowed = f"{interval:g} of a run of unknown length", "a number of steps, or total_steps as well"
            require(total_steps is not None, "interval", where, allowed=allowed, given=given, remedy=remedy)
            interval = max(masking.round_down(interval * (total_steps or 0)), 1)
        if total_steps is None:
            return Every(interval=interval)
        stop = masking.whole_if_near(self.stop * total_steps)
        if isinstance(self.ramp, Alternating):  # updates that come more seldom would meet one kind of phase alone
            interval = min(interval, max(int(stop / self.ramp.num_phases), 1))
        return Every(interval=interval, stop=stop)

    def density(self, target: float, progress: float, start: float | None = None) -> float:
        """Computes the density of a weight on its way from ``start``, or else ``start_density``, to ``target``."""
        way = self._within("ramp", self.ramp(progress), "0 is the starting density, 1 the target.")
        return (1 - way) * (self.starting_density(target) if start is None else start) + way * target

    def starting_density(self, target: float) -> float:
        """Computes the density that a ramp to ``target`` leads from."""
        start = self.start_density
        return start(target) if callable(start) else start

    def with_surplus(self, density: float, progress: float) -> float:
        """Computes the density that holds until the next update, where ``density`` stays after it."""
        surplus = self._within("surplus", self.surplus(progress), "0.1 adds a tenth of the active units.")
        return min(density * (1 + surplus), 1.0)

    def _within(self, name: str, value: float, remedy: str) -> float:
        where = f"method {self.name}"
        require(0 <= value <= 1, name, where, allowed="values in [0, 1]", given=value, remedy=remedy)
        return value


_Check = Callable[[str, bool, str, str], None]  # of a field: whether it is right, what is allowed, a remedy


def _check_kinds(m: Method, check: _Check) -> None:
    some = "dstlib.masking has some, as has .schedules."
    for name in ("drop", "grow", "distribution", "drop_fraction", "ramp", "surplus", "grown_init"):
        value = getattr(m, name)
        constant = f"Pass dstlib.schedules.Constant({value}) for the same value throughout."
        is_schedule = name in ("drop_fraction", "ramp", "surplus")
        remedy = constant if is_schedule and isinstance(value, int | float) else some
        check(name, callable(value), "a function", remedy)
    check(
        "init", callable(m.init) or isinstance(m.init, AtInit | InTurn), "a criterion, or one of dstlib.at_init", some
    )
    check("prune", m.prune is None or callable(m.prune), "a criterion, or None", some)
    check("allocate", m.allocate is None or callable(m.allocate), "an allocator, or None", some)
    trace, storage = "Pass dstlib.masking.Trace(steps=8), say.", "Pass dstlib.masking.DenseStorage(), say."
    check("trace", isinstance(m.trace, Trace | None), "a Trace, or None", trace)
    check("storage", isinstance(m.storage, DenseStorage | None), "a DenseStorage, or None", storage)
    for name in ("regrow", "round_up", "skip_step", "reset_state"):
        check(name, type(getattr(m, name)) is bool, "True or False", "It is an option of the update.")
    states = get_args(GrownState)
    what = "What an optimizer divides its steps by starts so; SGD keeps nothing of the kind."
    check("grown_state", m.grown_state in states, f"one of {', '.join(states)}", what)
    folds = isinstance(m.granularity, Granularity) and not isinstance(m.granularity, type)
    check("granularity", folds, "a value that folds and unfolds", "Pass dstlib.Element(), say.")


def _check_numbers(m: Method, check: _Check) -> None:
    is_steps, is_share = type(m.interval) is int and m.interval >= 1, type(m.interval) is float and 0 < m.interval < 1
    allowed = "a whole number of steps from 1 up, a share of the run in (0, 1), or None"
    check("interval", m.interval is None or is_steps or is_share, allowed, "None fixes the topology.")
    check("stop", 0 < m.stop <= 1, "a share of the run in (0, 1]", "Pass 0.75; interval=None fixes the topology.")
    is_length = type(m.grown_warmup) is int and m.grown_warmup >= 0
    check("grown_warmup", is_length, "a whole number of steps from 0 up", "10 are enough; 0 warms nothing up.")
    share, ends = "a share in [0, 1), or None", "0.9 ends what hardly moves; None ends nothing."
    check("early_stop", m.early_stop is None or 0 <= m.early_stop < 1, share, ends)
    starts = "1 starts dense; a ramp leads from it."
    is_density = callable(m.start_density) or 0 < m.start_density <= 1
    check("start_density", is_density, "a density in (0, 1], or what makes it from the final one", starts)


def _check_together(m: Method, check: _Check) -> None:
    """Checks that no two parts exclude each other."""
    check("skip_step", not (m.skip_step and m.storage), "False, with dense storage", "There the step comes first.")
    check(
        "allocate",
        m.allocate is None or not isinstance(m.granularity, NM),
        f"None, as {m.granularity} fixes the number of each weight",
        "Choose another granularity to move units between weights.",
    )
    by_itself = "Its scores by drop say what goes; leave out one of the two."
    check("prune", m.prune is None or m.allocate is None, "none, with an allocator, which prunes by itself", by_itself)
    given = "0, with dense storage"
    check("grown_warmup", not (m.grown_warmup and m.storage), given, "There hidden weights have moved all along.")
    has_surplus = m.surplus != Constant(0.0)
    check(
        "early_stop",
        m.early_stop is None or (m.allocate is None and m.ramp == Constant(1.0) and not has_surplus),
        "None, as the number of active units moves",
        "Use ramp=Constant(1.0), no surplus and no allocator.",
    )
    check("surplus", m.allocate is None or not has_surplus, "none, with an allocator", "Use one of the two.")
    check(
        "init",
        not isinstance(m.init, AtInit | InTurn) or (m.ramp == Constant(1.0) and not has_surplus),
        "a criterion, as the first masks are not those of the target density",
        "Use ramp=Constant(1.0) and no surplus.",
    )

"""A method of sparse training is a value: what drops, what grows, at which granularity, how much and when.

A variant is ``dataclasses.replace(RIGL, interval=500)``; a method of your own is a ``Method``. There is no
class per method and nothing to register.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dstlib.errors import SettingError, explain, similar
from dstlib.masking import (
    Criterion,
    Distribution,
    Element,
    Granularity,
    GrownInit,
    Kernel,
    erk,
    magnitude,
    random,
    round_down,
    sign_balanced,
    uniform,
    uniform_fan_out,
    zeros,
)
from dstlib.masking.criteria import gradient
from dstlib.schedules import Clock, Constant, Cosine, Cubic, Curve, Every, Never


@dataclass(frozen=True, kw_only=True)
class Method:
    """How masks start and change.

    At each update the lowest-scoring share ``drop_fraction(progress)`` of the active units, by ``drop``, is
    dropped, and the highest by ``grow`` fill the target up. The target density of a weight moves from dense
    (``ramp`` = 0) to its final value (``ramp`` = 1). ``interval`` counts optimizer steps between updates;
    None means that the topology never changes. ``stop`` is the share of the run after which it is fixed.
    ``init`` chooses the first mask; ``grown_init`` gives grown weights their values.

    Errors: SettingError for a part that is not of its kind, or out of range.

    >>> from dataclasses import replace
    >>> long = replace(RIGL, name="itop", interval=1500, drop_fraction=Constant(0.5), stop=1.0)
    >>> long.clock(total_steps=4000).due(3000), long.density(0.1, progress=0.5)
    (True, 0.1)
    """

    name: str
    reference: str
    drop: Criterion = magnitude
    grow: Criterion = random
    granularity: Granularity = Element()
    distribution: Distribution = erk
    drop_fraction: Curve = Cosine(0.3)
    ramp: Curve = Constant(1.0)
    interval: int | None = 100
    stop: float = 0.75
    init: Criterion = random
    grown_init: GrownInit = zeros

    def __post_init__(self) -> None:
        functions = ("drop", "grow", "distribution", "drop_fraction", "ramp", "init", "grown_init")
        folds = isinstance(self.granularity, Granularity) and not isinstance(self.granularity, type)
        is_interval = self.interval is None or (type(self.interval) is int and self.interval >= 1)
        checks = [
            *(
                (f, callable(getattr(self, f)), "a function", "dstlib.masking has some, as has .schedules.")
                for f in functions
            ),
            ("granularity", folds, "a value that folds and unfolds", "Pass dstlib.Element(), say."),
            ("interval", is_interval, "a whole number of steps from 1 up, or None", "None fixes the topology."),
            (
                "stop",
                0 < self.stop <= 1,
                "a share of the run in (0, 1]",
                "Pass 0.75; interval=None fixes the topology.",
            ),
        ]
        for name, holds, allowed, remedy in checks:
            if not holds:
                given = repr(getattr(self, name))
                raise SettingError(explain(name, f"method {self.name}", allowed=allowed, given=given, remedy=remedy))

    def clock(self, total_steps: int | None) -> Clock:
        """When this method updates in a run of ``total_steps`` optimizer steps (None: of unknown length)."""
        if self.interval is None:
            return Never()
        stop = None if total_steps is None else round_down(self.stop * total_steps)
        return Every(interval=self.interval, stop=stop)

    def density(self, target: float, progress: float) -> float:
        """The density of a weight on its way from dense to ``target``."""
        way = self.ramp(progress)
        if not 0 <= way <= 1:
            remedy = "0 is dense, 1 the target density."
            raise SettingError(
                explain("ramp", f"method {self.name}", allowed="values in [0, 1]", given=way, remedy=remedy)
            )
        return (1 - way) + way * target


STATIC = Method(
    name="static",
    reference="A random mask that never changes; the baseline of every paper on the subject.",
    interval=None,
)

SET = Method(
    name="set",
    reference="Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse "
    "connectivity, Nature Communications. Deviates: updates each 100 steps, not each epoch, until 75 % of "
    "the run, and ERK where the paper has ER on linear layers.",
    drop=sign_balanced,
    drop_fraction=Constant(0.3),
    grown_init=uniform_fan_out,
)

RIGL = Method(
    name="rigl",
    reference="Evci et al. 2020, Rigging the lottery: making all tickets winners, ICML, Algorithm 1. "
    "Deviates: the optimizer step at an update proceeds, with the new mask.",
    grow=gradient,
)

GMP = Method(
    name="gmp",
    reference="Zhu & Gupta 2017, To prune, or not to prune, arXiv:1710.01878, equation 1. Starts dense.",
    grow=magnitude,  # never asked: the target only shrinks and nothing is dropped beyond it
    distribution=uniform,
    drop_fraction=Constant(0.0),
    ramp=Cubic(0.0, 1.0),
)

DSFF = Method(
    name="dsff",
    reference="Wu et al. 2024, E2ENet: dynamic sparse feature fusion, NeurIPS, arXiv:2312.04727. Deviates: "
    "drops floor(f·A) kernels where the published code rounds up.",
    granularity=Kernel(),
    distribution=uniform,
    drop_fraction=Cosine(0.5, end=0.001),
    interval=1200,
    stop=1.0,
)

METHODS: Mapping[str, Method] = MappingProxyType({m.name: m for m in (STATIC, SET, RIGL, GMP, DSFF)})


def find_method(method: str | Method) -> Method:
    """The method of that name; a Method is its own answer.

    >>> find_method("rigl").interval
    100
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise SettingError(
            explain(
                "method",
                "sparsify()",
                allowed=f"one of {', '.join(METHODS)}, or a dstlib.Method",
                given=repr(method),
                remedy=f"Similar: {similar(str(method), METHODS)}.",
            )
        )
    return METHODS[method]

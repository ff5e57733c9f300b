"""What a method keeps of all weights, active or not, in one dense tensor each: gathered gradients, hidden values."""

from collections.abc import Callable
from dataclasses import dataclass

from dstlib.errors import require
from dstlib.masking.criteria import plain_gradient
from dstlib.masking.site import Criterion
from dstlib.schedules import Constant


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Gathered gradients: ``trace ← decay · trace + of(site)``, at each step or the last ``steps`` before an update.

    With ``steps``, a trace begins anew after each update: ``Trace(steps=8)`` orders like the mean gradient of
    eight steps. Without, it is never cleared, and goes on until the last update: ``Trace(decay=0.9)`` is a
    momentum that inactive weights have too, which the optimizer's, masked as it is, cannot be. Costs one tensor
    of the weight's size, and reads the dense gradient at every step it gathers.

    Raises:
        SettingError: The decay lies outside [0, 1], or there is less than one step.
    """

    of: Criterion = plain_gradient
    decay: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        remedy = "1 adds up; 0.9 forgets by a tenth a step."
        require(0 <= self.decay <= 1, "decay", "Trace", allowed="a number in [0, 1]", given=self.decay, remedy=remedy)
        fits, remedy = self.steps is None or self.steps >= 1, "None gathers at every step."
        require(fits, "steps", "Trace", allowed="1 or more", given=self.steps, remedy=remedy)


@dataclass(frozen=True)
class OverDensity:
    """A pull of ``strength`` / density.

    >>> OverDensity(1e-4)(0.1)
    0.001
    """

    strength: float

    def __call__(self, density: float) -> float:
        return self.strength / density


@dataclass(frozen=True, kw_only=True)
class DenseStorage:
    """Weights that live on under the mask: which of them learn, and how they are pulled towards zero.

    By default the weights outside a mask are zero, and that is all there is. Under dense storage the model still
    computes with zeros there, but the values are kept aside, come back for the optimizer's step, and are hidden
    again after it: the model's forward, its state-dict keys and its type stay what they were.

    ``extra`` is the density of further units, beyond the active ones, that receive gradients; None: all of
    them do (a straight-through gradient). ``decay`` maps the density of a weight to the strength of the pull:
    its product with the weight is added to the gradient of what learns without being active. ``soft`` shows the active
    weights less than they are, by the largest hidden one of their group, times a number that is fixed at the start: so
    the model does not jump where two weights change places.

    Raises:
        SettingError: ``extra`` lies outside (0, 1], or ``soft`` is neither True nor False.
    """

    extra: float | None = None
    decay: Callable[[float], float] = Constant(0.0)
    soft: bool = False

    def __post_init__(self) -> None:
        require(
            self.extra is None or 0 < self.extra <= 1,
            "extra",
            "DenseStorage",
            allowed="a density in (0, 1]",
            given=self.extra,
            remedy="None lets all weights learn; without dense storage none outside the mask do.",
        )
        is_bool = type(self.soft) is bool
        remedy = "True is the soft threshold of S-STE."
        require(is_bool, "soft", "DenseStorage", allowed="True or False", given=repr(self.soft), remedy=remedy)

"""Dense storage: weights that live on under the mask, for methods whose inactive weights go on learning.

By default the weights outside a mask are zero, and that is all there is. Under dense storage the model still
computes with zeros there, but the values are kept aside, come back for the optimizer's step, and are hidden
again after it: the model's forward, its state-dict keys and its type stay what they were.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dstlib.errors import SettingError
from dstlib.schedules import Constant


@dataclass(frozen=True)
class OverDensity:
    """``strength`` / density.

    >>> OverDensity(1e-4)(0.1)
    0.001
    """

    strength: float

    def __call__(self, density: float) -> float:
        return self.strength / density


@dataclass(frozen=True, kw_only=True)
class DenseStorage:
    """Which hidden weights learn, and how they are pulled towards zero.

    ``extra`` is the density of further units, beyond the active ones, that receive gradients; None: all of
    them do (a straight-through gradient). ``decay`` maps the density of a weight to the strength of the pull:
    its product with the weight is added to the gradient of what learns without being active.

    Errors: SettingError for an ``extra`` outside (0, 1].
    """

    extra: float | None = None
    decay: Callable[[float], float] = Constant(0.0)

    def __post_init__(self) -> None:
        if self.extra is not None and not 0 < self.extra <= 1:
            remedy = "None lets all weights learn; without dense storage none outside the mask do."
            raise SettingError.of(
                "extra", "DenseStorage", allowed="a density in (0, 1]", given=self.extra, remedy=remedy
            )

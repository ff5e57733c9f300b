"""What a criterion may want to know of the steps between updates, gathered in one dense tensor per weight."""

from dataclasses import dataclass

from dstlib.errors import SettingError
from dstlib.masking.criteria import plain_gradient
from dstlib.masking.site import Criterion


@dataclass(frozen=True, kw_only=True)
class Trace:
    """``trace ← decay · trace + of(site)``, at each step or at the last ``steps`` before an update.

    With ``steps``, a trace begins anew after each update: ``Trace(steps=8)`` ranks like the mean gradient of
    eight steps. Without, it is never cleared, and goes on until the last update: ``Trace(decay=0.9)`` is a
    momentum that inactive weights have too, which the optimizer's, masked as it is, cannot be. Costs one tensor
    of the weight's size, and reads the dense gradient at every step it gathers.

    Errors: SettingError for a decay outside [0, 1] or fewer than one step.
    """

    of: Criterion = plain_gradient
    decay: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            remedy = "1 adds up; 0.9 forgets by a tenth a step."
            raise SettingError.of("decay", "Trace", allowed="a number in [0, 1]", given=self.decay, remedy=remedy)
        if self.steps is not None and self.steps < 1:
            remedy = "None gathers at every step."
            raise SettingError.of("steps", "Trace", allowed="1 or more", given=self.steps, remedy=remedy)

"""Clocks: whether an update is due at an optimizer step, and how far along the run is."""

from dataclasses import dataclass

from dstlib.errors import require


@dataclass(frozen=True, kw_only=True)
class Every:
    """Mask updates after each ``interval`` optimizer steps, later than ``start`` and no later than ``stop``.

    Steps count from 1. ``stop`` is T_end of the literature, the end of the time in which masks change; it need not be
    a whole number, nor a step with an update. What fades, such as a share to drop, is measured against it, by
    ``progress``, as papers do: so a lone update still exchanges something. What has to arrive, such as a density, is
    measured against ``last``, the last update, by ``approach``. Without a ``stop`` the updates never end, and both
    stay 0, since an end is what they would be measured against.

    Raises:
        SettingError: The interval is less than 1.

    >>> clock = Every(interval=100, stop=250)
    >>> [step for step in range(1, 400) if clock.due(step)], clock.progress(200), clock.approach(200)
    ([100, 200], 0.8, 1.0)
    """

    interval: int
    start: int = 0
    stop: float | None = None

    def __post_init__(self) -> None:
        allowed = "a whole number of optimizer steps, at least 1"
        remedy = "Pass 100, say, or None for a fixed topology."
        require(self.interval >= 1, "interval", "the mask updates", allowed=allowed, given=self.interval, remedy=remedy)

    @property
    def last(self) -> int | None:
        """The last step with an update; ``start`` where there is none at all; None where they never end."""
        if self.stop is None:
            return None
        return self.start + int(max(self.stop - self.start, 0) // self.interval) * self.interval

    def latest(self, step: int) -> int:
        """Returns the last step with an update up to this one, itself included; 0 if there is none."""
        until = step if self.last is None else min(step, self.last)
        elapsed = until - self.start
        return until - elapsed % self.interval if elapsed >= self.interval else 0

    def due(self, step: int) -> bool:
        """Whether the masks change at this step."""
        return 0 < step == self.latest(step)

    def progress(self, step: int) -> float:
        """Computes the share of the way from ``start`` to ``stop``, in [0, 1]."""
        return self._share(step, self.stop)

    def approach(self, step: int) -> float:
        """Computes the share of the way from ``start`` to the last update, in [0, 1]; 1 from there on."""
        return self._share(step, self.last)

    def _share(self, step: int, end: float | None) -> float:
        if end is None:
            return 0.0
        if end <= self.start:
            return 1.0 if step > self.start else 0.0
        return min(max((step - self.start) / (end - self.start), 0.0), 1.0)


@dataclass(frozen=True)
class Never:
    """No mask update ever: a fixed topology.

    >>> Never().due(100)
    False
    """

    def latest(self, step: int) -> int:
        """Returns 0: there is none."""
        return 0

    def due(self, step: int) -> bool:
        """Returns False: the masks never change."""
        return False

    def progress(self, step: int) -> float:
        """Returns 1: nothing fades from the first step on."""
        return 1.0

    def approach(self, step: int) -> float:
        """Returns 1: the target density holds from the first step on."""
        return 1.0


Clock = Every | Never

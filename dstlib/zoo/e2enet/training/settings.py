"""How a network of the E2ENet recipes is trained, as one value."""

import math
from dataclasses import dataclass, replace

from dstlib.errors import SettingError, explain, similar
from dstlib.methods import DSFF, METHODS, Method


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a network is trained; the defaults are the paper's, but for its 1000 epochs × 250 iterations.

    The learning rate falls by epoch as (1 - epoch / epochs) ^ ``poly_exponent``. ``sparsity`` is the share of
    the fusion's connections that stay off, 0 for a dense network; ``interval`` counts the iterations between
    mask updates of the methods that have any.

    Raises:
        SettingError: A setting is out of range.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Section 4 and the published code.
    """

    epochs: int = 20
    iterations: int = 50
    learning_rate: float = 0.01
    momentum: float = 0.99
    weight_decay: float = 3e-5
    clip: float = 12.0
    poly_exponent: float = 0.9
    sparsity: float = 0.8
    method: str = "dsff"
    interval: int = 1200
    seed: int = 0

    def __post_init__(self) -> None:
        count, share = "a whole number from 1 up", "a number in [0, 1)"
        floats = ("learning_rate", "momentum", "weight_decay", "clip", "poly_exponent", "sparsity")
        checks: list[tuple[str, bool, str, str]] = [
            *((f, math.isfinite(getattr(self, f)), "a finite number", "For no clipping pass 1e9.") for f in floats),
            ("poly_exponent", self.poly_exponent >= 0, "a number from 0 up", "The paper's is 0.9."),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 up to 2^63", "Pass 0, say."),
            ("epochs", self.epochs >= 1, count, "Pass 20, say."),
            (
                "iterations",
                self.iterations >= 1,
                count,
                "An epoch is this many optimizer steps; pass 50, say.",
            ),
            ("learning_rate", self.learning_rate > 0, "a number above 0", "The paper's is 0.01."),
            ("momentum", 0 < self.momentum < 1, "a number in (0, 1)", "The paper's is 0.99."),
            ("weight_decay", self.weight_decay >= 0, "a number from 0 up", "The paper's is 3e-5."),
            ("clip", self.clip > 0, "a gradient norm above 0", "The paper's is 12."),
            (
                "sparsity",
                0 <= self.sparsity < 1,
                share,
                "Pass 0.8 to keep a fifth, or 0 for a dense network.",
            ),
            (
                "method",
                self.method in METHODS,
                f"one of {', '.join(METHODS)}",
                f"Similar: {similar(self.method, METHODS)}.",
            ),
            ("interval", self.interval >= 1, count, "The paper's is 1200, of 250,000 iterations."),
        ]
        for name, holds, allowed, remedy in checks:
            if not holds:
                given = getattr(self, name)
                raise SettingError(explain(name, "TrainSettings", allowed=allowed, given=given, remedy=remedy))

    @property
    def num_iterations(self) -> int:
        """Of the whole training."""
        return self.epochs * self.iterations

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate during an epoch, counted from 0.

        >>> TrainSettings(epochs=4).learning_rate_at(0)
        0.01
        """
        return self.learning_rate * (1 - epoch / self.epochs) ** self.poly_exponent


def kernel_method(name: str, interval: int) -> Method:
    """A method as the recipes compare it: on whole kernels at one density, as DSFF, whatever its paper did.

    Two runs that differ in the method then differ in its rule alone.

    >>> kernel_method("static", 50).interval, kernel_method("rigl", 50).interval
    (None, 50)
    >>> kernel_method("rigl", 50).granularity
    Kernel()
    """
    method = METHODS[name]
    return replace(
        method,
        granularity=DSFF.granularity,
        distribution=DSFF.distribution,
        interval=None if method.interval is None else interval,
    )

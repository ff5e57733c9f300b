"""How a network of the E2ENet recipes is trained, as a value, and the names of what may be chosen.

Nothing here needs torch: command lines are parsed by it.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dstlib.errors import require, similar
from dstlib.names import METHOD_NAMES

Precision = Literal["float32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
OPTIMIZERS = ("sgd", "adamw")
SPARSE_MODELS = ("e2enet", "e2enet_plus")
"""The models that are trained sparse unless asked otherwise; of any other, that is as the command line says."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a network is trained; the defaults are the paper's, but for its 1000 epochs × 250 iterations.

    ``optimizer`` is the paper's SGD with Nesterov ``momentum``, or AdamW, which has its own momenta and finds small
    structures in hundreds of iterations where SGD takes thousands. The learning rate falls by epoch as
    (1 - epoch / epochs) ^ ``poly_exponent``. ``sparsity`` is the share of the fusion's connections that stay off, 0 for
    a dense network; ``interval`` counts the iterations between mask updates of the methods that have any. Connections
    are on or off by blocks of ``block`` × ``block`` channels: single ones, as in the paper, or blocks of 16, with which
    a GPU computes less. After each epoch the Dice of ``val_iterations`` batches of the held-out cases is taken, always
    the same ones; 0 for none.

    Raises:
        SettingError: A setting is out of range.

    Reference: Wu et al., *E2ENet* (NeurIPS 2024), Section 4 and the published code.
    """

    epochs: int = 20
    iterations: int = 50
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    momentum: float = 0.99
    weight_decay: float = 3e-5
    clip: float = 12.0
    poly_exponent: float = 0.9
    sparsity: float = 0.8
    method: str = "dsff"
    interval: int = 1200
    block: int = 1
    val_iterations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        count = "a whole number from 1 up"
        floats = ("learning_rate", "momentum", "weight_decay", "clip", "poly_exponent", "sparsity")
        alike = f"Similar: {similar(self.method, METHOD_NAMES)}."
        checks = [
            *((f, math.isfinite(getattr(self, f)), "a finite number", "For no clipping pass 1e9.") for f in floats),
            ("epochs", self.epochs >= 1, count, "Pass 20, say."),
            ("iterations", self.iterations >= 1, count, "An epoch is this many optimizer steps; pass 50, say."),
            ("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS), "The paper's is sgd."),
            ("learning_rate", self.learning_rate > 0, "a number above 0", "The paper's is 0.01."),
            ("momentum", 0 < self.momentum < 1, "a number in (0, 1)", "The paper's is 0.99."),
            ("weight_decay", self.weight_decay >= 0, "a number from 0 up", "The paper's is 3e-5."),
            ("clip", self.clip > 0, "a gradient norm above 0", "The paper's is 12."),
            ("poly_exponent", self.poly_exponent >= 0, "a number from 0 up", "The paper's is 0.9."),
            ("sparsity", 0 <= self.sparsity < 1, "a number in [0, 1)", "Pass 0.8 to keep a fifth, 0 for dense."),
            ("method", self.method in METHOD_NAMES, f"one of {', '.join(METHOD_NAMES)}", alike),
            ("interval", self.interval >= 1, count, "The paper's is 1200, of 250,000 iterations."),
            ("block", self.block >= 1, count, "The paper's is 1; 16 suits a GPU."),
            ("val_iterations", self.val_iterations >= 0, "a whole number from 0 up", "Pass 0 for no validation."),
            ("seed", 0 <= self.seed < 2**63, "a whole number from 0 up to 2^63", "Pass 0, say."),
        ]
        for name, holds, allowed, remedy in checks:
            require(holds, name, "TrainSettings", allowed=allowed, given=getattr(self, name), remedy=remedy)

    @property
    def num_iterations(self) -> int:
        """The optimizer steps of the whole training."""
        return self.epochs * self.iterations

    def learning_rate_at(self, epoch: int) -> float:
        """Returns the learning rate during an epoch, counted from 0.

        >>> TrainSettings(epochs=4).learning_rate_at(0)
        0.01
        """
        return self.learning_rate * (1 - epoch / self.epochs) ** self.poly_exponent

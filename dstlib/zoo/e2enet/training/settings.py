"""How a network of the E2ENet recipes is trained, and on what hardware, as two values."""

import math
import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from dstlib.errors import SettingError, require, similar
from dstlib.masking.granularity import Block
from dstlib.methods import DSFF, METHODS
from dstlib.methods.method import Method

Precision = Literal["float32", "bf16", "fp16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
OPTIMIZERS = ("sgd", "adamw")


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
        alike = f"Similar: {similar(self.method, METHODS)}."
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
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}", alike),
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


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how a training is computed: it changes the seconds, and the result by rounding alone.

    - ``precision``: of the forward pass; ``fp16`` scales the loss, as the paper's training does.
    - ``channels_last``: lays features out as (D, H, W, C), which GPUs like.
    - ``compile``: through torch.compile.
    - ``engine``: through :func:`dstlib.accelerate`, for float32 on a CPU, or half precision on a GPU.
    - ``workers``: processes that draw the batches ahead; 0 draws them in between.

    Raises:
        SettingError: A setting cannot be used here.

    >>> Execution(device="cpu", precision="bf16").autocast_dtype
    torch.bfloat16
    """

    device: str = "cpu"
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    engine: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        where, allowed, given = "Execution", " or ".join(PRECISIONS), self.precision
        require(given in PRECISIONS, "precision", where, allowed=allowed, given=given, remedy="Pass float32 on a CPU.")
        fits = (given != "float32") == self.device.startswith("cuda") and not (self.channels_last or self.compile)
        allowed = "float32 on a CPU, half precision on a GPU, nothing else"
        remedy = "Leave --engine out, or else --precision, --channels-last and --compile."
        require(fits or not self.engine, "engine", where, allowed=allowed, given=self.engine, remedy=remedy)
        allowed, remedy = "a whole number from 0 up", "0 draws the batches in the training's own process."
        require(self.workers >= 0, "workers", where, allowed=allowed, given=self.workers, remedy=remedy)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:  # no such device; none that this build of torch knows
            allowed, reason = "one that torch can use", str(error).splitlines()[0].split(". ")[0]
            remedy = "Leave --device out, or pass cpu or cuda."
            raise SettingError.of("device", where, allowed=allowed, given=reason, remedy=remedy) from error

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type that the forward pass is rounded to; None for none."""
        return {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]


def chosen_device(given: str | None) -> str:
    """Returns the device that was given, else a GPU, if there is one.

    Of "cuda", each process that torchrun has started takes the GPU of its own number.

    >>> chosen_device("cuda:1")
    'cuda:1'
    """
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def usual_precision(device: str) -> Precision:
    """Returns the precision of a device, if none was asked for.

    >>> usual_precision("cuda:1"), usual_precision("cpu")
    ('fp16', 'float32')
    """
    return "fp16" if device.startswith("cuda") else "float32"


def kernel_method(name: str, interval: int, block: int = 1) -> Method:
    """Returns a method as the recipes compare it: on whole kernels at one density, as DSFF, whatever its paper did.

    With ``block`` above 1, on blocks of so many output and input channels.

    Two runs that differ in the method then differ in its rule alone.

    >>> kernel_method("static", 50).interval, kernel_method("rigl", 50).interval
    (None, 50)
    >>> kernel_method("rigl", 50).granularity
    Kernel()
    """
    method, granularity = METHODS[name], DSFF.granularity if block == 1 else Block(block, block)
    every = None if method.interval is None else interval
    return replace(method, granularity=granularity, distribution=DSFF.distribution, interval=every)

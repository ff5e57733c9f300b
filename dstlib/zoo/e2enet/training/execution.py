"""Where and how a training is computed, as a value."""

import os
from dataclasses import dataclass

import torch

from dstlib.errors import SettingError, require
from dstlib.zoo.e2enet.training.settings import PRECISIONS, Precision


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how a training is computed: it changes the seconds, and the result by rounding alone.

    - ``precision``: of the forward pass; ``fp16`` scales the loss, as the paper's training does.
    - ``channels_last``: lays features out as (D, H, W, C), which GPUs like.
    - ``compile``: through torch.compile.
    - ``engine``: through :func:`dstlib.accelerate`, for float32 on a CPU, or half precision on a GPU.
    - ``recompute``: keeps less for the gradients and computes it once more, as ``E2ENet.recompute`` has it.
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
    recompute: bool = False
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


def usual_workers() -> int:
    """Returns how many processes draw the batches, if that is not said: where a GPU computes, cores are free to."""
    return 8 if torch.cuda.is_available() else 0


def usual_precision(device: str) -> Precision:
    """Returns the precision of a device, if none was asked for.

    >>> usual_precision("cuda:1"), usual_precision("cpu")
    ('fp16', 'float32')
    """
    return "fp16" if device.startswith("cuda") else "float32"

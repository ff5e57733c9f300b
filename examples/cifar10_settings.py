"""The settings of one training on CIFAR-10, for examples/cifar10.py and benchmarks/cifar10.py; torch is not needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from dstlib.errors import require
from dstlib.names import METHOD_NAMES

UPDATES = 60  # mask updates that a short run would have, if they went on to its end
# methods of dstlib with other starts of grown weights, to be told apart under AdamW
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {"rigl-cold": ("rigl", {"grown_state": "birth"}), "rigl-warm": ("rigl", {"grown_warmup": 10})}
)
CHOICES: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "model": ("small", "wrn-16-1", "wrn-22-2", "vit"),
        "method": ("dense", *METHOD_NAMES, *VARIANTS),
        "distribution": (None, "erk", "uniform"),
        "optimizer": ("sgd", "adamw"),
        "schedule": ("cosine", "step"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides what a run learns. ``sparsity`` does not count where the method is dense.

    Raises:
        SettingError: A setting is out of range.
    """

    model: str = "small"
    method: str = "rigl"
    sparsity: float = 0.9
    distribution: str | None = None
    interval: int | None = None
    epochs: int = 3
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    crop: int = 0
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("interval", "epochs", "batch_size", "images")
        checks = [(name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more") for name in counts]
        checks += [
            (name, getattr(self, name) in known, f"one of {', '.join(map(str, known))}")
            for name, known in CHOICES.items()
        ]
        checks += [
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "a number from 0 up"),
            ("warmup", 0 <= self.warmup < 1, "a share of the run in [0, 1)"),
            ("crop", 0 <= self.crop <= 8, "pixels from 0 to 8"),
            ("sparsity", 0 <= self.sparsity < 1, "a share in [0, 1)"),
        ]
        for name, holds, allowed in checks:
            require(holds, name, "the run", allowed=allowed, given=repr(getattr(self, name)), remedy="See --help.")


PRESETS: Mapping[str, Settings] = MappingProxyType(
    {
        "quick": Settings(),
        "published": Settings(
            model="wrn-22-2", epochs=250, batch_size=128, learning_rate=0.1, schedule="step", warmup=0.0, crop=4
        ),
        "vit": Settings(model="vit", optimizer="adamw", learning_rate=1e-3, weight_decay=0.05),
    }
)

# learning rate and weight decay of the small network, the best of a few on the dense one and chosen for no method
CHOSEN: Mapping[str, tuple[float, float]] = MappingProxyType({"sgd": (0.05, 5e-4), "adamw": (4e-3, 0.2)})


def with_optimizer(settings: Settings, optimizer: str) -> Settings:
    """Returns the settings with an optimizer; with another than theirs, its learning rate and weight decay, too.

    >>> with_optimizer(PRESETS["quick"], "adamw").weight_decay, with_optimizer(PRESETS["vit"], "adamw").learning_rate
    (0.2, 0.001)
    """
    if optimizer == settings.optimizer:
        return settings
    learning_rate, weight_decay = CHOSEN[optimizer]
    return replace(settings, optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay)

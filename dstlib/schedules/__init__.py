"""When and how much: curves over progress, and the clock. Knows no tensor."""

from dstlib.schedules.clock import Clock, Every, Never
from dstlib.schedules.curves import (
    Alternating,
    Constant,
    Cosine,
    Cubic,
    Curve,
    Cycles,
    InversePower,
    Linear,
    Sigmoid,
    Stages,
)

__all__ = [
    "Alternating",
    "Clock",
    "Constant",
    "Cosine",
    "Cubic",
    "Curve",
    "Cycles",
    "Every",
    "InversePower",
    "Linear",
    "Never",
    "Sigmoid",
    "Stages",
]

"""How large the networks of a comparison are, and for how long they train, as options of a recipe's command line."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Scale = Literal["tiny", "quick", "paper"]
SCALES: Mapping[Scale, tuple[str, ...]] = MappingProxyType(
    {
        "tiny": ("--preset", "demo", "--scans", "5", "--epochs", "2", "--iterations", "6"),
        "quick": ("--preset", "quick"),
        "paper": ("--preset", "paper"),
    }
)
"""The options of a recipe's command line that make its scale; the second names the preset."""
TINY_WIDTH = 0.25  # of baselines: to see that all runs

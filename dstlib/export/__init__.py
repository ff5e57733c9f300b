"""What becomes of a sparse model elsewhere: compact files, plans, no dead channels, 2:4 layers. Runs no kernel."""

from dstlib.export.compact import load_compact, load_masks, save_compact
from dstlib.export.dead_channels import Removal, remove_dead_channels
from dstlib.export.plan import save_plan
from dstlib.export.semi_structured import to_semi_structured

__all__ = [
    "Removal",
    "load_compact",
    "load_masks",
    "remove_dead_channels",
    "save_compact",
    "save_plan",
    "to_semi_structured",
]

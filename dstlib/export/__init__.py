"""What becomes of a sparse model elsewhere: compact files, removal of dead channels, 2:4 layers. Runs no kernel."""

from dstlib.export.compact import load_compact, load_masks, save_compact
from dstlib.export.dead_channels import Removal, remove_dead_channels
from dstlib.export.semi_structured import to_semi_structured

__all__ = ["Removal", "load_compact", "load_masks", "remove_dead_channels", "save_compact", "to_semi_structured"]

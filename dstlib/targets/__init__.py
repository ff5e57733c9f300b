"""Which parameters can be sparse, which are asked for, and the matrices that each is seen as."""

from dstlib.targets.selection import Weight, check_matches, find_weights, plain_name, select, unwrap
from dstlib.targets.views import Slot

__all__ = ["Slot", "Weight", "check_matches", "find_weights", "plain_name", "select", "unwrap"]

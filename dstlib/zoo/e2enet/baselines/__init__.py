"""The networks that E2ENet is compared with, each under the manners of the zoo."""

from dstlib.zoo.e2enet.baselines.segmenter import Segmenter
from dstlib.zoo.e2enet.baselines.table import BASELINES, Baseline, Published, build_model, check_name

__all__ = ["BASELINES", "Baseline", "Published", "Segmenter", "build_model", "check_name"]

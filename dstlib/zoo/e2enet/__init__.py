"""E2ENet: an efficient 3D segmentation network whose feature fusion is trained sparse (DSFF)."""

from dstlib.zoo.e2enet.config import AMOS, BRATS, BTCV, E2ENetConfig
from dstlib.zoo.e2enet.network import E2ENet

__all__ = ["AMOS", "BRATS", "BTCV", "E2ENet", "E2ENetConfig"]

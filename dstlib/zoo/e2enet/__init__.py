"""E2ENet: an efficient 3D segmentation network whose feature fusion is trained sparse (DSFF)."""

from typing import TYPE_CHECKING, Any

from dstlib.zoo.e2enet.config import AMOS, BRATS, BTCV, E2ENetConfig

if TYPE_CHECKING:
    from dstlib.zoo.e2enet.network import E2ENet

__all__ = ["AMOS", "BRATS", "BTCV", "E2ENet", "E2ENetConfig"]


def __getattr__(name: str) -> Any:
    """Loads the network, and with it torch, when it is asked for."""
    if name == "E2ENet":
        from dstlib.zoo.e2enet.network import E2ENet

        return E2ENet
    raise AttributeError(f"module 'dstlib.zoo.e2enet' has no attribute {name!r}")

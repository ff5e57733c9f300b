"""E2ENet under the plans of nnU-Net v2: as many levels, as wide and with the strides that were planned."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dstlib.errors import require
from dstlib.integrations.nnunet_training import SparseTraining, Training
from dstlib.targets import unwrap
from dstlib.zoo.e2enet.config import E2ENetConfig
from dstlib.zoo.e2enet.network import E2ENet

_HEADS = 4  # the paper's


def planned_config(arch_kwargs: Mapping[str, Any], *, in_channels: int, num_classes: int) -> E2ENetConfig:
    """Plans an E2ENet: ``n_stages``, ``features_per_stage`` and ``strides`` are the plan's.

    The rest is the paper's: kernels of 1×3×3 after a shift along depth, two Units per level, and up to four
    heads. nnU-Net's own kernel sizes, blocks and dropout do not apply.

    Raises:
        SettingError: The plan is two-dimensional, strides its first stage, or has fewer than three stages.

    >>> plan = {"n_stages": 3, "features_per_stage": [32, 64, 128], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
    >>> planned_config(plan, in_channels=1, num_classes=3).heads
    2
    """
    stages, strides = arch_kwargs["n_stages"], [tuple(map(int, stride)) for stride in arch_kwargs["strides"]]
    are_deep, remedy = all(len(stride) == 3 for stride in strides), "E2ENet is three-dimensional: take 3d_fullres."
    require(are_deep, "strides", "the plan", allowed="three axes", given=strides, remedy=remedy)
    remedy = "The first level has the size of the image."
    require(set(strides[0]) == {1}, "strides[0]", "the plan", allowed="1 on each axis", given=strides[0], remedy=remedy)
    remedy = "Plan with a larger patch."
    require(stages >= 3, "n_stages", "the plan", allowed="3 or more", given=stages, remedy=remedy)
    return E2ENetConfig(
        in_channels=in_channels,
        num_classes=num_classes,
        channels=tuple(map(int, arch_kwargs["features_per_stage"])),
        strides=tuple((depth, height, width) for depth, height, width in strides[1:]),
        heads=min(_HEADS, stages - 1),
    )


class E2ENetTraining(Training):
    """Trains an E2ENet in the place of the planned U-Net; its heads are nnU-Net's finest deep-supervision scales.

    nnU-Net gives the coarsest output no weight, so four heads weigh 4/7, 2/7, 1/7 and 0, as in the paper's text.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Builds the network, for training and for prediction alike."""
        plan = configuration_manager.network_arch_init_kwargs
        network = E2ENet(planned_config(plan, in_channels=num_input_channels, num_classes=num_output_channels))
        network.deep_supervision = enable_deep_supervision
        return network

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        scales = super()._get_deep_supervision_scales()
        return None if scales is None else scales[:_HEADS]

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Decides whether the network gives the logits of all heads, or of the finest alone."""
        network = unwrap(self.network)
        assert isinstance(network, E2ENet)
        network.deep_supervision = enabled


class SparseE2ENetTraining(SparseTraining, E2ENetTraining):
    """Trains an E2ENet whose fusion is sparse, as in the paper."""

    include, exclude = E2ENet.FUSION, ()

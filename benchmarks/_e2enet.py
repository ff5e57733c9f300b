"""The networks and layers that the benchmarks of E2ENet measure: the paper's for AMOS, of random weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dstlib.zoo.e2enet import AMOS, E2ENet, E2ENetConfig
from dstlib.zoo.e2enet.baselines import build_model

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last_3d}  # where the channels lie in memory


@dataclass(frozen=True)
class Layer:
    """A fusion convolution."""

    level: int
    inputs: int
    outputs: int
    extent: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.inputs}→{self.outputs}, {'×'.join(map(str, self.extent))}"

    def mask(self, sparsity: float, *, unit: tuple[int, int] = (1, 1)) -> Tensor:
        """Connections (outputs, inputs), of which whole units of outputs × inputs are there or not, at random."""
        shape = (-(-self.outputs // unit[0]), -(-self.inputs // unit[1]))
        total = shape[0] * shape[1]
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=torch.Generator().manual_seed(0))[: round(total * (1 - sparsity))]] = True
        whole = mask.reshape(shape).repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)
        return whole[: self.outputs, : self.inputs]


def layers(size: int) -> list[Layer]:
    """The first convolution of each level's fusion node."""
    extent, found = (size, size, size), []
    for level, width in enumerate(AMOS.channels[:-1], 1):
        finer = AMOS.channels[level - 2] if level > 1 else 0
        found.append(Layer(level, 2 * width + finer, width, extent))
        depth, height, columns = (e // s for e, s in zip(extent, AMOS.strides[level - 1], strict=True))
        extent = (depth, height, columns)
    return found


def config(size: int) -> E2ENetConfig:
    """The paper's network for AMOS; at 32³ it halves no depth at first, lest the coarsest level be a single voxel."""
    first = (1, 2, 2) if size <= 32 else (2, 2, 2)
    return E2ENetConfig(strides=(first, *((2, 2, 2),) * 4))


def e2enet(size: int) -> E2ENet:
    """The same start each time."""
    torch.manual_seed(0)
    return E2ENet(config(size))


def nnunet(size: int) -> nn.Module:
    """The plain U-Net of nnU-Net, of the same strides."""
    torch.manual_seed(0)
    return build_model("nnunet", in_channels=1, num_classes=15, patch_size=(size,) * 3, config=config(size))


def supervise(model: nn.Module, on: bool) -> nn.Module:
    """The model itself, with all heads or with the finest alone."""
    model.deep_supervision = on  # type: ignore[assignment]
    if not isinstance(model, E2ENet):  # nnU-Net leaves out coarser heads by itself
        model.host.decoder.deep_supervision = on  # type: ignore[union-attr]
        model.read = (lambda logits: tuple(logits)) if on else (lambda logits: (logits,))  # type: ignore[assignment]
    return model


def in_format(model: nn.Module, x: Tensor, name: str) -> tuple[nn.Module, Tensor]:
    """A model, itself changed, and its input with the channels first or last in memory."""
    return model.to(memory_format=FORMATS[name]), x.to(memory_format=FORMATS[name])

"""Masks of replicas: they agree by construction, and this checks that they do."""

import zlib
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from dstlib.errors import StateError


def check_equal_masks(masks: Mapping[str, Tensor], step: int) -> None:
    """Checks that all ranks hold the same masks; does nothing with one process.

    Collective: all ranks of the default process group must call it.

    Raises:
        StateError: Masks differ, on every rank: gradients were not reduced before the optimizer step, or ranks were
            given other seeds or weights.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    mine = {name: zlib.crc32(mask.cpu().contiguous().numpy().tobytes()) for name, mask in masks.items()}
    ranks: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, mine)
    differing = [name for name in mine if any(rank.get(name) != mine[name] for rank in ranks)]
    if differing or any(set(rank) != set(mine) for rank in ranks):
        raise StateError(
            f"masks of {', '.join(differing) or 'some weights'} at step {step}: expected the same on all "
            f"{len(ranks)} ranks, got different ones. Give every rank the same seed, weights and reduced "
            "gradients (DistributedDataParallel does the last two)."
        )

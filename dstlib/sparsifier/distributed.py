"""Masks of replicas: they agree by construction, and this checks that they do."""

import zlib
from collections.abc import Sequence

import torch.distributed as dist

from dstlib.errors import StateError
from dstlib.sparsifier.state import MaskedWeight


def check_equal_masks(changed: Sequence[MaskedWeight]) -> None:
    """Checks that all ranks hold the same masks of these weights; does nothing without any, or with one process.

    Collective: all ranks of the default process group must call it.

    Raises:
        StateError: Masks differ, on every rank: gradients were not reduced before the optimizer step, or ranks were
            given other seeds or weights.
    """
    if not (changed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    mine = {m.weight.name: zlib.crc32(m.mask.cpu().contiguous().numpy().tobytes()) for m in changed}
    ranks: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, mine)
    differing = [name for name in mine if any(rank.get(name) != mine[name] for rank in ranks)]
    if differing or any(set(rank) != set(mine) for rank in ranks):
        step = max(m.step for m in changed) + 1
        raise StateError.of(
            "masks",
            f"{', '.join(differing) or 'some weights'} at step {step}",
            allowed=f"the same on all {len(ranks)} ranks",
            given="different ones",
            remedy="Give every rank the same seed, weights and reduced gradients (DistributedDataParallel does the "
            "last two).",
        )

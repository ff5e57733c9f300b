"""Optimal Brain Surgeon, column by column: the error of each weight that goes is made up for by those behind it.

Shapes: O outputs, I inputs, *K kernel taps, N = I·K columns of weights, B of them in a block; P parts of the outputs
that read inputs of their own, R rows in each (one part, but for grouped convolutions); G groups, U units per group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dstlib.errors import ScoreError, SettingError
from dstlib.masking.granularity import Granularity, folded_shape
from dstlib.masking.in_turn import best_units


def prune_by_surgeon(
    weight: Tensor, moments: Tensor, granularity: Granularity, num_kept: int, *, damping: float, block_size: int
) -> tuple[Tensor, Tensor]:
    """Returns a mask with ``num_kept`` units in each group, and the weights within it as they make up for the others.

    ``moments`` (P, N, N) are those of the inputs, Σ x·xᵀ up to a factor: the Hessian of the output's squared error.
    ``damping`` times the mean of their diagonal is added to it. The mask is chosen in blocks of ``block_size`` columns,
    four at least, by w² / [H⁻¹]² of the weights as they are by then; of a group that goes through several blocks each
    keeps the same share, and groups of a few inputs (N:M) are blocks of their own. Blocks hold whole units: where these
    reach over all inputs, all are chosen at the start.

    Raises:
        ScoreError: The moments are not finite, or not positive definite.

    Reference: Frantar & Alistarh 2023, SparseGPT: massive language models can be accurately pruned in one-shot, ICML,
    Algorithm 1. Deviates: four blocks at least, as a mask that is chosen all at once does not follow the repair; each
    keeps a whole number of units, where the published code lets a threshold decide; and what is kept of inputs that are
    always zero keeps its value.
    """
    num_parts, num_columns = moments.shape[:2]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    w_PRN = weight.to(dtype).reshape(num_parts, -1, num_columns).clone()
    root_PNN, is_live_PN = _root_of_inverse(moments.to(dtype), damping)
    # over 0, infinite: a weight that is multiplied by nothing costs nothing
    scale_P1N = root_PNN.diagonal(dim1=1, dim2=2)[:, None] / is_live_PN[:, None]
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    num_taps = num_columns // weight.shape[1]
    least = max(min(block_size, num_columns // 4) // num_taps, 1)
    for channels, num_G in _blocks(granularity, weight.shape, num_kept, least):
        start, stop = channels.start * num_taps, channels.stop * num_taps
        cost_PRB = (w_PRN / scale_P1N)[..., start:stop].square()
        block = weight[:, channels].shape
        mask[:, channels] = best_units(cost_PRB.reshape(block), granularity, num_G.to(weight.device))
        goes_PRB = ~mask[:, channels].reshape(cost_PRB.shape)
        error_PRB = torch.zeros_like(cost_PRB)
        for j in range(start, stop):
            error_PR = w_PRN[..., j].masked_fill(~goes_PRB[..., j - start], 0.0) / root_PNN[:, j, j, None]
            w_PRN[..., j:stop] -= error_PR[..., None] * root_PNN[:, None, j, j:stop]
            error_PRB[..., j - start] = error_PR
        w_PRN[..., stop:] -= error_PRB @ root_PNN[:, start:stop, stop:]
    return mask, w_PRN.view(weight.shape).masked_fill(~mask, 0.0).to(weight.dtype)


def _root_of_inverse(moments_PNN: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Returns the upper triangular U with UᵀU = H⁻¹ of the damped moments H, and which inputs are ever not zero.

    Row j of U from the diagonal on is the first row of the inverse of H without the columns before j, over the square
    root of its first entry: all that is needed to clear column j.
    """
    h_PNN = moments_PNN.clone()
    diagonal_PN = h_PNN.diagonal(dim1=1, dim2=2)
    is_live_PN = diagonal_PN > 0
    mean_P1 = diagonal_PN.sum(dim=1, keepdim=True) / is_live_PN.sum(dim=1, keepdim=True).clamp(min=1)
    diagonal_PN += damping * mean_P1 + torch.where(is_live_PN, 0.0, mean_P1)
    lower_PNN, failed_P = torch.linalg.cholesky_ex(h_PNN)
    if bool(failed_P.any()) or not bool(lower_PNN.isfinite().all()):
        raise ScoreError.of(
            "second moments of the inputs",
            "SparseGPT at initialisation",
            allowed="finite ones, positive definite with the damping",
            given="others",
            remedy="Look for NaN and infinity in the activations; raise damping=, or pass more batches.",
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_PNN), upper=True), is_live_PN


def _blocks(granularity: Granularity, shape: torch.Size, num_kept: int, least: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields ranges of input channels that hold whole units, each with the units to keep in each of its groups."""
    num_groups, num_units, num_elements = folded_shape(granularity, shape)
    dtype = torch.int32 if shape.numel() < 2**31 else torch.int64
    ids_GU1 = torch.arange(num_groups * num_units, dtype=dtype).view(num_groups, num_units, 1)
    ids = granularity.unfold(ids_GU1.repeat(1, 1, num_elements), shape)
    size = _size_of_blocks(granularity, ids, num_units, least)
    num_seen_G, num_given_G = torch.zeros(2, num_groups, dtype=torch.long)
    for start in range(0, shape[1], size):
        channels = slice(start, min(start + size, shape[1]))
        ids_HU = granularity.fold(ids[:, channels])[..., 0]
        group_H = ids_HU[:, 0].long() // num_units
        num_seen_G[group_H] += ids_HU.shape[1]
        num_H = num_kept * num_seen_G[group_H] // num_units - num_given_G[group_H]
        num_given_G[group_H] += num_H
        yield channels, num_H


def _size_of_blocks(granularity: Granularity, ids: Tensor, num_units: int, least: int) -> int:
    """Returns the fewest input channels that hold whole groups, or else, from ``least`` on, whole units; or all."""
    num_in, num_elements = ids.shape[1], granularity.fold(ids).shape[-1]

    def holds(size: int, *, groups: bool) -> bool:
        for channels in {size, num_in % size or size}:  # of most sizes the shape alone tells
            try:
                shape = folded_shape(granularity, (len(ids), channels, *ids.shape[2:]))
            except SettingError:
                return False
            if shape[-1] != num_elements or (groups and shape[1] != num_units):
                return False
        folded = (granularity.fold(part) for part in ids.split(size, dim=1))
        return all(bool((x == x[..., :1]).all() and (x // num_units == x[:, :1] // num_units).all()) for x in folded)

    wholes = (size for size in range(1, min(least + 1, num_in)) if holds(size, groups=True))
    others = (size for size in range(least, num_in) if holds(size, groups=False))
    return next(wholes, 0) or next(others, num_in)

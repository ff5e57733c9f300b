"""From a prepared image to class probabilities: overlapping windows, mirrored, averaged over the folds.

Shapes: B windows, C channels, K classes with the background, D, H, W depth, height, width in voxels.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import combinations, product

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from dstlib.errors import DataError, require

NUM_WINDOWS = 2  # at a time, as many as the patches of a training batch, whose memory is known to suffice
SIGMA = 1 / 8  # of the Gaussian weights, in patches


@contextmanager
def predicting(model: nn.Module) -> Iterator[nn.Module]:
    """Puts a model into evaluation mode, with a single output, within the block; afterwards both are as they were.

    >>> model = nn.Identity()
    >>> model.deep_supervision = True
    >>> with predicting(model):
    ...     model.training, model.deep_supervision
    (False, False)
    >>> model.training, model.deep_supervision
    (True, True)
    """
    was_training, was_deep = model.training, model.deep_supervision
    model.eval()
    model.deep_supervision = False  # type: ignore[assignment]
    try:
        yield model
    finally:
        model.train(was_training)
        model.deep_supervision = was_deep


def probabilities(
    models: Sequence[nn.Module],
    image_CDHW: NDArray[np.float32],
    *,
    patch_size: Sequence[int],
    overlap: float = 0.5,
    mirror: Sequence[int] = (0, 1, 2),
) -> NDArray[np.float32]:
    """Averages the softmax (K, D, H, W) over models and mirrors, blended over windows of the training patch.

    ``mirror`` names the spatial axes (0 depth, 1 height, 2 width) that may be flipped: all their subsets are, eight
    for three axes, one for none. An image smaller than the patch is padded with zeros for the while. On a GPU that
    cannot hold the result the windows are gathered in the computer's memory instead, with a warning.

    Raises:
        SettingError: There is no model, or the patch, the overlap or the axes cannot be used.
        DataError: The image has another number of axes, or the result is not finite.

    Reference: the inference of nnU-Net's first version, which E2ENet uses: softmax before averaging, weights of
    σ = patch / 8, half a patch between windows. All folds see a window before the next one is read, so that one
    (K, D, H, W) volume is held instead of one per fold; the mean is the same.
    """
    _refuse_settings(models, patch_size=patch_size, overlap=overlap, mirror=mirror)
    if image_CDHW.ndim != 4:
        where, remedy = "a prediction", "Give an image of one channel a leading axis."
        raise DataError.of("image", where, allowed="(C, D, H, W)", given=image_CDHW.shape, remedy=remedy)
    image = torch.from_numpy(np.require(image_CDHW, requirements=["C", "W"]))[None]
    device = next(models[0].parameters()).device
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(predicting(model))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(device.type, enabled=device.type == "cuda"))
        blended = _blend(models, image, patch_size=patch_size, overlap=overlap, flips=_flips(mirror), device=device)
    result: NDArray[np.float32] = blended[0].cpu().numpy()
    if not math.isfinite(float(result.sum())):
        allowed, given = "finite numbers", "NaN or infinity"
        remedy = "Look for NaN in the image and in the weights; a network trained in float32 may overflow in float16."
        raise DataError.of("probabilities", "a prediction", allowed=allowed, given=given, remedy=remedy)
    return result


def _blend(
    models: Sequence[nn.Module],
    image_BCDHW: Tensor,
    *,
    patch_size: Sequence[int],
    overlap: float,
    flips: Sequence[tuple[int, ...]],
    device: torch.device,
) -> Tensor:
    """Blends the windows into (1, K, D, H, W) on the models' device, or on the CPU where it does not fit there."""

    def mean_softmax(window_BCDHW: Tensor) -> Tensor:
        total: Tensor | None = None
        for model, axes in product(models, flips):
            logits = model(window_BCDHW.flip(axes) if axes else window_BCDHW)
            softmax = logits.float().softmax(dim=1)
            softmax = softmax.flip(axes) if axes else softmax
            total = softmax if total is None else total.add_(softmax)
        assert total is not None
        return total.div_(len(models) * len(flips))

    def gather_on(where: torch.device) -> Tensor:
        gathered: Tensor = sliding_window_inference(
            image_BCDHW,
            roi_size=tuple(patch_size),
            sw_batch_size=NUM_WINDOWS,
            predictor=mean_softmax,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=SIGMA,
            sw_device=device,
            device=where,
        )
        return gathered

    try:
        return gather_on(device)
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    # Outside of the handler, whose traceback would keep the tensors of the failed attempt alive.
    torch.cuda.empty_cache()
    size = "×".join(map(str, image_BCDHW.shape[2:]))
    message = f"The prediction of {size} voxels does not fit on {device}; it is gathered in the computer's memory."
    warnings.warn(message, RuntimeWarning, stacklevel=3)
    return gather_on(torch.device("cpu"))


def _flips(mirror: Sequence[int]) -> list[tuple[int, ...]]:
    """Returns every subset of the axes, as axes of (B, C, D, H, W).

    >>> _flips((0, 2))
    [(), (2,), (4,), (2, 4)]
    """
    return [tuple(2 + axis for axis in axes) for n in range(len(mirror) + 1) for axes in combinations(mirror, n)]


def _refuse_settings(
    models: Sequence[nn.Module], *, patch_size: Sequence[int], overlap: float, mirror: Sequence[int]
) -> None:
    where, patch, axes = "a prediction", tuple(patch_size), tuple(mirror)
    remedy = "Pass a sequence of trained networks."
    require(len(models) > 0, "models", where, allowed="one per fold", given=len(models), remedy=remedy)
    is_patch, remedy = len(patch) == 3 and min(patch) > 0, "Pass the patch of the training."
    require(is_patch, "patch_size", where, allowed="three positive sizes", given=patch, remedy=remedy)
    remedy = "Pass 0.5 for steps of half a patch."
    require(0 <= overlap < 1, "overlap", where, allowed="a share in [0, 1)", given=overlap, remedy=remedy)
    are_axes = set(axes) <= {0, 1, 2} and len(set(axes)) == len(axes)
    allowed, remedy = "each of the axes 0, 1, 2 at most once", "Pass the axes that the training mirrored, () for none."
    require(are_axes, "mirror", where, allowed=allowed, given=axes, remedy=remedy)

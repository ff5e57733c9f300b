"""From a prepared image to class probabilities: overlapping windows, mirrored, averaged over the folds.

Shapes: B windows, C channels, K classes with the background, D, H, W depth, height, width in voxels.
"""

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.data.cases import Shape, three

# At a time on a GPU, as many as the patches of a training batch, whose memory is known to suffice. On a CPU it is one:
# several are no faster, and each takes gigabytes within a network.
NUM_WINDOWS = 2
SIGMA = 1 / 8  # of the Gaussian weights, in patches


def softmax(logits_BKDHW: Tensor) -> Tensor:
    """Makes probabilities of logits of classes, which do not overlap."""
    return logits_BKDHW.softmax(dim=1)


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
    activate: Callable[[Tensor], Tensor] = softmax,
    title: str | None = None,
) -> Generator[NDArray[np.float32], None, None]:
    """Averages the softmax over models and mirrors, blended over windows of the training patch: a slice (K, H, W) each.

    ``activate`` makes probabilities of logits (B, K, D, H, W): of regions, which overlap, by ``torch.sigmoid``.
    Slices come from the bottom up, D of them, each as soon as the last window on it is done: what is held at a time is
    as deep as a window, however deep the image is (:func:`memory_needed`). ``mirror`` names the spatial axes (0 depth,
    1 height, 2 width) that may be flipped: all their subsets are, eight for three axes, one for none. An image smaller
    than the patch is padded with zeros for the while. On a GPU that cannot hold the sums these move to the computer's
    memory, with a warning. With a ``title``, a bar counts the windows. The models are as they were once the last slice
    was taken, or the iterator closed.

    Raises:
        SettingError: There is no model, or the patch, the overlap or the axes cannot be used.
        DataError: The image has another number of axes; with the slices: the result is not finite.

    Reference: the inference of nnU-Net's first version, which E2ENet uses: softmax before averaging, weights of
    σ = patch / 8, half a patch between windows. All folds see a window before the next one is read, so that the sums
    are held once instead of once per fold; the mean is the same. Windows, weights and the order of the sums are those
    of MONAI's ``sliding_window_inference``, so the result equals its bit for bit.
    """
    _refuse_settings(models, patch_size=patch_size, overlap=overlap, mirror=mirror)
    if image_CDHW.ndim != 4:
        where, remedy = "a prediction", "Give an image of one channel a leading axis."
        raise DataError.of("image", where, allowed="(C, D, H, W)", given=image_CDHW.shape, remedy=remedy)
    grid = _Grid.of(three(image_CDHW.shape[1:]), three(patch_size), overlap)
    return _slices(models, image_CDHW, grid, flips=_flips(mirror), activate=activate, title=title)


def memory_needed(shape: Shape, patch_size: Shape, *, num_channels: int, num_outputs: int) -> int:
    """Computes the bytes that :func:`probabilities` holds on a CPU of an image (D, H, W), beside what a network takes.

    These are the sums of K outputs and of the weights, as deep as a window, and some copies of the window at work.
    """
    _, height, width = _padded(shape, patch_size)
    sums = patch_size[0] * height * width * (num_outputs + 1)
    # five times: logits, softmax, one that is flipped, their sum, and what was there before
    window = math.prod(patch_size) * (num_channels + 5 * num_outputs)
    slices = 2 * height * width * num_outputs
    return 4 * (sums + window + slices)


def _padded(shape: Shape, patch: Shape) -> Shape:
    """Returns the size of an image that is padded to that of a patch where it is smaller."""
    return three(max(sizes) for sizes in zip(shape, patch, strict=True))


@dataclass(frozen=True)
class _Grid:
    """Where the windows lie: on the image (D, H, W), padded to the ``size`` of a patch where it is smaller."""

    shape: Shape
    patch: Shape
    windows: Sequence[tuple[slice, ...]]

    @staticmethod
    def of(shape: Shape, patch: Shape, overlap: float) -> "_Grid":
        size = _padded(shape, patch)
        steps = [p if n == p else max(1, int(p * (1 - overlap))) for n, p in zip(size, patch, strict=True)]
        return _Grid(shape, patch, dense_patch_slices(size, patch, steps))

    @property
    def size(self) -> Shape:
        return _padded(self.shape, self.patch)

    @property
    def before(self) -> Shape:
        """How many zeros precede the image along each axis."""
        return three((padded - n) // 2 for padded, n in zip(self.size, self.shape, strict=True))

    def read(self, image_CDHW: Tensor, windows: Sequence[tuple[slice, ...]]) -> Tensor:
        """Returns windows (B, C, D, H, W) of an image; each is padded for itself, so that the image is not copied."""
        sides = zip(self.size, self.shape, self.before, strict=True)
        pad = [side for size, n, before in reversed([*sides]) for side in (before, size - n - before)]
        return torch.stack([functional.pad(image_CDHW[:, *window], pad) for window in windows])

    def crop(self, depth: int, values_KHW: Tensor) -> Tensor | None:
        """Returns what a slice of the padded image has of the image itself, None where there is nothing."""
        deep, high, wide = (slice(first, first + n) for first, n in zip(self.before, self.shape, strict=True))
        return values_KHW[:, high, wide] if deep.start <= depth < deep.stop else None


class _Sums:
    """What the windows add up to, as deep as one: slice d lies at place d modulo that depth, until it is taken."""

    def __init__(self, patch: Shape, size: Shape, device: torch.device) -> None:
        self.device = device
        self._depth, self._plane = patch[0], size[1:]
        self._next = 0
        self._values_DKHW, self._weights_DHW = torch.empty(0), torch.empty(0)

    def allocate(self, num_outputs: int) -> None:
        """Makes room at the first call, when the number of outputs is known."""
        if not len(self._values_DKHW):  # the last to be made: there may be memory for the weights alone
            self._weights_DHW = torch.zeros(self._depth, *self._plane, device=self.device)
            self._values_DKHW = torch.zeros(self._depth, num_outputs, *self._plane, device=self.device)

    def move(self, device: torch.device) -> None:
        """Moves what is there to the memory of another device."""
        self.device = device
        self._values_DKHW, self._weights_DHW = self._values_DKHW.to(device), self._weights_DHW.to(device)

    def add(self, window: tuple[slice, ...], values_KDHW: Tensor, weight_DHW: Tensor) -> None:
        """Adds a window, none of whose slices was taken; all that are not taken are of it, or above."""
        place, values = window[0].start % self._depth, values_KDHW.movedim(1, 0)
        lower, upper = slice(0, self._depth - place), slice(self._depth - place, self._depth)
        for at, part in ((slice(place, self._depth), lower), (slice(0, place), upper)):
            self._values_DKHW[at, :, *window[1:]] += values[part].to(self.device)
            self._weights_DHW[at, *window[1:]] += weight_DHW[part].to(self.device)

    def take(self, until: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the mean (K, H, W) of each slice below ``until`` that was not taken yet, with its number."""
        for depth in range(self._next, until):
            values, weights = self._values_DKHW[depth % self._depth], self._weights_DHW[depth % self._depth]
            mean = values / weights
            values.zero_()
            weights.zero_()
            self._next = depth + 1
            yield depth, mean


def _slices(
    models: Sequence[nn.Module],
    image_CDHW: NDArray[np.float32],
    grid: _Grid,
    *,
    flips: Sequence[tuple[int, ...]],
    activate: Callable[[Tensor], Tensor],
    title: str | None,
) -> Generator[NDArray[np.float32], None, None]:
    image = torch.from_numpy(np.require(image_CDHW, requirements=["C", "W"]))
    device = next(models[0].parameters()).device
    weight = compute_importance_map(grid.patch, mode="gaussian", sigma_scale=SIGMA, device=device)
    sums = _Sums(grid.patch, grid.size, device)

    def weighted(windows_BCDHW: Tensor) -> Tensor:
        values = _weighted_mean(models, windows_BCDHW.to(device), flips, activate, weight)
        sums.allocate(values.shape[1])
        return values

    def finished(until: int) -> Iterator[NDArray[np.float32]]:
        for depth, values in sums.take(until):
            if (cropped := grid.crop(depth, values)) is not None:
                yield _finite(cropped.cpu().numpy())

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(predicting(model))
        hidden, total = title is None, len(grid.windows)
        # in the line of whatever bar there is: another line takes control sequences, which a log would keep
        bar = tqdm(total=total, desc=title, unit="window", disable=hidden, leave=False, position=0)
        stack.enter_context(bar)
        step = 1 if device.type == "cpu" else NUM_WINDOWS
        for first in range(0, total, step):
            batch = grid.windows[first : first + step]
            values = _with_room(partial(weighted, grid.read(image, batch)), sums)
            for window, value in zip(batch, values, strict=True):
                yield from finished(window[0].start)
                sums.add(window, value, weight)
            bar.update(len(batch))
        yield from finished(grid.size[0])


def _weighted_mean(
    models: Sequence[nn.Module],
    windows_BCDHW: Tensor,
    flips: Sequence[tuple[int, ...]],
    activate: Callable[[Tensor], Tensor],
    weight_DHW: Tensor,
) -> Tensor:
    """Averages the probabilities (B, K, D, H, W) over models and flips, and weighs their voxels."""
    total: Tensor | None = None
    kind = windows_BCDHW.device.type
    with torch.inference_mode(), torch.autocast(kind, enabled=kind == "cuda"):
        for model, axes in product(models, flips):
            found = activate(model(windows_BCDHW.flip(axes) if axes else windows_BCDHW).float())
            found = found.flip(axes) if axes else found
            total = found if total is None else total.add_(found)
        assert total is not None
        return total.div_(len(models) * len(flips)).mul_(weight_DHW)


def _with_room(work: Callable[[], Tensor], sums: _Sums) -> Tensor:
    """Does a piece of work; where the memory of a GPU is out, once more without the sums there."""
    try:
        return work()
    except torch.OutOfMemoryError:
        if sums.device.type == "cpu":
            raise
    # Outside of the handler, whose traceback would keep the tensors of the failed attempt alive.
    message = f"A prediction does not fit on {sums.device}; its windows are gathered in the computer's memory."
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    sums.move(torch.device("cpu"))
    torch.cuda.empty_cache()
    return work()


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not math.isfinite(float(values.sum())):
        allowed, given = "finite numbers", "NaN or infinity"
        remedy = "Look for NaN in the image and in the weights; a network trained in float32 may overflow in float16."
        raise DataError.of("probabilities", "a prediction", allowed=allowed, given=given, remedy=remedy)
    return values


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

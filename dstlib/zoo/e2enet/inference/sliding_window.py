"""From a prepared image to class probabilities: overlapping windows, mirrored, averaged over the folds.

Shapes: B windows, C channels, K classes with the background, D, H, W depth, height, width in voxels; A is the axis
along which slices are given away, P and Q are the other two, in order.
"""

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, groupby, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dstlib.errors import DataError, require
from dstlib.zoo.e2enet.data.cases import Shape, three

# At a time on a GPU, as many as the patches of a training batch, whose memory is known to suffice. On a CPU it is one:
# several are no faster, and each takes gigabytes within a network.
NUM_WINDOWS = 2
SIGMA = 1 / 8  # of the Gaussian weights, in patches
LEAST_WEIGHT = 1e-3
AT_A_TIME = 1 << 16  # voxels of which there are logits and probabilities; whole vectors, which round as all in one do

Activate = Callable[[Tensor], Tensor]
Window = tuple[slice, slice, slice]  # along A, P and Q


def softmax(logits_BKDHW: Tensor) -> Tensor:
    """Makes probabilities of logits of classes, which do not overlap, in their place."""
    for part in logits_BKDHW.view(*logits_BKDHW.shape[:2], -1).split(AT_A_TIME, dim=2):
        part.copy_(torch.softmax(part, 1))
    return logits_BKDHW


def sigmoid(logits_BKDHW: Tensor) -> Tensor:
    """Makes probabilities of logits of regions, which may overlap, in their place."""
    return logits_BKDHW.sigmoid_()


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


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Where the windows of an image lie, and in which order they are read; made by :func:`windows_of`.

    - ``shape``: of the image (D, H, W); where it is smaller than ``patch``, it is padded with zeros for the while.
    - ``axis``: A, along which windows are read from one end to the other, and slices given away.
    - ``places``: on the padded image, along A, P and Q.
    - ``is_empty``: which of them are not read, as they hold nothing.
    """

    shape: Shape
    patch: Shape
    axis: int
    places: tuple[Window, ...]
    is_empty: tuple[bool, ...]

    @property
    def num_read(self) -> int:
        """How many windows the networks see."""
        return len(self.places) - sum(self.is_empty)

    @property
    def order(self) -> tuple[int, int, int]:
        """The axes A, P and Q."""
        return three((self.axis, *(axis for axis in range(3) if axis != self.axis)))

    @property
    def size(self) -> Shape:
        """Voxels of the padded image along A, P and Q."""
        return three(max(self.shape[axis], self.patch[axis]) for axis in self.order)

    @property
    def before(self) -> Shape:
        """How many zeros precede the image along A, P and Q."""
        return three((n - self.shape[axis]) // 2 for n, axis in zip(self.size, self.order, strict=True))

    def inside(self, window: Window) -> Window:
        """Returns what a window covers of the image itself, along A, P and Q."""
        sides = zip(window, self.before, self.order, strict=True)
        return three(
            slice(max(0, side.start - before), min(self.shape[axis], side.stop - before))
            for side, before, axis in sides
        )


def windows_of(shape: Sequence[int], patch_size: Sequence[int], *, overlap: float = 0.5) -> Windows:
    """Lays windows of the training patch over an image (D, H, W), each overlapping the next by this share.

    They are read along the axis on which the sums of a window's extent take the least memory, the first of equals.

    Raises:
        SettingError: The patch or the overlap cannot be used.

    >>> windows = windows_of((8, 16, 16), (8, 8, 8))
    >>> windows.axis, len(windows.places)
    (1, 9)
    """
    where, patch = "a prediction", tuple(patch_size)
    is_patch, remedy = len(patch) == 3 and min(patch) > 0, "Pass the patch of the training."
    require(is_patch, "patch_size", where, allowed="three positive sizes", given=patch, remedy=remedy)
    remedy = "Pass 0.5 for steps of half a patch."
    require(0 <= overlap < 1, "overlap", where, allowed="a share in [0, 1)", given=overlap, remedy=remedy)
    size = [max(sizes) for sizes in zip(shape, patch, strict=True)]
    axis = min(range(3), key=lambda axis: patch[axis] * math.prod(size) // size[axis])
    bare = Windows(shape=three(shape), patch=three(patch), axis=axis, places=(), is_empty=())
    extents = [patch[axis] for axis in bare.order]
    places = tuple(map(three, product(*map(partial(_sides, overlap=overlap), bare.size, extents))))
    return replace(bare, places=places, is_empty=(False,) * len(places))


def _sides(size: int, extent: int, overlap: float) -> list[slice]:
    """Lays windows along an axis, in equal steps, the last one at its end."""
    step = max(1, int(extent * (1 - overlap)))
    firsts = (min(i * step, size - extent) for i in range(-((extent - size) // step) + 1))
    return [slice(first, first + extent) for first in firsts]


def _weights(extents: Sequence[int], device: torch.device) -> Tensor:
    """Weighs the voxels of a window by a Gaussian around its centre, none by less than ``LEAST_WEIGHT``."""
    weights = torch.ones((), device=device)
    for n in extents:
        distances = torch.arange(n, dtype=torch.float32, device=device) - (n - 1) / 2
        weights = weights.unsqueeze(-1) * torch.exp(distances**2 / (-2 * (n * SIGMA) ** 2))
    return weights.clamp_(min=LEAST_WEIGHT)


def probabilities(
    models: Sequence[nn.Module],
    image_CDHW: NDArray[np.float32],
    windows: Windows,
    *,
    mirror: Sequence[int] = (0, 1, 2),
    activate: Activate = softmax,
    background: Sequence[float] = (),
    on_pass: Callable[[int], None] = lambda num: None,
) -> Generator[NDArray[np.float32], None, None]:
    """Averages the probabilities over models and mirrors, blended over windows: a slice (K, P, Q) each.

    ``activate`` makes probabilities of logits (B, K, D, H, W), in the place of what a network has made: of classes, or
    of regions, which overlap. Slices come one by one along the axis A of the windows, each as soon as the last window
    on it is done: what is held at a time is as deep as a window, however long the image is (:func:`memory_needed`).
    ``mirror`` names the spatial axes (0 depth, 1 height, 2 width) that may be flipped: all their subsets are, eight for
    three axes, one for none. An image smaller than the patch is padded with zeros for the while. On a GPU that cannot
    hold the sums these move to the computer's memory, with a warning. ``on_pass`` is called with the number of passes
    through a network that a window, or some, took. The models are as they were once the last slice was taken, or the
    iterator closed.

    A window that is empty is blended as any other, with ``background`` (K) at each voxel in the place of what the
    networks say: so a voxel that none but empty windows cover has these values, and all others what they had if the
    networks answered so.

    Raises:
        SettingError: There is no model, or the axes cannot be used.
        DataError: The image has another number of axes, or another shape than that of the windows; with the slices:
            the result is not finite.

    Reference: the inference of nnU-Net's first version, which E2ENet uses: softmax before averaging, weights of
    σ = patch / 8, half a patch between windows. All folds see a window before the next one is read, so that the sums
    are held once instead of once per fold; the mean is the same. Windows, weights and the order of the sums are those
    of MONAI's ``sliding_window_inference``, of the image with A as its first axis, so the result equals its bit for
    bit.
    """
    _refuse_settings(models, mirror=mirror)
    if image_CDHW.ndim != 4 or image_CDHW.shape[1:] != windows.shape:
        where, allowed = "a prediction", "(C, {}, {}, {})".format(*windows.shape)
        remedy = "Lay windows over this image, and give one of one channel a leading axis."
        raise DataError.of("image", where, allowed=allowed, given=image_CDHW.shape, remedy=remedy)
    assert background or not any(windows.is_empty)
    passes = _Passes(models, _flips(mirror), activate)
    return _slices(passes, image_CDHW, windows, background=background, on_pass=on_pass)


def num_passes(models: Sequence[nn.Module], mirror: Sequence[int]) -> int:
    """Counts the passes through a network that a window takes.

    >>> num_passes([nn.Identity()] * 5, mirror=(0, 1, 2))
    40
    """
    return len(models) * 2 ** len(mirror)


def memory_needed(windows: Windows, *, num_channels: int, num_outputs: int) -> int:
    """Computes the bytes that :func:`probabilities` holds of an image on a CPU, beside what a network takes.

    These are the sums of K outputs, as deep as a window, and some copies of the window at work.
    """
    plane = math.prod(windows.size[1:])
    sums = windows.patch[windows.axis] * plane * num_outputs
    # twice: what one pass gives, and the mean; the window as it is read, and flipped
    window = math.prod(windows.patch) * (2 * num_channels + 2 * num_outputs)
    slices = 2 * plane * num_outputs
    return 4 * (sums + window + slices)


class _Passes:
    """What networks say of windows, through tensors that are used again for each pass and each window."""

    def __init__(self, models: Sequence[nn.Module], flips: Sequence[tuple[int, ...]], activate: Activate) -> None:
        self.models, self.flips, self.activate = models, flips, activate
        self.device = next(models[0].parameters()).device
        self._flipped = torch.empty(0)

    @property
    def num(self) -> int:
        return len(self.models) * len(self.flips)

    def __call__(self, windows_BCDHW: Tensor, weight_DHW: Tensor) -> Tensor:
        """Averages the probabilities (B, K, D, H, W) over models and flips, and weighs their voxels."""
        kind = windows_BCDHW.device.type
        mean: Tensor | None = None
        with torch.inference_mode(), torch.autocast(kind, enabled=kind == "cuda"):
            for model, axes in product(self.models, self.flips):
                seen = windows_BCDHW
                if axes:
                    self._flipped = seen = _like(windows_BCDHW, self._flipped)
                    _write_flipped(seen, windows_BCDHW, axes)
                found = self.activate(_own(model(seen).float(), seen))
                if mean is None:  # the first pass is not flipped
                    mean = found
                else:
                    _add_flipped(mean, found, axes)
                del found
            assert mean is not None
            mean.div_(self.num).mul_(weight_DHW)
        return mean


def _own(logits: Tensor, seen: Tensor) -> Tensor:
    """Returns what a network has made, contiguous; a copy of what was there before, its input or a parameter."""
    is_new = logits.is_inference() and logits.data_ptr() != seen.data_ptr()
    return logits if is_new and logits.is_contiguous() else logits.clone(memory_format=torch.contiguous_format)


def _like(wanted: Tensor, kept: Tensor) -> Tensor:
    """Returns a tensor to write to: the one that was kept, where it has the shape of what is wanted, else a new one."""
    return kept if kept.shape == wanted.shape else torch.empty_like(wanted, memory_format=torch.contiguous_format)


def _write_flipped(out_BCDHW: Tensor, x_BCDHW: Tensor, axes: tuple[int, ...]) -> None:
    for out, x in zip(out_BCDHW.flatten(0, 1), x_BCDHW.flatten(0, 1), strict=True):  # a copy of one channel at a time
        out.copy_(x.flip([axis - 2 for axis in axes]))


def _add_flipped(out_BKDHW: Tensor, x_BKDHW: Tensor, axes: tuple[int, ...]) -> None:
    if not axes:
        out_BKDHW.add_(x_BKDHW)
        return
    for out, x in zip(out_BKDHW.flatten(0, 1), x_BKDHW.flatten(0, 1), strict=True):
        out.add_(x.flip([axis - 2 for axis in axes]))


class _Sums:
    """What the windows add up to, as deep as one: slice a lies at place a modulo that depth, until it is taken."""

    def __init__(self, weight_APQ: Tensor, plane: tuple[int, int]) -> None:
        self.device = weight_APQ.device
        self._weight_APQ, self._plane = weight_APQ, plane
        self._depth = len(weight_APQ)
        self._next = 0
        self._values_AKPQ = torch.empty(0)
        self._windows: list[Window] = []  # that were added, and reach above what is taken

    def allocate(self, num_outputs: int) -> None:
        """Makes room at the first call, when the number of outputs is known."""
        if not len(self._values_AKPQ):
            self._values_AKPQ = torch.zeros(self._depth, num_outputs, *self._plane, device=self.device)

    def move(self, device: torch.device) -> None:
        """Moves what is there to the memory of another device."""
        self.device = device
        self._values_AKPQ, self._weight_APQ = self._values_AKPQ.to(device), self._weight_APQ.to(device)

    def add(self, window: Window, values_KAPQ: Tensor) -> None:
        """Adds a window, none of whose slices was taken; all that are not taken are of it, or above."""
        self._windows.append(window)
        values_AKPQ = values_KAPQ.movedim(1, 0)
        for at, part in self._parts(window):
            self._values_AKPQ[at, :, *window[1:]].add_(values_AKPQ[part].to(self.device))

    def add_background(self, window: Window, background: Sequence[float]) -> None:
        """Adds a window of the same probabilities (K) everywhere."""
        self._windows.append(window)
        for at, part in self._parts(window):
            for k, value in enumerate(background):
                if value:
                    self._values_AKPQ[at, k, *window[1:]].add_(self._weight_APQ[part] * value)

    def take(self, until: int) -> Iterator[tuple[int, Tensor]]:
        """Yields the mean (K, P, Q) of each slice below ``until`` that was not taken yet, with its number."""
        for a in range(self._next, until):
            values = self._values_AKPQ[a % self._depth]
            mean = values / self._weights(a)
            values.zero_()
            self._next = a + 1
            yield a, mean
        self._windows = [window for window in self._windows if window[0].stop > until]

    def _weights(self, a: int) -> Tensor:
        """Adds up what a slice is to be divided by: cheaper than to keep as much as another output."""
        found_PQ = torch.zeros(self._plane, device=self.device)
        for depths, *at in self._windows:
            if depths.start <= a < depths.stop:
                found_PQ[*at].add_(self._weight_APQ[a - depths.start])
        return found_PQ

    def _parts(self, window: Window) -> tuple[tuple[slice, slice], ...]:
        """Returns where the slices of a window lie here, and which of them they are."""
        place = window[0].start % self._depth
        lower, upper = slice(0, self._depth - place), slice(self._depth - place, self._depth)
        return ((slice(place, self._depth), lower), (slice(0, place), upper))


def _slices(
    passes: _Passes,
    image_CDHW: NDArray[np.float32],
    windows: Windows,
    *,
    background: Sequence[float],
    on_pass: Callable[[int], None],
) -> Generator[NDArray[np.float32], None, None]:
    image = torch.from_numpy(np.require(image_CDHW, requirements=["C", "W"]))
    device, order = passes.device, windows.order
    extents = three(windows.patch[axis] for axis in order)
    weight_APQ = _weights(extents, device)
    weight_DHW = weight_APQ.permute(*np.argsort(order).tolist()).contiguous()
    sums = _Sums(weight_APQ, windows.size[1:])

    def weighted(windows_BCDHW: Tensor) -> Tensor:
        values = passes(windows_BCDHW.to(device), weight_DHW)
        sums.allocate(values.shape[1])
        return values.permute(0, 1, *(2 + axis for axis in order))

    def finished(until: int) -> Iterator[NDArray[np.float32]]:
        for a, values in sums.take(until):
            if (cropped := _cropped(windows, a, values)) is not None:
                yield _finite(cropped.cpu().numpy())

    with ExitStack() as stack:
        for model in passes.models:
            stack.enter_context(predicting(model))
        for is_empty, places in _batches(windows, 1 if device.type == "cpu" else NUM_WINDOWS):
            if is_empty:
                yield from finished(places[0][0].start)
                sums.allocate(len(background))
                sums.add_background(places[0], background)
                continue
            values = _with_room(partial(weighted, _read(image, windows, places)), sums)
            for place, value in zip(places, values, strict=True):
                yield from finished(place[0].start)
                sums.add(place, value)
            del values, value  # or they would be there beside the next ones
            on_pass(len(places) * passes.num)
        yield from finished(windows.size[0])


def _batches(windows: Windows, num: int) -> Iterator[tuple[bool, list[Window]]]:
    """Yields the windows in order: up to so many at a time that are read, those that are empty one by one."""
    for is_empty, group in groupby(zip(windows.is_empty, windows.places, strict=True), key=lambda pair: pair[0]):
        places = [place for _, place in group]
        step = 1 if is_empty else num
        for first in range(0, len(places), step):
            yield is_empty, places[first : first + step]


def _read(image_CDHW: Tensor, windows: Windows, places: Sequence[Window]) -> Tensor:
    """Returns windows (B, C, D, H, W) of an image; each is padded for itself, so that the image is not copied."""
    back = np.argsort(windows.order).tolist()
    size, before = ([sizes[i] for i in back] for sizes in (windows.size, windows.before))
    sides = zip(size, windows.shape, before, strict=True)
    pad = [side for n, inner, first in reversed([*sides]) for side in (first, n - inner - first)]
    boxes = [tuple(windows.inside(place)[i] for i in back) for place in places]
    return torch.stack([functional.pad(image_CDHW[:, *box], pad) for box in boxes])


def _cropped(windows: Windows, a: int, values_KPQ: Tensor) -> Tensor | None:
    """Returns what a slice of the padded image has of the image itself, None where there is nothing."""
    sides = [
        slice(first, first + windows.shape[axis]) for first, axis in zip(windows.before, windows.order, strict=True)
    ]
    return values_KPQ[:, sides[1], sides[2]] if sides[0].start <= a < sides[0].stop else None


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


def _refuse_settings(models: Sequence[nn.Module], *, mirror: Sequence[int]) -> None:
    where, axes = "a prediction", tuple(mirror)
    remedy = "Pass a sequence of trained networks."
    require(len(models) > 0, "models", where, allowed="one per fold", given=len(models), remedy=remedy)
    are_axes = set(axes) <= {0, 1, 2} and len(set(axes)) == len(axes)
    allowed, remedy = "each of the axes 0, 1, 2 at most once", "Pass the axes that the training mirrored, () for none."
    require(are_axes, "mirror", where, allowed=allowed, given=axes, remedy=remedy)

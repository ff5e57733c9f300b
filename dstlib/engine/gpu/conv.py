"""A convolution that computes only the blocks of channels that are connected, on the matrix units of a GPU.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv3d

import dstlib.engine.gpu.tiles as tiles
from dstlib.engine.gpu.blocks import Blocks
from dstlib.engine.gpu.form import Launch, Shape
from dstlib.engine.gpu.launch import convolve, input_gradient, interpreted, weight_gradient
from dstlib.engine.gpu.maps import channels_first, channels_last
from dstlib.engine.gpu.tables import Plan
from dstlib.engine.ops.operator import Implementation, Operator, Problem
from dstlib.errors import SettingError
from dstlib.layers.shift import shift

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WHERE = "block_conv()"


def block_conv(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    blocks: Blocks,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    shifts: Sequence[int] = (0,),
    launch: Launch | None = None,
) -> Tensor:
    """The convolution of x with the weights inside the active blocks, padded by half the kernel.

    Shapes: x (B, C, D, H, W) or (B, C, H, W), weight (O, C, \\*kernel), bias (O); the result (B, O, ...), each extent
    divided by its stride, rounded up (for odd kernels), channels last in memory. x is read channels last, too: in
    another layout it is copied first. In 3D, contiguous groups of input channels move by ``shifts`` voxels towards
    higher depths, as by :func:`dstlib.layers.shift.shift`, while they are read; one number per channel is allowed.
    Several x stand for their concatenation, which kernels in CUDA do without.

    Products are summed in float32. Under autocast, inputs are converted as for torch's own convolutions. The weight's
    gradient is that of the active blocks, and zero elsewhere; all gradients are the same in every run.
    ``launch`` overrides how the work of Triton's kernels is cut.

    On a GPU of capability 8.0 or more, kernels (1, 3, 3) without stride, in float16 or bfloat16 and blocks of multiples
    of 16, are computed in CUDA, where cuda-core is installed to compile it; everything else by Triton, more slowly.

    On a CPU, torch computes the same with a dense convolution.

    Raises:
        SettingError: something does not fit together, or x is on a GPU and Triton is not installed.

    >>> weight = torch.randn(32, 64, 1, 3, 3)
    >>> weight[:16, 16:] = 0
    >>> blocks = Blocks.of(weight != 0, (16, 16))
    >>> block_conv(torch.randn(1, 64, 5, 8, 8), weight, blocks, stride=(1, 2, 2), shifts=(-1, 0, 1)).shape
    torch.Size([1, 32, 5, 4, 4])
    """
    sources = [x] if isinstance(x, Tensor) else list(x)
    steps = (stride,) * (sources[0].ndim - 2) if isinstance(stride, int) else tuple(stride)
    _check(sources, weight, blocks, steps, shifts)
    if torch.is_autocast_enabled(kind := weight.device.type):
        dtype = torch.get_autocast_dtype(kind)
        sources = [each.to(dtype) for each in sources]
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.ndim == 4:
        flat = [each[:, :, None] for each in sources]
        return block_conv(flat, weight[:, :, None], blocks, bias, (1, *steps), (0,), launch)[:, :, 0]
    if not (weight.is_cuda or interpreted()):
        own = weight * blocks.cover.to(weight.device)[:, :, None, None, None]
        return _dense(_whole(sources), own, bias, steps, shifts)
    _check_types(sources, weight, bias)
    tiled = launch is None and tiles.suit(sources, blocks.size, weight.shape, steps)
    if not tiled:
        sources = [_whole(sources)]
    tensors, numbers = blocks.plan(shifts, weight.device, tiled=tiled).parts()
    # float32 tiles take twice the room
    chosen = launch or (Launch(tile=64, stages=2) if weight.dtype == torch.float32 else Launch())
    problem = BlockConvProblem(len(sources), bias is not None, tuple(numbers), tuple(steps), tuple(chosen))
    return _block_conv(problem, [*sources, weight, *([] if bias is None else [bias]), *tensors])[0]


@dataclass(frozen=True)
class BlockConvProblem(Problem):
    """A convolution by blocks of tensors: sources, weight, bias where there is one, the tables of the plan."""

    num_sources: int
    has_bias: bool
    numbers: tuple[int, ...]  # of the plan
    stride: tuple[int, ...]
    launch: tuple[int, ...]

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor | None, Plan]:
        """Returns sources, weight, bias and plan."""
        sources, (weight, *rest) = list(tensors[: self.num_sources]), tensors[self.num_sources :]
        bias, tables = (rest[0], rest[1:]) if self.has_bias else (None, rest)
        return sources, weight, bias, Plan.of_parts(tables, self.numbers)

    def shape(self, weight: Tensor) -> Shape:
        """Returns kernel and stride."""
        depth, height, width = weight.shape[2:]
        return Shape((depth, height, width), (self.stride[0], self.stride[1], self.stride[2]))


def _whole(sources: Sequence[Tensor]) -> Tensor:
    return sources[0] if len(sources) == 1 else torch.cat(list(sources), dim=1)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], shifts: Sequence[int]) -> Tensor:
    moved = shift(x, shifts, axis=2) if any(shifts) else x
    return conv3d(moved, weight, bias, tuple(stride), tuple(extent // 2 for extent in weight.shape[2:]))


def _convolve(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    sources, weight, bias, plan = problem.split(tensors)
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        maps = [channels_last(each) for each in sources]
        y = convolve(maps, weight, bias, plan, problem.shape(weight), Launch(*problem.launch))
    return [channels_first(y)]


def _convolve_fake(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x, weight = tensors[0], tensors[problem.num_sources]
    size = problem.shape(weight).of_output(x.shape[2:])
    return [channels_first(x.new_empty((x.shape[0], *size, weight.shape[0])))]


def _input_gradients(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    *given, grad = tensors
    sources, weight, _, plan = problem.split(given)
    sizes = [*sources[0].shape[2:], *(each.shape[1] for each in sources)]
    with torch.cuda.device_of(grad):
        shape, launch = problem.shape(weight), Launch(*problem.launch)
        found = input_gradient(channels_last(grad), weight, sizes, plan, shape, launch)
    return list(map(channels_first, found))


def _input_gradients_fake(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    grad = tensors[-1]
    sources = tensors[: problem.num_sources]
    return [channels_first(grad.new_empty((len(x), *x.shape[2:], x.shape[1]))) for x in sources]


def _weight_gradient(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    *given, grad = tensors
    sources, weight, _, plan = problem.split(given)
    with torch.cuda.device_of(weight):
        maps, shape, launch = [channels_last(each) for each in sources], problem.shape(weight), Launch(*problem.launch)
        return [weight_gradient(maps, channels_last(grad), weight, plan, shape, launch)]


def _weight_gradient_fake(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    weight = tensors[problem.num_sources]
    return [weight.new_empty(weight.shape)]


def _remember(problem: BlockConvProblem, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


def _backward(
    problem: BlockConvProblem, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    grad, count = grads[0], problem.num_sources
    found: list[Tensor | None] = [None] * len(kept)
    if any(wanted[:count]):
        found[:count] = _input_grads(problem, [*kept, grad])
    if wanted[count]:
        found[count] = _weight_grad(problem, [*kept, grad])[0]
    if problem.has_bias and wanted[count + 1]:
        found[count + 1] = grad.sum(dim=(0, 2, 3, 4))
    return found


_input_grads = Operator(
    "block_conv_input_grads",
    BlockConvProblem,
    (Implementation("blocks", lambda *_: True, _input_gradients),),
    _input_gradients_fake,
)
_weight_grad = Operator(
    "block_conv_weight_grad",
    BlockConvProblem,
    (Implementation("blocks", lambda *_: True, _weight_gradient),),
    _weight_gradient_fake,
)
_block_conv = Operator(
    "block_conv",
    BlockConvProblem,
    (Implementation("blocks", lambda *_: True, _convolve),),
    _convolve_fake,
    _backward,
    _remember,
)


def _check(
    sources: Sequence[Tensor], weight: Tensor, blocks: Blocks, stride: tuple[int, ...], shifts: Sequence[int]
) -> None:
    (outputs, inputs), x = blocks.channels, sources[0]
    fits = x.ndim in (4, 5) and sum(each.shape[1] for each in sources) == inputs
    alike = all(each.shape[2:] == x.shape[2:] and len(each) == len(x) for each in sources)
    checks = (
        ("x", fits, f"(B, {inputs}, [D,] H, W), as the blocks have it", _shapes(sources)),
        ("x", alike, "maps that agree but for their channels", _shapes(sources)),
        ("weight", weight.shape[:2] == (outputs, inputs), f"({outputs}, {inputs}, *kernel)", tuple(weight.shape)),
        ("weight", weight.ndim == x.ndim, f"{x.ndim} axes, like x", weight.ndim),
        ("stride", len(stride) == x.ndim - 2 and min(stride) > 0, f"{x.ndim - 2} numbers from 1", stride),
        ("shifts", len(shifts) > 0 and (x.ndim == 5 or not any(shifts)), "one or more in 3D, none in 2D", shifts),
    )
    for what, holds, allowed, given in checks:
        if not holds:
            remedy = "Make the blocks of this weight's mask."
            raise SettingError.of(what, _WHERE, allowed=allowed, given=given, remedy=remedy)


def _shapes(sources: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(each.shape)) for each in sources)


def _check_types(sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    types = {each.dtype for each in (*sources, weight, bias) if each is not None}
    if len(types) > 1 or weight.dtype not in DTYPES:
        allowed, given = "one of float16, bfloat16, float32 for all tensors", ", ".join(sorted(map(str, types)))
        remedy = "Use torch.autocast, or convert them."
        raise SettingError.of("type", _WHERE, allowed=allowed, given=given, remedy=remedy)

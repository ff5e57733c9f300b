"""A convolution that computes only the active blocks of channels, on the matrix units of a GPU.

Shapes: B batch, C input channels, O output channels, D, H, W depth, height, width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv3d

import dstlib.engine.gpu.by_triton as by_triton
import dstlib.engine.gpu.tiles as tiles
from dstlib.engine.gpu.blocks import NARROW, Blocks
from dstlib.engine.gpu.problem import BlockConvProblem, Launch, new_map
from dstlib.engine.ops.operator import Implementation, Operator
from dstlib.errors import require
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
    """Computes the convolution of x with the weights inside the active blocks, padded by half the kernel.

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
        SettingError: Something does not fit together, or x is on a GPU and Triton is not installed.

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
    if not (weight.is_cuda or by_triton.interpreted()):  # recorded by torch, as it is made of its operations
        moved = shift(_whole(sources), shifts, axis=2) if any(shifts) else _whole(sources)
        own = weight * blocks.cover.to(weight.device)[:, :, None, None, None]
        return conv3d(moved, own, bias, steps, tuple(extent // 2 for extent in weight.shape[2:]))
    _check_types(sources, weight, bias)
    tiled = launch is None and tiles.accept(sources, blocks.size, weight.shape, steps)
    if not tiled:
        sources = [_whole(sources)]
    problem = BlockConvProblem(
        num_sources=len(sources),
        has_bias=bias is not None,
        block=(NARROW, NARROW) if tiled else blocks.size,
        stride=(steps[0], steps[1], steps[2]),
        shifted=any(shifts),
        tiled=tiled,
        # float32 tiles take twice the room
        launch=launch or (Launch(tile=64, stages=2) if weight.dtype == torch.float32 else Launch()),
    )
    tables = blocks.plan(shifts, weight.device, tiled=tiled).tensors()
    return _block_conv(problem, [*sources, weight, *([] if bias is None else [bias]), *tables])[0]


def _whole(sources: Sequence[Tensor]) -> Tensor:
    return sources[0] if len(sources) == 1 else torch.cat(list(sources), dim=1)


def _empty_output(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    x, weight = tensors[0], tensors[problem.num_sources]
    return [new_map(x, problem.size_of_output(x.shape[2:], weight), len(weight))]


def _empty_inputs(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [new_map(tensors[-1], x.shape[2:], x.shape[1]) for x in tensors[: problem.num_sources]]


def _backward(
    problem: BlockConvProblem, kept: Sequence[Tensor], grads: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    (grad, *_), count = grads, problem.num_sources
    found: list[Tensor | None] = [None] * len(kept)
    if any(wanted[:count]):
        found[:count] = _backward_input(problem, [*kept, grad])
    if wanted[count]:
        found[count] = _backward_weights(problem, [*kept, grad])[0]
    if problem.has_bias and wanted[count + 1]:
        found[count + 1] = grad.sum(dim=(0, 2, 3, 4))
    return found


Direction = Callable[[BlockConvProblem, Sequence[Tensor]], list[Tensor]]


def _in_order(in_tiles: Direction, in_triton: Direction) -> tuple[Implementation[BlockConvProblem], ...]:
    """Returns the ways to compute one direction; what neither does, torch has computed by itself before."""

    def run_triton(problem: BlockConvProblem, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            return in_triton(problem, tensors)

    return (
        Implementation("tiles", lambda problem, tensors: problem.tiled, in_tiles),
        Implementation("triton", lambda problem, tensors: True, run_triton),
    )


_backward_input = Operator(
    "block_conv_backward_input",
    BlockConvProblem,
    _in_order(tiles.backward_input, by_triton.backward_input),
    fake=_empty_inputs,
)
_backward_weights = Operator(
    "block_conv_backward_weights",
    BlockConvProblem,
    _in_order(tiles.backward_weights, by_triton.backward_weights),
    fake=lambda problem, tensors: [torch.empty_like(tensors[problem.num_sources])],
)
_block_conv = Operator(
    "block_conv",
    BlockConvProblem,
    _in_order(tiles.forward, by_triton.forward),
    fake=_empty_output,
    backward=_backward,
    keep=lambda problem, tensors, outputs: list(tensors),
)


def _check(
    sources: Sequence[Tensor], weight: Tensor, blocks: Blocks, stride: tuple[int, ...], shifts: Sequence[int]
) -> None:
    (outputs, inputs), x = blocks.channels, sources[0]
    fits = x.ndim in (4, 5) and sum(each.shape[1] for each in sources) == inputs
    alike = all(each.shape[2:] == x.shape[2:] and len(each) == len(x) for each in sources)
    shapes = ", ".join(str(tuple(each.shape)) for each in sources)
    remedy = "Make the blocks of this weight's mask."
    for what, holds, allowed, given in (
        ("x", fits, f"(B, {inputs}, [D,] H, W), as the blocks have it", shapes),
        ("x", alike, "maps that agree but for their channels", shapes),
        ("weight", weight.shape[:2] == (outputs, inputs), f"({outputs}, {inputs}, *kernel)", tuple(weight.shape)),
        ("weight", weight.ndim == x.ndim, f"{x.ndim} axes, like x", weight.ndim),
        ("stride", len(stride) == x.ndim - 2 and min(stride) > 0, f"{x.ndim - 2} numbers from 1", stride),
        ("shifts", len(shifts) > 0 and (x.ndim == 5 or not any(shifts)), "one or more in 3D, none in 2D", shifts),
    ):
        require(holds, what, _WHERE, allowed=allowed, given=given, remedy=remedy)


def _check_types(sources: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    types = {each.dtype for each in (*sources, weight, bias) if each is not None}
    allowed, given = "one of float16, bfloat16, float32 for all tensors", ", ".join(sorted(map(str, types)))
    holds, remedy = len(types) == 1 and weight.dtype in DTYPES, "Use torch.autocast, or convert them."
    require(holds, "type", _WHERE, allowed=allowed, given=given, remedy=remedy)

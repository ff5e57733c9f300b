"""Block convolutions beside float64 dense ones, and their kernels compiled for GPUs that are not there.

Triton decides between its interpreter and its compiler while it is loaded, so that test_gpu_conv.py runs this file as
a program of its own: ``gpu_cases.py quick`` and ``slow`` print the errors of cases, ``compile 90``
what the compiler made for that architecture.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv3d

from dstlib.engine.gpu import Blocks, Launch, block_conv
from dstlib.engine.gpu.problem import BlockConvProblem
from dstlib.layers.shift import shift

SHARES = "shares of positions"


@dataclass(frozen=True)
class Case:
    """A layer; its mask has an empty row and column of blocks, and ``density`` elsewhere."""

    name: str
    size: tuple[int, int]
    channels: tuple[int, int] = (32, 32)
    extent: tuple[int, ...] = (2, 3, 5)
    kernel: tuple[int, ...] = (1, 3, 3)
    stride: tuple[int, ...] = (1, 1, 1)
    shifts: tuple[int, ...] = (-1, 0, 1)
    dtype: torch.dtype = torch.float32
    density: float = 0.5
    batch: int = 1
    bias: bool = True
    finer: bool = False  # a mask of single connections, covered by the blocks
    launch: Launch | None = None


QUICK = (
    Case("wide blocks", (16, 16), channels=(32, 48), batch=2, launch=Launch(tile=32)),
    Case("wide blocks, bfloat16", (16, 16), dtype=torch.bfloat16),
    Case("shared by 16 outputs", (16, 1), channels=(32, 40), batch=2, density=0.2, launch=Launch(tile=32)),
    Case("in-plane stride, float16", (16, 1), stride=(1, 2, 2), density=0.2, dtype=torch.float16),
    Case("shifts that straddle runs, ragged channels", (16, 16), channels=(20, 50), shifts=(-1, 0, 2)),
    Case("shifts beyond the map", (16, 16), extent=(4, 2, 3), shifts=(3, -5, 1)),
    Case("single connections", (1, 1), channels=(3, 4), extent=(2, 3, 3)),
    Case("nothing connected", (16, 1), density=0.0),
    Case("1×1×1", (16, 1), kernel=(1, 1, 1)),
    Case("2D", (16, 16), extent=(6, 7), kernel=(3, 3), stride=(1, 1), shifts=(0,), batch=2),
    Case(SHARES, (16, 16), (16, 16), (2, 5, 9), (1, 1, 1), density=1.0, launch=Launch(tile=16)),
)
SLOW = (
    Case("shared by 16 outputs, float16", (16, 1), dtype=torch.float16, density=0.2),
    Case("in-plane stride", (16, 16), stride=(1, 2, 2)),
    Case("wide blocks, float16", (16, 16), dtype=torch.float16),
    Case("shared by 16 outputs, bfloat16", (16, 1), dtype=torch.bfloat16, density=0.2),
    Case("stride everywhere", (16, 16), stride=(2, 2, 2), extent=(3, 4, 5)),
    Case("a shift for each channel", (16, 8), channels=(16, 16), shifts=(0, 1, -1, 2) * 4, extent=(3, 3, 3)),
    Case("long runs", (64, 32), channels=(64, 64), extent=(2, 3, 3), density=1.0),
    Case("narrow in both", (4, 2), channels=(6, 5), extent=(2, 3, 3)),
    Case("narrow outputs, wide inputs", (4, 16), channels=(6, 34), extent=(2, 3, 3), kernel=(1, 1, 3)),
    Case("single connections, covered", (16, 4), channels=(32, 12), density=0.05, finer=True, extent=(2, 3, 3)),
    Case("no shift, no bias", (16, 16), shifts=(0,), bias=False, extent=(2, 3, 3)),
    Case("3×3×1", (16, 16), channels=(16, 16), kernel=(3, 3, 1), extent=(2, 3, 3), density=1.0),
    Case("2D, stride, shared by 16", (16, 1), extent=(6, 7), kernel=(3, 3), stride=(2, 2), shifts=(0,), density=0.2),
)

TILED = (  # what the kernels of tiles.cu compute
    Case("tiles, bfloat16", (16, 16), channels=(32, 48), extent=(3, 5, 7), batch=2, dtype=torch.bfloat16),
    Case("tiles, float16", (16, 16), channels=(48, 32), extent=(2, 18, 35), dtype=torch.float16),
    Case("tiles of ragged channels", (16, 16), (40, 56), (3, 4, 6), shifts=(-1, 0, 2), dtype=torch.bfloat16),
    Case("tiles shifted beyond the map", (16, 16), extent=(3, 4, 5), shifts=(5, -7, 1), dtype=torch.float16),
    Case("tiles of larger blocks, no bias", (32, 64), (64, 64), (2, 4, 6), bias=False, dtype=torch.bfloat16),
    Case("tiles in 2D", (16, 32), (32, 64), (9, 33), (3, 3), (1, 1), shifts=(0,), dtype=torch.float16),
)


def layer(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Blocks]:
    """Input, weight and bias of a case in float64, but with values of its type; and the blocks."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = case.channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype).double()

    unit = (1, 1) if case.finer else case.size
    active = torch.rand(-(-outputs // unit[0]), -(-inputs // unit[1]), generator=generator) < case.density
    if min(active.shape) > 1:
        active[0], active[:, -1] = False, False
    mask = active.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)[:outputs, :inputs]
    weight = normal(outputs, inputs, *case.kernel) * mask[(...,) + (None,) * len(case.kernel)]
    bias = normal(outputs) if case.bias else None
    return normal(case.batch, inputs, *case.extent), weight, bias, Blocks.of(mask, case.size)


def results(case: Case, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Output, and gradients of input, weight and bias: by blocks on a device, and densely in float64."""
    x, weight, bias, blocks = layer(case)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    moved = shift(x, case.shifts, axis=2) if any(case.shifts) else x
    dense = conv3d if len(case.kernel) == 3 else conv2d
    expected = dense(moved, weight, bias, case.stride, tuple(extent // 2 for extent in case.kernel))
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    wanted = [expected, *torch.autograd.grad(expected, leaves, grad.double())]
    wanted[2] = wanted[2] * blocks.cover[(...,) + (None,) * len(case.kernel)]
    own = [t.detach().to(device, case.dtype).requires_grad_() for t in leaves]
    got = block_conv(own[0], own[1], blocks, own[2] if case.bias else None, case.stride, case.shifts, case.launch)
    return [got, *torch.autograd.grad(got, own, grad.to(device))], wanted


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """The largest error of each result, as a share of its largest value."""
    pairs = [(g.detach().cpu().double(), w.detach()) for g, w in zip(got, wanted, strict=True)]
    return [float((g - w).abs().max() / w.abs().max().clamp(min=1e-9)) for g, w in pairs]


def check_properties() -> dict[str, bool]:
    """What holds beside the numbers."""
    small = next(case for case in QUICK if case.name == SHARES)
    (first, _), (again, _) = results(small, "cpu"), results(small, "cpu")
    x, weight, bias, blocks = layer(small)
    inputs = [t.float().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        half = block_conv(inputs[0], inputs[1], blocks, inputs[2])
    problem = BlockConvProblem(
        num_sources=1, has_bias=True, block=small.size, stride=(1, 1, 1), shifted=True, tiled=False, launch=Launch()
    )
    tensors = [*inputs, *blocks.plan((-1, 0, 1), x.device).tensors()]
    checked = torch.library.opcheck(torch.ops.dstlib.block_conv.default, (tensors, problem.packed()))
    return {
        "the same in every run": all(map(torch.equal, first, again)),
        "channels last": first[0].is_contiguous(memory_format=torch.channels_last_3d),
        "autocast": half.dtype == torch.bfloat16,
        "an operator of torch": set(checked.values()) == {"SUCCESS"},
    }


def compiled(architecture: int, sizes: Sequence[tuple[int, int]] = ((16, 16), (16, 1))) -> list[tuple[str, bool]]:
    """The kernels of a layer in all directions, compiled as they would be launched; whether matrix units are used."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from dstlib.engine.gpu import by_triton

    target = GPUTarget("cuda", architecture, 32)
    nobody = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(nobody)
    made, run = [], JITFunction.run

    def only_compile(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        text = run(self, *args, warmup=True, **options).asm["ptx"]
        made.append((self.__name__, "mma.sync" in text or "wgmma" in text))

    JITFunction.run = only_compile
    weight = torch.zeros(32, 48, 1, 3, 3, dtype=torch.bfloat16)
    x = torch.zeros(1, 48, 4, 8, 8, dtype=torch.bfloat16)
    for size in sizes:
        problem = BlockConvProblem(
            num_sources=1, has_bias=True, block=size, stride=(1, 1, 1), shifted=True, tiled=False, launch=Launch()
        )
        plan = Blocks.of(torch.ones(32, 48, dtype=torch.bool), size).plan((-1, 0, 1), x.device)
        tensors = [x, weight, weight[:, 0, 0, 0, 0].contiguous(), *plan.tensors()]
        (y,) = by_triton.forward(problem, tensors)
        by_triton.backward_input(problem, [*tensors, y])
        by_triton.backward_weights(problem, [*tensors, y])
    return made


def main(command: str, argument: str = "") -> None:
    """Prints the answer as JSON; the interpreter needs TRITON_INTERPRET=1."""
    if command == "compile":
        print(json.dumps(compiled(int(argument))))
    else:
        found = {case.name: errors(*results(case, "cpu")) for case in (QUICK if command == "quick" else SLOW)}
        print(json.dumps({"errors": found, "properties": check_properties()} if command == "quick" else found))


if __name__ == "__main__":
    main(*sys.argv[1:])

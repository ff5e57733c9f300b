"""Convolutions that go slab by slab: what they make and what they overwrite, bit for bit as in one go.

Shapes: N batch, C channels, D, H, W depth, height, width.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from strategies import examples, generator, seeds
from torch import Tensor

from dstlib.engine.ops import operator as calls
from dstlib.engine.ops.conv import Geometry, pack_weights, unit
from dstlib.engine.ops.conv_transpose import conv_transpose
from dstlib.engine.ops.feature_map import FeatureMap, pattern_of, source, target
from dstlib.engine.ops.patterns import Pattern, Weights
from dstlib.engine.runtime import structs
from dstlib.engine.runtime.structs import DIRECT_PLANE, FORM_WINOGRAD, SLAB_ROWS

pytestmark = pytest.mark.usefixtures("path")


def placed(memory: Tensor, size: Sequence[int], first: int, between: int) -> Tensor:
    """A map (N, C, D, H, W), depth last, from a number on, with numbers left free behind each channel."""
    n, c, d, h, w = size
    channel = h * w * d + between
    assert first + n * c * channel <= len(memory)
    return memory.as_strided(size, (c * channel, channel, 1, w * d, d), first)


def as_map(x: Tensor, seed: int) -> FeatureMap:
    """A map with a norm to apply while it is read."""
    rng = generator(seed)
    scale, offset = (torch.randn(x.shape[:2], generator=rng) for _ in range(2))
    return FeatureMap(x, (scale, offset, 0.25))


def kernels_of(outputs: int, inputs: int, rng: torch.Generator) -> Pattern:
    return Pattern.of(torch.rand(outputs, inputs, generator=rng) < 0.5)


@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.integers(3, 45), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    has_upward=st.booleans(),
    is_over=st.booleans(),
    has_third=st.booleans(),
    threads=st.integers(1, 2),
    seed=seeds,
)
@examples(40, 200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slabs_are_a_pass_in_pieces(path, size, stride, has_upward, is_over, has_third, threads, seed):
    """A flow from the coarser level made as far as a slab reads, and an output in the place of what was read."""
    if path == "torch":
        pytest.skip("slabs are the kernels'")
    rng, kernels = generator(seed), calls.kernels()
    n, c, *coarse = size
    fine = [n, c, *(extent * step for extent, step in zip(coarse, stride, strict=True))]
    d, h, w = fine[2:]
    assume(h * w > DIRECT_PLANE)  # of smaller ones the expected map is of the direct form
    back = (SLAB_ROWS + 1) * w * d
    memory = torch.full((n * c * (h * w * d + back) + back,), torch.nan)
    same = as_map(placed(memory, fine, back, back).copy_(torch.randn(fine, generator=rng)), seed)
    below = as_map(torch.randn(n, 2, *coarse[1:], coarse[0], generator=rng).permute(0, 1, 4, 2, 3), seed + 1)
    others = [FeatureMap(placed(torch.randn(n * 2 * d * h * w, generator=rng), (n, 2, d, h, w), 0, 0))] * has_third

    flow = kernels_of(3, 2, rng)
    upward = Weights(torch.randn(2, 3, *stride, generator=rng), None, flow, flow)
    finer = [conv_transpose(below, upward, stride)] * has_upward
    num_inputs = sum(x.raw.shape[1] for x in (same, *finer, *others))
    active = kernels_of(c, num_inputs, rng)
    weight, bias, gamma, beta = (torch.randn(s, generator=rng) for s in ((c, num_inputs, 1, 3, 3), (c,), (c,), (c,)))
    shifts = torch.randint(-2, 3, (num_inputs,), generator=rng, dtype=torch.int32)
    weights = Weights(weight, bias, active, active)
    expected = unit([same, *finer, *others], weights, Geometry(shifts), (gamma, beta, 1e-5), 0.25)

    row_ptr, col_idx, index = active.tensors
    out = placed(memory if is_over else torch.full_like(memory, torch.nan), fine, 0, back)
    packed, statistics = pack_weights(kernels, weight, index, FORM_WINOGRAD), torch.full((4, n, c), torch.nan)
    job = structs.Conv(
        out=target(out),
        pattern=pattern_of(row_ptr, col_idx, num_inputs),
        weights=packed.data_ptr(),
        bias=bias.data_ptr(),
        shifts=shifts.data_ptr(),
        norm=(gamma.data_ptr(), beta.data_ptr(), 1e-5, statistics.data_ptr()),
        input_size=(n, d, h, w),
        output_size=(d, h, w),
        kernel_size=(3, 3),
        stride=(1, 1, 1),
        padding=(1, 1),
        is_sliced=1,
    )
    slab = torch.full((3 * (SLAB_ROWS + 2 * stride[1]) * w * d,), torch.nan)
    made = placed(slab, (1, 3, d, SLAB_ROWS + 2 * stride[1], w), 0, 0)
    if has_upward:
        job.upward = structs.ConvTranspose(
            input=source(*below),
            out=target(made),
            pattern=pattern_of(*flow.tensors[:2], 2),
            weights=upward.weight.data_ptr(),
            weight_strides=(upward.weight.stride(1), upward.weight.stride(0)),
            size=(n, *coarse),
            stride=stride,
        )
    for i, each in enumerate([same, *[FeatureMap(made)] * has_upward, *others]):
        job.sources[i] = source(*each)
    assert kernels.conv_winograd(job, threads) == 0
    assert torch.equal(out, expected.raw)
    scale, offset, _ = expected.norm
    assert torch.equal(statistics[:2], torch.stack([scale, offset]))

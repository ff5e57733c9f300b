"""Convolutions with sparse kernels, by every path of the engine, beside float64 torch.

Shapes: N batch, C input channels over all sources, O output channels, D, H, W depth, height, width.
"""

import ctypes
import gc
import math
import mmap
import multiprocessing
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops import feature_map, prepared
from dstlib.engine.ops.conv import CONV, Affine, Geometry, conv, stated, unit
from dstlib.engine.ops.feature_map import FeatureMap, activated
from dstlib.engine.ops.layouts import materialise
from dstlib.engine.ops.patterns import Pattern, Weights
from dstlib.layers import Shift, Unit

pytestmark = pytest.mark.usefixtures("path")
# Float32 rounds by 6e-8; Winograd's transforms multiply that by up to about 30. It is a share of what a sum could be
# at most, all its terms having one sign, since they may cancel.
SHARE = 2e-6
many = examples(20, 60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _part(x: Tensor) -> Tensor:
    """Depth last, with NaNs on all sides: whoever reads too far will show it."""
    n, c, d, h, w = x.shape
    whole = x.new_full((n + 1, c + 1, h + 2, w + 1, d + 3), torch.nan).permute(0, 1, 4, 2, 3)
    return whole[1:, 1:, 1 : d + 1, 1 : h + 1, 1:].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: x.contiguous(),
    "every other row": lambda x: x.repeat_interleave(2, dim=3)[:, :, :, ::2],
    "depth last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "part of a larger map": _part,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
}


def _random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A convolution: what Hypothesis shows of one that fails."""

    batch: int
    size: tuple[int, int, int]
    channels: tuple[int, ...]  # of each source
    normed: tuple[bool, ...]
    layouts: tuple[str, ...]  # of each source, and of the gradient
    outputs: int
    kernel: int
    stride: tuple[int, int, int]
    density: float
    graded: float
    biased: bool
    shifts: tuple[int, ...]
    seed: int

    def sources(self) -> list[FeatureMap]:
        found: list[FeatureMap] = []
        for i, count in enumerate(self.channels):
            x = LAYOUTS[self.layouts[i]](_random(self.batch, count, *self.size, seed=self.seed + i)).requires_grad_()
            scale, offset = _random(2, self.batch, count, seed=self.seed + 10 + i)
            norm = (scale.contiguous(), offset.contiguous(), 0.01) if self.normed[i] else None
            found.append(FeatureMap(x, norm))
        return found

    def masks(self) -> tuple[Tensor, Tensor]:
        """(O, C): active, and graded, which has at least the active ones where ``graded`` is not less than density."""
        chance = torch.rand(self.outputs, sum(self.channels), generator=torch.Generator().manual_seed(self.seed))
        return chance < self.density, chance < self.graded

    def weights(self) -> Weights:
        active, graded = map(Pattern.of, self.masks())
        shape = (self.outputs, sum(self.channels), 1, self.kernel, self.kernel)
        bias = _random(self.outputs, seed=self.seed + 5).requires_grad_() if self.biased else None
        return Weights(_random(*shape, seed=self.seed + 4).requires_grad_(), bias, active, graded)

    def geometry(self) -> Geometry:
        return Geometry(torch.tensor(self.shifts, dtype=torch.int32), self.stride)

    def grad(self, y: Tensor) -> Tensor:
        return LAYOUTS[self.layouts[-1]](_random(*y.shape, seed=self.seed + 6))


depths = st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 17, 24, 33]) | st.integers(1, 20)
layout_names = st.sampled_from(sorted(LAYOUTS))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = draw(st.tuples(depths, st.integers(1, 11), st.integers(1, 11)))
    channels = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count, total = len(channels), sum(channels)
    shift = st.integers(-3, 3) | st.sampled_from([-size[0], size[0], size[0] + 9, -size[0] - 9])
    return Case(
        batch=draw(st.integers(1, 2)),
        size=size,
        channels=tuple(channels),
        normed=tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count))),
        layouts=tuple(draw(st.lists(layout_names, min_size=count + 1, max_size=count + 1))),
        outputs=draw(st.integers(1, 11) | st.sampled_from([16, 25, 33])),  # some kernels take 16 alike at a time
        kernel=draw(st.sampled_from([1, 3])),
        stride=draw(st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 2, 1)])),
        density=draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        graded=draw(st.sampled_from([0.1, 0.6, 1.0])),
        biased=draw(st.booleans()),
        shifts=tuple(draw(st.lists(shift, min_size=total, max_size=total))),
        seed=draw(st.integers(0, 2**31)),
    )


def _moved(x: Tensor, shifts: Sequence[int]) -> Tensor:
    """Channel c at depth d is x at d - shifts[c], or zero: voxel plane by voxel plane."""
    depth = x.shape[2]
    zero = x[:, 0, 0] * 0  # in the graph even where nothing else is
    planes = [[x[:, c, d - s] if 0 <= d - s < depth else zero for d in range(depth)] for c, s in enumerate(shifts)]
    return torch.stack([torch.stack(each, dim=1) for each in planes], dim=1)


def _reference(case: Case, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    x = _moved(torch.cat(list(inputs), dim=1), case.shifts)
    return F.conv3d(x, weight, bias, case.stride, (0, case.kernel // 2, case.kernel // 2))


def _exact_inputs(sources: Sequence[FeatureMap]) -> list[Tensor]:
    """The activated sources in float64, as leaves."""
    doubles = [(x.double(), (n[0].double(), n[1].double(), n[2]) if n else None) for x, n in sources]
    return [activated(*each).detach().requires_grad_() for each in doubles]


def _assert_close(got: Tensor, exact: Tensor, most: Tensor, share: float = SHARE) -> None:
    """Within a share of the largest that the sums could be."""
    torch.testing.assert_close(got.double(), exact.detach(), rtol=0, atol=share * float(most) + 1e-30)


def _check(case: Case, dtype: torch.dtype = torch.float32, share: float = SHARE) -> None:
    sources, weights, geometry = case.sources(), case.weights(), case.geometry()
    if dtype != torch.float32:
        sources, weights = _as(dtype, sources, weights)
    active, graded = case.masks()
    exact, weight = _exact_inputs(sources), weights.weight.detach().double().requires_grad_()
    bias = None if weights.bias is None else weights.bias.detach().double().requires_grad_()
    y = conv(sources, weights, geometry).raw
    assert y.dtype == dtype
    expected = _reference(case, exact, weight * active[:, :, None, None, None], bias)
    largest = max(x.detach().abs().max() for x in exact)
    used = (weight * active[:, :, None, None, None]).detach().abs()
    extra = 0 if bias is None else bias.detach().abs().max()
    _assert_close(y.detach(), expected, used.sum((1, 2, 3, 4)).max() * largest + extra, share)
    grad = case.grad(y).to(dtype)
    y.backward(grad)
    wanted = _reference(case, exact, weight, None)  # the gradient of every connection
    (dense,) = torch.autograd.grad(wanted, weight, grad.double())
    expected.backward(grad.double())
    peak, total = grad.double().abs().max(), grad.double().abs().sum()
    for (x, _), one in zip(sources, exact, strict=True):
        _assert_close(x.grad, one.grad, used.sum((0, 2, 3, 4)).max() * peak, share)
    _assert_close(weights.weight.grad, dense * graded[:, :, None, None, None], largest * total, share)
    assert not weights.weight.grad[~graded].any()
    if bias is not None:
        _assert_close(weights.bias.grad, bias.grad, total, share)


def _affine(norm: nn.InstanceNorm3d) -> Affine:
    return norm.weight, norm.bias, norm.eps


def _as(dtype: torch.dtype, sources: Sequence[FeatureMap], weights: Weights) -> tuple[list[FeatureMap], Weights]:
    """The same numbers in another type."""
    to = lambda x: x.detach().to(dtype).requires_grad_()  # noqa: E731
    maps = [FeatureMap(to(x), (n[0].to(dtype), n[1].to(dtype), n[2]) if n else None) for x, n in sources]
    bias = None if weights.bias is None else to(weights.bias)
    return maps, Weights(to(weights.weight), bias, weights.active, weights.graded)


@many
@given(case=cases())
def test_convolution_and_all_its_gradients(case: Case):
    _check(case)


EXAMPLE = Case(
    batch=2,
    size=(9, 10, 7),
    channels=(3, 2, 4),
    normed=(True, False, True),
    layouts=("depth last",) * 4,
    outputs=9,
    kernel=3,
    stride=(1, 1, 1),
    density=0.5,
    graded=0.5,
    biased=True,
    shifts=(-1, -1, -1, 0, 0, 0, 1, 1, 1),
    seed=0,
)


def _varied(**changes: object) -> Case:
    return Case(**{**vars(EXAMPLE), **changes})


VARIANTS = {
    "winograd": EXAMPLE,
    "direct": _varied(kernel=1),
    "steps": _varied(stride=(2, 2, 2)),
    "flat steps": _varied(stride=(1, 2, 2)),
    "long steps": _varied(stride=(3, 2, 1)),
    "wide steps": _varied(
        stride=(2, 2, 2), size=(17, 5, 17), channels=(7, 2, 16), shifts=(0,) * 25, density=1.0, graded=1.0
    ),
    "nothing active": _varied(density=0.0, graded=1.0),
    "one channel": _varied(channels=(1,), shifts=(1,), outputs=1, density=1.0, graded=1.0),
    "many outputs": _varied(outputs=40, batch=1, size=(3, 2, 2)),
    "long": _varied(size=(70, 5, 6)),
}
variants = pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)


@variants
def test_well_known_cases(case: Case):
    _check(case)


@variants
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-14), (torch.bfloat16, 1e-2)], ids=["double", "half"])
def test_other_numbers_are_computed_by_torch(case: Case, dtype: torch.dtype, share: float):
    # bfloat16 rounds by 4e-3, inputs and results alike
    _check(case, dtype, share)


@variants
def test_graded_connections_are_those_asked_for(case: Case):
    sources, weights = case.sources(), case.weights()
    everything = Pattern.of(torch.ones(weights.weight.shape[:2], dtype=torch.bool))
    active, _ = case.masks()
    y = conv(sources, weights, case.geometry()).raw
    whole = Weights(weights.weight, weights.bias, weights.active, everything)
    grad = case.grad(y)
    (all_of_it,) = torch.autograd.grad(conv(sources, whole, case.geometry()).raw, weights.weight, grad)
    only = Weights(weights.weight, weights.bias, weights.active, weights.active)
    (some,) = torch.autograd.grad(conv(sources, only, case.geometry()).raw, weights.weight, grad)
    assert all_of_it[~active].any() or active.all()
    assert torch.equal(some[active], all_of_it[active])
    assert not some[~active].any()


def test_the_gradient_of_a_strided_input_by_hand():
    """Of four rows or columns the second is seen by both outputs; of depths every other one is seen."""
    x, full = torch.zeros(1, 1, 4, 4, 4, requires_grad=True), Pattern.of(torch.ones(1, 1, dtype=torch.bool))
    weights = Weights(torch.ones(1, 1, 1, 3, 3), None, full, full)
    moved = Geometry(torch.ones(1, dtype=torch.int32), (2, 2, 2))  # depths 0 and 2 read depths -1 and 1
    conv([FeatureMap(x)], weights, moved).raw.sum().backward()
    seen = torch.tensor([1.0, 2.0, 1.0, 1.0])
    depths = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert x.grad is not None
    assert torch.equal(x.grad[0, 0], depths[:, None, None] * seen[:, None] * seen)  # small whole numbers: exact


@pytest.mark.parametrize("wanted", ["source", "weight", "bias"])
def test_one_gradient_alone(wanted: str):
    """What is frozen gets none, and does not keep the others from theirs."""
    sources, weights = EXAMPLE.sources(), EXAMPLE.weights()
    leaves = {"source": sources[1].raw, "weight": weights.weight, "bias": weights.bias}
    together = conv(sources, weights, EXAMPLE.geometry()).raw
    grad = EXAMPLE.grad(together)
    (expected,) = torch.autograd.grad(together, leaves[wanted], grad)
    for x in (*(x for x, _ in sources), weights.weight, weights.bias):
        x.requires_grad_(x is leaves[wanted])
    (got,) = torch.autograd.grad(conv(sources, weights, EXAMPLE.geometry()).raw, leaves[wanted], grad)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("batch", [1, 2])
def test_unit_is_the_plain_one(kernel: int, stride: tuple[int, int, int], batch: int):
    torch.manual_seed(0)
    plain = Unit(9, 6, kernel_size=(1, kernel, kernel), stride=stride, shift=Shift((-1, 0, 1), axis=2))
    active = torch.rand(6, 9) < 0.5
    active[0], active[1, 0] = False, True  # a row without a connection is its bias alone, and has no variance
    with torch.no_grad():
        plain.conv.weight[~active] = 0
        plain.norm.weight.uniform_(0.5, 2)
        plain.norm.bias.normal_()
        plain.conv.bias.normal_()
    sources = _varied(batch=batch).sources()
    weights = Weights(plain.conv.weight, plain.conv.bias, Pattern.of(active), Pattern.of(active))
    geometry = Geometry(torch.tensor(EXAMPLE.shifts, dtype=torch.int32), stride)
    found = unit(sources, weights, geometry, _affine(plain.norm), 0.01)
    y = found.raw
    assert found.norm is not None
    double = Unit(9, 6, kernel_size=(1, kernel, kernel), stride=stride, shift=Shift((-1, 0, 1), axis=2)).double()
    double.load_state_dict(plain.state_dict())
    exact = _exact_inputs(sources)
    expected = double(torch.cat(exact, dim=1))
    # outputs round by 1e-7, and instance norms divide by deviations of 0.02 to 1, the empty row by √1e-5
    torch.testing.assert_close(
        materialise(FeatureMap(y.detach(), found.norm)).double(), expected.detach(), rtol=2e-5, atol=2e-5
    )
    grad = EXAMPLE.grad(y) * (expected.detach().abs() > 1e-3)  # at the kink either slope is right
    y.backward(grad)
    expected.backward(grad.double())
    for (x, _), one in zip(sources, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), one.grad, rtol=1e-3, atol=1e-4 * one.grad.abs().max().item())
    for name in ("norm.weight", "norm.bias", "conv.weight"):
        got, one = plain.get_parameter(name).grad, double.get_parameter(name).grad
        kept = one if name != "conv.weight" else one * active[:, :, None, None, None]
        torch.testing.assert_close(got.double(), kept, rtol=1e-3, atol=1e-4 * one.abs().max().item())
    # The norm takes away any bias: its gradient is zero but for the rounding of 1260 terms of about 1, and in the
    # empty row of about 1 / √1e-5.
    assert plain.conv.bias.grad[1:].abs().max() < 1e-2
    assert plain.conv.bias.grad.abs().max() < 0.1


@many
@given(case=cases())
def test_a_prepared_convolution_gives_the_same(case: Case):
    voxels = math.prod(-(-extent // step) for extent, step in zip(case.size, case.stride, strict=True))
    assume(voxels > 1)  # of one there is no instance norm
    weights, geometry = case.weights(), case.geometry()
    affine = (_random(case.outputs, seed=1), _random(case.outputs, seed=2), 1e-5)
    for seed in (1, 2):  # the second call was prepared by the first
        sources = case.sources()
        for x, _ in sources:
            x.data.copy_(_random(*x.shape, seed=case.seed + 100 * seed))
        with torch.no_grad():
            y, statistics = CONV(*stated(sources, weights, geometry, affine, 0.01))
            found, alone = unit(sources, weights, geometry, affine, 0.01), conv(sources, weights, geometry)
            assert torch.equal(found.raw, y)
            assert torch.equal(alone.raw, y)
            assert found.norm is not None
            assert torch.equal(found.norm[0], statistics[0])
            assert torch.equal(found.norm[1], statistics[1])
            assert found.norm[2] == 0.01


def test_prepared_calls_see_every_change_of_parameters():
    sources, weights, geometry = EXAMPLE.sources(), EXAMPLE.weights(), EXAMPLE.geometry()
    gamma, beta = _random(9, seed=1), _random(9, seed=2)

    def outputs(*, anew: bool) -> list[Tensor]:
        used = Weights(weights.weight, weights.bias, weights.active, weights.graded) if anew else weights
        found = unit(sources, used, geometry, (gamma, beta, 1e-5), 0.01)
        return [found.raw.clone(), materialise(found)]

    with torch.no_grad():
        before = outputs(anew=False)
        for parameter in (weights.weight, weights.bias, gamma, beta):
            parameter.mul_(1.5)
            after = outputs(anew=False)
            assert not all(map(torch.equal, before, after))
            assert all(map(torch.equal, after, outputs(anew=True)))
            before = after
        weights.weight.data = weights.weight.data + 1  # memory elsewhere, which no version counts
        assert all(map(torch.equal, outputs(anew=False), outputs(anew=True)))


def test_prepared_calls_keep_no_maps_alive():
    sources, weights, geometry = EXAMPLE.sources(), EXAMPLE.weights(), EXAMPLE.geometry()
    affine = (_random(9, seed=1), _random(9, seed=2), 1e-5)
    whole = Pattern.of(torch.ones(2, 9, dtype=torch.bool))
    after = Weights(_random(2, 9, 1, 1, 1, seed=3), None, whole, whole)
    with torch.no_grad():
        found = unit(sources, weights, geometry, affine, 0.01)
        conv([found], after, Geometry(torch.zeros(9, dtype=torch.int32)))
        alive = [weakref.ref(x) for x in (found, found.raw, found.norm[0], *(x.raw for x in sources))]
        del found, sources
        gc.collect()
    assert not any(x() is not None for x in alive)


def test_results_of_prepared_calls_have_memory_of_their_own():
    sources, weights, geometry = EXAMPLE.sources(), EXAMPLE.weights(), EXAMPLE.geometry()
    with torch.no_grad():
        first = conv(sources, weights, geometry).raw
        kept = first.clone()
        sources[0].raw.add_(1)
        assert not torch.equal(conv(sources, weights, geometry).raw, kept)
        assert torch.equal(first, kept)


@pytest.mark.parametrize("name", ["winograd", "steps"])
def test_operators_keep_torchs_rules(name: str):
    """Fake tensors, autograd and schemas, as torch.compile and torch.export rely on them."""
    case = VARIANTS[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    affine = (torch.ones(9, requires_grad=True), torch.zeros(9, requires_grad=True), 1e-5)
    for asked in (None, affine):
        problem, tensors = stated(case.sources(), case.weights(), case.geometry(), asked, 0.01)
        torch.library.opcheck(torch.ops.dstlib.conv.default, (tensors, problem.packed()), test_utils=tests)


def test_compiled_functions_call_the_operators():
    weights, geometry, norm = EXAMPLE.weights(), EXAMPLE.geometry(), nn.InstanceNorm3d(9, affine=True)
    unbiased = Weights(weights.weight, None, *[weights.active] * 2)
    _ = weights.active.transposed  # made now, since torch.compile cannot follow how
    sources = EXAMPLE.sources()

    def network(*maps: Tensor) -> Tensor:
        given = [FeatureMap(x, norm) for x, (_, norm) in zip(maps, sources, strict=True)]
        y = conv(given, weights, geometry)
        return materialise(unit([y], unbiased, geometry, _affine(norm), 0.1))

    maps = [x for x, _ in sources]
    once = network(*maps)
    again = torch.compile(network, backend="aot_eager", fullgraph=True)(*maps)
    torch.testing.assert_close(again, once)
    one, other = (torch.autograd.grad(y.square().sum(), [*maps, weights.weight]) for y in (once, again))
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-3)  # sums in another order


def test_maps_larger_than_the_caches():
    """They are written past the caches, and rows of them are padded."""
    x, weight, bias = _random(1, 3, 16, 120, 128, seed=0), _random(9, 3, 1, 3, 3, seed=1), _random(9, seed=2)
    active = Pattern.of(_random(9, 3, seed=3) > 0)
    weight *= torch.zeros(27).index_fill(0, active.index, 1).reshape(9, 3, 1, 1, 1)
    norm = nn.InstanceNorm3d(9, affine=True)
    geometry = Geometry(torch.zeros(3, dtype=torch.int32))
    with torch.no_grad():
        found = unit([FeatureMap(x)], Weights(weight, bias, active, active), geometry, _affine(norm), 0.01)
        wanted = F.conv3d(x.double(), weight.double(), bias.double(), padding=(0, 1, 1))
        torch.testing.assert_close(found.raw.double(), wanted, rtol=0, atol=27 * 9 * SHARE)  # terms are of size 1 to 9
        torch.testing.assert_close(
            materialise(found), F.leaky_relu(norm(wanted.float()), 0.01), rtol=0, atol=1e-4
        )  # sums over 245,760 voxels


def test_no_samples_give_no_outputs_and_no_gradients():
    active = Pattern.of(torch.ones(5, 3, dtype=torch.bool))
    for kernel in (1, 3):
        x, weight = torch.zeros(0, 3, 4, 6, 5), torch.ones(5, 3, 1, kernel, kernel, requires_grad=True)
        weights = Weights(weight, None, active, active)
        y = conv([FeatureMap(x)], weights, Geometry(torch.zeros(3, dtype=torch.int32))).raw
        assert y.shape == (0, 5, 4, 6, 5)
        y.sum().backward()
        assert weight.grad is not None
        assert not weight.grad.any()


def _results(case: Case) -> list[Tensor]:
    """The norm, outputs and all gradients."""
    sources, weights, geometry = case.sources(), case.weights(), case.geometry()
    affine = (torch.ones(case.outputs), torch.zeros(case.outputs), 1e-5)
    with torch.no_grad():
        _, normed = CONV(*stated(sources, weights, geometry, affine))
    y = conv(sources, weights, geometry).raw
    leaves = [*(x for x, _ in sources), weights.weight, weights.bias]
    return [normed, y.detach(), *torch.autograd.grad(y, leaves, case.grad(y))]


@variants
def test_results_are_the_same_each_time_with_any_threads(case: Case, path: str):
    before = torch.get_num_threads()
    alone, again = _results(case), _results(case)
    try:
        torch.set_num_threads(2)
        together = _results(case)
    finally:
        torch.set_num_threads(before)
    stepped = case.stride != (1, 1, 1)  # torch's own gradient of the input
    for i, (one, two, other) in enumerate(zip(alone, again, together, strict=True)):
        assert torch.equal(one, two)
        if path != "torch" and not (stepped and 2 <= i < 2 + len(case.channels)):
            assert torch.equal(one, other)


def test_two_callers_at_once():
    examples = [EXAMPLE, VARIANTS["steps"], VARIANTS["direct"], VARIANTS["long"]] * 4
    alone = [_results(case) for case in examples]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(_results, examples))
    for one, other in zip(alone, together, strict=True):
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left, right)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is guarded by Linux's mprotect")
def test_nothing_beyond_the_ends_is_read_or_written(path: str, tmp_path: Path):
    """In a process of its own, a fork: one value too far ends it."""
    seen = tmp_path / "seen"
    child = multiprocessing.get_context("fork").Process(target=_run_all_between_guards, args=(seen,))
    child.start()
    child.join()
    assert child.exitcode == 0, f"{path}: {seen.read_text()}"


def _guarded(size: Sequence[int], *, at_end: bool) -> Tensor:
    """An empty tensor whose last (first) value is followed (preceded) by memory that nobody may touch."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    num = torch.Size(size).numel()
    pages = -(-4 * num // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for offset in (0, (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(start + offset), page, 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.float32, count=pages * page // 4, offset=page)
    return (whole[whole.numel() - num :] if at_end else whole[:num]).view(*size)


def _guarded_map(size: Sequence[int], *, at_end: bool) -> Tensor:
    return _guarded((*size[:2], *size[3:], size[2]), at_end=at_end).permute(0, 1, 4, 2, 3)


def _guarded_cases() -> Iterator[Case]:
    for kernel, stride in ((1, (1, 1, 1)), (3, (1, 1, 1)), (3, (1, 2, 2)), (3, (2, 2, 2)), (1, (2, 2, 2))):
        for size in ((1, 1, 1), (3, 3, 3), (8, 4, 5), (13, 7, 9), (17, 2, 1), (33, 5, 8)):
            for shift in (0, 1, -1, 5, -40):
                shifts = (shift, -shift, 0, shift, 0, 1, -1, 1, shift)
                yield _varied(kernel=kernel, stride=stride, size=size, shifts=shifts)


def _run_between_guards(case: Case, *, at_end: bool) -> None:
    place = lambda x: _guarded(x.shape, at_end=at_end).copy_(x.detach()).requires_grad_()  # noqa: E731
    on_map = lambda x: _guarded_map(x.shape, at_end=at_end).copy_(x.detach()).requires_grad_()  # noqa: E731
    feature_map.buffer = prepared.buffer = lambda num: _guarded((num,), at_end=at_end)
    weights = case.weights()
    weights = Weights(place(weights.weight), place(weights.bias), weights.active, weights.graded)
    y = conv([FeatureMap(on_map(x), norm) for x, norm in case.sources()], weights, case.geometry()).raw
    y.backward(on_map(case.grad(y)).detach())


def _run_all_between_guards(seen: Path) -> None:
    for each in _guarded_cases():
        seen.write_text(str(each))  # the last one seen is the one that went too far
        for end in (True, False):
            _run_between_guards(each, at_end=end)

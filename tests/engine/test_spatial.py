"""What happens between convolutions, by every path of the engine, beside float64 torch.

Shapes: N batch, C input channels, O output channels, D, H, W depth, height, width.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops import conv_transpose as transposed
from dstlib.engine.ops import feature_map, instance_norm, layouts, prepared
from dstlib.engine.ops import max_pool as pooling
from dstlib.engine.ops.conv_transpose import conv_transpose
from dstlib.engine.ops.feature_map import FeatureMap, Norm, activated
from dstlib.engine.ops.instance_norm import InstanceNormProblem, instance_norm_backward
from dstlib.engine.ops.layouts import (
    ActivationProblem,
    LayoutProblem,
    materialise,
    to_channels_first,
    to_depth_last,
    to_images,
)
from dstlib.engine.ops.max_pool import max_pool
from dstlib.engine.ops.patterns import Pattern, Weights
from dstlib.errors import SettingError

Size = tuple[int, int, int, int, int]
# float32 rounds each product and sum by 6e-8 of it; sums here have up to a few hundred terms of size 1 to 10
CLOSE = {"rtol": 1e-5, "atol": 2e-5}
pytestmark = pytest.mark.usefixtures("path")
many = examples(15, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: x.contiguous(),
    "depth last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "part of a larger map": lambda x: _part(x),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
}


def _part(x: Tensor) -> Tensor:
    """Depth last, with NaNs on all sides: whoever reads too far will show it."""
    n, c, d, h, w = x.shape
    whole = x.new_full((n + 1, c + 1, h + 2, w + 1, d + 3), torch.nan).permute(0, 1, 4, 2, 3)
    part = whole[1:, 1:, 1 : d + 1, 1 : h + 1, 1:]
    return part.copy_(x)


layout_names = st.sampled_from(sorted(LAYOUTS))
depths = st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 20, 33, 64]) | st.integers(1, 40)
sizes = st.tuples(st.integers(1, 2), st.integers(1, 6), depths, st.integers(1, 6), st.integers(1, 6))
steps = st.tuples(*[st.integers(1, 2)] * 3) | st.tuples(*[st.integers(1, 4)] * 3)
slopes = st.sampled_from([0.0, 0.01, 0.3, 1.0])
seeds = st.integers(0, 2**32 - 1)


def _random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _norm(size: Size, slope: float, seed: int) -> Norm:
    return _random(*size[:2], seed=seed + 1), _random(*size[:2], seed=seed + 2), slope


def _exact(x: Tensor, norm: Norm | None) -> Tensor:
    """The activated map in float64, a leaf."""
    double = (norm[0].double(), norm[1].double(), norm[2]) if norm else None
    return activated(x.double(), double).detach().requires_grad_()


def _mask(outputs: int, inputs: int, seed: int) -> Tensor:
    """About half of the pattern, the last output without any."""
    mask = _random(outputs, inputs, seed=seed + 3) > 0
    mask[-1] = False
    return mask


def _upsample(x: Tensor, norm: Norm | None, weight: Tensor, pattern: Pattern, stride: Sequence[int]) -> Tensor:
    depth, height, width = stride
    weights = Weights(weight, None, pattern, pattern)
    return conv_transpose(FeatureMap(x, norm), weights, (depth, height, width)).raw


def _assert_close(got: Tensor, exact: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(got.double(), exact.detach(), **(tolerance or CLOSE))


@many
@given(size=sizes, layout=layout_names, seed=seeds)
def test_layouts_hold_the_same_values(size: Size, layout: str, seed: int):
    x = LAYOUTS[layout](_random(*size, seed=seed))
    last, first = to_depth_last(x), to_channels_first(x)
    assert torch.equal(last, x)
    assert torch.equal(first, x)
    assert last.stride(2) == 1 or size[2] == 1
    assert first.is_contiguous()
    assert torch.equal(to_channels_first(last), x)
    images = to_images(last[:1])
    assert torch.equal(images, x[0].transpose(0, 1))
    assert images.is_contiguous()


@many
@given(size=sizes, layout=layout_names, slope=slopes, seed=seeds)
def test_materialise_writes_what_readers_see(size: Size, layout: str, slope: float, seed: int):
    x, norm = LAYOUTS[layout](_random(*size, seed=seed)), _norm(size, slope, seed)
    z = materialise(FeatureMap(x, norm))
    _assert_close(z, _exact(x, norm))
    assert z.stride(2) == 1 or size[2] == 1
    assert torch.equal(materialise(FeatureMap(x)), x)


@many
@given(size=sizes, layout=layout_names, window=steps, slope=slopes, seed=seeds, with_norm=st.booleans())
def test_max_pool_and_its_gradient(
    size: Size, layout: str, window: Sequence[int], slope: float, seed: int, with_norm: bool
):
    window = tuple(min(step, extent) for step, extent in zip(window, size[2:], strict=True))
    # few different values: many ties, and with a slope of 0 many more
    x = LAYOUTS[layout](_random(*size, seed=seed).mul(2).round()).requires_grad_()
    norm = (torch.full(size[:2], 2.0), torch.full(size[:2], -1.0), slope) if with_norm else None
    exact = _exact(x, norm)
    y, expected = max_pool(FeatureMap(x, norm), window).raw, F.max_pool3d(exact, window)
    _assert_close(y, expected, rtol=0, atol=1e-6)  # one rounding
    grad = _random(*y.shape, seed=seed + 5)
    y.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(x.grad.double(), exact.grad)


@many
@given(size=sizes, layout=layout_names, steps=st.tuples(*[st.integers(1, 2)] * 3), seed=seeds, with_norm=st.booleans())
def test_prepared_calls_give_the_same(size: Size, layout: str, steps: Sequence[int], seed: int, with_norm: bool):
    window = tuple(min(step, extent) for step, extent in zip(steps, size[2:], strict=True))
    weight, pattern = _random(size[1], 3, *steps, seed=seed), Pattern.of(_mask(3, size[1], seed))
    weights = Weights(weight, None, pattern, pattern)
    for again in (0, 10):  # the second call was prepared by the first
        x = LAYOUTS[layout](_random(*size, seed=seed + again))
        norm = _norm(size, 0.1, seed + again) if with_norm else None
        pooled = max_pool(FeatureMap(x, norm), window).raw
        fine = conv_transpose(FeatureMap(x, norm), weights, steps).raw
        recorded = FeatureMap(x.detach().requires_grad_(), norm)
        assert torch.equal(pooled, max_pool(recorded, window).raw)
        assert torch.equal(fine, conv_transpose(recorded, weights, steps).raw)


@pytest.mark.parametrize("depth", [2, 40])
@pytest.mark.parametrize("window", [(1, 2, 2), (2, 2, 2), (2, 1, 1)])
def test_max_pool_passes_a_nan_on_as_torch_does(depth: int, window: tuple[int, int, int]):
    x = _random(1, 2, depth, 4, 4, seed=0)
    x[x > 1] = torch.nan
    x = to_depth_last(x).requires_grad_()
    again = x.detach().clone().requires_grad_()
    y, expected = max_pool(FeatureMap(x), window).raw, F.max_pool3d(again, window)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, again.grad)


@many
@given(size=sizes, outputs=st.integers(1, 5), layout=layout_names, stride=steps, seed=seeds, with_norm=st.booleans())
def test_conv_transpose_and_its_gradients(
    size: Size, outputs: int, layout: str, stride: Sequence[int], seed: int, with_norm: bool
):
    x = LAYOUTS[layout](_random(*size, seed=seed)).requires_grad_()
    norm = _norm(size, 0.01, seed) if with_norm else None
    mask_OC = _mask(outputs, size[1], seed)
    weight = _random(size[1], outputs, *stride, seed=seed + 4).requires_grad_()
    exact, exact_weight = _exact(x, norm), weight.detach().double().requires_grad_()
    y = _upsample(x, norm, weight, Pattern.of(mask_OC), stride)
    kept = exact_weight * mask_OC.T[:, :, None, None, None]
    expected = F.conv_transpose3d(exact, kept, stride=tuple(stride))
    _assert_close(y, expected)
    assert y.stride(2) == 1 or y.shape[2] == 1
    grad = LAYOUTS[layout](_random(*y.shape, seed=seed + 5))
    y.backward(grad)
    expected.backward(grad.double())
    _assert_close(x.grad, exact.grad)
    # sums over all voxels of the map: the absolute error grows with them
    _assert_close(weight.grad, exact_weight.grad, rtol=1e-5, atol=1e-4)
    assert not weight.grad[~mask_OC.T].any()


@many
@given(size=sizes, layout=layout_names, slope=slopes, seed=seeds)
def test_instance_norm_backward_is_that_of_instance_norm_and_leaky_relu(
    size: Size, layout: str, slope: float, seed: int
):
    if size[2] * size[3] * size[4] == 1:
        size = (*size[:2], size[2] + 1, *size[3:])  # one voxel has no deviation
    y = LAYOUTS[layout](_random(*size, seed=seed) * 2 + 3)
    gamma, beta, eps = _random(size[1], seed=seed + 1), _random(size[1], seed=seed + 2), 1e-2
    dz = LAYOUTS[layout](_random(*size, seed=seed + 3))
    exact = [x.double().requires_grad_() for x in (y, gamma, beta)]
    z = F.leaky_relu(F.instance_norm(exact[0], weight=exact[1], bias=exact[2], eps=eps), slope)
    z.backward(dz.double())
    var, mean = torch.var_mean(y.double(), dim=(2, 3, 4), correction=0)
    rstd = (var + eps).rsqrt()
    scale = gamma * rstd
    norm = (scale.float(), (beta - scale * mean).float(), slope)
    # A voxel at the kink may take the other slope in float32: give those no gradient.
    off_kink = (F.instance_norm(y.double(), weight=gamma.double(), bias=beta.double(), eps=eps).abs() > 1e-4).all()
    got = instance_norm_backward(FeatureMap(y, norm), dz, mean.float(), rstd.float(), gamma)
    if off_kink:
        for one, leaf in zip(got, exact, strict=True):
            _assert_close(one, leaf.grad, rtol=1e-4, atol=2e-4)  # rstd is up to 10 here, and enters squared


def test_instance_norm_backward_at_zero_is_the_slope():
    y, dz = torch.zeros(1, 1, 9, 2, 2), torch.ones(1, 1, 9, 2, 2)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert instance_norm_backward(FeatureMap(y, (one, zero, 0.25)), dz, zero, one, one[0])[2].item() == 9.0


def test_threads_share_the_work():
    size = (2, 24, 16, 24, 24)
    x, weight = _random(*size, seed=0), _random(24, 8, 2, 2, 2, seed=1)
    norm, pattern = _norm(size, 0.01, 0), Pattern.of(_mask(8, 24, 0))

    def results() -> list[Tensor]:
        z, kernels = x.clone().requires_grad_(), weight.clone().requires_grad_()
        pooled, up = max_pool(FeatureMap(z, norm), (2, 2, 2)).raw, _upsample(z, norm, kernels, pattern, (2, 2, 2))
        (pooled.square().sum() + up.square().sum()).backward()
        back = instance_norm_backward(FeatureMap(x, norm), x, norm[1], norm[0], norm[0][0])
        layouts = [to_depth_last(x), to_channels_first(to_depth_last(x)), materialise(FeatureMap(x, norm))]
        return [pooled, up, z.grad, kernels.grad, *back, *layouts]

    before = torch.get_num_threads()
    alone = results()
    try:
        torch.set_num_threads(4)
        together = results()
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, together, strict=True):
        # only the weights' gradient is summed in shares; 4e5 terms
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)


def test_large_maps_are_written_past_the_caches(path: str):
    """16 MiB and more: the streaming stores, of depths that are whole vectors and of others."""
    if path == "torch":
        pytest.skip("there are no stores to choose")
    for depth in (32, 36):
        size = (2, 8, depth, 32, 64)
        x, weight = to_depth_last(_random(*size, seed=0)), _random(8, 8, 2, 2, 2, seed=1)
        norm = _norm(size, 0.01, 0)
        exact = _exact(x, norm)
        up = _upsample(x, norm, weight, Pattern.of(torch.ones(8, 8, dtype=torch.bool)), (2, 2, 2))
        _assert_close(up, F.conv_transpose3d(exact, weight.double(), stride=2))
        flat = _upsample(x, norm, weight[:, :, :1], Pattern.of(torch.ones(8, 8, dtype=torch.bool)), (1, 2, 2))
        _assert_close(flat, F.conv_transpose3d(exact, weight[:, :, :1].double(), stride=(1, 2, 2)))
        ones = torch.ones(2, 8)
        _assert_close(materialise(FeatureMap(up, (ones, ones, 0.5))), _exact(up, (ones, ones, 0.5)))


def test_other_numbers_are_left_to_torch():
    x = _random(1, 3, 3, 2, 2, seed=0).double().requires_grad_()
    weight = _random(3, 2, 2, 2, 2, seed=1).double().requires_grad_()
    norm = (torch.rand(1, 3).double() + 0.5, torch.rand(1, 3).double(), 1.0)
    pattern = Pattern.of(torch.tensor([[True, False, True], [True, True, False]]))
    # slope 1: there is no kink, and the gradient of the activated map is that of x over scale
    plain = lambda x, weight: _upsample(x, None, weight, pattern, (2, 2, 2))  # noqa: E731
    inactive = torch.tensor([[False, False], [True, False], [False, True]])
    with torch.no_grad():
        weight[inactive] = 0
    assert torch.autograd.gradcheck(lambda x: plain(x, weight), x)
    assert torch.autograd.gradcheck(lambda x: max_pool(FeatureMap(x), (2, 2, 2)).raw, x)
    assert materialise(FeatureMap(x.detach(), norm)).dtype == torch.float64


def test_values_of_autograd_are_activated_maps():
    x, norm = _random(1, 2, 3, 4, 5, seed=0).requires_grad_(), _norm((1, 2, 3, 4, 5), 0.01, 0)
    for out in (materialise(FeatureMap(x, norm)), to_depth_last(x), to_channels_first(to_depth_last(x))):
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is guarded by Linux's mprotect")
@pytest.mark.parametrize(
    "size", [(1, 2, 3, 3, 3), (2, 3, 17, 2, 3), (1, 1, 8, 1, 1), (1, 2, 13, 4, 4), (1, 1, 1, 5, 3)]
)
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 1, 1)])
def test_nothing_beyond_the_end_is_read_or_written(
    size: Size, stride: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    """Maps end where readable memory does, so that one value too far ends the process."""
    window = tuple(min(step, extent) for step, extent in zip(stride, size[2:], strict=True))
    with_end = lambda size, like: _guarded((*size[:2], *size[3:], size[2])).permute(0, 1, 4, 2, 3)  # noqa: E731
    for module in (feature_map, layouts, prepared):
        monkeypatch.setattr(module, "buffer", lambda num: _guarded((num,)))
    plain = _guarded(size).copy_(_random(*size, seed=0))
    x = with_end(size, plain).copy_(plain).requires_grad_()
    weight = _guarded((size[1], 3, *stride)).copy_(_random(size[1], 3, *stride, seed=1)).requires_grad_()
    norm = _norm(size, 0.01, 0)
    assert torch.equal(to_depth_last(plain), plain)
    assert torch.equal(to_channels_first(x.detach()), plain)
    _assert_close(materialise(FeatureMap(x.detach(), norm)), _exact(x, norm))
    pattern = Pattern.of(torch.ones(3, size[1], dtype=torch.bool))
    for y in (_upsample(x, norm, weight, pattern, stride), max_pool(FeatureMap(x, norm), window).raw):
        y.backward(with_end(tuple(y.shape), y).copy_(y.detach()))
    dy, _, _ = instance_norm_backward(FeatureMap(x.detach(), norm), x.detach(), norm[1], norm[0], norm[0][0].clone())
    assert dy.isfinite().all()


def _guarded(size: Sequence[int]) -> Tensor:
    """An empty tensor whose last value is followed by memory that nobody may touch."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    num_bytes = 4 * torch.Size(size).numel()
    pages = -(-num_bytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.float32, count=pages * page // 4)
    return whole[pages * page // 4 - num_bytes // 4 :].view(*size)


def test_shapes_that_do_not_fit_are_named():
    x, weight, both = torch.zeros(2, 3, 4, 4, 4), torch.zeros(3, 2, 2, 2, 2), Pattern.of(torch.ones(2, 3) > 0)
    with pytest.raises(SettingError, match=r"norm of a map: expected both \(N, C\) = \(2, 3\), got scale \(1, 3\)"):
        materialise(FeatureMap(x, (torch.ones(1, 3), torch.ones(2, 3), 0.1)))
    with pytest.raises(SettingError, match=r"weight of conv_transpose\(\): expected \(3, 2, 1, 2, 2\)"):
        _upsample(x, None, weight, both, (1, 2, 2))
    with pytest.raises(SettingError, match=r"expected \(3, 3, 2, 2, 2\), by channels, pattern and stride"):
        _upsample(x, None, weight, both.transposed, (2, 2, 2))


def test_operators_keep_torchs_rules():
    """Fake tensors, autograd and schemas, as torch.compile and torch.export rely on them."""
    size = (1, 2, 3, 4, 4)
    x, norm = to_depth_last(_random(*size, seed=0)).requires_grad_(), [*_norm(size, 0.01, 0)[:2]]
    weight = _random(2, 3, 2, 2, 2, seed=1).requires_grad_()
    rows = Pattern.of(_mask(3, 2, 0)).tensors[:2]
    normed = {"normed": (True,), "slopes": (0.01,)}
    strided = transposed.ConvTransposeProblem(**normed, stride=(2, 2, 2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, problem, tensors in (
        (transposed.CONV_TRANSPOSE, strided, [x, *norm, weight, *rows, *rows]),
        (pooling.MAX_POOL, pooling.MaxPoolProblem(window=(2, 2, 2), **normed), [x, *norm]),
        (layouts.ACTIVATION, ActivationProblem(**normed), [x, *norm]),
        (layouts.TO_CHANNELS_FIRST, LayoutProblem(), [x]),
        (layouts.TO_DEPTH_LAST, LayoutProblem(), [x.contiguous()]),
        (layouts.TO_IMAGES, LayoutProblem(), [x]),
        (
            instance_norm.INSTANCE_NORM_BACKWARD,
            InstanceNormProblem(0.01),
            [x.detach(), *norm, *norm, norm[0][0].clone(), x.detach()],
        ),
    ):
        torch.library.opcheck(op.registered.default, (tensors, problem.packed()), test_utils=tests)


def test_compiled_networks_call_the_operators(path: str):
    weight, pattern = _random(2, 3, 2, 2, 2, seed=1).requires_grad_(), Pattern.of(_mask(3, 2, 0))
    norm, weights = _norm((1, 2, 3, 4, 4), 0.01, 0), Weights(weight, None, pattern, pattern)

    def network(x: Tensor) -> Tensor:
        z = materialise(FeatureMap(to_depth_last(x), norm))
        fine = conv_transpose(FeatureMap(z, norm), weights, (2, 2, 2))
        return to_channels_first(max_pool(fine, (1, 2, 2)).raw)

    x = _random(1, 2, 3, 4, 4, seed=0).requires_grad_()
    once = network(x)
    again = torch.compile(network, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(again, once)
    one, other = (torch.autograd.grad(y.square().sum(), (x, weight)) for y in (once, again))
    torch.testing.assert_close(one, other)

"""Sparse linear layers compute what a dense layer with masked weights computes, for every pattern, shape and path.

Shapes: O outputs, I inputs, N samples.
"""

import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import dstlib
from dstlib.engine.layers.linear import SparseLinear
from dstlib.engine.ops import operator as calls
from dstlib.engine.ops.linear import LINEAR, LINEAR_BACKWARD_WEIGHTS, LinearProblem
from dstlib.engine.ops.linear_patterns import LinearPattern
from dstlib.engine.runtime import library
from dstlib.masking import Element, FanIn

RELATIVE = 1e-5  # float32 has 6e-8 per operation; sums of up to 600 terms, in any order, stay far below this
DENSITIES = st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0])
PATHS = ["best", "generic", "torch"]
BLOCKS = [(1, 1), (2, 3), (3, 1), (4, 4), (5, 2), (16, 16), (1, 8), (12, 5)]


@contextlib.contextmanager
def computing_by(path: str) -> Iterator[None]:
    """Computes with the best kernels there are, with the generic ones, or with torch alone."""
    built = library._library()
    if path != "torch" and built is None:
        pytest.skip("the kernels were not built")
    chosen = None if path == "torch" else library._kernels(built, None if path == "best" else path)
    with mock.patch.object(calls, "kernels", return_value=chosen):
        yield


def random_mask(size: tuple[int, int], block: tuple[int, int], density: float, seed: int) -> Tensor:
    """Blocks on or off by chance; ``size`` counts blocks."""
    on = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density
    return on.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def layer(mask_OI: Tensor, *, bias: bool = True, seed: int = 0) -> SparseLinear:
    """A layer with random weights everywhere, also where the mask says that they are not read."""
    torch.manual_seed(seed)
    return SparseLinear(nn.Linear(mask_OI.shape[1], mask_OI.shape[0], bias=bias), mask_OI)


def assert_close(given: Tensor, expected: Tensor) -> None:
    assert given.shape == expected.shape
    if expected.numel():
        assert (given.double() - expected).abs().max() <= RELATIVE * (1 + expected.abs().max())


def assert_right(sparse: SparseLinear, mask_OI: Tensor, x: Tensor) -> None:
    """Output and gradients against the dense layer in double precision."""
    x = x.detach().requires_grad_()
    exact = [
        t.detach().double().requires_grad_()
        for t in (x, sparse.weight, *([] if sparse.bias is None else [sparse.bias]))
    ]
    expected = F.linear(exact[0], exact[1] * mask_OI, *exact[2:])
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, exact, towards.double())
    y = sparse(x)
    grads = torch.autograd.grad(y, [x, *sparse.parameters()], towards)
    assert_close(y.detach(), expected.detach())
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad)
    assert not grads[1][~mask_OI].any()
    sparse.eval()
    with torch.no_grad():
        for _ in range(2):  # gathers the weights, then reads those
            assert_close(sparse(x), expected.detach())
    sparse.train()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 80), DENSITIES, st.booleans(), st.integers(0, 99))
def test_output_and_gradients_are_those_of_the_masked_layer(path, block, o, i, n, density, bias, seed):
    mask_OI = random_mask((o, i), block, density, seed)
    with computing_by(path):
        assert_right(layer(mask_OI, bias=bias), mask_OI, torch.randn(n, mask_OI.shape[1]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 33, 64, 65, 130, 300])
def test_batches_of_every_width(path, n):
    mask_OI = random_mask((203, 330), (1, 1), 0.1, n)
    with computing_by(path):
        assert_right(layer(mask_OI), mask_OI, torch.randn(n, 330))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5), (2, 0, 5), (1, 1, 1, 5)], ids=str)
def test_inputs_of_every_shape(path, shape):
    mask_OI = random_mask((7, 5), (1, 1), 0.5, 0)
    with computing_by(path):
        assert_right(layer(mask_OI), mask_OI, torch.randn(shape))


@pytest.mark.parametrize("path", PATHS)
def test_inputs_of_every_layout(path):
    mask_OI = random_mask((20, 24), (1, 1), 0.3, 0)
    whole = torch.randn(48, 30)
    layouts = {"transposed": whole.t()[:, :24], "strided": whole.t()[:, ::2], "rows": whole[::3, :24]}
    layouts["expanded"] = whole[:1, :24].expand(9, 24)
    layouts["one column"] = whole[:, :1].expand(48, 24)
    with computing_by(path):
        for x in layouts.values():
            assert_right(layer(mask_OI), mask_OI, x)


@pytest.mark.parametrize("path", PATHS)
def test_expanded_gradients_and_a_strided_weight(path):
    mask_OI = random_mask((20, 24), (1, 1), 0.3, 0)
    sparse, x = layer(mask_OI), torch.randn(9, 24)
    sparse.weight = nn.Parameter(sparse.weight.detach().t().contiguous().t())
    with computing_by(path):
        assert_right(sparse, mask_OI, x)
        sparse(x).sum().backward()  # an expanded gradient, all strides 0
    expected = (x.sum(0) * mask_OI).double()
    assert_close(sparse.weight.grad, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [(1, 1), (0, 3), (3, 0)], ids=str)
def test_layers_with_hardly_anything(path, size):
    mask_OI = torch.ones(size, dtype=torch.bool)
    with computing_by(path):
        assert_right(layer(mask_OI), mask_OI, torch.randn(4, size[1]))


def test_memory_around_the_tensors_stays_as_it_was():
    sparse, guard = layer(random_mask((37, 29), (1, 1), 0.2, 0)).eval(), float("inf")
    padded = torch.full((13 + 2, 29 + 5), guard)  # what is read by mistake makes the output infinite
    padded[1:-1, :29] = torch.randn(13, 29)
    with torch.no_grad():
        assert sparse(padded[1:-1, :29]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_compute_by_torch(dtype):
    mask_OI = random_mask((12, 20), (1, 1), 0.3, 0)
    sparse = layer(mask_OI).to(dtype)
    x = torch.randn(6, 20, dtype=dtype, requires_grad=True)
    expected = F.linear(x, sparse.weight * mask_OI, sparse.bias)
    y = sparse(x)
    torch.testing.assert_close(y, expected)
    inputs = [x, *sparse.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


def test_autocast_computes_in_the_type_of_the_weights():
    mask_OI = random_mask((12, 20), (1, 1), 0.3, 0)
    sparse, x = layer(mask_OI), torch.randn(6, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.float32
    assert_close(y.detach(), F.linear(x.double(), sparse.weight.double() * mask_OI, sparse.bias.double()).detach())
    y.sum().backward()


def test_constant_fan_in_and_n_of_m_are_patterns_like_others():
    for granularity in (FanIn(), dstlib.NM(1, 4), Element()):
        model = nn.Sequential(nn.Linear(64, 32))
        method = replace(dstlib.STATIC, granularity=granularity)
        masks = dstlib.sparsify(model, sparsity=0.75, method=method).masks
        mask_OI = masks["0.weight"]
        assert_right(SparseLinear(model[0], mask_OI), mask_OI, torch.randn(5, 64))


@given(st.integers(1, 30), st.integers(1, 30), DENSITIES, st.sampled_from(BLOCKS), st.integers(0, 99))
def test_a_pattern_lists_each_active_weight_once(o, i, density, block, seed):
    mask_OI = random_mask((o, i), block, density, seed)
    pattern = LinearPattern.of(mask_OI)
    assert sorted(pattern.index.tolist()) == mask_OI.flatten().nonzero().flatten().tolist()
    assert pattern.rows_per_group >= max(r for r in (1, 2, 3, 4) if block[0] % r == 0)
    begin, end = pattern.segments[:, 1].tolist(), pattern.segments[:, 2].tolist()
    assert [0, *end][: len(begin)] == begin
    assert pattern.transposed.index.sort().values.tolist() == list(range(pattern.num_active))
    assert pattern.part_ptr[-1] == len(begin)


def test_the_mask_and_the_weights_may_change_at_any_time():
    sparse, x = layer(random_mask((30, 40), (1, 1), 0.2, 0)), torch.randn(6, 40)
    for seed in range(4):
        mask_OI = random_mask((30, 40), (1, 1), 0.2, seed)
        sparse.set_mask(mask_OI)
        assert_right(sparse, mask_OI, x)
        sparse.eval()
        with torch.no_grad():
            before = sparse(x)
            sparse.weight.mul_(2)  # as optimizers and load_state_dict do
            sparse.bias.mul_(2)
            torch.testing.assert_close(sparse(x), 2 * before)
            sparse.weight.data.mul_(2)  # unseen by torch's own version counter
            sparse.bias.data.mul_(2)
            torch.testing.assert_close(sparse.eval()(x), 4 * before)


def test_it_stands_for_the_dense_layer():
    dense = nn.Linear(40, 30)
    mask_OI = random_mask((30, 40), (1, 1), 0.2, 0)
    sparse = SparseLinear(dense, mask_OI)
    assert sparse.weight is dense.weight
    assert list(sparse.state_dict()) == list(dense.state_dict())
    other = copy.deepcopy(sparse)
    dense.load_state_dict({name: 3 * t for name, t in other.state_dict().items()})
    with torch.no_grad():
        x = torch.randn(3, 40)
        torch.testing.assert_close(sparse(x), 3 * other(x))
        dense.weight.mul_(mask_OI)
        torch.testing.assert_close(SparseLinear(dense)(x), dense(x))  # by default what is not 0
    assert "active=" in repr(sparse)


def test_the_dense_gradient_on_request():
    mask_OI = random_mask((30, 40), (1, 1), 0.2, 0)
    sparse, x = layer(mask_OI), torch.randn(6, 40)
    sparse.dense_gradient = True
    sparse(x).sum().backward()
    torch.testing.assert_close(sparse.weight.grad, x.sum(0).expand(30, 40))


def test_several_threads_at_once():
    mask_OI = random_mask((200, 300), (1, 1), 0.1, 0)
    sparse = layer(mask_OI).eval()
    inputs = [torch.randn(n, 300) for n in (1, 16, 70, 130)]
    expected = [F.linear(x.double(), sparse.weight.double() * mask_OI, sparse.bias.double()).detach() for x in inputs]
    outputs: list[list[Tensor]] = [[] for _ in inputs]

    @torch.no_grad()
    def work(i: int) -> None:
        outputs[i] = [sparse(inputs[i]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for some, exact in zip(outputs, expected, strict=True):
        assert len(some) == 50
        for y in some:
            assert_close(y, exact)


def test_operators_obey_torchs_rules():
    pattern = LinearPattern.of(random_mask((12, 20), (1, 1), 0.3, 0))
    x, weight, bias, grad = torch.randn(6, 20), torch.randn(12, 20), torch.randn(12), torch.randn(6, 12)
    problem, patterns = LinearProblem(12, has_bias=True), [*pattern.tensors, *pattern.transposed.tensors]
    torch.library.opcheck(LINEAR.registered.default, ([x, weight, bias, *patterns], problem.packed()))
    arguments = ([grad, x, *pattern.tensors], LinearProblem(12).packed())
    torch.library.opcheck(LINEAR_BACKWARD_WEIGHTS.registered.default, arguments)


def test_under_the_compiler():
    torch._dynamo.reset()
    mask_OI = random_mask((12, 20), (1, 1), 0.3, 0)
    model = nn.Sequential(layer(mask_OI), nn.ReLU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 20)
    for run in (compiled, model):
        run(x).square().sum().backward()
    twice = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(twice, 2 * model[0].weight.grad)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_complaints():
    sparse = layer(random_mask((12, 20), (1, 1), 0.3, 0))
    with pytest.raises(dstlib.SettingError, match=r"x of sparse_linear\(\): expected \(\.\.\., 20\)"):
        sparse(torch.randn(3, 19))
    with pytest.raises(dstlib.SettingError, match=r"x of sparse_linear\(\)"), torch.no_grad():
        sparse.eval()(torch.randn(()))
    for mask in (torch.ones(12, 20), torch.ones(20, 12, dtype=torch.bool)):
        with pytest.raises(dstlib.SettingError, match="mask of SparseLinear"):
            sparse.set_mask(mask)

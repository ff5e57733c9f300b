"""Maps in one pass over memory, and the units that read them: on an emulated GPU, and on a real one where there is one.

Shapes: B batch, C channels, D, H, W depth, height, width.
"""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import instance_norm, leaky_relu

import dstlib
from dstlib.engine import registry
from dstlib.engine.gpu import BlockConv, by_triton, feature_map
from dstlib.engine.gpu.layers import GPU_LAYERS, GPUFusionNode, GPUUnit
from dstlib.layers import FusionNode, Shift, Unit, shift

# Half a unit in the last place of results that are rounded once; of a gradient of a norm, whose terms cancel, twice.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
DEVICES = [
    pytest.param("cpu", id="emulated"),
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA here")),
]
slowly = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        request.getfixturevalue("launched")
        monkeypatch.setattr(by_triton, "interpreted", lambda: True)
    return request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((got.cpu().double() - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-9))


@slowly
@given(
    widths=st.lists(st.sampled_from([1, 3, 8, 16, 24, 40]), min_size=1, max_size=3),
    sizes=st.lists(st.integers(-4, 4), min_size=1, max_size=4),
    extent=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(1, 2),
    dtype=st.sampled_from(list(ROUNDING)),
)
def test_maps_are_concatenated_and_shifted_and_so_are_gradients_back(
    device: str, widths: list[int], sizes: list[int], extent: tuple[int, ...], batch: int, dtype: torch.dtype
) -> None:
    sources = [normal(batch, width, *extent, seed=i, dtype=dtype).requires_grad_() for i, width in enumerate(widths)]
    expected = shift(torch.cat(sources, dim=1), sizes, axis=2)
    grad = normal(*expected.shape, seed=9, dtype=dtype)
    there = [each.detach().to(device).requires_grad_() for each in sources]
    got = feature_map.gather(there, sizes)
    assert torch.equal(got.cpu(), expected)
    wanted = torch.autograd.grad(expected, sources, grad)
    assert all(map(torch.equal, [g.cpu() for g in torch.autograd.grad(got, there, grad.to(device))], wanted))


@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "far from zero"])
@pytest.mark.parametrize("shape", [(2, 24, 3, 7, 5), (1, 8, 1, 1, 2), (1, 320, 2, 3, 3), (1, 16, 9, 40, 33)], ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_maps_are_normalised_and_activated(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float
) -> None:
    x = (normal(*shape) + offset).to(dtype)
    weight, bias = normal(shape[1], seed=1), normal(shape[1], seed=2)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = leaky_relu(instance_norm(leaves[0], weight=leaves[1], bias=leaves[2], eps=1e-5), 0.01)
    grad = normal(*shape, seed=3, dtype=dtype)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    own = [t.detach().to(device).requires_grad_() for t in (x, weight, bias)]
    got = feature_map.normalise(*own, 1e-5, 0.01)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    assert error(got, expected) <= ROUNDING[dtype]
    x_grad, *others = torch.autograd.grad(got, own, grad.to(device))
    # a number within float32's rounding of zero may be activated the other way round; its gradient is then wrong
    assert error(x_grad, wanted[0]) <= 2 * ROUNDING[dtype]
    assert max(error(*pair) for pair in zip(others, wanted[1:], strict=True)) <= 1e-4


def test_more_channels_than_threads_have_are_shifted_by_torch(device: str) -> None:
    x = normal(1, 2056, 3, 1, 1, dtype=torch.bfloat16)
    assert torch.equal(feature_map.gather([x.to(device)], (1, -1)).cpu(), shift(x, (1, -1), axis=2))


def test_other_channels_and_types_are_normalised_by_torch(device: str) -> None:
    for x in (normal(1, 12, 2, 3, 3).half(), normal(1, 8, 2, 3, 3)):
        x, weight = x.to(device), torch.ones(x.shape[1], device=device, dtype=x.dtype)
        got = feature_map.normalise(x, weight, weight, 1e-5, 0.1)
        torch.testing.assert_close(got, leaky_relu(instance_norm(x, weight=weight, bias=weight), 0.1))


def test_they_are_operators_as_torch_asks_of_them(launched: list[str]) -> None:
    sources = [normal(2, width, 2, 3, 4, dtype=torch.bfloat16).requires_grad_() for width in (8, 16)]
    moved = feature_map.Gathering((-1, 1)).packed()
    x, weight, bias = sources[1], normal(16, seed=1).requires_grad_(), normal(16, seed=2).requires_grad_()
    normed = feature_map.Normalising(1e-5, 0.5).packed()
    for name, tensors, problem in (("gather_maps", sources, moved), ("normalise_map", [x, weight, bias], normed)):
        checked = torch.library.opcheck(getattr(torch.ops.dstlib, name).default, (tensors, problem))
        assert set(checked.values()) == {"SUCCESS"}


def node(*, density: float, units: int = 2) -> FusionNode:
    """A fusion node whose units have some blocks of 16 × 16 channels."""
    torch.manual_seed(0)
    plain = FusionNode(
        32,
        coarser=(48, (1, 2, 2)),
        finer=(16, (2, 2, 2)),
        kernel_size=(1, 3, 3),
        shift=Shift((-1, 0, 1), axis=2),
        num_units=units,
    )
    for unit in plain.units:
        weight = unit.conv.weight.detach()
        blocks = torch.rand(weight.shape[0] // 16, weight.shape[1] // 16) < density
        weight *= blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:, :, None, None, None]
        nn.init.normal_(unit.norm.weight)
        nn.init.normal_(unit.norm.bias)
        unit.activation.negative_slope = 1.0  # else numbers that rounding takes across zero have another gradient
    return plain


def flows() -> list[Tensor]:
    return [normal(2, 32, 2, 6, 8), normal(2, 48, 2, 3, 4, seed=1), normal(2, 16, 4, 12, 16, seed=2)]


@pytest.mark.parametrize("density", [0.3, 1.0], ids=["blocks", "dense"])
def test_a_fusion_node_gives_the_same_with_its_gradients(device: str, density: float) -> None:
    plain = node(density=density).double()
    inputs = [each.bfloat16().double().requires_grad_() for each in flows()]
    expected = plain(*inputs)
    grad = normal(*expected.shape, seed=5)
    wanted = torch.autograd.grad(expected, [*inputs, *plain.parameters()], grad.double())
    fast = GPUFusionNode(plain.float().to(device))
    own = [each.detach().float().to(device).requires_grad_() for each in inputs]
    with torch.autocast(device, torch.bfloat16):
        got = fast(*own)
        names = [name for name, _ in fast.named_parameters()]
        grads = torch.autograd.grad(got, [*own, *fast.parameters()], grad.to(device, got.dtype))
    assert names == [name for name, _ in plain.named_parameters()]
    assert got.dtype == torch.bfloat16
    # each of two units rounds its map, its weights and its norm to 8 bits, and so do their gradients
    assert error(got, expected) <= 8 * ROUNDING[torch.bfloat16]
    for name, mine, right in zip(["same", "coarser", "finer", *names], grads, wanted, strict=True):
        if name.endswith("conv.bias"):
            assert not mine.any(), "the norm takes a bias away"
        elif density == 1 or not name.endswith("conv.weight"):
            assert error(mine, right) <= 16 * ROUNDING[torch.bfloat16], name


def test_blocks_that_are_not_active_have_no_gradient_unless_it_is_asked_for(device: str) -> None:
    unit = GPUUnit(node(density=0.3).units[0].to(device))
    active = unit.conv.blocks.cover
    assert 0 < active.float().mean() < 0.6
    for asked in (False, True):
        unit.conv.dense_gradient = asked
        with torch.autocast(device, torch.bfloat16):
            y = unit(normal(1, 80, 2, 5, 6).to(device))
        (grad,) = torch.autograd.grad(y.float().square().sum() + y.float().sum(), [unit.conv.weight])
        assert grad[active].all()
        assert bool(grad[~active].any()) == asked


def test_masks_are_followed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate() would on a GPU: here it is told that this is one."""
    from dstlib.engine.following import follow

    monkeypatch.setattr(registry, "CPU_LAYERS", GPU_LAYERS)
    torch.manual_seed(0)  # two updates of eight blocks could leave the same ones
    model = nn.Sequential(Unit(32, 64, kernel_size=(1, 3, 3)), nn.Conv3d(64, 32, (1, 3, 3), padding=(0, 1, 1)))
    model = model.to(device)
    method = replace(dstlib.DSFF, granularity=dstlib.Block(16, 16), interval=2)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method=method, total_steps=40)
    assert [registry.obstacle(layer) for layer in model] == [None, None]
    fast = nn.Sequential(*(registry.find(layer).make(layer) for layer in model))
    assert [type(layer) for layer in fast] == [GPUUnit, BlockConv]
    follow(fast, model, sparsifier.masks, lambda name: False, lambda name: False)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), set()
    x = normal(1, 32, 2, 5, 5).to(device)
    for _ in range(5):
        with torch.autocast(device, torch.bfloat16):
            y = fast(x)
        for layer, name in ((fast[0].conv, "0.conv.weight"), (fast[1], "1.weight")):
            assert torch.equal(layer.blocks.cover, sparsifier.masks[name].flatten(2).any(2))
        seen.add(tuple(fast[1].blocks.active.flatten().tolist()))
        optimizer.zero_grad()
        y.float().square().mean().backward()
        optimizer.step()
    assert len(seen) > 1
    with torch.autocast(device, torch.bfloat16):
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=0.03)  # of numbers about 1, three times rounded


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(16, 16), "to_semi_structured"),
        (nn.Conv3d(16, 16, (1, 3, 3), (1, 2, 2), (0, 1, 1)), r"kernel is \(1, 3, 3\) with a stride of \(1, 2, 2\)"),
        (nn.Conv2d(16, 16, 3, padding=1, groups=2), "groups is 2"),
        (nn.ConvTranspose3d(16, 16, 2), "ConvTranspose3d"),
    ],
    ids=["linear", "strided", "groups", "transposed"],
)
def test_layers_that_a_gpu_leaves_as_they_are(layer: nn.Module, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CPU_LAYERS", GPU_LAYERS)
    found = registry.obstacle(layer)
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA here")
def test_a_network_is_accelerated_on_a_gpu() -> None:
    from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

    torch.manual_seed(0)
    network = E2ENet(E2ENetConfig(channels=(32, 48, 64), strides=((2, 2, 2),) * 2, heads=2, num_classes=3)).cuda()
    method = replace(dstlib.DSFF, granularity=dstlib.Block(16, 16))
    sparsifier = dstlib.sparsify(network, sparsity=0.5, method=method, total_steps=9000, include=E2ENet.FUSION)
    x = normal(1, 1, 16, 64, 64).cuda()
    with torch.autocast("cuda", torch.float16):
        fast = sparsifier.accelerate(network, x)
        print(fast.decisions)
        assert any(decision.is_fast for decision in fast.decisions.values())
        for got, expected in zip(fast(x), network(x), strict=True):
            assert error(got, expected.double().cpu()) <= 0.02  # ten layers, each rounded to 11 bits several times
        sum(y.float().square().mean() for y in fast(x)).backward()
        grads = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        network.zero_grad()
        sum(y.float().square().mean() for y in network(x)).backward()
    assert grads.keys() == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        expected = parameter.grad if name not in sparsifier.masks else parameter.grad * sparsifier.masks[name]
        mine = grads[name] if name not in sparsifier.masks else grads[name] * sparsifier.masks[name]
        if not name.endswith("conv.bias"):
            distance = float((mine - expected).norm() / expected.norm())
            assert distance <= 0.05, name  # numbers that rounding takes across zero have another gradient

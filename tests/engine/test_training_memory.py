"""What a training step keeps for its gradients: what its convolutions have made, once, and nothing made of that."""

import gc
from dataclasses import replace

import pytest
import torch
from test_as_torch import forced
from torch import Tensor, nn

from dstlib.engine import Decisions, accelerate
from dstlib.engine.layers.feature_map import Pending
from dstlib.engine.ops.feature_map import depth_last
from dstlib.engine.runtime import memory
from dstlib.engine.runtime.memory import buffer
from dstlib.layers import Unit
from dstlib.layers.recompute import same_map
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

LEVELS = ((3, 8), (4, 4), (5, 2))  # channels, voxels along each axis


def _network(*, width: int = 1) -> E2ENet:
    torch.manual_seed(0)
    channels = tuple(width * each for each, _ in LEVELS)
    return E2ENet(E2ENetConfig(channels=channels, strides=((2, 2, 2),) * 2, heads=2, num_classes=2))


def _loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([y.square().mean() for y in outputs]).sum()


def _kept(model: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """Maps that are kept in a forward pass, by address."""
    found: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        if x.ndim == 5 and not isinstance(x, nn.Parameter):
            found[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(x)
    return found


def test_kept_are_the_raw_maps_of_units_and_the_image():
    x = torch.randn(1, 1, 8, 8, 8)
    network = _network()
    fast = forced(network, x)
    one, two, three = (c * n**3 for c, n in LEVELS)
    encoder = 2 * (one + two + three)
    fusion = 1 * one + 2 * one + 2 * two  # (1, 1), and on the last diagonal two units each: (2, 1), (1, 2)
    assert sum(each.numel() for each in _kept(fast, x).values()) == x.numel() + encoder + fusion
    # torch keeps what comes in to, and out of, each convolution, norm and pooling
    assert sum(each.numel() for each in _kept(network, x).values()) > 3 * (encoder + fusion)


def test_statistics_are_kept_as_four_numbers_a_channel():
    unit, x = Unit(3, 4, kernel_size=(1, 3, 3)), torch.randn(2, 3, 4, 6, 5)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        forced(nn.Sequential(unit), x)(x)
    assert [each.shape for each in kept if each.ndim == 3] == [(4, 2, 4)]


@pytest.mark.parametrize("plain", [(), ("heads.0", "heads.1"), ("fusion.stage1_level2", "encoder.2.0", "heads.1")])
def test_maps_that_are_computed_once_more_give_the_same_bit_for_bit(plain: tuple[str, ...]):
    """Also where plain layers write out, in place, maps that layers of the engine read before and after."""
    torch.manual_seed(0)
    config = E2ENetConfig(channels=(3, 4, 5, 4), strides=((2, 2, 2),) * 3, heads=3, num_classes=2)
    network, x = E2ENet(config), torch.randn(2, 1, 16, 16, 16)
    fast = forced(network, x)
    rows = [replace(row, plain_ms=1.0, fast_ms=2.0) if row.name in plain else row for row in fast.decisions.rows]
    fast = accelerate(network, x, decisions=Decisions.of(rows))
    found = []
    for recompute in (False, True):
        fast.recompute = recompute
        before = torch.get_rng_state()
        outputs = fast(x)
        _loss(outputs).backward()
        assert torch.equal(torch.get_rng_state(), before)
        found.append([*(y.detach() for y in outputs), *_gradients(fast)])
    assert len(found[0]) == 3 + len([*network.parameters()])
    assert all(map(torch.equal, *found))


def test_a_map_by_another_name_stays_what_it_was():
    unit, x = Unit(3, 4, kernel_size=(1, 3, 3)), torch.randn(1, 3, 4, 6, 5)
    z = forced(nn.Sequential(unit, nn.Identity()), x)[0](x)
    other = same_map(z)
    assert z.sum() == z.sum()  # written out
    assert (type(z), type(other)) == (Tensor, Pending)
    assert torch.equal(other + 0, z)
    grads = [torch.autograd.grad(y.square().sum(), unit.conv.weight, retain_graph=True)[0] for y in (z, other)]
    assert torch.equal(*grads)
    assert same_map(x) is x


@pytest.fixture
def large() -> tuple[nn.Module, Tensor]:
    """A network whose finest maps are just large enough for memory that is used again."""
    torch.manual_seed(0)
    network = E2ENet(E2ENetConfig(channels=(8, 8, 8), strides=((2, 2, 2),) * 2, heads=2, num_classes=2))
    x = torch.randn(1, 1, 32, 32, 32)
    return forced(network, x), x


def _used() -> int:
    gc.collect()
    return memory._bytes["used"]


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def test_what_is_kept_goes_with_the_outputs(large: tuple[nn.Module, Tensor]):
    model, x = large
    before = _used()
    outputs = model(x)
    assert _used() - before >= (2 + 3) * 4 * 8 * 32**3  # two units of the encoder, three of fusion nodes
    del outputs
    assert _used() == before


def test_with_maps_computed_once_more_the_finest_of_every_second_stage_are_kept(large: tuple[nn.Module, Tensor]):
    model, x = large
    before, one = _used(), buffer(depth_last((1, 8, 32, 32, 32))[0] + 4 * 8).nbytes
    model.recompute = True
    outputs = model(x)
    assert one <= _used() - before < 2 * one + 4 * memory.GRAIN  # of the encoder, and of (2, 1), which the head reads
    _loss(outputs).backward()
    assert _used() == before


def test_what_is_kept_goes_with_the_backward_pass(large: tuple[nn.Module, Tensor]):
    model, x = large
    before = _used()
    loss = _loss(model(x))
    loss.backward()
    assert _used() == before  # though the loss is still there


def test_a_graph_that_is_kept_gives_the_same_gradients_again_and_no_other_does(large: tuple[nn.Module, Tensor]):
    model, x = large
    loss = _loss(model(x))
    loss.backward(retain_graph=True)
    first = _gradients(model)
    loss.backward()
    assert all(map(torch.equal, first, _gradients(model)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_two_passes_may_come_before_their_gradients(large: tuple[nn.Module, Tensor]):
    model, x = large
    expected = []
    for image in (x, x.cos()):
        _loss(model(image)).backward()
        expected.append(_gradients(model))
    losses = [_loss(model(image)) for image in (x, x.cos())]
    for loss, gradients in zip(losses, expected, strict=True):
        loss.backward()
        assert all(map(torch.equal, gradients, _gradients(model)))


def test_what_fails_in_the_middle_leaves_nothing_behind(large: tuple[nn.Module, Tensor]):
    model, x = large
    before = _used()
    _loss(model(x)).backward()
    expected = _gradients(model)

    def fail(grad: Tensor) -> None:
        raise KeyError("in the middle")

    hook = model.get_parameter("fusion.stage1_level1.units.0.norm.weight").register_hook(fail)
    loss = _loss(model(x))
    with pytest.raises(KeyError, match="in the middle"):
        loss.backward()
    hook.remove()
    model.zero_grad(set_to_none=True)
    del loss
    _loss(model(x)).backward()
    assert all(map(torch.equal, expected, _gradients(model)))
    assert _used() == before  # autograd lets go of what an error has left when it is next asked


def test_gradients_that_meet_are_added_in_place(large: tuple[nn.Module, Tensor]):
    """Those of a map that two nodes read: to add them on fresh memory would take a map more."""
    model, x = large
    loss = _loss(model(x))
    with torch.profiler.profile(record_shapes=True) as profile:
        loss.backward()
    maps = [(event.name, event.input_shapes[0]) for event in profile.events() if event.input_shapes]
    assert maps.count(("aten::add_", [1, 8, 32, 32, 32])) == 2  # of the encoder, and of (1, 1)
    assert ("aten::add", [1, 8, 32, 32, 32]) not in maps

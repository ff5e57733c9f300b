"""Masks of one bit for each entry: what they say, and what is done outside of them, by the kernels as by torch."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dstlib
from dstlib.engine.ops import masked
from dstlib.masking import PackedMask
from dstlib.masking.update import bit_patterns, count_outside, zero_outside_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8)
SHAPES = ((0, 3), (1,), (3, 5), (8, 8), (63, 65), (5, 1, 3, 3), (20, 4, 3, 3))
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers with a mask, at any address that fits the type, in any order of memory."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num, offset = torch.Size(shape).numel(), draw(st.integers(0, 3))
    base = (3 * torch.randn(num + offset, generator=rng)).to(dtype)
    if dtype.is_floating_point:
        places = torch.rand(num + offset, generator=rng) < 0.3
        base[places] = torch.tensor(SPECIAL, dtype=dtype).repeat(num + offset)[: int(places.sum())]
    x = base[offset:].view(shape)
    mask = torch.rand(shape, generator=rng) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    if len(shape) == 4 and draw(st.booleans()):
        mask = mask.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last) if draw(st.booleans()) else x
    return x, mask


@given(cases())
def test_bits_say_what_the_mask_says(case):
    _, mask = case
    packed = PackedMask.of(mask)
    assert torch.equal(packed.dense(), mask)
    assert packed.dense().stride() == mask.stride()
    assert packed.num_active == int(mask.sum())
    assert packed.bits.numel() == -(-mask.numel() // 8)


@given(cases())
def test_kernels_fill_and_count_as_torch(case):
    x, mask = case
    packed, zeros, threes = PackedMask.of(mask), x.clone(), x.clone()
    if x.is_floating_point():
        assert masked.count_outside(x, packed) == count_outside(x, mask)
    expected = zero_outside_(x.clone(), mask)
    masked.zero_outside_each([(zeros, packed)])
    assert torch.equal(bit_patterns(zeros), bit_patterns(expected))
    masked.fill_outside_each([(threes, packed, 3.0)])
    assert torch.equal(bit_patterns(threes), bit_patterns(x.masked_fill(~mask, 3.0)))


def test_a_version_counts_where_something_was_written():
    x, packed = torch.tensor([1.0, 2.0, 0.0]), PackedMask.of(torch.tensor([True, False, False]))
    masked.zero_outside_each([(x, packed)])
    first = x._version
    masked.zero_outside_each([(x, packed)])
    assert first == 1
    assert x._version == 1 or masked.kernels() is None  # torch writes whatever is there


def test_masks_take_a_bit_and_are_written_as_one():
    packed = PackedMask.of(torch.zeros(4, 4, dtype=torch.bool))
    twin = copy.deepcopy(packed)
    with packed.opened() as outer:
        with packed.opened() as inner:
            inner[0] = True
        outer[1] = True
        assert packed.current().sum() == 8
    assert packed.bits.tolist() == [255, 0]
    assert twin.bits.tolist() == [0, 0]


def moves_gradients(model, optimizer):
    def noise(*_: object) -> None:
        for parameter in model.parameters():
            parameter.grad.view(-1)[7::9973] += 1.0

    optimizer.register_step_pre_hook(noise)


def write_unseen(model, *_: object):
    """Writes without a new version, where a glance at the first entries outside a mask sees nothing."""
    for parameter in model.parameters():
        parameter.data.view(-1)[20_000::997] += 1.0


def hook_for_one(model, optimizer):
    optimizer.register_step_post_hook(lambda *_: write_unseen(model))


@pytest.mark.parametrize("other", [None, moves_gradients, hook_for_one], ids=["nothing", "gradients", "weights"])
def test_zeros_hold_where_something_else_is_told_of_steps(other):
    """A hook beside the sparsifier's at the step of a known optimizer: what it does is seen, entry by entry."""
    model = torch.nn.Sequential(*(torch.nn.Linear(160, 160, bias=False) for _ in range(3)))
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.9, method="static")
    if other is not None:
        other(model, optimizer)
    for seed in range(6):
        step(model, optimizer, seed)
        assert_zeros(model, optimizer, sparsifier)


def step(model, optimizer, seed):
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def assert_zeros(model, optimizer, sparsifier):
    for name, parameter in model.named_parameters():
        outside = ~sparsifier.masks[name]
        for x in (parameter, *optimizer.state[parameter].values()):
            assert x.shape != outside.shape or not x[outside].any()


def swap(model):
    """As averages are exchanged with the weights: other memory, and nothing in it at the entries that a glance sees."""
    for parameter in model.parameters():
        other = parameter.detach().clone()
        other.view(-1)[20_000::997] += 1.0
        parameter.data = other


@pytest.mark.parametrize("write", [write_unseen, swap])
def test_what_was_told_to_be_set_to_zero_is(write):
    """Of all weights, as soon as something was found in one."""
    model = torch.nn.Sequential(*(torch.nn.Linear(160, 160, bias=False) for _ in range(3)))
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.9, method="static")
    for seed in range(4):
        step(model, optimizer, seed)
    write(model)
    with pytest.warns(UserWarning, match=r"non-zeros outside the masks of 0\.weight, 1\.weight, 2\.weight"):
        step(model, optimizer, 5)
    assert_zeros(model, optimizer, sparsifier)


def test_masks_take_an_eighth_of_a_byte_between_updates():
    model = torch.nn.Linear(64, 64)
    masks = dstlib.sparsify(model, sparsity=0.9, method="static").masks
    assert sum(mask.bits.nbytes for mask in masks.packed.values()) == 64 * 64 // 8


def test_masks_are_saved_as_plain_data():
    model = torch.nn.Linear(20, 10)
    masks = dstlib.sparsify(model, sparsity=0.9, method="static").masks
    file = io.BytesIO()
    torch.save(masks, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    assert list(found) == ["weight"]
    assert torch.equal(found["weight"], masks["weight"])
    assert int(found["weight"].sum()) == 20

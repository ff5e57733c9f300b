"""Block-sparse convolutions: their tables, their kernels under Triton's interpreter, their training.

Shapes: O output channels, C input channels, G blocks of outputs, J blocks of inputs, K entries, N columns.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import QUICK, SLOW, TILED, Case, errors, results
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

import dstlib
from dstlib import SettingError
from dstlib.engine.gpu import BlockConv, Blocks, Launch, block_conv, by_triton, tiles
from dstlib.engine.gpu.blocks import NARROW, TAPS, Plan, Table, make_plan, plan_tiles
from dstlib.engine.gpu.problem import BlockConvProblem
from dstlib.layers import Shift, ShiftedConv3d, Unit

CASES = [pytest.param(c, id=c.name, marks=[pytest.mark.long] * (c in SLOW)) for c in QUICK + TILED + SLOW]
# Products are summed in float32, some hundreds of them; inputs are exact, so that what is left is that sum's rounding
# and the rounding of the results themselves: half a unit of 2⁻¹⁰ or 2⁻⁷, once more where partial sums are added.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: dstlib[gpu]")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA here")


def program(*arguments: str, interpret: str = "1") -> Any:
    """What gpu_cases.py prints."""
    file = Path(__file__).with_name("gpu_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run([sys.executable, file, *arguments], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


# --- the kernels ------------------------------------------------------------------------------------------------


def assert_small(found: dict[str, list[float]], cases: Sequence[Case]) -> None:
    assert list(found) == [case.name for case in cases]
    wrong = {case.name: found[case.name] for case in cases if not max(found[case.name]) <= TOLERANCE[case.dtype]}
    assert not wrong
    assert all(len(found[case.name]) == 3 + case.bias for case in cases)  # output, and a gradient for each input


@needs_triton
def test_interpreted_kernels_compute_the_convolution_and_its_gradients() -> None:
    found = program("quick")
    assert_small(found["errors"], QUICK)
    assert all(found["properties"].values()), found["properties"]


@needs_triton
@pytest.mark.long
def test_interpreted_kernels_compute_more_convolutions() -> None:
    assert_small(program("slow"), SLOW)


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_a_gpu_that_is_not_there_and_use_its_matrix_units(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = program("compile", str(architecture), interpret="0")
    by_channel = ["gather_gemm", "gather_gemm", "gather_gemm_weights"]
    by_sums = ["gather_gemm", "gather_gemm", "add_terms", "gather_gemm_weights"]
    assert [name for name, _ in made] == by_channel + by_sums
    assert all(units == (name != "add_terms") for name, units in made)


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_emulated_kernels_compute_tiles(case: Case, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_triton, "interpreted", lambda: True)
    monkeypatch.setattr(tiles, "PROGRAMS", 16)
    assert max(errors(*results(case, "cpu"))) <= TOLERANCE[case.dtype]
    assert launched == ["pack_weights", "conv", "pack_weights", "conv", "conv_backward_weights"]


def test_emulated_tiles_of_several_maps_without_an_active_block_are_the_bias(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_triton, "interpreted", lambda: True)
    blocks = Blocks.of(torch.zeros(16, 32, dtype=torch.bool), (16, 16))
    sources = [torch.randn(1, 16, 2, 3, 4).half().requires_grad_() for _ in range(2)]
    weight, bias = torch.randn(16, 32, 1, 3, 3).half().requires_grad_(), torch.randn(16).half().requires_grad_()
    y = block_conv(sources, weight, blocks, bias, shifts=(-1, 1))
    assert torch.equal(y, bias[:, None, None, None].expand_as(y))
    *others, bias_grad = torch.autograd.grad(y.sum(), [*sources, weight, bias])
    assert not any(grad.any() for grad in others)
    assert bias_grad.tolist() == [24.0] * 16
    assert launched == ["conv", "conv"]


def test_tiles_of_several_maps_are_an_operator_as_torch_asks_of_it(launched: list[str]) -> None:
    blocks = Blocks.of(torch.rand(16, 48, generator=torch.Generator().manual_seed(0)) < 0.01, (16, 16))
    problem = BlockConvProblem(
        num_sources=2, has_bias=True, block=(16, 16), stride=(1, 1, 1), shifted=True, tiled=True, launch=Launch()
    )
    leaves = [torch.randn(1, width, 2, 3, 4).bfloat16() for width in (16, 32)]
    leaves += [torch.randn(16, 48, 1, 3, 3).bfloat16(), torch.randn(16).bfloat16()]
    tables = blocks.plan((-1, 1), torch.device("cpu"), tiled=True).tensors()
    arguments = ([*(x.requires_grad_() for x in leaves), *tables], problem.packed())
    assert set(torch.library.opcheck(torch.ops.dstlib.block_conv.default, arguments).values()) == {"SUCCESS"}


def test_tiles_are_computed_on_a_gpu_alone() -> None:
    x = torch.zeros(1, 32, 2, 4, 4, dtype=torch.float16)
    assert not tiles.accept([x], (16, 16), (32, 32, 1, 3, 3), (1, 1, 1))


@needs_gpu
@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_a_gpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert max(errors(*results(case, "cuda"))) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES)
def test_without_a_gpu_torch_computes_the_same(case: Case) -> None:
    got, wanted = results(replace(case, dtype=torch.float64), "cpu")
    assert max(errors(got, wanted)) <= 1e-12  # both sum in float64, in another order


# --- the tables -------------------------------------------------------------------------------------------------


@st.composite
def plans(draw: Any) -> tuple[Plan, Tensor, Tensor]:
    """A plan, the connections (O, C) that it is of, and the shift of each input channel."""
    size = (draw(st.sampled_from([1, 4, 16, 32])), draw(st.sampled_from([1, 2, 16, 32])))
    outputs, inputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    shifts = tuple(draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    mask = torch.rand(outputs, inputs, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    blocks = Blocks.of(mask, size)
    per_group = -(-inputs // len(shifts))
    moves = torch.tensor([shifts[c // per_group] for c in range(inputs)])
    return make_plan(blocks.active, size, (outputs, inputs), shifts), blocks.cover, moves


def times_listed(table: Table, connections: int) -> Tensor:
    return torch.bincount(table.weight_idx.flatten(), minlength=connections + 1)[:connections]


@given(plans())
def test_each_connection_is_listed_once_in_each_direction(drawn: tuple[Plan, Tensor, Tensor]) -> None:
    plan, cover, _ = drawn
    for table in (plan.forward, plan.backward_input):
        assert torch.equal(times_listed(table, cover.numel()), cover.flatten().long())
        assert table.row_ptr[0] == 0
        assert table.row_ptr[-1] == len(table.weight_idx) == len(table.col_idx) == len(table.shifts)
        assert (table.row_ptr.diff() % table.run == 0).all()


def test_weights_of_tiles_are_listed_once_for_each_tap() -> None:
    active = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    outputs, inputs = 56, 40
    plan = plan_tiles(active, (32, 16), (outputs, inputs), (-1, 0, 1))
    whole = active.repeat_interleave(32, 0).repeat_interleave(16, 1)[:outputs, :inputs]
    expected = whole.flatten().long().repeat_interleave(TAPS)
    for order in (plan.order, plan.backward_order):
        assert order.shape[1:] == (TAPS, NARROW * NARROW)
        listed = torch.bincount(order.flatten(), minlength=outputs * inputs * TAPS + TAPS)
        assert torch.equal(listed[: len(expected)], expected)


@given(plans())
def test_entries_name_the_channels_and_shifts_of_their_connections(drawn: tuple[Plan, Tensor, Tensor]) -> None:
    plan, cover, moves = drawn
    inputs = cover.shape[1]
    for table, channel_of in ((plan.forward, lambda i: i % inputs), (plan.backward_input, lambda i: i // inputs)):
        exists = table.weight_idx < cover.numel()
        named = table.col_idx[:, None].expand_as(table.weight_idx)
        assert torch.equal(channel_of(table.weight_idx[exists]), named[exists].long())
    table = plan.forward
    exists = table.weight_idx < cover.numel()
    shifts = table.shifts[:, None].expand_as(table.weight_idx)
    assert torch.equal(moves[table.weight_idx[exists] % inputs], shifts[exists].long())


@given(plans())
def test_columns_of_the_input_gradient_belong_to_the_channels_they_are_added_to(
    drawn: tuple[Plan, Tensor, Tensor],
) -> None:
    plan, cover, moves = drawn
    inputs, table = cover.shape[1], plan.backward_input
    num_columns = table.weight_idx.shape[1]
    row = torch.bucketize(torch.arange(len(table.weight_idx)), table.row_ptr[1:].long(), right=True)
    column = (row[:, None] * num_columns + torch.arange(num_columns)).expand_as(table.weight_idx)
    exists = table.weight_idx < cover.numel()
    owner = torch.full((len(plan.moves),), -1)  # the input channel of each column
    if plan.terms.numel():
        channel, place = (plan.terms >= 0).nonzero().unbind(1)
        owner[plan.terms[channel, place].long()] = channel
    else:
        owner = torch.arange(inputs)
    assert torch.equal(owner[column[exists]], table.weight_idx[exists] % inputs)
    assert torch.equal(plan.moves[column[exists]].long(), moves[table.weight_idx[exists] % inputs])


@given(plans())
def test_the_weight_gradient_visits_each_entry_once(drawn: tuple[Plan, Tensor, Tensor]) -> None:
    plan, _, _ = drawn
    table = plan.forward
    visited = torch.zeros(len(table.weight_idx) + table.chunk)
    for row, first in plan.chunks.tolist():
        visited[first : min(first + table.chunk, int(table.row_ptr[row + 1]))] += 1
    assert torch.equal(visited[: len(table.weight_idx)], torch.ones(len(table.weight_idx)))


def test_a_finer_mask_is_covered() -> None:
    mask = torch.zeros(20, 10, 3, dtype=torch.bool)
    mask[17, 3, 1] = True
    blocks = Blocks.of(mask, (16, 4))
    assert blocks.active.tolist() == [[False] * 3, [True, False, False]]
    assert blocks.cover.sum() == 4 * 4
    assert blocks.cover[16:, :4].all()


# --- the layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(16, 16), (16, 1)], ids=["16x16", "16x1"])
def test_dsff_trains_blocks_of_channels_and_the_layer_follows(block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    shift = Shift((-1, 0, 1), axis=2)
    model = nn.Sequential(
        Unit(16, 64, kernel_size=(1, 3, 3), shift=shift), Unit(64, 64, kernel_size=(1, 3, 3), shift=shift)
    )
    method = replace(dstlib.DSFF, granularity=dstlib.Block(*block), interval=4)
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method=method, include="1.*", total_steps=20)
    unit, plain = model[1], model[1].conv
    unit.conv = BlockConv.of(plain, sparsifier.masks["1.conv.weight"], size=block, shifts=shift.sizes)
    unit.shift = None  # the layer's now
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    x, target, seen, losses = torch.randn(2, 16, 3, 6, 6), torch.randn(2, 64, 3, 6, 6), set(), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        unit.conv.set_mask(sparsifier.masks["1.conv.weight"])
        seen.add(tuple(unit.conv.blocks.active.flatten().tolist()))
        losses.append(loss.item())
        assert unit.conv.blocks.density == 0.5  # whole blocks: covering them adds nothing
        assert torch.equal(unit.conv.blocks.cover[:, :, None, None, None] & (plain.weight != 0), plain.weight != 0)
    assert len(seen) > 1
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        y = torch.randn(1, 64, 3, 6, 6)
        torch.testing.assert_close(unit.conv(y), plain(shift(y)))


def test_every_fusion_weight_of_e2enet_takes_blocks() -> None:
    from dstlib.zoo.e2enet import AMOS, E2ENet

    with torch.device("meta"):
        network = E2ENet(AMOS)
    for name, weight in network.named_parameters():
        if name.startswith("fusion") and weight.ndim == 5:
            outputs, inputs = weight.shape[:2]  # in a transposed convolution the other way round
            assert (outputs % 16, inputs % 16) == (0, 0), name


def test_a_layer_has_the_parameters_of_the_one_it_is_made_of() -> None:
    conv = ShiftedConv3d(16, 32, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), sizes=(-1, 0, 1))
    layer = BlockConv.of(conv, size=(16, 16))
    assert dict(layer.named_parameters()) == dict(conv.named_parameters())
    assert layer.state_dict().keys() == conv.state_dict().keys()
    x = torch.randn(1, 16, 3, 6, 7)
    torch.testing.assert_close(layer(x), conv(x))
    plain = nn.Conv2d(16, 16, 3, padding="same", bias=False)
    torch.testing.assert_close(BlockConv.of(plain, size=(16, 1))(x[:, :, 0]), plain(x[:, :, 0]))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (nn.Linear(16, 16), r"layer .* Conv2d or Conv3d, got Linear"),
        (nn.Conv2d(16, 16, 3, padding=1, groups=2), "groups .* 1, got 2"),
        (nn.Conv2d(16, 16, 3, padding=2, dilation=2), r"dilation .* got \(2, 2\)"),
        (nn.Conv2d(16, 16, 3), r"padding .* \(1, 1\), half the kernel, got \(0, 0\)"),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), "padding_mode .* 'zeros', got 'circular'"),
        (ShiftedConv3d(16, 16, (3, 1, 3), padding=(1, 0, 1), sizes=(1,), axis="height"), "axis .* got 'height'"),
    ],
    ids=["linear", "groups", "dilation", "padding", "mode", "axis"],
)
def test_layers_that_are_refused(conv: nn.Module, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        BlockConv.of(conv, size=(16, 16))


def test_inputs_that_are_refused() -> None:
    mask = torch.ones(32, 16, dtype=torch.bool)
    for size in ((24, 16), (128, 16), (16, 0)):
        with pytest.raises(SettingError, match=r"size of Blocks.of.*powers of two up to 64"):
            Blocks.of(mask, size)
    with pytest.raises(SettingError, match=r"mask of Blocks.of.*got torch.float32 \(32, 16\)"):
        Blocks.of(mask.float(), (16, 16))
    blocks, weight, x = Blocks.of(mask, (16, 16)), torch.zeros(32, 16, 3, 3), torch.zeros(1, 16, 4, 4)
    with pytest.raises(SettingError, match=r"x of block_conv.*\(B, 16, .* got \(1, 8, 4, 4\)"):
        block_conv(x[:, :8], weight, blocks)
    with pytest.raises(SettingError, match=r"weight of block_conv.*\(32, 16, \*kernel\)"):
        block_conv(x, weight[:16], blocks)
    with pytest.raises(SettingError, match=r"weight of block_conv.*4 axes, like x, got 5"):
        block_conv(x, weight[:, :, None], blocks)
    with pytest.raises(SettingError, match=r"stride of block_conv.*2 numbers"):
        block_conv(x, weight, blocks, stride=(1, 1, 1))
    with pytest.raises(SettingError, match=r"shifts of block_conv.*none in 2D"):
        block_conv(x, weight, blocks, shifts=(-1, 0, 1))


def test_a_convolution_in_2d_is_that_of_torch() -> None:
    weight, x = torch.randn(32, 16, 3, 3), torch.randn(2, 16, 5, 6)
    blocks = Blocks.of(torch.ones(32, 16, dtype=torch.bool), (16, 16))
    torch.testing.assert_close(block_conv(x, weight, blocks, stride=2), conv2d(x, weight, stride=2, padding=1))


# --- Triton is an extra -----------------------------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True, env={**os.environ, **environment})


def test_importing_and_running_on_a_cpu_load_no_triton() -> None:
    code = (
        "import sys, torch, dstlib, dstlib.engine.gpu as gpu; w = torch.ones(16, 16, 3, 3);"
        "gpu.block_conv(torch.ones(1, 16, 4, 4), w, gpu.Blocks.of(w != 0, (16, 16)));"
        "print('dstlib.engine.gpu.triton_kernels' in sys.modules)"
    )
    assert run(code, TRITON_INTERPRET="0").strip() == "False"


def test_without_triton_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, dstlib.engine.gpu as gpu\n"
        "import dstlib.engine.gpu.triton_kernels\n"
        "w = torch.ones(16, 16, 3, 3)\n"
        "try: gpu.block_conv(torch.ones(1, 16, 4, 4), w, gpu.Blocks.of(w != 0, (16, 16)))\n"
        "except dstlib.SettingError as error: print(error)"
    )
    assert 'pip install "dstlib[gpu]"' in run(code, TRITON_INTERPRET="1")

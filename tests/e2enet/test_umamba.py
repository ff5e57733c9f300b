"""U-Mamba: its scan against the recurrence, its Mamba against another's, parameters by hand, any patch size, bf16."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dstlib
from dstlib.errors import DataError
from dstlib.zoo.e2enet import AMOS, E2ENetConfig
from dstlib.zoo.e2enet.baselines import Segmenter, build_model, umamba
from dstlib.zoo.e2enet.baselines.umamba import Mamba, Recurrence, TokenMixer, UMamba, selective_scan
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss

CONFIG = E2ENetConfig(channels=(8, 16, 24), strides=((1, 2, 2), (2, 2, 2)), heads=2)


def tiny(*, width: float = 1 / 8, config: E2ENetConfig = CONFIG, channels: int = 1, classes: int = 3) -> Segmenter:
    torch.manual_seed(0)
    patch_size = (7, 12, 9)
    network = build_model(
        "umamba", in_channels=channels, num_classes=classes, patch_size=patch_size, config=config, width=width
    )
    assert isinstance(network, Segmenter)
    return network


# ---- the scan ----


def one_after_the_other(factors: Tensor, terms: Tensor, before: Tensor) -> Tensor:
    states = []
    for t in range(terms.shape[1]):
        before = factors[:, t] * before + terms[:, t]
        states.append(before)
    return torch.stack(states, dim=1)


def close(ours: Tensor, exact: Tensor) -> None:
    # sums of up to 70 products, in another order: rounding of float64, 70 · 2⁻⁵², with room
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def doubles(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@given(length=st.integers(1, 70), seed=st.integers(0, 99), forgetful=st.booleans())
@settings(deadline=None, max_examples=40)
def test_states_and_gradients_are_those_of_the_recurrence(length: int, seed: int, forgetful: bool) -> None:
    torch.manual_seed(seed)
    factors, terms, before = doubles(2, length, 3), doubles(2, length, 3), doubles(2, 3)
    with torch.no_grad():
        factors.tanh_()
        if forgetful:  # nothing may be divided by a factor
            factors[:, ::3] = 0
    weights = torch.randn(2, length, 3, dtype=torch.float64)
    ours, exact = Recurrence.apply(factors, terms, before), one_after_the_other(factors, terms, before)
    close(ours, exact)
    inputs = (factors, terms, before)
    gradients = (torch.autograd.grad((states * weights).sum(), inputs) for states in (ours, exact))
    for mine, right in zip(*gradients, strict=True):
        close(mine, right)


def token_by_token(signal: Tensor, step: Tensor, rate: Tensor, written: Tensor, read: Tensor) -> Tensor:
    """The selective state space model by its definition."""
    state = signal.new_zeros(len(signal), *rate.shape)
    found = []
    for t in range(signal.shape[1]):
        state = (step[:, t, :, None] * rate).exp() * state
        state = state + (step[:, t] * signal[:, t])[:, :, None] * written[:, t, None]
        found.append((state * read[:, t, None]).sum(2))
    return torch.stack(found, dim=1)


@given(length=st.integers(1, 30), chunk=st.integers(1, 12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_scan_is_the_definition_however_long_the_chunks(length: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    signal, written, read = doubles(2, length, 3), doubles(2, length, 4), doubles(2, length, 4)
    step, rate = doubles(2, length, 3), doubles(3, 4)
    inputs = (signal, step, rate, written, read)
    given_to_it = (signal, step.exp(), -rate.exp(), written, read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(umamba, "CHUNK", chunk)
        ours = selective_scan(*given_to_it)
        mine = torch.autograd.grad(ours.square().sum(), inputs, retain_graph=True)
    exact = token_by_token(*given_to_it)
    close(ours, exact)
    for mine_of, right in zip(mine, torch.autograd.grad(exact.square().sum(), inputs), strict=True):
        torch.testing.assert_close(mine_of, right, rtol=1e-10, atol=1e-10)  # squares of sums


def test_steps_that_forget_all_are_no_overflow() -> None:
    """Closed forms divide by exp(-Σ step · rate), which overflows here."""
    signal = torch.ones(1, 9, 2)
    step = torch.full((1, 9, 2), 50.0)
    rate = torch.full((2, 3), -16.0)
    found = selective_scan(signal, step, rate, torch.ones(1, 9, 3), torch.ones(1, 9, 3))
    assert torch.equal(found, torch.full((1, 9, 2), 3 * 50.0))


def test_states_of_bf16_are_float32() -> None:
    """In bf16 a sum of ones stands still at 256."""
    ones = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    found = selective_scan(ones, ones, torch.tensor([[-1e-9]]), ones, ones)
    assert found.dtype == torch.bfloat16
    assert found[0, -1, 0] == torch.tensor(1000.0).bfloat16()


# ---- the block ----


def test_block_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=24, state_size=16, conv_kernel=4, expand=2, time_step_rank=2)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(24)
    with torch.no_grad():
        theirs.A_log.add_(torch.randn_like(theirs.A_log))
        theirs.D.add_(torch.randn_like(theirs.D))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 11, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_no_token_knows_later_ones() -> None:
    torch.manual_seed(0)
    mamba = Mamba(8)
    x = torch.randn(1, 12, 8)
    other = x.clone()
    other[:, 7:] += 1
    with torch.no_grad():
        before, after = mamba(x), mamba(other)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all(2).any()


def test_first_steps_lie_in_their_range() -> None:
    torch.manual_seed(0)
    steps = torch.nn.functional.softplus(Mamba(64).dt_proj.bias)
    low, high = umamba.STEPS
    # through softplus and back, in float32
    assert low * (1 - 1e-4) < float(steps.min()) < 0.003
    assert 0.03 < float(steps.max()) < high * (1 + 1e-4)


# ---- the network ----


def mamba_params(channels: int) -> int:
    wide, rank = 2 * channels, math.ceil(channels / 16)
    projections = channels * 2 * wide + wide * (rank + 32) + (rank + 1) * wide + wide * channels
    return projections + 5 * wide + 16 * wide + wide  # the convolution, A_log, D


def counted_by_hand(channels: int, classes: int, widths: Sequence[int], blocks: Sequence[int]) -> int:
    """``blocks`` of each level of the encoder; those of the decoder, coarsest first, begin with the same numbers."""

    def stage(first: int, width: int, num: int) -> int:
        convolutions = 27 * first * width + (2 * num - 1) * 27 * width * width + first * width
        return convolutions + (2 * num + 1) * width + 4 * num * width  # biases, and norms

    total = stage(channels, widths[0], blocks[0])
    total += sum(stage(widths[max(i - 1, 0)], width, blocks[i]) for i, width in enumerate(widths))
    total += 2 * widths[-1] + mamba_params(widths[-1])
    for i, level in enumerate(reversed(range(len(widths) - 1))):
        width = widths[level]
        total += (widths[level + 1] + 1) * width + stage(2 * width, width, blocks[i]) + (width + 1) * classes
    return total


def test_parameters_are_those_counted_by_hand() -> None:
    """No number is published; from the shapes in the paper and the authors' program."""
    with torch.device("meta"):
        network = tiny(width=1, config=AMOS, classes=15)
    profile = dstlib.profile(network, (1, 1, 128, 128, 128), convention="paper")
    by_hand = counted_by_hand(1, 15, (32, 64, 128, 256, 320, 320), (2, 2, 2, 1, 1, 1))
    assert profile.params == sum(p.numel() for p in network.parameters()) == by_hand
    assert "Mamba" in profile.uncounted


def test_blocks_are_two_up_to_half_the_levels() -> None:
    for levels, encoder, decoder in ((3, [2, 2, 1], [2, 2]), (4, [2, 2, 1, 1], [2, 2, 1]), (2, [2, 1], [2])):
        network = UMamba(1, 2, widths=(4,) * levels, strides=((2, 2, 2),) * (levels - 1))
        assert [len(blocks) for blocks in network.encoder] == encoder
        assert [len(blocks) for blocks in network.decoder] == decoder


@pytest.mark.parametrize("size", [(3, 1, 1), (5, 8, 7), (1, 5, 1), (20, 28, 20)])
def test_patches_of_any_size(size: tuple[int, int, int]) -> None:
    network = tiny(channels=2).eval()
    with torch.no_grad():
        fine, coarse = network(torch.rand(1, 2, *size))
    assert fine.shape == (1, 3, *size)
    assert coarse.shape == (1, 3, size[0], *(-(-extent // 2) for extent in size[1:]))
    assert all(torch.isfinite(logits).all() for logits in (fine, coarse))


@pytest.mark.parametrize("size", [(2, 4, 4), (1, 2, 1)])
def test_a_single_voxel_at_the_coarsest_level_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match=r"size of input of UMamba: expected more than \(2, 4, 4\) along an axis, got"):
        tiny()(torch.rand(1, 1, *size))


def test_under_autocast_tokens_are_mixed_in_float32() -> None:
    torch.manual_seed(0)
    mixer, x = TokenMixer(8), torch.randn(1, 8, 3, 2, 4)
    with torch.no_grad():
        exact = mixer(x.bfloat16().float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixer(x.bfloat16()), exact)
            assert all(torch.isfinite(logits).all() for logits in tiny()(torch.rand(1, 1, 7, 12, 9)))


def test_sparse_training_reduces_the_loss() -> None:
    network = tiny(width=1 / 4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(network, optimizer, sparsity=0.9, total_steps=1000)
    mixer = {name.removeprefix("host.mixer.mamba.") for name in sparsifier.masks if ".mamba." in name}
    assert mixer == {"in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}
    x = torch.rand(1, 1, 7, 12, 9)
    labels = (x > 0.5).long()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = deep_supervision_loss(network(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]

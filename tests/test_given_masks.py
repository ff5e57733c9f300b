"""Masks at the door: a training that starts from the zeros of weights, from masks by name, or from files of masks."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import assert_same, assert_zero_outside, small, train
from strategies import generator, random_mask
from torch import Tensor, nn

import dstlib
from dstlib import masking
from dstlib.at_init import snip, sparsegpt
from dstlib.errors import SelectionError, SettingError
from dstlib.masking import NM, Block, Channel, Element, FanIn, Kernel
from dstlib.sparsifier.saved import at_step_0

QUICK = replace(dstlib.RIGL, name="quick", interval=2)
PRESETS = {name: m for name, m in dstlib.METHODS.items() if m.granularity == Element()}


def prune(model: nn.Module, sparsities: Mapping[str, float]) -> dict[str, Tensor]:
    """Prunes weights by magnitude, each to a sparsity of its own; returns where they are not zero."""
    places = {}
    for name, sparsity in sparsities.items():
        weight = model.get_parameter(name)
        with torch.no_grad():
            smallest = weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]
            weight.view(-1)[smallest] = 0.0
        places[name] = weight.detach() != 0
    return places


def pruned(sparsities: Mapping[str, float] = {"conv.weight": 0.5, "up.weight": 0.75, "head.weight": 0.5}):
    model = small()
    return model, prune(model, sparsities)


def quiet_sparsify(model: nn.Module, *optimizers, **options) -> dstlib.Sparsifier:
    """A call that may warn of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dstlib.sparsify(model, *optimizers, **{"total_steps": 1000, "method": QUICK, **options})


def num_active(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


# ---- the zeros of weights


def test_a_pruned_model_goes_on_from_its_zeros_with_the_densities_of_its_layers():
    model, places = pruned()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = quiet_sparsify(model, optimizer, masks="from-zeros")
    assert_same(sparsifier.masks, places)
    assert_same(model.state_dict(), before)
    train(model, optimizer, 9)
    assert num_active(sparsifier.masks) == num_active(places), "a constant ramp keeps the number of each layer"
    assert any(not torch.equal(sparsifier.masks[name], places[name]) for name in places), "but masks move"
    assert_zero_outside(model, sparsifier.masks, optimizer)


def test_weights_without_zeros_stay_dense_and_weights_that_are_left_out_too():
    model, places = pruned({"conv.weight": 0.5, "up.weight": 0.5})
    sparsifier = quiet_sparsify(model, masks="from-zeros", exclude="up")
    assert num_active(sparsifier.masks) == {"conv.weight": int(places["conv.weight"].sum())}
    reasons = {row.name: row.reason for row in sparsifier.summary().rows}
    assert reasons == {"conv.weight": "", "up.weight": "excluded", "head.weight": "no zeros in the masks given"}


def test_zeros_that_were_active_are_counted_as_inactive_but_those_of_a_mask_are_kept():
    model, places = pruned()
    with torch.no_grad():
        model.head.weight[places["head.weight"].nonzero()[0].unbind()] = 0.0
        model.conv.weight[places["conv.weight"].nonzero()[0].unbind()] = -0.0
    from_zeros = num_active(quiet_sparsify(copy.deepcopy(model), masks="from-zeros").masks)
    from_masks = num_active(quiet_sparsify(model, masks=places).masks)
    assert from_masks == num_active(places)
    less = {"conv.weight": 1, "up.weight": 0, "head.weight": 1}
    assert {name: from_masks[name] - from_zeros[name] for name in places} == less


def test_weights_that_are_not_finite_are_active():
    model, places = pruned()
    place = (~places["head.weight"]).nonzero()[0].unbind()
    with torch.no_grad():
        model.head.weight[place] = torch.nan
    places["head.weight"][place] = True
    assert_same(quiet_sparsify(model, masks="from-zeros").masks, places)
    assert bool(model.head.weight[place].isnan())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_starts_from_masks_or_says_why_not(name):
    model, places = pruned()
    options = {"method": name, "total_steps": 100_000, "masks": places}
    if name in ("acdc", "cyclic"):
        with pytest.raises(SettingError, match=r"method of sparsify\(masks=\) with .* got a ramp with denser phases"):
            dstlib.sparsify(model, **options)
        return
    if name in ("gmp", "gmp_global"):
        with pytest.warns(UserWarning, match="no mask will ever change.*pass a sparsity= that is higher than"):
            sparsifier = dstlib.sparsify(model, **options)
    else:
        sparsifier = quiet_sparsify(model, **options)
    assert all(bool((places[n] <= mask).all()) for n, mask in sparsifier.masks.items())
    surplus = 1 + dstlib.METHODS[name].surplus(0.0)  # which it grows at first
    for n, mask in sparsifier.masks.items():
        # to whole units, of which it takes the nearest number
        assert int(mask.sum()) == int(surplus * int(places[n].sum()) + 0.5)
    sparsifier.load_state_dict(sparsifier.state_dict())


# ---- sparsity beside masks


@pytest.mark.parametrize("name", ["gmp", "granet", "granet_sparse", "gmp_global"])
def test_a_ramp_leads_from_the_masks_to_a_higher_sparsity(name):
    model, places = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = replace(dstlib.METHODS[name], interval=1)
    sparsifier = quiet_sparsify(model, optimizer, masks="from-zeros", sparsity=0.9, method=method, total_steps=20)
    assert_same(sparsifier.masks, places)
    history = [sum(num_active(sparsifier.masks).values())]
    for step in range(20):
        train(model, optimizer, 1, start=step)
        history.append(sum(num_active(sparsifier.masks).values()))
    total = sum(mask.numel() for mask in places.values())
    assert history == sorted(history, reverse=True), "it never grows back"
    assert history[-1] == total - int(0.9 * total)
    if name == "gmp":  # each layer for itself, in proportion to what it had
        shares = [int(mask.sum()) / int(places[n].sum()) for n, mask in sparsifier.masks.items()]
        assert max(shares) - min(shares) < 1 / min(num_active(places).values()), "but for rounding"


def test_a_sparsity_that_agrees_keeps_the_densities_of_the_masks():
    model, places = pruned()
    total = sum(mask.numel() for mask in places.values())
    share = 1 - sum(num_active(places).values()) / total
    for sparsity in (share, share + 2.9 / total, share - 2.9 / total):  # a unit of rounding in each of three layers
        sparsifier = quiet_sparsify(model, masks=places, sparsity=sparsity)
        assert_same(sparsifier.masks, places)
        sparsifier.detach()
    for sparsity in (share + 3.1 / total, share - 3.1 / total):
        with pytest.raises(SettingError, match=f"sparsity of sparsify.*expected {share:.6g}, as the masks have it"):
            quiet_sparsify(model, masks=places, sparsity=sparsity)


def test_a_lower_sparsity_than_that_of_the_zeros_lets_zeros_be_active():
    model, places = pruned()
    sparsifier = quiet_sparsify(model, masks="from-zeros", sparsity=0.5)
    assert all(bool((places[name] <= mask).all()) for name, mask in sparsifier.masks.items())
    assert sum(num_active(sparsifier.masks).values()) == sum(mask.numel() for mask in places.values()) // 2
    with pytest.raises(SettingError, match="Leave sparsity= out to keep that of the masks"):
        quiet_sparsify(small(), masks=places, sparsity=0.5)


def test_a_method_that_does_not_prune_is_not_asked_to():
    model, _ = pruned()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=r'choose a method that prunes from there, such as "gmp"'):
        quiet_sparsify(model, masks="from-zeros", sparsity=0.9)
    assert_same(model.state_dict(), before)


def test_an_override_agrees_with_its_mask_or_a_ramp_leads_to_it():
    model, places = pruned()
    sparsifier = quiet_sparsify(model, masks=places, overrides={"head": 0.5})
    assert_same(sparsifier.masks, places)
    sparsifier.detach()
    with pytest.raises(SettingError, match=r"sparsity of an override, head\.weight: expected 0\.5"):
        quiet_sparsify(model, masks=places, overrides={"head": 0.7})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = replace(dstlib.GMP, interval=1)
    sparsifier = quiet_sparsify(model, optimizer, masks=places, overrides={"head": 0.9}, method=method, total_steps=8)
    assert_same(sparsifier.masks, places)
    train(model, optimizer, 8)
    assert num_active(sparsifier.masks) == {**num_active(places), "head.weight": 2}


def test_neither_sparsity_nor_masks_is_no_plan():
    with pytest.raises(SettingError, match=r"sparsity of sparsify\(\): expected a number in \[0, 1\), got None"):
        dstlib.sparsify(small())


# ---- laws of granularity


@settings(max_examples=60)
@given(st.data())
def test_masks_that_a_granularity_can_have_are_taken_as_they_are_and_all_others_refused(data):
    seed = data.draw(st.integers(0, 2**16))
    grain = data.draw(st.sampled_from([Element(), Kernel(), Channel(), FanIn(), Block(2, 2), NM(2, 4)]))
    made_for = data.draw(st.sampled_from([grain, Element(), Channel(), FanIn()]))
    weight = nn.Conv2d(4, 6, 1, bias=False) if made_for == NM(2, 4) else nn.Conv2d(4, 6, 2, bias=False)
    torch.nn.init.normal_(weight.weight, generator=generator(seed))
    mask = random_mask(made_for, weight.weight.shape, seed, data.draw(st.sampled_from([0.3, 0.6])))
    assume(not bool(mask.all()))  # which is told of
    before = weight.weight.detach().clone()
    units = grain.fold(mask)
    is_whole = torch.equal(units.any(dim=-1), units.all(dim=-1))
    counts = units.any(dim=-1).sum(dim=1)
    fits = is_whole and bool((counts == counts[0]).all()) and int(counts[0]) > 0
    if isinstance(grain, NM):
        fits = fits and int(counts[0]) in (2, 4)
    method = replace(dstlib.STATIC, granularity=grain)
    if fits:
        sparsifier = quiet_sparsify(weight, masks={"weight": mask}, method=method)
        assert torch.equal(sparsifier.masks["weight"], mask)
        assert torch.equal(weight.weight.detach(), before * mask)
        sparsifier.load_state_dict(sparsifier.state_dict())
        sparsifier.detach()
    else:
        with pytest.raises((SelectionError, SettingError)):
            quiet_sparsify(weight, masks={"weight": mask}, method=method)
        assert torch.equal(weight.weight.detach(), before), "nothing has changed"


@pytest.mark.parametrize(
    ("grain", "zeros", "message"),
    [
        (FanIn(), {0: 3, 1: 2}, r"one number of active units in each group of FanIn.*from 1 to 4.*Or pass sparsity="),
        (NM(2, 4), {0: 1, 1: 2, 2: 2}, r"2 at most of every 4, got 4"),
        (Channel(), {0: 4, 1: 4, 2: 4}, r"active units, got none.*exclude="),
    ],
)
def test_zeros_that_no_mask_of_a_granularity_leaves_are_refused(grain, zeros, message):
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        for row, num in zeros.items():
            layer.weight[row, :num] = 0.0
        if isinstance(grain, Channel):
            layer.weight[3] = 0.0
    with pytest.raises(SelectionError, match=message):
        quiet_sparsify(layer, masks="from-zeros", method=replace(dstlib.STATIC, granularity=grain))


def test_zeros_that_are_active_fill_up_what_a_granularity_has():
    """Of 2:4 it is known how many; of a fan-in the sparsity says it."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    mask = random_mask(NM(2, 4), layer.weight.shape, 0, 1.0)
    mask[:] = torch.tensor([True, False, True, False]).repeat(2)
    with torch.no_grad():
        layer.weight.mul_(mask)
        layer.weight[0, 0] = layer.weight[3, 6] = 0.0  # active, and zero
    for grain, sparsity in ((NM(2, 4), None), (FanIn(), 0.5)):
        method = replace(dstlib.STATIC, granularity=grain)
        sparsifier = quiet_sparsify(layer, masks="from-zeros", method=method, sparsity=sparsity)
        found = sparsifier.masks["weight"]
        assert bool(((layer.weight != 0) <= found).all())
        assert grain.fold(found)[..., 0].sum(dim=1).unique().tolist() == [2 if isinstance(grain, NM) else 4]
        sparsifier.detach()


def test_neurons_that_srigl_ablated_stay_so():
    layer = nn.Linear(10, 8, bias=False)
    mask = torch.zeros(8, 10, dtype=torch.bool)
    mask[:7, :3] = True  # of 80, 21, which seven rows of three are; eight would be of three too
    sparsifier = quiet_sparsify(layer, masks={"weight": mask}, method="srigl", total_steps=1000)
    assert torch.equal(sparsifier.masks["weight"], mask)
    sparsifier.load_state_dict(sparsifier.state_dict())
    sparsifier.detach()
    mask[0, 3] = True
    with pytest.raises(SelectionError, match="from 3 to 4"):
        quiet_sparsify(layer, masks={"weight": mask}, method="srigl")


def sparse_by_zeros():
    """Two layers of rows with different numbers of zeros, at half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 8, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
    return model


def test_the_advice_for_rows_of_different_numbers_can_be_followed_under_srigl():
    model, srigl = sparse_by_zeros(), dstlib.METHODS["srigl"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SelectionError, match=r"Or pass sparsity= and replace\(method, allocate=None\)"):
        quiet_sparsify(model, masks="from-zeros", method=srigl, total_steps=1000)
    method = replace(srigl, allocate=None)
    sparsifier = quiet_sparsify(model, masks="from-zeros", sparsity=0.2, method=method, total_steps=1000)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), "nothing was lost"
    assert all(len(mask.sum(dim=1).unique()) == 1 for mask in sparsifier.masks.values())


@pytest.mark.parametrize("sparsity", [None, 0.2, 0.5], ids=["theirs", "lower", "nearly theirs"])
def test_a_pruning_that_starts_where_it_ends_is_advised_to_prune_further(sparsity):
    with pytest.warns(UserWarning, match=r"pass a sparsity= that is higher than that of the masks"):
        dstlib.sparsify(sparse_by_zeros(), masks="from-zeros", sparsity=sparsity, method="gmp", total_steps=1000)


@pytest.mark.parametrize("method", ["acdc", "cyclic"])
def test_no_advice_for_a_method_that_masks_do_not_suit_leads_to_a_call_without_them(method):
    """Its random first masks would cut weights that were loaded."""
    with pytest.raises(SettingError, match=r"never becomes denser again.*such as \"rigl\"\.$"):
        quiet_sparsify(sparse_by_zeros(), masks="from-zeros", method=method, total_steps=1000)


def test_masks_without_zeros_as_of_a_dense_phase_are_told_of():
    model = sparse_by_zeros()
    full = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match=r"masks have no zeros, so all weights stay dense.*sparsity= as well"):
        dstlib.sparsify(model, masks=full, method="rigl", total_steps=1000).detach()
    sparsifier = quiet_sparsify(model, masks=full, sparsity=0.8, method="gmp", total_steps=1000)  # as advised
    assert sparsifier.density == 1.0


# ---- names, shapes, types, and where they lie


@pytest.mark.parametrize(
    ("masks", "error"),
    [
        ({"had.weight": torch.ones(3, 6)}, r"mask of masks: expected the name of a parameter, got 'had\.weight'.*head"),
        ({"head.weight": torch.ones(6, 3)}, r"mask head\.weight of masks: expected shape \(3, 6\), got \(6, 3\)"),
        ({"head.weight": torch.full((3, 6), 0.5)}, r"expected 0 and 1, got 18 others in torch\.float32"),
        ({"head.weight": torch.full((3, 6), torch.nan)}, r"expected 0 and 1, got 18 others in torch\.float32"),
        ({"head.weight": torch.ones(3, 6).to_sparse()}, r"expected a dense tensor of truth values"),
        ({"head.weight": torch.ones(3, 6, device="meta")}, r"expected a dense tensor of truth values.*on meta"),
        (
            {"head.weight": [True] * 18},
            r"expected tensors of masks by .*got dict with head.weight \(list\)",
        ),
        ({"head.weight": torch.zeros(3, 6)}, r"mask head\.weight of masks: expected active units, got none"),
        ({"norm.weight": torch.ones(6)}, r"weights to be sparse of masks: .* got none of their masks"),
        ({}, r"content of masks: expected tensors of masks by .*got dict with nothing in it"),
        ("from_zeros", r"masks of sparsify\(\): expected \"from-zeros\", masks by name"),
        (0.9, r"masks of sparsify\(\): expected \"from-zeros\", masks by name, .* got float"),
        ("from-zeros", r'weights to be sparse of masks="from-zeros": .*got none with zeros. Load the sparse weights'),
    ],
)
def test_masks_that_are_none_of_the_model_are_refused_and_nothing_changes(masks, error):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((SelectionError, SettingError), match=error):
        quiet_sparsify(model, masks=masks)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.bfloat16])
def test_masks_of_any_numbers_are_read(dtype):
    model, places = pruned()
    sparsifier = quiet_sparsify(model, masks={name: mask.to(dtype) for name, mask in places.items()})
    assert_same(sparsifier.masks, places)
    assert all(mask.dtype == torch.bool for mask in sparsifier.masks.values())


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager"), nn.Module.eval])
def test_names_are_found_in_wrappers_and_those_of_wrapped_models_too(wrap):
    model, places = pruned()
    for names in (places, {f"module.{name}": mask for name, mask in places.items()}):
        sparsifier = quiet_sparsify(wrap(model), masks=names)
        assert_same(sparsifier.masks, places)
        sparsifier.detach()


def test_tied_weights_have_one_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    mask = torch.eye(4).bool()
    sparsifier = quiet_sparsify(model, masks={"1.weight": mask, "0.weight": mask})
    assert torch.equal(sparsifier.masks["0.weight"], mask)
    sparsifier.detach()
    with pytest.raises(SelectionError, match=r"one mask, as 0\.weight, 1\.weight are one parameter, got another"):
        quiet_sparsify(model, masks={"0.weight": mask, "1.weight": ~mask})


def test_zeros_of_masks_whose_weights_stay_dense_are_told_of_unless_the_user_wants_it():
    model, places = pruned()
    masks = {**places, "norm.weight": torch.tensor([0, 1, 1, 1, 1, 1])}
    with pytest.warns(UserWarning, match=r"masks have zeros in norm\.weight \(it has one axis\), which stay dense"):
        dstlib.sparsify(model, masks=masks, method="static").detach()
    assert bool(model.norm.weight.all())
    sparsifier = quiet_sparsify(model, masks=places, exclude="head")
    assert num_active(sparsifier.masks).keys() == {"conv.weight", "up.weight"}


def test_dense_weights_take_the_masks_of_others_and_sparse_ones_are_told_of():
    """As for a lottery ticket: first weights, last masks."""
    _, places = pruned()
    fresh = small(1)
    expected = {name: fresh.get_parameter(name).detach() * mask for name, mask in places.items()}
    quiet_sparsify(fresh, masks=places)
    for name, weight in expected.items():
        assert torch.equal(fresh.get_parameter(name).detach(), weight)
    other, _ = pruned()
    with pytest.warns(UserWarning, match=r'not those of masks: \d+ non-zeros outside them.*masks="from-zeros"'):
        dstlib.sparsify(other, masks={name: mask.flip(0) for name, mask in places.items()}, method="static")


def test_the_parts_of_a_fused_projection_have_the_densities_of_their_masks():
    attention = nn.MultiheadAttention(8, 2, bias=False)
    mask = torch.ones(24, 8, dtype=torch.bool)
    mask[:8, 1:] = False  # one of eight for queries, all keys, half of the values
    mask[16:, ::2] = False
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    sparsifier = quiet_sparsify(attention, optimizer, masks={"in_proj_weight": mask})
    x = torch.randn(5, 3, 8)
    for _ in range(7):
        attention(x, x, x)[0].square().sum().backward()
        optimizer.step()
    parts = sparsifier.masks["in_proj_weight"].view(3, -1).sum(dim=1).tolist()
    assert parts == [8, 64, 32]
    assert not torch.equal(sparsifier.masks["in_proj_weight"], mask)


def test_first_masks_by_a_look_at_the_model_and_given_ones_exclude_each_other():
    model, places = pruned()
    before = copy.deepcopy(model.state_dict())
    x = torch.ones(1, 2, 6, 6)
    for init in (snip(model, lambda: model(x).sum()), sparsegpt(model, [x])):  # which repairs weights, too
        with pytest.raises(SettingError, match="got first masks by a look at the dense model"):
            quiet_sparsify(model, masks=places, method=replace(dstlib.STATIC, init=init))
    assert_same(model.state_dict(), before)


# ---- saved states


RAMP = replace(dstlib.GMP, name="ramp", interval=2)


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [
        (QUICK, None),
        (replace(dstlib.METHODS["snfs"], interval=2), None),
        (replace(RAMP, allocate=masking.global_units), 0.9),
        (RAMP, 0.9),
        (replace(dstlib.METHODS["topkast"], interval=2), None),
        (replace(dstlib.METHODS["mest_soft"], interval=2), None),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("source", ["as before", "the state", "from-zeros"])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(method, sparsity, source):
    """The state says what the plan was, whatever zeros there are by now; but a layer without any is no part of them."""
    if method.name == "snfs" and source == "from-zeros":
        pytest.skip("its head has become dense")
    model, places = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"masks": places, "method": method, "sparsity": sparsity, "total_steps": 16}
    sparsifier = quiet_sparsify(model, optimizer, **options)
    train(model, optimizer, 7)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    train(model, optimizer, 9, start=7)

    resumed, _ = pruned()
    if source != "as before":
        resumed.load_state_dict(saved[0])
        options |= {"masks": saved[2] if source == "the state" else "from-zeros"}
    other = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    again = quiet_sparsify(resumed, **options)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    train(resumed, other, 9, start=7)
    assert_same(resumed.state_dict(), model.state_dict())
    assert_same(again.masks, sparsifier.masks)


def test_the_state_of_one_training_gives_the_masks_of_the_next():
    model, _ = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = quiet_sparsify(model, optimizer, masks="from-zeros")
    train(model, optimizer, 6)
    state = sparsifier.state_dict()
    sparsifier.detach()
    for masks in (state, {"sparsifier": state, "epoch": 3}):
        again = quiet_sparsify(model, masks=masks, method="set")
        assert_same(again.masks, sparsifier.masks)
        again.detach()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": (0.5, 0.5)}, "starting densities of conv.weight: expected 1 of them"),
        ({"starts": ()}, "starting densities of conv.weight: expected 1 of them"),
        ({"starts": (2.0,)}, "starting densities of conv.weight"),
        ({"ranked": (0.9,)}, r"mask of conv\.weight: expected \d+ active units|num_planned of the saved state"),
    ],
)
def test_a_state_whose_densities_are_not_those_of_its_masks_is_refused(change, message):
    model, places = pruned()
    sparsifier = quiet_sparsify(model, masks=places)
    state = sparsifier.state_dict()
    state["weights"]["conv.weight"] |= change
    del state["checksum"]
    with pytest.raises(dstlib.errors.StateError, match=message):
        sparsifier.load_state_dict(state)


def test_a_state_from_masks_is_none_of_a_plan_without_them_and_the_other_way_round():
    model, places = pruned()
    sparsifier = quiet_sparsify(model, masks=places)
    of_masks = sparsifier.state_dict()
    sparsifier.detach()
    plain = dstlib.sparsify(small(), sparsity=0.6, method=QUICK, total_steps=1000)
    with pytest.raises(dstlib.errors.StateError, match="load weights after that"):
        plain.load_state_dict(of_masks)
    with pytest.raises(dstlib.errors.StateError, match=r"densities of conv\.weight: expected 1 of them"):
        sparsifier.load_state_dict(plain.state_dict())


def test_copies_of_a_plan_keep_no_masks():
    model, places = pruned()
    assert quiet_sparsify(model, masks=places).plan.given is None


def test_a_state_at_step_0_starts_a_training_from_masks_again():
    model, places = pruned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = quiet_sparsify(model, optimizer, masks=places)
    train(model, optimizer, 5)
    sparsifier.load_state_dict(at_step_0(sparsifier.state_dict()))
    assert sparsifier.step == 0

"""What summary, density and repr tell is what is, and whoever loses a zero is told so: replaced layers, loaded weights,
optimizers that step unheard."""

import copy
import gc
import pickle
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from models import assert_zero_outside, small, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import dstlib
from dstlib import GMP, NM, RIGL, Channel, Element, SettingError, StateError
from dstlib.masking import FanIn, uniform
from dstlib.sparsifier.loaded import take_places

METHOD = replace(RIGL, interval=2)


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def step(model, optimizer, num=1):
    for _ in range(num):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def real_density(model):
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)


def sparse(model, **settings):
    return dstlib.sparsify(model, **{"sparsity": 0.75, "method": METHOD, "total_steps": 200, **settings})


# ---- layers that are replaced


def test_a_replaced_layer_is_told_of_at_the_first_step_and_counted_as_it_is():
    model = mlp()
    sparsifier = sparse(model)
    model[2] = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match=r"2\.weight: sparse until now, .* a dense one of shape \(16, 16\)"):
        step(model, sgd(model))
    assert sparsifier.density == real_density(model)
    assert sparsifier.density > 0.5
    rows = {row.name: row for row in sparsifier.summary().rows}
    assert rows["2.weight"].num_active == 256
    assert "no longer in the model" in str(sparsifier.summary())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        step(model, sgd(model), 3)


def test_a_layer_that_is_removed_is_told_of_and_counts_for_nothing():
    model = mlp()
    sparsifier = sparse(model)
    model[4] = nn.Identity()
    with pytest.warns(UserWarning, match=r"4\.weight: sparse until now, but its module is no longer in the model\."):
        step(model, sgd(model))
    assert sparsifier.summary().num_sparse == 8 * 16 + 16 * 16
    assert sparsifier.density == real_density(model)


def test_matrices_that_come_later_are_in_the_summary():
    model = mlp()
    sparsifier = sparse(model)
    model.append(nn.Linear(3, 5))
    summary = sparsifier.summary()
    row = summary.rows[-1]
    assert (row.name, row.num_active, row.reason) == ("5.weight", 15, "came to the model after sparsify()")
    assert summary.num_other == sum(p.numel() for p in model.parameters() if p.ndim < 2)


@pytest.mark.parametrize("is_first", [True, False], ids=["optimizer first", "optimizer last"])
def test_assigned_parameters_are_refused_whichever_the_optimizer_holds(is_first):
    model = mlp()
    optimizer = sgd(model)
    sparsifier = sparse(model, **{})
    model.load_state_dict(mlp(1).state_dict(), assign=True)
    assert sparsifier.density == 1.0
    optimizer = optimizer if is_first else sgd(model)
    with pytest.raises(StateError, match=r"0\.weight: expected the one that was made sparse, got another in its place"):
        step(model, optimizer)


def test_the_advice_on_a_replaced_layer_costs_the_others_nothing():
    model = mlp()
    sparsifier = sparse(model)
    step(model, sgd(model), 3)
    model[4] = nn.Linear(16, 2)
    with pytest.warns(UserWarning, match="call sparsify\\(\\) with include= of its name: the others keep their masks"):
        step(model, sgd(model))
    before = {name: model.get_parameter(name).clone() for name in ("0.weight", "2.weight")}
    head = sparse(model, include="4.weight")
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())
    step(model, sgd(model), 3)
    assert_zero_outside(model, {**sparsifier.masks, **head.masks})
    assert int(model[4].weight.count_nonzero()) == 8


def test_the_advice_on_assigned_parameters_costs_them_nothing():
    model = mlp()
    sparsifier = sparse(model)
    step(model, sgd(model), 3)
    saved = copy.deepcopy(model.state_dict())
    step(model, sgd(model), 6)
    model.load_state_dict(saved, assign=True)
    with pytest.raises(
        StateError, match=r"To go on from here: detach\(\), a new optimizer, and sparsify\(model, masks"
    ):
        step(model, sgd(model))
    sparsifier.detach()
    optimizer = sgd(model)
    again = sparse(model, seed=5, sparsity=None, masks="from-zeros")
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    step(model, optimizer)
    assert again.density == real_density(model) == 0.25


@pytest.mark.parametrize(
    "change",
    [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm],
    ids=["orthogonal", "weight_norm", "old spectral_norm"],
)
def test_a_weight_that_is_computed_afterwards_is_refused(change):
    model = mlp()
    sparsifier = sparse(model)
    change(model[2])
    effective = int(model[2].weight.count_nonzero())
    rows = {row.name: row for row in sparsifier.summary().rows}
    assert rows["2.weight"].num_active == effective
    with pytest.raises(StateError, match=r"2\.weight: .* got a tensor computed from another in its place"):
        step(model, sgd(model))


def test_layers_may_move_and_be_wrapped():
    model = mlp()
    sparsifier = sparse(model)
    model[2] = nn.Sequential(model[2])
    other = nn.ModuleDict({"body": model})
    optimizer = sgd(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, 5)
    assert_zero_outside_by_identity(sparsifier)
    assert sparsifier.density == real_density(model)


def test_a_wrapper_that_nobody_keeps_takes_no_layer_along():
    model = mlp()
    sparsifier = sparse(nn.ModuleDict({"body": model}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, sgd(model), 5)
    assert_zero_outside_by_identity(sparsifier)


def assert_zero_outside_by_identity(sparsifier):
    for weight in sparsifier.weights:
        assert not weight.parameter[~sparsifier.masks[weight.name]].count_nonzero()


def test_a_copied_pair_watches_its_own_layers():
    model = mlp()
    sparsifier = sparse(model)
    for copied, theirs in (
        copy.deepcopy((model, sparsifier)),
        pickle.loads(pickle.dumps((model, sparsifier))),
    ):
        copied[2] = nn.Linear(16, 16)
        with pytest.warns(UserWarning, match=r"2\.weight: sparse until now"):
            step(copied, sgd(copied))
        assert theirs.density == real_density(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, sgd(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_layer_that_was_replaced_before_a_copy_is_told_of_by_the_copy(copied):
    model = mlp()
    sparsifier = sparse(model)
    model[2] = nn.Linear(16, 16)
    model, sparsifier = copied((model, sparsifier))
    assert sparsifier.density == real_density(model)
    with pytest.warns(UserWarning, match=r"2\.weight: sparse until now"):
        step(model, sgd(model))


class HoldsItsSparsifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.sparsifier = sparse(self)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_model_that_holds_its_sparsifier_is_copied_with_it(copied):
    """The copy was looked through while it was still empty."""
    model = HoldsItsSparsifier()
    step(model, sgd(model), 2)
    twin = copied(model)
    step(twin, sgd(twin), 3)
    assert twin.sparsifier.step == 5
    assert twin.sparsifier.density == real_density(twin) == real_density(model)
    assert_zero_outside_by_identity(twin.sparsifier)
    twin.body[2] = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match=r"body\.2\.weight: sparse until now"):
        step(twin, sgd(twin))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_the_sparsifier_of_a_copy_lives_as_long_as_its_model(copied):
    """Without its own sparsifier, which nobody kept, the copy trained dense in silence."""
    model = mlp()
    twin = copied((model, sparse(model)))[0]
    gc.collect()
    step(twin, sgd(twin), 3)
    assert real_density(twin) == real_density(model)


def test_parameters_that_are_exchanged_in_the_lists_of_an_optimizer_are_looked_at():
    model = mlp()
    sparsifier, optimizer = sparse(model), sgd(model)
    step(model, optimizer, 2)
    model[2] = nn.Linear(16, 16)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as many as before
    with pytest.warns(UserWarning, match=r"2\.weight: sparse until now"):
        step(model, optimizer)
    assert sparsifier.density == real_density(model)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_group_that_is_added_to_an_optimizer_of_other_weights_is_looked_at(num_steps):
    """It may hold what came in the place of a sparse weight, even if nothing else of the optimizer ever was sparse."""
    model, other = mlp(), nn.Linear(8, 2)
    sparsifier = sparse(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(num_steps):
        other(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    model.load_state_dict(mlp(1).state_dict(), assign=True)
    optimizer.add_param_group({"params": list(model.parameters())})
    with pytest.raises(StateError, match=r"parameter of 0\.weight.*another in its place"):
        step(model, optimizer)
    assert sparsifier.step == 0


def test_flat_parameters_of_fsdp_are_refused(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp()
        sparsifier = sparse(model)
        sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        with pytest.raises(StateError, match=r"0\.weight: expected the one that was made sparse"):
            step(sharded, sgd(sharded))
        assert sparsifier.summary().num_sparse
    finally:
        dist.destroy_process_group()


# ---- weights that are loaded


def test_non_zeros_outside_the_masks_are_counted_and_named():
    model = mlp()
    sparsifier = sparse(model)
    planned = sparsifier.density
    assert planned == real_density(model)
    model.load_state_dict(mlp(1).state_dict())
    assert sparsifier.density == real_density(model) == 1.0
    assert "non-zeros outside the mask" in str(sparsifier.summary())
    num_sparse = sparsifier.summary().num_sparse
    assert repr(sparsifier).startswith(f"Sparsifier(rigl, 3 weights, {num_sparse} of {num_sparse} active")
    with pytest.warns(UserWarning, match="step 1: .* non-zeros outside the masks of .*, which this step sets to zero"):
        step(model, sgd(model))
    assert sparsifier.density == real_density(model) == planned


@pytest.mark.parametrize("first", [True, False], ids=["load, then sparsify", "sparsify, then load"])
@pytest.mark.parametrize("grain", [Element(), Channel(), FanIn(), NM(1, 4)], ids=str)
def test_sparse_weights_without_their_masks_keep_all_they_have(first, grain):
    method = replace(METHOD, granularity=grain, distribution=uniform)
    trained = mlp()[:4]
    settings = {"method": method, "sparsity": 0.75}
    sparsifier = sparse(trained, **settings)
    step(trained, sgd(trained), 7)
    saved = copy.deepcopy(trained.state_dict())
    model = mlp(1)[:4]
    if first:
        model.load_state_dict(saved)
        later = sparse(model, seed=5, **settings)
    else:
        later = sparse(model, seed=5, **settings)
        model.load_state_dict(saved)
        later.freeze()  # else the step may also be an update
        with pytest.warns(UserWarning, match="without the masks that belong to them"):
            step(model, sgd(model))
    for name, mask in later.masks.items():
        assert not saved[name][~mask].count_nonzero(), "a trained weight was lost"
        assert int(mask.sum()) == int(sparsifier.masks[name].sum())
    assert later.density >= real_density(model), "grown weights may be zero as yet"


def test_a_dense_start_says_that_zeros_will_train():
    model = mlp()
    sparse(model).detach()
    with pytest.warns(UserWarning, match="by the plan of method gmp dense weights come first there"):
        sparse(model, method=GMP, total_steps=1000)


def two_moments():
    """A model at its eighth step, with the weights and the state of its fourth."""
    model = mlp()
    optimizer, sparsifier = sgd(model), sparse(model)
    step(model, optimizer, 4)
    earlier = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    step(model, optimizer, 4)
    return model, sparsifier, *earlier


def test_a_state_that_is_saved_beside_other_weights_says_so():
    model, sparsifier, weights, _ = two_moments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.state_dict()
    model.load_state_dict(weights)
    with pytest.warns(UserWarning, match=r"state_dict\(\): \d+ non-zeros of the weights lie outside the masks"):
        sparsifier.state_dict()


@pytest.mark.parametrize("weights_first", [True, False])
def test_weights_and_state_of_one_moment_fit_in_any_order(weights_first):
    model, sparsifier, weights, state = two_moments()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if weights_first:
            model.load_state_dict(weights)
        sparsifier.load_state_dict(state)
        if not weights_first:
            model.load_state_dict(weights)
        assert sparsifier.density == sum(int(m.sum()) for m in sparsifier.masks.values()) / (8 * 16 + 16 * 16 + 48)
        step(model, sgd(model))
    assert_zero_outside_by_identity(sparsifier)


def test_a_state_of_another_moment_than_the_weights_says_so():
    model, sparsifier, weights, _ = two_moments()
    later = sparsifier.state_dict()
    model.load_state_dict(weights)
    with pytest.warns(UserWarning, match=r"load_state_dict\(\): \d+ non-zeros of weights that were loaded before"):
        sparsifier.load_state_dict(later)


def test_a_state_that_is_loaded_in_inference_mode_can_be_trained():
    model = mlp()
    sparsifier, optimizer = sparse(model, method=replace(dstlib.methods.SNFS, interval=2)), sgd(model)
    step(model, optimizer, 3)
    with torch.inference_mode():
        sparsifier.load_state_dict(sparsifier.state_dict())
    step(model, optimizer, 3)
    assert_zero_outside_by_identity(sparsifier)


def test_a_weight_of_another_shape_is_counted_as_it_is_until_the_step_that_refuses_it():
    model = mlp()
    sparsifier, optimizer = sparse(model), sgd(model)
    step(model, optimizer)
    model[4].weight.data = torch.ones(2, 16)
    model[4].bias.data = torch.ones(2)
    model.zero_grad()
    assert sparsifier.density == real_density(model)
    with pytest.raises(StateError, match=r"4\.weight.*another shape"):
        step(model, optimizer)


@given(st.data())
def test_places_are_taken_whole_or_not_at_all(data):
    grain = data.draw(st.sampled_from([Element(), Channel(), FanIn()]))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    model = nn.Linear(6, 6, bias=False)
    sparsifier = sparse(model, method=replace(METHOD, granularity=grain), sparsity=0.5)
    m = sparsifier._masked[0]
    before = m.mask.clone()
    with torch.no_grad():
        model.weight.copy_(
            torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.0, 1.0]), min_size=36, max_size=36))).view(6, 6)
        )
    fits = take_places(m, grain)
    room = grain.fold(before)[..., 0].sum(dim=1)
    assert torch.equal(grain.fold(m.mask)[..., 0].sum(dim=1), room), "each group keeps its number"
    needed = grain.fold(model.weight.detach() != 0).any(dim=-1).sum(dim=1)
    assert fits == bool((needed <= room).all())
    assert bool((model.weight[~m.mask] == 0).all()) if fits else torch.equal(m.mask, before)


def test_sparse_weights_that_the_plan_has_no_room_for_are_told_of():
    """The end of a run that moved budgets between layers, say; a criterion that chose them would need no word."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    sparse(model, sparsity=0.8, overrides={"0": 0.6}).detach()
    held = model[0].weight.detach().abs().flatten()
    with pytest.warns(UserWarning, match=r"sparsify\(\): 0.weight already held zeros, .* \d+ of them, the smallest"):
        sparse(model, sparsity=0.8).detach()
    kept = model[0].weight.detach().flatten() != 0
    assert held[kept].min() > held[~kept].max()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sparse(model, sparsity=0.9, method=replace(METHOD, init=dstlib.masking.magnitude))


# ---- steps that nobody hears, and steps that nobody takes


class InBackward(torch.optim.Optimizer):
    """Steps while gradients arrive, and has no step to speak of."""

    def __init__(self, params):
        super().__init__(params, {})
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self.move)

    def move(self, p):
        p.data.sub_(p.grad, alpha=0.1)
        p.grad = None


def test_an_optimizer_that_steps_in_backward_is_told_of():
    model = mlp()
    sparsifier = sparse(model)
    InBackward(model.parameters())
    model(torch.ones(2, 8)).square().sum().backward()
    loss = model(torch.ones(2, 8)).square().sum()
    with pytest.warns(UserWarning, match=r"no optimizer\.step\(\) was heard"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for _ in range(8):
            model(torch.ones(2, 8)).square().sum().backward()
    assert sparsifier.density == real_density(model)


def test_weights_that_move_after_the_step_are_told_of_once_in_a_row():
    model = mlp()
    sparse(model)
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(4):
            step(model, optimizer)
            with torch.no_grad():
                model[2].weight.add_(1.0)
    assert [str(w.message).partition(":")[0] for w in told] == ["step 2"]


@pytest.mark.parametrize("write", [lambda p, x: p.data.copy_(x), lambda p, x: setattr(p, "data", x)])
def test_weights_that_are_written_without_a_new_version_are_told_of(write):
    """Averages are swapped in like this by diffusers' EMAModel.copy_to, torch_ema and vector_to_parameters."""
    model = mlp()
    sparsifier, optimizer = sparse(model), sgd(model)
    step(model, optimizer, 3)
    for parameter in model.parameters():
        write(parameter, torch.ones_like(parameter))
    with pytest.warns(UserWarning, match=r"state_dict\(\): \d+ non-zeros of the weights lie outside"):
        sparsifier.state_dict()
    with pytest.warns(UserWarning, match=r"step 4: \d+ non-zeros outside the masks of 0\.weight, 2\.weight, 4\.weight"):
        step(model, optimizer)
    assert sparsifier.density == real_density(model)


def test_another_weight_that_is_written_at_the_next_step_is_told_of_too():
    model = mlp()
    sparse(model)
    optimizer = sgd(model)
    step(model, optimizer)
    for layer in (0, 2):
        with torch.no_grad():
            model[layer].weight.fill_(1.0)
        with pytest.warns(UserWarning, match=rf"non-zeros outside the masks of {layer}\.weight"):
            step(model, optimizer)


def test_a_weight_on_which_nobody_steps_is_told_of():
    model = mlp()
    sparse(model)
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[4].parameters()], lr=0.1)
    with pytest.warns(
        UserWarning, match=r"2\.weight: sparse, but on them no optimizer has stepped in the first 10 steps"
    ):
        step(model, optimizer, 11)


def test_a_generator_whose_turn_comes_late_is_not_told_of():
    """Twenty steps of the critic for one of the generator, which has no gradient until then, are ordinary."""
    model = nn.ModuleDict({"generator": mlp(), "critic": mlp(1)})
    sparse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part, num in (("critic", 20), ("generator", 1)):
            step(model[part], sgd(model[part]), num)


def test_a_weight_that_nothing_reaches_is_told_of_in_the_end():
    model = nn.ModuleDict({"used": nn.Linear(8, 3), "unused": nn.Linear(8, 3)})
    sparse(model, method="static")
    optimizer = sgd(model["used"])
    with pytest.warns(UserWarning, match=r"unused\.weight: sparse, but on them no optimizer .* first 1000 steps"):
        step(model["used"], optimizer, 1001)


def test_an_optimizer_within_another_takes_one_step():
    model = mlp()
    sparsifier, inner = sparse(model), sgd(model)

    class Outer(torch.optim.Optimizer):
        def step(self):
            inner.step()

    step(model, Outer(inner.param_groups, {}), 3)
    assert sparsifier.step == 3


def test_reading_the_state_for_a_distributed_checkpoint_is_no_step():
    runs = []
    for reads in (False, True):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = sparse(model)
        for i in range(12):
            train(model, optimizer, 1, start=i)
            optimizer.zero_grad()
            if reads:
                get_optimizer_state_dict(model, optimizer)
        assert sparsifier.step == 12
        runs.append(sparsifier.masks)
    assert all(torch.equal(runs[0][name], mask) for name, mask in runs[1].items())


def test_a_warmup_from_zero_is_a_step():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = sparse(model)
    train(model, optimizer, 2)
    assert sparsifier.step == 2


@pytest.mark.parametrize("method", ["rigl", "static"])
def test_gradients_to_be_differentiated_are_refused_where_masks_move(method):
    model = mlp()
    sparse(model, method=method, total_steps=200)
    optimizer = sgd(model)
    model(torch.ones(2, 8)).square().sum().backward(create_graph=True)
    if method == "static":
        optimizer.step()
        return
    with pytest.raises(SettingError, match=r"gradient of 0\.weight: .*create_graph=True"):
        optimizer.step()


# ---- cost, and other processes


def calls_of_a_step(num_layers):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(num_layers)])
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1),
        *[torch.optim.SGD([p], lr=0.1) for p in model.parameters()],
    ]
    sparse(model, method="static", sparsity=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    counts = []
    for together in (optimizers[:1], optimizers[1:]):
        for optimizer in together:
            optimizer.step()
        num = 0

        def count(frame, event, argument):
            nonlocal num
            num += 1

        sys.setprofile(count)
        for optimizer in together:
            optimizer.step()
        sys.setprofile(None)
        counts.append(num)
    return counts


def test_a_step_costs_as_much_for_each_of_many_layers_as_of_few():
    for few, many in zip(calls_of_a_step(10), calls_of_a_step(80), strict=True):
        assert many < 8.5 * few, f"{few} calls for 10 layers, {many} for 80"


def test_masks_that_were_sent_to_another_process_are_its_own():
    from multiprocessing.reduction import ForkingPickler

    sparsifier = sparse(mlp())
    theirs = pickle.loads(bytes(ForkingPickler.dumps(sparsifier)))
    assert sparsifier.masks.packed["2.weight"].bits.is_shared()
    assert not theirs.masks.packed["2.weight"].bits.is_shared()
    assert torch.equal(theirs.masks["2.weight"], sparsifier.masks["2.weight"])


def test_hooks_are_no_part_of_a_compiled_step():
    model = mlp()
    sparsifier = sparse(model)
    optimizer = torch.optim.Adam(model.parameters())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(optimizer.step, backend=backend)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().sum().backward()
        compiled()
    names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert graphs
    assert not any("int32" in name or "bool" in name for name in names)
    assert_zero_outside(model, sparsifier.masks)
    assert sparsifier.step == 5


def test_a_model_may_be_made_sparse_in_inference_mode():
    model = mlp()
    with torch.inference_mode():
        sparsifier = sparse(model)
    step(model, sgd(model), 5)
    assert_zero_outside(model, sparsifier.masks)


def test_a_gradient_of_one_number_expanded_is_masked():
    model = nn.Linear(8, 8, bias=False)
    sparsifier = sparse(model, method="static")
    for _ in range(2):
        model.weight.grad = torch.ones(()).expand(8, 8)
        sgd(model).step()
    assert_zero_outside(model, sparsifier.masks)

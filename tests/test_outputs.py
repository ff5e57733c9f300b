"""Outputs of a model: which weights they come from, and that none of them loses its last weight."""

import copy
import gc
import io
import pickle
import random
import warnings
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import folds, generator, seeds
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dstlib
from dstlib.errors import SelectionError, SettingError, StateError
from dstlib.masking import (
    Account,
    Allocation,
    Block,
    Budget,
    Channel,
    Element,
    FanIn,
    Kernel,
    MaskUpdate,
    NeuronAblation,
    fill_outputs,
    leave_for_outputs,
    num_outputs,
    unit_mask,
)
from dstlib.masking.outputs import outputs_of_units
from dstlib.targets.outputs import PassWatch, is_hooked, note_pass

# Outputs without a weight


def filled_reference(
    rows: list[int], old: list[bool], new: list[bool], drop: list[float], grow: list[float], may_grow: bool
) -> list[bool]:
    """One after the other, from the definition; rows are the outputs of units."""
    chosen = {u for u, is_in in enumerate(new) if is_in}
    candidates = {u for u in range(len(rows)) if may_grow or old[u]}

    def strength(u: int, is_first: bool) -> tuple[bool, float, int]:
        return is_first, drop[u] if is_first else grow[u], -u

    best = {}
    for u in sorted(candidates, key=lambda u: strength(u, old[u])):
        if rows[u] not in {rows[v] for v in chosen}:
            best[rows[u]] = u  # the last is the strongest
    for u in sorted(best.values(), key=lambda u: strength(u, old[u]), reverse=True):
        spare = [v for v in chosen if v not in best.values() and sum(rows[w] == rows[v] for w in chosen) > 1]
        if not spare:
            break
        chosen.remove(min(spare, key=lambda v: strength(v, old[v] and new[v])))
        chosen.add(u)
    return [u in chosen for u in range(len(rows))]


@st.composite
def changes(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    """A granularity, an update of a small weight with scores that may tie, and whether units may grow."""
    num_rows, num_columns = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    grain, shape = draw(
        st.sampled_from(
            [
                (Element(), (num_rows, num_columns)),
                (Element(), (num_rows, 1, num_columns)),
                (Kernel(), (num_rows, num_columns, 2)),
                (Channel(), (num_rows, num_columns)),
                (Block(2, 1), (2 * num_rows, num_columns)),
                (Block(1, 2), (num_rows, 2 * num_columns)),
            ]
        )
    )
    shape = torch.Size(shape)
    num_units = grain.fold(torch.zeros(shape)).shape[1]
    g = generator(draw(seeds))
    share = draw(st.sampled_from([0.1, 0.3, 0.6, 1.0]))
    old_U, new_U = (torch.rand(1, num_units, generator=g) < share for _ in range(2))
    num_values = draw(st.sampled_from([1, 3, 1000]))
    drop_U, grow_U = (torch.randint(0, num_values, (1, num_units), generator=g).float() for _ in range(2))
    old, new = (unit_mask(x, grain, shape) for x in (old_U, new_U))
    change = MaskUpdate(new, dropped=old & ~new, grown=new & ~old, idle_G=torch.tensor([False]))
    return grain, old, change, drop_U, grow_U, draw(st.booleans())


@given(changes())
def test_every_output_has_a_unit_if_there_are_enough_and_their_number_stays(drawn) -> None:  # type: ignore[no-untyped-def]
    grain, old, change, drop_U, grow_U, may_grow = drawn
    found = fill_outputs(change, drop_U, grow_U, granularity=grain, may_grow=may_grow)
    new_U, before_U = (grain.fold(mask)[0, :, 0] for mask in (found.mask, change.mask))
    assert torch.equal(unit_mask(new_U[None], grain, old.shape), found.mask)  # whole units
    assert int(new_U.sum()) == int(before_U.sum())
    assert torch.equal(found.dropped, old & ~found.mask)
    assert torch.equal(found.grown, found.mask & ~old)
    num_filled = int(found.mask.flatten(1).any(dim=1).sum())
    assert num_filled >= int(change.mask.flatten(1).any(dim=1).sum())
    if may_grow:
        num_needed = num_outputs(grain, old.shape)
        num_each = len(old) // num_needed  # outputs that share their units
        assert num_filled == num_each * min(int(new_U.sum()), num_needed)
    else:
        assert not bool((found.mask & ~change.mask & ~old).any())
    if bool(change.mask.flatten(1).any(dim=1).all()):
        assert found is change


@given(changes())
def test_who_enters_and_who_leaves_is_by_the_scores(drawn) -> None:  # type: ignore[no-untyped-def]
    grain, old, change, drop_U, grow_U, may_grow = drawn
    found = fill_outputs(change, drop_U, grow_U, granularity=grain, may_grow=may_grow)
    first = torch.arange(len(old)).view(-1, *(1,) * (old.ndim - 1)).expand(old.shape)
    rows = grain.fold(first)[0, :, 0].tolist()
    old_U, new_U, got_U = (grain.fold(mask)[0, :, 0].tolist() for mask in (old, change.mask, found.mask))
    assert got_U == filled_reference(rows, old_U, new_U, drop_U[0].tolist(), grow_U[0].tolist(), may_grow)


@pytest.mark.parametrize("grain", [FanIn(), dstlib.NM(1, 2)])
def test_units_in_groups_are_left_alone(grain) -> None:  # type: ignore[no-untyped-def]
    """Each output has some by itself; an empty one, as of an ablated neuron, is not this function's to fill."""
    mask = torch.tensor([[True, True], [False, False]])
    nothing = torch.zeros_like(mask)
    change = MaskUpdate(mask, nothing, nothing, idle_G=torch.tensor([False]))
    score_GU = torch.ones(grain.fold(mask).shape[:2])
    assert fill_outputs(change, score_GU, score_GU, granularity=grain) is change
    assert num_outputs(grain, mask.shape) == 0


def test_the_others_give_up_in_proportion_to_what_they_have() -> None:
    """Three units from layers of 2 and 8, by 2 : 8, which is 0.6 and 2.4; the smaller one has one that it can give."""
    active_GU, scores_GU = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8)
    accounts = [
        Account(name=name, active_GU=active_GU, drop_GU=scores_GU, grow_GU=scores_GU, num_planned=1, num_outputs=num)
        for name, num in (("small", 0), ("large", 0), ("head", 4))
    ]
    budgets = tuple(Budget(torch.tensor([n]), torch.tensor([n])) for n in (2, 8, 1))
    found = leave_for_outputs(Allocation(budgets), accounts)
    assert [int(budget.num_target_G) for budget in found.budgets] == [1, 6, 4]


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 12), st.booleans()), min_size=1, max_size=5), seeds)
def test_output_layers_get_a_unit_for_each_output_from_the_others(sizes, seed: int) -> None:  # type: ignore[no-untyped-def]
    accounts, budgets = [], []
    for i, (num_units, num_needed, is_full) in enumerate(sizes):
        g = generator(seed + i)
        active_GU = torch.rand(1, num_units, generator=g) < 0.5
        target = num_units if is_full else int(torch.randint(1, num_units + 1, (), generator=g))
        kept = min(target, int(active_GU.sum()))
        score_GU = torch.zeros(1, num_units)
        needed = min(num_needed, num_units)
        accounts.append(
            Account(
                name=str(i), active_GU=active_GU, drop_GU=score_GU, grow_GU=score_GU, num_planned=1, num_outputs=needed
            )
        )
        budgets.append(Budget(torch.tensor([kept]), torch.tensor([target])))
    found = leave_for_outputs(Allocation(tuple(budgets), 3.0), accounts)
    before, after = ([int(b.num_target_G) for b in x] for x in (budgets, found.budgets))
    needed = [max(a.num_outputs, 1) for a in accounts]
    assert sum(after) == sum(before)
    assert found.memory == 3.0
    lacks = sum(max(n - b, 0) for b, n in zip(before, needed, strict=True))
    spare = sum(max(b - n, 0) for b, n in zip(before, needed, strict=True))
    assert sum(max(n - b, 0) for b, n in zip(after, needed, strict=True)) == max(lacks - spare, 0)
    for b, old, a, n in zip(found.budgets, before, accounts, needed, strict=True):
        assert int(b.num_kept_G) <= min(int(b.num_target_G), int(a.active_GU.sum()))
        assert min(old, n) <= int(b.num_target_G) <= max(old, n)


# Which weights they come from


def roles(model: nn.Module, *args: object, run=None) -> dict[str, bool | None]:  # type: ignore[no-untyped-def]
    """What one pass tells of each weight of a model; those that it does not show are left out."""
    watch = PassWatch(model, [p for p in model.parameters() if p.ndim > 1])
    try:
        (run or model)(*args)
        names = {id(p): name for name, p in model.named_parameters()}
        found = watch.outputs()
    finally:
        watch.stop()
    assert not any(m._forward_hooks for m in model.modules())
    return {names[key].removesuffix(".weight"): is_output for key, is_output in found.items()}


class Heads(nn.Module):
    """Two heads, the first registered before what feeds it, an auxiliary one, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.stem, self.body = nn.Linear(6, 3), nn.Linear(4, 6), nn.Linear(6, 6)
        self.first, self.aux, self.unused = nn.Linear(6, 2), nn.Linear(6, 5), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> object:
        y = self.stem(x).relu()
        z = self.norm(y + self.body(y)).relu()
        return {"main": self.first(z).softmax(dim=-1), "more": (self.second(z), [self.aux(y)])}


X = torch.ones(3, 4)
HEADS = {"second": True, "stem": False, "body": False, "first": True, "aux": True}
BAG = {"0": False, "1": True}


class Tied(nn.Module):
    """A language model whose output weight is that of its embedding, with scales of an output each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.position, self.scale = nn.Parameter(torch.ones(1, 3, 4)), nn.Parameter(torch.ones(1, 9))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.mlp(self.embed(x) + self.position).relu(), self.embed.weight) * self.scale


class Fed(nn.Module):
    """A head whose output goes back in, as where boxes are refined."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        box, boxes = torch.zeros(len(x), 2), []
        for _ in range(3):
            box = box + self.head(self.inner(torch.cat([x, box], dim=1)).relu())
            boxes.append(box)
        return boxes


class Experts(nn.Module):
    """Stacked experts before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(2, 4, 6)), nn.Parameter(torch.ones(2, 6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,eio->ebo", x, self.up).relu()
        return self.head(torch.stack([y[e] @ self.down[e] for e in range(2)]).sum(dim=0))


class Tokens(nn.Module):
    """A decoder with residuals and norms by entry, along which embeddings, positions and biases reach the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(9, 4), nn.Parameter(torch.ones(3, 4))
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4, bias=False)
        self.bias, self.head = nn.Parameter(torch.ones(2, 4)), nn.Linear(4, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x) + self.position
        y = y + self.down(self.up(self.norm(y)).relu()) + self.bias[x % 2]
        return self.head(self.norm(y))

    def norm(self, y: Tensor) -> Tensor:
        return y * y.square().mean(dim=-1, keepdim=True).rsqrt()


class Bag(nn.Module):
    """A classifier of the mean of embeddings, which nothing else enters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(dim=1))


def decoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2))


def unrolled() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("make", "x", "expected"),
    [
        (Heads, X, HEADS),
        (Tied, torch.zeros(2, 3, dtype=torch.long), {"embed": True, "mlp": False, "position": False}),
        (
            Tokens,
            torch.zeros(2, 3, dtype=torch.long),
            # what is only ever added may be another part of the head's weight, as far as a graph can tell
            {"embed": False, "position": None, "up": False, "down": False, "bias": None, "head": True},
        ),
        (Bag, torch.zeros(2, 3, dtype=torch.long), {"embed": False, "head": True}),
        (lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), torch.zeros(2, 3, dtype=torch.long), BAG),
        (lambda: nn.Embedding(9, 4), torch.zeros(2, 3, dtype=torch.long), {"weight": True}),
        (Fed, X, {"inner": False, "head": True}),
        (Experts, X, {"up": False, "down": False, "head": True}),
        (
            unrolled,
            torch.ones(2, 3, 4),
            {
                **{"0": False, "1.self_attn.in_proj_weight": False, "1.self_attn.out_proj": False},
                **{"1.linear1": False, "1.linear2": False, "2": True},
            },
        ),
        (decoder, torch.ones(2, 1, 5, 5), {"0": False, "2": True}),
    ],
)
def test_outputs_are_found_by_what_they_feed(make, x, expected) -> None:  # type: ignore[no-untyped-def]
    assert roles(make(), x) == expected


def test_what_other_precisions_and_parts_show() -> None:
    model = Heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert roles(model, X) == HEADS
    parts = roles(model, X, run=lambda x: model.first(model.body(model.stem(x))))  # nobody calls the model itself
    assert parts == {"stem": False, "body": False, "first": True}
    with torch.no_grad():
        assert roles(model, X) == {}


class Adversaries(nn.Module):
    """Two networks in one module, of which the second judges what the first makes."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.judge = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)


def ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


@pytest.mark.parametrize("calls_whole", [False, True])
def test_what_another_optimizers_network_judges_is_an_output(calls_whole: bool) -> None:
    model = Adversaries()
    names = {id(p): name for name, p in model.named_parameters()}

    def told(optimized: list[set[int]]) -> set[str]:
        watch = PassWatch(model, [p for p in model.parameters() if p.ndim > 1])
        model.judge(model(X) if calls_whole else model.generator(X))
        found = watch.outputs(optimized)
        watch.stop()
        return {names[key] for key, is_output in found.items() if is_output}

    both = {"generator.2.weight", "judge.2.weight"}
    assert told([ids(model.generator), ids(model.judge)]) == both
    # one optimizer trains one network, whose parts a user may call one by one; what the whole returns is told by itself
    assert told([ids(model)]) == (both if calls_whole else {"judge.2.weight"})
    split = [ids(model.generator[0]), ids(model) - ids(model.generator[0])]  # as matrices by Muon, the others by AdamW
    assert told(split) == (both if calls_whole else {"judge.2.weight"})


def test_a_generator_keeps_all_its_outputs() -> None:
    torch.manual_seed(0)
    model = Adversaries()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.judge, model.generator)]
    method = replace(ABLATING, drop_fraction=dstlib.schedules.Constant(0.5))
    sparsifier = dstlib.sparsify(model, *optimizers, sparsity=0.5, method=method, total_steps=24)
    for step in range(20):
        z = torch.randn(6, 4, generator=generator(step))
        for optimizer, sign in zip(optimizers, (1, -1), strict=True):
            optimizer.zero_grad()
            made = model.generator(z)  # what the judge learns from is made without a graph, as most programs do
            judged = model.judge(made.detach() if sign == 1 else made)
            (sign * judged.square().mean()).backward()
            optimizer.step()
    outputs = sparsifier.state_dict()["outputs"]
    assert {name for name, is_output in outputs.items() if is_output} == {"generator.2.weight", "judge.2.weight"}
    assert not gone(sparsifier)["generator.2"]


def test_of_a_whole_pass_no_graph_is_held() -> None:
    """Else activations of inference with gradients, which no step follows, would stay for good."""
    model, *_ = trained(ABLATING, 1)
    saved: list[weakref.ref[Tensor]] = []

    def packed(x: Tensor) -> Tensor:
        copied = x.clone()  # of a node alone, as the tensor itself may be a weight
        saved.append(weakref.ref(copied))
        return copied

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: x):
        model(torch.ones(2, model.num_inputs))
    gc.collect()
    assert saved
    assert not any(x() is not None for x in saved)


def test_what_no_graph_tells_apart_is_none_or_left_out() -> None:
    compiled = roles(torch.compile(Heads(), backend="aot_eager"), X)
    assert set(compiled.values()) == {None}
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    hidden = roles(
        model, X.requires_grad_(), run=lambda x: model[2](checkpoint(model[1], model[0](x), use_reentrant=True))
    )
    X.requires_grad_(False)
    assert hidden == {"0": False, "2": True}
    shown = roles(model, X, run=lambda x: model[2](checkpoint(model[1], model[0](x), use_reentrant=False)))
    assert shown == {"0": False, "1.0": False, "1.1": False, "2": True}


# In a training


class Net(nn.Module):
    """A random network: some layers, heads on any of them, registered in any order, tied or several, and unused ones.

    Heads are as wide as each needs for a weight for each output; widths divide by 4, for N:M.
    """

    def __init__(self, seed: int, least: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        widths = [4 * rng.randint(-(-least // 4), 5) for _ in range(rng.randint(2, 4))]
        self.num_inputs = widths[0]
        layers = {f"body{i}": nn.Linear(a, b) for i, (a, b) in enumerate(pairwise(widths))}
        self.at = {"head0": len(widths) - 1}  # the last layer has one, or there would be none
        self.at |= {f"head{i}": rng.randrange(1, len(widths)) for i in range(1, rng.randint(1, 4))}
        layers |= {name: nn.Linear(widths[i], rng.randint(2, 12)) for name, i in self.at.items()}
        if rng.random() < 0.3:
            layers |= {"unused": nn.Linear(8, 8)}
        for name, layer in rng.sample(list(layers.items()), len(layers)):
            self.add_module(name, layer)
        if rng.random() < 0.3:
            self.at["twin"] = self.at["head0"]
            self.twin = nn.Linear(widths[-1], self.head0.out_features)
            self.twin.weight = self.head0.weight
        self.num_layers = len(widths) - 1

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [x]
        for i in range(self.num_layers):
            maps.append(getattr(self, f"body{i}")(maps[-1]).relu())
        return {name: getattr(self, name)(maps[i]) for name, i in self.at.items()}


def quick(name: str) -> dstlib.Method:
    method = dstlib.METHODS[name]
    return replace(method, interval=method.interval and 2)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(6, model.num_inputs, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    sum(y.log_softmax(dim=-1)[:, 0].mean() for y in model(x).values()).backward()
    optimizer.step()


def check_outputs(name: str, seed: int, num_steps: int = 6) -> None:
    method = dstlib.METHODS[name]
    method = replace(method, interval=method.interval and 1)
    num_steps = max(num_steps, 20 if name == "acdc" else 0)  # it has 20 phases
    torch.manual_seed(seed)
    sparsity = 0.5 if isinstance(method.granularity, dstlib.NM) else random.Random(seed).choice((0.6, 0.75, 0.9))
    model = Net(seed, least=round(1 / (1 - sparsity)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)  # at which none of them diverges
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unused layers
        sparsifier = dstlib.sparsify(
            model, optimizer, sparsity=sparsity, method=method, total_steps=num_steps, seed=seed
        )
        for step in range(num_steps):
            step_of(model, optimizer, step)
            for head in model.at if step else ():  # the first step shows who they are
                mask = sparsifier.masks.get(f"{head}.weight")
                assert mask is None or bool(mask.any(dim=1).all()), (name, seed, step, head)


PRESETS = list(dstlib.METHODS)


def test_no_output_of_random_networks_is_without_a_weight() -> None:
    """Two networks by each preset; the long test has two hundred."""
    for seed in range(2 * len(PRESETS)):
        check_outputs(PRESETS[seed % len(PRESETS)], seed)


@pytest.mark.long
@pytest.mark.parametrize("name", PRESETS)
def test_no_output_is_without_a_weight_by_any_method(name: str) -> None:
    for seed in range(200):
        check_outputs(name, seed, num_steps=20)


def trained(method: dstlib.Method, num_steps: int, model: nn.Module | None = None, **options: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = Net(3, least=4) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.75, method=method, total_steps=24, **options)
    for step in range(num_steps):
        step_of(model, optimizer, step)
    return model, optimizer, sparsifier


ABLATING = replace(quick("srigl"), allocate=NeuronAblation(1.0))


def gone(sparsifier: dstlib.Sparsifier) -> dict[str, int]:
    """Counts the neurons of each layer without a weight."""
    return {name.removesuffix(".weight"): int((~mask.any(dim=1)).sum()) for name, mask in sparsifier.masks.items()}


def test_neurons_are_ablated_of_all_layers_but_outputs() -> None:
    model, _, sparsifier = trained(ABLATING, 20)
    lost = gone(sparsifier)
    assert {name for name, num in lost.items() if num} == {name for name in lost if name.startswith("body")}
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_whose_neurons_are_kept_are_named() -> None:
    with pytest.raises(SelectionError, match="a layer whose neurons are kept: expected a match"):
        trained(ABLATING, 0, keep_neurons="nowhere")
    for wrong in (3, [4], ["head0", 4]):
        with pytest.raises(
            SettingError, match=r"keep_neurons of sparsify\(\): expected a glob or several, got"
        ) as told:
            trained(ABLATING, 0, keep_neurons=wrong)
        assert repr(wrong) in str(told.value)
        assert "as 'body0', 'head" in str(told.value)
    _, _, sparsifier = trained(ABLATING, 20, keep_neurons=["body0"])
    lost = gone(sparsifier)
    assert not lost["body0"]
    assert any(lost[name] for name in lost if name.startswith("head"))
    first = trained(dstlib.METHODS["static"], 0, keep_neurons="*", seed=8)[2]
    assert not any(gone(first).values())
    assert any(gone(trained(dstlib.METHODS["static"], 0, seed=8)[2]).values()), "else nothing is shown"


def test_where_no_graph_shows_the_outputs_it_is_said_and_no_neuron_goes() -> None:
    torch.manual_seed(0)
    model = Net(3, least=4)
    compiled = torch.compile(model, backend="aot_eager")
    compiled.num_inputs = model.num_inputs
    with pytest.warns(UserWarning, match="nothing shows whether the model's outputs come from them.*keep_neurons="):
        _, _, sparsifier = trained(ABLATING, 20, compiled)
    assert not any(gone(sparsifier).values())


@pytest.mark.parametrize("name", ["srigl", "static", "granet"])
@pytest.mark.parametrize("stop", [0, 1, 2, 7])
def test_a_resumed_run_knows_the_outputs_and_equals_one_that_never_stopped(name: str, stop: int) -> None:
    method = ABLATING if name == "srigl" else quick(name)
    whole, again = trained(method, 12), trained(method, stop)
    model, optimizer, sparsifier = trained(method, 0)
    for part, other in zip((model, optimizer, sparsifier), again, strict=True):
        part.load_state_dict(torch.load(io.BytesIO(saved(other.state_dict())), weights_only=True))
    for step in range(stop, 12):
        step_of(model, optimizer, step)
    assert all(
        torch.equal(x, y) for x, y in zip(whole[0].state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert all(torch.equal(x, sparsifier.masks[name]) for name, x in whole[2].masks.items())
    assert sparsifier.state_dict()["outputs"] == whole[2].state_dict()["outputs"]


def saved(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("is_resumed", [False, True])
def test_an_output_without_a_gradient_at_its_second_step_is_filled_when_it_has_one(is_resumed: bool) -> None:
    static = dstlib.METHODS["static"]
    model, optimizer, sparsifier = trained(static, 1, seed=2)
    bare = [name for name, num in gone(sparsifier).items() if name.startswith("head") and num]
    assert bare, "else nothing is shown"
    for step in (1, 2):
        optimizer.zero_grad()
        y = model(torch.randn(6, model.num_inputs, generator=generator(step)))
        sum(y[name].sum() for name in y).backward()
        for name in bare:
            model.get_submodule(name).weight.grad = None
        optimizer.step()
    assert all(gone(sparsifier)[name] for name in bare)
    if is_resumed:
        states = [part.state_dict() for part in (model, optimizer, sparsifier)]
        model, optimizer, sparsifier = trained(static, 0, seed=2)
        for part, state in zip((model, optimizer, sparsifier), states, strict=True):
            part.load_state_dict(torch.load(io.BytesIO(saved(state)), weights_only=True))
    step_of(model, optimizer, 3)
    assert not any(gone(sparsifier)[name] for name in bare)


def test_outputs_that_diagonals_leave_bare_are_told_of() -> None:
    """Of ten outputs and three inputs a diagonal covers three, and which it shares with others depends on the place."""
    model = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 10))
    method = replace(dstlib.METHODS["static"], granularity=dstlib.masking.Diagonal(), distribution=dstlib.uniform)
    with pytest.warns(UserWarning, match=r"outputs of 2.weight have no weight.*Diagonal\(\).*overrides=") as told:
        sparsifier = dstlib.sparsify(model, sparsity=0.8, method=method, keep_neurons="2")
    num_bare = int((~sparsifier.masks["2.weight"].any(dim=1)).sum())
    assert num_bare >= 4  # two diagonals of three each
    assert any(f"{num_bare} of 10 outputs" in str(w.message) for w in told)
    sparsifier.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # wide ones reach every output
        dstlib.sparsify(nn.Linear(10, 5), sparsity=0.8, method=method, keep_neurons="*").detach()


def test_states_say_which_weights_are_outputs_and_refuse_other_words() -> None:
    _, _, sparsifier = trained(ABLATING, 4)
    outputs = sparsifier.state_dict()["outputs"]
    assert {name for name, is_output in outputs.items() if is_output} == {
        n for n in outputs if not n.startswith("body")
    }
    older = {key: value for key, value in sparsifier.state_dict().items() if key not in ("outputs", "checksum")}
    dstlib.sparsifier.saved.check_saved(dstlib.sparsifier.saved._sealed(older), sparsifier._masked, sparsifier.plan)
    for wrong in ({"nowhere": True}, {"head0.weight": 1.5}, [1]):
        state = dstlib.sparsifier.saved._sealed({**older, "outputs": wrong})
        with pytest.raises(StateError, match="outputs of the saved state"):
            sparsifier.load_state_dict(state)


class StandardLibraryAndTorch(pickle.Unpickler):
    """Reads a file where this library is not there; the classes of these tests stand for the user's."""

    def find_class(self, module: str, name: str) -> object:
        assert not module.startswith("dstlib"), f"{module}.{name}"
        return super().find_class(module, name)


def test_a_model_that_is_saved_whole_while_it_is_watched_loads_without_this_library() -> None:
    model, *_ = trained(ABLATING, 1)
    assert any(note_pass in module._forward_hooks.values() for module in model.modules())
    x = torch.ones(1, model.num_inputs)
    for loaded in (StandardLibraryAndTorch(io.BytesIO(pickle.dumps(model))).load(), copy.deepcopy(model)):
        assert all(torch.equal(y, model(x)[name]) for name, y in loaded(x).items())
        assert not any(is_hooked(module) for module in loaded.modules())  # what is left of the hook does nothing


def test_copies_find_the_outputs_themselves_and_leave_the_original_alone() -> None:
    model, optimizer, sparsifier = trained(ABLATING, 1)
    assert any(note_pass in module._forward_hooks.values() for module in model.modules())
    other = copy.deepcopy((model, optimizer, sparsifier))
    for step in range(1, 12):
        step_of(other[0], other[1], step)
    assert gone(other[2]) == gone(trained(ABLATING, 12)[2])
    assert set(sparsifier.state_dict()["outputs"].values()) <= {None}
    for step in range(1, 12):
        step_of(model, optimizer, step)
    assert gone(sparsifier) == gone(other[2])
    sparsifier.detach()
    other[2].detach()
    assert not any(module._forward_hooks for module in (*model.modules(), *other[0].modules()))


def test_an_output_layer_too_sparse_for_its_outputs_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = replace(dstlib.METHODS["static"], distribution=dstlib.uniform)
    with pytest.warns(UserWarning, match=r"Fewer active units than outputs in 2.weight with 12 for 30.*overrides="):
        dstlib.sparsify(model, sparsity=0.99, method=method, keep_neurons="2").detach()
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.99, method=method)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    model(torch.ones(1, 4)).sum().backward()
    with pytest.warns(UserWarning, match="Fewer active units than outputs"):
        optimizer.step()
    assert int(sparsifier.masks["2.weight"].any(dim=1).sum()) == 12  # one each, as far as they go


@given(folds())
def test_the_shape_tells_as_many_outputs_as_the_units_do(fold):
    grain, shape = fold
    output_U = outputs_of_units(grain, shape)
    assert num_outputs(grain, shape) == (0 if output_U is None else len(output_U.unique()))

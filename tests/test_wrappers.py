"""Layers inside wrappers: low-rank adapters, computed and pruned weights, quantisation, averages, recurrence."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from models import assert_zero_outside, batch, small, train
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import dstlib
from dstlib import RIGL, SelectionError, StateError, uniform
from dstlib.targets import select, unwrap

EACH_STEP = replace(RIGL, interval=1, distribution=uniform)


def reasons(model, **kwargs):
    return {w.name: w.reason for w in select(model, **kwargs)}


def with_head(layer):
    return nn.ModuleDict({"layer": layer, "head": nn.Linear(4, 4)})


# ---------------------------------------------------------------- low-rank adapters


class PeftLinear(nn.Module):
    """The layout of peft: the base beside its factors, layers in a ModuleDict by the adapter's name."""

    def __init__(self, base, rank=2, is_trained=False):
        super().__init__()
        self.base_layer = base.requires_grad_(is_trained)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merge(self):
        self.base_layer.weight.data += self.lora_B["default"].weight @ self.lora_A["default"].weight


class LoralibLinear(nn.Linear):
    """The layout of loralib: eval() adds B·A to the weight itself, train() takes it off again."""

    def __init__(self, num_in, num_out, rank=2, is_trained=False):
        super().__init__(num_in, num_out)
        self.lora_A = nn.Parameter(torch.randn(rank, num_in))
        self.lora_B = nn.Parameter(torch.randn(num_out, rank))
        self.weight.requires_grad_(is_trained)
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (self.lora_B @ self.lora_A).detach() * (-1 if mode else 1)
            self.is_merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.is_merged else y + x @ self.lora_A.T @ self.lora_B.T


class LoralibConv(nn.Module):
    """The other layout of loralib: a convolution inside, merged by the wrapper."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.lora_A = nn.Parameter(torch.randn(6, 12))
        self.lora_B = nn.Parameter(torch.randn(12, 6))

    def train(self, mode=True):
        return super().train(mode)


FACTOR = "low-rank factor, whose zeros leave the product dense: sparse only if included by name"


def test_factors_of_peft_are_dense_unless_named_and_the_frozen_base_is_frozen():
    found = reasons(with_head(PeftLinear(nn.Linear(4, 4))))
    assert found == {
        "layer.base_layer.weight": "frozen (requires_grad is False)",
        "layer.lora_A.default.weight": FACTOR,
        "layer.lora_B.default.weight": FACTOR,
        "head.weight": "",
    }
    named = reasons(with_head(PeftLinear(nn.Linear(4, 4))), include=("*", "layer.lora_B.default"))
    assert [name for name, reason in named.items() if not reason] == ["layer.lora_B.default.weight", "head.weight"]
    table = str(dstlib.sparsify(with_head(PeftLinear(nn.Linear(4, 4))), sparsity=0.5, method="static").summary())
    assert f"dense: {FACTOR}" in table


def test_a_named_factor_trains_with_exact_density():
    torch.manual_seed(0)
    model = with_head(PeftLinear(nn.Linear(4, 4)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    named = ["layer.lora_A.default", "layer.lora_B.default"]
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=EACH_STEP, include=named, total_steps=8)
    for _ in range(4):
        optimizer.zero_grad()
        model["layer"](torch.randn(8, 4)).sub(1).square().sum().backward()
        optimizer.step()
    assert {name: int(mask.sum()) for name, mask in sparsifier.masks.items()} == {f"{n}.weight": 4 for n in named}
    assert_zero_outside(model, sparsifier.masks, optimizer)


def test_a_trained_base_is_sparse_on_request_as_long_as_nobody_merges():
    torch.manual_seed(0)
    model = with_head(PeftLinear(nn.Linear(4, 4), is_trained=True))
    assert "merging them would undo the zeros" in reasons(model)["layer.base_layer.weight"]
    assert reasons(model, include=("*", "layer.base_layer"))["layer.base_layer.weight"] == ""
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static", include="layer.base_layer")
    mask = sparsifier.masks["layer.base_layer.weight"]
    model["layer"].merge()
    assert model["layer"].base_layer.weight[~mask].any(), "what the reason warns of"


def test_a_subclass_that_merges_by_itself_is_refused_by_name():
    model = with_head(LoralibLinear(4, 4, is_trained=True))
    found = reasons(model)
    assert found["layer.weight"] == "train() and eval() merge a low-rank product into it, which would undo the zeros"
    assert found["layer.lora_A"] == found["layer.lora_B"] == FACTOR
    with pytest.raises(SelectionError, match=r"weight of layer\.weight.*merge a low-rank product"):
        select(model, include=("layer.weight",))
    assert reasons(model, include=("layer.lora_A",))["layer.lora_A"] == ""
    assert reasons(with_head(LoralibLinear(4, 4)))["layer.weight"] == "frozen (requires_grad is False)"
    assert "merge a low-rank product" in reasons(with_head(LoralibConv()))["layer.conv.weight"]


def test_factors_named_in_loralib_survive_merging():
    torch.manual_seed(0)
    model = with_head(LoralibLinear(4, 4))
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static", include=["layer.lora_A", "layer.lora_B"])
    x = torch.randn(2, 4)
    before = model["layer"](x)
    model.eval()
    assert torch.allclose(model["layer"](x), before, atol=1e-6)
    model.train()
    assert_zero_outside(model, sparsifier.masks)


def test_other_layers_beside_factors_are_not_their_base():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(4, 1), nn.Linear(1, 4)
            self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    found = reasons(Attention())
    assert [name for name, reason in found.items() if not reason] == ["query.weight", "out.weight"]


# ---------------------------------------------------------------- weights that are computed


def pruned():
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    return prune.random_unstructured(layer, "weight", amount=2)  # twice: a PruningContainer


def old_weight_norm(layer, name="weight"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer, name)


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 2


def own_parametrization():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


COMPUTED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "_WeightNorm"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "_SpectralNorm"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "_Orthogonal"),
    "of the user": (own_parametrization, "Scaled"),
    "old weight_norm": (lambda: old_weight_norm(nn.Linear(4, 4)), "WeightNorm"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "SpectralNorm"),
    "conv": (lambda: nn.utils.spectral_norm(nn.ConvTranspose2d(4, 4, 2)), "SpectralNorm"),
    "prune": (
        pruned,
        'PruningContainer (torch.nn.utils.prune.remove(layer, "weight") makes it plain, zeros and all)',
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_a_weight_is_computed_from_is_dense_and_refused_by_all_names(name):
    make, maker = COMPUTED[name]
    model = with_head(make())
    dense = {key: reason for key, reason in reasons(model).items() if reason}
    assert dense, "none is left out in silence"
    for key, reason in dense.items():
        assert reason == f"weight is computed from it at each forward, by {maker}"
        for asked in (key, "layer", "layer.weight"):
            with pytest.raises(SelectionError, match="is computed from it at each forward"):
                select(model, include=("*", asked))


def test_a_model_of_nothing_else_says_so():
    with pytest.raises(SelectionError, match=r"none \(weight_orig: weight is computed from it .* SpectralNorm\)"):
        select(nn.utils.spectral_norm(nn.Linear(4, 4)))


def test_a_computed_recurrent_weight_is_dense_and_its_namesakes_are_not():
    model = old_weight_norm(nn.LSTM(3, 2, bidirectional=True), "weight_hh_l0")
    found = reasons(model, include=("*", "weight_ih_l0", "weight_hh_l0_reverse"))
    computed = "weight_hh_l0 is computed from it at each forward, by WeightNorm"
    assert found["weight_hh_l0_g"] == found["weight_hh_l0_v"] == computed
    assert found["weight_ih_l0"] == found["weight_hh_l0_reverse"] == ""
    with pytest.raises(SelectionError, match="WeightNorm"):
        select(model, include=("weight_hh_l0",))


def test_a_weight_replaced_by_a_computed_tensor_is_no_parameter():
    layer = nn.Linear(4, 4)
    layer.register_parameter("raw", nn.Parameter(torch.ones(4, 4)))
    layer._parameters["weight"] = layer.raw * 2  # as AWD-LSTM drops out weights
    found = reasons(with_head(layer))
    assert found["layer.weight"] == "a computed tensor, no parameter"
    assert found["layer.raw"] == "raw parameter of Linear: sparse only if included by name"


def test_making_it_permanent_makes_it_a_weight_again():
    layer = prune.remove(pruned(), "weight")
    assert reasons(layer) == {"weight": ""}


# ---------------------------------------------------------------- raw, lazy, quantised


class CondConv(nn.Module):
    """As timm's: a row of the parameter is a whole kernel; the input chooses how to mix them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4 * 2 * 9))

    def forward(self, x, routing):
        weight = (routing @ self.weight).view(4, 2, 3, 3)
        return functional.conv2d(x, weight)


def test_mixed_kernels_are_opt_in_a_budget_for_each_expert_too():
    torch.manual_seed(0)
    model = with_head(CondConv())
    assert reasons(model)["layer.weight"] == "raw parameter of CondConv: sparse only if included by name"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=0.75, method=EACH_STEP, include="layer.weight", split={"layer": 3}, total_steps=8
    )
    for _ in range(3):
        optimizer.zero_grad()
        model["layer"](torch.randn(1, 2, 5, 5), torch.tensor([0.2, 0.3, 0.5])).square().sum().backward()
        optimizer.step()
    assert sparsifier.masks["layer.weight"].sum(dim=1).tolist() == [18] * 3
    assert_zero_outside(model, sparsifier.masks, optimizer)


@pytest.mark.parametrize("layer", [nn.LazyLinear, nn.LazyConv2d, nn.LazyConvTranspose2d], ids=lambda c: c.__name__)
def test_lazy_layers_are_refused_until_they_know_their_shape(layer):
    model = nn.Sequential(layer(4) if layer is nn.LazyLinear else layer(4, 1))
    with pytest.raises(SelectionError, match=r"a lazy module\. Run one forward pass first"):
        select(model)
    model(torch.randn(2, 3, 5, 5) if layer is not nn.LazyLinear else torch.randn(2, 3))
    assert reasons(model) == {"0.weight": ""}


def quantizable(num_in=4):
    from torch.ao import quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(num_in, 8), nn.ReLU(), nn.Linear(8, 4))
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model.train())


def test_quantisation_aware_layers_keep_the_zeros_in_what_they_multiply_by():
    """Zero is a point of every quantisation grid."""
    torch.manual_seed(0)
    model = quantizable()
    assert reasons(model) == {"0.weight": "", "2.weight": ""}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=EACH_STEP, total_steps=8)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert_zero_outside(model, sparsifier.masks, optimizer)
    for i, layer in ((0, model[0]), (2, model[2])):
        mask = sparsifier.masks[f"{i}.weight"]
        multiplied = layer.weight_fake_quant(layer.weight)
        assert int(mask.sum()) == 16
        assert multiplied[mask].any()
        assert not multiplied[~mask].any()


def test_a_convolution_fused_with_its_norm_for_quantisation_is_a_convolution():
    from torch.ao import quantization

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantization.fuse_modules_qat(model, [["0", "1", "2"]])
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        model = quantization.prepare_qat(model.train())
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    assert list(sparsifier.masks) == ["0.weight"]
    multiplied = []
    model[0].weight_fake_quant.register_forward_hook(lambda module, inputs, output: multiplied.append(output))
    model(torch.randn(2, 2, 5, 5))
    assert not multiplied[0][~sparsifier.masks["0.weight"]].any()


def test_quantised_layers_hold_no_weight_to_train():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.convert(quantizable().eval())
    with pytest.raises(SelectionError, match="no parameter has two axes"):
        select(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64], ids=str)
def test_weights_of_other_numbers_are_dense(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    reason = reasons(with_head(layer))["layer.weight"]
    assert reason == f"Tensor of {dtype}, torch.strided: not a plain float tensor"


def test_tensor_subclasses_are_dense():
    class Packed(torch.Tensor):
        """As of torchao or bitsandbytes."""

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed))
    assert "Packed of torch.float32" in reasons(with_head(layer))["layer.weight"]
    with pytest.raises(SelectionError, match="not a plain float tensor"):
        select(with_head(layer), include=("layer",))


# ---------------------------------------------------------------- averages and other wrappers of whole models


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean(dim=(2, 3)))


class Average(nn.Module):
    """As timm's ModelEmaV2 and V3: the copy is its ``module``, inside whatever the copy was wrapped in."""

    def __init__(self, model, decay=0.5):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model), decay

    def update(self, model):
        with torch.no_grad():
            for mine, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 1 - self.decay)


def timm_average(name):
    pytest.importorskip("timm")
    from timm import utils

    return lambda model: getattr(utils, name)(model, decay=0.5)


def swa(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    average.update = average.update_parameters
    return average


AVERAGES = {
    "AveragedModel": lambda: swa,
    "ModelEmaV2": lambda: timm_average("ModelEmaV2"),
    "ModelEmaV3": lambda: timm_average("ModelEmaV3"),
    "by hand": lambda: Average,
    "of a compiled model": lambda: lambda model: Average(torch.compile(model, backend="eager")),
    "of a data-parallel model": lambda: lambda model: Average(nn.DataParallel(model)),
    "twice": lambda: lambda model: Average(Average(model)),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_denser_until_it_is_masked(name):
    torch.manual_seed(0)
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.7, method=EACH_STEP, total_steps=20)
    average = AVERAGES[name]()(model)
    inner = average
    while not isinstance(inner, Normed):
        inner = inner._modules.get("_orig_mod") or inner.module
    for step in range(5):
        train(model, optimizer, 1, start=step)
        average.update(model) if name != "twice" else average.module.update(model)
    names = sparsifier.masks
    assert any(inner.get_parameter(n)[~names[n]].any() for n in names), "averages over moving masks are denser"
    sparsifier.mask_model(average)
    assert_zero_outside(inner, sparsifier.masks)
    assert {n: int(m.count_nonzero()) for n, m in inner.named_parameters() if n in names} == {
        n: int(m.sum()) for n, m in names.items()
    }
    if name == "AveragedModel":
        before = inner.norm.running_mean.clone()
        update_bn([batch(step)[0] for step in range(4)], average)
        assert not torch.equal(inner.norm.running_mean, before)
        assert_zero_outside(inner, sparsifier.masks)
    assert_zero_outside(model, sparsifier.masks, optimizer)


def test_what_is_no_module_or_no_copy_is_refused_in_words():
    sparsifier = dstlib.sparsify(small(), sparsity=0.5, method="static")

    class ModelEma:
        """As timm's first one, which is no module."""

        def __init__(self, model):
            self.ema = model

    with pytest.raises(StateError, match=r"expected an nn\.Module, got ModelEma\. Pass .* \.ema or \.module"):
        sparsifier.mask_model(ModelEma(small()))
    with pytest.raises(StateError, match=r"expected a weight conv\.weight .*, got none of that name in Linear"):
        sparsifier.mask_model(Average(nn.Linear(2, 2)))


def test_a_child_named_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    sparsifier = dstlib.sparsify(model, sparsity=0.5, method="static")
    assert list(sparsifier.masks) == ["module.weight"]
    sparsifier.mask_model(Average(model))


def test_names_go_through_every_wrapper():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    wrapped = AveragedModel(nn.DataParallel(torch.compile(model, backend="eager")))
    assert set(reasons(unwrap(wrapped))) == {"0.weight", "1.weight"}


# ---------------------------------------------------------------- recurrence

RECURRENT = {
    "lstm": (lambda: nn.LSTM(6, 5, num_layers=2, batch_first=True), 4),
    "lstm projected": (lambda: nn.LSTM(6, 5, proj_size=3, bidirectional=True, batch_first=True), 4),
    "gru": (lambda: nn.GRU(6, 5, bidirectional=True, batch_first=True), 3),
    "rnn": (lambda: nn.RNN(6, 5, batch_first=True), 1),
    "subclass": (lambda: type("Reader", (nn.LSTM,), {})(6, 5, batch_first=True), 4),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_training_keeps_the_density_of_each_gate(name):
    make, num_gates = RECURRENT[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({"rnn": make()})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.5, method=EACH_STEP, include="rnn", total_steps=8)
    first = {n: m.clone() for n, m in sparsifier.masks.items()}
    assert len(first) == sum("weight" in n for n, _ in model.named_parameters())
    for step in range(4):
        optimizer.zero_grad()
        model["rnn"].flatten_parameters()
        x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(step))
        model["rnn"](x)[0].sub(0.3).square().sum().backward()
        optimizer.step()
        assert_zero_outside(model, sparsifier.masks, optimizer)
        for n, mask in sparsifier.masks.items():
            gates = mask.view(1 if "_hr" in n else num_gates, -1)
            assert gates.sum(dim=1).tolist() == [(gates.shape[1] + 1) // 2] * len(gates), n
    assert any(not torch.equal(first[n], mask) for n, mask in sparsifier.masks.items())


def test_gates_of_cells_are_counted_too():
    model = nn.ModuleDict({"lstm": nn.LSTMCell(3, 2), "gru": nn.GRUCell(3, 2), "rnn": nn.RNNCell(3, 2)})
    weights = select(model, include=("lstm", "gru", "rnn"))
    assert {w.name: len(w.views) for w in weights} == {
        f"{cell}.weight_{part}": num for cell, num in (("lstm", 4), ("gru", 3), ("rnn", 1)) for part in ("ih", "hh")
    }

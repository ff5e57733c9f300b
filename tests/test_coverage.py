"""What is said where most of a model's matrices would stay dense, and that nothing is said elsewhere."""

import ast
import re
import warnings
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dstlib
from dstlib.targets import coverage, select, shortfall
from dstlib.targets.selection import asks_for


class Raw(nn.Module):
    """As many raw parameters as it is told, of 4 × ``size``, and a linear layer of 4 × 4."""

    def __init__(self, sizes=(), num_in=4):
        super().__init__()
        self.layers = nn.ModuleList()
        for size in sizes:
            layer = nn.Module()
            layer.mix = nn.Parameter(torch.randn(4, size))
            self.layers.append(layer)
        self.head = nn.Linear(num_in, 4)


def said(model, **settings):
    """The warnings of a call, as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dstlib.sparsify(model, **{"sparsity": 0.5, "method": "static", **settings}).detach()
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("model", "settings", "share"),
    [
        (Raw([4]), {}, Fraction(1, 2)),
        (Raw([5]), {}, Fraction(4, 9)),
        (Raw([5]), {"include": ["*", "layers.0.mix"]}, Fraction(1)),
        (Raw([5]), {"include": ["head"]}, Fraction(1)),
        (Raw([5]), {"exclude": ["layers.*"]}, Fraction(1)),
        (Raw([5]), {"overrides": {"head": 0.0}}, Fraction(4, 9)),
        (Raw([5, 5, 90]), {"include": ["*", "layers.*.mix"]}, Fraction(1)),
        (nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)), {}, Fraction(4, 7)),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), {}, Fraction(4, 9)),
        (nn.Sequential(nn.Embedding(5, 4).requires_grad_(False), nn.Linear(4, 4)), {}, Fraction(1)),
        (nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)), {}, Fraction(1, 9)),
        (nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)), {"include": ["*", "0"]}, Fraction(1)),
    ],
)
def test_less_than_half_is_said_once_and_what_is_left_out_on_purpose_does_not_count(model, settings, share):
    globs = {key: value for key, value in settings.items() if key != "overrides"}
    assert coverage(select(model, **globs)) == share
    assert len(said(model, **settings)) == (share < Fraction(1, 2))


def test_the_largest_are_named_with_the_reason_and_the_setting_that_takes_them_in():
    model, again = Raw([40, 40, 40], num_in=6), Raw([40, 40, 40], num_in=6)
    model.embed = nn.Embedding(50, 4)
    model.token = nn.Parameter(torch.zeros(1, 4))
    (text,) = said(model)
    assert text == (
        "Only 3.4% of the entries of this model's matrices become sparse. The largest that stay dense:\n"
        "  layers.*.mix (3 weights, 480 entries): raw parameter of Module: sparse only if included by name\n"
        "  embed.weight (200 entries): weight of Embedding: no weight of Linear, Conv or attention\n"
        "include=['*', 'layers.*.mix'] makes sparse what can be. "
        "What is to stay dense, name in exclude=, and this is not said of it."
    )
    assert not said(again, include=["*", "layers.*.mix"])
    assert not said(Raw([40]), exclude="layers.*")


def test_a_glob_that_would_match_others_too_is_written_out():
    depthwise = [nn.Conv2d(64, 64, 5, groups=64) for _ in range(4)]
    (text,) = said(nn.Sequential(*depthwise[:2], nn.Conv2d(64, 4, 1)))
    assert "*.weight (2 weights, 3,200 entries): depthwise" in text
    assert "include=['*', '0.weight', '1.weight']" in text
    assert not said(nn.Sequential(*depthwise[2:], nn.Conv2d(64, 4, 1)), include=["*", "0.weight", "1.weight"])


class Recurrent(nn.Module):
    """Words, read both ways: of 99.6 % of its entries the layer type says that they stay dense by default."""

    def __init__(self, width=16):
        super().__init__()
        self.rnn, self.head = nn.LSTM(width, 32, num_layers=2, bidirectional=True), nn.Linear(64, 4)


class Experts(nn.Module):
    """Stacked experts of a user, in either order, and one bias for each."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 32)), nn.Parameter(torch.randn(32, 4, 16))
        self.bias = nn.Parameter(torch.randn(4, 32))


def experts():
    return nn.ModuleDict({"layers": nn.ModuleList([Experts(), Experts()]), "head": nn.Linear(16, 8)})


def advice(text):
    """The settings that a warning names, as they are passed."""
    found = {key: re.search(rf"{key}=(\[.*?\]|{{.*?}})", text) for key in ("include", "axes")}
    return {key: ast.literal_eval(match[1]) for key, match in found.items() if match}


@pytest.mark.parametrize("method", ["rigl", "srigl", "srste", "cht", "dsff", "topkast"])
@pytest.mark.parametrize("make", [Recurrent, experts])
def test_what_is_advised_is_taken_and_leaves_nothing_to_warn_of(make, method):
    """By methods that ask for nothing more, and by those that ask which axis counts the outputs."""
    sparsity = 0.5 if isinstance(dstlib.METHODS[method].granularity, dstlib.NM) else 0.8
    asked = {"sparsity": sparsity, "method": method, "total_steps": 4000}
    texts = [text for text in said(make(), **asked) if text.startswith("Only")]
    assert len(texts) == 1
    settings = advice(texts[0])
    if "axes" in settings:
        assert "include" not in settings, "axes= asks for them by itself"
        assert settings["axes"] == {"layers.*.up": "e o i", "layers.*.down": "e o i"}
        settings["axes"] = {"layers.*.up": "e i o", "layers.*.down": "o e i"}  # as a user knows them
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {weight.name for weight in select(model, **settings) if not weight.reason}
    assert not [text for text in said(model, **asked, **settings) if text.startswith("Only") or "nothing says" in text]
    num_all = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(model.get_parameter(name).numel() for name in names) > 0.9 * num_all


def test_a_low_rank_factor_is_advised_by_name_and_axes_as_its_axes_alone_do_not_ask_for_it():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "big": nn.ParameterDict({"lora_A": torch.randn(8, 64)})})
    method = replace(dstlib.STATIC, granularity=dstlib.FanIn())
    (text,) = said(model, method=method)
    assert advice(text) == {"include": ["*", "big.lora_A"], "axes": {"big.lora_A": "o i"}}


def test_what_the_granularity_cannot_take_is_not_advised():
    model = nn.Sequential(nn.GRU(6, 8), nn.Linear(8, 4))
    method = replace(dstlib.STATIC, granularity=dstlib.NM(2, 4), distribution=dstlib.uniform)
    (text,) = said(model, method=method)
    assert advice(text) == {"include": ["*", "0.weight_hh_l0"]}
    assert "0.weight_ih_l0 (144 entries): recurrent" in text


@pytest.mark.parametrize(("axes", "warns"), [(None, True), ({"layers.*.up": "e i o", "layers.*.down": "o e i"}, False)])
def test_axes_that_nobody_knows_are_told_of_where_they_are_taken_for_those_of_a_kernel(axes, warns):
    texts = said(experts(), include=["*", "layers.*.up", "layers.*.down"], axes=axes)
    assert len(texts) == warns
    if warns:
        assert texts[0].startswith(
            "layers.0.up, (4, 16, 32), and 3 more: nothing says which of its axes are the outputs"
        )
        assert "axes={'layers.*.up': 'e o i', 'layers.*.down': 'e o i'}, say" in texts[0]


def test_of_a_matrix_the_axes_matter_to_what_tells_them_apart_alone():
    asked = {"include": ["*", "layers.*.mix"]}
    assert not said(Raw([40]), **asked)
    assert (
        "axes={'layers.0.mix': 'o i'}" in said(Raw([40]), method=replace(dstlib.STATIC, granularity=dstlib.FanIn()))[0]
    )


@pytest.mark.parametrize(
    ("glob", "asks"),
    [
        ("layers.*.mix", True),
        ("*.mix", True),
        ("layers.1.mix", True),
        ("layers.[01].mix", True),
        ("layers.*", False),
        ("layers.*.m*", False),
        ("layers.*.m?x", False),
        ("*", False),
        ("head.weight", False),
        ("nothing", False),
    ],
)
def test_a_glob_asks_if_its_last_part_is_written_out_and_it_matches_no_others(glob, asks):
    assert asks_for(glob, select(Raw([4, 4]))) == asks


def test_a_glob_that_also_matches_what_is_sparse_by_itself_asks_for_nothing_more():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3))
    assert [w.reason for w in select(model, include=("*.weight",))] == [
        "depthwise: sparse only if included by name",
        "",
    ]


LAYERS = {
    "sparse": lambda size: nn.Linear(size, 4),
    "embedding": lambda size: nn.Embedding(size, 4),
    "recurrent": lambda size: nn.RNNCell(size, 4),
    "depthwise": lambda size: nn.Conv1d(size + 1, size + 1, 3, groups=size + 1),
    "frozen": lambda size: nn.Linear(size, 4).requires_grad_(False),
    "left out": lambda size: nn.Linear(size, 4),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(1, 9)), max_size=6))
def test_it_is_said_exactly_where_less_than_half_becomes_sparse(kinds):
    kinds = [*kinds, ("sparse", 2)]
    model = nn.ModuleDict({f"{kind} {i}": LAYERS[kind](size) for i, (kind, size) in enumerate(kinds)})
    size = {name: sum(p.numel() for p in layer.parameters() if p.ndim > 1) for name, layer in model.items()}
    num_sparse = sum(n for name, n in size.items() if name.startswith("sparse"))
    num_dense = sum(n for name, n in size.items() if name.startswith(("embedding", "recurrent", "depthwise")))
    exclude = ["left out*"] if any(kind == "left out" for kind, _ in kinds) else []
    texts = said(model, exclude=exclude)
    assert len(texts) == (2 * num_sparse < num_sparse + num_dense)
    for text in texts:
        assert text.startswith(f"Only {num_sparse / (num_sparse + num_dense):.1%} ")
        assert "left out" not in text
        assert "frozen" not in text
    said_here = shortfall(select(model, exclude=exclude), ("*",), tells_axes=False, fits=lambda weight: True)
    assert said_here == (texts[0] if texts else "")

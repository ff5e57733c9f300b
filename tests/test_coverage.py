"""What is said where most of a model's matrices would stay dense, and that nothing is said elsewhere."""

import warnings
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
    weights = select(model, exclude=exclude)
    assert shortfall(weights, ("*",)) == (texts[0] if texts else "")

"""Networks of other libraries: two lines of a user's code make them sparse, or say what they leave dense."""

import re
import warnings
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from models import assert_zero_outside
from networks import AT_THEIR_SIZE, NETWORKS

import dstlib
from dstlib import RIGL
from dstlib.targets import Weight, coverage, select

PAGE = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
QUICK = {"ResNet", "UNet", "GPT-2", "gpt-oss", "RGCN"}
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in NETWORKS]


def built(name):
    pytest.importorskip(NETWORKS[name].library.partition(".")[0])
    return NETWORKS[name].build()


def dense_shares(weights: tuple[Weight, ...]) -> str:
    """What stays dense, as the page has it: each reason with its share of all entries, the largest first."""
    sizes: Counter[str] = Counter()
    for weight in weights:
        sizes[weight.reason.split(":")[0]] += weight.parameter.numel()
    total = sum(sizes.values())
    return "; ".join(f"{n / total:.1%} {reason}" for reason, n in sizes.most_common() if reason and n / total > 0.005)


def row(name: str, weights: tuple[Weight, ...]) -> str:
    return f"| {name} | {float(coverage(weights)):.1%} | {dense_shares(weights)} |"


@pytest.mark.parametrize("name", EACH)
def test_two_lines_make_it_sparse_and_three_updates_keep_the_counts(name):
    network, model = NETWORKS[name], built(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.8, method=replace(RIGL, interval=1), total_steps=8)
    weights = sparsifier.plan.weights
    said = [str(w.message) for w in caught if "stay dense" in str(w.message)]
    assert coverage(weights) > Fraction(4, 5) if not said else coverage(weights) < Fraction(1, 2)
    assert row(name, weights) in PAGE.splitlines(), "docs/networks.md says something else"
    counts = {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    updates: Counter[str] = Counter()
    sparsifier.observers.append(lambda site, update: updates.update([site.name]))
    learned = dict.fromkeys(sparsifier.masks, 0)
    for step in range(3):
        optimizer.zero_grad()
        network.loss(model, step).backward()
        optimizer.step()
        for w in sparsifier.weights:
            learned[w.name] += w.parameter.grad is not None
        assert_zero_outside(model, sparsifier.masks, optimizer)
    assert {name: int(mask.sum()) for name, mask in sparsifier.masks.items()} == counts
    num_all = sum(mask.numel() for mask in sparsifier.masks.values())
    assert sum(counts.values()) == num_all - int(0.8 * num_all)
    for w in sparsifier.weights:
        for view in w.views:
            part, density = view.of(sparsifier.masks[w.name]), sparsifier.plan.densities[view.name]
            assert int(part.sum()) == max(round(density * part.numel()), 1), view.name
            assert updates[view.name] == learned[w.name], "an update at each step that brought a gradient"
    assert max(updates.values()) == 3


@pytest.mark.long
@pytest.mark.parametrize("name", AT_THEIR_SIZE)
def test_the_page_tells_the_share_of_the_sizes_that_people_train(name):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = AT_THEIR_SIZE[name](transformers)
    assert row(name, select(model)) in PAGE.splitlines(), "docs/networks.md says something else"


def test_the_page_has_a_row_for_each_network():
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+% \|", PAGE, flags=re.MULTILINE)
    assert sorted(rows) == sorted([*NETWORKS, *AT_THEIR_SIZE])

"""Figures of a history: they draw, say what they show, and are written whole."""

import sys

import pytest
import torch
from models import small, train
from torch import nn

import dstlib
from dstlib import History, SettingError, plot

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def history():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = dstlib.METHODS["set"]
    sparsifier = dstlib.sparsify(model, optimizer, sparsity=0.6, method=method, total_steps=400)
    history = History(sparsifier)
    train(model, optimizer, 300)
    return history


@pytest.mark.parametrize("draw", [plot.layers, plot.exchange, plot.dead_channels])
def test_figures_are_drawn_and_written(draw, history, tmp_path):
    path = tmp_path / "figure.png"
    figure = draw(history, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"], "nothing temporary is left"
    assert any(axes.get_title() or axes.get_title(loc="left") for axes in figure.axes)


def test_one_row_per_layer_and_the_shares_of_the_history(history):
    figure = plot.layers(history)
    labels = {text.get_text() for axes in figure.axes for text in axes.get_yticklabels()}
    assert {"conv", "up", "head"} <= labels


@pytest.mark.parametrize("share", plot.SHARES)
def test_every_share_can_be_drawn_also_before_the_first_update(share, history, tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(70)))
    fresh = History(dstlib.sparsify(model, sparsity=0.5, method="set", total_steps=400))
    for recorded in (fresh, history):
        plot.layers(recorded, tmp_path / f"{share}.png", share=share)
    names = [text.get_text() for text in plot.layers(fresh, share=share).axes[1].get_yticklabels()]
    assert names == [str(i) for i in range(0, 70, 2)], "of many layers every second has its name"


def test_a_dollar_in_a_name_is_no_formula(tmp_path):
    model = nn.ModuleDict({r"$\frac$": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    fresh = History(dstlib.sparsify(model, sparsity=0.5, method="set", total_steps=400))
    plot.layers(fresh, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_figures_without_an_update_can_be_drawn(tmp_path):
    fresh = History(dstlib.sparsify(small(), sparsity=0.5, method="static"))
    plot.exchange(fresh, tmp_path / "exchange.svg")
    plot.dead_channels(fresh, str(tmp_path / "dead.pdf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead.pdf", "exchange.svg"]


def test_an_unknown_share_is_refused(history):
    with pytest.raises(SettingError, match=r"share of plot.layers\(\): expected density, "):
        plot.layers(history, share="sparsity")


def test_a_failure_leaves_what_was_there(history, tmp_path):
    path = tmp_path / "figure.unknown"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="unknown"):
        plot.layers(history, path)
    assert path.read_bytes() == b"mine"


def test_without_matplotlib_the_extra_is_named(history, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SettingError, match="viz"):
        plot.layers(history)

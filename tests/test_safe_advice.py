"""What messages advise loses no weight that was loaded: advice is followed here, and all texts are looked through."""

import ast
import copy
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import Small, small, train
from torch import nn

import dstlib
from dstlib.errors import StateError
from dstlib.targets import BELONGING

QUICK = replace(dstlib.RIGL, name="quick", interval=2)
GO_ON = 'masks="from-zeros"'


def trained(**options) -> tuple[Small, torch.optim.Optimizer, dstlib.Sparsifier]:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"sparsity": 0.6, "method": QUICK, "total_steps": 1000, **options}
    sparsifier = dstlib.sparsify(model, optimizer, **settings)
    train(model, optimizer, 5)
    return model, optimizer, sparsifier


def uneven() -> dict[str, torch.Tensor]:
    """Weights that are sparse in a way that no plan of a sparsity by ERK has."""
    model = small(1)
    with torch.no_grad():
        for layer, sparsity in ((model.conv, 0.9), (model.up, 0.6), (model.head, 0.7)):
            flat = layer.weight.view(-1)
            flat[flat.abs().argsort()[: round(sparsity * flat.numel())]] = 0.0
    return model.state_dict()


def assert_nothing_is_lost(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), weights[name]), name


def test_weights_in_the_place_of_sparse_ones_are_kept_by_what_the_error_says():
    model, optimizer, sparsifier = trained()
    weights = uneven()
    model.load_state_dict(copy.deepcopy(weights), assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StateError, match=f"To go on from here: detach.*, a new optimizer, and sparsify.model, {GO_ON}"):
        train(model, optimizer, 1)
    sparsifier.detach()
    dstlib.sparsify(model, masks="from-zeros", method=QUICK, total_steps=1000)
    assert_nothing_is_lost(model, weights)


def test_a_layer_that_was_replaced_is_kept_by_what_the_warning_says():
    model, optimizer, _ = trained()
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[:, ::2] = 0.0
    model.head, held = layer, layer.weight.detach().clone()
    optimizer.add_param_group({"params": list(layer.parameters())})
    with pytest.warns(UserWarning, match=f"with include= of its name: .* if it holds its zeros already, with {GO_ON}"):
        train(model, optimizer, 1)
    layer.weight.detach().copy_(held)  # that step has trained its zeros
    weights = copy.deepcopy(model.state_dict())
    sparsifier = dstlib.sparsify(model, include="head", masks="from-zeros", method=QUICK, total_steps=1000)
    assert torch.equal(sparsifier.masks["head.weight"], held != 0)
    assert_nothing_is_lost(model, weights)


def test_loaded_weights_are_kept_by_what_the_warning_of_their_loss_says():
    model, optimizer, sparsifier = trained()
    weights = uneven()
    model.load_state_dict(weights)
    with pytest.warns(UserWarning, match=f"which this step sets to zero.*load before sparsify.., and pass {GO_ON}"):
        train(model, optimizer, 1)
    sparsifier.detach()
    model = small()
    model.load_state_dict(weights)
    dstlib.sparsify(model, masks="from-zeros", method=QUICK, total_steps=1000)
    assert_nothing_is_lost(model, weights)


@pytest.mark.parametrize(
    ("method", "said"), [(QUICK, "more non-zeros than the plan has room for"), ("gmp", "so these zeros will train")]
)
def test_sparse_weights_that_a_plan_does_not_keep_are_kept_by_what_the_warning_says(method, said):
    model = small()
    weights = uneven()
    model.load_state_dict(weights)
    with pytest.warns(UserWarning, match=f"{said}.*{GO_ON} to sparsify.., without sparsity="):
        dstlib.sparsify(model, sparsity=0.8, method=method, total_steps=1000, exclude="head").detach()
    model.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?!.*already held zeros)")  # of what does not move
        dstlib.sparsify(model, masks="from-zeros", method=method, total_steps=1000)
    assert_nothing_is_lost(model, weights)


def test_weights_that_were_loaded_without_their_masks_are_kept_by_what_the_engine_and_files_say():
    model, _, sparsifier = trained()
    weights = uneven()
    model.load_state_dict(weights)
    assert f"detach() and sparsify(model, {GO_ON})" in BELONGING
    sparsifier.detach()
    dstlib.sparsify(model, masks="from-zeros", method=QUICK, total_steps=1000)
    assert_nothing_is_lost(model, weights)


def test_a_state_that_does_not_fit_is_followed_without_loss():
    """Budgets have moved between layers: first masks by the settings have no room for the weights of that moment."""
    settings = {"method": replace(dstlib.METHODS["snfs"], interval=1), "total_steps": 1000}
    model, _, sparsifier = trained(**settings)
    weights, state = copy.deepcopy(model.state_dict()), sparsifier.state_dict()
    other = small(3)
    plain = dstlib.sparsify(other, sparsity=0.7, **settings)
    with pytest.raises(StateError, match=r"call sparsify\(\) with the settings it was saved under, and load weights "):
        plain.load_state_dict(state)
    plain.detach()
    fresh = small(3)
    again = dstlib.sparsify(fresh, sparsity=0.6, **settings)
    fresh.load_state_dict(weights)
    again.load_state_dict(state)
    assert_nothing_is_lost(fresh, weights)


# ---- the texts


def texts() -> list[tuple[str, str]]:
    """All texts in the library that are no docstrings, an f-string as one, with a dot for each value; and where."""
    found = []
    for path in sorted(Path(dstlib.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        left_out = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                left_out.update(map(id, node.values))
                parts = (part.value if isinstance(part, ast.Constant) else "." for part in node.values)
                found.append((path.name, "".join(parts)))
        found += [
            (path.name, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out
        ]
    return found


def test_no_text_advises_a_call_that_erases_what_was_loaded():
    """``apply_masks`` erases by its nature; so does ``sparsify`` by a sparsity, where weights were loaded before."""
    advice = [(path, text) for path, text in texts() if len(text.split()) > 4]
    assert len(advice) > 500
    assert not [found for found in advice if "apply_masks" in found[1]]
    masked = [text for _, text in advice if "mask_model(" in text]
    assert all("an average over moving masks, and from nothing else," in text for text in masked)
    after_loading = [
        (path, text)
        for path, text in advice
        if re.search(r"\bload(ed|s|ing)?\b", text) and re.search(r"(call|and|before) sparsify\(", text, re.IGNORECASE)
    ]
    assert after_loading
    for path, text in after_loading:
        assert GO_ON in text or "and load weights after that" in text, (path, text)

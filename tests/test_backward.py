"""The end of a backward pass: once per pass, after all gradients, and whatever became of the pass before."""

import pytest
import torch
from torch import nn

from dstlib.integrations.backward import AfterBackward


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.fixture
def watched():
    """A model, and what its gradients were at the end of each pass that was wanted."""
    model, seen, wanted = network(), [], [True]
    after = AfterBackward(model.parameters(), is_wanted=lambda: wanted[0], call=lambda: seen.append(gradients(model)))
    return model, seen, wanted, after


def backward(model):
    model(torch.ones(3, 4)).square().sum().backward()


def test_it_comes_once_after_all_gradients(watched):
    model, seen, _, _ = watched
    for number in range(1, 4):
        backward(model)  # accumulates
        assert len(seen) == number
        assert same(seen[-1], gradients(model))


def test_it_comes_where_it_is_wanted_and_until_it_is_removed(watched):
    model, seen, wanted, after = watched
    wanted[0] = False
    backward(model)
    assert not seen
    wanted[0] = True
    after.remove()
    backward(model)
    assert not seen


def test_it_comes_after_what_the_pass_itself_has_left_for_its_end(watched):
    """As DistributedDataParallel writes reduced gradients when all have arrived."""
    model, seen, _, _ = watched

    def reduce():
        model[0].weight.grad.mul_(3)

    def left_for_the_end(_):
        torch.autograd.Variable._execution_engine.queue_callback(reduce)

    model[0].weight.register_post_accumulate_grad_hook(left_for_the_end)
    backward(model)
    assert same(seen[-1], gradients(model))


def test_it_comes_again_after_a_pass_that_failed(watched):
    model, seen, _, _ = watched
    failing = model[0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(model)
    assert not seen
    failing.remove()
    backward(model)
    assert same(seen[-1], gradients(model))


def test_its_error_leaves_the_pass():
    model = network()

    def refuse():
        raise ValueError("refused")

    AfterBackward(model.parameters(), is_wanted=lambda: True, call=refuse)
    with pytest.raises(ValueError, match="refused"):
        backward(model)

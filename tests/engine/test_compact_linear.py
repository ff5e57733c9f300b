"""The linear layer of which the active values alone exist: outputs and gradients are those of the dense matrix."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from dstlib.engine.ops import compact_linear as ops
from dstlib.engine.ops.compact_linear import CompactPattern, active_gradient, compact_linear
from dstlib.errors import InputError


def test_products_by_hand():
    """The matrix ((1, 0), (2, 3)) on (1, 10): the gradient of an entry is its input times that of its output."""
    pattern = CompactPattern.of(torch.tensor([0, 2, 3]), (2, 2))
    x, values = torch.tensor([[1.0, 10.0]], requires_grad=True), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = compact_linear(x, values, torch.tensor([0.5, -0.5]), pattern)
    assert y.tolist() == [[1.5, 31.5]]
    y.backward(torch.tensor([[1.0, -1.0]]))
    assert x.grad.tolist() == [[-1.0, -3.0]]
    assert values.grad.tolist() == [1.0, -1.0, -10.0]


@pytest.mark.parametrize("rows", [1, 2, 3, 4], ids="{} rows alike".format)
@pytest.mark.parametrize("size", [(12, 7), (204, 170)], ids=str)
@pytest.mark.parametrize("samples", [0, 1, 5, 70])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_numbers_are_those_of_the_dense_matrix(rows, size, samples, density, monkeypatch):
    """Small integers, whose sums are exact; tiles of a part of the outputs each."""
    monkeypatch.setattr(ops, "_TILE", 1000)
    rng = torch.Generator().manual_seed(rows)
    mask = (torch.rand(size[0] // rows, size[1], generator=rng) < density).repeat_interleave(rows, 0)
    pattern = CompactPattern.of(mask.flatten().nonzero().flatten(), size)
    matrix, x, bias, grad = (
        torch.randint(-2, 3, shape, generator=rng).float()
        for shape in (size, (samples, size[1]), size[:1], (samples, size[0]))
    )
    dense, values = (matrix * mask).requires_grad_(), matrix.flatten()[pattern.places().long()].requires_grad_()
    given = [x.clone().requires_grad_() for _ in range(2)]
    expected, found = F.linear(given[0], dense, bias), compact_linear(given[1], values, bias, pattern)
    assert torch.equal(found, expected)
    expected.backward(grad)
    found.backward(grad)
    assert torch.equal(given[1].grad, given[0].grad)
    assert torch.equal(values.grad, dense.grad.flatten()[pattern.places().long()])
    assert torch.equal(active_gradient(grad, x, pattern), values.grad)


def test_what_does_not_fit_is_refused():
    pattern = CompactPattern.of(torch.tensor([0, 2, 3]), (2, 2))
    with pytest.raises(InputError, match=r"x of compact_linear\(\): expected \(\.\.\., 2\)"):
        compact_linear(torch.zeros(3), torch.zeros(3), None, pattern)
    with pytest.raises(InputError, match="one number for each active weight"):
        compact_linear(torch.zeros(2), torch.zeros(4), None, pattern)

#!/usr/bin/env bash
# torch 2.13.0: a function marked once_differentiable loses its second derivative in silence behind a linear loss.
#
# Seen: of y.sum() + (dy/dx)² with y = x² at 3, as a gradient penalty has it, the gradient is 30 by torch.square, and 6 by
# the same function written as an autograd.Function with @once_differentiable. It refuses to be differentiated again only
# where the gradient that comes in has a gradient itself; that of a sum has none, so the penalty counts for nothing. Whoever
# writes such a function has to look for torch.is_grad_enabled() in its backward pass.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


found = []
for square in (torch.square, Square.apply):
    x = torch.tensor([3.0], requires_grad=True)
    loss = square(x).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + grad.square().sum()).backward()
    found.append(x.grad.item())
print(f"torch {torch.__version__}: gradient {found[0]} by torch.square, {found[1]} by a function marked once_differentiable")
assert found == [30.0, 6.0], "the behaviour has changed"
PYTHON

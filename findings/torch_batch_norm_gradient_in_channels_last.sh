#!/usr/bin/env bash
# torch 2.13.0, on a CPU: the gradient of an instance norm is wrong where the gradient behind it lies in another order.
#
# Seen: the gradients of InstanceNorm2d(1) for a batch of three, of the same numbers behind it, differ by more than half of
# the largest, without a warning, where these numbers lie with the samples, or the channels, last in memory. Batch norm of a
# single sample, of which it is made, takes such strides for channels last though its input is not. A layer whose backward
# pass hands on gradients in an order of its own should put them into that of what they belong to.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn

torch.manual_seed(0)
x, behind = torch.randn(3, 1, 10, 6), torch.randn(3, 1, 10, 6)
other = behind.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # the same numbers, samples last
assert torch.equal(behind, other)
grads = []
for grad in (behind, other):
    leaf = x.clone().requires_grad_()
    nn.InstanceNorm2d(1)(leaf).backward(grad)
    grads.append(leaf.grad)
exact = x.double().requires_grad_()
nn.InstanceNorm2d(1)(exact).backward(behind.double())
errors = [float((grad - exact.grad).abs().max() / exact.grad.abs().max()) for grad in grads]
print(f"torch {torch.__version__}: errors of the gradient {errors[0]:.1e} as usual, {errors[1]:.1e} in the other order")
assert errors[0] < 1e-5 and errors[1] > 0.5, "the behaviour has changed"
PYTHON

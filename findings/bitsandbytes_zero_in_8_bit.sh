#!/usr/bin/env bash
# bitsandbytes 0.50.2, on a CPU: zero is not zero after 8-bit quantisation, so Adam8bit moves weights without a gradient.
#
# Seen: zeros in a block beside ones come back from quantize_blockwise and dequantize_blockwise as 2.1e-05. Adam8bit, whose
# moments are kept so, moves weights whose gradient has been exactly zero from the first step on, by 1.7e-05 in five steps at
# a rate of 1e-3; those whose gradient is one move by about 5e-3. Whoever relies on zeros has to write them after each step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

x = torch.zeros(4096)
x[::2] = 1.0
back = dequantize_blockwise(*quantize_blockwise(x))
zeros = back[1::2].unique().tolist()
weight = torch.nn.Parameter(torch.zeros(64, 64))
optimizer = bnb.optim.Adam8bit([weight], lr=1e-3)
for _ in range(5):
    weight.grad = torch.zeros(64, 64)
    weight.grad[0] = 1.0
    optimizer.step()
moved, trained = float(weight[1:].detach().abs().max()), float(weight[0].detach().abs().max())
print(f"bitsandbytes {bnb.__version__}: zeros come back as {zeros}; without a gradient moved {moved:.1e}, with one {trained:.1e}")
assert zeros != [0.0] and 0 < moved < trained, "the behaviour has changed"
PYTHON

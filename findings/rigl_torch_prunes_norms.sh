#!/usr/bin/env bash
# rigl-torch 0.5.2 with torch 2.13.0: the gains of a LayerNorm are pruned like the weights of a layer.
#
# RigLScheduler takes every module that has an attribute `weight` for a layer to prune, but nn.BatchNorm2d. So nn.LayerNorm,
# nn.GroupNorm and nn.BatchNorm1d lose gains: their channels are zero but for the bias, from the first step on, whatever comes
# before. Seen: at dense_allocation=0.4, 4 of the 8 gains of a LayerNorm are 0 before training; BatchNorm2d keeps its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check rigl-torch==0.5.2 torch==2.13.0 torchvision==0.28.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import torch
from torch import nn

library = torch.library.Library("torchvision", "FRAGMENT")  # its binary may not fit a torch for CPUs, and is not needed
for name in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from rigl_torch.RigL import RigLScheduler

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = RigLScheduler(model, optimizer, dense_allocation=0.4, T_end=100)
zeros = {type(layer).__name__: int((layer.weight == 0).sum()) for layer in model if hasattr(layer, "weight") and layer.weight.ndim == 1}
print(f"rigl-torch 0.5.2, torch {torch.__version__}, gains of 8 that are zero before training: {zeros}")
assert zeros == {"BatchNorm2d": 0, "LayerNorm": 4}, "the behaviour has changed"
PYTHON

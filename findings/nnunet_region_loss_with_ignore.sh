#!/usr/bin/env bash
# nnunetv2 2.8.1: among K regions, an ignore label makes the binary cross-entropy K times what it is without one.
#
# DC_and_BCE_loss takes the mean over voxels and regions where there is no ignore label. Where there is one, it divides the sum
# over valid voxels and all regions by the number of valid voxels alone. Seen: the same outputs and targets, no voxel ignored,
# 1, 2, 3 and 5 regions: the cross-entropy is 1, 2, 3 and 5 times as large with the ignore label as without it, and the Dice
# term is the same. So cross-entropy and Dice, which the trainer adds with weight 1 each, are balanced otherwise as soon as a
# data set of regions declares an ignore label. Whoever wants the same balance gives weight_ce = 1 / K.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nnunetv2==2.8.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss

torch.manual_seed(0)
for regions in (1, 2, 3, 5):
    output, target = torch.randn(2, regions, 8, 8, 8), torch.rand(2, regions, 8, 8, 8) < 0.3
    with_ignore = torch.cat([target, torch.zeros_like(target[:, :1])], 1)  # its last channel is the ignore label: nowhere
    ratios = []
    for weights in ({"weight_ce": 1, "weight_dice": 0}, {"weight_ce": 0, "weight_dice": 1}):
        dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
        without = DC_and_BCE_loss({}, dice, **weights)(output, target)
        ratios.append(float(DC_and_BCE_loss({}, dice, use_ignore_label=True, **weights)(output, with_ignore) / without))
    print(f"nnunetv2 {version('nnunetv2')}, regions {regions}: cross-entropy × {ratios[0]:.4f}, Dice × {ratios[1]:.4f}")
    assert abs(ratios[0] - regions) < 1e-4 and abs(ratios[1] - 1) < 1e-4, "the behaviour has changed"
PYTHON

#!/usr/bin/env bash
# torch 2.13.0, on a CPU with AVX-512 and without AMX: the gradient of a 3×3×3 kernel in bf16 is what lay in memory.
#
# Seen: of a convolution in bf16, 16 channels to 16, padding 1, on volumes of a depth of 2 (2×2×2, 2×3×2, 2×2×3, 2×3×3),
# the gradient of the kernel has 18 of its 27 taps in numbers up to 1e38, or NaN, without a warning; the other 9 are
# right. With 8 channels, with a depth of 1, 3 or 4, or without oneDNN, all are right. So a network in bf16 on such a CPU
# diverges, in one step or in ten, if its coarsest features have a depth of two voxels. It is the kernel that oneDNN
# 3.12.0 calls jit_bf16; a CPU with AMX takes another, which is right, so AMX is left out here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
ONEDNN_MAX_CPU_ISA=AVX512_CORE "$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import conv3d

torch.manual_seed(0)


def error(size):
    """The largest error of the gradient, beside the largest entry of the exact one."""
    kernel, x = torch.randn(16, 16, 3, 3, 3).bfloat16(), torch.randn(2, 16, *size).bfloat16()
    behind, grads = torch.randn(2, 16, *size).bfloat16(), []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = kernel.to(dtype).requires_grad_()
        grads += torch.autograd.grad(conv3d(x.to(dtype), leaf, padding=1), leaf, behind.to(dtype))
    return float((grads[0].double() - grads[1]).abs().max() / grads[1].abs().max())


assert torch.backends.cpu.get_cpu_capability() == "AVX512", "this is to be seen on a CPU with AVX-512"
usual, odd = error((4, 4, 4)), error((2, 3, 2))
with torch.backends.mkldnn.flags(enabled=False):
    without = error((2, 3, 2))
told = f"{usual:.1e} at 4×4×4, {odd:.1e} at 2×3×2, {without:.1e} without oneDNN"
print(f"torch {torch.__version__}: errors of the gradient {told}")
assert usual < 0.01 and without < 0.01 and not odd < 0.5, "the behaviour has changed"
PYTHON

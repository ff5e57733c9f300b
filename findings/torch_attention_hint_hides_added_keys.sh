#!/usr/bin/env bash
# torch 2.13.0: nn.MultiheadAttention(add_bias_kv=True) gives another output when its weights are not asked for.
#
# With need_weights=False and the hint is_causal=True the mask itself is not read: attention is computed as causal over all keys,
# among them the one that add_bias_kv (or add_zero_attn) puts behind the others: no query sees it. With need_weights=True, or
# without the hint, each query sees it, as the mask, which is padded for it, says. Seen: the outputs of all three queries differ,
# by up to 1.03; without the hint they are equal.
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
attention = nn.MultiheadAttention(4, 1, add_bias_kv=True, batch_first=True)
nn.init.normal_(attention.in_proj_bias)
x, hidden = torch.randn(1, 3, 4), torch.ones(3, 3).triu(1).bool()
differ = {}
for is_causal in (False, True):
    with_weights, without = (
        attention(x, x, x, attn_mask=hidden, is_causal=is_causal, need_weights=asked)[0] for asked in (True, False)
    )
    differ[is_causal] = (with_weights - without).abs().amax(dim=2)[0].gt(1e-3).tolist()
print(f"torch {torch.__version__}, queries whose output depends on need_weights: without the hint {differ[False]}, with it {differ[True]}")
assert differ == {False: [False] * 3, True: [True] * 3}, "the behaviour has changed"
PYTHON

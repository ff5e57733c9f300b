#!/usr/bin/env bash
# transformers 5.24.0: the head of MobileBERT multiplies by the weight of a Linear layer as inputs × outputs.
#
# MobileBertLMPredictionHead.dense is an nn.Linear whose forward is never called: its weight is put below the transposed
# one of the decoder. Seen: its type says outputs × inputs, while a change of one *column* moves the logits of one word,
# and a change of one row those of all.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from transformers import MobileBertConfig, MobileBertForMaskedLM

torch.manual_seed(0)
sizes = {"vocab_size": 30, "hidden_size": 24, "embedding_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
sizes |= {"intermediate_size": 20, "intra_bottleneck_size": 12, "true_hidden_size": 12}
model = MobileBertForMaskedLM(MobileBertConfig(**sizes)).eval()
dense, ids = model.cls.predictions.dense, torch.arange(6)[None]
assert isinstance(dense, nn.Linear)


def words_moved_by(part):
    """Counts the words whose logits another value in a part of the weight moves."""
    with torch.no_grad():
        before = model(input_ids=ids).logits
        part += 1
        moved = (model(input_ids=ids).logits != before).any(dim=1).sum()
        part -= 1
    return int(moved)


by_row, by_column = words_moved_by(dense.weight[3]), words_moved_by(dense.weight[:, 3])
print("weight", tuple(dense.weight.shape), "| words moved by a row:", by_row, "| by a column:", by_column)
assert (by_row, by_column) == (30, 1), "the behaviour has changed"
PYTHON

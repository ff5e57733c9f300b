#!/usr/bin/env bash
# transformers 5.24.0 with compressed-tensors 0.20.1: a sparse checkpoint of compressed-tensors 0.12.2 loads random weights.
#
# compressed-tensors 0.12.2 writes sparse weights in the formats sparse-bitmask and sparse-24-bitmask, as three tensors each:
# compressed, bitmask, shape. Later releases do not know these formats any more, and transformers 5.24.0 refuses earlier
# ones (it asks for 0.15.0). from_pretrained() then takes the three for unexpected, and the weight for missing: it is drawn
# at random. A report is logged, nothing is raised. Seen: of a linear layer of 2:4 sparsity, no entry is zero after loading.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check compressed-tensors==0.20.1 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/earlier" compressed-tensors==0.12.2
cd "$folder"
PYTHONPATH="$folder/earlier" "$folder/venv/bin/python" - <<'PYTHON'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
kept = {"targets": ["Linear"], "ignore": ["lm_head"]}
for folder, sparsity in (("bitmask", BitmaskConfig(**kept)), ("24", Sparse24BitMaskConfig(**kept))):
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            groups = parameter.detach().view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)
    compressor = ModelCompressor.from_pretrained_model(model, sparsity_config_or_format=sparsity)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), f"{folder}.pt")
    save_file(compressor.compress(model), f"{folder}/model.safetensors", {"format": "pt"})
    compressor.update_config(folder)
    unpacked = dict(compressor.sparsity_compressor.decompress(folder))
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in unpacked.items()), "its own reader is right"
PYTHON
"$folder/venv/bin/python" - <<'PYTHON'
import compressed_tensors
import torch
import transformers
from transformers import LlamaForCausalLM

for folder in ("bitmask", "24"):
    saved, loaded = torch.load(f"{folder}.pt"), LlamaForCausalLM.from_pretrained(folder).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    shares = [float((x[name] == 0).float().mean()) for x in (saved, loaded)]
    print(
        f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}, {folder}: "
        f"share of zeros in {name}: saved {shares[0]}, loaded {shares[1]}"
    )
    assert shares == [0.5, 0.0], "the behaviour has changed"
PYTHON

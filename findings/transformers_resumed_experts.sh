#!/usr/bin/env bash
# transformers 5.24.0: a Trainer that resumes a mixture of experts loads none of its experts; only the log says so.
#
# save_pretrained() writes experts one by one, under the names of the hub ("block_sparse_moe.experts.0.w1.weight"), while
# the model holds them stacked ("mlp.experts.gate_up_proj"). from_pretrained() converts; the Trainer loads the file by
# load_state_dict(strict=False) instead, when it resumes and for the best model at the end. Seen: the stacked experts and
# the router keep the values they were made with, attention is loaded, and training goes on. Making the model by
# from_pretrained(checkpoint) before it is resumed helps.
# Reported upstream as issue 48805, open in September 2026.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments, set_seed

def make():
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=30, num_attention_heads=2, num_key_value_heads=2, **sizes))

rows = torch.randint(0, 30, (16, 8))
data = [{"input_ids": row, "labels": row} for row in rows]
args = TrainingArguments("run", max_steps=4, save_steps=2, learning_rate=0.1, report_to=[], disable_tqdm=True, use_cpu=True)
Trainer(make(), args, train_dataset=data).train()

def resume(model):
    """Returns the weights as they are when a resumed training begins."""
    trainer = Trainer(model, args, train_dataset=data)
    trainer._load_from_checkpoint("run/checkpoint-2")  # what train(resume_from_checkpoint=...) does before its first step
    return {name: weight.clone() for name, weight in trainer.model.state_dict().items()}

saved = MixtralForCausalLM.from_pretrained("run/checkpoint-2").state_dict()
fresh, resumed = make().state_dict(), resume(make())
for name, weight in resumed.items():
    print(name, "as saved" if torch.equal(weight, saved[name]) else "NOT as saved", "untouched" * torch.equal(weight, fresh[name]))
lost = [name for name in resumed if not torch.equal(resumed[name], saved[name])]
assert lost and all(".mlp." in name and torch.equal(resumed[name], fresh[name]) for name in lost), "the behaviour has changed"
mended = resume(MixtralForCausalLM.from_pretrained("run/checkpoint-2"))
assert all(torch.equal(mended[name], saved[name]) for name in saved), "the behaviour has changed"
PYTHON

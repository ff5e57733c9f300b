#!/usr/bin/env bash
# transformers 5.24.0: a run that is resumed from its very last checkpoint takes one step more, if it ends within an epoch.
#
# The Trainer looks for the end (global_step >= max_steps) after a step, never before the first. Seen: of 6 steps, with 4
# to an epoch, resumed at step 6, it comes to step 7. Where the last step ends an epoch, as with num_train_epochs, the loop
# over epochs is empty, and no step is taken.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.linear(x), labels)}

data = [{"x": torch.ones(2), "labels": i % 2} for i in range(8)]  # four steps an epoch
for settings, steps in (({"max_steps": 6}, [6, 7]), ({"num_train_epochs": 2}, [8, 8])):
    given = {"per_device_train_batch_size": 2, "save_steps": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(f"run{steps[0]}", **given, **settings)
    whole = Trainer(Net(), args, train_dataset=data).train().global_step
    resumed = Trainer(Net(), args, train_dataset=data).train(resume_from_checkpoint=True).global_step
    print(settings, "ends at step", whole, "and, resumed from there, at step", resumed)
    assert [whole, resumed] == steps, "the behaviour has changed"
PYTHON

"""What one training iteration costs: E2ENet dense and sparse, and nnU-Net, side by side.

    python benchmarks/training_iteration.py                       # on a GPU: one 128³ patch, the paper's networks
    python benchmarks/training_iteration.py --size 32 --width 16 --precision float32    # on a CPU

Forward, loss, backward, clipping and the optimizer's step on random patches; the sparse network without mask updates.
Each round runs every row once, so that whatever else the machine does falls on all of them; medians over the rounds,
after two to warm up. Memory is the GPU's, the most that an iteration took beyond what lay there before it (the
weights and optimizer states of all rows).
"""

import argparse
import time
from dataclasses import replace
from itertools import product
from statistics import median

import torch
from torch import nn
from tqdm import trange

from dstlib.command_line import make_parser
from dstlib.report import align
from dstlib.zoo.e2enet import AMOS, E2ENetConfig
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss
from dstlib.zoo.e2enet.training.settings import PRECISIONS, Execution, TrainSettings
from dstlib.zoo.e2enet.training.state import Training, parallel, start

NETWORKS = {"E2ENet, dense": ("e2enet", 0.0), "E2ENet, s=0.8": ("e2enet", 0.8), "nnU-Net": ("nnunet", 0.0)}
NUM_CLASSES = 16


def main() -> None:
    options = command_line().parse_args()
    config = scaled(options.width)
    size = (options.size,) * 3
    rows = {}
    for name, precision, layout, compiled in product(NETWORKS, options.precision, (False, True), options.compile):
        execution = Execution(
            device=options.device, precision=precision, channels_last=layout, compile=compiled == "on"
        )
        rows[name, precision, "last" if layout else "first", compiled] = Row(name, config, size, execution)
    for i in trange(options.rounds + 2, desc="rounds"):
        for row in rows.values():
            row.run(keep=i >= 2)
    dense = next(iter(rows.values())).seconds
    cells = [("network", "precision", "channels", "compile", "ms", "× first row", "memory, GiB")]
    for key, row in rows.items():
        memory = f"{row.peak / 2**30:.2f}" if row.peak else "-"
        cells.append((*key, f"{1000 * row.seconds:.0f}", f"{row.seconds / dense:.2f}", memory))
    print("\n".join(align(cells, left=(0, 1, 2, 3))))
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"Batch of one patch of {options.size}³; {where}, torch {torch.__version__}; {options.rounds} rounds.")


class Row:
    """A network in training, and what its iterations took."""

    def __init__(self, name: str, config: E2ENetConfig, size: tuple[int, int, int], execution: Execution) -> None:
        kind, sparsity = NETWORKS[name]
        torch.manual_seed(0)
        model = build_model(kind, in_channels=1, num_classes=NUM_CLASSES, patch_size=size, config=config)
        settings = TrainSettings(epochs=1000, iterations=250, sparsity=sparsity)
        self.training: Training = start(model, settings, execution)
        self.network = parallel(self.training)
        image = torch.randn(1, 1, *size, device=execution.device)
        self.image = image.contiguous(memory_format=torch.channels_last_3d) if execution.channels_last else image
        self.label = torch.randint(0, NUM_CLASSES, (1, 1, *size), device=execution.device)
        self.times: list[float] = []
        self.peak = 0

    @property
    def seconds(self) -> float:
        return median(self.times)

    def run(self, *, keep: bool) -> None:
        """One iteration, timed to the end of what it started on the device."""
        training, execution = self.training, self.training.execution
        dtype = execution.autocast_dtype
        on_gpu = training.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        began = time.perf_counter()
        training.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(training.device.type, dtype=dtype, enabled=dtype is not None):
            logits = self.network(self.image)
        training.scaler.scale(deep_supervision_loss(logits, self.label)).backward()
        training.scaler.unscale_(training.optimizer)
        if training.sparsifier:
            training.sparsifier.before_step()
        nn.utils.clip_grad_norm_(training.model.parameters(), training.settings.clip)
        training.scaler.step(training.optimizer)
        training.scaler.update()
        if on_gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        if keep:
            self.times.append(time.perf_counter() - began)


def scaled(width: int) -> E2ENetConfig:
    """The paper's network for AMOS, its first level ``width`` channels wide instead of 48."""
    return replace(AMOS, channels=tuple(max(8, round(c * width / 48 / 8) * 8) for c in AMOS.channels))


def command_line() -> argparse.ArgumentParser:
    lines = make_parser(__doc__)
    on_gpu = torch.cuda.is_available()
    lines.add_argument("--device", default="cuda" if on_gpu else "cpu", help="(default: %(default)s)")
    lines.add_argument("--size", type=int, default=128, help="edge of the patch (default: %(default)s)")
    lines.add_argument("--width", type=int, default=48, help="channels of E2ENet's first level (default: %(default)s)")
    lines.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    lines.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], help="(default: bf16)")
    lines.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"], help="(default: off)")
    return lines


if __name__ == "__main__":
    main()

"""What one training iteration costs: E2ENet dense and sparse, and nnU-Net, side by side.

    python benchmarks/training_iteration.py                       # on a GPU: one 128³ patch, the paper's networks
    python benchmarks/training_iteration.py --size 32 --width 16 --precision float32    # on a CPU

Forward, loss, backward, clipping and the optimizer's step on random patches; the sparse network without mask updates.
Each round runs every row once, so that whatever else the machine does falls on all of them; medians over the rounds,
after two to warm up. Memory is the GPU's, the most that an iteration took beyond what lay there before it (the
weights and optimizer states of all rows).
"""

from dataclasses import replace
from itertools import product

import torch
from _e2enet import config
from _measure import medians, own, progress, wall
from torch import nn

from dstlib.command_line import make_parser
from dstlib.report import align
from dstlib.zoo.e2enet import AMOS, E2ENetConfig
from dstlib.zoo.e2enet.baselines import build_model
from dstlib.zoo.e2enet.training.execution import Execution
from dstlib.zoo.e2enet.training.loss import deep_supervision_loss
from dstlib.zoo.e2enet.training.settings import PRECISIONS, TrainSettings
from dstlib.zoo.e2enet.training.state import Training, parallel, start

NETWORKS = {"E2ENet, dense": ("e2enet", 0.0), "E2ENet, s=0.8": ("e2enet", 0.8), "nnU-Net": ("nnunet", 0.0)}
NUM_CLASSES = 16


def main() -> None:
    lines = make_parser(__doc__)
    on_gpu = torch.cuda.is_available()
    lines.add_argument("--device", default="cuda" if on_gpu else "cpu", help="(default: %(default)s)")
    lines.add_argument("--size", type=int, default=128, help="edge of the patch (default: %(default)s)")
    lines.add_argument("--width", type=int, default=48, help="channels of E2ENet's first level (default: %(default)s)")
    lines.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    lines.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"], help="(default: bf16)")
    lines.add_argument("--compile", nargs="+", choices=("off", "on"), default=["off"], help="(default: off)")
    options = lines.parse_args()
    channels = tuple(max(8, round(c * options.width / 48 / 8) * 8) for c in AMOS.channels)
    architecture = replace(config(options.size), channels=channels)
    size = (options.size,) * 3
    rows = {}
    for name, precision, layout, compiled in product(NETWORKS, options.precision, (False, True), options.compile):
        execution = Execution(
            device=options.device, precision=precision, channels_last=layout, compile=compiled == "on"
        )
        rows[name, precision, "last" if layout else "first", compiled] = Row(name, architecture, size, execution)
    progress("measuring")
    times = medians({key: row.run for key, row in rows.items()}, options.rounds, clock=own, warm_up=2)
    dense = next(iter(times.values()))
    cells = [("network", "precision", "channels", "compile", "ms", "× first row", "memory, GiB")]
    for key, row in rows.items():
        memory = f"{row.peak / 2**30:.2f}" if row.peak else "-"
        cells.append((*key, f"{times[key]:.0f}", f"{times[key] / dense:.2f}", memory))
    print("\n".join(align(cells, left=(0, 1, 2, 3))))
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"Batch of one patch of {options.size}³; {where}, torch {torch.__version__}; {options.rounds} rounds.")


class Row:
    """A network in training, and what its iterations took."""

    def __init__(self, name: str, architecture: E2ENetConfig, size: tuple[int, int, int], execution: Execution) -> None:
        kind, sparsity = NETWORKS[name]
        torch.manual_seed(0)
        model = build_model(kind, in_channels=1, num_classes=NUM_CLASSES, patch_size=size, config=architecture)
        settings = TrainSettings(epochs=1000, iterations=250, sparsity=sparsity)
        self.training: Training = start(model, settings, execution)
        image = torch.randn(1, 1, *size, device=execution.device)
        self.image = image.contiguous(memory_format=torch.channels_last_3d) if execution.channels_last else image
        self.network = parallel(self.training, self.image)
        self.label = torch.randint(0, NUM_CLASSES, (1, 1, *size), device=execution.device)
        self.peak = 0

    def run(self) -> float:
        """Milliseconds of one iteration; notes the most memory it took."""
        if self.training.device.type != "cuda":
            return wall(self.iterate)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = wall(self.iterate)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        return taken

    def iterate(self) -> None:
        """One iteration of training."""
        training, dtype = self.training, self.training.execution.autocast_dtype
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


if __name__ == "__main__":
    main()

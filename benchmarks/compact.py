"""What compact storage takes of memory and time, beside masks on dense weights and no masks at all.

    python benchmarks/compact.py                          # four linear layers of 8192², Adam, RigL at sparsity 0.95
    python benchmarks/compact.py --network vit --sparsity 0.9    # as large as ViT-Base, images of 224², batch 8

Each storage has a process of its own, and they take turns step by step; each fourth step of sparse ones is an update.
Memory is what the process took at most, from the first weight on, above what it had after its imports (Linux only).
Under compact storage layers are made on the meta device.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from _measure import begin, command_line, progress, write
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dstlib.report import align

INTERVAL = 4  # steps from one update to the next
STORAGES = ("dense", "masked", "compact")
COLUMNS = (("peak", 0, "peak"), ("held", 0, "held"), ("step", 3, "step"), ("with update", 3, "step"))
Made = tuple[nn.Module, Tensor]


def linear(storage: str, size: int) -> Made:
    """Four linear layers, and a batch of 64."""
    with torch.device("meta" if storage == "compact" else "cpu"):
        model = nn.Sequential(*(nn.Linear(size, size) for _ in range(4)))
    return model, torch.randn(64, size)


class Block(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b n (three h c) -> three b h n c", three=3, h=self.heads)
        x = x + self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n c -> b n (h c)"))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def vit(storage: str, size: int) -> Made:
    """The encoder and the head of ViT-Base on 196 embedded patches, and a batch of 8."""
    with torch.device("meta" if storage == "compact" else "cpu"):
        model = nn.Sequential(nn.Linear(768, 768), *(Block(768, 12) for _ in range(12)), nn.Linear(768, 1000))
    return model, torch.randn(8, 196, 768)


NETWORKS: dict[str, Callable[[str, int], Made]] = {"linear": linear, "vit": vit}


def work(storage: str, options: argparse.Namespace, turn: Connection) -> None:
    """Trains a step each time that it is this storage's turn, and tells the seconds; at the end, the memory."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    import dstlib.engine  # what is loaded is no part of what is measured

    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    model, x = NETWORKS[options.network](storage, options.size)
    if storage != "dense":
        method = replace(dstlib.RIGL, interval=INTERVAL)
        dstlib.sparsify(model, sparsity=options.sparsity, method=method, total_steps=10_000, storage=storage)
    optimizer = torch.optim.Adam(model.parameters())
    while turn.recv():
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        turn.send(time.perf_counter() - start)
    state = [x for each in optimizer.state.values() for x in each.values()]
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *state]
    turn.send((_memory("VmHWM") - before, sum(x.nbytes for x in held if isinstance(x, Tensor)) / 2**20))


def _memory(what: str) -> float:
    """MiB that the process has, or had at most."""
    return int(Path("/proc/self/status").read_text().partition(f"{what}:")[2].split()[0]) / 2**10


def main() -> None:
    lines = command_line(__doc__, repeats=7)
    lines.add_argument("--network", choices=NETWORKS, default="linear", help="(default: %(default)s)")
    lines.add_argument("--size", type=int, default=8192, help="features of a linear layer (default: %(default)s)")
    lines.add_argument("--sparsity", type=float, default=0.95, help="(default: %(default)s)")
    lines.add_argument("--storage", nargs="+", choices=STORAGES, default=STORAGES, help="(default: all)")
    options = begin(lines)
    turns: dict[str, Connection] = {}
    context = get_context("spawn")
    for storage in options.storage:
        turns[storage], other = context.Pipe()
        context.Process(target=work, args=(storage, options, other), daemon=True).start()
    seconds: dict[str, list[float]] = {storage: [] for storage in turns}
    for step in range(1, options.repeats * INTERVAL + 1):
        for storage, turn in turns.items():
            turn.send(True)
            seconds[storage].append(turn.recv())
        progress(f"step {step} of {options.repeats * INTERVAL}")
    rows = []
    for storage, turn in turns.items():
        turn.send(False)
        peak, held = turn.recv()
        ordinary = median(s for i, s in enumerate(seconds[storage], 1) if i > 1 and i % INTERVAL)
        update = median(s for i, s in enumerate(seconds[storage], 1) if i % INTERVAL == 0)
        rows.append({"storage": storage, "peak": peak, "held": held, "step": ordinary, "with update": update})
    write(options.out / f"compact_{options.network}.json", options, rows)
    first = rows[0]
    cells = [("storage", "peak, MiB", "", "weights, gradients, state", "", "step, s", "", "step with update, s", "")]
    for row in rows:
        shown = [str(row["storage"])]
        for key, digits, base in (
            ("peak", 0, "peak"),
            ("held", 0, "held"),
            ("step", 3, "step"),
            ("with update", 3, "step"),
        ):
            shown += [f"{row[key]:,.{digits}f}", f"{row[key] / first[base]:.3f} ×"]
        cells.append(tuple(shown))
    print("\n".join(align(cells, left=(0,))))


if __name__ == "__main__":
    main()

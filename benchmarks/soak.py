"""Hours of sparse training on the engine in one process: memory must stay where it is, and counts exact.

    python benchmarks/soak.py                                        # two hours
    python benchmarks/soak.py --minutes 5
    python benchmarks/soak.py --minutes 5 --lives rigl --parts reload train

Each life trains a small network by one method, at full speed, on ``sparsifier.accelerate`` of it, with all its layers
on the engine. The lives take turns, and in each turn one part of what befalls them, so that growth has an address:

    train     steps and mask updates, nothing else
    sizes     images, volumes or batches of another size at every third step
    reload    model, optimizer and sparsifier are saved, and loaded into new ones that take their place
    restore   the same, loaded into those that are there
    copy      model, optimizer and sparsifier are copied, the copy trains a little and goes
    modes     passes in evaluation and inference mode between the steps, and of a copy of the fast network
    renew     the life ends, and begins anew

After each update the active units of every weight are compared with those that the method's plan asks for, and what
lies outside the masks with zero. After each turn garbage is collected, freed memory given back to the system, and the
process's own memory read (RssAnon of Linux: pages of libraries do not count, which the system loads and drops as it
likes). A round is a turn of every life with every part. Warm-up is the first quarter of the time. Afterwards the memory
at the ends of rounds must stay within --within megabytes, or the parts and lives in whose turns it grew most are named.
Then, and where counts were wrong, the exit code is 1. Within a round a part may grow by what another gives back, such
as the momentum of an optimizer that has begun anew.

What may differ legitimately is kept small: the engine's idle memory is released before each reading, since its bound
follows the largest maps of the moment; and oneDNN, which torch calls, keeps the last 1024 kernels that it compiled, of
every size that comes along, here 64 (ONEDNN_PRIMITIVE_CACHE_CAPACITY, if it is not set). What stays is that the engine
knows the last 4096 layouts of maps, some 450 bytes each: until it has met so many, memory grows by 2 MB in all.
"""

import argparse
import copy
import ctypes
import gc
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from _measure import begin, command_line, progress, write
from torch import Tensor, nn

import dstlib
from dstlib.engine import Decisions, release_memory
from dstlib.report import align
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

MB, STATUS = 1e6, Path("/proc/self/status")
Size = Callable[[Random], tuple[int, ...]]


@dataclass(frozen=True)
class Kind:
    """A network, and the inputs that it takes: those of one shape, and those of many."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    shapes: Size


def convolutions() -> nn.Module:
    """Three convolutions, of images of any size."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def linear() -> nn.Module:
    """Three linear layers, of batches of any size."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fusion() -> nn.Module:
    """A small E2ENet, of volumes of any even size."""
    return E2ENet(E2ENetConfig(num_classes=3, channels=(16, 32, 48), strides=((2, 2, 2), (1, 2, 2)), heads=2))


KINDS = {
    "convolutions": Kind(
        convolutions, (4, 3, 24, 24), lambda r: (r.randint(1, 4), 3, r.randint(8, 40), r.randint(8, 40))
    ),
    "linear": Kind(linear, (64, 64), lambda r: (r.randint(2, 300), 64)),
    "fusion": Kind(
        fusion, (1, 1, 8, 16, 16), lambda r: (1, 1, 2 * r.randint(2, 8), *(4 * r.randint(3, 8) for _ in "HW"))
    ),
}
LIVES = {
    "rigl": "convolutions",
    "set": "linear",
    "dsff": "fusion",
    "acdc": "convolutions",
    "topkast": "linear",
    "granet": "convolutions",
    "srigl": "linear",
}
INTERVAL, TOTAL_STEPS, OFTEN = 10, 4000, 30  # steps between updates; of a life; between two events


class Life:
    """One training after the other, by one method."""

    def __init__(self, method: str, folder: Path, counted: Counter[str]) -> None:
        self.method = replace(dstlib.METHODS[method], interval=INTERVAL)
        self.kind = KINDS[LIVES[method]]
        self.file = folder / f"{method}.pt"
        self.random = Random(method)
        self.counted = counted
        self.decisions: Decisions | None = None
        self.begin()

    def begin(self) -> None:
        """Begins a training: other first weights each time."""
        self.model = self.kind.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        include = E2ENet.FUSION if isinstance(self.model, E2ENet) else "*"
        self.sparsifier = dstlib.sparsify(
            self.model, self.optimizer, sparsity=0.8, method=self.method, total_steps=TOTAL_STEPS, include=include
        )
        self.hasten()

    def hasten(self) -> None:
        """Puts the network on the engine, with all its layers, faster or not."""
        example = torch.randn(self.kind.shape)
        if self.decisions is None:
            measured = self.sparsifier.accelerate(self.model, example).decisions
            rows = [row if row.obstacle else replace(row, plain_ms=2.0, fast_ms=1.0) for row in measured.values()]
            self.decisions = Decisions.of(rows)
        self.fast = self.sparsifier.accelerate(self.model, example, decisions=self.decisions)

    def step(self, shape: tuple[int, ...] | None = None) -> None:
        """Takes a step of training, after which counts are exact."""
        self.optimizer.zero_grad()
        loss_of(self.fast(torch.randn(shape or self.kind.shape))).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.counted["steps"] += 1
        if self.sparsifier.plan.clock.due(self.sparsifier.step):
            self.counted["updates"] += 1
            self.counted["wrong"] += not is_exact(self.sparsifier)
        if self.sparsifier.step >= TOTAL_STEPS:
            self.begin()

    def save(self) -> None:
        """Saves all that a resumption needs."""
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.sparsifier)], self.file)

    def load(self) -> None:
        """Loads what was saved."""
        states = torch.load(self.file, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.sparsifier), states, strict=True):
            part.load_state_dict(state)
        self.counted["wrong"] += not is_exact(self.sparsifier)


def train(life: Life) -> None:
    """Steps alone."""
    for _ in range(OFTEN):
        life.step()


def sizes(life: Life) -> None:
    """Inputs of another size at every third step."""
    for _ in range(OFTEN // 3):
        shape = life.kind.shapes(life.random)
        for _ in range(3):
            life.step(shape)


def reload(life: Life) -> None:
    """Goes on with new objects."""
    train(life)
    life.save()
    life.begin()
    life.load()


def restore(life: Life) -> None:
    """Goes back to what was saved, some steps before."""
    life.save()
    train(life)
    life.load()


def copies(life: Life) -> None:
    """A twin trains a little."""
    train(life)
    twin = copy.copy(life)
    twin.model, twin.optimizer, twin.sparsifier = copy.deepcopy((life.model, life.optimizer, life.sparsifier))
    twin.hasten()
    for _ in range(2 * INTERVAL):
        twin.step()


def modes(life: Life) -> None:
    """Validates in every mode, and by a copy."""
    for guard in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        train(life)
        for network in (life.fast, copy.deepcopy(life.fast)):
            network.eval()
            with guard():
                network(torch.randn(life.kind.shape))
            network.train()


def renew(life: Life) -> None:
    """Ends, and begins anew."""
    train(life)
    life.begin()


PARTS = {
    "train": train,
    "sizes": sizes,
    "reload": reload,
    "restore": restore,
    "copy": copies,
    "modes": modes,
    "renew": renew,
}


def loss_of(outputs: Any) -> Tensor:
    """A loss without a meaning, of one output or several."""
    several = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return torch.stack([y.square().mean() for y in several]).sum()


@torch.no_grad()
def is_exact(sparsifier: dstlib.Sparsifier) -> bool:
    """Whether as many units are active as planned, in each group or, where budgets move, in sum; and no others."""
    plan = sparsifier.plan
    step = plan.clock.latest(sparsifier.step)
    moves, num_active, num_wanted, slack, exact = plan.method.allocate is not None, 0, 0, 0, True
    for weight in sparsifier.weights:
        mask = sparsifier.masks[weight.name]
        exact &= not bool(weight.parameter[~mask].any())
        for view in weight.views:
            mask_GU = plan.method.granularity.fold(view.of(mask))[..., 0]
            num_G, num_target = mask_GU.sum(dim=1), plan.num_target(view.name, mask_GU.shape[1], step)
            exact &= moves or bool((num_G == num_target).all())
            num_active += int(num_G.sum())
            num_wanted += num_target * len(num_G)
            slack += len(num_G) - 1  # an allocator may leave less than one unit per group unspent
    return exact and num_wanted - slack <= num_active <= num_wanted


def own_memory() -> float:
    """Megabytes that this process alone has, once what is free was given back."""
    gc.collect()
    release_memory()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(STATUS.read_text().partition("RssAnon:")[2].split()[0]) * 1024 / MB


def main() -> int:
    options = options_of()
    warnings.simplefilter("ignore")  # of topologies that restart, and of decisions of another machine
    counted = Counter(steps=0, updates=0, wrong=0)
    turns: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        lives = [Life(name, Path(folder), counted) for name in options.lives]
        start, told, before = time.monotonic(), 0.0, own_memory()
        while not rounds or time.monotonic() - start < 60 * options.minutes:
            for part in options.parts:
                for name, life in zip(options.lives, lives, strict=True):
                    turn(life, part, options.seconds)
                    after = own_memory()
                    minute = (time.monotonic() - start) / 60
                    turns.append({"minute": minute, "part": part, "life": name, "mb": after, "grew": after - before})
                    before = after
                    if minute - told >= 1:
                        told = minute
                        progress(line(minute, after, counted, len(rounds)))
            rounds.append({"minute": (time.monotonic() - start) / 60, "mb": before, "objects": len(gc.get_objects())})
    write(options.out / "soak.json", options, [*rounds, *turns])
    return verdict(rounds, turns, counted, options)


def turn(life: Life, part: str, seconds: float) -> None:
    """A life has a part of what befalls it, again and again."""
    end = time.monotonic() + seconds
    while True:
        PARTS[part](life)
        life.counted[part] += 1
        if time.monotonic() >= end:
            return


def line(minute: float, memory: float, counted: Counter[str], rounds: int) -> str:
    """What is known after a minute."""
    done = f"{counted['steps']:,} steps, {counted['updates']:,} updates, {counted['wrong']} of them wrong"
    return f"minute {minute:5.1f}: {memory:7.1f} MB, {done}, {rounds} rounds"


def verdict(
    rounds: list[dict[str, Any]], turns: list[dict[str, Any]], counted: Counter[str], options: argparse.Namespace
) -> int:
    """Says whether memory stayed and counts were exact; 0 if so."""
    warm = max(15 * options.minutes / 60, rounds[0]["minute"])
    after = [row["mb"] for row in rounds if row["minute"] >= warm]
    low, high = min(after), max(after)
    print(", ".join(f"{name} {number:,}" for name, number in counted.items()))
    print(f"{len(after)} rounds after the warm-up: {low:.1f} to {high:.1f} MB, the last {after[-1]:.1f} MB")
    grew = {key: grown([row for row in turns if row["minute"] >= warm], key) for key in ("part", "life")}
    for key, sums in grew.items():
        cells = [(key, "grew, MB"), *((name, f"{mb:+.2f}") for name, mb in sums.items())]
        print("\n".join(align(cells, left=(0,))))
    flat = high - low <= options.within
    print(f"memory {'stays' if flat else 'does not stay'} within {options.within:g} MB")
    if not flat:
        print(f"it grew most in: {', '.join(max(sums, key=lambda name: sums[name]) for sums in grew.values())}")
    print("counts exact" if not counted["wrong"] else f"counts wrong {counted['wrong']} times")
    return int(not flat or counted["wrong"] > 0)


def grown(turns: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Megabytes by which memory grew in the turns of each part, or of each life."""
    sums: Counter[str] = Counter()
    for row in turns:
        sums[row[key]] += row["grew"]
    return dict(sums)


def options_of() -> argparse.Namespace:
    """The options as given."""
    lines, default = command_line(__doc__, flag=None, threads=1), " (default: %(default)s)"
    lines.add_argument("--minutes", type=float, default=120, help="for how long" + default)
    lines.add_argument("--seconds", type=float, default=1, help="of each turn, at least" + default)
    lines.add_argument("--within", type=float, default=5, metavar="MB", help="what memory may vary by" + default)
    lines.add_argument("--lives", nargs="+", choices=LIVES, default=list(LIVES), help="methods that train" + default)
    lines.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what befalls them" + default)
    if not STATUS.exists():
        lines.error("The soak reads /proc/self/status, which only Linux has.")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # read at the first kernel
    return begin(lines)


if __name__ == "__main__":
    sys.exit(main())

"""How much of a layer random growth explores: the library's own runs beside the closed form.

    python benchmarks/explored.py [--size 64] [--updates 30] [--seeds 100]

R_s is the share of a layer's entries that have been active at some time (Liu et al. 2021, ITOP). Of n entries A are
active; update u keeps A - k_u of them, k_u = floor(r_u·A), and grows k_u of the n - A + k_u others, all alike, those
just dropped included. An entry that was never active is always one of these, so that the number U of such entries
loses a hypergeometric number at each update, whatever the drop criterion is:

    E[U'] = U (1 - q),   q = k / N,   N = n - A + k,   hence   E[R_s] = 1 - (1 - d) Π (1 - q_u)
    Var[U' | U] = k · U/N · (1 - U/N) · (N - k)/(N - 1)

From these two the exact mean and variance of R_s follow (:func:`law`). "E[R_s]" below is the mean with the whole
numbers floor(r·A) that an update drops; "unrounded" is the closed form with r·d as if every share of the entries
were whole. z is the distance of the mean over seeds from E[R_s] in standard errors, by the exact variance.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

import dstlib
from dstlib.command_line import make_parser
from dstlib.history import History, explored_by_chance
from dstlib.masking import Criterion, magnitude, random, zeros
from dstlib.schedules import Constant, Cosine, Curve


@dataclass(frozen=True)
class Law:
    """Mean and standard deviation of R_s of one run."""

    mean: float
    deviation: float


def law(num_total: int, num_active: int, num_grown: Sequence[int]) -> Law:
    """The exact law of R_s, up to its second moment, for these numbers of entries grown at each update."""
    mean, variance = float(num_total - num_active), 0.0  # of the number of entries never active
    for k in num_grown:
        pool = num_total - num_active + k
        if k:
            spread = pool * mean - (variance + mean**2)  # E[U (N - U)]
            within = k * spread / pool**2 * (pool - k) / max(pool - 1, 1)
            mean, variance = mean * (1 - k / pool), within + variance * (1 - k / pool) ** 2
    return Law(1 - mean / num_total, math.sqrt(max(variance, 0.0)) / num_total)


def explored(method: dstlib.Method, *, size: int, density: float, num_updates: int, seed: int) -> History:
    """One run of the library on a square linear layer, with an update at each step."""
    torch.manual_seed(seed)
    model = nn.Linear(size, size, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = dstlib.sparsify(
        model, optimizer, sparsity=1 - density, method=method, total_steps=num_updates, seed=seed
    )
    history, x = History(sparsifier), torch.randn(4, size)
    for _ in range(num_updates):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    sparsifier.detach()
    return history


def random_growth(drop: Criterion, fraction: Curve) -> dstlib.Method:
    """SET, updating at each step to the end of the run."""
    return replace(
        dstlib.SET,
        drop=drop,
        drop_fraction=fraction,
        grown_init=zeros,
        distribution=dstlib.uniform,
        interval=1,
        stop=1.0,
    )


@dataclass(frozen=True)
class Result:
    """R_s over seeds beside its law; ``unrounded`` is the closed form without floors."""

    seen: tuple[float, ...]
    law: Law
    unrounded: float

    @property
    def error(self) -> float:
        """The standard error of the mean over seeds, by the exact variance of one run."""
        return self.law.deviation / math.sqrt(len(self.seen))

    @property
    def z(self) -> float:
        """Standard errors between the mean over seeds and its expectation."""
        return (statistics.fmean(self.seen) - self.law.mean) / self.error


def measure(
    drop: Criterion, fraction: Curve, *, size: int, density: float, num_updates: int, seeds: Sequence[int]
) -> Result:
    """Runs one setting; settings whose z are compared take seeds of their own, as growth depends on nothing else."""
    method = random_growth(drop, fraction)
    runs = [explored(method, size=size, density=density, num_updates=num_updates, seed=seed) for seed in seeds]
    num_active = int(runs[0].arrays()["active"][0, 0])
    fractions = [fraction(u / num_updates) for u in range(1, num_updates + 1)]
    # a nudge as the library's: 0.3 · 10 is 3, not a hair less
    num_grown = [math.floor(f * num_active * (1 + 1e-12)) for f in fractions]
    exact = law(size * size, num_active, num_grown)
    return Result(tuple(run.explored for run in runs), exact, explored_by_chance(density, fractions))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=64, help="inputs and outputs of the linear layer (default 64)")
    parser.add_argument("--updates", type=int, default=30, help="mask updates of a run (default 30)")
    parser.add_argument("--seeds", type=int, default=100, help="runs of each setting (default 100)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {args.size}×{args.size} entries, {args.updates} updates, {args.seeds} seeds")
    print("drop       fraction   density    R_s, mean ± s.e.   E[R_s]  unrounded      z")
    drops = {"random": random, "magnitude": magnitude}
    fractions = {"0.3": Constant(0.3), "cosine 0.5": Cosine(0.5)}
    scores = []
    for i, (drop, fraction, density) in enumerate(itertools.product(drops, fractions, (0.02, 0.1, 0.2, 0.5))):
        seeds = range(i * args.seeds, (i + 1) * args.seeds)
        result = measure(
            drops[drop], fractions[fraction], size=args.size, density=density, num_updates=args.updates, seeds=seeds
        )
        scores.append(result.z)
        seen = f"{statistics.fmean(result.seen):.5f} ± {result.error:.5f}"
        means = f"{result.law.mean:7.5f}  {result.unrounded:9.5f}"
        print(f"{drop:9}  {fraction:10} {density:7.2f}  {seen:>18}  {means}  {result.z:5.2f}")
    chi = sum(z * z for z in scores)
    print(f"Σ z² = {chi:.1f} over {len(scores)} settings (expected {len(scores)} ± {math.sqrt(2 * len(scores)):.1f})")


if __name__ == "__main__":
    main()

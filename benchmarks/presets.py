"""What every method costs beside static: optimizer steps and mask updates on the weights of a ResNet-50.

    python benchmarks/presets.py [--methods rigl granet] [--repeats 5]

One method after the other, each beside a fresh static of the same weights, their steps interleaved: an ordinary
step over static's, the additional time of an update, and both together per step at the method's own interval.
CPU seconds of one thread, which programs beside it lengthen less than those of the clock.
Gradients are random and the same for all; forward and backward passes are not run, as they are the same for all.
"""

from dataclasses import replace

import torch
from _measure import cpu, medians, own
from overhead import fill_gradients, resnet50

import dstlib
from dstlib import NM, Method
from dstlib.command_line import make_parser
from dstlib.masking import uniform
from dstlib.schedules import Every

STEPS = 1_000  # of the run that intervals may be a share of


class Prepared:
    """A ResNet-50 under one method, whose next step is an ordinary one or one with an update, as asked."""

    def __init__(self, method: Method, interval: int | None) -> None:
        torch.manual_seed(0)
        self.model = resnet50()
        # N:M needs inputs that divide: all but the first convolution
        sparsity, exclude = (0.5, ["0"]) if isinstance(method.granularity, NM) else (0.9, [])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
        method = replace(method, interval=interval)
        # no forward pass is run that would show which layer is the head
        *_, (head, _) = self.model.named_modules()
        self.sparsifier = dstlib.sparsify(
            self.model,
            self.optimizer,
            sparsity=sparsity,
            method=method,
            total_steps=STEPS,
            exclude=exclude,
            keep_neurons=[head],
        )
        self.step()  # makes the optimizer's state

    def step(self) -> float:
        """CPU milliseconds of one optimizer step on fresh gradients."""
        fill_gradients(self.model)
        return cpu(self.optimizer.step)


def measure(method: Method, repeats: int) -> tuple[float, float, float]:
    """Milliseconds of a static step, of an ordinary step, and what an update adds to it."""
    static = Prepared(replace(dstlib.STATIC, distribution=uniform), None)
    # an interval that never comes, so that traces are gathered and nothing else happens
    ordinary = Prepared(method, None if method.interval is None else 500)
    times = medians({"static": static.step, "ordinary": ordinary.step}, repeats, clock=own)
    if method.interval is None:
        return times["static"], times["ordinary"], 0.0
    del static, ordinary
    updating = Prepared(method, 1)
    update = medians({"update": updating.step}, max(repeats // 2, 2), clock=own)["update"]
    return times["static"], times["ordinary"], update - times["ordinary"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(dstlib.METHODS), default=list(dstlib.METHODS))
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind, median taken (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, CPU time of one thread, medians of {args.repeats}, SGD with momentum")
    print("method         static step  ordinary step   × static  update adds  interval  per step, × static")
    for name in args.methods:
        method = dstlib.METHODS[name]
        static, ordinary, update = measure(method, args.repeats)
        clock = method.clock(STEPS)
        interval = clock.interval if isinstance(clock, Every) else None
        per_step = ordinary + (update / interval if interval else 0.0)
        print(
            f"{name:14} {static:8.1f} ms {ordinary:11.1f} ms {ordinary / static:10.2f} {update / 1e3:10.2f} s "
            f"{interval or '–':>9} {per_step / static:13.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

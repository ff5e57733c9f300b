"""What sparse training costs: theoretical FLOPs, in closed form and exactly along a run whose densities move.

A step is one forward pass and two backward ones: gradients of the inputs and gradients of the weights, each as
many FLOPs as the forward pass (f_S sparse, f_D dense). A step at which a method reads the gradients of inactive
weights pays f_D for the last. These are the FLOPs that an implementation which skips every zero would do, and what
papers report; they are not seconds, and not what a GPU does that multiplies the zeros.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dstlib.history import Change, History
from dstlib.masking import num_units
from dstlib.methods.dense_gradients import Reading, examples, find_reading
from dstlib.profile import Convention, profile
from dstlib.schedules import Every
from dstlib.targets import held_weights, without_data


def training_flops(sparse: float, dense: float, *, share: float = 0.0, learned: float | None = None) -> float:
    """Computes the mean FLOPs of a training step: 2·f_S + (1 - share)·f_L + share·f_D.

    f_S and f_D are those of a forward pass, sparse and dense; ``share`` is that of the steps at which dense
    weight gradients are read; f_L is the forward pass at the density of what learns, f_S by default.

    - static, SET: share 0, hence 3·f_S. SNFS: share 1, hence 2·f_S + f_D.
    - RigL: share 1 / (ΔT + 1), as its paper's updates are iterations of their own; here 1 / ΔT (``Reading.share``).
    - Top-KAST: f_L that of density D + M. SR-STE: f_L = f_D.

    Reference: Evci et al. 2020 (RigL), appendix on FLOPs: (3·f_S·ΔT + 2·f_S + f_D) / (ΔT + 1).

    >>> round(training_flops(0.4153, 1.0, share=1 / 101) / 3, 4)  # ResNet-50, ERK, S = 0.8
    0.4172
    """
    return 2 * sparse + (1 - share) * (sparse if learned is None else learned) + share * dense


class TrainingCost:
    """FLOPs of training from the attachment of a history until now; theoretical ones, not seconds.

    Exact along a run whose densities move, as the sum over stretches between mask updates: the step at which a
    mask changes still computed with the old one. ``input_shape`` is what one optimizer step sees, the batch
    first, or example inputs, as :func:`dstlib.profile` takes them; gradients accumulated over several batches are
    one large batch. Counted is what :mod:`dstlib.profile` counts. Input gradients of the first layer count as well,
    as in the published formulas; optimizer, masks and scores do not. Where topology is frozen early, a method that
    reads gradients at every step is taken to have done so up to its last update. Nothing to save but the history.

    Raises:
        DstlibError: As :func:`dstlib.profile` does.
        SelectionError: The model is not the one that was sparsified.

    >>> import dstlib, torch
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> sparsifier = dstlib.sparsify(model, sparsity=0.9, method="rigl", total_steps=200)
    >>> cost = TrainingCost(History(sparsifier), model, (8, 64))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for _ in range(200):
    ...     optimizer.zero_grad(); model(torch.ones(8, 64)).square().sum().backward(); optimizer.step()
    >>> print(cost)
    rigl, 200 steps: 2.511e+06 FLOPs in theory, 0.1095 of dense training
    forward pass now 0.1080 of dense; dense gradients read at updates; not counted: nothing
    """

    def __init__(
        self,
        history: History,
        model: nn.Module,
        input_shape: Any,
        *,
        convention: Convention = "exact",
        reading: Reading | None = None,
    ) -> None:
        self._history = history
        self._sparsifier = sparsifier = history.sparsifier
        # dense: what is in compact storage counts as the plain layers that the copy has there
        whole = profile(without_data(model) if held_weights(model) else model, input_shape, convention=convention)
        self.dense, self.uncounted = whole.flops, whole.uncounted
        shapes = {view.name: w.shape_of(view) for w in sparsifier.weights for view in w.views}
        self._size = {name: shape.numel() for name, shape in shapes.items()}
        per_entry = whole.flops_per_entry
        self._per_entry = {s.name: per_entry.get(w.name, 0) for w in sparsifier.weights for s in w.views}
        # what is left where no sparse weight has an active entry
        self._rest = self.dense - sum(self._per_entry[name] * size for name, size in self._size.items())
        method = sparsifier.plan.method
        self.reading = find_reading(method, examples(shapes)) if reading is None else reading

    @property
    def steps(self) -> int:
        """Optimizer steps that are counted."""
        return self._span()[1] - self._span()[0]

    @property
    def so_far(self) -> float:
        """FLOPs of all of them."""
        entries = {name: self._entries(name, changes) for name, changes in self._history.changes().items()}
        return 3.0 * self._rest * self.steps + sum(self._per_entry[name] * num for name, num in entries.items())

    @property
    def average_share(self) -> float:
        """The FLOPs over those of as many dense steps, 3·f_D each; NaN before the first, or if none count."""
        return self.so_far / (3.0 * self.dense * self.steps) if self.steps and self.dense else float("nan")

    @property
    def forward_share(self) -> float:
        """f_S / f_D: a forward pass at this moment over a dense one; NaN if no layer of the model is counted."""
        active = {name: changes[-1, _ACTIVE] for name, changes in self._history.changes().items()}
        flops = float(self._rest + sum(self._per_entry[name] * num for name, num in active.items()))
        return flops / self.dense if self.dense else float("nan")

    def __str__(self) -> str:
        return (
            f"{self._sparsifier.plan.method.name}, {self.steps:,} steps: {self.so_far:.4g} FLOPs in theory, "
            f"{self.average_share:.4f} of dense training\nforward pass now {self.forward_share:.4f} of dense; "
            f"dense gradients read {self.reading}; not counted: {', '.join(self.uncounted) or 'nothing'}"
        )

    def _span(self) -> tuple[int, int]:
        """Returns the step of the attachment, and now: during an update, the step that it belongs to."""
        changes = self._history.changes().values()
        return int(min(c[0, 0] for c in changes)), max(self._sparsifier.step, *(int(c[-1, 0]) for c in changes))

    def _entries(self, name: str, changes: NDArray[np.int64]) -> float:
        """Counts the entries of a layer that took part in the passes of all steps, the three of them together."""
        size, storage, active = self._size[name], self._sparsifier.plan.method.storage, changes[:, _ACTIVE]
        step = np.append(changes[:, 0], self._span()[1])  # stretch i is from step[i], not included, to step[i + 1]
        num_steps = np.diff(step)
        if self.reading.steps is None:
            num_read = np.diff(step.clip(max=self._last_reading(changes)))
        else:  # up to each update, which none has closed for the last stretch yet
            num_read = np.append(num_steps[:-1].clip(max=self.reading.steps), 0)
        learned = active
        if storage is not None:
            learned = active * 0 + size if storage.extra is None else active + num_units(size, storage.extra)
        learned = learned.clip(max=size)
        return float((2 * active * num_steps + learned * (num_steps - num_read) + size * num_read).sum())

    def _last_reading(self, changes: NDArray[np.int64]) -> int:
        """Returns the last step at which an update was to come, for a method that reads at every step."""
        clock = self._sparsifier.plan.clock
        if self._sparsifier.frozen or not isinstance(clock, Every):
            return int(changes[-1, 0])
        return self._span()[1] if clock.last is None else max(clock.last, int(changes[0, 0]))


_ACTIVE = Change._fields.index("active")

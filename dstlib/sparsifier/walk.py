"""The walk of a mask: what happens to sparse weights before and after each step of an optimizer.

With masked.py the only code that changes a model or an optimizer; sparsifier.py calls it.
"""

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer

from dstlib.masking.update import zero_outside_
from dstlib.sparsifier.distributed import check_equal_masks
from dstlib.sparsifier.first_masks import choose_first_masks
from dstlib.sparsifier.masked import Masked
from dstlib.sparsifier.optimizer_state import loss_scale, momentum_of, reset_state
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.update import (
    Observer,
    Seen,
    apply_together,
    gather,
    pull_hidden,
    spread_reach,
    update_each,
    update_together,
)


@dataclass(eq=False)
class Walk:
    """The state of a sparse training.

    ``optimizers`` are those that were seen to step, the latest one last. ``memory`` is the method's allocator's.
    """

    plan: Plan
    masked: list[Masked]
    optimizers: MutableMapping[Optimizer, None]
    observers: list[Observer] = field(default_factory=list)
    frozen: bool = False
    memory: float = 0.0

    def begin(self) -> None:
        """Chooses the first masks; under dense storage the values beneath them are put aside."""
        if self.plan.method.storage is not None:
            for m in self.masked:
                m.hidden = m.parameter.detach().clone()
        plan = choose_first_masks(self.masked, self.plan)
        for m in self.masked:
            if m.hidden is not None:
                m.open()
                spread_reach(m, plan, 0)
                m.close()
        for m in self.masked:
            m.clear(self.optimizers)
        self.plan = plan

    def is_due(self, m: Masked) -> bool:
        """Whether an update is due, or overdue for want of a gradient."""
        return not self.frozen and self.plan.clock.latest(m.step + 1) > m.updated_at

    def prepare(self, weights: Sequence[Masked], optimizer: Optimizer | None) -> None:
        """Before the step: updates that are due, then masks on the gradients; a second call changes nothing."""
        # also at the first step: the first masks differ between ranks of other seeds or weights
        changed = [m for m in weights if m.step == 0 and not m.is_stepping]
        for m in weights:
            m.is_stepping = True
            m.follow()
        # an update that is due waits for the next step at which the weight has a gradient
        ready = [m for m in weights if m.parameter.grad is not None]
        scale = loss_scale(optimizer)
        for m in ready:
            if self.plan.method.trace is not None and not self.frozen:
                gather(m, self.plan, _full_gradient(m, scale))
            if m.open():
                pull_hidden(m, self.plan, scale)
        # under dense storage the step comes first: the model computes with the mask of its weights as they are
        due = [m for m in ready if self.is_due(m) and m.hidden is None]
        self._update(due, scale)
        for m in ready:
            if m.learns is not None and m.parameter.grad is not None:
                zero_outside_(m.parameter.grad, m.learns)
        _check_ranks([*changed, *due])

    def finish(self, weights: Sequence[Masked], optimizers: Iterable[Optimizer]) -> None:
        """After the step: masks on the weights and the optimizers' state, and one more step counted."""
        held = list(optimizers)
        stepped = [m for m in weights if m.is_open and m.is_stepping]
        for m in stepped:
            m.undo_out_of_reach()
            m.clear(held)  # what comes within reach now must not bring along what weight decay left in its momentum
        due = [m for m in stepped if self.is_due(m) and m.parameter.grad is not None]
        try:
            self._update(due, 1.0)  # a fused optimizer has divided the scale out in place by now
            _check_ranks(due)
        finally:
            for m in weights:
                m.close()
                m.clear(held)
                m.step += m.is_stepping
                m.is_stepping = False

    def _update(self, due: Sequence[Masked], scale: float) -> None:
        """Updates the masks of these weights, those that have come to the same step together."""
        if not due:
            return
        method, num_active = self.plan.method, {}
        if method.reset_state:
            num_active = {m: int(m.mask.sum()) for m in due}
        for step in sorted({m.step + 1 for m in due}):
            self._update_at(step, [m for m in due if m.step + 1 == step], scale)
        for m in due:
            spread_reach(m, self.plan, m.updated_at)
            if method.trace is not None and method.trace.steps is not None:
                m.trace = None
            if method.reset_state and int(m.mask.sum()) > num_active[m]:
                for holder in self._holders(m):
                    reset_state(holder, m.parameter)
        if method.skip_step:
            self._skip_step(due)

    def _update_at(self, step: int, due: Sequence[Masked], scale: float) -> None:
        if self.plan.method.allocate is None:
            for m in due:
                with self._cleared((m,)):
                    update_each(m, self.plan, step, self._seen(m, scale), self.observers)
                    m.updated_at = step
            return
        seen = [(m, self._seen(m, scale)) for m in due]
        updates, memory = update_together(seen, self.masked, self.plan, step, self.memory)
        with self._cleared(due):
            apply_together(updates, self.plan, self.observers)
            self.memory = memory
            for m in due:
                m.updated_at = step

    @contextmanager
    def _cleared(self, weights: Iterable[Masked]) -> Iterator[None]:
        """Clears what fell outside the masks; also where a criterion or an observer raised: the zeros hold."""
        try:
            yield
        finally:
            for m in weights:
                m.clear(self._holders(m))

    def _holders(self, m: Masked) -> list[Optimizer]:
        return [o for o in reversed(list(self.optimizers)) if m.held_by(o)]

    def _seen(self, m: Masked, scale: float) -> Seen:
        momenta = (momentum_of(o, m.parameter) for o in self._holders(m))
        return Seen(grad=_full_gradient(m, scale), momentum=next((v for v in momenta if v is not None), None))

    def _skip_step(self, due: Sequence[Masked]) -> None:
        """Without a gradient no torch optimizer moves a parameter: those of these weights leave this step out."""
        skipping = {optimizer for m in due for optimizer in self._holders(m)}
        for parameter in (p for o in skipping for group in o.param_groups for p in group["params"]):
            parameter.grad = None
        for m in self.masked:
            if m.is_stepping and not self._holders(m):  # under an engine without torch optimizers
                m.parameter.grad = None


def _check_ranks(changed: Sequence[Masked]) -> None:
    if changed:
        check_equal_masks({m.weight.name: m.mask for m in changed}, max(m.step for m in changed) + 1)


def _full_gradient(m: Masked, scale: float) -> Tensor:
    grad = m.parameter.grad
    assert grad is not None
    return grad if scale == 1.0 else grad / scale

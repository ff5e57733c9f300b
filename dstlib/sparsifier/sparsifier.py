"""The life of a sparse training, from the first masks on, around the steps of all torch optimizers."""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.errors import StateError
from dstlib.masking.update import zero_outside_
from dstlib.report import Row, Summary
from dstlib.sparsifier import optimizer_state, update
from dstlib.sparsifier.distributed import check_equal_masks
from dstlib.sparsifier.hooks import forget, listen
from dstlib.sparsifier.optimizer_state import momentum_of, parameter_ids
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight, check_saved, find_lost, save
from dstlib.targets import Weight, find_weights

if TYPE_CHECKING:
    from dstlib.engine.decisions import Decisions
    from dstlib.engine.layers.fast_layer import FastLayer


class Sparsifier:
    """Keeps weights sparse and changes their masks as a method says; made by :func:`dstlib.sparsify`.

    The masks live here, the zeros in the weights; the model itself knows nothing.
    """

    def __init__(self, plan: Plan, optimizers: Sequence[Optimizer], modules: Iterable[nn.Module]) -> None:
        self._observers: list[update.Observer] = []
        self._frozen = False
        self._memory = 0.0  # of the method's allocator
        self._attached = True
        self._masked = [
            MaskedWeight(w, torch.ones_like(w.parameter, dtype=torch.bool, requires_grad=False))
            for w in plan.weights
            if not w.reason
        ]
        # those that were seen to step, the latest one last
        self._optimizers: MutableMapping[Optimizer, None] = WeakKeyDictionary(dict.fromkeys(optimizers))
        with torch.no_grad():
            self._plan = self._start(plan)
        by_id = {id(m.parameter): m for m in self._masked}
        # each module with each sparse weight that it holds now; the module decides how long it lives
        self._owners = [(ref(o), by_id[id(p)]) for o in modules for p in o._parameters.values() if id(p) in by_id]
        listen(self)

    @property
    def plan(self) -> Plan:
        """What was settled beforehand: method, clock, weights, densities."""
        return self._plan

    @property
    def observers(self) -> list[update.Observer]:
        """Called with (site, update) after each mask update of each weight; append yours."""
        return self._observers

    @property
    def frozen(self) -> bool:
        """Whether the topology is fixed."""
        return self._frozen

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks by parameter name, True = active, in the shapes of the parameters. Not to be edited."""
        return {m.weight.name: m.mask for m in self._masked}

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The sparse weights."""
        return tuple(m.weight for m in self._masked)

    @property
    def step(self) -> int:
        """Optimizer steps so far, of the weight that has seen the most."""
        return max(m.step for m in self._masked)

    @property
    def density(self) -> float:
        """Active entries over all entries, of the sparse weights."""
        return self.summary().density

    def summary(self) -> Summary:
        """Returns each weight, sparse or dense and why, with its shape and density; printable."""
        active = {name: int(mask.sum()) for name, mask in self.masks.items()}
        rows = tuple(
            Row(
                name=w.name,
                kind=w.kind,
                shape=tuple(w.parameter.shape),
                num_active=active.get(w.name, w.parameter.numel()),
                num_total=w.parameter.numel(),
                reason=w.reason,
            )
            for w in self.plan.weights
        )
        return Summary(rows, self.plan.num_dense, f"{self.plan.method.name} at step {self.step}")

    @torch.no_grad()
    def before_step(self, *optimizers: Optimizer) -> None:
        """Changes the masks if an update is due, then masks the gradients; a second call changes nothing.

        The hooks call this by themselves. Call it before ``clip_grad_norm_``, which would otherwise see the
        norm of the dense gradients, and after ``scaler.unscale_``; where an update is due, or the
        method reads every gradient, an overflow makes it do nothing. Of several optimizers that step apart, name
        the ones that are about to: the gradients that the others will step with are not there yet. An engine
        without torch optimizers calls it, and then ``after_step``, around its own step.

        Raises:
            ScoreError: A criterion returned scores by which units cannot be ordered.
            StateError: Ranks hold different masks.
        """
        for optimizer in optimizers:
            self._meet(optimizer)
        weights = self._held_by(*optimizers) if optimizers else self._masked
        known = (p.grad for o in optimizers or list(self._optimizers) for g in o.param_groups for p in g["params"])
        grads = [grad for grad in (*known, *(m.parameter.grad for m in weights)) if grad is not None]
        if any(map(self._reads, weights)) and not all(bool(grad.isfinite().all()) for grad in grads):
            return
        self._begin_step(weights, None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Masks the weights and the optimizers' state, and counts the step that ``before_step`` began."""
        self._end_step(self._masked, self._optimizers)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets the weights and optimizer state to zero outside the masks, as after loading other weights."""
        for m in self._masked:
            m.clear(self._optimizers)

    @torch.no_grad()
    def mask_model(self, model: nn.Module) -> None:
        """Masks another model with the same names, such as a moving average (EMA, SWA) before it is read.

        An average of weights under moving masks is denser than any of them.

        Raises:
            StateError: A weight is missing or of another shape.
        """
        for name, parameter in find_weights(model, {n: m.shape for n, m in self.masks.items()}).items():
            zero_outside_(parameter, self.masks[name])

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps on any of the sparse weights, or on what has replaced one."""
        held = parameter_ids(optimizer)
        return any(id(m.parameter) in held for m in self._masked) or find_lost(self._owners, held) is not None

    @torch.no_grad()
    def before_optimizer(self, optimizer: Optimizer) -> None:
        """Does as ``before_step`` for the weights of one optimizer, whose hook calls it."""
        optimizer_state.refuse_unsupported(optimizer)
        if (lost := find_lost(self._owners, parameter_ids(optimizer))) is not None:
            raise StateError.of(
                "parameter",
                lost.weight.name,
                allowed="the one that was made sparse",
                given="another in its place, or of another shape, which no mask fits",
                remedy="Call sparsify() after load_state_dict(assign=True), weight_norm, add_depth_shift and the like.",
            )
        self._meet(optimizer)
        weights = self._held_by(optimizer)
        if optimizer_state.overflowed(optimizer):
            for m in weights:
                m.begun = m.step
        else:
            self._begin_step(weights, optimizer)

    @torch.no_grad()
    def after_optimizer(self, optimizer: Optimizer) -> None:
        """Does as ``after_step`` for the weights of one optimizer, whose hook calls it."""
        self._end_step(self._held_by(optimizer), (optimizer,))

    def accelerate(
        self,
        model: nn.Module,
        example_input: Any,
        *,
        decisions: "Decisions | None" = None,
        layers: "Sequence[FastLayer]" = (),
    ) -> nn.Module:
        """Returns the model on the engine, which computes what is active and follows every mask update.

        Call the result in place of the model, for training and after; parameters and optimizer stay. Its backward
        pass gives the gradients of active weights, and those of the others at the steps of an update, which may grow
        by them and lets what it has grown take that very step; at all steps if the method traces gradients. See
        :func:`dstlib.accelerate`.
        """
        from dstlib.engine.accelerate import accelerate  # not before it is asked for: see dstlib.__getattr__

        masked = {m.weight.name: m for m in self._masked}

        def reads(name: str) -> bool:
            return name in masked and self._reads(masked[name])

        return accelerate(
            model, example_input, masks=self.masks, dense_gradient=reads, decisions=decisions, layers=layers
        )

    def freeze(self) -> None:
        """Fixes the topology from now on: zeros hold, masks no longer change."""
        self._frozen = True

    def detach(self) -> None:
        """Stops listening to optimizers, for good. The weights keep the zeros they have at this moment."""
        self._attached = False
        forget(self)

    def state_dict(self) -> dict[str, Any]:
        """Returns masks, steps and what the method remembers: what a resumption needs beside model and optimizer."""
        return save(self._masked, self.plan, frozen=self.frozen, memory=self._memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks and steps from ``state_dict`` of a sparsifier of the same settings, and applies them.

        Method, total_steps and seed are not in the state: give ``sparsify`` the same ones, and the run goes on
        as if it had never stopped.

        Raises:
            StateError: The state is damaged, or of another model, granularity or sparsity; nothing has changed then.
        """
        all_saved = check_saved(state, self._masked, self.plan)
        with torch.no_grad():
            for m, saved in zip(self._masked, all_saved, strict=True):
                m.restore(saved)
            if self.plan.densities_from_model:
                self._plan = update.with_densities(self.plan, self._masked)
        self._frozen, self._memory = bool(state["frozen"]), float(state["memory"])
        self.apply_masks()

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"Sparsifier({self.plan.method.name}, {len(self._masked)} weights, {s.num_active:,} of "
            f"{s.num_sparse:,} active, step {self.step}{', frozen' if self.frozen else ''})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but the optimizers, which are met again when they step: copies follow the copied weights."""
        return {**vars(self), "_optimizers": None, "_owners": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _optimizers=WeakKeyDictionary())
        if self._attached:
            listen(self)

    def _start(self, plan: Plan) -> Plan:
        """Chooses the first masks; under dense storage the values beneath them are put aside."""
        if plan.method.storage is not None:
            for m in self._masked:
                m.hidden = m.parameter.detach().clone()
        plan = update.choose_first_masks(self._masked, plan)
        for m in self._masked:
            if m.hidden is not None:
                m.reveal()
                update.spread_reach(m, plan, 0)
                m.hide()
            m.clear(self._optimizers)
        return plan

    def _begin_step(self, weights: Sequence[MaskedWeight], optimizer: Optimizer | None) -> None:
        """Does all that comes before the step of these weights; a second call changes nothing."""
        # also at the first step: the first masks differ between ranks of other seeds or weights
        changed = [m for m in weights if m.begun == 0]
        for m in weights:
            m.begin_step()
        # an update that is due waits for the next step at which the weight has a gradient
        ready = [m for m in weights if m.parameter.grad is not None]
        scale = optimizer_state.loss_scale(optimizer)
        if self.plan.method.trace is not None and not self.frozen:
            for m in ready:
                update.gather(m, self.plan, _full_gradient(m, scale))
        if self.plan.method.storage is None:  # the masks first, then the step
            changed += self._update(ready, scale)
        else:  # the step first: hidden weights take it, pulled towards zero
            for m in ready:
                if m.reveal():
                    update.pull_hidden(m, self.plan, scale)
        for m in ready:
            if m.learns is not None and m.parameter.grad is not None:  # an update may leave the step out
                zero_outside_(m.parameter.grad, m.learns)
        check_equal_masks(changed)

    def _end_step(self, weights: Sequence[MaskedWeight], optimizers: Iterable[Optimizer]) -> None:
        """Does all that comes after the step: zeros in the weights and the optimizers' state, one more step counted."""
        held = list(optimizers)
        # under dense storage the masks are chosen by the weights as they are after the step
        stepped = [m for m in weights if m.is_revealed and m.is_stepping]
        try:
            for m in stepped:
                m.undo_out_of_reach()
                m.clear(held)  # what comes within reach now must not bring what weight decay left in its momentum
            # a fused optimizer has divided the loss scale out in place by now
            check_equal_masks(self._update([m for m in stepped if m.parameter.grad is not None], 1.0))
        finally:
            for m in weights:
                m.hide()
                m.clear(held)
                m.step = m.begun

    def _meet(self, optimizer: Optimizer) -> None:
        """Takes note of an optimizer that steps now, as the latest one."""
        self._optimizers.pop(optimizer, None)
        self._optimizers[optimizer] = None

    def _is_due(self, m: MaskedWeight) -> bool:
        """Whether an update is due, or overdue for want of a gradient."""
        return not self.frozen and self.plan.clock.latest(m.step + 1) > m.updated_at

    def _reads(self, m: MaskedWeight) -> bool:
        """Whether the next step of a weight reads the gradients of all of it."""
        return self.plan.method.trace is not None or self.plan.method.storage is not None or self._is_due(m)

    def _update(self, ready: Sequence[MaskedWeight], scale: float) -> list[MaskedWeight]:
        """Updates the masks that are due; returns their weights."""
        due, method = [m for m in ready if self._is_due(m)], self.plan.method
        num_active = {m: int(m.mask.sum()) for m in due} if method.reset_state else {}
        for step in sorted({m.step + 1 for m in due}):
            together = [m for m in due if m.step + 1 == step]
            # one after the other, unless weights that have come to the same step share their units
            for weights in [together] if method.allocate is not None else [[m] for m in together]:
                self._update_at(step, weights, scale)
        for m in due:
            update.spread_reach(m, self.plan, m.updated_at)
            if method.trace is not None and method.trace.steps is not None:
                m.trace = None
            if method.reset_state and int(m.mask.sum()) > num_active[m]:
                for optimizer in self._holders(m):
                    optimizer_state.reset_state(optimizer, m.parameter)
        if due and method.skip_step:
            self._skip_step(due)
        return due

    def _update_at(self, step: int, weights: Sequence[MaskedWeight], scale: float) -> None:
        due = [(m, _full_gradient(m, scale), momentum_of(self._holders(m), m.parameter)) for m in weights]
        try:
            self._memory = update.update_masks(
                due, self._masked, self.plan, step=step, memory=self._memory, observers=self.observers
            )
            for m in weights:
                m.updated_at = step
        finally:  # also where a criterion or an observer raised: the zeros hold
            for m in weights:
                m.clear(self._holders(m))

    def _skip_step(self, due: Iterable[MaskedWeight]) -> None:
        """Takes the gradients away: no torch optimizer moves a parameter then, so these leave this step out."""
        skipping = {optimizer for m in due for optimizer in self._holders(m)}
        for parameter in (p for o in skipping for group in o.param_groups for p in group["params"]):
            parameter.grad = None
        for m in self._masked:
            if m.is_stepping and not self._holders(m):  # under an engine without torch optimizers
                m.parameter.grad = None

    def _holders(self, m: MaskedWeight) -> list[Optimizer]:
        """Returns the optimizers that were seen to step on a weight, the latest one first."""
        return [o for o in reversed(list(self._optimizers)) if id(m.parameter) in parameter_ids(o)]

    def _held_by(self, *optimizers: Optimizer) -> list[MaskedWeight]:
        held = set().union(*map(parameter_ids, optimizers))
        return [m for m in self._masked if id(m.parameter) in held]


def _full_gradient(m: MaskedWeight, scale: float) -> Tensor:
    grad = m.parameter.grad
    assert grad is not None
    return grad if scale == 1.0 else grad / scale

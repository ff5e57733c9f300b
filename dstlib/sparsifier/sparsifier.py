"""The controller: what a user holds. The work is in walk.py, done by hooks around the steps of all torch optimizers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.masking.update import zero_outside_
from dstlib.report import Row, Summary
from dstlib.sparsifier.first_masks import with_densities
from dstlib.sparsifier.hooks import forget, listen
from dstlib.sparsifier.masked import Masked, places
from dstlib.sparsifier.optimizer_state import all_finite, overflowed, parameter_ids, refuse_unsupported
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.saved import check_saved, save
from dstlib.sparsifier.update import Observer
from dstlib.sparsifier.walk import Walk
from dstlib.targets import Weight, find_weights

if TYPE_CHECKING:
    from dstlib.engine.decisions import Decisions


class Sparsifier:
    """Keeps weights sparse and changes their masks as a method says; made by :func:`dstlib.sparsify`.

    The masks live here, the zeros in the weights; the model itself knows nothing.
    """

    def __init__(self, plan: Plan, optimizers: Sequence[Optimizer], owners: Iterable[nn.Module]) -> None:
        masked = [
            Masked(w, torch.ones_like(w.parameter, dtype=torch.bool, requires_grad=False))
            for w in plan.weights
            if not w.reason
        ]
        self._walk = Walk(plan, masked, WeakKeyDictionary(dict.fromkeys(optimizers)))
        self._attached = True
        with torch.no_grad():
            self._walk.begin()
        self._places = places(owners, masked)
        listen(self)

    @property
    def plan(self) -> Plan:
        """What was settled beforehand: method, clock, weights, densities."""
        return self._walk.plan

    @property
    def observers(self) -> list[Observer]:
        """Called with (site, update) after each mask update of each weight; append yours."""
        return self._walk.observers

    @property
    def frozen(self) -> bool:
        """Whether the topology is fixed."""
        return self._walk.frozen

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks by parameter name, True = active, in the shapes of the parameters. Not to be edited."""
        return {m.weight.name: m.mask for m in self._walk.masked}

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The sparse weights."""
        return tuple(m.weight for m in self._walk.masked)

    @property
    def step(self) -> int:
        """Optimizer steps so far, of the weight that has seen the most."""
        return max(m.step for m in self._walk.masked)

    @property
    def density(self) -> float:
        """Active entries over all entries, of the sparse weights."""
        return self.summary().density

    def summary(self) -> Summary:
        """Each weight: sparse or dense, why, shape, density; printable."""
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

        Errors: ScoreError for scores that cannot be ranked; StateError where ranks hold different masks.
        """
        weights = self._held_by(*optimizers) if optimizers else self._walk.masked
        known = (p.grad for o in optimizers or list(self._walk.optimizers) for g in o.param_groups for p in g["params"])
        grads = [grad for grad in (*known, *(m.parameter.grad for m in weights)) if grad is not None]
        method = self.plan.method
        reads_now = method.trace is not None or method.storage is not None or any(map(self._walk.is_due, weights))
        if reads_now and not all_finite(grads):
            return
        self._walk.prepare(weights, None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Masks the weights and the optimizers' state, and counts the step that ``before_step`` began."""
        self._walk.finish(self._walk.masked, self._walk.optimizers)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets the weights and optimizer state to zero outside the masks, as after loading other weights."""
        for m in self._walk.masked:
            m.clear(self._walk.optimizers)

    @torch.no_grad()
    def mask_model(self, model: nn.Module) -> None:
        """Masks another model with the same names, such as a moving average (EMA, SWA) before it is read.

        An average of weights under moving masks is denser than any of them.

        Errors: StateError where a weight is missing or of another shape.
        """
        for name, parameter in find_weights(model, {n: m.shape for n, m in self.masks.items()}).items():
            zero_outside_(parameter, self.masks[name])

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds any of the sparse weights, or what has taken the place of one."""
        return bool(self._held_by(optimizer)) or any(place.is_lost_to(optimizer) for place in self._places)

    @torch.no_grad()
    def before_optimizer(self, optimizer: Optimizer) -> None:
        """``before_step`` for the weights of one optimizer, called by its hook."""
        refuse_unsupported(optimizer)
        for place in self._places:
            if place.is_lost_to(optimizer):
                place.complain()
        self._walk.optimizers.pop(optimizer, None)
        self._walk.optimizers[optimizer] = None
        weights = self._held_by(optimizer)
        if overflowed(optimizer):
            for m in weights:
                m.is_stepping = False
        else:
            self._walk.prepare(weights, optimizer)

    @torch.no_grad()
    def after_optimizer(self, optimizer: Optimizer) -> None:
        """``after_step`` for the weights of one optimizer, called by its hook."""
        self._walk.finish(self._held_by(optimizer), (optimizer,))

    def accelerate(self, model: nn.Module, example_input: Any, *, decisions: "Decisions | None" = None) -> nn.Module:
        """The model on the engine, for training and after: it computes what is active, and follows every mask update.

        Call the result in place of the model; parameters and optimizer stay. Its backward pass gives the gradients
        of active weights, and those of the others at the steps of an update, which may grow by them and lets what it
        has grown take that very step; at all steps if the method traces gradients. See :func:`dstlib.accelerate`.
        """
        from dstlib.engine.accelerate import accelerate  # not before it is asked for: see dstlib.__getattr__

        masked = {m.weight.name: m for m in self._walk.masked}
        method = self.plan.method
        always = method.trace is not None or method.storage is not None

        def reads(name: str) -> bool:
            return name in masked and (always or self._walk.is_due(masked[name]))

        return accelerate(model, example_input, masks=self.masks, dense_gradient=reads, decisions=decisions)

    def freeze(self) -> None:
        """Fixes the topology from now on: zeros hold, masks no longer change."""
        self._walk.frozen = True

    def detach(self) -> None:
        """Stops listening to optimizers, for good. The weights keep the zeros they have at this moment."""
        self._attached = False
        forget(self)

    def state_dict(self) -> dict[str, Any]:
        """Masks, steps and what the method remembers: with model and optimizer, all that a resumption needs."""
        return save(self._walk.masked, self.plan, frozen=self.frozen, memory=self._walk.memory)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks and steps from ``state_dict`` of a sparsifier of the same settings, and applies them.

        Method, total_steps and seed are not in the state: give ``sparsify`` the same ones, and the run goes on
        as if it had never stopped.

        Errors: StateError, before anything is changed, for a damaged state or one of another model,
        granularity or sparsity.
        """
        saved = check_saved(state, self.masks, self.plan)
        with torch.no_grad():
            for m in self._walk.masked:
                saved[m.weight.name].restore(m)
            if self.plan.is_ranked:
                self._walk.plan = with_densities(self.plan, self._walk.masked)
        self._walk.frozen, self._walk.memory = bool(state["frozen"]), float(state["memory"])
        self.apply_masks()

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"Sparsifier({self.plan.method.name}, {len(self._walk.masked)} weights, {s.num_active:,} of "
            f"{s.num_sparse:,} active, step {self.step}{', frozen' if self.frozen else ''})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the optimizers, which are met again when they step: copies follow the copied weights."""
        walk = replace(self._walk, optimizers={})
        return {"_walk": walk, "_attached": self._attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _places=[])
        self._walk.optimizers = WeakKeyDictionary()
        if self._attached:
            listen(self)

    def _held_by(self, *optimizers: Optimizer) -> list[Masked]:
        held = set().union(*map(parameter_ids, optimizers))
        return [m for m in self._walk.masked if id(m.parameter) in held]

"""The controller: with masked.py the only code that changes a model or an optimizer.

Hooks around the steps of all torch optimizers do the work (hooks.py). Before a step they change the masks,
if an update is due, and mask the gradients; after it they mask the weights and the optimizer's state.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dstlib.distributed import check_equal_masks
from dstlib.errors import ScoreError
from dstlib.hooks import forget, listen
from dstlib.masked import Masked, places
from dstlib.masking import MaskUpdate, Site, site_generator, update_mask
from dstlib.masking.apply import zero_outside_
from dstlib.optimizer_state import (
    all_finite,
    momentum_of,
    overflowed,
    parameter_ids,
    refuse_unsupported,
    unscaled,
)
from dstlib.plan import Plan
from dstlib.report import Row, Summary
from dstlib.saved import VERSION, SavedWeight, check_saved
from dstlib.targets import Slot, Weight, find_weights

Observer = Callable[[Site, MaskUpdate], None]


class Sparsifier:
    """Keeps weights sparse and changes their masks as a method says; made by :func:`dstlib.sparsify`.

    ``observers`` are called with (site, update) after each mask update of each weight; append yours.
    The masks live here, the zeros in the weights; the model itself knows nothing.
    """

    def __init__(self, plan: Plan, optimizers: Sequence[Optimizer], owners: Iterable[nn.Module]) -> None:
        self.plan = plan
        self.observers: list[Observer] = []
        self.frozen = False
        self._attached = True
        self._optimizers = WeakKeyDictionary(dict.fromkeys(optimizers))  # the one that stepped last comes last
        self._masked = [
            Masked(w, torch.ones_like(w.parameter, dtype=torch.bool, requires_grad=False))
            for w in plan.weights
            if not w.reason
        ]
        with torch.no_grad():
            for masked in self._masked:
                for slot in masked.weight.slots:
                    self._choose_first(masked, slot)
        self._places = places(owners, self._masked)
        self.apply_masks()
        listen(self)

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
        norm of the dense gradients, and after ``scaler.unscale_``; where an update is due, an overflow makes it
        do nothing. Of several optimizers that step apart, name the ones that are about to: the gradients that
        the others will step with are not there yet. An engine without torch optimizers calls it, and then
        ``after_step``, around its own step.

        Errors: ScoreError for scores that cannot be ranked; StateError where ranks hold different masks.
        """
        weights = self._held_by(*optimizers) if optimizers else self._masked
        known = (p.grad for o in optimizers or list(self._optimizers) for g in o.param_groups for p in g["params"])
        grads = [grad for grad in (*known, *(m.parameter.grad for m in weights)) if grad is not None]
        if any(self._is_due(m) for m in weights) and not all_finite(grads):
            return
        self._prepare(weights, None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Masks the weights and the optimizers' state, and counts the step that ``before_step`` began."""
        self._finish(self._masked, self._optimizers)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets the weights and optimizer state to zero outside the masks, as after loading other weights."""
        for m in self._masked:
            m.clear(self._optimizers)

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
        self._optimizers.pop(optimizer, None)
        self._optimizers[optimizer] = None
        weights = self._held_by(optimizer)
        if overflowed(optimizer):
            for m in weights:
                m.is_stepping = False
        else:
            self._prepare(weights, optimizer)

    @torch.no_grad()
    def after_optimizer(self, optimizer: Optimizer) -> None:
        """``after_step`` for the weights of one optimizer, called by its hook."""
        self._finish(self._held_by(optimizer), (optimizer,))

    def freeze(self) -> None:
        """Fixes the topology from now on: zeros hold, masks no longer change."""
        self.frozen = True

    def detach(self) -> None:
        """Stops listening to optimizers, for good. The weights keep the zeros they have at this moment."""
        self._attached = False
        forget(self)

    def state_dict(self) -> dict[str, Any]:
        """Masks, steps and whether frozen: with the model's and the optimizer's, all that a resumption needs."""
        weights = {m.weight.name: SavedWeight(m.mask.clone(), m.step, m.updated_at) for m in self._masked}
        return {"version": VERSION, "frozen": self.frozen, "weights": {n: w._asdict() for n, w in weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks and steps from ``state_dict`` of a sparsifier of the same settings, and applies them.

        Method, total_steps and seed are not in the state: give ``sparsify`` the same ones, and the run goes on
        as if it had never stopped.

        Errors: StateError, before anything is changed, for a damaged state or one of another model,
        granularity or sparsity.
        """
        saved = check_saved(state, self.masks, self.plan)
        with torch.no_grad():
            for m in self._masked:
                m.mask.copy_(saved[m.weight.name].mask)
                m.step, m.updated_at = saved[m.weight.name].step, saved[m.weight.name].updated_at
                m.is_stepping = False
        self.frozen = bool(state["frozen"])
        self.apply_masks()

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"Sparsifier({self.plan.method.name}, {len(self._masked)} weights, {s.num_active:,} of "
            f"{s.num_sparse:,} active, step {self.step}{', frozen' if self.frozen else ''})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the optimizers, which are met again when they step: copies follow the copied weights."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_optimizers", "_places")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _optimizers=WeakKeyDictionary(), _places=[])
        if self._attached:
            listen(self)

    def _choose_first(self, m: Masked, slot: Slot) -> None:
        """The first mask is an update that starts from nothing."""
        site = self._site(m, slot, grad=None, momentum=None, step=0)
        score = self.plan.method.init(site)
        self._change(site, torch.zeros_like(site.mask), score, score, drop_fraction=0.0)

    def _site(self, m: Masked, slot: Slot, *, grad: Tensor | None, momentum: Tensor | None, step: int) -> Site:
        return Site(
            name=slot.name,
            weight=slot.view(m.parameter.detach()),
            mask=slot.view(m.mask),
            grad=None if grad is None else slot.view(grad),
            momentum=None if momentum is None else slot.view(momentum),
            step=step,
            generator=site_generator(self.plan.seed, step, slot.name),
        )

    def _held_by(self, *optimizers: Optimizer) -> list[Masked]:
        held = set().union(*map(parameter_ids, optimizers))
        return [m for m in self._masked if id(m.parameter) in held]

    def _is_due(self, m: Masked) -> bool:
        """Whether an update is due, or overdue for want of a gradient."""
        return not self.frozen and self.plan.clock.latest(m.step + 1) > m.updated_at

    def _prepare(self, weights: Iterable[Masked], optimizer: Optimizer | None) -> None:
        changed = {}  # also at the first step: the first masks differ between ranks of other seeds or weights
        for m in weights:
            if m.step == 0 and not m.is_stepping:
                changed[m.weight.name] = m
            m.is_stepping = True
            m.mask = m.mask.to(m.parameter.device)
            if m.parameter.grad is None:
                continue  # an update that is due waits for the next step at which the weight has a gradient
            if self._is_due(m):
                changed[m.weight.name] = m
                self._update(m, m.parameter.grad, optimizer)
            zero_outside_(m.parameter.grad, m.mask)
        if changed:
            step = max(m.step for m in changed.values()) + 1
            check_equal_masks({name: m.mask for name, m in changed.items()}, step)

    def _update(self, m: Masked, grad: Tensor, optimizer: Optimizer | None) -> None:
        step = m.step + 1
        holders = [o for o in reversed(list(self._optimizers)) if m.held_by(o)]
        momentum = next((v for o in holders if (v := momentum_of(o, m.parameter)) is not None), None)
        grad = unscaled(grad, optimizer)
        try:
            for slot in m.weight.slots:
                self._update_site(self._site(m, slot, grad=grad, momentum=momentum, step=step))
            m.updated_at = step
        finally:  # also where a criterion or an observer raised: the zeros hold
            m.clear(holders)

    def _update_site(self, site: Site) -> None:
        method = self.plan.method
        drop_fraction = method.drop_fraction(self.plan.clock.progress(site.step))
        update = self._change(site, site.mask, method.drop(site), method.grow(site), drop_fraction=drop_fraction)
        site.weight.copy_(torch.where(update.grown, method.grown_init(site), site.weight))
        for observe in self.observers:
            observe(site, update)

    def _change(self, site: Site, old: Tensor, drop: Tensor, grow: Tensor, *, drop_fraction: float) -> MaskUpdate:
        """Updates the mask of a site; says which weight it was whose scores cannot be ranked."""
        grain = self.plan.method.granularity
        num_target = self.plan.num_target(site.name, grain.fold(site.mask).shape[1], site.step)
        try:
            update = update_mask(old, drop, grow, granularity=grain, num_target=num_target, drop_fraction=drop_fraction)
        except ScoreError as error:
            raise ScoreError(f"{site.name} at step {site.step}: {error}") from error
        site.mask.copy_(update.mask)
        return update

    def _finish(self, weights: Iterable[Masked], optimizers: Iterable[Optimizer]) -> None:
        for m in weights:
            m.clear(optimizers)
            m.step += m.is_stepping
            m.is_stepping = False

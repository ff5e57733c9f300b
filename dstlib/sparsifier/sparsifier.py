"""The life of a sparse training, from the first masks on, around the steps of all torch optimizers."""

import math
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dstlib.errors import SettingError, StateError, require
from dstlib.masking import Masks, PackedMask
from dstlib.masking.update import zero_outside_
from dstlib.report import Summary
from dstlib.schedules import Every
from dstlib.sparsifier import loaded, optimizer_state, update
from dstlib.sparsifier.compact import CompactWeight, fill_compact, has_bare_outputs, update_compact
from dstlib.sparsifier.distributed import Replicas
from dstlib.sparsifier.frozen import find_behind, following, last_update, tell_of_early_end, tell_of_end
from dstlib.sparsifier.hooks import forget, is_next_to, keep, listen
from dstlib.sparsifier.known_optimizers import Kind
from dstlib.sparsifier.optimizer_state import Kept, StateMeanings, momentum_of, parameter_ids
from dstlib.sparsifier.outputs import PATIENCE, OutputSearch, tell_of_bare_outputs
from dstlib.sparsifier.ownership import Ownership
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.saved import check_saved, save
from dstlib.sparsifier.standstill import tell_of_standstill
from dstlib.sparsifier.start import start_masks
from dstlib.sparsifier.state import MaskedWeight, clear_all, opened
from dstlib.sparsifier.summary import summarize
from dstlib.targets import Weight, find_weights, held_weights, plain_state, unwrap

if TYPE_CHECKING:
    from dstlib.engine.decisions import Decisions
    from dstlib.engine.layers.fast_layer import FastLayer


# steps of others after which a weight that has taken none is told of: one that has a gradient and no known optimizer,
# and any other, whose turn may come late, such as that of a generator
_UNSTEPPED, _UNREACHED = 10, 1000


class Sparsifier:
    """Keeps weights sparse and changes their masks as a method says; made by :func:`dstlib.sparsify`.

    The masks live here, the zeros in the weights; the model itself knows nothing.
    """

    @torch.inference_mode(False)  # masks are written to later
    def __init__(
        self,
        plan: Plan,
        optimizers: Sequence[Optimizer],
        model: nn.Module,
        process_group: ProcessGroup | None = None,
        state: Mapping[str, Kind] | None = None,
        compact: Sequence[CompactWeight] = (),
    ) -> None:
        self._observers: list[update.Observer] = []
        self._frozen = False
        self._memory = 0.0  # of the method's allocator
        self._attached = True
        started = {m.weight.name: m for m in compact}
        self._masked: list[MaskedWeight] = [
            started.get(w.name) or MaskedWeight(w, PackedMask.full(w.parameter)) for w in plan.weights if not w.reason
        ]
        beginning = [m for m in self._masked if m.weight.name not in started]
        for m in beginning:
            m.is_output = None if plan.outputs is None else m.weight.name in plan.outputs
        self._search = OutputSearch(plan)
        self._twins: WeakSet[nn.Module] = WeakSet()  # of the model, which compute with its weights
        self._process_group = process_group
        self._meanings = StateMeanings(state or {})
        self._next_question = float(_UNSTEPPED)  # at which step it is asked whether all weights take steps
        self._left_out: set[MaskedWeight] = set()  # by the optimizer that took over from theirs
        self._moved = False  # whether any update has changed a mask
        self._behind: set[MaskedWeight] = set()  # those of which was told that they end at another density
        self._num_unheard = 0  # backward passes since the last step
        self._next_look = 2.0  # so many, and a weight is looked at; infinite once something was found
        self._ownership = Ownership(model, {m.weight.name: m.parameter for m in self._masked})
        self._connect()
        for optimizer in optimizers:
            self._meet(optimizer, self._held_by(optimizer))
        with torch.no_grad():
            self._plan = start_masks(beginning, plan, self._kept)
        tell_of_bare_outputs([m for m in self._masked if m.is_output], self.plan)
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
    def masks(self) -> Masks:
        """The masks by parameter name, True = active, in the shapes of the plain parameters, made when asked for."""
        return Masks({m.weight.name: m.held_mask for m in self._masked})

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

    @torch.no_grad()
    def summary(self) -> Summary:
        """Returns each weight, sparse or dense and why, with its shape and density; printable.

        Counted is what is: non-zeros outside the masks, and what stands where a sparse weight was.
        """
        losses = self._ownership.losses(self._by_name)
        summary = summarize(self.plan, self._masked, self._ownership.model, losses, self.step)
        return replace(summary, notes=self._meanings.lines())

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
            self._meet(optimizer, self._held_by(optimizer))
        weights = self._held_by(*optimizers) if optimizers else self._masked
        self._check_owned(weights)
        self._note_young_anew(weights)
        known = (p.grad for o in optimizers or list(self._optimizers) for g in o.param_groups for p in g["params"])
        grads = [grad for grad in (*known, *(m.parameter.grad for m in weights)) if grad is not None]
        if any(map(self._reads, weights)) and not all(bool(grad.isfinite().all()) for grad in grads):
            return
        self._begin_step(weights, None)

    @torch.no_grad()
    def after_step(self) -> None:
        """Masks the weights and the optimizers' state, and counts the step that ``before_step`` began."""
        self._end_step(self._masked)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets the weights and optimizer state to zero outside the masks, whatever they hold there.

        Not after loading weights: ``load_state_dict`` of the state that was saved with them brings the masks that
        belong to them, and loses nothing.
        """
        for m in self._masked:
            m.clear(self._kept(m))

    @torch.no_grad()
    def mask_model(self, model: nn.Module) -> None:
        """Masks another model with the same names, such as a moving average (EMA, SWA) before it is read.

        An average of weights under moving masks is denser than any of them. Where both models store a weight compactly,
        there is nothing to mask.

        Raises:
            StateError: A weight is missing, of another shape, or stored compactly under another mask.
        """
        from dstlib.engine.ops.masked import zero_outside_each  # not before it is asked for: see dstlib.__getattr__

        masks, held = self.masks, held_weights(unwrap(model)) if isinstance(model, nn.Module) else {}
        for name in held.keys() & masks.keys():
            require(
                torch.equal(held[name].mask.to(masks[name].device), masks[name]),
                "model",
                "mask_model()",
                allowed=f"{name} under its present mask",
                given="one in compact storage under another",
                remedy="Make the average anew after a mask update, or average dense_state_dict().",
                error=StateError,
            )
        packed = {name: mask for name, mask in masks.packed.items() if name not in held}
        weights = find_weights(model, {name: mask.shape for name, mask in packed.items()})
        zero_outside_each((parameter, packed[name]) for name, parameter in weights.items())

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer steps on any of the sparse weights, or on parameters that it did not have before."""
        if self._looked_at.get(optimizer) != _fingerprint(optimizer):
            return True
        return any(id(p) in self._by_id for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def opens_step(self, optimizer: Optimizer) -> None:
        """Looks from where the step of one optimizer moves, before it evaluates anything."""
        self._note_young_anew(self._held_by(optimizer) if self.plan.method.grown_warmup else ())

    @torch.no_grad()
    def before_optimizer(self, optimizer: Optimizer) -> None:
        """Does as ``before_step`` for the weights of one optimizer, whose hook calls it."""
        weights = self._held_by(optimizer)
        if self._looked_at.get(optimizer) != (fingerprint := _fingerprint(optimizer)):
            self._look_at(optimizer)
            self._looked_at[optimizer] = fingerprint
        if not weights:
            return
        optimizer_state.refuse_unsupported(optimizer)
        self._check_owned(weights)
        self._meet(optimizer, weights)
        self._meanings.meet(optimizer, ((m.parameter, m.learns) for m in weights))
        if optimizer_state.takes_no_step(optimizer):
            for m in weights:
                m.begun = m.step
        else:
            self._begin_step(weights, optimizer)
            if optimizer_state.is_elementwise(optimizer) and is_next_to(optimizer):
                looked_at = self._in_turn(weights)  # all of it, as nothing tells of what is written to .data
                for m in weights:
                    if m is not looked_at and m.left is not None:  # of small weights all is looked at
                        m.note_alike(self._kept(m))

    @torch.no_grad()
    def after_optimizer(self, optimizer: Optimizer) -> None:
        """Does as ``after_step`` for the weights of one optimizer, whose hook calls it."""
        self._end_step(self._held_by(optimizer))

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

        Raises:
            StateError: Weights were loaded without their masks, now or before a later pass.
        """
        from dstlib.engine.accelerate import accelerate  # not before it is asked for: see dstlib.__getattr__

        masked = {m.weight.name: m for m in self._masked if m.has_zeros}

        def reads(name: str) -> bool:
            return name in masked and self._reads(masked[name])

        fast = accelerate(
            model,
            example_input,
            masks=Masks({name: m.packed for name, m in masked.items()}),
            dense_gradient=reads,
            holds=lambda name: not masked[name].is_written,
            decisions=decisions,
            layers=layers,
        )
        self._twins.add(fast)
        return fast

    def freeze(self) -> None:
        """Fixes the topology from now on: zeros hold, masks no longer change.

        Warns where the density is on its way to another one, as in a dense phase of AC/DC; ``finish`` goes there first.
        """
        if not self._frozen:
            tell_of_early_end(self._masked, self.plan, self.step)
        self._frozen = True

    @torch.no_grad()
    def finish(self) -> None:
        """Brings the plan to its end now, for a run that is cut short: final densities, and masks that stay.

        Each weight is pruned by magnitude to the density that it has after the last update, as one that is frozen
        midway, and nothing grows, as there is no gradient; where weights share their units, each gives up its part.
        Optimizers' state is masked like the weights. Call it between steps, after freeze() too, and train on, save or
        export.

        >>> from dstlib import sparsify
        >>> model = nn.Linear(20, 10)
        >>> sparsifier = sparsify(model, sparsity=0.9, method="gmp", total_steps=1000)
        >>> sparsifier.density, sparsifier.finish(), sparsifier.density
        (1.0, None, 0.1)
        """
        clock = self.plan.clock
        if isinstance(clock, Every) and clock.last is not None:  # also of a topology that was frozen on its way
            last = clock.last
            if due := [m for m in self._masked if m.updated_at < last]:
                self._update_at(last, due, {}, 1.0)
        self.freeze()

    def detach(self) -> None:
        """Stops listening to optimizers, for good. The weights keep the zeros they have at this moment."""
        self._attached = False
        self._search.end()
        forget(self)
        for each in self._masked:
            if isinstance(each, CompactWeight):
                each.active.forget()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Returns masks, steps and what the method remembers: what a resumption needs beside model and optimizer.

        Warns where the weights of this moment are not those that the masks belong to.
        """
        outside = {m: n for m in self._masked if m.begun and not m.is_revealed and (n := m.num_outside())}
        if outside:
            loaded.tell_of_others(outside)
        return save(self._masked, self.plan, frozen=self.frozen, memory=self._memory)

    @torch.no_grad()
    def dense_state_dict(self) -> dict[str, Any]:
        """Returns the ``state_dict`` of the plain model, with its zeros, whatever is stored compactly.

        It takes the memory of the plain model; a model that is compact loads it, too.

        Raises:
            StateError: The model is gone.
        """
        if (model := self._ownership.model) is None:
            remedy = "Keep the model as long as its sparsifier."
            raise StateError.of("model", "dense_state_dict()", allowed="the one made sparse", given=None, remedy=remedy)
        return plain_state(model)

    @torch.inference_mode(False)  # what is kept from here on must be writable in training
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes masks and steps from ``state_dict`` of a sparsifier of the same settings, and applies them.

        Give ``sparsify`` the same method, total_steps and seed, and the run goes on as if it had never stopped. The
        seed is not in the state, nor are settings of the method other than its name.

        Raises:
            StateError: The state is damaged, or of another model, method, total_steps, granularity or sparsity; nothing
                has changed then.
        """
        all_saved = check_saved(state, self._masked, self.plan)
        with torch.no_grad():
            for m, saved in zip(self._masked, all_saved, strict=True):
                m.restore(saved)
            # weights that were loaded before, and are of another step; what dense storage hides is in the state
            outside = {m: m.num_outside() - m.num_hidden_outside() for m in self._outside()}
            if outside := {m: num for m, num in outside.items() if num}:
                loaded.tell_of_misfit(outside)
            if self.plan.densities_from != "settings":
                self._plan = update.with_densities(self.plan, self._masked)
        self._moved = any(m.updated_at > 0 for m in self._masked)  # what earlier updates did is not known
        self._left_out = {m for m in self._masked if m.updated_at > m.step}  # they have followed the others
        self._frozen, self._memory = bool(state["frozen"]), float(state["memory"])
        self._search.end()
        self._search = OutputSearch(self.plan)
        self._look_for_outputs()
        self.apply_masks()

    def __repr__(self) -> str:
        s = self.summary()
        return (
            f"Sparsifier({self.plan.method.name}, {len(self._masked)} weights, {s.num_active:,} of "
            f"{s.num_sparse:,} active, step {self.step}{', frozen' if self.frozen else ''})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Returns all but the optimizers, which are met again when they step: copies follow the copied model."""
        left_out = {"_optimizers", "_looked_at", "_by_id", "_by_name", "_held", "_replicas", "_search", "_twins"}
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return {**state, "_process_group": None, "_twins": list(self._twins)}  # a copy may be kept of one of them alone

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()
        self._search, self._twins = OutputSearch(self.plan), WeakSet(state["_twins"])
        if self._attached:
            listen(self)
            keep(self, self._ownership.owners)
            self._look_for_outputs()

    def _connect(self) -> None:
        """Makes all that belongs to this process and these very objects, which no copy takes along."""
        # those that were seen to step, with the number of weights; all, with that of the parameters that they had then
        self._optimizers: MutableMapping[Optimizer, int] = WeakKeyDictionary()
        self._looked_at: MutableMapping[Optimizer, int] = WeakKeyDictionary()
        self._held: dict[MaskedWeight, list[ref[Optimizer]]] = {m: [] for m in self._masked}
        self._by_id = {id(m.parameter): (i, m) for i, m in enumerate(self._masked)}
        self._by_name = {m.weight.name: m for m in self._masked}
        self._replicas = Replicas(list(self._by_name), self._process_group)
        for m in self._masked:
            if isinstance(m, CompactWeight):
                m.active.wants_passes = partial(_asks_for_passes, ref(self), m.weight.name)
        for m in self._masked:
            if m.parameter.requires_grad and not m.parameter.is_inference():
                m.parameter.register_post_accumulate_grad_hook(partial(_note_backward, ref(self)))
                break

    def _check_owned(self, weights: Iterable[MaskedWeight]) -> None:
        """Checks that the model still computes with these weights as they are; warns of those that are gone."""
        weights = list(weights)
        names = self._ownership.changed(m.weight.name for m in weights)
        reshaped = [m.weight.name for m in weights if not m.fits]
        losses = self._ownership.losses(names) if names else {}
        for name, loss in losses.items():
            if loss.kind == "replaced":
                raise _replaced(name, loss.story)
            self._ownership.forget(name)
        if losses:
            (name, loss), *others = losses.items()
            more = f" ({len(others)} more like it)" if others else ""
            warnings.warn(
                f"{name}: sparse until now, but {loss.story}{more}. For a layer that was replaced or fused "
                "to be sparse, too, call sparsify() with include= of its name: the others keep their masks; if it "
                'holds its zeros already, with masks="from-zeros" as well. summary() counts what is.',
                stacklevel=2,
            )
        for name in reshaped:
            raise _replaced(name, "another shape, which no mask fits")

    def _look_at(self, optimizer: Optimizer) -> None:
        """Checks all weights, as an optimizer of this model may hold what came in their place."""
        model = self._ownership.model
        if model is not None and self._ownership.changed(self._by_name):
            ours = {id(parameter) for parameter in model.parameters()}
            if ours & parameter_ids(optimizer):
                self._check_owned(self._masked)

    def _outside(self) -> dict[MaskedWeight, int]:
        """Counts the non-zeros outside the masks of weights that something else has written since the last step."""
        return {m: n for m in self._masked if m.is_written and m.begun and (n := m.num_outside())}

    def _look_for_foreign_writes(self, weights: Sequence[MaskedWeight]) -> list[MaskedWeight]:
        """Looks at weights that something else wrote since the last step; returns those whose masks followed."""
        outside = {m: n for m in weights if m.is_written and (n := m.num_outside())}
        if not outside and self._is_written_unseen(weights):
            outside = {m: n for m in weights if not m.is_revealed and (n := m.num_outside())}
        if not outside:
            return []
        taken = [m for m in outside if loaded.take_places(m, self.plan.method.granularity)]
        step = 1 + max(m.step for m in outside)
        if taken:
            loaded.tell_of_zeros(taken, step)
        for m in taken:
            if m.hidden is not None:
                m.hidden = zero_outside_(m.hidden, ~m.mask)
                update.spread_reach(m, self.plan, m.step)
            m.clear(self._kept(m))
        lost = {m: n for m, n in outside.items() if m not in taken}
        if any(m.step > m.lost_at for m in lost):  # at each step in a row it has the same cause
            loaded.tell_of_loss(lost, step)
        for m in lost:
            m.lost_at, m.left = m.step + 1, None  # nothing tells where else there is something
        return taken

    def _is_written_unseen(self, weights: Sequence[MaskedWeight]) -> bool:
        """Looks at one weight of these, each in its turn: ``p.data`` is written to without a new version.

        Elsewhere than on a CPU it would be waited for, so there it is looked at only where an update waits as well.
        """
        if not weights:
            return False
        m = self._in_turn(weights)
        return not m.is_revealed and (m.parameter.is_cpu or self._is_due(m)) and m.num_outside() > 0

    def _in_turn(self, weights: Sequence[MaskedWeight]) -> MaskedWeight:
        """Returns one of the weights, another at each step."""
        return weights[max(m.step for m in weights) % len(weights)]

    def _look_for_unheard_steps(self) -> None:
        """Looks at a small weight, ever more seldom, when several backward passes have had no step between them."""
        self._num_unheard += 1
        if self._num_unheard < self._next_look or not self._attached:
            return
        self._next_look *= 2
        partly = [m for m in self._masked if m.has_zeros and not m.packed.is_full]
        if partly and (num := (m := min(partly, key=lambda m: m.packed.numel)).num_outside()):
            self._next_look = math.inf
            loaded.tell_of_unheard(m, num, self._num_unheard)

    def _ask_for_unstepped(self) -> None:
        """Tells of weights that have taken no step: first of those that should have, later of all others.

        By then optimizers have made all that they keep, too: keys that were stated and are none are told of.
        """
        is_first = self._next_question == _UNSTEPPED
        waiting = [m for m in self._masked if m.begun == 0 and m.parameter.requires_grad]
        if told := [m for m in waiting if is_first == (m.parameter.grad is not None and not self._held[m])]:
            loaded.tell_of_unstepped(told, int(self._next_question))
        if is_first:
            self._meanings.warn_of_unused()
        self._next_question = _UNREACHED if is_first else math.inf

    def _begin_step(self, weights: Sequence[MaskedWeight], optimizer: Optimizer | None) -> None:
        """Does all that comes before the step of these weights; a second call changes nothing."""
        from dstlib.engine.ops.masked import zero_outside_each  # not before it is needed: see dstlib.__getattr__

        self._num_unheard = 0
        if self._next_question < math.inf and any(m.step >= self._next_question for m in weights):
            self._ask_for_unstepped()
        # also at the first step: the first masks differ between ranks of other seeds or weights
        changed = [m for m in weights if m.begun == 0]
        written = self._look_for_foreign_writes(weights)
        changed += [m for m in written if m.begun > 0]
        for m in weights:
            m.begin_step()
        scale = optimizer_state.loss_scale(optimizer)
        changed += self._settle_outputs(weights, scale)
        # an update that is due waits for the next step at which the weight has a gradient
        ready = [m for m in weights if m.parameter.grad is not None]
        if self.plan.method.interval is not None and not self.frozen:
            _refuse_graph(ready)
        if self.plan.method.trace is not None and not self.frozen:
            for m in ready:
                update.gather(m, self.plan, _full_gradient(m, scale))
        if self.plan.method.storage is None:  # the masks first, then the step
            changed += self._update(ready, weights, scale)
        else:  # the step first: hidden weights take it, pulled towards zero
            for m in ready:
                if m.reveal():
                    update.pull_hidden(m, self.plan, scale)
        if warmup := self.plan.method.grown_warmup:
            for m in weights:
                m.note_young(self._kept(m), warmup)
        # an update may leave the step out
        for m in ready:
            grad = m.parameter.grad  # one that is set by hand may be a single number, expanded
            if grad is not None and not grad.is_contiguous() and 0 in grad.stride():
                m.parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        grads = ((m.parameter.grad, m.learns) for m in ready)
        zero_outside_each((grad, learns) for grad, learns in grads if grad is not None and learns is not None)
        self._replicas.check_equal(changed)

    def _note_young_anew(self, weights: Iterable[MaskedWeight]) -> None:
        """Forgets from where a step moves that was begun and never taken: other weights may have been loaded since."""
        for m in weights:
            if m.before:
                m.note_before(self._kept(m))

    def _end_step(self, weights: Sequence[MaskedWeight]) -> None:
        """Does all that comes after the step: zeros in the weights and the optimizers' state, one more step counted."""
        for m in weights:
            if m.before:
                m.slow_young(self._kept(m), self.plan.method.grown_warmup)
        # under dense storage the masks are chosen by the weights as they are after the step
        stepped = [m for m in weights if m.is_revealed and m.is_stepping]
        try:
            for m in stepped:
                m.undo_out_of_reach()
                m.clear(self._kept(m))  # what comes within reach must not bring what weight decay left in its momentum
            if self.plan.method.storage is not None:  # a fused optimizer has divided the loss scale out in place by now
                ready = [m for m in stepped if m.parameter.grad is not None]
                self._replicas.check_equal(self._update(ready, weights, 1.0))
        finally:
            for m in weights:
                m.hide()
                m.step = m.begun
                if isinstance(m, CompactWeight):
                    m.active.forget()
            clear_all((m, self._kept(m)) for m in weights)
        if self._search.is_wanted:
            self._look_for_outputs()
        last = last_update(self.plan)
        if not self.frozen and any(m.step == last for m in weights):
            behind = find_behind([m for m in self._masked if m not in self._behind], self.plan)
            if behind:
                self._behind.update(behind)
                tell_of_end(behind, self.plan)
            if not self._moved:
                tell_of_standstill(self.plan)
                self._moved = True  # as far as anyone has to be told

    def _look_for_outputs(self) -> None:
        """Watches the coming forward passes for what feeds what, if some weights have taken a step and nobody knows."""
        model = self._ownership.model
        self._search.is_wanted = any(m.is_output is None for m in self._masked)
        if self._search.is_wanted and (model is not None or self._twins) and any(m.step for m in self._masked):
            self._search.begin(model, self._twins)

    def _settle_outputs(self, weights: Sequence[MaskedWeight], scale: float) -> list[MaskedWeight]:
        """Says which of the weights are outputs, at their second step; returns those whose first masks are filled.

        An output without a gradient is filled at the next step at which it has one.
        """
        if self._search.is_on:
            is_late = self.step >= PATIENCE
            asked = [m for m in (self._masked if is_late else weights) if m.is_output is None and (m.step or is_late)]
            if asked:
                self._search.settle(asked, self.plan, self._replicas, self._optimizers)
            if all(m.is_output is not None for m in self._masked):
                self._search.end()
        filled = []
        for m in [m for m in weights if m.is_to_fill and m.is_output is not None]:
            if not m.is_output or self.frozen:
                m.is_to_fill = False
            elif m.parameter.grad is not None:
                m.is_to_fill = False
                filled.append(m)
                if isinstance(m, CompactWeight):
                    states, average = self._states(m), self._replicas.average_
                    fill_compact(m, self.plan, scale=scale, states=states, observers=self.observers, average=average)
                    continue
                grad, old, kept = _full_gradient(m, scale), m.packed.copy(), self._kept(m)
                update.fill_first_masks(m, grad, self.plan, step=m.step + 1, observers=self.observers)
                m.clear(kept)
                m.start_grown(kept, old, grad, self.plan.method.grown_state)
        return filled

    def _is_due(self, m: MaskedWeight) -> bool:
        """Whether an update is due, or overdue for want of a gradient."""
        return not self.frozen and self.plan.clock.latest(m.step + 1) > m.updated_at

    def _reads(self, m: MaskedWeight) -> bool:
        """Whether the next step of a weight reads the gradients of all of it."""
        return self.plan.method.trace is not None or self.plan.method.storage is not None or self._is_due(m)

    def _update(
        self, ready: Sequence[MaskedWeight], weights: Sequence[MaskedWeight], scale: float
    ) -> list[MaskedWeight]:
        """Updates the masks that are due, of these weights and of frozen ones; returns their weights.

        ``ready`` are those of the weights that have a gradient.
        """
        method, trained = self.plan.method, {m: m.step + 1 for m in ready if self._is_due(m)}
        steps = trained
        if not self.frozen and (trained or self._left_out or len(ready) < len(weights)):
            frozen = self._frozen_at(weights)
            trained = {m: step for m, step in trained.items() if m not in frozen}
            steps = trained | following(frozen, self.plan)
        due = [m for m in self._masked if m in steps] if steps else []
        num_active = {m: m.packed.num_active for m in trained} if method.reset_state else {}
        for step in sorted(set(steps.values())):
            together = [m for m in due if steps[m] == step]
            # one after the other, unless weights that have come to the same step share their units
            for group in [together] if method.allocate is not None else [[m] for m in together]:
                grads = {m: _full_gradient(m, scale) for m in group if m in trained}
                self._update_at(step, group, grads, scale)
        for m in trained:
            update.spread_reach(m, self.plan, m.updated_at)
            if method.trace is not None and method.trace.steps is not None:
                m.trace = None
            if method.reset_state and m.packed.num_active > num_active[m]:
                for optimizer in self._holders(m):
                    kept = self._meanings.kept(optimizer, m.parameter, m.packed)
                    optimizer_state.reset_state(optimizer, m.parameter, kept, m.parameter.grad)
        if trained and method.skip_step:
            self._skip_step(trained)
        return due

    def _update_at(
        self, step: int, weights: Sequence[MaskedWeight], grads: Mapping[MaskedWeight, Tensor], scale: float
    ) -> None:
        for m in weights:
            if isinstance(m, CompactWeight):
                size = m.parameter.numel()
                has_moved = update_compact(
                    m,
                    self.plan,
                    step=step,
                    scale=scale if m in grads else None,
                    states=self._states(m),
                    observers=self.observers,
                    average=self._replicas.average_,
                )
                m.updated_at, self._moved = step, self._moved or has_moved
                self._replicas.check_size(m.weight.name, size, m.parameter.numel())
        weights = [m for m in weights if m.has_zeros]
        if not weights:
            return
        due = [(m, grads.get(m), momentum_of(self._holders(m), m.parameter)) for m in weights]
        before = [m.packed.copy() for m in weights]
        revealed = [m for m in weights if m.hidden is not None and m.reveal()]  # frozen ones, which take no step
        try:
            with opened(weights):
                self._memory = update.update_masks(
                    due, self._masked, self.plan, step=step, memory=self._memory, observers=self.observers
                )
            for m in weights:
                m.updated_at = step
        finally:  # also where a criterion or an observer raised: the zeros hold
            for m in revealed:
                m.hide()
            for (m, grad, _), old in zip(due, before, strict=True):
                kept = self._kept(m)
                m.clear(kept)
                if grad is not None:
                    m.start_grown(kept, old, grad, self.plan.method.grown_state)
                is_young = grad is not None and self.plan.method.grown_warmup > 0
                m.young, m.before = m.mask & ~old.current() if is_young else None, []
            self._moved = self._moved or any(
                not torch.equal(m.packed.bits, old.bits) for m, old in zip(weights, before, strict=True)
            )

    def _frozen_at(self, weights: Sequence[MaskedWeight]) -> dict[MaskedWeight, int]:
        """Returns the frozen weights, each with the step at which it is: of its optimizer, or else of these weights."""
        now = max((m.begun for m in weights), default=0)
        here = {m: m.begun for m in weights if not m.parameter.requires_grad}
        # what another optimizer steps on may be without gradients for a while, as in adversarial training
        gone = [m for m in self._masked if m not in here and not m.parameter.requires_grad and not self._holders(m)]
        return here | dict.fromkeys([*gone, *self._left_out], now)

    def _skip_step(self, due: Iterable[MaskedWeight]) -> None:
        """Takes the gradients away: no torch optimizer moves a parameter then, so these leave this step out."""
        skipping = {optimizer for m in due for optimizer in self._holders(m)}
        for parameter in (p for o in skipping for group in o.param_groups for p in group["params"]):
            parameter.grad = None
        for m in self._masked:
            if m.is_stepping and not self._holders(m):  # under an engine without torch optimizers
                m.parameter.grad = None

    def _meet(self, optimizer: Optimizer, weights: Sequence[MaskedWeight]) -> None:
        """Notes that an optimizer steps on these weights, as the latest one."""
        seen = ref(optimizer)  # the same object at each call, while the optimizer lives
        if self._optimizers.get(optimizer) != len(weights):  # it takes over from others, or from itself
            earlier = {id(seen), *(id(held[-1]) for m in weights if (held := self._held[m]))}
            self._left_out |= {m for m, held in self._held.items() if m.begun and held and id(held[-1]) in earlier}
        if self._left_out:
            for m in self._left_out.intersection(weights):
                if m.updated_at > m.begun:  # it has followed the others
                    m.step = m.begun = self.step
            self._left_out.difference_update(weights)
        self._optimizers[optimizer] = len(weights)
        for m in weights:
            held = self._held[m]
            if not held or held[-1] is not seen:
                held[:] = [other for other in held if other is not seen and other() is not None] + [seen]

    def _holders(self, m: MaskedWeight) -> list[Optimizer]:
        """Returns the optimizers that were seen to step on a weight, the latest one first."""
        return [optimizer for seen in reversed(self._held[m]) if (optimizer := seen()) is not None]

    def _kept(self, m: MaskedWeight) -> list[Kept]:
        """Returns what the optimizers that were seen to step on a weight keep for its entries."""
        if m.learns is None:
            return []
        return [k for o in self._holders(m) for k in self._meanings.kept(o, m.parameter, m.learns)]

    def _states(self, m: CompactWeight) -> list[tuple[Optimizer, tuple[Kept, ...]]]:
        """Returns the optimizers that were seen to step on a compact weight, each with what it keeps for its values."""
        every = PackedMask.full(m.parameter)
        return [(o, self._meanings.kept(o, m.parameter, every)) for o in self._holders(m)]

    def _wants_passes(self, name: str) -> bool:
        """Whether gradients of what is not active are wanted of the pass to come, of a compact weight."""
        m = self._by_name[name]
        assert isinstance(m, CompactWeight)
        if not (self._attached and m.parameter.requires_grad):
            return False
        return self._is_due(m) or (m.is_to_fill and has_bare_outputs(m))

    def _held_by(self, *optimizers: Optimizer) -> list[MaskedWeight]:
        """Returns the sparse weights that these step on, in the model's order."""
        parameters = (p for o in optimizers for group in o.param_groups for p in group["params"])
        held = {self._by_id[id(p)] for p in parameters if id(p) in self._by_id}
        return [m for _, m in sorted(held, key=lambda indexed: indexed[0])]


def _full_gradient(m: MaskedWeight, scale: float) -> Tensor:
    grad = m.parameter.grad
    assert grad is not None
    return grad if scale == 1.0 else grad / scale


def _fingerprint(optimizer: Optimizer) -> int:
    """Returns a number that tells whether the parameters are still the same ones; their lists may be edited."""
    return sum(sum(map(id, group["params"])) for group in optimizer.param_groups)


def _refuse_graph(weights: Iterable[MaskedWeight]) -> None:
    """Refuses gradients that are to be differentiated: autograd forbids masks to move before that is done."""
    for m in weights:
        if m.parameter.grad is not None and m.parameter.grad.requires_grad:
            raise SettingError.of(
                "gradient",
                m.weight.name,
                allowed="one that is no part of a graph, as masks change between the backward pass and the step",
                given="one of backward(create_graph=True), as AdaHessian and its like need",
                remedy='Use method="static" or freeze(), which change no mask, or another optimizer.',
            )


def _replaced(name: str, given: str) -> StateError:
    return StateError.of(
        "parameter",
        name,
        allowed="the one that was made sparse",
        given=given,
        remedy="Call sparsify() after load_state_dict(assign=True), weight_norm, add_depth_shift, FSDP and the like. "
        'To go on from here: detach(), a new optimizer, and sparsify(model, masks="from-zeros"), which keeps all '
        "that is not zero.",
    )


def _asks_for_passes(sparsifier: "ref[Sparsifier]", name: str) -> bool:
    return (asked := sparsifier()) is not None and asked._wants_passes(name)


def _note_backward(sparsifier: "ref[Sparsifier]", parameter: Tensor) -> None:
    if (listening := sparsifier()) is not None:
        listening._look_for_unheard_steps()

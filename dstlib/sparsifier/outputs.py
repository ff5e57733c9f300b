"""Which sparse weights the outputs of a model come from: found in the second step of each, and told where it cannot be.

Nobody says so at ``sparsify``, and no input is known there. In the forward passes between the first step of a weight
and its second, modules are watched; the graph that autograd recorded then says which weights feed others. Where it
does not, as within a model that was compiled as a whole, a weight is taken for an output.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from dstlib.errors import few
from dstlib.masking import NeuronAblation, folded_shape, num_outputs, num_units
from dstlib.sparsifier.distributed import Replicas
from dstlib.sparsifier.optimizer_state import parameter_ids
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight
from dstlib.targets import PassWatch

PATIENCE = 10  # steps, after which all that is not known is told
_UNSEEN, _INNER, _JOINT, _OUTPUT = range(4)  # what ranks tell each other: the highest counts
_CODES = {False: _INNER, None: _JOINT, True: _OUTPUT}


class OutputSearch:
    """Looks for the outputs of a model among its weights, until all are settled.

    ``is_wanted``: nothing is settled, and modules are not watched yet.
    """

    def __init__(self, plan: Plan) -> None:
        self.is_wanted = plan.outputs is None
        self._parameters = [weight.parameter for weight in plan.weights]
        self._watch: PassWatch | None = None

    @property
    def is_on(self) -> bool:
        """Whether modules are watched."""
        return self._watch is not None

    def begin(self, model: nn.Module | None, twins: Iterable[nn.Module]) -> None:
        """Watches a model, if there still is one, and others that compute with its weights."""
        self._watch, self.is_wanted = PassWatch(model, self._parameters, twins), False

    def end(self) -> None:
        """Watches no more."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = None

    def settle(
        self, weights: Sequence[MaskedWeight], plan: Plan, replicas: Replicas, optimizers: Iterable[Optimizer]
    ) -> None:
        """Says of each weight whether outputs come from it, the same on all ranks; warns of those that may be.

        ``optimizers`` step on the model, each on its part of it.
        """
        if self._watch is None:
            return
        found = self._watch.outputs([parameter_ids(optimizer) for optimizer in optimizers])
        keys = {m.weight.name: id(m.parameter) for m in weights}
        codes = {name: _CODES[found[key]] if key in found else _UNSEEN for name, key in keys.items()}
        for theirs in replicas.tell(codes, max(m.step for m in weights) + 1):
            codes = {name: max(code, theirs.get(name, _UNSEEN)) for name, code in codes.items()}
        for m in weights:
            m.is_output = codes[m.weight.name] != _INNER
        unknown = [m.weight.name for m in weights if codes[m.weight.name] in (_UNSEEN, _JOINT)]
        if unknown and isinstance(plan.method.allocate, NeuronAblation):
            _tell_of_unknown(unknown, plan)
        tell_of_bare_outputs([m for m in weights if codes[m.weight.name] == _OUTPUT], plan)


def tell_of_bare_outputs(masked: Sequence[MaskedWeight], plan: Plan) -> None:
    """Warns of output layers with outputs that have no weight and cannot all be given one."""
    if short := _short_of_outputs(masked, plan):
        _tell_of_short(short)
    bare = {}
    for m in masked:
        whole = m.mask
        for view in m.weight.views:
            mask = view.of(whole)
            is_in_groups = folded_shape(plan.method.granularity, mask.shape)[0] > 1
            num_bare = int((~mask.flatten(1).any(dim=1)).sum())
            if num_bare and not is_in_groups and not num_outputs(plan.method.granularity, mask.shape):
                bare[view.name] = f"{num_bare:,} of {len(mask):,} outputs of {view.name}"
    if bare:
        warnings.warn(
            f"{few(list(bare.values()), most=3)} have no weight, and are the same for every input: units of "
            f"{plan.method.granularity} share outputs in part, so that no output can be given one for itself. Give "
            f'such a layer a lower sparsity, by overrides={{"{next(iter(bare))}": 0.5}}, say, or leave it out by '
            "exclude=.",
            stacklevel=2,
        )


def _short_of_outputs(masked: Iterable[MaskedWeight], plan: Plan) -> dict[str, tuple[int, int]]:
    """Returns output layers whose active units will be fewer than their outputs need, with both numbers."""
    short = {}
    for m in masked:
        for view in m.weight.views:
            shape = view.of(torch.empty(m.shape, device="meta")).shape
            num_needed, num_all = num_outputs(plan.method.granularity, shape), 0
            if num_needed and (plan.method.allocate is None or view.name in plan.own):
                num_all = folded_shape(plan.method.granularity, shape)[1]
                num_active = num_units(num_all, plan.densities[view.name])
                if num_active < num_needed:
                    short[view.name] = (num_active, num_needed)
    return short


def _tell_of_short(short: Mapping[str, tuple[int, int]]) -> None:
    """Warns of output layers that cannot have a weight for each output."""
    cases = [f"{name} with {num_active:,} for {needed:,}" for name, (num_active, needed) in short.items()]
    more = f", and {len(cases) - 3} more" if len(cases) > 3 else ""
    (first, *_) = short
    warnings.warn(
        f"Fewer active units than outputs in {', '.join(cases[:3])}{more}: some outputs have no weight, and are the "
        f'same for every input. Give such a layer a sparsity of its own, by overrides={{"{first}": 0.5}}, say, or '
        "leave it out by exclude=.",
        stacklevel=2,
    )


def _tell_of_unknown(names: Sequence[str], plan: Plan) -> None:
    warnings.warn(
        f"{few(names, most=3, noun='weights')}: nothing shows whether the model's outputs come from them, so method "
        f"{plan.method.name} ablates no neuron there. A forward pass shows it that autograd records operation by "
        "operation, not one that is compiled, or checkpointed with use_reentrant=True. Name the output layers by "
        'keep_neurons=["head"], say, and the others are ablated.',
        stacklevel=2,
    )

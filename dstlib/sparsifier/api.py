"""What makes a model sparse in one line."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dstlib.errors import SelectionError, few, require
from dstlib.masking import INIT_SCALES, InitScale
from dstlib.methods import find_method
from dstlib.methods.method import Method
from dstlib.sparsifier.compact import CompactWeight, check_method, compact_weights
from dstlib.sparsifier.door import FROM_ZEROS, Masks, take
from dstlib.sparsifier.hooks import keep, listeners
from dstlib.sparsifier.known_optimizers import Kind
from dstlib.sparsifier.optimizer_state import check_stated, parameter_ids, refuse_unsupported
from dstlib.sparsifier.plan import Plan, Settings, Storage, make_plan
from dstlib.sparsifier.sparsifier import Sparsifier
from dstlib.sparsifier.standstill import refuse_no_update, refuse_skipped_phases, warn_of_standstill
from dstlib.targets import unwrap


def sparsify(
    model: nn.Module,
    *optimizers: Optimizer,
    sparsity: float | None = None,
    masks: Masks | None = None,
    method: str | Method = "rigl",
    total_steps: int | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    split: Mapping[str, int] | None = None,
    axes: Mapping[str, str] | None = None,
    keep_neurons: str | Sequence[str] | None = None,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
    state: Mapping[str, Kind] | None = None,
    init_scale: InitScale | None = None,
    storage: Storage = "masked",
) -> Sparsifier:
    """Makes a model sparse now, and keeps it sparse under any torch optimizer that steps on its weights.

    The training loop stays as it is; so do the model's type, forward and state-dict keys. ``sparsity`` is
    the share of inactive entries over the selected weights, ``total_steps`` the number of optimizer steps of
    the run. ``include`` and ``exclude`` are globs over qualified names ("fusion.*"); what is dense only by default
    is asked for by its full name, or by a glob whose last part is written out ("*.experts.w1"), if it matches no
    others. ``overrides`` maps globs to sparsities of their own, outside the budget of the others; of several that
    match, the last wins. ``split`` maps globs to the number of matrices stacked in a weight, each to compete for
    itself: known fused projections (``qkv``, say) are split without it, and 1 keeps one together. ``axes`` maps globs
    to the axes of raw parameters, as in einops ("e i o": several matrices of inputs × outputs; docs/networks.md), and
    so asks for them. A call that leaves most of the matrices' entries dense warns.
    Weights that already hold the zeros of such a plan keep them: their places become the first masks.

    ``masks`` says where to start from, whatever plan it came of: "from-zeros" at the non-zeros of the weights at hand;
    masks by parameter name; or a path, or what was loaded of it: a state of dstlib, torch.nn.utils.prune, rigl-torch,
    NNCF or compressed-tensors, or a checkpoint from whose zeros they are taken (docs/your_own.md). The layers then have
    the densities of their masks, and ``sparsity`` may be left out; where it is higher than theirs, the method has to
    prune, and its ramp leads there from the masks. Weights without a mask, or without zeros, stay dense.

    ``keep_neurons`` are globs of the layers that keep a weight for each of their neurons; by default those that the
    outputs of the model come from, found in the second step, in what autograd records: no class loses all its weights.
    ``process_group`` are the ranks that hold a replica of the model, whose masks are compared at each update; by
    default all. ``state`` says what an optimizer keeps under a key, where that is not known: a "moment", an
    "accumulator", "weights" or "other" (docs/optimizers.md). Passing the optimizers is optional; it lets mistakes be
    found now rather than at the first step. ``init_scale`` makes up for the inputs that the first masks take away:
    "fan_in" multiplies the weights of each output by √(all inputs / active inputs), "density" those of each layer by
    1 / √density; weights that hold zeros already, as those of a sparse checkpoint, keep their values.

    ``storage="compact"``, before an optimizer is made: of each weight that can be so (``summary()`` says which), only
    the active values exist, as a parameter (A,) of the same name, of a convolution's kernels (A, *taps), and so do
    gradients, optimizer state and what data-parallel training sends; layers on the meta device are initialised one by
    one (docs/compact.md).

    Raises:
        SettingError: A setting is out of range.
        SelectionError: Weights do not exist, cannot be sparse or are sparse already; or masks do not fit them.
        StateError: A file of masks is missing, damaged or of another model.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> sparsifier = sparsify(model, sparsity=0.9, method="static")
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> model(torch.randn(8, 64)).sum().backward(); optimizer.step()
    >>> int((model[0].weight != 0).sum() + (model[2].weight != 0).sum())  # a tenth of 64·32 + 32·10
    237
    >>> sparsifier.detach()
    >>> sparsify(model, masks="from-zeros", method="rigl", total_steps=1000)
    Sparsifier(rigl, 2 weights, 237 of 2,368 active, step 0)
    """
    _check_masks(masks)
    globs = {"include": include, "exclude": exclude, "keep_neurons": () if keep_neurons is None else keep_neurons}
    by_glob = {"overrides": overrides or {}, "split": split or {}, "axes": axes or {}}
    _check_types(model, globs=globs, by_glob=by_glob, seed=seed)
    _check_optimizers(optimizers, model)
    check_stated(state or {})
    chosen = find_method(method)
    _check_scale(init_scale, chosen)
    _check_storage(storage, chosen)
    settings = Settings(
        sparsity=sparsity,
        masks=None if masks is None else partial(take, masks),
        total_steps=total_steps,
        include=_several(include),
        exclude=_several(exclude),
        split=split or {},
        axes=axes or {},
        overrides=overrides or {},
        seed=seed,
        keep_neurons=None if keep_neurons is None else _several(keep_neurons),
        init_scale=init_scale,
        storage=storage,
    )
    plan = make_plan(model, chosen, settings)
    refuse_no_update(plan)
    refuse_skipped_phases(plan)
    sparse = {id(weight.parameter) for weight in plan.weights if not weight.reason}
    _check_unmasked(sparse)
    compact: list[CompactWeight] = []
    if storage == "compact":
        with torch.no_grad(), torch.inference_mode(False):
            plan, compact, masked_as = compact_weights(plan, model, optimizers)
        plan = replace(plan, masked_as=masked_as)
        sparse = {id(weight.parameter) for weight in plan.weights if not weight.reason}
    owners = [m for m in unwrap(model).modules() if any(id(p) in sparse for p in m._parameters.values())]
    sparsifier = Sparsifier(plan, optimizers, unwrap(model), process_group, state, compact)
    keep(sparsifier, owners)
    warn_of_standstill(sparsifier.plan)
    if optimizers:
        _warn_of_unheld(plan, optimizers)
    return sparsifier


def _several(globs: str | Sequence[str]) -> tuple[str, ...]:
    return (globs,) if isinstance(globs, str) else tuple(globs)


def _check_types(model: object, *, globs: Mapping[str, object], by_glob: Mapping[str, object], seed: object) -> None:
    """Checks what would else fail far from the call."""

    def are_globs(value: object) -> bool:
        is_several = isinstance(value, Sequence) and all(isinstance(pattern, str) for pattern in value)
        return isinstance(value, str) or is_several

    def check(holds: bool, what: str, allowed: str, given: object, remedy: str) -> None:
        is_plain = isinstance(given, str | int | float | None) or (isinstance(given, Sequence) and len(given) < 4)
        shown = given if is_plain else type(given).__name__
        require(holds, what, "sparsify()", allowed=allowed, given=repr(shown), remedy=remedy)

    check(isinstance(model, nn.Module), "model", "an nn.Module", model, "Pass the module itself.")
    for what, given in globs.items():
        told = None if are_globs(given) else _names_of(model)
        hint = f'Layers go by name, as {told}; "*" is all' + ("." if what == "include" else ", () is none.")
        check(told is None, what, "a glob or several", given, hint)
    examples = {
        "overrides": ("sparsities", '{"head": 0.0}'),
        "split": ("numbers of matrices", '{"*.fused": 3}'),
        "axes": ("orders of axes", '{"*.experts.w1": "e i o"}'),
    }
    for what, given in by_glob.items():
        values, example = examples[what]
        are_keys = isinstance(given, Mapping) and are_globs(list(given))
        hint = "" if are_keys else f"Pass {example}, say. Layers go by name, as {_names_of(model)}."
        check(are_keys, what, f"globs with their {values}", given, hint)
    check(type(seed) is int, "seed", "a whole number", seed, "The same seed gives the same masks; pass 0, say.")


def _names_of(model: object) -> str:
    """Names the layers of a model that globs may be of."""
    assert isinstance(model, nn.Module)
    weights = (name for name, p in unwrap(model).named_parameters() if p.ndim > 1)
    return few([repr(name.removesuffix(".weight")) for name in weights], most=6) or "in named_parameters()"


def _check_masks(masks: object) -> None:
    """Checks what kind of thing the masks are, and that a word is one that is known, or a path."""
    is_word = isinstance(masks, str) and Path(masks).name == masks and not Path(masks).exists()
    require(
        isinstance(masks, str | Path | Mapping | nn.Module | None) and (not is_word or masks == FROM_ZEROS),
        "masks",
        "sparsify()",
        allowed=f'"{FROM_ZEROS}", masks by name, or the path of a file or folder',
        given=repr(masks) if isinstance(masks, str) else type(masks).__name__,
        remedy=f'masks="{FROM_ZEROS}" goes on from the zeros of the weights in the model.',
    )


def _check_scale(init_scale: object, method: Method) -> None:
    """Checks that a scale of the first weights is known, and goes with the method."""
    require(
        init_scale is None or init_scale in INIT_SCALES,
        "init_scale",
        "sparsify()",
        allowed=f"None, or one of {', '.join(INIT_SCALES)}",
        given=repr(init_scale),
        remedy='Pass "fan_in" for weights that have just been initialised; None leaves them as they are.',
    )
    require(
        init_scale is None or method.storage is None,
        "init_scale",
        f"sparsify() with method {method.name}",
        allowed="None, as hidden weights compete with active ones by magnitude",
        given=repr(init_scale),
        remedy="Leave it out, or choose a method without dense storage.",
    )


def _check_storage(storage: object, method: Method) -> None:
    """Checks that a storage is known, and has what the method changes masks by."""
    require(
        storage in get_args(Storage),
        "storage",
        "sparsify()",
        allowed=f"one of {', '.join(get_args(Storage))}",
        given=repr(storage),
        remedy='"masked" keeps weights as they are, with zeros; of "compact" ones only what is active exists.',
    )
    if storage == "compact":
        check_method(method)


def _warn_of_unheld(plan: Plan, optimizers: Sequence[Optimizer]) -> None:
    """Warns of sparse weights that none of these optimizers trains."""
    held = set().union(*(parameter_ids(optimizer) for optimizer in optimizers))
    unheld = [w.name for w in plan.weights if not w.reason and id(w.parameter) not in held]
    if unheld:
        warnings.warn(
            f"{', '.join(unheld[:5])}: sparse, but in none of the optimizers given, so neither trained nor updated",
            stacklevel=3,
        )


def _check_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Checks that each is a torch optimizer that steps on the model."""
    ours = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        require(
            isinstance(optimizer, Optimizer),
            "argument after the model",
            "sparsify()",
            allowed="torch optimizers",
            given=type(optimizer).__name__ if isinstance(optimizer, Sequence) else repr(optimizer),
            remedy="Pass everything else by name: sparsify(model, optimizer, sparsity=0.9).",
        )
        refuse_unsupported(optimizer)
        require(
            bool(ours & parameter_ids(optimizer)),
            "optimizer",
            "sparsify()",
            allowed="one that steps on parameters of the model",
            given=f"{type(optimizer).__name__} with none of them",
            remedy="Make the optimizer after the model was moved, wrapped, or loaded with assign=True.",
            error=SelectionError,
        )


def _check_unmasked(sparse: set[int]) -> None:
    """Checks by the identity of the parameters: they may be shared by several models, or copied with a sparsifier."""
    taken = [w.name for s in listeners() if isinstance(s, Sparsifier) for w in s.weights if id(w.parameter) in sparse]
    require(
        not taken,
        "model",
        "sparsify()",
        allowed="one whose weights are not masked yet",
        given=f"weights of another sparsifier ({', '.join(taken[:3])})",
        remedy="Call detach() on the other one first.",
        error=SelectionError,
    )

"""The summary of a sparse training: each weight as it is at this moment, whatever was planned."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from dstlib.report import Row, Summary
from dstlib.sparsifier.ownership import Loss
from dstlib.sparsifier.plan import Plan
from dstlib.sparsifier.state import MaskedWeight
from dstlib.targets import Weight, plain_name


def summarize(
    plan: Plan, masked: Sequence[MaskedWeight], model: nn.Module | None, losses: Mapping[str, Loss], step: int
) -> Summary:
    """Returns a row for each weight of the plan, and for each that has come to the model since.

    A sparse weight that the model has lost is counted as what stands in its place, or else as nothing; a dense one
    is not listed.
    """
    by_name = {m.weight.name: m for m in masked}
    named = {} if model is None else {plain_name(name): p for name, p in model.named_parameters()}
    dense = _dense_now([weight for weight in plan.weights if weight.reason], named)
    rows = [
        _lost_row(weight, loss) if (loss := losses.get(weight.name)) else _row(weight, by_name.get(weight.name), plan)
        for weight in plan.weights
        if not (named and weight.reason) or weight.name in dense
    ]
    known = set(map(id, (*(m.parameter for m in masked), *dense.values(), *(x.stand_in for x in losses.values()))))
    new = {name: p for name, p in named.items() if p.ndim >= 2 and id(p) not in known}
    rows += [_new_row(name, parameter) for name, parameter in new.items()]
    num_vectors = sum(p.numel() for p in named.values() if p.ndim < 2) if named else plan.num_dense
    return Summary(tuple(rows), num_vectors, f"{plan.method.name} at step {step}")


def _dense_now(weights: Iterable[Weight], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the dense weights that the model still has, or what was loaded into their place, by name."""
    found: dict[str, Tensor] = {}
    present = set(map(id, named.values()))
    for weight in weights:
        now = weight.parameter if id(weight.parameter) in present else named.get(weight.name)
        if now is not None and now.shape == weight.parameter.shape:
            found[weight.name] = now
    return found


def _row(weight: Weight, m: MaskedWeight | None, plan: Plan) -> Row:
    num_total = weight.shape.numel()
    num_outside = 0 if m is None else m.num_outside()
    return Row(
        name=weight.name,
        kind=weight.kind,
        shape=tuple(weight.shape),
        num_active=num_total if m is None else num_outside + m.packed.num_active * m.fits,
        num_total=num_total,
        reason=weight.reason,
        note=f"{num_outside:,} non-zeros outside the mask" if num_outside else _storage(weight, m, plan),
    )


def _storage(weight: Weight, m: MaskedWeight | None, plan: Plan) -> str:
    """Says how a sparse weight is stored, where compact storage was asked for."""
    if m is not None and not m.has_zeros:
        return "sparse, compact"
    return f"sparse, masked: {reason}" if (reason := plan.masked_as.get(weight.name)) else ""


def _lost_row(weight: Weight, loss: Loss) -> Row:
    stand_in = loss.stand_in
    return Row(
        name=weight.name,
        kind=weight.kind,
        shape=() if stand_in is None else tuple(stand_in.shape),
        num_active=0 if stand_in is None else _num_nonzero(stand_in),
        num_total=0 if stand_in is None else stand_in.numel(),
        note=f"not masked: {loss.story}",
    )


def _new_row(name: str, parameter: Tensor) -> Row:
    return Row(
        name=name,
        kind=type(parameter).__name__,
        shape=tuple(parameter.shape),
        num_active=_num_nonzero(parameter),
        num_total=parameter.numel(),
        reason="came to the model after sparsify()",
    )


def _num_nonzero(x: Tensor) -> int:
    """Counts the non-zeros; all entries count where they are not there to be read, as of a freed FSDP shard."""
    is_there = not x.is_meta and x.untyped_storage().nbytes() >= x.numel() * x.element_size()
    return int(x.count_nonzero()) if is_there else x.numel()

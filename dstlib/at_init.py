"""Masks at initialisation from one look at the model: by a loss, or by what the weights are multiplied by.

Each makes an ``init`` for any method, so that training may go on as static or by moving masks:

>>> import dstlib
>>> from dataclasses import replace
>>> torch.manual_seed(0)  # doctest: +ELLIPSIS
<torch._C.Generator object at ...>
>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
>>> x, y = torch.randn(32, 8), torch.randint(0, 2, (32,))
>>> init = snip(model, lambda: nn.functional.cross_entropy(model(x), y))
>>> sparsifier = dstlib.sparsify(model, sparsity=0.9, method=replace(dstlib.STATIC, init=init))
>>> [int(mask.sum()) for mask in sparsifier.masks.values()]  # of 16·8 + 2·16 entries, a tenth
[4, 12]

SNIP, GraSP and SynFlow order all weights together, and so say how dense each is. Wanda, RIA and SparseGPT, for models
that are trained already, look at what each weight is multiplied by, one after the other; the method's distribution
says how dense each is, in their papers the uniform one:

>>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
>>> one_shot = replace(dstlib.STATIC, init=sparsegpt(model, [x]), distribution=dstlib.uniform)
>>> [int(mask.sum()) for mask in dstlib.sparsify(model, sparsity=0.5, method=one_shot).masks.values()]
[64, 16]
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dstlib.errors import ScoreError, require
from dstlib.inputs import arguments
from dstlib.masking import (
    AtInit,
    Granularity,
    InTurn,
    best_units,
    places,
    prune_by_surgeon,
    relative_shares,
    unit_score,
)
from dstlib.masking.in_turn import Looks
from dstlib.targets import moments_in_turn, unwrap

Loss = Callable[[], Tensor]
Forward = Callable[[Any], object]


def snip(model: nn.Module, loss: Loss, *, rounds: int = 1) -> AtInit:
    """Makes first masks by SNIP: |w · ∂L/∂w|, over all weights together.

    ``loss`` runs the model on a batch and returns the loss. The model's buffers, such as batch statistics, are put
    back afterwards, and no gradient is left behind; what ``loss`` draws, for dropout say, it takes from torch's
    generators.
    With more ``rounds`` the density falls step by step, as in Verdenius et al. 2020 (SNIP-it) and de Jorge et
    al. 2021 (iterative SNIP).

    Raises:
        SettingError: ``rounds`` is no whole number from 1.
        ScoreError: The loss is no finite number, at the time of the call of ``sparsify``.

    Reference: Lee et al. 2019, SNIP: single-shot network pruning, ICLR, equation 5.
    """

    def scores(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        with _as_it_was(model), torch.enable_grad():
            grads = _gradients(_checked(loss(), "SNIP"), parameters)
        return [None if g is None else (w.detach() * g).abs() for w, g in zip(parameters, grads, strict=True)]

    return AtInit("snip", scores, _checked_rounds(rounds))


def grasp(model: nn.Module, loss: Loss) -> AtInit:
    """Makes first masks by GraSP: w · Hg, highest kept, what contributes most to the flow of gradients.

    ``loss`` is as for :func:`snip`, and so are errors. Takes a second derivative: memory as for two backward passes.

    Reference: Wang et al. 2020, Picking winning tickets before training by preserving gradient flow, ICLR,
    equation 8: S = -w · Hg, of which the *highest* are pruned. Deviates: the same loss serves for both
    derivatives, without the temperature of the published code.
    """

    def scores(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        with _as_it_was(model), torch.enable_grad():
            grads = _gradients(_checked(loss(), "GraSP"), parameters, create_graph=True)
            flow = sum(((g * g.detach()).sum() for g in grads if g is not None), torch.zeros(()))
            hg = _gradients(flow, parameters)
        return [None if h is None else w.detach() * h for w, h in zip(parameters, hg, strict=True)]

    return AtInit("grasp", scores)


def synflow(model: nn.Module, *inputs: Tensor, rounds: int = 100) -> AtInit:
    """Makes first masks by SynFlow, which needs no data: w · ∂R/∂w, over all weights together.

    R is the output on ones of the network with all its weights made positive. ``inputs`` are examples of the model's
    arguments, of which only shapes count. Each round removes a share of the weights and looks again, so that no layer
    is cut through. In double precision, as products over many layers overflow a float; in eval mode, so that batch
    norms are linear. Biases and running means count as zero, as in the paper's R: else flow would begin in the middle,
    and layers before it could be cut off.

    Raises:
        SettingError: ``inputs`` are no tensors, or ``rounds`` is no whole number from 1.

    Reference: Tanaka et al. 2020, Pruning neural networks without any data by iteratively conserving synaptic
    flow, NeurIPS, Algorithm 1: 100 rounds.
    """
    bare = unwrap(model)
    are_tensors, given = bool(inputs) and all(isinstance(x, Tensor) for x in inputs), [type(x).__name__ for x in inputs]
    remedy = "Pass what the model takes: synflow(model, torch.empty(1, 3, 32, 32)), say."
    require(are_tensors, "inputs", "synflow()", allowed="tensors", given=given, remedy=remedy)

    def scores(parameters: Sequence[Tensor]) -> list[Tensor | None]:
        positive = {name: _without_offset(name, p.detach()) for name, p in bare.named_parameters()}
        for name, parameter in bare.named_parameters():
            positive[name].requires_grad_(any(parameter is p for p in parameters))
        buffers = dict(bare.named_buffers())
        state = positive | {n: _without_offset(n, b) if b.is_floating_point() else b for n, b in buffers.items()}
        names = {id(p): name for name, p in bare.named_parameters()}
        weights = [positive[names[id(p)]] if id(p) in names else None for p in parameters]
        with _as_it_was(model, training=False), torch.enable_grad():
            ones = tuple(torch.ones_like(x, dtype=torch.float64) for x in inputs)
            output = torch.func.functional_call(bare, state, ones)
            grads = _gradients(_checked(output.sum(), "SynFlow"), weights)
        return [None if w is None or g is None else w.detach() * g for w, g in zip(weights, grads, strict=True)]

    return AtInit("synflow", scores, _checked_rounds(rounds))


def wanda(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None, *, per_output: bool = True
) -> InTurn:
    """Makes first masks by Wanda: |w| · ‖x‖, the norm of each input over all tokens of the batches, within each output.

    ``forward`` runs the model on one of the batches; by default a mapping is passed by name, a tuple by place, anything
    else as the only argument. It is called on all batches, again for each weight, in eval mode and without gradients,
    so that each weight is seen as it is fed once those before it are pruned. ``batches`` can be gone through again and
    again, as a list can, or a loader; an iterator is read into a list. Of several ranks, all take the same batches.
    Scores are compared within each output, over its inputs and kernel taps; ``per_output=False`` compares all of a
    weight with each other, as whole channels always are. The norms of a convolution are those of its patches.

    Raises:
        SettingError: ``batches`` is one tensor or mapping; or there are none, at the time of the call of ``sparsify``.
        ScoreError: A weight is multiplied by nothing that can be seen, at the time of the call of ``sparsify``.

    Reference: Sun et al. 2024, A simple and effective pruning approach for large language models, ICLR, equation 1.
    Deviates: weights are pruned one after the other, where the published code prunes those of a block together, and
    it leaves convolutions out.
    """

    def score(size_PRN: Tensor, norm_P1N: Tensor) -> Tensor:
        return size_PRN * norm_P1N

    return InTurn("wanda", _looks(model, batches, forward, "Wanda"), partial(_prune_by, score, per_output))


def ria(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    power: float = 0.5,
    per_output: bool = False,
) -> InTurn:
    """Makes first masks by RIA: |w|'s share of its output plus that of its input, · ‖x‖^``power``, over each weight.

    All else is as for :func:`wanda`.

    Raises:
        SettingError: ``power`` is no number from 0; or as for :func:`wanda`.
        ScoreError: As for :func:`wanda`.

    Reference: Zhang et al. 2024, Plug-and-play: an efficient post-training pruning method for large language models,
    ICLR, equation 4. Deviates as :func:`wanda`; its permutation of channels is left out.
    """
    fits, remedy = 0 <= power < float("inf"), "0.5 is the paper's; 0 leaves the activations out."
    require(fits, "power", "ria()", allowed="a number, 0 or more", given=power, remedy=remedy)

    def score(size_PRN: Tensor, norm_P1N: Tensor) -> Tensor:
        return relative_shares(size_PRN) * norm_P1N**power

    return InTurn("ria", _looks(model, batches, forward, "RIA"), partial(_prune_by, score, per_output))


def sparsegpt(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    damping: float = 0.01,
    block_size: int = 128,
) -> InTurn:
    """Makes first masks by SparseGPT, and repairs the weights: those that stay make up for those that go.

    A weight with N inputs takes a matrix of N·N, one weight at a time. Each keeps its number of active units exactly,
    at any granularity; masks are chosen in blocks of ``block_size`` columns. ``damping`` is a share of the mean of the
    squared inputs, added to them. Call it before the optimizer's first step: copies that an optimizer keeps of the
    weights are not repaired. All else is as for :func:`wanda`.

    Raises:
        SettingError: A setting is out of range; or as for :func:`wanda`.
        ScoreError: The inputs are not finite; or as for :func:`wanda`. Weights before this one are pruned then.

    Reference: Frantar & Alistarh 2023, SparseGPT: massive language models can be accurately pruned in one-shot, ICML,
    Algorithm 1, with its blocks of 128 columns and damping of 1 %. Deviates as :func:`wanda`, and as
    :func:`dstlib.masking.prune_by_surgeon`.
    """
    remedy = "The paper has 0.01; more makes the repair milder."
    require(
        0 < damping < float("inf"), "damping", "sparsegpt()", allowed="a share above 0", given=damping, remedy=remedy
    )
    fits = type(block_size) is int and block_size >= 1
    remedy = "The paper has 128; a mask in smaller blocks follows the repair more closely."
    require(fits, "block_size", "sparsegpt()", allowed="a whole number from 1", given=block_size, remedy=remedy)
    prune = partial(prune_by_surgeon, damping=damping, block_size=block_size)
    return InTurn("sparsegpt", _looks(model, batches, forward, "SparseGPT", is_full=True), prune)


def _looks(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None, name: str, *, is_full: bool = False
) -> Looks:
    """Returns what goes through the weights in the order of the forward, with the moments of their inputs."""
    # one batch can be gone through as well: by its rows, or by its keys
    is_one, given, remedy = isinstance(batches, Tensor | Mapping), type(batches).__name__, "Of one batch x, pass [x]."
    require(
        not is_one, "batches", f"{name.lower()}()", allowed="a list of batches, or a loader", given=given, remedy=remedy
    )

    def run_on(batch: Any) -> None:
        if forward is not None:
            forward(batch)
        else:
            args, kwargs = arguments(batch)
            model(*args, **kwargs)

    def looks(weights: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Mapping[str, Tensor | None]]]:
        where = f"{name} at initialisation"
        again = tuple(batches) if isinstance(batches, Iterator) else batches

        def run() -> None:
            is_empty = True
            with _as_it_was(model, training=False), torch.no_grad():
                for batch in again:
                    run_on(batch)
                    is_empty = False
            remedy = "Pass some of the data: [x], say, or a list of what forward= takes."
            require(not is_empty, "batches", where, allowed="at least one", given="none", remedy=remedy)

        yield from moments_in_turn(run, weights, is_full=is_full, where=where)

    return looks


def _prune_by(
    score: Callable[[Tensor, Tensor], Tensor],
    per_output: bool,
    weight: Tensor,
    squares: Tensor,
    granularity: Granularity,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    """Keeps the best units by a score of sizes (P, R, N) and norms (P, 1, N), and leaves the weights as they are."""
    size_PRN = weight.abs().to(squares.dtype).reshape(len(squares), -1, squares.shape[1])
    found = score(size_PRN, squares.sqrt()[:, None]).view(weight.shape)
    if per_output:
        place = places(found)
        place_GU = unit_score(place, place.shape, granularity)
        # units that hold whole outputs have nothing to be compared with within one: all have the same mean place
        found = place if float(place_GU.max() - place_GU.min()) > 1e-5 else found
    return best_units(found, granularity, num_kept), weight


def _without_offset(name: str, x: Tensor) -> Tensor:
    return torch.zeros_like(x).double() if name.endswith(("bias", "running_mean")) else x.abs().double()


@contextmanager
def _as_it_was(model: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Puts buffers and modes back at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _gradients(
    value: Tensor, tensors: Sequence[Tensor | None], *, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Differentiates a value by tensors; None for each that it does not depend on."""
    known = [x for x in tensors if x is not None]
    if not value.requires_grad or not known:
        return [None] * len(tensors)
    found = iter(torch.autograd.grad(value, known, create_graph=create_graph, allow_unused=True))
    return [None if x is None else next(found) for x in tensors]


def _checked(loss: object, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss)):
        given = f"a tensor of shape {tuple(loss.shape)}: {loss.detach()}" if isinstance(loss, Tensor) else repr(loss)
        where, remedy = f"{name} at initialisation", "Return one finite number that depends on the weights."
        raise ScoreError.of("loss", where, allowed="a number", given=given, remedy=remedy)
    return loss


def _checked_rounds(rounds: int) -> int:
    allowed, remedy = "a whole number from 1", "1 looks once; SynFlow takes 100."
    require(type(rounds) is int and rounds >= 1, "rounds", "AtInit", allowed=allowed, given=rounds, remedy=remedy)
    return rounds

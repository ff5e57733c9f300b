"""Operators: what is to be computed as a value, tensors, and the ways to compute it; recorded by whoever asks to.

The value of a map with a norm is, for autograd, what its readers see: gradients are those of the activated map. Those
handed on lie in the order in which what they belong to lies: a few of torch's own gradients misread others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Generic, Self, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dstlib.engine.runtime.library import Kernels, kernels
from dstlib.errors import InputError

_PLAIN = (Tensor, nn.Parameter, type(None))


@dataclass(frozen=True)
class Problem:
    """What an operation is told besides tensors, and which tensors there are; hashable.

    Fields are whole numbers, floats, flags, or tuples of one of these. Sizes of tensors are not among them: a compiler
    may leave those open.

    >>> @dataclass(frozen=True)
    ... class Scaling(Problem):
    ...     factors: tuple[float, ...]
    ...     twice: bool = False
    >>> Scaling((0.5, 2.0)).packed(), Scaling.unpacked([2.0, 2.0, 0.5, 2.0, 0.0])
    ([2.0, 2.0, 0.5, 2.0, 0.0], Scaling(factors=(0.5, 2.0), twice=False))
    """

    @property
    def is_read_later(self) -> bool:
        """Whether the first tensor that is made is not yet what its readers see."""
        return False

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuses tensors whose memory must not be touched, since they do not fit together.

        Raises:
            InputError: They do not.
        """

    def in_one_type(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the tensors in the type in which the operation computes under autocast."""
        return tensors

    def packed(self) -> list[float]:
        """Returns the number of fields and the fields as numbers, as ``torch.library`` takes them."""
        numbers = [float(len(fields(self)))]  # its gradients take no empty list
        for field in fields(self):
            value = getattr(self, field.name)
            numbers += [float(len(value)), *map(float, value)] if isinstance(value, tuple) else [float(value)]
        return numbers

    @classmethod
    def unpacked(cls, numbers: Sequence[float]) -> Self:
        """Returns the problem that was :meth:`packed`."""
        rest, values = iter(numbers[1:]), []
        for kind, is_tuple in _kinds(cls):  # type: ignore[arg-type]  # a class is hashable
            values.append(tuple(kind(next(rest)) for _ in range(int(next(rest)))) if is_tuple else kind(next(rest)))
        return cls(*values)


@cache
def _kinds(problem: type[Problem]) -> list[tuple[type, bool]]:
    """Returns the type of each field, or of the items of a tuple, and whether it is a tuple."""
    hints = get_type_hints(problem)
    found = [hints[field.name] for field in fields(problem)]
    return [(hint, False) if isinstance(hint, type) else (hint.__args__[0], True) for hint in found]


P = TypeVar("P", bound=Problem)
Item = TypeVar("Item")
Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Implementation(Generic[P]):
    """One way to compute an operation, and for which problems and tensors it can; ``run`` returns new tensors.

    ``prepare``, where there is one, returns the call of a kernel that does the same for other maps of the same layouts,
    see :mod:`dstlib.engine.ops.prepared`.
    """

    name: str
    accepts: Callable[[P, Tensors], bool]
    run: Callable[[P, Tensors], list[Tensor]]
    prepare: Callable[[P, Tensors], Any] | None = None


def by_kernel(
    name: str,
    run: Callable[[Kernels, P, Tensors], list[Tensor]],
    accepts: Callable[[P, Tensors], bool] = lambda problem, tensors: True,
    reads: Callable[[P, Tensors], Tensors] = lambda problem, tensors: tensors,
) -> Implementation[P]:
    """Returns the implementation by a kernel, for tensors that kernels can read where ``accepts`` agrees.

    ``reads`` chooses those that have to be of float32: all, by default.
    """

    def accepted(problem: P, tensors: Tensors) -> bool:
        return kernels_for(*reads(problem, tensors)) is not None and accepts(problem, tensors)

    def called(problem: P, tensors: Tensors) -> list[Tensor]:
        return run(present_kernels(), problem, tensors)

    return Implementation(name, accepted, called)


def by_torch(run: Callable[[P, Tensors], list[Tensor]]) -> Implementation[P]:
    """Returns the implementation that computes with torch alone, and accepts everything."""
    return Implementation("torch", lambda problem, tensors: True, run)


class Operator(Generic[P]):
    """An operation on tensors that autograd and torch's compilers know as ``dstlib::name``, called directly if it can.

    Torch's dispatcher takes longer than a small map. So where nobody records, the first implementation that accepts is
    called as it is, and where autograd alone does, as a function of it; only compilers and tensors without values go
    through ``torch.library``, whose registered gradients take 0.1 ms a call.

    ``fake`` takes a problem and tensors as an implementation does, and makes empty tensors alike. ``keep`` says, of
    problem, tensors and outputs, which tensors the gradients need. ``backward`` makes of problem, these, the gradients
    of the outputs and which gradients are wanted those of the tensors, None for one that has none, and nothing for the
    last ones that have none; it is made of operators itself. What is kept is a list that it may take from: what is no
    longer in it goes, unless the graph is kept.

    ``plain`` computes with torch alone what readers of the first output see, for whoever follows each of torch's
    operations: ``torch.func``, derivatives in forward mode, and gradients of gradients. Then what is kept ends with all
    tensors, or nothing is kept and ``backward`` is made of what can be differentiated. Without it, these are refused.

    >>> double = Operator(
    ...     "doctest_double", Problem, (by_torch(lambda problem, tensors: [2 * x for x in tensors]),),
    ...     fake=lambda problem, tensors: [torch.empty_like(x) for x in tensors],
    ...     backward=lambda problem, kept, grads, wanted: [2 * grad for grad in grads],
    ... )
    >>> x = torch.ones(1, requires_grad=True)
    >>> double(Problem(), [x])[0].backward()
    >>> x.grad
    tensor([2.])
    """

    def __init__(
        self,
        name: str,
        problem: type[P],
        implementations: Sequence[Implementation[P]],
        fake: Callable[[P, Tensors], list[Tensor]],
        backward: Callable[[P, list[Tensor], Tensors, Sequence[bool]], Sequence[Tensor | None]] | None = None,
        keep: Callable[[P, Tensors, Tensors], list[Tensor]] = lambda problem, tensors, outputs: [],
        plain: Callable[[P, Tensors], Tensor] | None = None,
    ) -> None:
        self.name, self.implementations = name, tuple(implementations)
        self.backward, self.keep, self.plain = backward, keep, plain
        unpacked = problem.unpacked
        definition = torch.library.custom_op(
            f"dstlib::{name}",
            lambda tensors, problem: self.compute(unpacked(problem), [x.as_subclass(Tensor) for x in tensors]),
            mutates_args=(),
            schema="(Tensor[] tensors, float[] problem) -> Tensor[]",
        )
        definition.register_fake(lambda tensors, problem: self._fake(fake, unpacked(problem), tensors))
        self.registered = getattr(torch.ops.dstlib, name)
        if backward:
            definition.register_autograd(self._backward, setup_context=self._keep)
        self._unpacked = unpacked

    def __call__(self, problem: P, tensors: Tensors) -> Sequence[Tensor]:
        x = tensors[0]
        if (x.is_cpu or x.is_cuda) and torch.is_autocast_enabled(kind := x.device.type):
            with torch.autocast(kind, enabled=False):
                return self(problem, problem.in_one_type(tensors))
        if not is_recorded(*tensors):
            return self.compute(problem, tensors)
        if torch.compiler.is_compiling() or any(type(x) not in _PLAIN for x in tensors):  # stands in for a compiler
            outputs: Sequence[Tensor] = self.registered(list(tensors), problem.packed())
            return outputs
        if is_followed():
            if self.plain is None:
                raise self._refusal("torch.func and derivatives in forward mode")
            self._check(problem, tensors)
            return [self.plain(problem, tensors)]
        if self.backward is None:
            raise self._refusal("gradients of gradients")
        recorded: Sequence[Tensor] = _Recorded.apply(self, problem, *tensors)
        return recorded

    def compute(self, problem: P, tensors: Tensors) -> list[Tensor]:
        """Computes with the first implementation that accepts; nobody records it.

        Raises:
            InputError: The tensors do not fit together.
        """
        return self.choose(problem, tensors).run(problem, tensors)

    def choose(self, problem: P, tensors: Tensors) -> Implementation[P]:
        """Returns the first implementation that accepts: every way to memory leads through here.

        What the backward directions are given is what the forward one was, and a gradient that autograd has looked at.

        Raises:
            InputError: The tensors do not fit together.
        """
        self._check(problem, tensors)
        return next(each for each in self.implementations if each.accepts(problem, tensors))

    def prepare(self, problem: P, tensors: Tensors) -> Any:
        """Returns a prepared call of the first implementation that accepts, None if it has no kernel."""
        prepare = self.choose(problem, tensors).prepare
        return prepare and prepare(problem, tensors)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.problem = inputs[0], self._unpacked(inputs[1])
        ctx.save_for_backward(*self.keep(ctx.problem, tensors, output))

    def _backward(self, ctx: Any, grads: list[Tensor]) -> tuple[Any, None]:
        return self.gradients(ctx, grads, ctx.needs_input_grad[0]), None

    def gradients(self, ctx: Any, grads: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Computes the gradient of each tensor, None for one that has none."""
        assert self.backward is not None
        kept = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept: else they would live until all is computed
        if torch.is_grad_enabled() and self.plain is not None and kept:
            return self._graded_again(ctx.problem, kept[len(kept) - len(wanted) :], grads[0], wanted)
        found = self.backward(ctx.problem, kept, grads, wanted)
        return [*found, *[None] * (len(wanted) - len(found))]

    def _graded_again(self, problem: P, tensors: Tensors, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Computes the gradients by torch's operations, which autograd differentiates as often as anyone likes."""
        # seen anew, since one tensor may have been made of another
        tensors = [x.view_as(x) if wants else x for x, wants in zip(tensors, wanted, strict=True)]
        assert self.plain is not None
        asked = [x for x, wants in zip(tensors, wanted, strict=True) if wants]
        y = self.plain(problem, tensors)
        found = iter(torch.autograd.grad(y, asked, grad, create_graph=True, materialize_grads=True))
        return [next(found) if wants else None for wants in wanted]

    def _fake(self, fake: Callable[[P, Tensors], list[Tensor]], problem: P, tensors: Tensors) -> list[Tensor]:
        self._check(problem, tensors)
        return fake(problem, tensors)

    def _check(self, problem: P, tensors: Tensors) -> None:
        if self.backward is not None:
            problem.check(tensors)

    def _refusal(self, given: str) -> InputError:
        remedy = "Ask the plain model for these."
        return InputError.of("derivative", f"{self.name}()", allowed="gradients, once", given=given, remedy=remedy)


class _Recorded(torch.autograd.Function):
    """Any operator, for autograd.

    Both as one ``forward``: apart, as ``setup_context``, torch would look at their signatures in every call.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator[Any], problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs, and of one that is read later what stands for it until its values are written."""
        outputs = operator.compute(problem, tensors)
        ctx.operator, ctx.problem = operator, problem
        ctx.strides = [
            x.stride() if wants and not isinstance(x.grad_fn, _Recorded._backward_cls) else None
            for x, wants in zip(tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.save_for_backward(*operator.keep(problem, tensors, outputs))
        return (*outputs, stand_in(outputs[0].shape, outputs[0].dtype)) if problem.is_read_later else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * (2 + len(ctx.strides))
        found = ctx.operator.gradients(ctx, [sum(given[1:], given[0])], ctx.needs_input_grad[2:])
        return None, None, *map(_in_order, found, ctx.strides)


def placed(
    x: Tensor, size: Sequence[int] | None = None, strides: Sequence[int] | None = None, first: int = 0
) -> Tensor:
    """Returns another tensor on the memory of x, like x unless said otherwise, and no view of it to autograd.

    Views that are made inside of a function of autograd, or without gradients, cannot be changed in place later.

    >>> x = torch.zeros(2)
    >>> y = placed(x).fill_(1)
    >>> x, y._is_view()
    (tensor([1., 1.]), False)
    """
    place = x.storage_offset() + first
    size, strides = x.shape if size is None else size, x.stride() if strides is None else strides
    return x.new_empty(0).set_(x.untyped_storage(), place, size, strides)


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a tensor as autocast does: not to double precision, nor from it, which torch does not mix with others.

    >>> in_type(torch.zeros(1, dtype=torch.bfloat16), torch.float32).dtype
    torch.float32
    >>> in_type(torch.zeros(1, dtype=torch.float64), torch.float32).dtype
    torch.float64
    """
    return x if torch.float64 in (x.dtype, dtype) else x.to(dtype)


def stand_in(size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a tensor for values that are yet to be written: until then its memory is one NaN, read everywhere.

    >>> stand_in((1, 2))
    tensor([[nan, nan]])
    """
    return _nan(dtype).data.as_strided_(tuple(size), (0,) * len(size))  # itself, no view


@cache
def _nan(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # whoever asks first: it stands in for what is trained, too
        return torch.full((1,), torch.nan, dtype=dtype, device="cpu")


def _in_order(grad: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    """Returns a gradient whose axes lie in memory in the order of these strides; operators here read any order.

    A few of torch's own gradients misread another one.
    """
    if grad is None or strides is None or (own := grad.stride()) == strides:
        return grad
    if own[1:] == strides[1:] and grad.shape[0] == 1:
        return grad
    order = sorted((axis for axis, extent in enumerate(grad.shape) if extent > 1), key=strides.__getitem__)
    if order == sorted(order, key=own.__getitem__):
        return grad
    axes = [axis for axis in range(grad.ndim) if axis not in order] + order[::-1]
    return grad.permute(axes).contiguous().permute([axes.index(axis) for axis in range(grad.ndim)])


def is_recorded(*tensors: Tensor | None) -> bool:
    """Tells whether autograd, a compiler, or a tensor of another kind than torch's records what becomes of tensors.

    >>> x = torch.ones(1, requires_grad=True)
    >>> is_recorded(x), is_recorded(x.detach())
    (True, False)
    """
    if torch.compiler.is_dynamo_compiling():  # other compilers' tensors are of other types
        return True
    records = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for x in tensors:  # a loop: this is asked before each call of a kernel
        if type(x) not in _PLAIN or (records and x is not None and x.requires_grad):
            return True
    return is_followed()


def is_followed() -> bool:
    """Tells whether ``torch.func`` or a derivative in forward mode follows each operation."""
    followed: bool = torch._C._are_functorch_transforms_active()
    return followed or forward_ad._current_level >= 0


def present_kernels() -> Kernels:
    """Returns the kernels, which there are: an implementation by them has accepted."""
    found = kernels()
    assert found is not None, "implementations by kernels accept nothing without them"
    return found


def groups(given: Sequence[Item], *sizes: int) -> list[Sequence[Item]]:
    """Cuts tensors, or what there is of each, into groups of these sizes; the last is what is left.

    >>> groups([1, 2, 3, 4], 1, 0, 2)
    [[1], [], [2, 3], [4]]
    """
    return [given[begin:end] for begin, end in pairwise((*accumulate(sizes, initial=0), len(given)))]


def kernels_for(*tensors: Tensor | None) -> Kernels | None:
    """Returns the kernels, where there are any and they can read these tensors; None where torch has to do.

    That is for another type, another device, what is negated when it is read, and where there is nothing to compute.

    >>> kernels_for(torch.zeros(1, dtype=torch.float64)) is None
    True
    """
    found = kernels()
    given = [x for x in tensors if x is not None]
    return found if all(map(is_readable, given)) else None


def is_readable(x: Tensor) -> bool:
    """Tells whether a kernel can read the numbers of a tensor.

    >>> is_readable(torch.zeros(2)), is_readable(torch.zeros(2, dtype=torch.complex64).conj().imag)
    (True, False)
    """
    return x.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and not x.is_neg()

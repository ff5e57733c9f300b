"""The end of a backward pass: the one moment at which gradients are complete and no trainer has clipped them yet."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import Variable


class AfterBackward:
    """Calls a function at the end of each backward pass that is wanted, once per pass.

    All gradients of these parameters are accumulated by then, and DistributedDataParallel has reduced them.
    ``is_wanted`` is asked when the first of the gradients arrives. An error of the function leaves ``backward()``.

    >>> weight = nn.Parameter(torch.tensor(2.0))
    >>> after = AfterBackward([weight], is_wanted=lambda: True, call=lambda: print(weight.grad))
    >>> (weight.square() + weight).backward()
    tensor(5.)
    >>> after.remove()
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, is_wanted: Callable[[], bool], call: Callable[[], None]
    ) -> None:
        self._is_wanted = is_wanted
        self._call = call
        self._pass: int | None = None  # the latest that was wanted
        self._handles = [p.register_post_accumulate_grad_hook(self._wait) for p in parameters if p.requires_grad]

    def remove(self) -> None:
        """Calls no more."""
        for handle in self._handles:
            handle.remove()

    def _wait(self, parameter: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass and self._is_wanted():
            self._pass = current
            _at_end_of_pass(self._defer)

    def _defer(self) -> None:
        """Waits for what the pass itself has queued: DistributedDataParallel writes what it has reduced."""
        _at_end_of_pass(self._call)


def _at_end_of_pass(call: Callable[[], None]) -> None:
    Variable._execution_engine.queue_callback(call)  # runs after those that were queued before it

"""A law that was broken, in words, and a world in which global state is known."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import numpy as np
import torch

from dstlib.errors import explain

T = TypeVar("T")


class LawError(AssertionError):
    """A law that every part of its kind keeps was broken; ``law`` is its name.

    >>> error = broken("finite", "criterion mine", on="a matrix", expected="numbers", got="NaN", remedy="Clamp.")
    >>> error.law, str(error)
    ('finite', "law 'finite' of criterion mine, on a matrix: expected numbers, got NaN. Clamp.")
    """

    def __init__(self, law: str, message: str) -> None:
        super().__init__(law, message)
        self.law = law

    def __str__(self) -> str:
        return str(self.args[1])


def broken(law: str, subject: str, *, on: str, expected: str, got: object, remedy: str) -> LawError:
    """Which law, of what, on which input, what should have come and what came, and what to do."""
    message = explain(f"law {law!r}", f"{subject}, on {on}", allowed=expected, given=got, remedy=remedy)
    return LawError(law, message)


def attempt(call: Callable[[], T], law: str, subject: str, *, on: str, expected: str, remedy: str) -> T:
    """The outcome of a call that must not raise."""
    try:
        return call()
    except LawError:
        raise
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
        raise broken(law, subject, on=on, expected=expected, got=got, remedy=remedy) from error


def named(kind: str, thing: object) -> str:
    """How messages call what is checked: a function by its name, a value by its repr.

    >>> named("curve", len), named("granularity", 3)
    ('curve len', 'granularity 3')
    """
    return f"{kind} {getattr(thing, '__name__', repr(thing))}"


@contextmanager
def world(seed: int) -> Iterator[None]:
    """Inside, the device is the CPU, with one thread, and the global generators start from a seed; all is put back."""
    numpy_state, python_state, num_threads = np.random.get_state(), random.getstate(), torch.get_num_threads()
    is_on_cpu = torch.get_default_device().type == "cpu"  # naming a device costs a call for each operation
    with torch.random.fork_rng(devices=[]), nullcontext() if is_on_cpu else torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        torch.set_num_threads(1)  # what is checked here is small: threads would only wait for each other
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            torch.set_num_threads(num_threads)


def global_state() -> tuple[object, ...]:
    """Where the three global generators stand; comparable."""
    _, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), np.asarray(keys).tobytes(), *rest, random.getstate()

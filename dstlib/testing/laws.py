"""Laws: functions that hold a value to one rule each, and a world in which global state is known."""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from unittest import SkipTest

import numpy as np
import torch

from dstlib.errors import DstlibError

T = TypeVar("T")


class LawError(AssertionError):
    """A law that every part of its kind keeps was broken; ``law`` is its name."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(law, message)
        self.law = law

    def __str__(self) -> str:
        return str(self.args[1])


class BreachError(Exception):
    """What a law found to be wrong: on which input, what should have come and what came, and what to do.

    ``law`` is the law that is broken, where that is another one, on which the one that looked relies.
    """

    def __init__(self, *, on: object, expected: str, got: object, remedy: str, law: str = "") -> None:
        super().__init__(on, expected, got, remedy)
        self.law, self.on, self.expected, self.got, self.remedy = law, on, expected, got, remedy


@dataclass(frozen=True)
class Law:
    """One law of one value, to be called; ``str(law)`` names both.

    Raises:
        LawError: The value breaks the law.
        unittest.SkipTest: It breaks another law, without which this one cannot be judged; pytest skips it then.

    >>> def finite(number: float) -> None:
    ...     if number != number:
    ...         raise BreachError(on="itself", expected="a number", got="NaN", remedy="Clamp.")
    >>> (law,) = laws("score", "mine", [finite], float("nan"))
    >>> str(law)
    "score 'mine': finite"
    >>> law()
    Traceback (most recent call last):
    dstlib.testing.laws.LawError: law 'finite' of score 'mine', on itself: expected a number, got NaN. Clamp.
    """

    name: str
    subject: str
    hold: Callable[[], None]

    def __call__(self) -> None:
        try:
            self.hold()
        except BreachError as b:
            if b.law not in ("", self.name):
                raise SkipTest(f"cannot be judged while law {b.law!r} is broken") from b
            law, where = f"law {self.name!r}", f"{self.subject}, on {b.on}"
            message = DstlibError.of(law, where, allowed=b.expected, given=b.got, remedy=b.remedy)
            raise LawError(self.name, str(message)) from b.__cause__

    def __str__(self) -> str:
        return f"{re.sub(r' at 0x[0-9a-f]+', '', self.subject)}: {self.name}"  # alike in all processes of a test run


def laws(kind: str, thing: object, rules: Iterable[Callable[[T], None]], given: T) -> tuple[Law, ...]:
    """Makes laws of functions, by their names; each is called with ``given``.

    Messages call the thing by its own name or, where it has none, by its repr.
    """
    subject = f"{kind} {getattr(thing, '__name__', repr(thing))}"
    return tuple(Law(rule.__name__.strip("_").replace("_", " "), subject, partial(rule, given)) for rule in rules)


def hold(laws: Iterable[Law]) -> None:
    """Calls laws in order, until one is broken."""
    for law in laws:
        law()


def attempt(call: Callable[[], T], *, on: object, expected: str, remedy: str, law: str = "") -> T:
    """Returns the outcome of a call that must not raise.

    Raises:
        BreachError: It raised.
    """
    try:
        return call()
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
        raise BreachError(on=on, expected=expected, got=got, remedy=remedy, law=law) from error


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

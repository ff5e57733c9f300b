"""Laws: functions that hold a value to one rule each, and a world in which global state is known."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from unittest import SkipTest

import numpy as np
import torch

from dstlib.errors import DstlibError

T = TypeVar("T")
Rules = Mapping[Callable[[T, Any], None], Callable[[T], Iterable[Any]]]  # a law → the inputs it is tried on


class LawError(AssertionError):
    """A law that every part of its kind keeps was broken; ``law`` is its name."""

    def __init__(self, law: str, message: str) -> None:
        super().__init__(law, message)
        self.law = law

    def __str__(self) -> str:
        return str(self.args[1])


class BreachError(Exception):
    """What a law found to be wrong: what should have come and what came, and what to do.

    ``on`` is the input, where that is another one than the law was called with; ``law`` is the law that is broken,
    where that is another one, on which the one that looked relies.
    """

    def __init__(self, expected: str, *, got: object, remedy: str, law: str = "", on: str = "") -> None:
        super().__init__(expected, got, remedy)
        self.expected, self.got, self.remedy, self.law, self.on = expected, got, remedy, law, on


def expect(holds: object, expected: str, *, got: object, remedy: str, law: str = "", on: str = "") -> None:
    """Checks a condition that a law sets.

    Raises:
        BreachError: It does not hold.
    """
    if not holds:
        raise BreachError(expected, got=got, remedy=remedy, law=law, on=on)


@dataclass(frozen=True)
class Law:
    """One law of one value, to be called; ``str(law)`` names both.

    Raises:
        LawError: The value breaks the law.
        unittest.SkipTest: It breaks another law, without which this one cannot be judged; pytest skips it then.

    >>> def finite(score: Callable[[int], float], x: int) -> None:
    ...     expect(score(x) == score(x), "a number", got="NaN", remedy="Clamp.")
    >>> (law,) = laws("score", "mine", {finite: lambda _: (0, 1)}, lambda x: x * float("inf"))
    >>> str(law)
    "score 'mine': finite"
    >>> law()
    Traceback (most recent call last):
    dstlib.testing.laws.LawError: law 'finite' of score 'mine', on 0: expected a number, got NaN. Clamp.
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


def laws(kind: str, thing: object, rules: Rules[T], given: T, *, on: Callable[[Any], str] = str) -> tuple[Law, ...]:
    """Makes laws of functions, by their names.

    Each is called with ``given`` and one of its inputs after the other, in a world of seed 0; ``on`` puts an input into
    words. Messages call the thing by its own name or, where it has none, by its repr.
    """
    subject = f"{kind} {getattr(thing, '__name__', repr(thing))}"

    def try_each(rule: Callable[[T, Any], None], inputs: Callable[[T], Iterable[Any]]) -> None:
        with world(0):
            for x in inputs(given):
                try:
                    rule(given, x)
                except BreachError as breach:
                    breach.on = breach.on or on(x)
                    raise

    return tuple(
        Law(rule.__name__.strip("_").replace("_", " "), subject, partial(try_each, rule, inputs))
        for rule, inputs in rules.items()
    )


def hold(laws: Iterable[Law]) -> None:
    """Calls laws in order, until one is broken."""
    for law in laws:
        law()


def attempt(call: Callable[[], T], expected: str, *, remedy: str, law: str = "", on: str = "") -> T:
    """Returns the outcome of a call that must not raise.

    Raises:
        BreachError: It raised.
    """
    try:
        return call()
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
        raise BreachError(expected, got=got, remedy=remedy, law=law, on=on) from error


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

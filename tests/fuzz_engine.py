"""Random networks and random lives of them on the engine, beside plain torch. usage: fuzz_engine.py [options]

``--networks 5000 --lives 2000 --seed 0`` runs so many, from this seed on, in processes of their own, and goes on after
each fault. A network is a life of two events: a step of training, and an evaluation. ``--life SEED`` or
``--network SEED`` lives one, and says what happens; with ``--shrink`` it looks for the smallest that shows the fault.
``DSTLIB_ENGINE=generic``, or ``torch``, chooses other kernels. Layers are drawn from ``fuzz/makers.py``, events from
``fuzz/events.py``; ``fuzz/worlds.py`` compares.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from fuzz.events import ALL, EVENTS
from fuzz.worlds import Case, FaultError, begin, live

from dstlib.engine import info

PASSES = ("train", "evaluate")
CHUNK = 250  # cases of a process
SHARES = (1e-5, -1e-5)
# threads that wait do not spin: on a busy machine they took half of the time
PATIENT = {"OMP_WAIT_POLICY": "passive", **os.environ}


@dataclass(frozen=True)
class Draws:
    """What cases are drawn from: networks or lives, these events, all makers but some."""

    kind: str
    events: Sequence[str]
    without: Sequence[str] = ()

    def case(self, seed: int) -> Case:
        """Returns the case of a seed."""
        return draw(self.kind, Random(f"{self.kind} {seed}"), self.events, self.without)


def draw(kind: str, r: Random, events: Sequence[str], without: Sequence[str] = ()) -> Case:
    """Draws a life, or a network, whose life is of two events."""
    if kind == "life":
        return Case.draw(r, events, r.randint(6, 12), without)
    case = Case.draw(r, PASSES, 0, without)
    return replace(case, events=tuple((name, r.randrange(2**31)) for name in PASSES))


def tried(case: Case) -> tuple[list[str], str | None]:
    """Lives a case, and returns what each event came to, and the fault, if there is one."""
    outcomes: list[str] = []
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes.extend(live(case, ALL))  # keeps what came before an error
    except FaultError as fault:
        return outcomes, str(fault)
    except Exception as error:  # what is no kind of torch's errors
        where = traceback.extract_tb(error.__traceback__)[-1]
        number = len(outcomes) - 1
        name = case.events[number][0] if 0 <= number < len(case.events) else "the beginning"
        return outcomes, f"event {number}, {name}: raises {error!r} ({where.filename}:{where.lineno})"
    finally:
        torch.set_num_threads(threads)
    return outcomes, None


def is_ill_conditioned(case: Case, fault: str) -> bool:
    """Tells whether float64 is off by as much, once its layers are off by 1e-5 of their largest.

    By so much a layer's output on the engine may differ from the plain one's. It is not enough in most networks, but in
    those that divide by a small variance, or stand on the kink of a ReLU or a tie of a pool.
    """
    if not re.match(r"event (\d+), .*: (off by|another mask)", fault):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            list(live(case, ALL, SHARES))
    except Exception:  # the same, or another that came behind it
        return False
    return True


def work(draws: Draws, first: int, number: int) -> None:
    """Lives cases in this process, and prints a line of JSON before and after each."""
    for seed in range(first, first + number):
        print(json.dumps({"begun": seed}), flush=True)
        case = draws.case(seed)
        outcomes, fault = tried(case)
        ill = fault is not None and is_ill_conditioned(case, fault)
        print(json.dumps({"seed": seed, "outcomes": outcomes, "fault": fault, "ill": ill}), flush=True)


def lived(draws: Draws, first: int, number: int) -> Iterator[dict[str, Any]]:
    """Yields what became of cases; it is a fault, too, where the process ended."""
    seed = first
    while seed < first + number:
        count = min(CHUNK, first + number - seed)
        command = [sys.executable, __file__, "--work", draws.kind, str(seed), str(count)]
        command += ["--only", *draws.events, "--without", *draws.without]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PATIENT
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            begun = None
            for line in process.stdout:
                message = json.loads(line) if line.startswith("{") else {}
                begun = message.get("begun", begun)
                if "outcomes" in message:
                    begun, seed = None, message["seed"] + 1
                    yield message
            errors = process.stderr.read()[-300:]
        if process.returncode:
            fault = f"the process ended: {process.returncode} {errors}"
            yield {"seed": seed if begun is None else begun, "outcomes": [], "fault": fault, "ill": False}
            seed = (seed if begun is None else begun) + 1


def tried_apart(case: Case) -> str | None:
    """Lives a case in a process of its own, and returns the fault, which may be that the process ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(write, (tried(case)[1] or "").encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return f"the process ended: {status}" if status else text or None


def shrunk(case: Case, fault: str) -> Case:
    """Returns the smallest case found, by leaving out events and layers, that shows a fault of the same wording."""

    def kind(text: str | None) -> str:
        _, _, what = (text or "").partition(":")
        return "".join(c for c in what if c.isalpha())[:24] or str(text)

    again = True
    while again:
        again = False
        for part in ("events", "steps"):
            items = getattr(case, part)
            for size in (8, 4, 2, 1):
                for index in range(len(items) - size, -1, -size):
                    fewer = replace(case, **{part: items[:index] + items[index + size :]})
                    if kind(tried_apart(fewer)) == kind(fault):
                        case, items, again = fewer, getattr(fewer, part), True
    return case


def one(draws: Draws, seed: int, shrink: bool) -> None:
    """Lives one case, and says what happens."""
    case = draws.case(seed)
    fault = tried_apart(case)
    if fault and shrink:
        case = shrunk(case, fault)
    print(case)
    with suppress(Exception):  # it may be the beginning that fails
        world = begin(case)[1]
        print(world.model, world.shapes[0], flush=True)
    outcomes, fault = tried(case)
    print("\n".join(outcomes))
    print("fault:", fault, "(ill-conditioned)" if fault and is_ill_conditioned(case, fault) else "")


PLURAL = {"network": "networks", "life": "lives"}


def many(draws: Draws, first: int, number: int) -> int:
    """Lives so many cases, prints each fault and now and then the counts, and returns the number of faults."""
    began, faults, counts = time.time(), 0, Counter[str]()
    for index, message in enumerate(lived(draws, first, number), 1):
        for outcome in message["outcomes"]:
            fast, _, rest = outcome.partition(" ")
            if rest.startswith("layers"):
                counts["layers on the engine"] += int(fast)
            else:
                counts.update(("events", outcome.rpartition(": ")[2]))
        if message["ill"]:
            counts["ill-conditioned"] += 1
        elif message["fault"]:
            faults += 1
            print(f"{draws.kind} {message['seed']}: {message['fault'][:400]}", flush=True)
        if index % 100 == 0 or index == number:
            seconds = time.time() - began
            print(f"{index} {PLURAL[draws.kind]}, {faults} faults, {seconds:.0f} s, {dict(counts)}", flush=True)
    return faults


def main() -> int:
    """Runs what the command line asks for; 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", type=int, default=0)
    parser.add_argument("--lives", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--slow", action="store_true", help="with events that take seconds: torch.compile")
    parser.add_argument("--only", nargs="+", help="events to draw from")
    parser.add_argument("--without", nargs="*", default=(), help="events and layers not to draw")
    parser.add_argument("--life", type=int)
    parser.add_argument("--network", type=int)
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    drawn = given.only or (ALL if given.slow else EVENTS)
    events = [name for name in drawn if name not in given.without]
    if given.work:
        kind, first, number = given.work
        work(Draws(kind, events, given.without), int(first), int(number))
        return 0
    for kind in ("life", "network"):
        if getattr(given, kind) is not None:
            one(Draws(kind, events, given.without), getattr(given, kind), given.shrink)
            return 0
    print(info(), "torch", torch.__version__, flush=True)
    wanted = {"network": given.networks, "life": given.lives}
    faults = sum(many(Draws(kind, events, given.without), given.seed, number) for kind, number in wanted.items())
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())

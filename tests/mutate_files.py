"""Changes files of every format that the project reads, and judges what comes of it.

    python tests/mutate_files.py --mutations 5000 --seed 0     # a table, and each fault with the command that shows it
    python tests/mutate_files.py --format model.pt --number 17 # one of them, in full

A mutated file is refused in our words; or it is read as if nothing had happened, to the bit; or it is made anew, if
it was made from others. Of a file that someone changed so that it is a valid one (``craft``), another value may come,
if it keeps the laws of the format. Everything else is a fault:

- silent: another value was used, or one that breaks a law;
- raw: another exception than ours, a signal, a time or a memory that has no bound, control characters on the screen;
- outside: something was written where the reader has nothing to write.

Each file is read in a process of its own, under limits.
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from file_formats import FORMATS, Format, prepare
from mutations import ROOT

from dstlib.errors import DstlibError

SECONDS = 20, 600  # for one file, of a processor and of the clock; a tenth is usual
MEGABYTES = 256  # that reading a file of some kilobytes may take
ADDRESSES = 2**31  # bytes that it may ask for: what cannot be had is an error at once
_LATE = ("SIGALRM", "SIGXCPU")
GOOD, FAULTS = ("refused", "equal", "remade", "another"), ("silent", "raw", "outside")
# all but tab and newlines, and what a bar of progress returns by
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Result(NamedTuple):
    """What came of one mutation: the verdict, what was done to the file, and what it led to."""

    format: str
    number: int
    verdict: str
    mutation: str
    outcome: str


def mutate(numbers: Iterable[int], *, of: Format, seed: int, prepared: Path) -> list[Result]:
    """Makes a scene, and judges the mutations of these numbers; each is a function of format, seed and number."""
    with tempfile.TemporaryDirectory() as folder:
        root, whole = Path(folder, "root"), Path(folder, "whole")
        scene = root / "around" / "scene"
        scene.mkdir(parents=True)
        for place in (root, root / "around"):
            for name in ("victim", "victim.json"):
                (place / name).write_text("precious")
        of.make(scene, prepared)
        of = found(of, scene)
        shutil.copytree(root, whole)
        sound = (scene / of.file).read_bytes()
        verdict, outcome = _in_a_child(root, partial(_read_sound, of, scene))
        assert verdict == "equal", f"the sound {of.name} is {verdict}: {outcome}"
        expected = json.loads(outcome)
        results = []
        for number in numbers:
            content, said, is_crafted = mutation(of, sound, seed, number)
            _restore(root, whole)
            if not content.startswith(b"PK"):  # in an archive all else would stand in another place then
                content = content.replace(ROOT.encode(), str(root).encode())
            (scene / of.file).write_bytes(content)
            before = _snapshot(root)
            judge = partial(_judge, of, scene, expected=expected, is_crafted=is_crafted)
            verdict, outcome = _in_a_child(root, judge)
            written = [path for path in _changed(before, _snapshot(root)) if not _may_change(path, of)]
            if written:
                verdict, outcome = "outside", f"{', '.join(written)} ({verdict}: {outcome})"
            results.append(Result(of.name, number, verdict, said, outcome.replace(str(root), ROOT)))
        return results


def found(of: Format, scene: Path) -> Format:
    """Returns a format with the very path of its file, which may be one that only dstlib knows."""
    (path,) = scene.glob(of.file)
    return replace(of, file=path.relative_to(scene).as_posix())


def mutation(of: Format, sound: bytes, seed: int, number: int) -> tuple[bytes, str, bool]:
    """Returns a changed file, what was done to it in words, and whether someone could have written it so."""
    rng = Random(f"{of.name} {seed} {number}")
    while True:
        is_crafted = rng.random() < len(of.craft) / (len(of.damage) + len(of.craft))
        content, said = rng.choice(of.craft if is_crafted else of.damage)(rng, sound)
        if content != sound:
            return content, said, is_crafted


def _read_sound(of: Format, scene: Path) -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return "equal", json.dumps(of.read(scene))


def _judge(of: Format, scene: Path, *, expected: Any, is_crafted: bool) -> tuple[str, str]:
    """Reads a changed file and says what came of it; all but what was written, and what ends the process."""
    mutated = (scene / of.file).read_bytes()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            value = json.loads(json.dumps(of.read(scene)))
    except DstlibError as error:
        verdict, outcome = "refused", str(error)
    except BaseException:
        return "raw", traceback.format_exc(limit=-4)
    else:
        outcome = json.dumps(value)
        if value == expected:
            is_as_it_was = not (scene / of.file).exists() or (scene / of.file).read_bytes() == mutated
            verdict = "equal" if is_as_it_was else "remade"
        elif is_crafted:
            broken = of.law(value, expected)
            verdict, outcome = ("silent", f"{broken}: {outcome}") if broken else ("another", outcome)
        else:
            verdict = "silent"
    shown = printed.getvalue() + (outcome if verdict == "refused" else "")
    if found := _CONTROL.search(shown):
        return "raw", f"{found.group()!r} on the screen: {printed.getvalue() + outcome!r}"
    return verdict, outcome


def _in_a_child(root: Path, judge: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Judges in a process with limits, of whose death there is a verdict too."""
    answer = root.parent / "answer"
    answer.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        try:
            _limit()
            os.chdir(root / "around" / "scene")
            before = _peak()
            verdict, outcome = judge()
            if (grown := _peak() - before) > MEGABYTES:
                verdict, outcome = "raw", f"takes {grown:.0f} MB ({verdict}: {outcome})"
            answer.write_text(json.dumps([verdict, outcome]))
        except BaseException:
            answer.write_text(json.dumps(["raw", traceback.format_exc()]))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0 and answer.exists():
        verdict, outcome = json.loads(answer.read_text())
        return verdict, outcome
    died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an exit without an answer"
    return "raw", f"ended by {died}" + (", after {} s of a processor or {}".format(*SECONDS) if died in _LATE else "")


def _limit() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS[1])
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS[0], SECONDS[0] + 1))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, mapped + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB; of KB on Linux


def _snapshot(root: Path) -> dict[str, Any]:
    """Returns what lies in a folder: a link by where it leads, a file by its content."""
    found: dict[str, Any] = {}
    for path in root.rglob("*"):
        is_file = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(root))] = path.read_bytes() if is_file else os.path.realpath(path)
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _may_change(path: str, of: Format) -> bool:
    inside = path.removeprefix("around/scene/")
    return inside != path and any(fnmatch(inside, pattern) for pattern in of.may_write)


def _restore(root: Path, whole: Path) -> None:
    shutil.rmtree(root)
    shutil.copytree(whole, root)


# ---- the program


def main(arguments: Sequence[str] | None = None) -> int:
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("--mutations", type=int, default=5000, metavar="N", help="over all formats (default: 5000)")
    lines.add_argument("--seed", type=int, default=0)
    lines.add_argument("--format", action="append", choices=[of.name for of in FORMATS], help="this one alone")
    lines.add_argument("--number", type=int, help="this mutation alone, shown in full")
    lines.add_argument("--keep", type=Path, metavar="FILE", help="with --number: write the changed file here")
    lines.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N")
    options = lines.parse_args(arguments)
    torch.set_num_threads(1)
    formats = [of for of in FORMATS if options.format is None or of.name in options.format]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        work = partial(mutate, seed=options.seed, prepared=Path(folder))
        if options.number is not None:
            (of,) = formats
            print(*work([options.number], of=of)[0], sep="\n")
            if options.keep is not None:
                with tempfile.TemporaryDirectory() as scene:
                    of.make(Path(scene), Path(folder))
                    sound = Path(scene, found(of, Path(scene)).file).read_bytes()
                options.keep.write_bytes(mutation(of, sound, options.seed, options.number)[0])
            return 0
        share = -(-options.mutations // len(formats))
        jobs = [(range(at, min(at + 25, share)), of.name) for at in range(0, share, 25) for of in formats]
        with get_context("fork").Pool(options.workers) as pool:
            results = [result for some in pool.imap_unordered(partial(_job, work), jobs) for result in some]
    print(table(results))
    for fault in faults(results):
        print(
            f"\n{told(fault)}\n  python tests/mutate_files.py --seed {options.seed} "
            f"--format {fault.format!r} --number {fault.number}"
        )
    return 1 if faults(results) else 0


def _job(work: Callable[..., list[Result]], job: tuple[range, str]) -> list[Result]:
    numbers, name = job
    return work(numbers, of=next(of for of in FORMATS if of.name == name))


def faults(results: Iterable[Result]) -> list[Result]:
    """Returns the results that are faults, by format and number."""
    return sorted(result for result in results if result.verdict in FAULTS)


def told(result: Result) -> str:
    """Says what was done to a file, and what came of it."""
    return f"{result.verdict.upper()} {result.format}: {result.mutation}\n  {result.outcome[-1500:]}"


def table(results: Sequence[Result]) -> str:
    """Counts verdicts, a row per format."""
    counts = Counter((result.format, result.verdict) for result in results)
    names = list(dict.fromkeys(result.format for result in sorted(results)))
    width = max(map(len, (*names, "format")))
    rows = [" ".join(["format".ljust(width), *(f"{verdict:>8}" for verdict in (*GOOD, *FAULTS))])]
    for name in (*names, "all"):
        numbers = (
            sum(n for (f, v), n in counts.items() if v == verdict and name in (f, "all"))
            for verdict in (*GOOD, *FAULTS)
        )
        rows.append(" ".join([name.ljust(width), *(f"{number:8,}" for number in numbers)]))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())

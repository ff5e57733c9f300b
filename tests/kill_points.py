"""Kills a process at each of its writes, lets the next one go on, and compares every byte with what was never killed.

python tests/kill_points.py run             # at every point of a run: before, half-way, before and after renaming
python tests/kill_points.py run --random 30 # at random moments instead, up to three times each
"""

import argparse
import builtins
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import small_runs
import torch

from dstlib.zoo.e2enet.cli import main as command
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms

Work = Callable[[Path], object]  # fills a folder, or completes it
# of log.jsonl: all that differs from run to run
TIMES = ("time", "seconds_per_iteration", "cpu_seconds_per_iteration", "peak_memory_bytes")
WORKS = ("run", "cache and run", "predict", "phantoms")
_TEMPORARY = re.compile(r"\.?[\w-]*[0-9a-f]{16}\.tmp")
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


def train(folder: Path, *, data: Path, cache: Path | None = None) -> None:
    """Trains, or goes on if a run has begun there."""
    run = folder / "run"
    small_runs.train(small_runs.config(data, run, cache=cache, resume=(run / "config.json").exists()))


def draw(folder: Path) -> None:
    """Draws phantoms."""
    write_phantoms(folder / "set", "hippocampus", num_scans=1, progress=False)


def predict(folder: Path, *, run: Path, images: Path) -> None:
    """Predicts a folder of images."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert command(["predict", str(run), "--images", str(images), "--output", str(folder / "out")]) == 0


# ---- where a process may be killed


class Points:
    """Counts the moments of a process at which a kill tells, and kills it at one of them.

    Each is named by what is done, where and to what: "before open", "half of", "before rename", "after rename", ...
    """

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at = folder, at
        self.passed: list[str] = []

    def watch(self) -> None:
        """Begins, for the rest of the process."""
        sys.addaudithook(self._hear)
        os.fsync = self._synced(os.fsync)
        os.replace = self._renamed(os.replace)
        builtins.open = self._opened(builtins.open)

    def _pass(self, name: str, path: Any, before_death: Callable[[], object] = lambda: None) -> None:
        with contextlib.suppress(ValueError, TypeError):
            shown = _TEMPORARY.sub("a temporary file", str(Path(os.fsdecode(path)).relative_to(self.folder)))
            self.passed.append(f"{name} {shown}")
            if len(self.passed) - 1 == self.at:
                before_death()
                os.kill(os.getpid(), signal.SIGKILL)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._pass("before opening", arguments[0])
        elif event in _CHANGES:
            path = arguments[1] if event == "os.rename" else arguments[0]
            self._pass(f"before {event}", path)

    def _synced(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def synced(file: int) -> None:
            status, path = os.fstat(file), os.readlink(f"/proc/self/fd/{file}")
            if stat.S_ISREG(status.st_mode):  # what was written may have come to the disk in part
                self._pass("half of", path, partial(os.ftruncate, file, status.st_size // 2))
            fsync(file)
            self._pass("after syncing", path)

        return synced

    def _renamed(self, replace: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any) -> None:
            replace(source, target)
            self._pass("after renaming to", target)

        return renamed

    def _opened(self, open_file: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = open_file(path, mode, *arguments, **options)
            if "a" in mode:
                write = file.write

                def write_in_parts(content: Any) -> int:
                    def first_half() -> None:
                        write(content[: len(content) // 2])
                        file.flush()

                    self._pass("half a line of", path, first_half)
                    return write(content)

                with contextlib.suppress(AttributeError):  # a lock is opened so, and its file may have no such place
                    file.write = write_in_parts
            return file

        return opened


def in_a_process(work: Work, folder: Path, *, at: int | None = None, seconds: float | None = None) -> list[str] | None:
    """Works in a process of its own, and returns the points that it passed; None if it was killed.

    ``at`` is the number of the point to be killed at, ``seconds`` a time after which to be.
    """
    answer = folder.parent / f"{folder.name}.points"
    answer.unlink(missing_ok=True)
    if (child := os.fork()) == 0:
        try:
            points = Points(folder, at)
            points.watch()
            work(folder)
            with contextlib.suppress(OSError):
                answer.write_text(json.dumps(points.passed))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return None
    assert answer.exists(), f"what began after the kill did not end well: see above ({folder})"
    return json.loads(answer.read_text())


# ---- what is compared


def contents(folder: Path) -> dict[str, Any]:
    """Returns every file and folder with its bytes, of ``log.jsonl`` all but the times and who wrote it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (_events(path) if path.name == "log.jsonl" else path.read_bytes()) if path.is_file() else None
    return found


def _events(log: Path) -> list[dict[str, Any]] | str:
    """Reads the epochs of a log; a session is a process, of which a killed run has more."""
    try:
        events = [json.loads(line) for line in log.read_text().splitlines()]
    except ValueError:
        return log.read_text()
    return [{k: v for k, v in event.items() if k not in TIMES} for event in events if event["event"] != "session"]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names what is missing, left over, or different."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} is left over" for name in sorted(found.keys() - expected.keys())),
        *(f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]),
    ]


# ---- killing


class Killing:
    """A work that was done without a kill, and is done again with kills, in folders of the same parent."""

    def __init__(self, work: Work, parent: Path) -> None:
        self.work, self.parent = work, parent
        whole = self._folder()
        started = time.monotonic()
        self.points = in_a_process(work, whole)
        self.seconds = time.monotonic() - started
        self.expected = contents(whole)
        shutil.rmtree(whole)

    def _folder(self) -> Path:
        folder = self.parent / "work"  # always the same, as records hold paths
        folder.mkdir()
        return folder

    def at(self, number: int) -> list[str]:
        """Kills the work at one of its points, goes on, and says what is not as it should be."""
        folder = self._folder()
        assert in_a_process(self.work, folder, at=number) is None, f"passed {self.points[number]}"
        return self._go_on(folder)

    def at_random(self, rng: random.Random) -> tuple[int, list[str]]:
        """Kills the work at a random moment, and what goes on up to twice; says how often, and what is wrong."""
        folder, kills = self._folder(), 0
        for _ in range(rng.choice((1, 1, 2, 3))):
            if in_a_process(self.work, folder, seconds=rng.uniform(0, self.seconds)) is None:
                kills += 1
        return kills, self._go_on(folder)

    def _go_on(self, folder: Path) -> list[str]:
        in_a_process(self.work, folder)
        found = differences(contents(folder), self.expected)
        shutil.rmtree(folder)
        return found


@contextlib.contextmanager
def killing(name: str) -> Iterator[Killing]:
    """Prepares one of the works to be killed."""
    torch.set_num_threads(1)  # a fork has no others
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder).resolve()
        data = small_runs.write_set(parent / "data")
        first = small_runs.config(data, parent / "run")
        if name == "phantoms":
            work: Work = draw
        elif name == "cache and run":
            work = partial(train, data=data)
        elif name == "run":
            small_runs.train(first)
            work = partial(train, data=data, cache=parent / "cache")
        else:
            small_runs.train(first)
            work = partial(predict, run=parent / "run", images=data / "imagesTr")
        yield Killing(work, parent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kills as the command line says, prints what was wrong, and returns 1 if anything was."""
    lines = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines.add_argument("work", choices=WORKS)
    lines.add_argument("--random", type=int, metavar="N", help="kill at so many random moments")
    lines.add_argument("--seed", type=int, default=0, help="of the random moments")
    lines.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth point")
    options = lines.parse_args(arguments)
    bad = 0
    with killing(options.work) as work:
        if options.random:
            rng, total = random.Random(options.seed), 0
            while total < options.random:
                kills, wrong = work.at_random(rng)
                total, bad = total + kills, bad + bool(wrong)
                print(f"{kills} kills: {'; '.join(wrong) or 'equal'}", flush=True)
            print(f"{total} kills at random moments, {bad} of them with differences or leftovers")
        else:
            numbers = range(0, len(work.points), options.every)
            for number in numbers:
                wrong = work.at(number)
                bad += bool(wrong)
                print(f"{number} {work.points[number]}: {'; '.join(wrong) or 'equal'}", flush=True)
            print(f"{len(numbers)} kills at {len(work.points)} points, {bad} with differences or leftovers")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

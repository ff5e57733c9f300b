"""DICOM files read by GDCM, within SimpleITK, in a process of its own: the two ends of one pipe.

GDCM and the decoders below it take what a file says for true: a byte changed in a picture of JPEG 2000 has them ask for
more memory than a machine has, upon which the system ends the process. So another process is limited in memory and in
time, and if it ends, that is a defect of the file. It prints nothing, and knows nothing of dstlib, so it is there soon.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

MEMORY = 2**28  # bytes for a header: of whatever is in it beside the picture
PER_PIXEL = 64  # bytes: in what a picture is packed, in what it is unpacked, rescaled, and as it is returned
SECONDS = 60  # of computing per file


@dataclass(frozen=True, eq=False)
class Decoder:
    """The near end: asks the process about one file after the other."""

    process: "subprocess.Popen[bytes]"

    def tags(self, file: Path, names: Mapping[str, str]) -> dict[str, str]:
        """Returns what a file says, as text, by these names of tags; without those that it lacks.

        Raises:
            ValueError: It cannot be read.
        """
        return self._ask(file, {"tags": {**names}, "memory": MEMORY})["tags"]

    def pixels(self, file: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Returns the picture (rows, columns), by slope and intercept of its own.

        Raises:
            ValueError: It cannot be read, or is of another shape.
        """
        answer = self._ask(file, {"shape": [*shape], "memory": MEMORY + PER_PIXEL * shape[0] * shape[1]})
        assert self.process.stdout is not None
        content = self.process.stdout.read(answer["num_bytes"])
        return np.frombuffer(content, np.float32).reshape(shape)

    def _ask(self, file: Path, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # told below
            self.process.stdin.write(json.dumps({"file": os.fspath(file), **question}).encode() + b"\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"{file.name} ended the process that read it, {_end(self.process.wait())}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{file.name} cannot be read by GDCM: {answer['error']}")
        return answer


@contextmanager
def decoder() -> Iterator[Decoder]:
    """Starts the process, and ends it.

    Raises:
        ValueError: SimpleITK is not installed.
    """
    if find_spec("SimpleITK") is None:
        raise ValueError("it is DICOM, which SimpleITK reads: pip install 'dstlib[itk]'")
    # By its path, without the folder of it among those that modules are looked for in.
    process = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield Decoder(process)
    finally:
        process.kill()
        process.communicate()


def _end(code: int) -> str:
    """Says how a process ended."""
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    return f"by signal {-code}"


def _serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """The far end: answers until there are no more questions."""
    for question in questions:
        asked = json.loads(question)
        content = b""
        try:
            _limit(asked["memory"])
            if "tags" in asked:
                answer: dict[str, Any] = {"tags": _read_tags(asked["file"], asked["tags"])}
            else:
                content = _read_pixels(asked["file"], asked["shape"])
                answer = {"num_bytes": len(content)}
        except (RuntimeError, MemoryError, ValueError, OSError) as error:
            answer, content = {"error": _short(error)}, b""
        answers.write(json.dumps(answer).encode() + b"\n" + content)
        answers.flush()


def _short(error: Exception) -> str:
    """Returns the end of a message, where GDCM says what it means, without the places in its source."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^\w+\(0x[0-9a-f]+\): ", "", text.rpartition("ERROR: ")[2])[-200:]


def _limit(num_bytes: int) -> None:
    """Allows this process so much more memory, and some more time, as far as the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime) + SECONDS}
    if (taken := _taken()) is not None:
        limits[resource.RLIMIT_AS] = taken + num_bytes
    for limit, value in limits.items():
        _, highest = resource.getrlimit(limit)
        resource.setrlimit(limit, (value if highest == resource.RLIM_INFINITY else min(value, highest), highest))


def _taken(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Returns how many bytes of addresses this process has; None where nothing says so, as on macOS.

    >>> _taken(Path("no such file")) is None
    True
    """
    try:
        return int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _reader(file: str) -> Any:
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.LoadPrivateTagsOff()
    return reader


def _read_tags(file: str, names: Mapping[str, str]) -> dict[str, str]:
    reader = _reader(file)
    reader.ReadImageInformation()
    return {name: reader.GetMetaData(tag).strip(" \0") for name, tag in names.items() if reader.HasMetaDataKey(tag)}


def _read_pixels(file: str, shape: Sequence[int]) -> bytes:
    import SimpleITK

    reader = _reader(file)
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    voxels = SimpleITK.GetArrayFromImage(reader.Execute())
    if voxels.shape != (1, *shape):
        raise ValueError(f"it has a picture of {voxels.shape}, not {tuple(shape)}")
    return voxels.tobytes()


if __name__ == "__main__":
    import SimpleITK  # noqa: F401 - so that what it takes is no part of what a file is allowed

    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what GDCM prints is no answer
    with suppress(KeyboardInterrupt):
        _serve(sys.stdin.buffer, pipe)

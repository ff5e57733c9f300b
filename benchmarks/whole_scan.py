"""A whole CT from its file to its label file: E2ENet by `predict` beside nnU-Net's own predictor, on the same cores.

    make nnunet                                              # once: nnU-Net in an environment of its own
    NNUNET=.venv-nnunet/bin/python
    python benchmarks/whole_scan.py --nnunet $NNUNET --windows 4   # some of the windows of each: minutes
    python benchmarks/whole_scan.py --nnunet $NNUNET               # all of them: about half an hour
    python benchmarks/whole_scan.py --nnunet $NNUNET --skip-empty  # windows in the air are not read on our side

The scan is a phantom's torso amid air, 512×512×200 voxels of 0.8×0.8×2.5 mm, which is also the spacing of the training,
so that neither side resamples it. Both read windows of 128³ that overlap by half, without mirrors, in 16 classes; both
networks have random weights. E2ENet is the paper's for AMOS with the first masks of DSFF, computed as `predict` would
choose; nnU-Net's is the PlainConvUNet that its planner gives such a patch, in `nnUNetPredictor`'s own
`predict_from_files_sequential`, which takes one process (`predict_from_files` takes seven, for more memory).

Each side runs in a process of its own, in turns. The seconds are from the file to the label file, without imports; the
peak is what the system counts of the process (VmHWM), imports and networks with it. With --windows N only so many of
the windows are read on either side, all else is done as for the whole scan, and the seconds of the whole are stated as
those of everything else and of the median window times their number. That is no measurement of the whole, and said so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import nibabel
import numpy as np
import torch
from _measure import begin, command_line, progress, write
from _nnunet_scan import peak
from numpy.typing import NDArray
from scipy import ndimage

import dstlib
from dstlib.report import align
from dstlib.zoo.e2enet import AMOS, E2ENet
from dstlib.zoo.e2enet.data.phantoms.ct import FIELD_OF_VIEW, phantom
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.inference import predict
from dstlib.zoo.e2enet.inference.planned import faster_of
from dstlib.zoo.e2enet.inference.predict import Trained, predict_folder
from dstlib.zoo.e2enet.inference.sliding_window import Windows, windows_of

SPACING = (2.5, 0.8, 0.8)  # mm along (D, H, W)
NUM_CLASSES = 16  # with the background
AIR, NOISE = -1000, 10  # HU
Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is asked of either side, as JSON."""

    image: str
    output: str
    shape: tuple[int, ...]
    patch: tuple[int, ...]
    num_windows: int
    read: int
    threads: int
    sparsity: float
    skip_empty: bool
    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    torchvision: bool
    spacing: tuple[float, ...] = SPACING
    num_classes: int = NUM_CLASSES
    strides: tuple[tuple[int, ...], ...] = AMOS.strides


def main() -> None:
    if sys.argv[1:2] == ["--alone"]:
        print(json.dumps(alone(Side(**json.loads(Path(sys.argv[2]).read_text())))))
        return
    lines, default = command_line(__doc__, repeats=1), " (default: %(default)s)"
    python = "of an environment with nnunetv2 >= 2.8"
    lines.add_argument("--nnunet", default=sys.executable, metavar="PYTHON", help=python + default)
    lines.add_argument("--size", type=int, nargs=3, default=[512, 512, 200], help="voxels of the scan" + default)
    lines.add_argument("--patch", type=int, default=128, help="voxels of a window along each axis" + default)
    lines.add_argument("--windows", type=int, default=0, metavar="N", help="windows to read; 0 for all" + default)
    lines.add_argument("--sparsity", type=float, default=0.9, help="of E2ENet's fusion" + default)
    lines.add_argument("--skip-empty", action="store_true", help="as `predict --skip-empty`, on our side")
    lines.add_argument("--sides", nargs="+", choices=("E2ENet", "nnU-Net"), default=["E2ENet", "nnU-Net"])
    no_vision = "for an environment whose torchvision does not load: nnU-Net needs none of it here"
    lines.add_argument("--no-torchvision", action="store_true", help=no_vision)
    options = begin(lines)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    print("\n".join(align(table(results), left=(0,))))
    write(options.out / "whole_scan.json", options, results)


def measure(options: argparse.Namespace, folder: Path) -> list[Answer]:
    """A row for each side: medians over the rounds."""
    progress("drawing the scan")
    intensities = draw(folder / "images" / "scan.nii.gz", options.size)
    shape = tuple(options.size[::-1])
    num = len(windows_of(shape, (options.patch,) * 3).places)
    found: dict[str, list[Answer]] = {name: [] for name in options.sides}
    for _ in range(options.repeats):
        for name in options.sides:
            side = Side(
                image=str(folder / "images" / "scan.nii.gz"),
                output=str(folder / name),
                shape=shape,
                patch=(options.patch,) * 3,
                num_windows=num,
                read=min(num, options.windows or num),
                threads=options.threads,
                sparsity=options.sparsity,
                skip_empty=options.skip_empty,
                torchvision=not options.no_torchvision,
                **intensities,
            )
            progress(f"{name}, {side.read} of {num} windows")
            found[name].append(run(name, side, options.nnunet))
            progress(json.dumps({key: value for key, value in found[name][-1].items() if key != "ends"}))
    return [summary(name, answers) for name, answers in found.items()]


def run(name: str, side: Side, nnunet: str) -> Answer:
    """What one side answers, with its stated seconds of the whole scan."""
    Path(side.output).mkdir(exist_ok=True)
    job = Path(side.output) / "job.json"
    job.write_text(json.dumps(vars(side)))
    here = Path(__file__)
    command = (
        [sys.executable, str(here), "--alone", str(job)]
        if name == "E2ENet"
        else [nnunet, str(here.with_name("_nnunet_scan.py")), str(job)]
    )
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} ended with code {done.returncode}.")
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    ends = answer.pop("ends")
    cycles = np.diff(ends)
    num_left = answer.get("num_to_read", side.num_windows) - len(ends)
    per_window = float(np.median(cycles)) if len(cycles) else float("nan")
    return answer | {
        "windows_read": len(ends),
        "windows": len(ends) + num_left,
        "seconds_per_window": per_window,
        "seconds_of_the_whole": answer["seconds"] + (num_left * per_window if num_left else 0.0),
    }


def alone(side: Side) -> Answer:
    """Our side, in a process that does nothing else."""
    warnings.simplefilter("ignore")  # DSFF would know for how long it trains: not at all
    torch.set_num_threads(side.threads)
    torch.manual_seed(0)
    model = E2ENet(replace(AMOS, in_channels=1, num_classes=side.num_classes))
    if side.sparsity:
        dstlib.sparsify(model, sparsity=side.sparsity, method="dsff", include=E2ENet.FUSION, total_steps=10_000)
    rule = CtNormalization(low=side.percentile_00_5, high=side.percentile_99_5, mean=side.mean, std=side.std)
    d, h, w = side.patch
    trained = Trained(
        models=(model,),
        preparation=Preparation(spacing=SPACING, normalization=(rule,)),
        patch_size=(d, h, w),
        mirror=(),
        channels=("CT",),
        classes=tuple(f"class {number}" for number in range(1, side.num_classes)),
        skip_empty=side.skip_empty,
    )
    ends, num_to_read = watch(side.read)
    start = perf_counter()
    trained, told = faster_of(trained)
    (outcome,) = predict_folder(trained, Path(side.image).parent, Path(side.output), overwrite=True, progress=False)
    seconds = perf_counter() - start
    assert outcome.error is None, outcome.error
    return {
        "seconds": seconds,
        "ends": ends,
        "num_to_read": num_to_read[0],
        "peak_bytes": peak(),
        "told": told,
    }


def watch(read: int) -> tuple[list[float], list[int]]:
    """The times at which windows end, and how many would be; of these only some are read, others are background."""
    ends: list[float] = []
    num_to_read: list[int] = []
    scan_windows, predict_scan = predict.scan_windows, predict.predict_scan

    def some(trained: Trained, image: NDArray[np.float32]) -> Windows:
        windows = scan_windows(trained, image)
        num_to_read.append(windows.num_read)
        left = np.flatnonzero(~np.array(windows.is_empty))[:read]
        return replace(windows, is_empty=tuple(i not in left for i in range(len(windows.places))))

    def noted(*arguments: Any, on_pass: Callable[[int], None]) -> NDArray[np.uint8]:
        return predict_scan(*arguments, on_pass=lambda num: (ends.append(perf_counter()), on_pass(num))[1])

    predict.scan_windows, predict.predict_scan = some, noted
    return ends, num_to_read


def draw(file: Path, size: list[int]) -> dict[str, float]:
    """Writes a phantom amid air, of so many voxels (x, y, z), and returns the intensities of its organs."""
    spacing = np.array(SPACING)
    whole = np.array(size[::-1])
    inner = np.minimum(whole, (np.array(FIELD_OF_VIEW) / spacing).astype(int))
    case = phantom(0, tuple(np.maximum(inner // 2, (48, 64, 64)).tolist()))
    factors = inner / case.label.shape
    torso = ndimage.zoom(case.image[0], factors, order=1, mode="nearest", grid_mode=True)
    rng = np.random.default_rng(0)
    voxels = np.empty(whole, np.int16)
    before = (whole - torso.shape) // 2
    for depth in range(whole[0]):
        voxels[depth] = rng.normal(AIR, NOISE, whole[1:])
        if 0 <= depth - before[0] < len(torso):
            at = [slice(first, first + n) for first, n in zip(before[1:], torso.shape[1:], strict=True)]
            voxels[depth][tuple(at)] = torso[depth - before[0]]
    file.parent.mkdir()
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    nibabel.Nifti1Image(voxels.T, affine).to_filename(file)
    organs = case.image[0][case.label > 0]
    low, high = np.percentile(organs, (0.5, 99.5))
    return {
        "mean": float(organs.mean()),
        "std": float(organs.std()),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }


def summary(name: str, answers: list[Answer]) -> Answer:
    """The medians of what a side answered."""
    numbers = ("seconds", "seconds_of_the_whole", "seconds_per_window", "peak_bytes", "windows_read", "windows")
    told = {"told": answers[-1]["told"]} if "told" in answers[-1] else {}
    return {"side": name} | {key: median(answer[key] for answer in answers) for key in numbers} | told


def table(results: list[Answer]) -> list[tuple[str, ...]]:
    """What was measured, and what is stated of the whole scan, beside nnU-Net."""
    lines = [
        ("side", "windows read", "seconds", "s / window", "whole scan, s", "× nnU-Net", "peak, GB", "of nnU-Net's")
    ]
    others = [row for row in results if row["side"] == "nnU-Net"]
    for row in results:
        is_whole = row["windows_read"] == row["windows"]
        ratios = ("-", "-")
        if others:
            faster = others[0]["seconds_of_the_whole"] / row["seconds_of_the_whole"]
            ratios = (f"{faster:.2f}", f"{row['peak_bytes'] / others[0]['peak_bytes']:.2f}")
        whole = f"{row['seconds_of_the_whole']:.1f}" + ("" if is_whole else " (stated)")
        lines.append(
            (
                row["side"],
                f"{row['windows_read']:g} of {row['windows']:g}",
                f"{row['seconds']:.1f}",
                f"{row['seconds_per_window']:.2f}",
                whole,
                ratios[0],
                f"{row['peak_bytes'] / 1e9:.2f}",
                ratios[1],
            )
        )
    return lines


if __name__ == "__main__":
    main()

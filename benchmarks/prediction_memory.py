"""The peak memory of a prediction: a scan through a network of 16 outputs, from its file to its label.

    python benchmarks/prediction_memory.py                                   # a small E2ENet, all windows: an hour
    python benchmarks/prediction_memory.py --network paper --stop-after 2    # the paper's width: two windows of 441
    python benchmarks/prediction_memory.py --size 128 128 160 --patch 64     # a minute

The network has random weights, is called once per window (no mirrors) and runs in torch. The scan is noise of 16 bits
with the voxels of the training, so that it is not resampled. Written are the peak of the process, as the system counts
it, and the seconds. With --stop-after the memory of all sums is touched at once, as it is after a row of windows.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import nibabel
import numpy as np
from _measure import begin, command_line, write
from torch import nn

from dstlib.bounds import most_memory
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig
from dstlib.zoo.e2enet.config import AMOS
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.inference import sliding_window
from dstlib.zoo.e2enet.inference.predict import Trained, predict_folder

NETWORKS = {
    "small": E2ENetConfig(in_channels=1, num_classes=16, channels=(3, 6, 6), strides=((2, 2, 2),) * 2, heads=1),
    "paper": replace(AMOS, in_channels=1, num_classes=16),
}


def main() -> None:
    lines, default = command_line(__doc__, flag=None), " (default: %(default)s)"
    lines.add_argument("--network", choices=NETWORKS, default="small", help=default.strip())
    lines.add_argument("--size", type=int, nargs=3, default=[512, 512, 600], help="voxels of the scan" + default)
    lines.add_argument("--patch", type=int, default=128, help="voxels of a window along each axis" + default)
    lines.add_argument("--stop-after", type=int, default=0, metavar="N", help="windows to read; 0 for all" + default)
    options = begin(lines)
    model, since = E2ENet(NETWORKS[options.network]), perf_counter()
    if options.stop_after:
        _stop_after(model, options.stop_after)
    with TemporaryDirectory() as folder:
        _write_scan(Path(folder) / "images", options.size)
        try:
            outcomes = predict_folder(_trained(model, options.patch), Path(folder) / "images", Path(folder) / "labels")
            assert outcomes[0].error is None, outcomes[0].error
        except KeyboardInterrupt:
            print(f"Stopped after {options.stop_after} windows.")
    peak = most_memory()
    seconds = perf_counter() - since
    print(f"peak of the process: {peak / 1e9:.2f} GB, {seconds:.0f} s, with what it took to write the scan")
    write(options.out / "prediction_memory.json", options, [{"peak_bytes": peak, "seconds": seconds}])


def _trained(model: nn.Module, patch: int) -> Trained:
    rule = CtNormalization(low=0.0, high=1000.0, mean=500.0, std=100.0)
    return Trained(
        models=(model,),
        preparation=Preparation(spacing=(1.25, 0.8, 0.8), normalization=(rule,)),
        patch_size=(patch,) * 3,
        mirror=(),
        channels=("CT",),
        classes=tuple(f"class {number}" for number in range(1, 16)),
    )


def _write_scan(folder: Path, size: list[int]) -> None:
    folder.mkdir()
    rng, voxels = np.random.default_rng(0), np.empty(size, np.int16, order="F")
    for depth in range(size[2]):  # whole, it would be of eight bytes each
        voxels[..., depth] = rng.normal(500, 100, size[:2])
    nibabel.Nifti1Image(voxels, np.diag([-0.8, 0.8, 1.25, 1.0])).to_filename(folder / "scan.nii.gz")


def _stop_after(model: nn.Module, num: int) -> None:
    """Stops a prediction once a model was called so often, with all of its sums touched."""
    allocate, calls = sliding_window._Sums.allocate, []

    def touched(sums: sliding_window._Sums, num_outputs: int) -> None:
        allocate(sums, num_outputs)
        sums._values_AKPQ.add_(0)

    def count(*_: object) -> None:
        calls.append(1)
        if len(calls) == num:
            raise KeyboardInterrupt

    sliding_window._Sums.allocate = touched  # type: ignore[method-assign]
    model.register_forward_hook(count)


if __name__ == "__main__":
    main()

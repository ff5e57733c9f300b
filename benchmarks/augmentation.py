"""What a training patch costs: cut and augmented by dstlib, and by MONAI's equivalent transforms, side by side.

    python benchmarks/augmentation.py [--size 128] [--samples 60]

One thread, image of one channel with its label. The two take turns, so that a drifting machine slows both, and
what is counted is the CPU's time, so that programs beside them disturb less. First each change comes as often as
in the paper, then all of them at once, which is the worst that a draw can be. MONAI's pipeline does a little less:
it turns the patch that was cut, so its corners show padding, and it interpolates low resolution linearly.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from itertools import count

import monai
import numpy as np
import torch
from _measure import cpu, times
from monai import transforms as mt

from dstlib.command_line import make_parser
from dstlib.zoo.e2enet.data.cases import Case
from dstlib.zoo.e2enet.data.dataloading.patch_sampling import draw_batch
from dstlib.zoo.e2enet.data.dataloading.settings import Augmentation, Chance, PatchSettings

Draw = Callable[[int], object]


def always(augmentation: Augmentation) -> Augmentation:
    """Every change in every patch and channel."""
    chances = {f.name: getattr(augmentation, f.name) for f in fields(augmentation) if f.name != "per_channel"}
    certain = {name: replace(chance, probability=1.0) for name, chance in chances.items()}
    return replace(augmentation, **certain, per_channel=1.0)


def ours(case: Case, size: int, augmentation: Augmentation) -> Draw:
    """A patch as a training draws it."""
    settings = PatchSettings(patch_size=(size, size, size), batch_size=1, augment=augmentation)
    return lambda i: draw_batch([case], settings, seed=0, iteration=i)


def monais(case: Case, size: int, a: Augmentation) -> Draw:
    """The same changes as MONAI's dictionary transforms."""

    def either(first: Chance, second: Chance) -> float:
        return 1 - (1 - first.probability) * (1 - second.probability)

    keys, angle = ["image", "label"], np.deg2rad(a.rotation.high)
    gamma = {"gamma": (a.gamma.low, a.gamma.high), "retain_stats": True}
    pipeline = mt.Compose(
        [
            mt.RandSpatialCropd(keys, (size, size, size), random_size=False),
            mt.RandAffined(
                keys,
                prob=either(a.rotation, a.scaling),
                rotate_range=(angle,) * 3,
                scale_range=((a.scaling.low - 1, a.scaling.high - 1),) * 3,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
                spatial_size=(size, size, size),
                cache_grid=True,
            ),
            mt.RandGaussianNoised("image", prob=a.noise.probability, std=a.noise.high, sample_std=True),
            mt.RandGaussianSmoothd("image", *((a.blur.low, a.blur.high),) * 3, prob=a.blur.probability * a.per_channel),
            mt.RandScaleIntensityd("image", a.brightness.high - 1, prob=a.brightness.probability),
            mt.RandScaleIntensityFixedMeand(
                "image", a.contrast.high - 1, prob=a.contrast.probability, preserve_range=True
            ),
            mt.RandSimulateLowResolutiond(
                "image",
                prob=a.resolution.probability * a.per_channel,
                zoom_range=(a.resolution.low, a.resolution.high),
            ),
            mt.RandAdjustContrastd("image", prob=a.inverted_gamma.probability, invert_image=True, **gamma),
            mt.RandAdjustContrastd("image", prob=a.gamma.probability, **gamma),
            *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )
    pipeline.set_random_state(0)
    data = {"image": torch.from_numpy(case.image), "label": torch.from_numpy(case.label[None])}
    return lambda i: pipeline(data)


def compare(title: str, draws: dict[str, Draw], num_samples: int) -> None:
    """Draws the samples of each in turn, and prints a table of their seconds."""
    numbered = {name: partial(lambda draw, numbers: draw(next(numbers)), draw, count()) for name, draw in draws.items()}
    taken = {name: np.divide(ms, 1e3) for name, ms in times(numbered, num_samples, clock=cpu, warm_up=2).items()}
    print(f"\n{title}, CPU seconds per sample over {num_samples}")
    print(f"{'':8}{'median':>9}{'mean':>9}{'p90':>9}{'max':>9}{'mean ratio':>12}")
    least = np.mean(taken["dstlib"])
    for name, seconds in taken.items():
        row = (np.median(seconds), np.mean(seconds), np.quantile(seconds, 0.9), np.max(seconds))
        print(f"{name:8}" + "".join(f"{value:9.3f}" for value in row) + f"{np.mean(seconds) / least:12.2f}")


def main() -> None:
    """Times both and prints two tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=128, help="side of the patch in voxels (default 128)")
    parser.add_argument("--samples", type=int, default=60, help="patches of each (default 60)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, side = np.random.default_rng(0), args.size * 3 // 2
    label = np.zeros((side, side, side), np.uint8)
    label[side // 4 : side // 2, side // 4 : side // 2] = rng.integers(1, 16, side)
    case = Case("noise", rng.standard_normal((1, *label.shape), np.float32), label, (1.0, 1.0, 1.0))
    print(
        f"torch {torch.__version__}, MONAI {monai.__version__}, one thread; patch {args.size}³ from a case of {side}³"
    )
    each = {"as often as the paper": Augmentation(), "everything at once": always(Augmentation())}
    for title, augmentation in each.items():
        draws = {"dstlib": ours(case, args.size, augmentation), "MONAI": monais(case, args.size, augmentation)}
        compare(title, draws, args.samples)


if __name__ == "__main__":
    main()

"""The four recipes of E2ENet as values: which network, what it is fed, how long it trains, at three scales.

- ``paper``: the published training: 1000 epochs of 250 iterations on 128³ or 96³ patches. A GPU, and a day or more.
- ``quick``: a smaller network on real scans: under an hour on two CPU cores, minutes on a GPU.
- ``demo``: the smallest that learns something, on procedural phantoms: minutes on two CPU cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dstlib.zoo.e2enet.config import AMOS, BRATS, BTCV, E2ENetConfig
from dstlib.zoo.e2enet.data.dataloading.settings import PatchSettings
from dstlib.zoo.e2enet.data.layouts.channels import Modality
from dstlib.zoo.e2enet.training.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One scale of a recipe; channels in and classes out of ``network`` follow the data."""

    network: E2ENetConfig
    patches: PatchSettings
    training: TrainSettings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How E2ENet is trained on one kind of data.

    - ``phantoms``: the procedural set that stands in where no data is given, and how many of its scans.
    - ``modality``: what it is made for: a set whose channels say otherwise is not taken unasked.
    """

    name: str
    phantoms: tuple[Literal["amos", "btcv", "brats", "hippocampus"], int]
    modality: Modality
    presets: Mapping[str, Preset]


PAPER = TrainSettings(epochs=1000, iterations=250, val_iterations=50)
# In a thousand iterations the paper's SGD, made for a quarter of a million, loses the small organs among the large.
SHORT = TrainSettings(optimizer="adamw", learning_rate=0.003)

_FOUR_LEVELS = E2ENetConfig(channels=(16, 32, 64, 64), strides=((2, 2, 2),) * 3, heads=3)
_FIVE_LEVELS = E2ENetConfig(channels=(24, 48, 96, 160, 160), strides=((2, 2, 2),) * 4, heads=4)

_AMOS_PAPER = Preset(network=AMOS, patches=PatchSettings(patch_size=(128, 128, 128)), training=PAPER)

# Left and right kidneys and adrenals are classes of their own: a short run keeps the sides apart by not mirroring.
_ABDOMEN_QUICK = Preset(
    network=_FIVE_LEVELS,
    patches=PatchSettings(patch_size=(64, 96, 96), mirror=()),
    training=replace(SHORT, epochs=40, iterations=50, interval=100, val_iterations=5),
)
# Every patch is centred on an organ, each as likely as the others, or a short run never finds the small ones. No
# augmentation, as phantoms are no scarcity.
_ABDOMEN_DEMO = Preset(
    network=_FOUR_LEVELS,
    patches=PatchSettings(patch_size=(24, 32, 32), oversample=1.0, augment=None, mirror=()),
    training=replace(SHORT, epochs=20, iterations=50, interval=100),
)

AMOS_RECIPE = Recipe(
    name="e2enet_amos",
    phantoms=("amos", 30),
    modality="ct",
    presets={"paper": _AMOS_PAPER, "quick": _ABDOMEN_QUICK, "demo": _ABDOMEN_DEMO},
)

BTCV_RECIPE = Recipe(
    name="e2enet_btcv",
    phantoms=("btcv", 30),
    modality="ct",
    presets={
        "paper": Preset(network=BTCV, patches=PatchSettings(patch_size=(96, 96, 96)), training=PAPER),
        "quick": _ABDOMEN_QUICK,
        "demo": _ABDOMEN_DEMO,
    },
)

BRATS_RECIPE = Recipe(
    name="e2enet_brats",
    phantoms=("brats", 20),
    modality="mri",
    presets={
        "paper": Preset(network=BRATS, patches=PatchSettings(patch_size=(128, 128, 128)), training=PAPER),
        "quick": Preset(
            network=_FIVE_LEVELS,
            patches=PatchSettings(patch_size=(64, 64, 64)),
            training=replace(SHORT, epochs=40, iterations=50, interval=100, val_iterations=5),
        ),
        "demo": Preset(
            network=_FOUR_LEVELS,
            patches=PatchSettings(patch_size=(32, 32, 32), oversample=1.0, augment=None),
            training=replace(SHORT, epochs=10, iterations=30, interval=50),
        ),
    },
)

# One patch holds a whole scan of about 36 × 50 × 35 voxels, and four levels are all that it has room for. Front and
# back of the hippocampus are the classes, so a short run does not mirror.
_HIPPOCAMPUS_PATCH = PatchSettings(patch_size=(40, 56, 40))
HIPPOCAMPUS_RECIPE = Recipe(
    name="e2enet_hippocampus",
    phantoms=("hippocampus", 20),
    modality="mri",
    presets={
        "paper": Preset(
            network=replace(AMOS, channels=(48, 96, 192, 320), strides=((2, 2, 2),) * 3, heads=3),
            patches=_HIPPOCAMPUS_PATCH,
            training=PAPER,
        ),
        "quick": Preset(
            network=replace(_FOUR_LEVELS, channels=(16, 32, 64, 96)),
            patches=replace(_HIPPOCAMPUS_PATCH, mirror=()),
            training=replace(SHORT, epochs=24, iterations=30, interval=60, val_iterations=5),
        ),
        "demo": Preset(
            network=replace(_FOUR_LEVELS, channels=(8, 16, 32, 32)),
            patches=replace(_HIPPOCAMPUS_PATCH, augment=None, mirror=()),
            training=replace(SHORT, epochs=5, iterations=20, interval=20),
        ),
    },
)

RECIPES = {recipe.name: recipe for recipe in (AMOS_RECIPE, BRATS_RECIPE, BTCV_RECIPE, HIPPOCAMPUS_RECIPE)}


def short_name(recipe: str) -> str:
    """Returns the name of a recipe as command lines have it.

    >>> short_name("e2enet_amos")
    'amos'
    """
    return recipe.removeprefix("e2enet_")

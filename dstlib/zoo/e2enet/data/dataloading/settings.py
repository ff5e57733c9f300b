"""How patches are drawn and changed, as a value. Nothing here needs torch: command lines are parsed by it."""

from dataclasses import dataclass, field, fields, replace

import numpy as np

from dstlib.errors import require
from dstlib.zoo.e2enet.data.cases import Shape


@dataclass(frozen=True)
class Chance:
    """The probability of a change, and the range that its strength is drawn from.

    >>> Chance(0.2, 0.7, 1.4).around_one(np.random.default_rng(0)) < 1.4
    True
    """

    probability: float
    low: float
    high: float

    def comes(self, rng: np.random.Generator) -> bool:
        """Draws whether the change happens."""
        return bool(rng.random() < self.probability)

    def uniform(self, rng: np.random.Generator) -> float:
        """Draws a strength, uniformly."""
        return float(rng.uniform(self.low, self.high))

    def around_one(self, rng: np.random.Generator) -> float:
        """Draws a factor or an exponent: as often below 1 as above, and uniform on either side."""
        below = rng.random() < 0.5 if self.low < 1 < self.high else self.high <= 1
        return float(rng.uniform(self.low, min(self.high, 1)) if below else rng.uniform(max(self.low, 1), self.high))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The random changes of a patch, in the order in which they come; the defaults are the paper's.

    ``Chance(0, ...)`` switches a change off.

    - ``rotation``: degrees, about each axis. A thin patch is turned in its plane only, by any angle.
    - ``scaling``: above 1 the patch shows more of the case, and everything in it is smaller.
    - ``noise``: standard deviation, one for all channels. nnU-Net calls it a variance and uses it as this.
    - ``blur``: standard deviation in voxels; each channel with probability ``per_channel``.
    - ``brightness``, ``contrast``: factors, on the value and on its distance from the mean.
    - ``resolution``: share of the voxels of each axis that is kept; each channel with ``per_channel``.
    - ``inverted_gamma``, ``gamma``: exponents.

    Mirroring comes last, and is a setting of the patches, as prediction needs it too.

    Raises:
        SettingError: A probability lies outside [0, 1], or a range is empty or outside what is allowed.

    Reference: nnU-Net (Isensee et al. 2021), "moreDA", in the fork that E2ENet was published with.

    >>> Augmentation(rotation=Chance(1.5, -30, 30))
    Traceback (most recent call last):
    dstlib.errors.SettingError: rotation of Augmentation: expected a probability in [0, 1] and a range within ...
    """

    rotation: Chance = Chance(0.2, -30.0, 30.0)
    scaling: Chance = Chance(0.2, 0.7, 1.4)
    noise: Chance = Chance(0.1, 0.0, 0.1)
    blur: Chance = Chance(0.2, 0.5, 1.0)
    brightness: Chance = Chance(0.15, 0.75, 1.25)
    contrast: Chance = Chance(0.15, 0.75, 1.25)
    resolution: Chance = Chance(0.25, 0.5, 1.0)
    inverted_gamma: Chance = Chance(0.1, 0.7, 1.5)
    gamma: Chance = Chance(0.3, 0.7, 1.5)
    per_channel: float = 0.5

    def __post_init__(self) -> None:
        # Blur cannot be 0 (its weights would be 0/0), nor can the others at 0.01: a patch would lose its content.
        limits = {"rotation": (-180.0, 180.0), "noise": (0.0, 10.0), "resolution": (0.01, 1.0)}
        for name in (each.name for each in fields(self) if each.name != "per_channel"):
            chance, (least, most) = getattr(self, name), limits.get(name, (0.01, 10.0))
            holds = 0 <= chance.probability <= 1 and least <= chance.low <= chance.high <= most
            allowed = f"a probability in [0, 1] and a range within [{least:g}, {most:g}]"
            remedy = "Pass Chance(probability, low, high); Chance(0, 1, 1) switches most parts off."
            require(holds, name, "Augmentation", allowed=allowed, given=chance, remedy=remedy)
        share, allowed, remedy = self.per_channel, "a number in [0, 1]", "The paper's is 0.5."
        require(0 <= share <= 1, "per_channel", "Augmentation", allowed=allowed, given=share, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """The size and number of the patches of a batch, and how they are drawn and changed.

    ``oversample`` is the share of the batch that is forced to contain foreground, counted as nnU-Net does:
    one patch of two at 0.33. ``augment`` says how patches are changed, None that they are not. ``mirror`` names
    the axes (0 = D, 1 = H, 2 = W) along which an augmented patch is flipped, each with probability 1/2. The
    paper flips all three; where classes tell left from right, as two kidneys, that makes them harder to tell
    apart, and ``(0, 1)`` keeps the sides.

    Raises:
        SettingError: A setting lies outside what is allowed.

    >>> PatchSettings(patch_size=(40, 56, 40)).num_forced
    1
    """

    patch_size: Shape
    batch_size: int = 2
    oversample: float = 0.33
    augment: Augmentation | None = field(default_factory=Augmentation)
    mirror: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        where = "PatchSettings"
        holds = len(self.patch_size) == 3 and min(self.patch_size) > 0
        allowed, remedy = "three positive sizes (D, H, W)", "Pass (64, 128, 128), say."
        require(holds, "patch_size", where, allowed=allowed, given=self.patch_size, remedy=remedy)
        allowed, remedy = "a positive number", "Pass 2, as the paper."
        require(self.batch_size > 0, "batch_size", where, allowed=allowed, given=self.batch_size, remedy=remedy)
        allowed, remedy = "a number in [0, 1]", "Pass 0.33, as the paper."
        require(0 <= self.oversample <= 1, "oversample", where, allowed=allowed, given=self.oversample, remedy=remedy)
        holds = self.augment is None or isinstance(self.augment, Augmentation)
        allowed, remedy = "an Augmentation or None", "Leave it out for the paper's, pass None for none."
        require(holds, "augment", where, allowed=allowed, given=self.augment, remedy=remedy)
        allowed, remedy = "axes among 0, 1, 2", "Pass () for no mirroring."
        require(set(self.mirror) <= {0, 1, 2}, "mirror", where, allowed=allowed, given=self.mirror, remedy=remedy)

    @property
    def num_forced(self) -> int:
        """How many patches of a batch are forced to contain foreground: the last ones."""
        return self.batch_size - round(self.batch_size * (1 - self.oversample))

    def plain(self) -> "PatchSettings":
        """Returns the settings of the same patches unchanged: what a training is validated on."""
        return replace(self, augment=None)

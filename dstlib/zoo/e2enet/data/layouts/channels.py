"""What the channels of a data set show, by their names, and how each is therefore normalised."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

from dstlib.errors import require

Modality = Literal["ct", "mri"]
Scheme = Literal["ct", "zscore", "nonorm", "rescale_to_0_1", "rgb_to_0_1"]
SCHEMES: Mapping[Scheme, str] = MappingProxyType(
    {
        "ct": "as CT, by the foreground of the set",
        "zscore": "by z-score, each scan for itself",
        "nonorm": "not at all",
        "rescale_to_0_1": "into [0, 1], each scan for itself",
        "rgb_to_0_1": "into [0, 1], as bytes of a colour",
    }
)
# The words that sets use for what is normalised by z-score: of any other it is not known whether that is meant.
_KNOWN = re.compile(r"mri?|t1\w*|t2\w*|flair|adc|dwi|swi|pd|pet|suv|spect|us|cbct|zscore")
_LIKE_CT = re.compile(r"(?<![a-z])n?c?ct(?![a-z])|computed|tomograph|hounsfield")


def scheme_of(channel: str) -> Scheme:
    """Tells how a channel is normalised, by its name: one of :data:`SCHEMES` in any capitals, or else by z-score.

    Reference: nnU-Net 2.8.1, which reads ``channel_names`` likewise; in sets of the Decathlon they are ``modality``.

    >>> [scheme_of(name) for name in ("CT", "noNorm", "MRI", "T1w", "PET", "CT scan")]
    ['ct', 'nonorm', 'zscore', 'zscore', 'zscore', 'zscore']
    """
    name = channel.casefold()
    return next((scheme for scheme in SCHEMES if scheme == name), "zscore")


def schemes_of(channels: Sequence[str], modality: Modality | None = None) -> tuple[Scheme, ...]:
    """Tells how each channel is normalised: as it is called, or all alike by the modality that is passed.

    Raises:
        SettingError: There is no such modality.

    >>> schemes_of(("CT", "PET")), schemes_of(("CT", "PET"), "mri")
    (('ct', 'zscore'), ('zscore', 'zscore'))
    """
    known, remedy = get_args(Modality), "Pass mri (--modality mri) for whatever is not measured in Hounsfield units."
    allowed, where = " or ".join(known), "the channels"
    require(modality in (None, *known), "modality", where, allowed=allowed, given=repr(modality), remedy=remedy)
    if modality is None:
        return tuple(map(scheme_of, channels))
    return ("ct" if modality == "ct" else "zscore",) * len(channels)


def modality_of(schemes: Sequence[Scheme]) -> Modality | None:
    """Tells the modality by which all channels would be normalised as they are; None if there is none.

    >>> modality_of(("ct",)), modality_of(("zscore", "zscore")), modality_of(("ct", "zscore"))
    ('ct', 'mri', None)
    """
    return next((name for name in get_args(Modality) if schemes_of(schemes, name) == tuple(schemes)), None)


def name_oddity(channel: str) -> str | None:
    """Says whether it is not known if a channel of this name is meant to be normalised as it is; None if it is.

    >>> name_oddity("PET")
    >>> name_oddity("CT scan")
    "is called 'CT scan', which is normalised by z-score, each scan for itself, as only 'CT' itself means CT"
    """
    name = channel.casefold()
    if name in SCHEMES or _KNOWN.fullmatch(name.strip()):
        return None
    told = f"is called {channel!r}, which is normalised {SCHEMES['zscore']}"
    if _LIKE_CT.search(name):
        return f"{told}, as only 'CT' itself means CT"
    return f"{told}, as is every name that is not known"

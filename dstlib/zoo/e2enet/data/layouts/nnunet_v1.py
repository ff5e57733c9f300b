"""The layout of nnU-Net v1's raw data: TaskXXX_NAME with the Decathlon's dataset.json, and one file per channel.

The list names imagesTr/NAME.nii.gz, and the files are imagesTr/NAME_0000.nii.gz, imagesTr/NAME_0001.nii.gz, ...
"""

from pathlib import Path

from dstlib.zoo.e2enet.data.layouts.decathlon import decathlon_keys, read_decathlon
from dstlib.zoo.e2enet.data.layouts.files import channel_file
from dstlib.zoo.e2enet.data.layouts.lists import listed_images
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest
from dstlib.zoo.e2enet.data.layouts.source import Source


def nnunet_v1_evidence(source: Source) -> str | None:
    """Says by what a set is nnU-Net v1's: the Decathlon's entries, and a listed image that is there by channels."""
    keys = decathlon_keys(source)
    if keys is None:
        return None
    files = (channel_file(Path(image), 0) for image in listed_images(source.content))
    found = next((file for file in files if (source.folder / file).exists()), None)
    return f"{keys}, and {found.as_posix()}" if found else None


def read_nnunet_v1(source: Source) -> Manifest:
    """Reads which files a raw data set of nnU-Net v1 consists of.

    Raises:
        DataError: As :func:`~dstlib.zoo.e2enet.data.layouts.decathlon.read_decathlon`.

    Reference: nnU-Net v1's documentation/dataset_conversion.md.
    """
    return read_decathlon(source, layout="nnunet-v1", place=_by_channels)


def _by_channels(folder: Path, images: tuple[str, ...], num_channels: int) -> tuple[Path, ...]:
    return tuple(channel_file(folder / image, i) for image in images for i in range(num_channels))

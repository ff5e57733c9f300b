"""MONAI's data lists: a JSON with 'training', whose entries may hold an image per channel, and the fold of a case.

They are written for programs that know channels and classes already, so both may be missing from them. Of BraTS they
follow from the names of the files, where these are the challenge's; for other sets they are to be written in.
"""

from dataclasses import replace

from dstlib.zoo.e2enet.data.layouts.brats import years_of_files
from dstlib.zoo.e2enet.data.layouts.decathlon import TUMOUR_CHANNELS, read_decathlon
from dstlib.zoo.e2enet.data.layouts.lists import is_data_list, listed_entries
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest
from dstlib.zoo.e2enet.data.layouts.source import LIST, Source


def monai_evidence(source: Source) -> str | None:
    """Says by what a set has a list of MONAI's: another JSON than dataset.json, several images to a case, or folds."""
    if "training" not in source.content:
        return None
    if source.list_name != LIST:
        return f"the data list {source.list_name}"
    return f"lists of images, or folds, in {LIST}" if is_data_list(source.content) else None


def read_monai(source: Source) -> Manifest:
    """Reads which files a data list consists of; its paths begin at its own folder.

    ``modality`` may be text, or one name for all channels. A list without modality and labels is read if its files are
    called as those of BraTS.

    Raises:
        DataError: As :func:`~dstlib.zoo.e2enet.data.layouts.decathlon.read_decathlon`.

    Reference: MONAI's ``load_decathlon_datalist``, and ``datafold_read`` of its tutorials for the folds.
    """
    images = [entry.images for entry in listed_entries(source.content)]
    content = dict(source.content)
    modality, num_channels = content.get("modality"), max(map(len, images), default=1)
    names = [modality] if isinstance(modality, str) else list(modality.values()) if isinstance(modality, dict) else []
    if len(names) == 1:
        content["modality"] = {str(i): names[0] for i in range(num_channels)}
    if (years := years_of_files(images)) is not None:
        content.setdefault("modality", {str(i): name for i, name in enumerate(TUMOUR_CHANNELS)})
        content.setdefault("labels", {"0": "background", **{str(value): name for value, name in years.classes.items()}})
    return read_decathlon(replace(source, content=content), layout="monai")

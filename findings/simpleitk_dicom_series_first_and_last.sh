#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): a DICOM series is placed by its first and last slice, whatever lies between them, without an error.
#
# Seen: 11 slices 2.5 mm apart, read as ImageSeriesReader.GetGDCMSeriesFileNames sorts them. Without the sixth, the spacing is
# 2.78 mm and all slices behind the gap lie elsewhere than they do. Shifted sideways by 0.7 mm each (a tilted gantry), the
# spacing is the slanted distance, 2.6 mm, and the image is upright: its last slice lies 7 mm beside its own position.
# The gap is told by a warning on stderr, the slant by nothing. Whoever needs to know compares ImagePositionPatient of all slices.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check simpleitk==2.5.7 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def read(name, places):
    Path(name).mkdir()
    for number, (x, y, z) in enumerate(places):
        image = sitk.GetImageFromArray(np.zeros((1, 8, 8), np.int16))
        tags = {"0008|0060": "CT", "0020|000e": "1.2.3", "0020|0032": f"{x}\\{y}\\{z}", "0020|0037": "1\\0\\0\\0\\1\\0"}
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(f"{name}/{number}.dcm")
        writer.Execute(image)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(name))
    last = np.array(image.TransformIndexToPhysicalPoint((0, 0, image.GetSize()[2] - 1)))
    off = float(np.linalg.norm(last - places[-1]))
    print(f"SimpleITK {sitk.__version__}, {name}: spacing {image.GetSpacing()[2]:.4g} mm, last slice {off:.3g} mm from its position")
    return image.GetSpacing()[2], off


places = [(0.0, 0.0, 2.5 * number) for number in range(11)]
missing, _ = read("missing", places[:5] + places[6:])
_, off = read("tilted", [(x, 0.28 * z, z) for x, _, z in places])
assert missing > 2.7 and off > 6, "the behaviour has changed"
PYTHON

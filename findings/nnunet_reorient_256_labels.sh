#!/usr/bin/env bash
# nnunetv2 2.8.1: SimpleITKIOWithReorient writes label 256 as 0 and label 300 as 44, without an error.
#
# From 255 foreground classes on, nnU-Net holds a prediction as uint16. SimpleITKIO writes it so; its subclass that turns scans
# to RAS, which dataset.json may name as "overwrite_image_reader_writer", makes uint8 of every prediction. Seen: the labels 0,
# 44, 256 and 300 come back as 0, 44, 256 and 300 by SimpleITKIO and by NibabelIOWithReorient, and as 0 and 44 by
# SimpleITKIOWithReorient: one class has become background, another has become a third.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check simpleitk==2.5.7 nibabel==5.4.2 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nnunetv2==2.8.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkInt16), "image.nii.gz")
labels = np.repeat(np.array([0, 44, 256, 300], np.uint16), 16).reshape(4, 4, 4)
found = []
for kind in (SimpleITKIO, NibabelIOWithReorient, SimpleITKIOWithReorient):
    _, properties = kind().read_images(["image.nii.gz"])
    kind().write_seg(labels, "labels.nii.gz", properties)
    found.append(np.unique(sitk.GetArrayFromImage(sitk.ReadImage("labels.nii.gz"))).tolist())
    print(f"nnunetv2 {version('nnunetv2')}, {kind.__name__}: labels 0, 44, 256 and 300 come back as {found[-1]}")
assert found == [[0, 44, 256, 300], [0, 44, 256, 300], [0, 44]], "the behaviour has changed"
PYTHON

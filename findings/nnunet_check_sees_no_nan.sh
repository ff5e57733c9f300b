#!/usr/bin/env bash
# nnunetv2 2.8.1 with SimpleITK 2.5.7: the check of a data set for NaN passes every NIfTI, as its reader makes 0 of NaN.
#
# ITK 5.4 reads voxels of a NIfTI that are NaN or infinite as 0, without a word (ITK's pull request 6683 keeps them), and
# nnU-Net reads .nii.gz by SimpleITK where dataset.json names nothing else. Seen: an image of 512 voxels, 64 of them NaN and 64
# infinite, written by SimpleITK as .nii.gz and .mha. check_cases, which --verify_dataset_integrity calls, refuses images with
# NaN: it passes the .nii.gz, of which it sees 512 finite voxels, and refuses the .mha, and the same .nii.gz read by nibabel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    nnunetv2==2.8.1 simpleitk==2.5.7 nibabel==5.4.2 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json as reader_of

voxels = np.ones((8, 8, 8), np.float32)
voxels[0], voxels[1] = np.nan, np.inf
found = []
for ending, named in ((".nii.gz", {}), (".mha", {}), (".nii.gz", {"overwrite_image_reader_writer": "NibabelIO"})):
    image, label = "image" + ending, "label" + ending
    sitk.WriteImage(sitk.GetImageFromArray(voxels), image)
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((8, 8, 8), np.uint8)), label)
    reader = reader_of({"file_ending": ending, **named}, image, verbose=False)
    finite = int(np.isfinite(reader().read_images([image])[0]).sum())
    found.append((finite, check_cases([image], label, 1, reader)))
    verdict = "passed" if found[-1][1] else "refused"
    print(f"nnunetv2 {version('nnunetv2')}, {ending} by {reader.__name__}: {finite} of 512 voxels are finite, {verdict}")
assert found == [(512, True), (384, False), (384, False)], "the behaviour has changed"
PYTHON

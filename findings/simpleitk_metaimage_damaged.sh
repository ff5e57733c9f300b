#!/usr/bin/env bash
# SimpleITK 2.5.7 (ITK 5.4): a packed MetaImage whose bytes are damaged is read without an error, as memory that was never written.
#
# Seen: one byte changed in the zlib stream of an .mha. "Uncompress failed" appears on stderr, ReadImage returns an image of the
# right size, and its voxels are whatever was in memory: of 27,000 that were all 7, none or few are. The checksum alone
# changed: the voxels are right, and stderr says the same. A program that reads stdout or catches exceptions sees nothing.
# NRRD's reader raises, as do nibabel's readers of NIfTI. Whoever needs to know unpacks the stream as well (zlib.decompress).
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

voxels = np.full((30, 30, 30), 7, np.int16)
sitk.WriteImage(sitk.GetImageFromArray(voxels), "a.mha", True)
whole = Path("a.mha").read_bytes()
start = whole.index(b"LOCAL\n") + 6
Path("b.mha").write_bytes(whole[:start + 2] + bytes([whole[start + 2] ^ 0xFF]) + whole[start + 3:])
try:
    right = int((sitk.GetArrayFromImage(sitk.ReadImage("b.mha")) == 7).sum())
except RuntimeError:
    right = None
print(f"SimpleITK {sitk.__version__}: of {voxels.size} voxels that were 7, {right} are, and there was no error")
assert right is not None and right < voxels.size, "the behaviour has changed"
PYTHON

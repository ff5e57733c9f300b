"""What is measured of a set of every layout is what nnU-Net measures of the same scans."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.manifest import Manifest
from dstlib.zoo.e2enet.data.preprocessing.cache import measure
from tests.layout_sets import AFFINE, SETS, numbered, save, write_json

pytestmark = pytest.mark.long

NUM_DRAWN = 4_000_000  # voxels of a set, of which nnU-Net draws 10⁸: a minute, and gigabytes, for each of these
ASK = f"""
import sys
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        extractor = DatasetFingerprintExtractor(number, 1)
        extractor.num_foreground_voxels_for_intensitystats = {NUM_DRAWN}
        extractor.run()
"""


def convert(manifest: Manifest, folder: Path) -> None:
    """Copies the files of a set to a raw set of nnU-Net v2; of several masks their union, as it measures no more."""
    for case in manifest.train:
        for channel, image in enumerate(case.images):
            (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / f"imagesTr/{case.name}_{channel:04d}.nii.gz")
        union = np.max([np.asanyarray(nibabel.load(file).dataobj) for file in case.label_files], axis=0)
        save(folder / f"labelsTr/{case.name}.nii.gz", (union > 0).astype(np.uint8))
    labels = {"background": 0, "foreground": 1}
    content = {"channel_names": numbered(manifest.channels), "labels": labels, "numTraining": len(manifest.train)}
    write_json(folder / "dataset.json", content | {"file_ending": ".nii.gz"})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The manifest and nnU-Net's fingerprint of a set of each layout."""
    pytest.importorskip("nnunetv2")
    folder = tmp_path_factory.mktemp("fingerprints")
    manifests, names = {}, {}
    for number, kind in enumerate(SETS, start=1):
        manifests[kind] = read_manifest(SETS[kind](folder / kind))
        names[kind] = f"Dataset{number:03d}_{manifests[kind].layout}"
        convert(manifests[kind], folder / "raw" / names[kind])
    script = folder / "ask.py"
    script.write_text(ASK)
    places = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    numbers = [str(number) for number in range(1, len(SETS) + 1)]
    subprocess.run([sys.executable, script, *numbers], env={**os.environ, **places}, check=True, capture_output=True)
    file = "dataset_fingerprint.json"
    found = {kind: json.loads((folder / "preprocessed" / name / file).read_text()) for kind, name in names.items()}
    return {kind: (manifests[kind], found[kind]) for kind in SETS}


@pytest.mark.parametrize("kind", SETS)
def test_spacings_shapes_and_intensities_are_those_of_nnunet(theirs, tmp_path, kind):
    manifest, expected = theirs[kind]
    found = measure(manifest, manifest.train, folder=tmp_path, progress=False)
    # Both count z, y, x, which is the canonical order of these scans. float32 in the headers, read as double.
    assert np.allclose(found.spacings, expected["spacings"], rtol=1e-6)
    assert np.allclose(found.spacings, np.diag(np.abs(AFFINE))[2::-1], rtol=1e-6)
    assert [list(shape) for shape in found.shapes] == expected["shapes_after_crop"]
    assert np.median(found.kept) == pytest.approx(expected["median_relative_size_after_cropping"])
    theirs_by_channel = expected["foreground_intensity_properties_per_channel"]
    assert len(found.intensities) == len(theirs_by_channel) == len(manifest.channels)
    for channel, ours in enumerate(found.intensities):
        other = theirs_by_channel[str(channel)]
        # Theirs are drawn: within five standard errors. A percentile is a whole number, and may be the next one where
        # half a per cent ends within such an error of it.
        error = 5 * ours.std / np.sqrt(NUM_DRAWN)
        assert ours.mean == pytest.approx(other["mean"], abs=error)
        assert ours.std == pytest.approx(other["std"], abs=error)
        assert ours.low == pytest.approx(other["percentile_00_5"], abs=1)
        assert ours.high == pytest.approx(other["percentile_99_5"], abs=1)

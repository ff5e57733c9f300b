"""What a channel is called settles how it is normalised, as nnU-Net reads it; a recipe for something else says so."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_runs import write_nifti, write_set

from dstlib.errors import DataError, SettingError
from dstlib.typed_json import parse_json
from dstlib.zoo.e2enet.cli import main, read_config
from dstlib.zoo.e2enet.data.layouts.channels import Scheme, modality_of, name_oddity, scheme_of, schemes_of
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.data.preprocessing.cache import prepared_cases
from dstlib.zoo.e2enet.data.preprocessing.normalization import CtNormalization, RangeNormalization, ZScoreNormalization
from dstlib.zoo.e2enet.data.preprocessing.preprocessor import Preparation
from dstlib.zoo.e2enet.dataset import DataSettings, open_dataset
from dstlib.zoo.e2enet.recipes import AMOS_RECIPE, BRATS_RECIPE, RECIPES
from dstlib.zoo.e2enet.training.ranks import Ranks

RANKS = Ranks(rank=0, num=1)
SHAPE = (9, 9, 9)
VOXELS = arrays(np.float32, (2, 3, 4), elements=st.floats(-1000, 1000, width=32))


def renamed(folder, *channels, key="modality"):
    """A set of scans whose dataset.json calls the channels so."""
    file = folder / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: {str(i): name for i, name in enumerate(channels)}}))
    return folder


def write_channels(folder, *channels, num_scans=5, images=None):
    """Writes a set in nnU-Net's layout, channel i of which lies around 100 · (i + 1); the label is a box."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(num_scans):
        rng = np.random.default_rng(number)
        label = np.zeros(SHAPE, np.uint8)
        label[2:5, 2:6, 2:6] = 1
        for i in range(len(channels)):
            image = (rng.normal(100 * (i + 1), 5, SHAPE) + 30 * label).astype(np.float32)
            image = image if images is None else images(image)
            write_nifti(folder / f"imagesTr/scan_{number}_{i:04d}.nii.gz", image)
        write_nifti(folder / f"labelsTr/scan_{number}.nii.gz", label)
    content = {"labels": {"background": 0, "box": 1}, "numTraining": num_scans, "file_ending": ".nii.gz"}
    names = {str(i): name for i, name in enumerate(channels)}
    (folder / "dataset.json").write_text(json.dumps(content | {"channel_names": names}))
    return folder


def opened(folder, tmp_path, **settings):
    asked = DataSettings(phantoms=("hippocampus", 5), folder=folder, cache=tmp_path / "cache", **settings)
    return open_dataset(asked, workers=0, ranks=RANKS)


# ---- names


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("CT", "ct"), ("ct", "ct"), ("Ct", "ct")),
        *(("noNorm", "nonorm"), ("NONORM", "nonorm"), ("zscore", "zscore"), ("zScore", "zscore")),
        *(("rescale_to_0_1", "rescale_to_0_1"), ("RGB_to_0_1", "rgb_to_0_1")),
        *((name, "zscore") for name in ("MRI", "T1w", "t1gd", "T2w", "FLAIR", "ADC", "PET")),
        *((name, "zscore") for name in ("CT scan", " CT", "CT_portal", "CBCT", "0", "image", "", "no norm")),
    ],
)
def test_a_name_settles_the_scheme_as_in_nnunet(name, scheme):
    assert scheme_of(name) == scheme


@given(st.text(max_size=12) | st.sampled_from(["Ct", "NoNorm", "zScore", "Rescale_To_0_1", "RGB_to_0_1"]))
def test_nnunet_itself_reads_every_name_likewise(name):
    where = "nnunetv2.preprocessing.normalization.map_channel_name_to_normalization"
    theirs = pytest.importorskip(where).get_normalization_scheme(name).__name__
    named: dict[Scheme, str] = {
        "ct": "CTNormalization",
        "zscore": "ZScoreNormalization",
        "nonorm": "NoNormalization",
        "rescale_to_0_1": "RescaleTo01Normalization",
        "rgb_to_0_1": "RGBTo01Normalization",
    }
    assert named[scheme_of(name)] == theirs


@pytest.mark.parametrize(
    "name", ["CT", "MRI", "mr", "T1", "T1w", "T1gd", "t2f", "FLAIR", "ADC", "PET", "noNorm", "zscore"]
)
def test_what_sets_call_their_channels_is_known(name):
    assert name_oddity(name) is None


@pytest.mark.parametrize("name", ["CT scan", " CT", "CT_portal", "NCCT", "contrast-enhanced CT", "Computed tomography"])
def test_a_channel_that_reads_like_ct_and_is_none_is_told(name):
    assert "only 'CT' itself means CT" in name_oddity(name)


@pytest.mark.parametrize("name", ["0", "image", "channel 0", "actual", "x"])
def test_a_name_that_is_not_known_is_told(name):
    assert (
        name_oddity(name) == f"is called {name!r}, which is normalised by z-score, each scan for itself, as is every "
        "name that is not known"
    )


def test_a_modality_stands_for_all_channels():
    assert schemes_of(("CT", "PET"), "ct") == ("ct", "ct")
    assert (modality_of(("zscore", "zscore")), modality_of(("ct", "nonorm"))) == ("mri", None)
    with pytest.raises(SettingError, match=r"modality of the channels: expected ct or mri, got 'pet'"):
        schemes_of(("CT",), "pet")


# ---- rules


@given(VOXELS)
def test_no_normalisation_keeps_every_bit(image):
    assert RangeNormalization(kind="nonorm").apply(image).tobytes() == image.tobytes()


@given(VOXELS)
def test_rescaled_intensities_go_from_0_to_1(image):
    out = RangeNormalization(kind="rescale_to_0_1").apply(image)
    assert out.dtype == np.float32
    assert out.min() == 0
    # below 1e-8 between the ends nnU-Net divides by that in the place of the range
    assert out.max() == 1 or image.max() - image.min() < 1e-8
    assert (np.diff(out.ravel()[np.argsort(image.ravel())]) >= 0).all()


@given(VOXELS)
def test_colours_are_bytes(image):
    rule = RangeNormalization(kind="rgb_to_0_1")
    if image.min() < 0 or image.max() > 255:
        with pytest.raises(DataError, match="voxels of a channel rgb_to_0_1: expected 0 to 255, got "):
            rule.apply(image)
    else:
        assert np.array_equal(rule.apply(image), image / np.float32(255))


@given(seed=st.integers(0, 2**32 - 1), centre=st.floats(-500, 500), spread=st.floats(1, 500))
def test_rules_equal_those_of_nnunet(seed, centre, spread):
    theirs = pytest.importorskip("nnunetv2.preprocessing.normalization.default_normalization_schemes")
    rng = np.random.default_rng(seed)
    image = rng.normal(centre, spread, (4, 5, 6)).astype(np.float32)
    mask = rng.random(image.shape) < 0.5
    mask[0, 0, :2] = True
    low, high = centre - spread, centre + spread
    asked = {"percentile_00_5": low, "percentile_99_5": high, "mean": centre, "std": spread}
    head, colours = np.where(mask, image, np.float32(0)), np.abs(image).clip(0, 255)
    pairs = [
        (CtNormalization(low=low, high=high, mean=centre, std=spread), image, theirs.CTNormalization(False, asked)),
        (ZScoreNormalization(), image, theirs.ZScoreNormalization(False, {})),
        (ZScoreNormalization(inside_mask=True), head, theirs.ZScoreNormalization(True, {})),
        (RangeNormalization(kind="nonorm"), image, theirs.NoNormalization(False, {})),
        (RangeNormalization(kind="rescale_to_0_1"), image, theirs.RescaleTo01Normalization(False, {})),
        (RangeNormalization(kind="rgb_to_0_1"), colours, theirs.RGBTo01Normalization(False, {})),
    ]
    for rule, voxels, other in pairs:
        expected = other.run(voxels.copy(), np.where(mask, 0, -1))
        assert expected.dtype == np.float32
        # a mean of 500 has a rounding of 3e-5 in float32, in which nnU-Net measures, and is divided by 1 at least
        np.testing.assert_allclose(rule.apply(voxels, mask), expected, rtol=1e-5, atol=1e-4)


RULES = (
    CtNormalization(low=0.0, high=1.0, mean=0.5, std=0.2),
    ZScoreNormalization(inside_mask=True),
    *(RangeNormalization(kind=kind) for kind in ("nonorm", "rescale_to_0_1", "rgb_to_0_1")),
)


def test_rules_are_kept_as_json_as_they_always_were():
    preparation = Preparation(spacing=(3.0, 2.0, 1.0), normalization=RULES)
    text = json.dumps(preparation.to_json()).encode()
    assert parse_json(text, Preparation, where="a test", remedy="") == preparation
    assert preparation.to_json()["normalization"][1] == {"kind": "mri", "inside_mask": True}
    with pytest.raises(ValueError, match="expected 'nonorm' or 'rescale_to_0_1' or 'rgb_to_0_1', got 'zscore'"):
        parse_json(json.dumps({"kind": "zscore"}).encode(), RangeNormalization, where="a test", remedy="")


# ---- data sets


def test_each_channel_of_a_pet_ct_is_normalised_as_it_is_called(tmp_path, capsys):
    folder = write_channels(tmp_path / "Dataset001_Both", "CT", "PET", "noNorm")
    data = opened(folder, tmp_path, made_for="ct")
    ct, pet, kept = data.preparation.normalization
    assert (ct.kind, pet, kept.kind) == ("ct", ZScoreNormalization(), "nonorm")
    assert 125 < ct.mean < 135  # of the box, 30 above the channel's 100
    image = data.train_on.cases[0].image
    assert abs(image[1].mean()) < 1e-5  # float32
    assert abs(image[1].std() - 1) < 1e-5
    assert 290 < image[2].mean() < 310
    assert data.record().modality == data.modality == "declared"
    assert "Channels are normalised: 'CT' as CT, by the foreground of the set; 'PET' by z-sc" in capsys.readouterr().out


def test_statistics_of_ct_are_those_of_its_own_channel(tmp_path):
    folder = write_channels(tmp_path / "Dataset001_Both", "PET", "CT")
    assert 225 < opened(folder, tmp_path).preparation.normalization[1].mean < 235


def test_a_recipe_that_disagrees_with_the_set_stops_unless_told(tmp_path):
    folder = write_set(tmp_path / "mri")
    told = (
        "channels of data set 'Small': expected CT, for which this recipe is made, got channels that are normalised: "
    )
    with pytest.raises(
        SettingError, match=told + "'MRI' by z-score, each scan for itself. Pass --modality declared to"
    ):
        opened(folder, tmp_path, made_for="ct")
    assert not (tmp_path / "cache").exists()
    for modality in ("declared", "mri"):
        data = opened(folder, tmp_path, made_for="ct", modality=modality)
        assert (data.preparation.normalization, data.modality) == ((ZScoreNormalization(),), "mri")
    data = opened(folder, tmp_path, made_for="ct", modality="ct")
    assert (data.preparation.normalization[0].kind, data.modality) == ("ct", "ct")


def test_a_set_of_ct_is_not_taken_for_mri(tmp_path):
    folder = renamed(write_set(tmp_path / "ct"), "CT")
    with pytest.raises(
        SettingError, match=r"expected MRI, for which this recipe is made, got .* 'CT' as CT, by the fore"
    ):
        opened(folder, tmp_path, made_for="mri")


def test_the_command_line_says_what_a_recipe_is_made_for():
    assert read_config(BRATS_RECIPE, []).data.made_for == "mri"
    assert read_config(AMOS_RECIPE, []).data.modality is None
    assert read_config(BRATS_RECIPE, ["--modality", "ct"]).data.modality == "ct"


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_was_made_for_is_prepared_as_before(name, tmp_path):
    """Its modality was once passed for all channels: what the sets declare makes the same arrays, bit for bit."""
    recipe = RECIPES[name]
    kind, _ = recipe.phantoms
    sizes = {} if kind == "hippocampus" else {"shape": (32, 40, 40)}
    manifest = read_manifest(write_phantoms(tmp_path / kind, kind, num_scans=2, **sizes))
    manifest = replace(manifest, channels=("CT",)) if manifest.layout == "amos" else manifest
    assert schemes_of(manifest.channels) == schemes_of(manifest.channels, recipe.modality)
    prepared = [
        prepared_cases(manifest, manifest.train, modality=modality, folder=tmp_path / str(modality), progress=False)
        for modality in (None, recipe.modality)
    ]
    (declared, plan), (before, old_plan) = prepared
    assert plan == old_plan
    assert asdict(plan)["normalization"][0]["kind"] == recipe.modality
    for case, other in zip(declared.cases, before.cases, strict=True):
        assert np.array_equal(case.image, other.image)


def test_colours_that_are_no_bytes_are_defects(tmp_path, capsys):
    folder = write_channels(tmp_path / "Dataset001_Red", "rgb_to_0_1", images=lambda image: image * 3)
    assert main(["check", str(folder)]) == 1
    assert "in channel 0, which shows a colour, of which they go from 0 to 255" in capsys.readouterr().out
    with pytest.raises(DataError, match="cannot be prepared: voxels of a channel rgb_to_0_1: expected 0 to 255, got "):
        opened(folder, tmp_path)


def test_check_tells_of_names_that_are_not_known(tmp_path, capsys):
    folder = write_channels(tmp_path / "Dataset001_Odd", "CT scan", "PET", "second")
    assert main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "channel 0 is called 'CT scan', which is normalised by z-score, each scan for itself, as only 'CT'" in out
    assert "channel 2 is called 'second', which is normalised by z-score, each scan for itself, as is every" in out
    assert "channel 1" not in out

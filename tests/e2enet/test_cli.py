"""check, predict, evaluate, compare and phantoms, as a user gives them."""

import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import torch

from dstlib.errors import SettingError, StateError
from dstlib.zoo.e2enet import report as report_module
from dstlib.zoo.e2enet.__main__ import main
from dstlib.zoo.e2enet.checkpoint import load_trained
from dstlib.zoo.e2enet.cli import read_config
from dstlib.zoo.e2enet.compare import compare, row_of
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.recipes import HIPPOCAMPUS_RECIPE
from dstlib.zoo.e2enet.run import run_recipe

SHORT = ("--preset", "demo", "--epochs", "1", "--iterations", "2", "--interval", "1", "--patch-size", "16", "16", "16")


@pytest.fixture(scope="module", autouse=True)
def _without_figures():
    """Leaves out what takes longest of the shortest runs: tests of the examples look at figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "_draw", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with phantoms, and with the runs of two folds on them."""
    folder = tmp_path_factory.mktemp("work")
    data = write_phantoms(folder / "data", "hippocampus", num_scans=5, progress=False)
    for fold in ("0", "1"):
        options = ("--data", str(data), "--cache", str(folder / "cache"), *SHORT, "--fold", fold)
        run = ("--run-dir", str(folder / f"fold{fold}"))
        run_recipe(read_config(HIPPOCAMPUS_RECIPE, [*options, *run]))
    return folder


@pytest.fixture
def command(capsys):
    """Runs a command: its exit code, stdout and stderr."""

    def run(*arguments):
        return main([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


def test_a_sound_set_has_no_defects_and_a_damaged_one_has_exit_code_one(work, tmp_path, command):
    code, output, _ = command("check", work / "data")
    assert code == 0
    assert "7 cases, 0 defects" in output
    folder = shutil.copytree(work / "data", tmp_path / "data")
    image = sorted((folder / "imagesTr").glob("*.nii.gz"))[1]
    image.write_bytes(image.read_bytes()[:100])
    code, output, _ = command("check", folder)
    assert code == 1
    assert any("DEFECT" in line and image.name.split(".")[0] in line for line in output.splitlines()), output
    code, _, errors = command("check", tmp_path / "missing")
    assert code == 2
    assert errors.startswith("error: ")


def test_the_engine_predicts_the_same(work, tmp_path, command):
    images = work / "data" / "imagesTs"
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    for output, options in ((plain, ("--device", "cpu", "--no-engine")), (fast, ("--engine",))):
        code, table, _ = command("predict", work / "fold0", "--images", images, "--output", output, *options)
        assert code == 0, table
    for image in images.glob("*.nii.gz"):
        one, other = (np.asarray(nibabel.load(folder / image.name).dataobj) for folder in (plain, fast))
        assert (one != other).mean() < 1e-3  # voxels of two classes that are probable alike go by rounding


def test_predict_says_what_it_computes_on_and_refuses_to_skip_what_may_be_something(work, tmp_path, command):
    predict = (
        "predict",
        work / "fold0",
        "--images",
        work / "data" / "imagesTs",
        "--output",
        tmp_path,
        "--device",
        "cpu",
    )
    code, table, _ = command(*predict)
    assert code == 0
    assert re.match(r"Computed (on the engine, [\d.]+ times as fast as in torch on 32×32×32 voxels|in torch)", table)
    code, told, errors = command(*predict, "--skip-empty")
    assert (code, told) == (2, "")
    assert "skip_empty of Trained: expected channels that are CTs" in errors


def test_predict_goes_on_past_a_damaged_file_and_is_continued(work, tmp_path, command):
    images, output = shutil.copytree(work / "data" / "imagesTs", tmp_path / "images"), tmp_path / "out"
    (images / "broken.nii.gz").write_bytes(b"no image")
    runs = (work / "fold0", work / "fold1")
    code, table, _ = command("predict", *runs, "--images", images, "--output", output, "--device", "cpu")
    assert code == 1
    assert "2 predicted, 0 kept as they were, 1 failed" in table
    assert "broken" in table
    (images / "broken.nii.gz").unlink()
    for image in images.glob("*.nii.gz"):
        label = nibabel.load(output / image.name)
        assert label.shape == nibabel.load(image).shape
        assert np.array_equal(label.affine, nibabel.load(image).affine)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2}
    code, _, errors = command("predict", runs[0], "--images", images, "--output", output)
    assert code == 2  # what is there is of other networks
    assert "--overwrite" in errors
    code, table, _ = command("predict", *runs, "--images", images, "--output", output, "--device", "cpu")
    assert code == 0
    assert "0 predicted, 2 kept" in table
    (images / "scan.img").touch()
    code, table, _ = command("predict", work / "fold1", "--images", images, "--output", output, "--overwrite")
    assert code == 0
    assert "2 predicted, 0 kept" in table
    assert f"Note: 1 file in {images.name} left out, as no scan has such a name: scan.img." in table


def test_output_that_is_a_file_is_refused_before_any_work(work, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    for arguments in (
        ("predict", work / "fold0", "--images", work / "data" / "imagesTs", "--output", tmp_path / "file"),
        ("evaluate", work / "fold0" / "predictions", "--data", work / "data", "--output", tmp_path / "file"),
    ):
        code, _, errors = command(*arguments)
        assert code == 2
        assert "expected a folder to write to" in errors.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "mine"


def test_channels_that_a_network_does_not_have_are_no_cases(work, tmp_path, command):
    images = tmp_path / "images"
    images.mkdir()
    for number in (0, 1):
        shutil.copy(next((work / "data" / "imagesTs").glob("*.nii.gz")), images / f"scan_000{number}.nii.gz")
    code, _, errors = command("predict", work / "fold0", "--images", images, "--output", tmp_path / "out")
    assert code == 2
    assert "scan in more numbered files" in errors


def test_evaluating_what_a_run_predicted_gives_its_scores(work, tmp_path, command):
    code, table, _ = command(
        "evaluate",
        work / "fold0" / "predictions",
        "--data",
        work / "data",
        "--allow-missing",
        "--output",
        tmp_path / "scores",
    )
    assert code == 0
    result = json.loads((work / "fold0" / "result.json").read_text())
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores["cases"] == result["cases"]
    assert scores["geometry"] == "itk"
    assert f"{result['mean_dice']:.3f}" in table
    assert "1 of the 5 labelled cases" in table
    assert table.count("hippocampus_") >= 4, "the other four are named"
    assert (tmp_path / "scores" / "scores.csv").read_text() == (work / "fold0" / "scores.csv").read_text()


def test_a_table_of_runs_beside_the_papers(work, command):
    code, table, _ = command("compare", work / "fold0", work / "fold1", "--beside", "amos")
    assert code == 0
    assert all(name in table for name in ("fold0", "fold1", "nnU-Net", "E2ENet s=0.8"))
    assert "16×16×16 in fold0" in table
    code, table, _ = command("compare", work / "fold0", work / "fold1", "--pool")
    scores = [json.loads((work / f"fold{fold}" / "result.json").read_text()) for fold in (0, 1)]
    mean = np.mean([list(case["dice"].values()) for score in scores for case in score["cases"].values()])
    (row,) = [line for line in table.splitlines() if line.startswith("all 2 held-out cases")]
    assert float(row.split()[4]) == round(100 * float(mean), 1)
    code, _, errors = command("compare", work / "fold0", "--beside", "kits")
    assert code == 2
    assert "amos, " in errors
    with pytest.raises(StateError, match=r"result\.json of run .*missing.*--resume"):
        compare([work / "missing"])


def without_structures(run, *, mean):
    """Makes a run one whose held-out cases show no class (None), or whose predictions missed all of them (0)."""
    result = json.loads((run / "result.json").read_text())
    for case in result["cases"].values():
        for metric in ("dice", "nsd", "hd95", "hd"):
            case[metric] = dict.fromkeys(case[metric], None if metric.startswith("hd") else mean)
    means = {f"mean_{metric}": None if metric.startswith("hd") else mean for metric in ("dice", "nsd", "hd95", "hd")}
    (run / "result.json").write_text(json.dumps(unsealed({**result, **means})))
    return run


def test_scores_of_0_and_none_are_shown_beside_the_others(work, tmp_path, command):
    runs = [shutil.copytree(work / "fold0", tmp_path / name) for name in ("zero", "none")]
    for run, mean in zip(runs, (0.0, None), strict=True):
        without_structures(run, mean=mean)
    code, table, _ = command("compare", *runs, work / "fold1", "--beside", "amos")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["zero"][1] == "0.0"
    assert float(rows["zero"][-1]) < float(rows["fold1"][-1])
    assert (rows["none"][1], rows["none"][-1]) == ("-", "-")
    for run, dice in zip(runs, ("0.0", "-"), strict=True):
        code, table, _ = command("compare", run, "--pool")
        assert code == 0
        assert [line.split()[4] for line in table.splitlines() if line.startswith("all 1 held-out cases")] == [dice]


def test_two_classes_of_one_name_are_refused_in_every_file_of_a_run(work, tmp_path, command):
    for name, path in (("result.json", ("classes",)), ("config.json", ("data", "classes"))):
        run = shutil.copytree(work / "fold0", tmp_path / name)
        content = unsealed(json.loads((run / name).read_text()))
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = ["Anterior", "Anterior"]
        (run / name).write_text(json.dumps(content))
        code, _, errors = command("compare" if name == "result.json" else "predict", run, *_unused(name, tmp_path))
        assert code == 2
        assert "expected each name once, got Anterior more than once" in errors


def _unused(name, tmp_path):
    return () if name == "result.json" else ("--images", tmp_path, "--output", tmp_path / "out")


def test_runs_of_other_classes_are_told_apart(work, tmp_path, command):
    other = shutil.copytree(work / "fold1", tmp_path / "other")
    text = (other / "result.json").read_text().replace("Anterior", "Head")
    (other / "result.json").write_text(json.dumps(unsealed(json.loads(text))))
    code, table, _ = command("compare", work / "fold0", other)
    assert code == 0
    assert "mDice is over other classes: Anterior, Posterior in fold0, Head, Posterior in other" in table
    code, _, errors = command("compare", work / "fold0", other, "--pool")
    assert code == 2
    assert "classes of the runs to pool" in errors


def test_runs_on_other_data_sets_and_by_other_rules_are_told_apart(work, tmp_path, command):
    assert "Scores are" not in command("compare", work / "fold0", work / "fold1")[1]
    other = shutil.copytree(work / "fold1", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["data"] |= {"name": "Other", "geometry": "sform"}
    (other / "config.json").write_text(json.dumps(unsealed(config)))
    code, table, _ = command("compare", work / "fold0", other)
    assert code == 0
    assert re.search(r"Scores are on other data sets: \S+ in fold0, Other in other\.", table)
    assert "by other rules: --geometry itk in fold0, --geometry sform in other." in table


def test_missing_predictions_are_an_error_unless_allowed(work, tmp_path, command):
    predictions = shutil.copytree(work / "fold0" / "predictions", tmp_path / "predictions")
    evaluate = ("evaluate", predictions, "--data", work / "data", "--output", tmp_path / "scores")
    code, _, errors = command(*evaluate)
    assert code == 2
    assert "expected one for each of the 5 labelled cases" in errors
    assert "--allow-missing" in errors
    assert not (tmp_path / "scores" / "scores.csv").exists()
    shutil.copy(next(predictions.glob("*.nii.gz")), predictions / "other.nii.gz")
    code, table, _ = command(*evaluate, "--allow-missing")
    assert code == 0
    assert "Predictions without a label, which are not scored: other." in table
    next(predictions.glob("hippo*.nii.gz")).unlink()
    code, _, errors = command(*evaluate, "--allow-missing")
    assert code == 2, "nothing is left to score"
    assert "--allow-missing" not in errors, "it was passed"


def test_the_row_of_a_run_is_what_it_reported(work):
    row, result = row_of(work / "fold0"), json.loads((work / "fold0" / "result.json").read_text())
    assert row.dice == 100 * result["mean_dice"]
    assert row.params == result["cost"]["sparse"]["params"] / 1e6
    assert row.flops == result["cost"]["sparse"]["flops"]["paper"] / 1e9


def test_runs_of_before_keep_the_rule_by_which_they_read_headers(work, tmp_path):
    """A build that knew no rules read as nibabel does: such a run predicts so, and is continued so."""
    assert json.loads((work / "fold0" / "config.json").read_text())["data"]["geometry"] == "itk"
    assert load_trained([work / "fold0"]).geometry == "itk"
    older = shutil.copytree(work / "fold0", tmp_path / "older")
    for file, *keys in ((older / "config.json", "data"), (older / "predictions" / "prediction.json",)):
        content = unsealed(json.loads(file.read_text()))
        del (content[keys[0]] if keys else content)["geometry"]
        file.write_text(json.dumps(content))
    saved = torch.load(older / "checkpoint.pt", weights_only=True)
    del saved["config"]["data"]["geometry"]
    torch.save(saved, older / "checkpoint.pt")
    assert load_trained([older]).geometry == "sform"
    with pytest.raises(StateError, match="got other geometry"):
        load_trained([work / "fold0", older])
    options = (
        "--data",
        str(work / "data"),
        "--cache",
        str(work / "cache"),
        *SHORT,
        "--run-dir",
        str(older),
        "--resume",
    )
    run_recipe(read_config(HIPPOCAMPUS_RECIPE, options))
    with pytest.raises(StateError, match=r"data\.geometry nothing, got data\.geometry itk"):
        run_recipe(read_config(HIPPOCAMPUS_RECIPE, (*options, "--geometry", "itk")))


def test_an_ensemble_is_of_runs_on_one_data_set(work, tmp_path):
    trained = load_trained([work / "fold0", work / "fold1"])
    assert len(trained.models) == 2
    other = shutil.copytree(work / "fold1", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["data"]["classes"] = ["head", "tail"]
    (other / "config.json").write_text(json.dumps(unsealed(config)))
    with pytest.raises(StateError, match=r"expected a run on the same data as .*fold0, got other classes"):
        load_trained([work / "fold0", other])


def unsealed(content):
    """What is in a document, without its checksum."""
    return {key: value for key, value in content.items() if key != "crc32"}


def edit(file, *path):
    """Writes another value, the last of these, to where the others lead."""
    *keys, last, value = path
    place = content = json.loads(file.read_text())
    for key in keys:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(content))


def change_model(run, change):
    weights = torch.load(run / "model.pt", weights_only=True)
    change(weights)
    torch.save(weights, run / "model.pt")


def other_model(run):
    change_model(run, lambda weights: next(iter(weights.values())).neg_())


def denser_model(run):
    change_model(run, lambda weights: [w.fill_(1.0) for name, w in weights.items() if name.startswith("fusion.")])
    (run / "result.json").unlink()  # which would tell first


def diverged_model(run):
    change_model(run, lambda weights: next(iter(weights.values())).view(-1)[:1].fill_(torch.nan))


def renamed_weight(run):
    change_model(run, lambda weights: weights.update(other=weights.popitem()[1]))


def reshaped_weight(run):
    change_model(run, lambda weights: weights.update({next(iter(weights)): torch.ones(1)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "model.pt").unlink(), "expected the weights of this run, got no such file.*--resume"),
        (lambda run: (run / "model.pt").write_bytes(b"?"), "a damaged or foreign file"),
        (lambda run: (run / "config.json").write_text("{"), r"config\.json of run"),
        (
            lambda run: (run / "config.json").write_text('{"name": "x"}'),
            r"name of config\.json of run .*none but recipe",
        ),
        (other_model, r"model\.pt of run .*expected the file with the SHA-256 .*, which result\.json tells of"),
        (denser_model, r"model\.pt of run .*expected at most \d+ connections in the fusion, .* got "),
        (diverged_model, r"model\.pt of run .*expected finite numbers in .*, got 1 that are NaN or infinite"),
        (renamed_weight, r"model\.pt of run .*expected the \d+ weights .* got 1 missing \(.*\), 1 more \(other\)"),
        (reshaped_weight, r"model\.pt of run .*expected .* as torch\.float32 .*, got torch.float32 \(1,\)"),
        (lambda run: edit(run / "config.json", "patches", "patch_size", [16, 16, 15]), r"crc32 of config\.json of run"),
        (lambda run: edit(run / "config.json", "network", "heads", 0), r"network of config\.json of run .*heads"),
        (lambda run: edit(run / "config.json", "network", {}), r"network\.in_channels of config\.json .* got nothing"),
        (lambda run: edit(run / "config.json", "network", "evil", 1), r"network\.evil of config\.json of run"),
        (lambda run: edit(run / "config.json", "data", "x"), r"data of config\.json of run .* got 'x'"),
        (
            lambda run: edit(run / "config.json", "data", "classes", ["a"]),
            r"content of config\.json .*value of ConfigRecord",
        ),
        (lambda run: edit(run / "result.json", "postprocessing", ["a"]), r"postprocessing\[0\] of result\.json of run"),
        (lambda run: edit(run / "result.json", "postprocessing", [1]), r"crc32 of result\.json of run"),
        (lambda run: edit(run / "result.json", "mean_dice", 1.0), r"crc32 of result\.json of run"),
    ],
)
def test_a_run_that_cannot_predict_says_why(work, tmp_path, damage, message):
    run = shutil.copytree(work / "fold0", tmp_path / "run")
    damage(run)
    with pytest.raises(StateError, match=message):
        load_trained([run])


def test_postprocessing_is_what_every_fold_agrees_on(work, tmp_path):
    runs = [shutil.copytree(work / f"fold{fold}", tmp_path / f"fold{fold}") for fold in (0, 1)]
    for run, classes in zip(runs, ([1, 2], [2]), strict=True):
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(unsealed({**result, "postprocessing": classes})))
    assert load_trained(runs).postprocessing == (2,)
    (runs[0] / "result.json").unlink()
    assert load_trained(runs).postprocessing == ()


def test_phantoms_are_drawn_where_asked(tmp_path, command):
    code, output, _ = command("phantoms", "brats", tmp_path / "brats", "--scans", 5)
    assert code == 0
    assert output.strip() == str(tmp_path / "brats")
    assert (tmp_path / "brats" / "dataset.json").exists()


def test_maps_are_computed_once_more_by_an_e2enet_alone():
    assert read_config(HIPPOCAMPUS_RECIPE, ["--recompute", "--model", "e2enet_plus"]).execution.recompute
    with pytest.raises(SettingError, match="--recompute of the command line: expected the model e2enet or e2enet_plus"):
        read_config(HIPPOCAMPUS_RECIPE, ["--recompute", "--model", "nnunet"])


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"dstlib.zoo.e2enet {name} " in text for name in ("check", "predict", "evaluate", "compare", "phantoms"))

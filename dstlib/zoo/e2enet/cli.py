"""The command lines of the zoo: to train a recipe, and ``python -m dstlib.zoo.e2enet`` for all else.

What is heavy, torch above all, is imported by the command that needs it, once its options are read.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dstlib.command_line import make_parser, run_command
from dstlib.errors import DataError, SettingError, few
from dstlib.names import METHOD_NAMES
from dstlib.zoo.e2enet.data.layouts.manifest import Geometry, Manifest
from dstlib.zoo.e2enet.recipes import Preset, Recipe
from dstlib.zoo.e2enet.training.settings import OPTIMIZERS, PRECISIONS, SPARSE_MODELS

if TYPE_CHECKING:
    from dstlib.zoo.e2enet.inference.predict import Trained
    from dstlib.zoo.e2enet.run import RunConfig

HELP = {
    "epochs": "number of epochs; after each the learning rate falls and a checkpoint is written",
    "iterations": "optimizer steps per epoch",
    "optimizer": "the paper's sgd, or adamw for a short run",
    "learning_rate": "at the start; the paper's is 0.01, of SGD and for a far longer run",
    "momentum": "of SGD, with Nesterov; the paper's is 0.99",
    "weight_decay": "on all weights",
    "clip": "gradients of a larger norm are scaled down to this one",
    "poly_exponent": "the learning rate falls by epoch as (1 - epoch / epochs) to this power",
    "sparsity": "share of the fusion's connections that stay off, in [0, 1); 0 trains a dense network",
    "method": "how the sparse connections are chosen; 'dense' is the same as --sparsity 0",
    "interval": "iterations between mask updates, for the methods that have any",
    "block": "channels on each side of what is connected or not: 1 as in the paper, 16 to compute less on a GPU",
    "val_iterations": "batches of the held-out cases to validate on after each epoch; 0 for none",
    "seed": "of the weights, the batches and the masks",
}
CHOICES = {"method": ("dense", *METHOD_NAMES), "optimizer": OPTIMIZERS}
COMMANDS = """What one does with scans and trained networks, apart from training: check, predict, evaluate, compare.

python -m dstlib.zoo.e2enet check DATA                              # every defect of a data set
python -m dstlib.zoo.e2enet predict RUN... --images DIR --output DIR
python -m dstlib.zoo.e2enet evaluate PREDICTIONS --data DATA
python -m dstlib.zoo.e2enet compare RUN... --beside amos            # a table with costs and PT scores
python -m dstlib.zoo.e2enet phantoms amos DIR                       # procedural scans to try it all on
"""
LAYOUT = "decathlon, amos, btcv, nnunet, nnunet-v1, monai, brats or case-folders (default: recognised by evidence)"
IMAGES = "NAME.nii.gz, NAME.nrrd, NAME.mha, NAME_0000.nii.gz per channel, or folders NAME of DICOM slices"
OUTSIDE = """let dataset.json name files anywhere, by absolute paths or by '..' (default: below the folder of the set
only, as else whoever wrote it has any file read that you may read); links in the folder are followed either way"""
REGIONS = """predict and score these, which may overlap, in the place of the classes: brats (whole tumour, tumour core,
enhancing tumour), or a file of JSON with nnU-Net's 'labels' and 'regions_class_order' (default: as the data set has
it)"""
GEOMETRIES = get_args(Geometry)
GEOMETRY = """which transform of a NIfTI header counts where two disagree: itk as in ITK's programs and nnU-Net, sform
(as in nibabel's), or qform (default: """
DEVICE, ENGINE = "(default: cuda if there is one, else cpu)", "compute on dstlib's engine, which is faster"
ENGINE_OR_NOT = """compute on dstlib's engine, or in torch (default: on a CPU by what is faster, which is measured; on a
GPU in torch)"""
SKIP_EMPTY = """take windows for background, unread, that hold nothing: every voxel of a CT at the value to which the
training clips it from below, as air is, and of a channel that is standardised inside the patient's mask at 0; other
channels have no such value, and the option is refused (default: read all windows, as nnU-Net does)"""
DEFAULT = "(default: %(default)s)"
TOLERANCE = """of surface Dice, in mm: one for all classes, or a file of JSON with one for each, {"liver": 5,
"aorta": 2} (default: 1, with which E2ENet's NSD on AMOS was measured)"""
OUTPUT = "write scores.csv and scores.json here too, and challenge.csv and challenge.json for a set of BTCV or BraTS"
ALL = "list every case, not ten at most of each kind of finding"


def run_script(recipe: Recipe, description: str | None) -> int:
    """Trains a recipe as the command line says, and returns the exit code: the whole of an example's script."""

    def main() -> None:
        config = read_config(recipe, description=description)
        from dstlib.zoo.e2enet.run import run_recipe

        run_recipe(config)

    return run_command(main)


def read_config(
    recipe: Recipe, arguments: Sequence[str] | None = None, *, description: str | None = None
) -> "RunConfig":
    """Returns what a command line asks of a recipe; without ``arguments``, that of this process.

    Raises:
        SettingError: An option is out of range, or contradicts another.
    """
    options = _recipe_parser(recipe, description).parse_args(arguments)
    preset = _chosen_preset(recipe, options)

    from dstlib.zoo.e2enet.baselines.architecture import read_architecture
    from dstlib.zoo.e2enet.dataset import DataSettings
    from dstlib.zoo.e2enet.run import RunConfig
    from dstlib.zoo.e2enet.training.execution import Execution, chosen_device, usual_precision, usual_workers

    device = chosen_device(options.device)
    return RunConfig(
        recipe=recipe.name,
        preset=preset,
        model=options.model,
        width=options.width,
        architecture=None if options.architecture is None else read_architecture(options.architecture),
        memory_budget=options.memory_budget,
        data=DataSettings(
            folder=options.data,
            layout=options.layout,
            allow_outside=options.allow_outside,
            geometry=options.geometry,
            regions=options.regions,
            modality=options.modality,
            made_for=recipe.modality,
            fold=options.fold,
            splits=options.splits,
            groups=options.groups,
            cache=options.cache,
            phantoms=(recipe.phantoms[0], options.scans),
        ),
        execution=Execution(
            device=device,
            precision=options.precision or usual_precision(device),
            channels_last=options.channels_last,
            compile=options.compile,
            engine=options.engine,
            recompute=options.recompute,
            workers=usual_workers() if options.workers is None else options.workers,
        ),
        folder=options.run,
        resume=options.resume,
        begin_from=options.begin_from,
        freeze_topology=options.freeze_topology,
        tensorboard=options.tensorboard,
    )


def _chosen_preset(recipe: Recipe, options: argparse.Namespace) -> Preset:
    """Returns the preset with the settings of the command line."""
    preset = recipe.presets[options.preset or ("quick" if options.data else "demo")]
    training = {name: getattr(options, name) for name in asdict(preset.training)}
    training = {name: value for name, value in training.items() if value is not None}
    if options.method == "dense":
        if options.sparsity:
            where, given = "the command line", f"--method dense with --sparsity {options.sparsity}"
            remedy = "Leave one of them out."
            raise SettingError.of("--method", where, allowed="no sparsity with dense", given=given, remedy=remedy)
        training |= {"method": preset.training.method, "sparsity": 0.0}
    if options.model not in SPARSE_MODELS:
        training.setdefault("sparsity", 0.0)  # as published; sparse on request
    patches = preset.patches
    if options.patch_size:
        patches = replace(patches, patch_size=tuple(options.patch_size))
    if options.batch_size is not None:
        patches = replace(patches, batch_size=options.batch_size)
    return replace(preset, training=replace(preset.training, **training), patches=patches)


def _recipe_parser(recipe: Recipe, description: str | None) -> argparse.ArgumentParser:
    """Returns a command line whose defaults are those of the recipe's presets."""
    lines = make_parser(description)
    scales = "the scale (default: quick on --data, demo on phantoms)"
    lines.add_argument("--preset", choices=recipe.presets, help=scales)
    lines.add_argument("--model", default="e2enet", help="the network: e2enet, or a baseline such as nnunet")
    lines.add_argument("--width", type=float, default=1.0, help="multiplies the channels of a baseline (default: 1)")
    found = "what --model dints is built by: a run of --model dints_search, its architecture.json, or MONAI's .pt"
    lines.add_argument("--architecture", type=Path, metavar="FILE|RUN", help=found)
    budget = "share of the memory of all paths that --model dints_search is to keep to (default: 0.8, as published)"
    lines.add_argument("--memory-budget", type=float, metavar="SHARE", help=budget)

    option = lines.add_argument_group("data").add_argument
    kind, number = recipe.phantoms
    option(
        "--data",
        type=Path,
        metavar="DIR",
        help=f"folder of the data set, or its data list (default: procedural {kind} phantoms)",
    )
    option("--layout", help=LAYOUT)
    option("--allow-outside", action="store_true", help=OUTSIDE)
    option("--geometry", choices=GEOMETRIES, help=f"{GEOMETRY}itk)")
    option("--regions", metavar="WHICH", help=REGIONS)
    modality = f"""normalise every channel as ct or as mri (z-score), or each as its name declares; of AMOS22's mixed
scans, those to take (default: as declared; one must be {recipe.modality}, as this recipe is made for it)"""
    option("--modality", choices=("ct", "mri", "declared"), help=modality)
    folds = """which fifth to hold out, 0 to 4 (which entry of --splits), or 'all': train on every case and hold out the
set's own validation cases, if it has any (default: 0)"""
    option("--fold", default="0", help=folds)
    splits = "folds to take in the place of five drawn ones: nnU-Net's splits_final.json"
    option("--splits", type=Path, metavar="FILE", help=splits)
    groups = """keep the scans of one patient in one fold: JSON or CSV with a patient for each case, or a regular
expression whose one (group) is the patient in the name of a case"""
    option("--groups", metavar="FILE|PATTERN", help=groups)
    option("--cache", type=Path, metavar="DIR", help="where prepared scans are kept (default: runs/prepared/NAME)")
    option("--scans", type=int, default=number, metavar="N", help=f"phantoms to draw, at least 5 {DEFAULT}")
    option("--patch-size", type=int, nargs=3, metavar=("D", "H", "W"), help="voxels of a training patch")
    option("--batch-size", type=int, metavar="N", help="patches per iteration, over all processes")

    option = lines.add_argument_group("run").add_argument
    folder = f"folder for the results (default: runs/{recipe.name}-DATE-TIME)"
    option("--run-dir", type=Path, dest="run", metavar="DIR", help=folder)
    option("--resume", action="store_true", help="continue the run in --run-dir, with the same settings")
    begun = "begin with the weights and masks of this run"
    option("--from", type=Path, dest="begin_from", metavar="DIR", help=begun)
    option("--freeze-topology", action="store_true", help="keep the masks of --from as they are: only weights train")
    option("--tensorboard", action="store_true", help="write TensorBoard scalars too")

    option = lines.add_argument_group("execution").add_argument
    option("--device", help=DEVICE)
    option("--precision", choices=PRECISIONS, help="of the forward pass (default: fp16 on a GPU, else float32)")
    option("--channels-last", action="store_true", help="lay features out as a GPU's tensor cores like")
    option("--compile", action="store_true", help="compile the network by torch.compile")
    option("--engine", action="store_true", help=ENGINE)
    recompute = "keep every second stage of E2ENet alone for the gradients: less memory, longer steps, the same result"
    option("--recompute", action="store_true", help=recompute)
    workers = "processes that draw and augment the batches ahead (default: 8 if there is a GPU, else 0)"
    option("--workers", type=int, metavar="N", help=workers)

    option = lines.add_argument_group("training; without a value, the preset's").add_argument
    for name, value in asdict(recipe.presets["demo"].training).items():
        defaults = {key: getattr(preset.training, name) for key, preset in recipe.presets.items()}
        shown = ", ".join(f"{preset} {default}" for preset, default in defaults.items())
        option(
            f"--{name.replace('_', '-')}",
            type=type(value),
            choices=CHOICES.get(name),
            metavar=None if name in CHOICES else "N",
            help=f"{HELP[name]} (default: {value if len(set(defaults.values())) == 1 else shown})",
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the commands and returns the exit code: 0 done, 1 done with findings, 2 refused."""
    options = _command_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return run_command(lambda: command(options))


def _command_parser() -> argparse.ArgumentParser:
    lines = make_parser(COMMANDS, prog="python -m dstlib.zoo.e2enet")
    commands = lines.add_subparsers(required=True, metavar="COMMAND")

    text = "Read every scan of a data set and list what is wrong with it, before any training. Exit code 1 if so."
    check = commands.add_parser("check", help="list every defect of a data set", description=text)
    check.add_argument("data", type=Path, metavar="DATA", help="folder of the data set, or its data list (.json)")
    _add_set_options(check)
    nnunet = "warn too of what nnU-Net stops at, or takes otherwise than meant (needs dstlib[itk])"
    check.add_argument("--for-nnunet", action="store_true", help=nnunet)
    check.add_argument("--all", action="store_true", help=ALL)
    check.set_defaults(command=_check)

    text = """Segment every image of a folder, by one network or the mean of several (the folds). Labels are written as
NAME.nii.gz in the geometry of their image. A file that cannot be read is reported while the others go on, and gives
exit code 1. What is there already is kept, so an interrupted prediction is continued by repeating the command. The bar
counts passes through the networks, of all scans; of those that are not read yet, as many as of the others."""
    predict = commands.add_parser("predict", help="segment a folder of images", description=text)
    predict.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run; several are averaged")
    predict.add_argument("--images", type=Path, required=True, metavar="DIR", help=IMAGES)
    where = "where the labels go: not the folder of images, nor one that another process predicts into"
    predict.add_argument("--output", type=Path, required=True, metavar="DIR", help=where)
    again = "predict again what is there already; what other networks made of these images is removed first"
    predict.add_argument("--overwrite", action="store_true", help=again)
    predict.add_argument("--geometry", choices=GEOMETRIES, help=f"{GEOMETRY}as the run was trained)")
    predict.add_argument("--no-mirror", action="store_true", help="one pass, not one per mirror image: up to 8× faster")
    predict.add_argument("--no-postprocessing", action="store_true", help="keep every component of every class")
    predict.add_argument("--device", help=DEVICE)
    both = argparse.BooleanOptionalAction
    predict.add_argument("--engine", action=both, default=None, help=ENGINE_OR_NOT)
    predict.add_argument("--skip-empty", action=both, default=False, help=SKIP_EMPTY)
    predict.add_argument("--all", action="store_true", help=ALL)
    predict.set_defaults(command=_predict)

    text = (
        "Score predictions against the labels of a data set: Dice, surface Dice, HD95 and HD, per class and per case. "
        "For the classes of BTCV, and the classes or regions of BraTS, a second table has what the challenge ranks by."
    )
    evaluate = commands.add_parser("evaluate", help="score predictions", description=text)
    evaluate.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="folder of NAME.nii.gz, NAME.nii, ...")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set with the labels")
    _add_set_options(evaluate)
    partly = "score the cases that have a prediction (default: refuse, if a labelled case has none)"
    evaluate.add_argument("--allow-missing", action="store_true", help=partly)
    evaluate.add_argument("--tolerance", default="1", metavar="MM|FILE", help=TOLERANCE)
    evaluate.add_argument("--output", type=Path, metavar="DIR", help=OUTPUT)
    evaluate.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that score (default: this one)"
    )
    evaluate.set_defaults(command=_evaluate)

    text = "One row per run: mDice, mNSD, parameters, FLOPs (counted as the paper does) and PT score."
    compare = commands.add_parser("compare", help="a table of runs, beside the paper's if asked for", description=text)
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    compare.add_argument("--pool", action="store_true", help="the runs are folds: show the scores over all their cases")
    compare.add_argument("--beside", metavar="SET", help="published rows to show too: amos, brats, btcv or amos-mri")
    compare.add_argument("--alpha", type=float, default=0.5, help="weight of the costs in the PT score (default: 0.5)")
    compare.set_defaults(command=_compare)

    text = "Draw procedural scans in the layout of a real data set."
    phantoms = commands.add_parser("phantoms", help="draw procedural scans", description=text)
    phantoms.add_argument("kind", choices=("amos", "btcv", "brats", "hippocampus"))
    phantoms.add_argument("folder", type=Path, metavar="DIR")
    phantoms.add_argument("--scans", type=int, default=30, metavar="N", help=DEFAULT)
    phantoms.add_argument("--seed", type=int, default=0, help=DEFAULT)
    phantoms.set_defaults(command=_phantoms)
    return lines


def _add_set_options(command: argparse.ArgumentParser) -> None:
    """Adds what is asked of a data set beside its folder."""
    command.add_argument("--layout", help=LAYOUT)
    command.add_argument("--allow-outside", action="store_true", help=OUTSIDE)
    command.add_argument("--regions", metavar="WHICH", help=REGIONS)
    command.add_argument("--geometry", choices=GEOMETRIES, default="itk", help=f"{GEOMETRY}itk)")


def _manifest_of(options: argparse.Namespace) -> Manifest:
    """Reads which cases the data set of a command line consists of, and what is asked of them."""
    from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
    from dstlib.zoo.e2enet.data.layouts.regions import with_regions

    manifest = read_manifest(options.data, options.layout, allow_outside=options.allow_outside)
    return with_regions(manifest.placed_by(options.geometry), options.regions)


def _check(options: argparse.Namespace) -> int:
    from dstlib.report import on_one_line

    manifest = _manifest_of(options)
    from dstlib.zoo.e2enet.data.scans.integrity import check  # not for a set that is none

    for line in manifest.guess:
        print(on_one_line(line))
    findings = check(manifest)
    if options.for_nnunet:
        from dstlib.zoo.e2enet.data.scans.for_nnunet import nnunet_warnings

        findings = replace(findings, warnings=findings.warnings + nnunet_warnings(manifest))
    print(findings.table(whole=options.all))
    return 0 if findings.ok else 1


def _predict(options: argparse.Namespace) -> int:
    from dstlib.report import on_one_line
    from dstlib.zoo.e2enet.checkpoint import load_trained
    from dstlib.zoo.e2enet.data.layouts.detect import folder_cases
    from dstlib.zoo.e2enet.data.layouts.left_out import left_out_of_images
    from dstlib.zoo.e2enet.inference.predict import outcome_table, predict_scans
    from dstlib.zoo.e2enet.training.execution import Execution, chosen_device, usual_precision

    _refuse_run(options.output)
    device = chosen_device(options.device)
    execution = Execution(device=device, precision=usual_precision(device), engine=bool(options.engine))
    trained = load_trained(options.runs, device=execution.device)
    if options.skip_empty:
        trained = replace(trained, skip_empty=True)
    if options.geometry:
        trained = replace(trained, geometry=options.geometry)
    if options.no_mirror:
        trained = replace(trained, mirror=())
    if options.no_postprocessing:
        trained = replace(trained, postprocessing=())
    cases = folder_cases(options.images, num_channels=len(trained.channels))
    for note in left_out_of_images(options.images, cases):
        print(on_one_line(f"Note: {note}."))
    trained = _to_compute(trained, on_cpu=device.startswith("cpu"), engine=options.engine)
    outcomes = predict_scans(trained, cases, options.output, overwrite=options.overwrite)
    print(outcome_table(outcomes, whole=options.all))
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _to_compute(trained: "Trained", *, on_cpu: bool, engine: bool | None) -> "Trained":
    """Puts the networks of a prediction where they are computed: on the engine, in torch, or by what is faster."""
    from dstlib.report import on_one_line
    from dstlib.zoo.e2enet.checkpoint import on_engine
    from dstlib.zoo.e2enet.inference.planned import faster_of, on_plans

    if engine is False or (engine is None and not on_cpu):
        return trained
    if engine is None:
        trained, told = faster_of(trained)
        print(on_one_line(told))
        return trained
    try:
        return on_plans(trained) if on_cpu else on_engine(trained)
    except SettingError:  # what is no plan as a whole may have layers that are faster there
        return on_engine(trained)


def _evaluate(options: argparse.Namespace) -> int:
    from dstlib.files import alone_in

    if options.output is None:
        return _evaluate_into(None, options)
    _refuse_run(options.output)
    with alone_in(options.output):  # before the work, not after
        return _evaluate_into(options.output, options)


def _evaluate_into(output: Path | None, options: argparse.Namespace) -> int:
    from dstlib.files import write_json, write_whole
    from dstlib.report import on_one_line
    from dstlib.zoo.e2enet.evaluation.challenges import challenge_of
    from dstlib.zoo.e2enet.evaluation.evaluate import Scoring, evaluate_folder, predicted_files
    from dstlib.zoo.e2enet.evaluation.tolerances import read_tolerance

    manifest = _manifest_of(options)
    tolerance = read_tolerance(options.tolerance, manifest.classes)
    for line in manifest.told():
        print(on_one_line(line))
    labelled = {case.name: case for case in (*manifest.train, *manifest.validation)}
    predicted = predicted_files(options.predictions)
    cases = [case for name, case in labelled.items() if name in predicted]
    missing = [name for name in labelled if name not in predicted]
    if missing and not (cases and options.allow_missing):
        allowed = f"one for each of the {len(labelled)} labelled cases of {manifest.name}"
        remedy = "Predict these first" + (", or pass --allow-missing to score those that are there." if cases else ".")
        given = f"none of {few(missing)}"
        raise DataError.of("predictions", str(options.predictions), allowed=allowed, given=given, remedy=remedy)
    scores = evaluate_folder(
        options.predictions,
        cases,
        manifest.classes,
        labels=manifest.labels,
        scoring=Scoring(tolerance=tolerance),
        workers=options.workers,
    )
    print(scores.table())
    print(f"{len(cases)} of the {len(labelled)} labelled cases of {manifest.name} have a prediction there.")
    if missing:
        print(on_one_line(f"Without a prediction: {few(missing)}."))
    if unlabelled := sorted(predicted.keys() - labelled):
        print(on_one_line(f"Predictions without a label, which are not scored: {few(unlabelled)}."))
    written = {"scores": scores}
    if challenge := challenge_of(manifest.classes, manifest.labels):
        written["challenge"] = evaluate_folder(
            options.predictions,
            cases,
            challenge.classes,
            labels=challenge.labels,
            scoring=challenge.scoring,
            workers=options.workers,
        )
        print(f"\n{challenge.told(written['challenge'])}")
    if output:
        for name, found in written.items():
            write_whole(output / f"{name}.csv", found.csv().encode())
            write_json(output / f"{name}.json", {**found.to_json(), "geometry": options.geometry})
    return 1 if scores.left_out else 0


def _refuse_run(output: Path) -> None:
    """Refuses a run directory, whose own scores and predictions are those of its held-out cases."""
    if (output / "config.json").exists() and any((output / name).exists() for name in ("checkpoint.pt", "model.pt")):
        where, given, remedy = "the command line", f"the run {output}", "Pass another folder, one inside of it say."
        raise SettingError.of("--output", where, allowed="no run", given=given, remedy=remedy)


def _compare(options: argparse.Namespace) -> int:
    from dstlib.zoo.e2enet.compare import compare

    print(compare(options.runs, pool=options.pool, beside=options.beside, alpha=options.alpha))
    return 0


def _phantoms(options: argparse.Namespace) -> int:
    from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms

    print(write_phantoms(options.folder, options.kind, num_scans=options.scans, seed=options.seed))
    return 0

"""What one does with scans and trained networks, apart from training: check, predict, evaluate, compare.

python -m dstlib.zoo.e2enet check DATA                              # every defect of a data set
python -m dstlib.zoo.e2enet predict RUN... --images DIR --output DIR
python -m dstlib.zoo.e2enet evaluate PREDICTIONS --data DATA
python -m dstlib.zoo.e2enet compare RUN... --beside amos            # a table with costs and PT scores
python -m dstlib.zoo.e2enet phantoms amos DIR                       # procedural scans to try it all on
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dstlib.command_line import make_parser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 done with findings, 2 something given cannot be used."""
    lines = make_parser(__doc__, prog="python -m dstlib.zoo.e2enet")
    commands = lines.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_check, _add_predict, _add_evaluate, _add_compare, _add_phantoms):
        add(commands)
    options = lines.parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return run_command(lambda: command(options))


Commands = argparse._SubParsersAction  # argparse offers no public name for it


def _add_check(commands: "Commands[argparse.ArgumentParser]") -> None:
    text = "Read every scan of a data set and list what is wrong with it, before any training. Exit code 1 if so."
    lines = commands.add_parser("check", help="list every defect of a data set", description=text)
    _add_data(lines)
    lines.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
    from dstlib.zoo.e2enet.data.scans.integrity import check

    findings = check(read_manifest(options.data, options.layout))
    print(findings.table())
    return 0 if findings.ok else 1


def _add_predict(commands: "Commands[argparse.ArgumentParser]") -> None:
    text = """Segment every image of a folder, by one network or the mean of several (the folds). Labels are written as
NAME.nii.gz in the geometry of their image. A file that cannot be read is reported while the others go on, and gives
exit code 1. What is there already is kept, so an interrupted prediction is continued by repeating the command."""
    lines = commands.add_parser("predict", help="segment a folder of images", description=text)
    lines.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run; several are averaged")
    lines.add_argument("--images", type=Path, required=True, metavar="DIR", help="NAME.nii.gz or NAME_0000.nii.gz")
    lines.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the labels go")
    lines.add_argument("--overwrite", action="store_true", help="predict again what is there already")
    lines.add_argument("--no-mirror", action="store_true", help="one pass, not one per mirror image: up to 8× faster")
    lines.add_argument("--no-postprocessing", action="store_true", help="keep every component of every class")
    lines.add_argument("--device", default=None, help="(default: cuda if there is one, else cpu)")
    lines.add_argument("--engine", action="store_true", help="compute on dstlib's engine, which is faster")
    lines.set_defaults(command=_predict)


def _predict(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from dstlib.zoo.e2enet.checkpoint import load_trained, on_engine
    from dstlib.zoo.e2enet.inference.predict import outcome_table, predict_folder
    from dstlib.zoo.e2enet.training.settings import Execution, chosen_device, usual_precision

    device = chosen_device(options.device)
    execution = Execution(device=device, precision=usual_precision(device), engine=options.engine)
    trained = load_trained(options.runs, device=execution.device)
    if execution.engine:
        trained = on_engine(trained)
    if options.no_mirror:
        trained = replace(trained, mirror=())
    if options.no_postprocessing:
        trained = replace(trained, postprocessing=())
    outcomes = predict_folder(trained, options.images, options.output, overwrite=options.overwrite)
    print(outcome_table(outcomes))
    return 1 if any(outcome.error for outcome in outcomes) else 0


def _add_evaluate(commands: "Commands[argparse.ArgumentParser]") -> None:
    text = (
        "Score predictions against the labels of a data set: Dice, surface Dice, HD95 and HD, per class and per case."
    )
    lines = commands.add_parser("evaluate", help="score predictions", description=text)
    lines.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="folder of NAME.nii.gz")
    lines.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set with the labels")
    lines.add_argument("--layout", help="decathlon, amos, btcv or nnunet (default: recognised)")
    lines.add_argument("--tolerance", type=float, default=1.0, metavar="MM", help="of surface Dice (default: 1 mm)")
    lines.add_argument("--output", type=Path, metavar="DIR", help="write scores.csv and scores.json here too")
    lines.add_argument("--workers", type=int, default=0, metavar="N", help="processes that score (default: this one)")
    lines.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from dstlib.files import make_folder, write_json, write_whole
    from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
    from dstlib.zoo.e2enet.evaluation.evaluate import Scoring, evaluate_folder

    if options.output:
        make_folder(options.output)  # before the work, not after
    manifest = read_manifest(options.data, options.layout)
    labelled = {case.name: case for case in (*manifest.train, *manifest.validation)}
    predicted = [case for name, case in labelled.items() if (options.predictions / f"{name}.nii.gz").exists()]
    scores = evaluate_folder(
        options.predictions,
        predicted or list(labelled.values()),
        manifest.classes,
        scoring=Scoring(tolerance=options.tolerance),
        workers=options.workers,
    )
    print(scores.table())
    print(f"{len(predicted)} of the {len(labelled)} labelled cases of {manifest.name} have a prediction there.")
    if options.output:
        write_whole(options.output / "scores.csv", scores.csv().encode())
        write_json(options.output / "scores.json", scores.to_json())
    return 1 if scores.left_out else 0


def _add_compare(commands: "Commands[argparse.ArgumentParser]") -> None:
    text = "One row per run: mDice, mNSD, parameters, FLOPs (counted as the paper does) and PT score."
    lines = commands.add_parser("compare", help="a table of runs, beside the paper's if asked for", description=text)
    lines.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    lines.add_argument("--pool", action="store_true", help="the runs are folds: show the scores over all their cases")
    lines.add_argument("--beside", metavar="SET", help="published rows to show too: amos, brats, btcv or amos-mri")
    lines.add_argument("--alpha", type=float, default=0.5, help="weight of the costs in the PT score (default: 0.5)")
    lines.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from dstlib.zoo.e2enet.compare import compare

    print(compare(options.runs, pool=options.pool, beside=options.beside, alpha=options.alpha))
    return 0


def _add_phantoms(commands: "Commands[argparse.ArgumentParser]") -> None:
    text = "Draw procedural scans in the layout of a real data set."
    lines = commands.add_parser("phantoms", help="draw procedural scans", description=text)
    lines.add_argument("kind", choices=("amos", "btcv", "brats", "hippocampus"))
    lines.add_argument("folder", type=Path, metavar="DIR")
    lines.add_argument("--scans", type=int, default=30, metavar="N", help="(default: %(default)s)")
    lines.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    lines.set_defaults(command=_phantoms)


def _phantoms(options: argparse.Namespace) -> int:
    from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms

    print(write_phantoms(options.folder, options.kind, num_scans=options.scans, seed=options.seed))
    return 0


def _add_data(lines: argparse.ArgumentParser) -> None:
    lines.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    lines.add_argument("--layout", help="decathlon, amos, btcv or nnunet (default: recognised)")


if __name__ == "__main__":
    sys.exit(main())

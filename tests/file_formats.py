"""Every format of files that the project reads: how a sound one is made, how it is read, and what is another valid one.

A format joins by one row of ``FORMATS``. Not among them: splits, which are computed from names and never saved; what
torch, Lightning, transformers and nnU-Net read by themselves; kernels and headers, which are installed with the code.
"""

import contextlib
import hashlib
import io
import json
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from random import Random
from shutil import copyfile, copytree, ignore_patterns
from typing import Any
from unittest.mock import patch

import conftest  # noqa: F401 - declares operators that transformers needs where torchvision does not fit torch
import nibabel
import numpy as np
import small_runs
import torch
from dicom_files import slice_tags, write_slice
from golden.masks.write import LikeLlama, net
from models import backward, small
from mutations import (
    Mutate,
    Mutated,
    in_gzip,
    in_plan,
    mutate_bytes,
    mutate_json,
    mutate_json_lines,
    mutate_nifti,
    mutate_state,
    mutate_text_header,
    mutate_value,
    mutate_zip,
)
from torch import nn

import dstlib
from dstlib.engine.decisions import Decision, Decisions
from dstlib.errors import DstlibError
from dstlib.export import compact, plan
from dstlib.history import History
from dstlib.integrations.nnunet_checkpoint import export_checkpoint
from dstlib.integrations.training import HostedTraining, Settings
from dstlib.layers import Shift, Unit
from dstlib.pruned import read_weights
from dstlib.runtime import load_plan
from dstlib.torch_files import checksum, load_weights
from dstlib.typed_json import sealed
from dstlib.zoo.e2enet import run as run_module
from dstlib.zoo.e2enet.checkpoint import load_trained
from dstlib.zoo.e2enet.cli import main
from dstlib.zoo.e2enet.data.layouts.detect import read_manifest
from dstlib.zoo.e2enet.data.layouts.labels import Labels
from dstlib.zoo.e2enet.data.layouts.manifest import CaseFiles
from dstlib.zoo.e2enet.data.phantoms.sets import write_phantoms
from dstlib.zoo.e2enet.data.preprocessing.cache import measure, prepared_cases
from dstlib.zoo.e2enet.data.scans.nifti import read_scan
from dstlib.zoo.e2enet.paper.budget import Budget, read_budget, settled_budget
from dstlib.zoo.e2enet.training.epochs import flows_of, metrics_of
from dstlib.zoo.e2enet.training.records import result_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import cifar10_data

EPOCHS = small_runs.PRESET.training.epochs


def keeps_all(value: Any, sound: Any) -> str:
    """Says that a crafted file may be read as whatever it is."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of files: how a sound one is made, how it is read, and what may come of a changed one.

    - ``make``: writes a scene around the file into a new folder, given what :func:`file_formats.prepare` left.
    - ``read``: uses the file as the project does, and returns what came of it as JSON can hold it.
    - ``damage``: changes that are to be noticed, as by a checksum; no other value may come of them.
    - ``craft``: changes that make other valid files; ``law`` says of (value, value of the sound file) what is broken
      by what was read, "" for nothing.
    - ``may_write``: patterns of the paths in the scene that reading may change.
    """

    name: str
    file: str
    make: Callable[[Path, Path], object]
    read: Callable[[Path], Any]
    damage: tuple[Mutate, ...] = ()
    craft: tuple[Mutate, ...] = ()
    law: Callable[[Any, Any], str] = keeps_all
    may_write: tuple[str, ...] = ()


def digest(*things: Any) -> str:
    """Computes a checksum of tensors, arrays, bytes, and of anything else by its repr, within lists and dicts too."""
    found = hashlib.sha256()
    for thing in things:
        if isinstance(thing, dict):
            thing = [part for item in thing.items() for part in item]
        if isinstance(thing, list | tuple):
            found.update(f"{len(thing)} {digest(*thing)}".encode())
        elif isinstance(thing, torch.Tensor):
            found.update(f"{thing.dtype} {tuple(thing.shape)}".encode())
            found.update(thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif hasattr(thing, "tobytes"):
            found.update(f"{thing.dtype} {thing.shape}".encode() + thing.tobytes())
        else:
            found.update(thing if isinstance(thing, bytes) else repr(thing).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


# ---- what scenes are made of


def prepare(folder: Path) -> None:
    """Makes, once for all scenes, a data set, a finished run of it, and one that ended within its second epoch."""
    small_runs.write_set(folder / "data")
    small_runs.train(small_runs.config(folder / "data", folder / "run"))
    with patch.object(run_module, "train", _only_the_first_epoch(run_module.train)), contextlib.suppress(_EndedError):
        small_runs.train(small_runs.config(folder / "data", folder / "stopped"))


class _EndedError(Exception):
    """Ends a run as a killed one ends."""


def _only_the_first_epoch(train: Callable[..., bool]) -> Callable[..., bool]:
    def trained(training: Any, cases: Any, *, save: Callable[..., None], **options: Any) -> bool:
        def save_and_end(training: Any) -> None:
            save(training)
            raise _EndedError

        return train(training, cases, save=save_and_end, **options)

    return trained


def a_run(scene: Path, prepared: Path, *, name: str = "run") -> None:
    """A run, without its figures."""
    copytree(prepared / name, scene / "run", ignore=ignore_patterns("figures"))


def a_stopped_run(scene: Path, prepared: Path) -> None:
    """A run that can be resumed, with its data."""
    a_run(scene, prepared, name="stopped")
    copytree(prepared / "data", scene / "data")
    copytree(prepared / "cache", scene / "cache")


def a_run_with_data(scene: Path, prepared: Path) -> None:
    """A finished run, and the data set."""
    a_run(scene, prepared)
    copytree(prepared / "data", scene / "data")


# ---- runs


def load(scene: Path) -> Any:
    """Reads a run as ``predict`` does."""
    trained = load_trained([scene / "run"])
    settings = {name: value for name, value in vars(trained).items() if name != "models"}
    state = trained.models[0].state_dict()
    return {"settings": repr(settings), "shapes": shapes(state), "weights": digest(state)}


def shapes(state: Mapping[str, Any]) -> str:
    """Computes a checksum of names, shapes and types."""
    return digest([[name, tuple(x.shape), str(x.dtype)] for name, x in state.items()])


def predict(scene: Path) -> Any:
    """Predicts the images of the set by the run, into its predictions."""
    command("predict", "run", "--images", "data/imagesTs", "--output", "run/predictions")
    return contents(scene / "run" / "predictions", "*.nii.gz")


def resume(scene: Path) -> Any:
    """Continues a run to the end of its training."""
    return _train(scene, "run", resume=True)


def begin_from(scene: Path) -> Any:
    """Begins a run with the weights and masks of another."""
    return _train(scene, "next", begin_from=scene / "run", freeze_topology=True)


def _train(scene: Path, name: str, **options: Any) -> Any:
    run = scene / name
    with patch.object(run_module, "_evaluate", lambda *_: None):
        run_module.run_recipe(replace(small_runs.config(scene / "data", run), **options))
    model = torch.load(run / "model.pt", weights_only=True)
    rows = [line.split(",")[:2] for line in (run / "metrics.csv").read_text().splitlines()]
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)["state"]
    masks = {name: int(saved["mask"].sum()) for name, saved in checkpoint["sparsifier"]["weights"].items()}
    return {
        "shapes": shapes(model),
        "rows": rows,
        "active": masks,
        "outside": sum(
            int(model[name][~saved["mask"]].count_nonzero())
            for name, saved in checkpoint["sparsifier"]["weights"].items()
        ),
        "rest": digest(model, checkpoint, (run / "metrics.csv").read_bytes()),
    }


def read_metrics(scene: Path) -> Any:
    """Reads the metrics of a finished run, as its figures do."""
    rows = metrics_of(scene / "run", num_epochs=EPOCHS)
    return {"columns": list(rows[0]), "epochs": [row["epoch"] for row in rows], "rows": repr(rows)}


def read_flows(scene: Path) -> Any:
    """Reads the flows of a finished run, as its figure does."""
    flows = flows_of(scene / "run", result_of(scene / "run").flows, num_epochs=EPOCHS)
    columns = {f"{node}.{flow}" for nodes in flows.values() for node, of in nodes.items() for flow in of}
    return {"columns": sorted(columns), "last": [*flows][-1], "rows": repr(flows)}


def same(*names: str) -> Callable[[Any, Any], str]:
    """Makes a law: these parts of a value are as those of the sound file."""
    return lambda value, sound: ", ".join(f"other {name}" for name in names if value[name] != sound[name])


def show(scene: Path) -> Any:
    """Shows a run in a table, with the scores of its cases."""
    return command("compare", "run", "--pool")


def evaluate(scene: Path) -> Any:
    """Scores the predictions of a run."""
    command("evaluate", "run/predictions", "--data", "data", "--output", "scores", "--allow-missing")
    return contents(scene / "scores", "*")


def command(*arguments: str) -> str:
    """Runs a command of the zoo, and returns what it printed.

    Raises:
        DstlibError: It refuses, in one line on stderr, or lists what it could not use.
    """
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(arguments)
    if code == 2:
        lines = [line for line in errors.getvalue().replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"not one line of an error: {errors.getvalue()!r}"
        raise DstlibError(errors.getvalue())
    if code == 1:
        raise DstlibError(printed.getvalue())
    assert code == 0, code
    print(printed.getvalue(), errors.getvalue())  # for who looks at what comes to the screen
    return printed.getvalue()


def contents(folder: Path, pattern: str) -> dict[str, str]:
    """Computes checksums of files."""
    return {file.name: digest(file.read_bytes()) for file in sorted(folder.glob(pattern))}


# ---- scans, data sets and what is prepared of them


def a_cache(scene: Path, prepared: Path) -> None:
    """A data set and the cache of it, which holds the paths of its sources."""
    copytree(prepared / "data", scene / "data")
    read_cache(scene)


def read_cache(scene: Path) -> Any:
    """Reads prepared cases, and touches every voxel, as a training does."""
    manifest = read_manifest(scene / "data")
    cases, preparation = prepared_cases(
        manifest, manifest.train, modality="mri", folder=scene / "cache", progress=False
    )
    arrays = {
        case.name: [np.asarray(case.image), np.asarray(case.label), case.spacing, case.class_voxels]
        for case in cases.cases
    }
    return {"preparation": preparation.to_json(), "cases": digest(arrays)}


def a_set(scene: Path, prepared: Path, *, layout: str) -> None:
    """A data set in a layout; of ``nnunet-list`` it lists the files."""
    data = scene / "data"
    copytree(prepared / "data", data)
    content = json.loads((data / "dataset.json").read_text())
    if layout == "amos":
        content["validation"] = content["training"][-1:]
        content["training"] = content["training"][:-1]
        content["test"] = [{"image": name} for name in content["test"]]
    if layout.startswith("nnunet"):
        names = [f"scan_{number}" for number in range(5)]
        for file in [*data.glob("imagesTr/*.gz"), *data.glob("imagesTs/*.gz")]:
            file.rename(file.with_name(file.name.replace(".nii.gz", "_0000.nii.gz")))
        content = {
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, **{name: number for number, name in enumerate(small_runs.CLASSES, 1)}},
            "numTraining": 5,
            "file_ending": ".nii.gz",
        }
        if layout == "nnunet-list":
            content["dataset"] = {
                name: {"images": [f"imagesTr/{name}_0000.nii.gz"], "label": f"labelsTr/{name}.nii.gz"} for name in names
            }
    (data / "dataset.json").write_text(json.dumps(content, indent=1))


def read_set(scene: Path) -> Any:
    """Reads which files make a data set, measures and names them as a training does, and writes below its cache."""
    manifest = read_manifest(scene / "data")
    measured = measure(manifest, manifest.train, folder=scene / "cache", progress=False)
    files = [file for case in manifest.cases for file in (*case.images, case.label) if file is not None]
    names = [manifest.name, *(case.name for case in manifest.cases)]
    below = all(file.resolve().is_relative_to(scene / "data") for file in files)
    return {
        "below": below,
        "names": names,
        "shown": [*manifest.channels, *manifest.classes],
        "manifest": repr(manifest).replace(str(scene), ""),
        "measured": repr(measured),
    }


def names_stay_below(value: Any, sound: Any) -> str:
    """The law of data sets: files lie below the set's folder, names of cases are one component of a path, all print."""
    names, shown = ([name for name in value[key] if isinstance(name, str)] for key in ("names", "shown"))
    odd = [name for name in names if name in ("", ".", "..") or {"/", "\\"} & set(name)]
    odd += [name for name in (*names, *shown) if not name.isprintable()]
    return f"odd names {odd}" if odd else "" if value["below"] else "files outside of the set"


def a_scan(scene: Path, prepared: Path, *, ending: str) -> None:
    """An image and its label."""
    small_runs.write_set(scene / "set", num_scans=1)
    for kind, folder in (("image", "imagesTr"), ("label", "labelsTr")):
        nibabel.load(scene / "set" / folder / "scan_0.nii.gz").to_filename(scene / f"{kind}{ending}")


def a_scan_by_itk(scene: Path, prepared: Path, *, ending: str) -> None:
    """An image and its label, in a format of ITK's."""
    import SimpleITK

    a_scan(scene, prepared, ending=".nii")
    for kind in ("image", "label"):
        image = SimpleITK.ReadImage(str(scene / f"{kind}.nii"))
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)  # of NIfTI, of which the writers of other formats warn
        SimpleITK.WriteImage(image, str(scene / f"{kind}{ending}"), True)


def a_series(scene: Path, prepared: Path) -> None:
    """An image in slices of DICOM."""
    small_runs.write_set(scene / "set", num_scans=1)
    nifti = nibabel.load(scene / "set" / "imagesTr" / "scan_0.nii.gz")
    voxels = np.rint(np.asanyarray(nifti.dataobj))
    for k in range(voxels.shape[2]):
        tags = slice_tags(k, np.array([0, 0, 2.0 * k]), spacing=(1, 1), intercept=0)
        write_slice(scene / "image" / f"{k}.dcm", voxels[:, :, k].T, tags)


def read_a_series(scene: Path) -> Any:
    """Reads an image in slices."""
    scan = read_scan(CaseFiles(name="scan", images=(scene / "image",)), num_channels=1, labels=None)
    finite = bool(np.isfinite(scan.image).all() and np.isfinite(scan.affine).all())
    return {"finite": finite, "classes": [], "fits": True, "scan": digest(scan.image, scan.affine)}


def read_a_scan(scene: Path, *, ending: str) -> Any:
    """Reads an image with its label."""
    files = CaseFiles(name="scan", images=(scene / f"image{ending}",), label=scene / f"label{ending}")
    scan = read_scan(files, num_channels=1, labels=Labels.consecutive(2))
    return {
        "finite": bool(np.isfinite(scan.image).all() and np.isfinite(scan.affine).all()),
        "classes": sorted(set(np.unique(scan.label).tolist()) - {0, 1, 2}),
        "fits": scan.label.shape == scan.image.shape[1:],
        "scan": digest(scan.image, scan.label, scan.affine),
    }


def prepare_a_scan(scene: Path) -> Any:
    """Prepares the scans of a set for training: they are turned, cut, normalised and resampled."""
    return {"finite": True, "classes": [], "fits": True, **read_cache(scene)}


def predict_a_scan(scene: Path) -> Any:
    """Predicts an image by a run."""
    command("predict", "run", "--images", "data/imagesTs", "--output", "out")
    return {"finite": True, "classes": [], "fits": True, **contents(scene / "out", "*.nii.gz")}


def a_set_of_plain_files(scene: Path, prepared: Path) -> None:
    """A finished run, and a data set of which one image and its label, and the one to predict, are not compressed."""
    a_run_with_data(scene, prepared)
    for folder, name in (("imagesTr", "scan_0"), ("labelsTr", "scan_0"), ("imagesTs", "test")):
        packed = scene / "data" / folder / f"{name}.nii.gz"
        nibabel.load(packed).to_filename(packed.with_suffix(""))
        packed.unlink()
    file = scene / "data" / "dataset.json"
    file.write_text(file.read_text().replace("scan_0.nii.gz", "scan_0.nii").replace("test.nii.gz", "test.nii"))


def some_phantoms(scene: Path, prepared: Path) -> None:
    """A set of phantoms."""
    write_phantoms(scene / "set", "hippocampus", num_scans=1, progress=False)


def make_phantoms(scene: Path) -> Any:
    """Asks for a set of phantoms that is there."""
    folder = write_phantoms(scene / "set", "hippocampus", num_scans=1, progress=False)
    return [digest(file.read_bytes()) for file in sorted(folder.rglob("*.nii.gz"))]


# ---- compact files and decisions


def a_compact_file(scene: Path, prepared: Path) -> None:
    """A sparse model as a compact file, of bits, of indices, of aliases and of dense tensors."""
    model, sparsifier = a_sparse_model()
    compact.save_compact(model, scene / "model.safetensors", sparsifier=sparsifier)
    sparsifier.detach()


class Tied(nn.Module):
    """Layers that are sparse in different ways, two of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 30), nn.Linear(40, 30, bias=False)
        self.second.weight = self.first.weight
        self.conv, self.norm = nn.Conv3d(8, 8, 3), nn.BatchNorm1d(5)


def a_sparse_model() -> tuple[nn.Module, dstlib.Sparsifier]:
    torch.manual_seed(0)
    model = Tied()
    return model, dstlib.sparsify(model, sparsity=0.95, method="static", overrides={"conv.weight": 0.5})


def read_compact(scene: Path) -> Any:
    """Loads a compact file into a model, and its masks."""
    torch.manual_seed(1)
    model = Tied()
    state = compact.load_compact(scene / "model.safetensors", model)
    masks = compact.load_masks(scene / "model.safetensors")
    own = model.state_dict()
    return {
        "shapes": shapes(own),
        "loaded": digest(own) == digest(dict(state)),
        "masks": shapes(masks),
        "outside": sum(int(own[name][~mask].count_nonzero()) for name, mask in masks.items()),
        "rest": digest(own, masks),
    }


# ---- plans


class Planned(nn.Module):
    """A step of each kind, with and without a norm, bias and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = Unit(2, 3, kernel_size=(1, 3, 3), stride=(1, 2, 2), shift=Shift((-1, 0, 1), axis=2))
        self.up, self.pool = nn.ConvTranspose3d(3, 2, (1, 2, 2), (1, 2, 2), bias=False), nn.MaxPool3d(2)
        self.head = nn.Conv3d(4, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.unit(x)
        return self.head(torch.cat([x, self.up(y)], dim=1)), self.pool(y)


def a_plan(scene: Path, prepared: Path) -> None:
    """A network as a plan, with some kernels that are zero."""
    torch.manual_seed(0)
    model = Planned()
    with torch.no_grad():
        model.unit.conv.weight[:, 1] = 0
        model.up.weight[1] = 0
    plan.save_plan(model, torch.rand(1, 2, 4, 8, 8), scene / "model.plan")


def run_plan(scene: Path) -> Any:
    """Runs a plan, unless its maps are large."""
    found = load_plan(scene / "model.plan")
    image = np.linspace(-1, 1, 1024, dtype=np.float32).reshape(2, 2, 4, 8, 8)
    shapes, between = found.measure(image.shape)
    return digest(found(image, threads=2)) if between + 4 * sum(map(prod, shapes)) < 2**24 else "large"


# ---- masks of other tools


def a_pruned_file(scene: Path, prepared: Path, *, name: str) -> None:
    """A file that another tool wrote, or a folder of it."""
    path = Path(__file__).parent / "golden" / "masks" / name
    copytree(path, scene / name) if path.is_dir() else copyfile(path, scene / name)


def read_pruned(scene: Path, *, file: str, model: Callable[[], nn.Module]) -> Any:
    """Starts a training from the masks in a file, and loads the weights in it if there are any."""
    plain = model()
    own = plain.state_dict()
    if file != "rigl_torch.pt":  # which has none
        found = {name: x.to(own[name].dtype) for name, x in read_weights(scene / file).items() if name in own}
        load_weights(plain, own | found, what=file, where="a scene", remedy="Copy it again.")
    sparsifier = dstlib.sparsify(plain, masks=scene / file, method="static")
    sparsifier.detach()
    masks, weights = sparsifier.masks, dict(plain.named_parameters())
    return {
        "fits": all(m.dtype == torch.bool and m.shape == weights[name].shape for name, m in masks.items()),
        "outside": sum(int(weights[name][~mask].count_nonzero()) for name, mask in masks.items()),
        "rest": digest(masks, {name: x.detach() for name, x in weights.items()}),
    }


def in_compact(mutate: Mutate) -> Mutate:
    """Makes a change of the entries or the tensors of a compact file, which gets the right checksum."""

    def crafted(rng: Random, content: bytes) -> Mutated:
        from safetensors.torch import load, save

        length = int.from_bytes(content[:8], "little")
        described = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["dstlib"])
        stored = load(content)
        if rng.random() < 0.6:
            changed, said = mutate(rng, described["entries"].encode())
            described["entries"] = changed.decode("utf-8", "replace")
        else:
            changed_tensors, said = mutate_value(rng, stored)
            if not isinstance(changed_tensors, dict):
                return content, said
            tensors = {str(name): x for name, x in changed_tensors.items() if isinstance(x, torch.Tensor)}
            # an expanded one may be of any size: no file can hold it
            stored = {name: x.contiguous() for name, x in tensors.items() if x.numel() < 10**6}
        try:
            described["checksum"] = compact._checksum(described["entries"], stored)
            return save(stored, {"dstlib": json.dumps(described)}), f"crafted: {said}"
        except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError):  # no file can hold it
            return content, said

    return crafted


def in_header(mutate: Mutate) -> Mutate:
    """Makes a change of the header of a safetensors file, of which the length is then right."""

    def changed(rng: Random, content: bytes) -> Mutated:
        end = 8 + int.from_bytes(content[:8], "little")
        header, said = mutate(rng, content[8:end])
        return struct.pack("<Q", len(header)) + header + content[end:], f"header: {said}"

    return changed


def in_seal(mutate: Mutate) -> Mutate:
    """Makes a change of a JSON that carries a checksum of itself, which is renewed."""

    def crafted(rng: Random, content: bytes) -> Mutated:
        value = json.loads(content)
        value.pop("crc32", None)
        changed, said = mutate(rng, json.dumps(value).encode())
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON needs no checksum
            value = json.loads(changed)
            changed = json.dumps(sealed(value) if isinstance(value, dict) else value).encode()
        return changed, f"sealed: {said}"

    return crafted


def some_decisions(scene: Path, prepared: Path) -> None:
    """What was measured of two layers."""
    rows = (
        Decision("first", "Linear", 1.5, 0.5, None),
        Decision("conv", "Conv3d", 0.25, 0.5, None),
        Decision("x", "Conv2d", None, None, "no"),
    )
    Decisions(rows, "a machine").save(scene / "decisions.json")


def read_decisions(scene: Path) -> Any:
    """Reads what was measured, asks for each decision, and shows it."""
    decisions = Decisions.load(scene / "decisions.json")
    return {
        "fast": {name: decisions[name].is_fast for name in decisions},
        "text": str(decisions),
        "repr": repr(decisions),
    }


def printable_decisions(value: Any, sound: Any) -> str:
    """The law of decisions: rows have the right types, and can be shown."""
    types = all(isinstance(fast, bool) for fast in value["fast"].values())
    return "" if types and all(line.isprintable() for line in value["text"].splitlines()) else "odd rows"


# ---- saved states


def reseal(state: Any) -> Any:
    """Renews the checksums in a state, as someone could who means it to be another."""
    if not isinstance(state, dict):
        return state
    state = {key: reseal(inner) for key, inner in state.items()}
    if "checksum" in state:
        # of a hosted training, the sparsifier has a checksum of its own
        parts = {key: inner for key, inner in state.items() if key not in ("checksum", "sparsifier")}
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):  # of what was saved there is none
            state["checksum"] = checksum(parts)
    return state


def a_state(scene: Path, prepared: Path, *, method: str) -> None:
    """The state of a sparse training, of its model and optimizer, after some steps, as torch.save writes it."""
    model, optimizer, sparsifier, history = _training(method)
    _steps(model, optimizer, range(5))
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history.state_dict()}
    torch.save(sparsifier.state_dict(), scene / "sparsifier.pt")
    torch.save(history.state_dict(), scene / "history.pt")
    torch.save(states, scene / "others.pt")
    sparsifier.detach()


def _training(method: str) -> tuple[nn.Module, torch.optim.Optimizer, dstlib.Sparsifier, History]:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = dstlib.sparsify(
        model,
        optimizer,
        sparsity=0.75,
        method=replace(dstlib.METHODS[method], interval=2),
        total_steps=20,
        exclude="head.*",
    )
    return model, optimizer, sparsifier, History(sparsifier)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def read_state(scene: Path, *, method: str, file: str = "sparsifier.pt") -> Any:
    """Loads the state into a training, which then goes on."""
    model, optimizer, sparsifier, history = _training(method)
    others = torch.load(scene / "others.pt", weights_only=True)
    model.load_state_dict(others["model"])
    optimizer.load_state_dict(others["optimizer"])
    sparsifier.load_state_dict(torch.load(scene / "sparsifier.pt", weights_only=True))
    history.load_state_dict(torch.load(scene / "history.pt", weights_only=True))
    return {**_going_on(model, optimizer, sparsifier), "history": digest(history.arrays(), str(history))}


def _going_on(model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: dstlib.Sparsifier) -> dict[str, Any]:
    """Trains some steps more, over mask updates, and returns what came of it."""
    step = sparsifier.step
    _steps(model, optimizer, range(5, 9))
    masks, weights = sparsifier.masks, dict(model.named_parameters())
    return {
        "step": step,
        "active": {name: int(mask.sum()) for name, mask in masks.items()},
        "total": sum(int(mask.sum()) for mask in masks.values()),
        "outside": sum(int(weights[name][~mask].count_nonzero()) for name, mask in masks.items()),
        "types": [str(mask.dtype) for mask in masks.values()],
        "rest": digest(model.state_dict(), sparsifier.state_dict()),
    }


def a_hosted_state(scene: Path, prepared: Path) -> None:
    """What Lightning, Ignite and timm keep of a sparse training in their checkpoints."""
    hosted, model, optimizer = _hosted()
    hosted.begin(model, optimizer, total_steps=20)
    _steps(model, optimizer, range(5))
    torch.save(hosted.state_dict(), scene / "hosted.pt")
    torch.save(model.state_dict(), scene / "model.pt")
    hosted.sparsifier.detach()


def _hosted() -> tuple[HostedTraining, nn.Module, torch.optim.Optimizer]:
    model = small()
    settings = Settings(sparsity=0.75, method=replace(dstlib.RIGL, interval=2), exclude="head.*")
    return HostedTraining(settings), model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def read_hosted_state(scene: Path) -> Any:
    """Continues a hosted training."""
    hosted, model, optimizer = _hosted()
    model.load_state_dict(torch.load(scene / "model.pt", weights_only=True))
    hosted.load_state_dict(torch.load(scene / "hosted.pt", weights_only=True), model, where="checkpoint hosted.pt")
    hosted.begin(model, optimizer, total_steps=20)
    return _going_on(model, optimizer, hosted.sparsifier)


def an_nnunet_checkpoint(scene: Path, prepared: Path) -> None:
    """What a sparse trainer of nnU-Net leaves, as far as its export needs it."""
    model, optimizer, sparsifier, _ = _training("dsff")
    _steps(model, optimizer, range(5))
    part = {"version": 1, "settings": {"method": "dsff"}, "sparsifier": sparsifier.state_dict()}
    weights = model.state_dict()
    torch.save(
        {"network_weights": weights, "trainer_name": "T", "current_epoch": 5, "dstlib": part}, scene / "fold.pth"
    )
    sparsifier.detach()


def export(scene: Path) -> Any:
    """Exports a checkpoint of nnU-Net."""
    exported = export_checkpoint(scene / "fold.pth", scene / "out" / "stock.pth")
    stock = torch.load(scene / "out" / "stock.pth", weights_only=True)
    return {"counts": list(exported), "shapes": shapes(stock["network_weights"]), "rest": digest(stock)}


def a_transformers_checkpoint(scene: Path, prepared: Path) -> None:
    """The folder of a checkpoint of the Trainer of transformers, as far as resuming looks at it before the Trainer."""
    import dstlib.integrations.transformers  # noqa: F401 - here, as it takes seconds, and all that read need it

    a_hosted_state(scene, prepared)
    for step in (3, 5):
        folder = scene / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "dstlib_state.pt").write_bytes((scene / "hosted.pt").read_bytes())
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "max_steps": 20, "log_history": []})
        )


def resume_transformers(scene: Path) -> Any:
    """Continues from the last whole checkpoint of the Trainer of transformers, as its callback does."""
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from dstlib.integrations.transformers import SparseTraining, last_checkpoint

    model = small()
    model.load_state_dict(torch.load(scene / "model.pt", weights_only=True))
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    sparse = SparseTraining(sparsity=0.75, method=replace(dstlib.RIGL, interval=2), exclude="head.*")

    def _inner_training_loop(resume_from_checkpoint: str) -> None:  # where the callback looks for it
        arguments = TrainingArguments(scene / "trainer", use_cpu=True, report_to=[])
        state = TrainerState(max_steps=20)
        sparse.on_train_begin(arguments, state, TrainerControl(), model=model, optimizer=optimizer)

    last = last_checkpoint(scene / "out")
    _inner_training_loop(str(scene / "out" / "checkpoint-5"))
    return {"last": Path(str(last)).name, **_going_on(model, optimizer.optimizer, sparse.sparsifier)}


# ---- examples


def an_npz(scene: Path, prepared: Path) -> None:
    """Some images as JPEG, as the example of CIFAR-10 reads them."""
    from PIL import Image

    files = []
    for grey in range(0, 200, 50):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (grey,) * 3).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    content = np.frombuffer(b"".join(files), np.uint8)
    np.savez(scene / "few.npz", jpeg=content, offsets=np.cumsum([0, *map(len, files)]), labels=np.arange(len(files)))


def read_an_npz(scene: Path) -> Any:
    """Reads images and labels."""
    images, labels = cifar10_data.read_npz(scene / "few.npz")
    return {"images": digest(images), "labels": labels.tolist(), "sizes": [list(images.shape), len(labels)]}


def images_and_labels(value: Any, sound: Any) -> str:
    """The law of images: each has a label, of ten classes, and 32 x 32 pixels."""
    (num, *size), labels = value["sizes"]
    fits = num == labels and size == [3, 32, 32] and all(0 <= label < 10 for label in value["labels"])
    return "" if fits else "images and labels do not fit"


def a_budget(scene: Path, prepared: Path) -> None:
    """What the calibration of a system came to."""
    settled_budget(scene / "system", lambda: Budget.of(3.0, 0.9, epochs=24))


def read_a_budget(scene: Path) -> Any:
    """Reads how long the runs of a system are."""
    return asdict(read_budget(scene / "system"))


# ---- the table

_JSON = (mutate_bytes, mutate_json, mutate_json)
_SEALED = (in_seal(mutate_json),)
_RESEALED = partial(mutate_state, seal=reseal)
_RESAVED = (mutate_state, _RESEALED, mutate_zip)  # with the right checksums of the container
_RESUMING = ("run/*", "cache/*")
_SCANS = same("finite", "classes", "fits")
_LAYOUTS = ("decathlon", "amos", "nnunet", "nnunet-list")
_METHODS = ("rigl", "srigl", "snfs", "topkast")
_CONTINUED = same("active", "types", "outside")
_REALLOCATED = same("total", "types", "outside")  # what moves between weights depends on when masks are updated

FORMATS = (
    Format(name="config.json", file="run/config.json", make=a_run, read=load, damage=_JSON, craft=_SEALED),
    Format(
        name="config.json resumed",
        file="run/config.json",
        make=a_stopped_run,
        read=resume,
        damage=_JSON,
        may_write=_RESUMING,
    ),
    Format(name="result.json", file="run/result.json", make=a_run, read=load, damage=_JSON, craft=_SEALED),
    Format(name="result.json compared", file="run/result.json", make=a_run, read=show, damage=_JSON, craft=_SEALED),
    Format(
        name="model.pt",
        file="run/model.pt",
        make=a_run,
        read=load,
        damage=(mutate_bytes,),
        craft=_RESAVED,
        law=same("settings", "shapes"),
    ),
    Format(
        name="checkpoint.pt resumed",
        file="run/checkpoint.pt",
        make=a_stopped_run,
        read=resume,
        damage=(mutate_bytes,),
        craft=_RESAVED,
        law=same("shapes", "rows", "active", "outside"),
        may_write=_RESUMING,
    ),
    Format(
        name="checkpoint.pt begun from",
        file="run/checkpoint.pt",
        make=a_stopped_run,
        read=begin_from,
        damage=(mutate_bytes,),
        craft=_RESAVED,
        law=same("shapes", "rows", "active", "outside"),
        may_write=("next", "next/*", "cache/*"),
    ),
    *(
        Format(
            name=f"{name}.csv resumed",
            file=f"run/{name}.csv",
            make=a_stopped_run,
            read=resume,
            damage=(mutate_bytes,),
            may_write=_RESUMING,
        )
        for name in ("metrics", "flows")
    ),
    *(
        # a number in the place of another is a table as good as the one before
        Format(name=f"{name}.csv", file=f"run/{name}.csv", make=a_run, read=read, craft=(mutate_bytes,), law=law)
        for name, read, law in (
            ("metrics", read_metrics, same("epochs")),
            ("flows", read_flows, same("columns", "last")),
        )
    ),
    Format(
        name="log.jsonl",
        file="run/log.jsonl",
        make=a_stopped_run,
        read=resume,
        damage=(mutate_bytes, mutate_json_lines),
        may_write=_RESUMING,
    ),
    Format(
        name="prediction.json",
        file="run/predictions/prediction.json",
        make=a_run_with_data,
        read=predict,
        damage=_JSON,
        may_write=("run/predictions/*",),
    ),
    Format(
        name="prediction scored",
        file="run/predictions/scan_0.nii.gz",
        make=a_run_with_data,
        read=evaluate,
        damage=(mutate_bytes,),
        craft=(in_gzip(mutate_nifti),),
        may_write=("scores", "scores/*"),
    ),
    *(
        Format(
            name=f"cache {name}",
            file=f"cache/{file}",
            make=a_cache,
            read=read_cache,
            damage=damage,
            may_write=("cache/*",),
        )
        for name, file, damage in (
            ("record", "prepared-*/scan_0.json", _JSON),
            ("image.npy", "prepared-*/scan_0.image.npy", (mutate_bytes,)),
            ("label.npy", "prepared-*/scan_0.label.npy", (mutate_bytes,)),
            ("fingerprint", "fingerprints/scan_0.json", _JSON),
        )
    ),
    *(
        Format(
            name=f"dataset.json {layout}",
            file="data/dataset.json",
            make=partial(a_set, layout=layout),
            read=read_set,
            craft=_JSON,
            law=names_stay_below,
            may_write=("cache", "cache/*"),
        )
        for layout in _LAYOUTS
    ),
    *(
        Format(
            name=f"{kind}{ending}",
            file=f"{kind}{ending}",
            make=partial(a_scan, ending=ending),
            read=partial(read_a_scan, ending=ending),
            damage=damage,
            craft=craft,
            law=_SCANS,
        )
        for kind in ("image", "label")
        for ending, damage, craft in (
            (".nii.gz", (mutate_bytes,), (in_gzip(mutate_nifti),)),
            (".nii", (), (mutate_bytes, mutate_nifti)),
        )
    ),
    *(
        Format(
            name=f"image{ending}",
            file=f"image{ending}",
            make=partial(a_scan_by_itk, ending=ending),
            read=partial(read_a_scan, ending=ending),
            craft=(mutate_text_header,),
            law=_SCANS,
        )
        for ending in (".nrrd", ".mha")
    ),
    Format(name="slice.dcm", file="image/4.dcm", make=a_series, read=read_a_series, craft=(mutate_bytes,), law=_SCANS),
    Format(
        name="image.nii prepared",
        file="data/imagesTr/scan_0.nii",
        make=a_set_of_plain_files,
        read=prepare_a_scan,
        craft=(mutate_nifti,),
        law=_SCANS,
        may_write=("cache", "cache/*"),
    ),
    Format(
        name="image.nii predicted",
        file="data/imagesTs/test.nii",
        make=a_set_of_plain_files,
        read=predict_a_scan,
        craft=(mutate_nifti,),
        law=_SCANS,
        may_write=("out", "out/*"),
    ),
    Format(
        name="cifar10 npz",
        file="few.npz",
        make=an_npz,
        read=read_an_npz,
        damage=(mutate_bytes,),
        craft=(mutate_zip,),
        law=images_and_labels,
    ),
    Format(
        name="paper budget.json",
        file="system/budget.json",
        make=a_budget,
        read=read_a_budget,
        damage=_JSON,
        craft=_SEALED,
    ),
    Format(name="phantoms.json", file="set/phantoms.json", make=some_phantoms, read=make_phantoms, damage=_JSON),
    Format(
        name="compact",
        file="model.safetensors",
        make=a_compact_file,
        read=read_compact,
        damage=(mutate_bytes, in_header(mutate_json)),
        craft=(in_compact(mutate_json), in_compact(mutate_json)),
        # not the masks: a file that says it has fewer, with the right checksum, is one that was saved without them
        law=same("shapes", "loaded", "outside"),
    ),
    Format(name="plan", file="model.plan", make=a_plan, read=run_plan, damage=(mutate_bytes,), craft=(in_plan,)),
    *(
        Format(
            name=f"masks of {tool}",
            file=file,
            make=partial(a_pruned_file, name=file),
            read=partial(read_pruned, file=file, model=net),
            damage=(mutate_bytes,),
            craft=_RESAVED,
            law=same("fits", "outside"),
        )
        for tool, file in (("NNCF", "nncf_magnitude.pt"), ("rigl-torch", "rigl_torch.pt"))
    ),
    *(
        Format(
            name=f"{folder} {file}",
            file=f"{folder}/{file}",
            make=partial(a_pruned_file, name=folder),
            read=partial(read_pruned, file=folder, model=LikeLlama),
            craft=mutations,  # neither of the two files has a checksum
            law=same("fits", "outside"),
        )
        for folder, file, mutations in (
            ("sparse_bitmask", "model.safetensors", (mutate_bytes, in_header(mutate_json))),
            ("sparse_24_bitmask", "model.safetensors", (mutate_bytes, in_header(mutate_json))),
            ("sparse_bitmask", "config.json", (mutate_bytes, mutate_json)),
        )
    ),
    Format(
        name="decisions.json",
        file="decisions.json",
        make=some_decisions,
        read=read_decisions,
        damage=_JSON,
        craft=_SEALED,
        law=printable_decisions,
    ),
    *(
        Format(
            name=f"sparsifier {method}",
            file="sparsifier.pt",
            make=partial(a_state, method=method),
            read=partial(read_state, method=method),
            damage=(mutate_state,),
            craft=(_RESEALED,),
            law=_REALLOCATED if method == "snfs" else _CONTINUED,
        )
        for method in _METHODS
    ),
    Format(
        name="history",
        file="history.pt",
        make=partial(a_state, method="rigl"),
        read=partial(read_state, method="rigl"),
        damage=(mutate_state,),
        craft=(_RESEALED,),
        law=_CONTINUED,
    ),
    Format(
        name="hosted training",
        file="hosted.pt",
        make=a_hosted_state,
        read=read_hosted_state,
        damage=(mutate_state,),
        craft=(_RESEALED,),
        law=_CONTINUED,
    ),
    Format(
        name="nnU-Net checkpoint",
        file="fold.pth",
        make=an_nnunet_checkpoint,
        read=export,
        damage=(mutate_bytes,),
        craft=_RESAVED,
        may_write=("out", "out/*"),
    ),
    *(
        Format(
            name=f"transformers {name}",
            file=f"out/checkpoint-5/{name}",
            make=a_transformers_checkpoint,
            read=resume_transformers,
            damage=damage,
            craft=craft,
            law=_CONTINUED,
        )
        for name, damage, craft in (
            ("dstlib_state.pt", (mutate_bytes, mutate_state), (_RESEALED, mutate_zip)),
            ("trainer_state.json", (), _JSON),
        )
    ),
)

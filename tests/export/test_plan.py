"""Networks as plans: run without torch, from Python and from C, with the outputs that the model has."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import in_plan
from torch import nn

import dstlib
from dstlib.engine.decisions import Decision, Decisions
from dstlib.errors import DstlibError, InputError, SettingError, StateError
from dstlib.export import remove_dead_channels, save_compact, save_plan
from dstlib.export.dead_channels import ShiftedGroups
from dstlib.export.order import in_little_memory
from dstlib.export.steps import Step, Steps, View, steps_of
from dstlib.layers.blocks import Unit
from dstlib.layers.shift import LearnedShift, Shift
from dstlib.runtime import Plan, library_file, load_plan
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

ROOT = Path(dstlib.__file__).parents[1]
FLAT = {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)}
TINY = E2ENetConfig(channels=(6, 8, 10), strides=((1, 2, 2), (2, 2, 2)), heads=2, num_classes=3)
# of the largest output: Winograd's transforms round so in float32. Outputs are about 1; where they are less, as those
# of a norm whose convolution is constant, rounding is all that there is, and it is compared with 1.
CLOSE = 1e-5

pytestmark = pytest.mark.skipif(library_file() is None, reason="no kernels were built")


def e2enet(sparsity: float, seed: int = 0) -> E2ENet:
    """A network as it is before training, with its first masks."""
    torch.manual_seed(seed)
    model = E2ENet(TINY).eval()
    if sparsity:
        dstlib.sparsify(model, sparsity=sparsity, method="dsff", include=E2ENet.FUSION, total_steps=10_000)
    return model


def planned(model: nn.Module, channels: int, folder: Path, size: Sequence[int] = (4, 8, 8)) -> Plan:
    """A model as what its file holds."""
    save_plan(model, torch.rand(1, channels, *size), folder / "model.plan")
    return load_plan(folder / "model.plan")


@torch.no_grad()
def assert_same(plan: Plan, model: nn.Module, image: torch.Tensor, threads: int = 1) -> None:
    """The plan gives what the model gives in float64, up to ``CLOSE``."""
    found, expected = plan(image.numpy(), threads=threads), model.double()(image.double())
    model.float()
    found = found if isinstance(found, tuple) else (found,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=CLOSE * max(1.0, float(theirs.abs().max())))


def on_engine(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """The model with all layers on the engine, whatever is faster."""
    measured = dstlib.accelerate(model, image).decisions.values()
    chosen = Decisions.of(Decision(row.name, row.kind, 2.0, 1.0, row.obstacle) for row in measured)
    return dstlib.accelerate(model, image, decisions=chosen)


def test_by_hand(tmp_path):
    """2 · x - 5, then half of what is negative."""
    model = nn.Sequential(nn.Conv3d(1, 1, 1), nn.LeakyReLU(0.5))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].bias.fill_(-5.0)
    plan = planned(model, 1, tmp_path)
    image = np.array([1.0, 4.0], np.float32).reshape(1, 1, 2, 1, 1)
    assert plan(image).flatten().tolist() == [-1.5, 3.0]


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.9])
def test_e2enet(sparsity, tmp_path):
    """In several sizes in turn, with a batch, and by as many threads as one likes."""
    model = e2enet(sparsity)
    plan = planned(model, 1, tmp_path)
    assert (plan.num_channels, plan.num_outputs) == (1, 2)
    for shape, threads in (((1, 1, 4, 8, 8), 1), ((2, 1, 6, 12, 16), 2), ((1, 1, 18, 8, 20), 3), ((1, 1, 4, 8, 8), 2)):
        assert_same(plan, model, torch.randn(shape), threads)


def test_what_recomputes_in_training(tmp_path):
    """Nothing is, of a pass without gradients: neither in a plan nor in what has no dead channels."""
    model, image = e2enet(0.8), torch.randn(1, 1, 4, 8, 8)
    model.recompute = True
    plan = planned(model, 1, tmp_path)
    assert_same(plan, model, image)
    model.recompute = False
    np.testing.assert_array_equal(plan(image.numpy())[0], planned(model, 1, tmp_path)(image.numpy())[0])
    model.recompute = True
    _, removal = remove_dead_channels(model, image)
    assert not removal.left


class Network(nn.Module):
    """All that a plan holds: a unit and back, activations alone, a shift of what is concatenated, a pooling."""

    def __init__(self, channels: int, width: int, unit: tuple[tuple[int, int, int], ...], bias: bool) -> None:
        super().__init__()
        kernel, stride = unit
        self.first = Unit(channels, width, kernel_size=kernel, stride=stride, shift=Shift((-1, 0, 1), axis=2))
        self.up = nn.ConvTranspose3d(width, 3, stride, stride=stride, bias=False)
        self.relu, self.shift = nn.ReLU(), Shift((2, 0), axis=-3)
        self.last = nn.Conv3d(channels + 6, 2, **FLAT, bias=bias)
        self.pool = nn.MaxPool3d((1, 2, 1))

    def forward(self, x):
        fine = self.up(self.first(x))
        return self.pool(self.last(self.shift(torch.cat([fine, self.relu(x), fine], dim=1)))), self.relu(fine)


def hand_made() -> Network:
    """A network whose weights are no random numbers, and some kernels zero."""
    model = Network(2, 3, ((1, 3, 3), (1, 2, 2)), bias=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) % 7 / 4 - 0.75)
        model.first.conv.weight[1] = model.up.weight[:, 2] = model.last.weight[:, 4] = 0
    return model


def test_a_forward_is_followed_without_computing_it(tmp_path):
    model, image = e2enet(0.8), torch.zeros(()).expand(1, 1, 4096, 4096, 4096)  # 275 GB, if anyone touched them
    save_plan(model, image, tmp_path / "large.plan")
    save_plan(model, image[..., :8, :8, :8], tmp_path / "small.plan")
    assert (tmp_path / "large.plan").read_bytes() == (tmp_path / "small.plan").read_bytes()


def test_files_are_as_they_were(tmp_path):
    """Those of version 1 are written and read as in this file, which was made when there was no other."""
    plan = planned(hand_made(), 2, tmp_path, (2, 4, 4))
    file = Path(__file__).with_name("plan_1.plan")
    assert (tmp_path / "model.plan").read_bytes() == file.read_bytes()
    for each in (plan, load_plan(file)):
        assert_same(each, hand_made(), torch.linspace(-1, 1, 128).reshape(2, 2, 2, 4, 4))


@torch.no_grad()
def test_the_numbers_are_those_of_the_engine(tmp_path):
    """Bit for bit, where all layers run on it: the steps become the very calls that it makes."""
    model, image = e2enet(0.8), torch.randn(1, 1, 8, 16, 16)
    fast = on_engine(model, image)
    for ours, theirs in zip(planned(model, 1, tmp_path)(image.numpy()), fast(image), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())


@given(
    channels=st.integers(1, 4),
    width=st.integers(1, 7),
    unit=st.tuples(st.sampled_from([(1, 1, 1), (1, 3, 3)]), st.tuples(*[st.integers(1, 3)] * 3)),
    size=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 5), st.integers(2, 5)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
@example(
    channels=1, width=1, unit=((1, 1, 1), (3, 3, 3)), size=(1, 1, 2, 2), share=0.0, seed=0
)  # fewer words than taps
def test_all_that_a_plan_holds(tmp_path_factory, channels, width, unit, size, share, seed):
    torch.manual_seed(seed)
    model = Network(channels, width, unit, bias=seed % 2 == 0).eval()
    with torch.no_grad():
        for weight in (model.first.conv.weight, model.up.weight, model.last.weight):
            weight *= (torch.rand(weight.shape[:2]) < share)[..., None, None, None]  # fewer kernels, or none
    batch, *coarse = size
    extents = [n * step for n, step in zip(coarse, unit[1], strict=True)]
    plan = planned(model, channels, tmp_path_factory.mktemp("plan"), extents)
    assert_same(plan, model, torch.randn(batch, channels, *extents), threads=1 + seed % 2)


def test_maps_take_little_more_memory_than_those_that_are_needed_at_one_time(tmp_path):
    config = E2ENetConfig(channels=(8, 16, 32, 53, 53), strides=((2, 2, 2),) * 4, heads=1)
    model, extent = E2ENet(config).eval(), 64
    model.deep_supervision = False
    plan = planned(model, 1, tmp_path, (extent,) * 3)
    steps = in_little_memory(steps_of(model, torch.rand(1, 1, 16, 16, 32)), (extent,) * 3).steps
    extents, last = [extent], [0] * (len(steps) + 1)
    for now, step in enumerate(steps, 1):
        last[now] = now
        came_from = extents[step.views[0].map]
        extents.append(came_from * step.stride[0] if step.kind == "conv_transpose" else came_from // step.stride[0])
        for view in step.views:
            last[view.map] = now
    floats = [n * e**3 for n, e in zip([1, *(step.outputs for step in steps)], extents, strict=True)]
    alive = max(sum(f for i, f in enumerate(floats) if i <= now <= last[i]) for now in range(len(floats)))
    (size,), taken = plan.measure((1, 1, *(extent,) * 3))
    weights = 4 * sum(36 / 9 * x.numel() for x in model.parameters())  # at most: of Winograd's convolutions of 3 x 3
    assert size == (1, 15, *(extent,) * 3)
    # a tenth for gaps, and rows of maps that are padded: placed in the order of the steps, they took 1.2 times as much
    assert 4 * alive < taken < 1.1 * 4 * alive + weights


def test_what_has_no_zeros_takes_the_room_of_its_weights(tmp_path):
    """And what has some less, as in a compact file."""
    sizes = {}
    for sparsity in (0.0, 0.9):
        model = e2enet(sparsity)
        planned(model, 1, tmp_path)
        save_compact(model, tmp_path / "compact")
        sizes[sparsity] = [(tmp_path / name).stat().st_size for name in ("model.plan", "compact")]
    dense = sum(x.nbytes for x in e2enet(0.0).parameters())
    assert dense < sizes[0.0][0] < 1.4 * dense  # with an index of 4 bytes for kernels of 4 to 36, and what steps take
    assert sizes[0.9][0] < 0.8 * sizes[0.0][0]


def test_norms_without_weights_and_maps_that_are_read_in_two_ways(tmp_path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv3d(2, 3, **FLAT), nn.InstanceNorm3d(3), nn.Conv3d(6, 2, 1)

        def forward(self, x):
            y = self.conv(x)
            return self.head(torch.cat([y, self.norm(y)], dim=1)), y

    torch.manual_seed(0)
    model = Both().eval()
    assert_same(planned(model, 2, tmp_path), model, torch.randn(2, 2, 3, 6, 5))


def test_layers_that_are_called_twice_are_stored_once(tmp_path):
    layer = nn.Conv3d(16, 16, **FLAT)
    once, twice = nn.Sequential(layer), nn.Sequential(layer, nn.ReLU(), layer)
    assert_same(planned(twice, 16, tmp_path), twice, torch.randn(1, 16, 3, 5, 5))
    size = (tmp_path / "model.plan").stat().st_size
    planned(once, 16, tmp_path)
    assert size - (tmp_path / "model.plan").stat().st_size == 208 + 4 * 16  # a step, and the bias again


def test_a_network_without_its_dead_channels(tmp_path):
    model = e2enet(0.95)
    smaller, removal = remove_dead_channels(model, torch.rand(1, 1, 4, 8, 8))
    assert removal.smaller
    assert any(isinstance(each, ShiftedGroups) for each in smaller.modules())
    assert_same(planned(smaller, 1, tmp_path), model, torch.randn(1, 1, 6, 8, 12))


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (nn.BatchNorm3d(4), "a BatchNorm3d"),
        (nn.Conv3d(4, 4, 3, padding=1), "kernel (3, 3, 3)"),
        (nn.Conv3d(4, 4, (1, 3, 3)), "padding (0, 0, 0)"),
        (nn.Conv3d(4, 4, 1, groups=2), "groups"),
        (nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), stride=(1, 17, 17)), "above 16"),
        (nn.ConvTranspose3d(4, 4, 2, stride=2), "or with a bias"),
        (nn.MaxPool3d(3, stride=2), "side by side"),
        (nn.InstanceNorm3d(4), "of something else than what a convolution makes"),
        (nn.Sequential(nn.Conv3d(4, 4, 1), nn.InstanceNorm3d(4, track_running_stats=True)), "running statistics"),
        (nn.LeakyReLU(1.5), "slope 1.5"),
        (Shift((1, 0), axis=4), "another axis than depth"),
        (LearnedShift((1, 0), axis=2), "a LearnedShift"),
        (nn.Sequential(Shift((1, 0), axis=2), nn.MaxPool3d(2)), "only a convolution reads"),
        (nn.Conv3d(4, 4, 1).double(), "torch.float64"),
        (nn.GELU(), "a GELU"),
    ],
    ids=str,
)
def test_what_a_plan_does_not_hold_is_refused_by_name(layer, given, tmp_path):
    model = nn.Sequential(nn.MaxPool3d(1), layer).eval()
    with pytest.raises(SettingError) as refused:
        save_plan(model, torch.rand(1, 4, 4, 18, 18), tmp_path / "model.plan")
    assert str(refused.value).startswith("layer '1")
    assert given in str(refused.value)
    assert not (tmp_path / "model.plan").exists()


class Residual(nn.Module):
    """Adds what it makes to what it gets, or changes in place what is read again, itself or as another name of it."""

    def __init__(self, in_place: str = "") -> None:
        super().__init__()
        self.conv, self.relu, self.same, self.in_place = nn.Conv3d(4, 4, 1), nn.ReLU(True), nn.Identity(), in_place

    def forward(self, x):
        y = self.conv(x)
        z = self.same(y) if self.in_place == "same" else y
        return torch.cat([y, self.relu(z)], dim=1) if self.in_place else x + y


def test_operations_are_refused_with_the_layer_they_stand_in(tmp_path):
    in_place = "in place of what others read"
    for how, reason in (("", "got add()"), ("itself", in_place), ("same", in_place)):
        with pytest.raises(SettingError, match="layer '1") as refused:
            save_plan(nn.Sequential(nn.Identity(), Residual(how)), torch.rand(1, 4, 2, 2, 2), tmp_path / "model.plan")
        assert reason in str(refused.value)
    hooked = nn.Sequential(nn.Conv3d(4, 4, 1))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(SettingError, match=r"layer '0'.* got hooks"):
        save_plan(hooked, torch.rand(1, 4, 2, 2, 2), tmp_path / "model.plan")
    with pytest.raises(SettingError, match="accelerate"):
        save_plan(dstlib.accelerate(e2enet(0.8), torch.rand(1, 1, 4, 8, 8)), torch.rand(1, 1, 4, 8, 8), tmp_path / "x")


def test_images_that_do_not_fit_are_refused(tmp_path):
    plan = planned(e2enet(0.8), 1, tmp_path)
    for shape, words in (
        ((1, 2, 4, 8, 8), "channels of the image .* expected 1, got 2"),
        ((1, 1, 4, 8, 6), r"fit each other on all levels, got \(1, 1, 4, 8, 6\)"),
        ((1, 1, 2, 4, 4), "more than one voxel for each norm"),
        ((1, 1, 0, 8, 8), "one voxel at least"),
        ((1, 1, 8, 8), r"\(N, C, D, H, W\) of float32"),
    ):
        with pytest.raises(InputError, match=words):
            plan(np.zeros(shape, np.float32))
    # too few were filled up by zeros, too many ended in a TypeError, what is too large became 0
    for shape in ((1, 1, 8), (1, 1, 4, 8, 8, 8), (1, 1, 4.5, 8, 8), (1, 1, 2**70, 8, 8)):
        with pytest.raises(InputError, match=r"shape of a plan: expected \(N, C, D, H, W\), got \(1, 1, "):
            plan.measure(shape)
    with pytest.raises(InputError, match="float64"):
        plan(np.zeros((1, 1, 4, 8, 8)))
    with pytest.raises(InputError, match="float32, got a list"):
        plan(np.zeros((1, 1, 4, 8, 8), np.float32).tolist())
    for threads in (0, 2.5):
        with pytest.raises(SettingError, match="threads"):
            plan(np.zeros((1, 1, 4, 8, 8), np.float32), threads=threads)
    huge = np.broadcast_to(np.float32(0), (1, 1, 1024, 1024, 1024))
    with pytest.raises(StateError, match="memory that are left"):
        plan(huge)
    with pytest.raises(InputError, match="numbers"):
        plan(np.broadcast_to(np.float32(0), (1, 1, 2**20, 2**20, 2**20)))
    assert_same(plan, e2enet(0.8), torch.randn(1, 1, 4, 8, 8))  # it goes on


def test_any_order_in_memory_will_do(tmp_path):
    model = e2enet(0.8)
    image = torch.randn(1, 1, 8, 16, 16)[:, :, ::2].permute(0, 1, 2, 4, 3)
    assert_same(planned(model, 1, tmp_path, (4, 16, 16)), model, image)


@pytest.mark.parametrize("place", [0, 3, 8, 12, 16, 20, 24, 32, 60, 300, -1, -5000])
def test_damaged_files_are_refused(place, tmp_path):
    planned(e2enet(0.8), 1, tmp_path)
    content = bytearray((tmp_path / "model.plan").read_bytes())
    content[place] ^= 1
    (tmp_path / "model.plan").write_bytes(content)
    with pytest.raises(StateError, match=r"file of .*model.plan: expected .*got .*\. Copy the file again"):
        load_plan(tmp_path / "model.plan")


@pytest.mark.parametrize("seed", range(4))
def test_files_that_were_made_up_are_refused_or_run(seed, tmp_path):
    """Whatever is in them: with the right size and checksum, and maps that are not too large to be computed here."""
    planned(Network(2, 3, ((1, 3, 3), (1, 2, 2)), bias=True), 2, tmp_path, (2, 4, 4))
    sound, rng, num_refused = (tmp_path / "model.plan").read_bytes(), Random(seed), 0
    for _ in range(100):
        content, _said = in_plan(rng, sound)
        (tmp_path / "changed").write_bytes(content)
        try:
            plan = load_plan(tmp_path / "changed")
            _, between = plan.measure((1, 2, 2, 4, 4))
            if between < 2**22:
                plan(np.ones((1, 2, 2, 4, 4), np.float32), threads=1)
        except DstlibError:
            num_refused += 1
    assert 20 < num_refused < 100


def test_what_is_no_plan_is_refused(tmp_path):
    for content in (b"", b"dstplan1", bytes(56), b"dstplan2" + bytes(200)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(StateError, match="expected a plan"):
            load_plan(tmp_path / "other")
    with pytest.raises(StateError, match="No such file"):
        load_plan(tmp_path / "none")
    with pytest.raises(StateError, match="file of"):
        load_plan(tmp_path)


def test_instruction_sets(tmp_path, monkeypatch):
    model = e2enet(0.8)
    planned(model, 1, tmp_path)
    for name in ("generic", "torch"):
        monkeypatch.setenv("DSTLIB_ENGINE", name)
        assert_same(load_plan(tmp_path / "model.plan"), model, torch.randn(1, 1, 4, 8, 8))
    monkeypatch.setenv("DSTLIB_ENGINE", "mmx")
    with pytest.raises(SettingError, match="instruction set of DSTLIB_ENGINE: expected one of this processor, got mmx"):
        load_plan(tmp_path / "model.plan")


def test_threads_share_a_plan(tmp_path):
    """Each gets the outputs of its own image, whatever the others run at the same time."""
    model = e2enet(0.8)
    plan = planned(model, 1, tmp_path)
    images = [np.random.default_rng(i).standard_normal((1, 1, 4, 8 + 4 * (i % 2), 8), np.float32) for i in range(4)]
    expected = [plan(image, threads=1) for image in images]
    same = [False] * len(images)

    def run(number: int) -> None:
        found = [plan(images[number], threads=2) for _ in range(20)]
        same[number] = all(np.array_equal(a, b) for each in found for a, b in zip(each, expected[number], strict=True))

    workers = [threading.Thread(target=run, args=(number,)) for number in range(len(images))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(same)


WITHOUT_TORCH = """
import os, sys
import numpy as np
from dstlib.runtime import load_plan

plan = load_plan(sys.argv[1])
image = np.fromfile(sys.argv[2], np.float32).reshape(2, 1, 4, 8, 12)
outputs = plan(image, threads=2)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(not all(np.array_equal(a, b) for a, b in zip(plan(image, threads=2), outputs)))
np.concatenate([each.ravel() for each in outputs]).tofile(sys.argv[3])
heavy = {"torch", "safetensors", "einops", "scipy"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
"""


def as_files(folder: Path) -> tuple[list[str], np.ndarray]:
    """The files of a plan, of an image and for its outputs, and what these are in this process."""
    plan, image = planned(e2enet(0.8), 1, folder), torch.randn(2, 1, 4, 8, 12)
    image.numpy().tofile(folder / "image")
    expected = np.concatenate([each.ravel() for each in plan(image.numpy(), threads=2)])
    return [str(folder / name) for name in ("model.plan", "image", "outputs")], expected


def test_without_torch(tmp_path):
    """The same numbers as in this process: by a pool of threads in the place of OpenMP, in a forked process too."""
    files, expected = as_files(tmp_path)
    subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *files], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    np.testing.assert_array_equal(np.fromfile(files[2], np.float32), expected)


def test_a_forked_process_does_not_wait_for_the_threads_of_the_other(tmp_path):
    """OpenMP's, which torch has loaded, are not there, and it would wait for them for ever."""
    plan, image = planned(e2enet(0.8), 1, tmp_path), torch.randn(2, 1, 4, 8, 12).numpy()
    expected = plan(image, threads=2)
    child = multiprocessing.get_context("fork").Process(target=_equals, args=(plan, image, expected), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _equals(plan: Plan, image: np.ndarray, expected: tuple[np.ndarray, ...]) -> None:
    os._exit(not all(np.array_equal(a, b) for a, b in zip(plan(image, threads=2), expected, strict=True)))


def test_from_c(tmp_path):
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler")
    kernels, (files, expected) = library_file(), as_files(tmp_path)
    source, include, program = ROOT / "examples" / "run_plan.c", ROOT / "dstlib" / "include", str(tmp_path / "run")
    options = ["-Wall", "-Werror", "-std=c11", f"-I{include}", f"-Wl,-rpath,{kernels.parent}"]
    subprocess.run([compiler, *options, source, kernels, "-o", program], check=True)
    subprocess.run([program, files[0], files[1], "2", "4", "8", "12", files[2], "2"], check=True)
    np.testing.assert_array_equal(np.fromfile(files[2], np.float32), expected)
    refused = subprocess.run([program, files[1], files[1], "2", "4", "8", "12", files[2], "2"], stderr=subprocess.PIPE)
    assert refused.returncode == 1
    assert refused.stderr.startswith(b"file: expected a plan")
    if Path("/dev/full").exists():  # a disk without room
        full = [program, files[0], files[1], "2", "4", "8", "12", "/dev/full", "2"]
        assert subprocess.run(full, stderr=subprocess.DEVNULL).returncode == 1


@st.composite
def networks_of_steps(draw: st.DrawFn) -> Steps:
    """Any steps that fit each other, each of what was made before."""
    steps, levels = list[Step](), [0]
    for _ in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["conv", "conv", "conv_transpose", "max_pool"]))
        first = draw(st.integers(0, len(steps)))
        alike = [i for i, level in enumerate(levels) if level == levels[first]]
        others = draw(st.lists(st.sampled_from(alike), max_size=2)) if kind == "conv" else []
        by = draw(st.integers(1, 2))
        steps.append(Step(kind, tuple(map(View, [first, *others])), draw(st.integers(1, 4)), (1, by, by)))
        levels.append(levels[first] + (by - 1) * (-1 if kind == "conv_transpose" else 1))
    outputs = draw(st.lists(st.integers(0, len(steps)), min_size=1, max_size=2))
    return Steps(1, tuple(steps), tuple(map(View, outputs)))


@given(networks_of_steps())
def test_another_order_computes_the_same(network):
    """Each map is made before it is read, of the same maps: written as what it is made of, all the way to the image."""

    def written(network: Steps) -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = [("image",)]
        for step in network.steps:
            found.append((step.kind, step.outputs, step.stride, *(found[view.map] for view in step.views)))
        return [found[view.map] for view in network.outputs] + sorted(found, key=repr)

    assert written(in_little_memory(network, (4, 64, 64))) == written(network)


@torch.no_grad()
def test_of_large_maps_there_is_one_at_a_time(tmp_path):
    """What is finer than a coarser map is made as far as it is read, and units overwrite what they read last."""
    config = E2ENetConfig(channels=(4, 6, 8), strides=((1, 2, 2), (2, 2, 2)), heads=1, num_classes=2)
    torch.manual_seed(0)
    model = E2ENet(config).eval()
    model.deep_supervision = False
    plan, image = planned(model, 1, tmp_path, (8, 16, 16)), torch.randn(1, 1, 160, 168, 160)
    voxels = 4 * image.numel()
    _, taken = plan.measure(image.shape)
    # in channels of the finest level: its one map, with a tenth more between channels, what a node of the next level
    # reads and makes, a quarter of 3 · 6 + 4, and less than 1 of the coarsest; a second finest map would be 4 more
    assert taken < (4.4 + 5.5 + 1) * voxels
    fast = on_engine(model, image[..., :16, :16, :16])
    np.testing.assert_array_equal(plan(image.numpy(), threads=2), fast(image).numpy())

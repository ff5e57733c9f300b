"""A sparse model is a plain model: torch.export and ONNX take it as they take any other; and the page that says so."""

from pathlib import Path

import pytest
import torch
from pages import run_page
from torch import nn
from torch.export import Dim

import dstlib
from dstlib.runtime import library_file
from dstlib.zoo.e2enet import E2ENet, E2ENetConfig

ROOT = Path(__file__).parents[2]


def e2enet(levels: int = 2, shift_kind: str = "fixed") -> nn.Module:
    torch.manual_seed(0)
    channels, strides = (6, 12, 24)[:levels], ((2, 2, 2), (2, 2, 2))[: levels - 1]
    config = E2ENetConfig(channels=channels, strides=strides, heads=1, num_classes=3, shift_kind=shift_kind)
    network = E2ENet(config).eval()
    network.deep_supervision = False
    dstlib.sparsify(network, sparsity=0.8, method="dsff", total_steps=10_000, include=E2ENet.FUSION)
    return network


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    dstlib.sparsify(model, sparsity=0.7, method="rigl", total_steps=10_000)
    return model.eval()


MODELS = {
    "e2enet": (e2enet, torch.rand(2, 1, 8, 8, 8), {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}),
    "cnn": (cnn, torch.rand(2, 3, 8, 8), {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}),
}


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_computes_the_same_at_other_sizes_too(tmp_path, name):
    make, x, dynamic = MODELS[name]
    model = make()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(dynamic,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    for name, weight in model.state_dict().items():
        assert torch.equal(program.state_dict[name], weight), name
    other = torch.rand(3, x.shape[1], *(size + 4 for size in x.shape[2:]))
    for example in (x, other):
        assert torch.equal(program.module()(example), model(example))


@pytest.mark.parametrize(
    ("make", "x", "dynamic"),
    [
        (e2enet, *MODELS["e2enet"][1:2], {0: Dim.AUTO}),
        MODELS["cnn"],
        pytest.param(lambda: e2enet(3), *MODELS["e2enet"][1:], marks=pytest.mark.long),
        pytest.param(lambda: e2enet(3, "rounded"), *MODELS["e2enet"][1:], marks=pytest.mark.long),
    ],
    ids=["e2enet", "cnn", "e2enet of any size", "learned shift"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own exporter
def test_onnx_runtime_computes_the_same_at_other_sizes_too(tmp_path, make, x, dynamic):
    pytest.importorskip("onnxscript")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = make(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=(dynamic,), verbose=False)
    onnx.checker.check_model(path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options)
    for example in (x, torch.rand([size + 4 if axis in dynamic else size for axis, size in enumerate(x.shape)])):
        (result,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
        expected = model(example).detach()
        # the same float32 sums in another order, through some ten layers
        close = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=close)


def test_the_page_runs():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    if library_file() is None:
        pytest.skip("no kernels were built")
    run_page(ROOT / "docs" / "export.md", {}, least=7)

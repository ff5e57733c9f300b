"""Networks as people deploy them: in OpenVINO and ONNX Runtime (extra "bench"), in DeepSparse by another Python."""

import subprocess
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

import torch
from _measure import Action
from torch import Tensor, nn

DEEPSPARSE = Path(__file__).with_name("_deepsparse.py")


def in_openvino(path: Path, x: Tensor, threads: int) -> Action:
    """A pass of the model in OpenVINO: in float32, as all others, where the default may be bfloat16."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled, image = openvino.Core().compile_model(path, "CPU", settings), x.numpy()
    return lambda: compiled(image)[0]


def in_onnxruntime(path: Path, x: Tensor, threads: int) -> Action:
    """A pass of the model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


RUNTIMES: dict[str, Callable[[Path, Tensor, int], Action]] = {"OpenVINO": in_openvino, "ONNX Runtime": in_onnxruntime}
MODULES = {"OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}


def installed() -> list[str]:
    """Names the runtimes that are at hand."""
    if not (find_spec("onnx") and find_spec("onnxscript")):
        return []
    return [name for name, module in MODULES.items() if find_spec(module)]


def load(runtime: str, model: nn.Module, x: Tensor) -> Action:
    """A pass of a model in a runtime, by torch's number of threads. Its output must be torch's."""
    with tempfile.TemporaryDirectory() as folder:
        path = _to_onnx(model, x, Path(folder) / "model.onnx", dynamo=True)
        action = RUNTIMES[runtime](path, x, torch.get_num_threads())
    with torch.no_grad():
        expected = model(x)
    # norms over the few voxels of the coarsest level make much of the last digits: nnU-Net's differed by 3e-4
    tolerance = 1e-3 * float(expected.abs().max())
    torch.testing.assert_close(torch.from_numpy(action().copy()), expected, rtol=0, atol=tolerance)
    return action


def in_deepsparse(python: Path, model: nn.Module, x: Tensor) -> Action | str:
    """A pass of a model in DeepSparse 1.8.0, the paper's own runtime, in a process of its own; or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        path = _to_onnx(model, x, Path(folder) / "model.onnx", dynamo=False, opset_version=13)  # all that it reads
        command = [python, DEEPSPARSE, path, str(torch.get_num_threads()), str(x.shape[-1])]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        send, said = cast(IO[str], process.stdin), iter(cast(IO[str], process.stdout))
        if "ready\n" not in said:  # it ended
            return f"ended while it loaded the model, with status {process.wait()}"

    def action() -> None:
        send.write("\n")
        send.flush()
        next(said)

    return action


def _to_onnx(model: nn.Module, x: Tensor, path: Path, **how: Any) -> Path:
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, (x,), path, verbose=False, **how)
    return path

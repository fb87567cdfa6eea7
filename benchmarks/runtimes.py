"""What runs a network on a CPU in the place of PyTorch: ONNX Runtime and OpenVINO.

Both get one export of the plain network to ONNX, with naive attention, and as many threads as
PyTorch. What else they could be given, UniFormer-S on one clip of 16 x 224 x 224, in medians of 12
turns in random order on 2 threads of an AMD EPYC that other jobs used too:

| attention    | from           | ONNX Runtime | OpenVINO, fp32 | OpenVINO, bf16 |
|--------------|----------------|--------------|----------------|----------------|
| naive        | ONNX           | 0.81 s       | 0.53 s         | 0.29 s         |
| SDPA         | ONNX, opset 18 | 0.85 s       | 0.55 s         | 0.30 s         |
| SDPA, one op | ONNX, opset 23 | 0.76 s       | 0.54 s         | 0.31 s         |
| naive        | torch.export   |              | 0.54 s         | 0.28 s         |
| SDPA         | torch.export   |              | 0.55 s         | 0.28 s         |

In three more runs opset 23 and naive were within 3 % of each other on ONNX Runtime.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Elsewhere", "runtimes"]

PRECISION = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's own choice is bf16 wherever there is one


class Elsewhere(nn.Module):
    """A network that another runtime has: clips in, logits out, without parameters or parts."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, T, H, W), normalised -> logits (B, num_classes)."""
        return torch.from_numpy(self.run(x.numpy()))


def runtimes(
    make: Callable[[], nn.Module], shape: Sequence[int], dtype: str
) -> dict[str, Callable[[], nn.Module]]:
    """How to make the network of each runtime that infers in `dtype`.

    Args:
        make: the network in PyTorch, in eval mode.
        shape: of the clips.
        dtype: "fp32", "fp16" or "bf16".
    """

    @cache
    def onnx() -> bytes:
        return _onnx(make(), torch.zeros(*shape))

    found: dict[str, Callable[[], nn.Module]] = {}
    if dtype == "fp32":
        found["ONNX Runtime"] = lambda: _on_onnxruntime(onnx)
    if dtype in PRECISION:
        found["OpenVINO"] = lambda: _on_openvino(onnx, PRECISION[dtype])
    return found


def _on_onnxruntime(onnx: Callable[[], bytes]) -> Elsewhere:
    onnxruntime = _module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Or its threads would spin on into the turn of the next provider.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(onnx(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Elsewhere(lambda clips: session.run(None, {name: clips})[0])


def _on_openvino(onnx: Callable[[], bytes], precision: str) -> Elsewhere:
    # Importing it tells Intel, or Google for it; it works as well without the package that does.
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    openvino = _module("openvino")
    core = openvino.Core()
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(onnx()), "CPU", hints)
    got = compiled.get_property("INFERENCE_PRECISION_HINT")
    if got != getattr(openvino.Type, precision):
        raise ValueError(f"it infers in {got} here, not in {precision}")
    request = compiled.create_infer_request()
    return Elsewhere(lambda clips: request.infer({0: clips}, share_inputs=True)[0])


def _onnx(network: nn.Module, clips: Tensor) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own parts
        for name in ("onnx", "onnxscript"):
            _module(name)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # or: there is no torchvision
        program: Any = torch.onnx.export(network, (clips,), dynamo=True, verbose=False)
        return program.model_proto.SerializeToString()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install '.[rivals]'", name=error.name
        ) from error

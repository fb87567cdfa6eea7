"""ONNX Runtime and OpenVINO beside the network, and what is said where they are missing."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_model, machine, runtimes
from tests.test_benchmarks import CEILINGS

CLIP = bench_model.Run("uniformer_nano", 4, 32, 1, "fp32", "inference")


def infer(monkeypatch, dtype="fp32", **kwargs):
    """Rows of a tiny clip, by provider, where every runtime infers it."""
    monkeypatch.setattr(bench_model, "FIRST_ON_CPU", CLIP)
    rows = bench_model.measure(replace(CLIP, dtype=dtype), "cpu", CEILINGS, seconds=0, **kwargs)
    return {row["provider"]: row for row in rows}


def in_place_of_onnxruntime(monkeypatch, answer):
    """The package gives `answer` of the network and its clips, and says which threads it got."""
    threads = []

    class Session:
        def __init__(self, network, options, providers):
            self.network = network
            threads.append(options.intra_op_num_threads)

        def get_inputs(self):
            return [SimpleNamespace(name="x")]

        @torch.no_grad()
        def run(self, outputs, inputs):
            return [answer(self.network, torch.from_numpy(inputs["x"])).numpy()]

    def options():
        return SimpleNamespace(add_session_config_entry=lambda name, value: None)

    package = SimpleNamespace(SessionOptions=options, InferenceSession=Session)
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    monkeypatch.setattr(runtimes, "_onnx", lambda network, clips: network)
    return threads


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch):
    for package in machine.RUNTIMES:
        monkeypatch.setitem(sys.modules, package, None)
    rows = infer(monkeypatch)
    for name, package in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
        assert rows[name]["failed"] == (
            f"ModuleNotFoundError: {package} is not installed: pip install '.[rivals]'"
        )
    assert all("p50_ms" in rows[name] for name in ("uniformer", "PyTorch NCTHW"))
    in_16_bits = infer(monkeypatch, "bf16")
    assert "failed" in in_16_bits["OpenVINO"]
    assert "ONNX Runtime" not in in_16_bits
    assert set(infer(monkeypatch, only="uniformer")) == {"uniformer"}


def test_a_runtime_without_the_exporter_says_so_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match="onnx is not installed: pip install"):
        runtimes._onnx(torch.nn.Identity(), torch.zeros(1))


@pytest.mark.parametrize(("answer", "complaint"), [
    (lambda network, x: network(x), None),
    (lambda network, x: 1.01 * network(x), "ValueError: wrong: the result is off by 1.0e-02"),
    (lambda network, x: network(x)[:, 1:], "RuntimeError"),
    (lambda network, x: x / 0 @ x, "Error"),
])  # fmt: skip
def test_a_runtime_is_checked_and_has_as_many_threads(answer, complaint, monkeypatch):
    threads = in_place_of_onnxruntime(monkeypatch, answer)
    row = infer(monkeypatch)["ONNX Runtime"]
    assert threads == [torch.get_num_threads()]
    if complaint is None:
        assert row["p50_ms"] > 0
    else:
        assert complaint in row["failed"]


@pytest.mark.skipif(
    not all(find_spec(package) for package in (*machine.RUNTIMES, "onnx", "onnxscript")),
    reason="needs pip install '.[rivals]'",
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_runtimes_infer_the_network(dtype, monkeypatch):
    rows = infer(monkeypatch, dtype)
    assert [who for who in rows if "PyTorch" not in who and not who.startswith("uniformer")] == (
        ["ONNX Runtime", "OpenVINO"] if dtype == "fp32" else ["OpenVINO"]
    )
    assert {who: row["failed"] for who, row in rows.items() if "failed" in row} == {}


def test_runtimes_infer_one_clip_of_the_benchmarks():
    for device in ("cpu", "cuda"):
        having = {
            (str(config), who)
            for config in bench_model.runs(device, full=True)
            for who in bench_model.providers(config, device, compiled=True)
            if "ONNX" in who or "OpenVINO" in who
        }
        clip = "uniformer_small 16x224 B=1"
        assert having == (
            set()
            if device == "cuda"
            else {
                (f"{clip} fp32 inference", "ONNX Runtime"),
                (f"{clip} fp32 inference", "OpenVINO"),
                (f"{clip} bf16 inference", "OpenVINO"),
            }
        )

"""The benchmarks themselves: nothing wrong is timed, nothing measured is lost."""

import json
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from benchmarks import bench_model, gpu, harness, machine, run
from benchmarks.harness import Case, Problem, Provider
from uniformer.configs import UniFormerConfig
from uniformer.model import UniFormer
from uniformer_kernels import backend
from uniformer_kernels.dwconv3d import dwconv3d_ref

CEILINGS = {"copy_GBps": 20.0, "fp32_TFLOPs": 0.1, "fp16_TFLOPs": 0.1, "bf16_TFLOPs": 0.2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scaled(x, weight):
    return x * weight


def a_case(**providers):
    def make(device):
        weight = torch.rand(6, device=device) + 1
        x = torch.randn(2, 3, 4, 5, 6, device=device)
        found = {name: Provider(fn, [weight.clone()]) for name, fn in providers.items()}
        return Problem(x, found, Provider(scaled, [weight.double()]))

    return Case("scale", "small", 1, 2, "fp32", make, bytes=(4000, 6000), flops=(500, 1000))


def measure(case, **kwargs):
    return harness.measure(case, DEVICE, CEILINGS, seconds=0, **kwargs)


# --- Nothing wrong is timed -----------------------------------------------------------


@pytest.mark.parametrize(("wrong", "complaint"), [
    (lambda x, w: x * w * 1.01, "is off by 1.0e-02"),
    (lambda x, w: x * w.detach() + 0 * w, "the gradient of parameter 1"),
    (lambda x, w: (x * w).detach() + 0 * (x * w), "the gradient of x is off by 1.0e"),
    (lambda x, w: x * w * torch.nan, "is off by nan"),
    (lambda x, w: (x * w)[1:], "Mismatch in shape"),
    (lambda x, w: x @ w, "Error"),
])  # fmt: skip
def test_a_wrong_kernel_is_refused(wrong, complaint):
    rows = measure(a_case(right=scaled, wrong=wrong))
    for row in rows:
        assert ("p50_ms" in row) == (row["provider"] == "right")
        if row["provider"] == "wrong":
            assert complaint in row["failed"]


def test_a_rival_that_raises_is_a_row_that_says_so():
    def broken(x, w):
        raise RuntimeError("not on this machine")

    rows = measure(a_case(right=scaled, broken=broken), directions=["forward"])
    assert [r.get("failed") for r in rows] == [None, "RuntimeError: not on this machine"]


def test_a_rival_that_fails_later_is_a_row_too():
    calls = []

    def once(x, w):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no second time")
        return x * w

    rows = measure(a_case(right=scaled, once=once), directions=["forward", "both"])
    failed = {(r["provider"], r["direction"]): r.get("failed") for r in rows}
    assert failed["right", "both"] is None
    assert (
        failed["once", "forward"] == failed["once", "both"] == "later RuntimeError: no second time"
    )


def test_what_is_right_only_at_first_is_no_figure():
    calls = []

    def forgets(x, w):
        calls.append(1)
        return x * w * (len(calls) == 1)

    rows = measure(a_case(right=scaled, forgets=forgets))
    later = [r["failed"] for r in rows if r["provider"] == "forgets"]
    assert len(later) == 3
    assert all("later wrong" in why for why in later)


class _Doubled(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


@pytest.mark.parametrize(("wrong_at", "complaint"), [
    (lambda x: 2 * x, "the result is off by 1.0e+00"),
    (_Doubled.apply, "the gradient of the first weight is off by 1.0e+00"),
])  # fmt: skip
def test_a_wrong_network_is_refused(wrong_at, complaint, monkeypatch):
    class Wrong(bench_model.PlainUniFormer):
        def forward_features(self, x):
            return wrong_at(super().forward_features(x))

    real = bench_model.providers

    def providers(config, device, compiled):
        found = real(config, device, compiled)
        good = found["uniformer"]()

        def wrong():
            cfg = good.cfg
            bad = Wrong(cfg)
            bad.load_state_dict(good.state_dict())
            return bad.to(device).train(config.mode == "training")

        return {**found, "uniformer": wrong}

    monkeypatch.setattr(bench_model, "providers", providers)
    config = bench_model.Run("uniformer_nano", 4, 32, 2, "fp32", "training")
    rows = bench_model.measure(config, DEVICE, CEILINGS, seconds=0)
    failed = {row["provider"]: row.get("failed") for row in rows}
    assert failed["uniformer"].startswith(f"ValueError: wrong: {complaint}")
    assert failed["PyTorch NCTHW"] is None


def test_layouts_are_the_rivals_own():
    """Each provider gets its layout, and is judged in the problem's."""
    seen = {}

    def convolution(name, x, weight):
        seen[name] = x
        return F.conv3d(x, weight, padding=1, groups=6)

    def make(device):
        x, weight = torch.randn(1, 3, 4, 5, 6, device=device), torch.randn(6, 1, 3, 3, 3)
        formats = {"NCTHW": torch.contiguous_format, "last": torch.channels_last_3d}
        found = {
            n: Provider(partial(convolution, n), [weight.to(device)], f) for n, f in formats.items()
        }
        wide = weight.double().to(device)
        return Problem(x, found, Provider(partial(convolution, "truth"), [wide], formats["last"]))

    rows = measure(Case("conv", "small", 1, 1, "fp32", make))
    assert all("p50_ms" in row for row in rows)
    assert seen["NCTHW"].is_contiguous()
    assert seen["last"].is_contiguous(memory_format=torch.channels_last_3d)


# --- What is printed ------------------------------------------------------------------


def test_floors_are_the_longer_of_bytes_and_operations():
    case = a_case(right=scaled)
    assert case.floor_ms("forward", CEILINGS) == pytest.approx(4000 / 20e9 * 1e3)
    assert case.floor_ms("both", CEILINGS) == pytest.approx(10000 / 20e9 * 1e3)
    heavy = Case("gemm", "", 1, 1, "bf16", case.make, bytes=(1, 1), flops=(10**9, 0))
    assert heavy.floor_ms("forward", CEILINGS) == pytest.approx(1e9 / 0.2e12 * 1e3)
    fma = Case("fma", "", 1, 1, "bf16", case.make, flops=(10**9, 0), unit="fma")
    assert fma.floor_ms("forward", CEILINGS) == pytest.approx(1e9 / 0.1e12 * 1e3)


def test_rows_carry_the_spread():
    (row,) = measure(a_case(right=scaled), directions=["both"])
    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert (row["bytes"], row["flops"], row["rounds"]) == (10000, 1500, 3)


def test_every_case_is_named_once():
    for device in ("cpu", "cuda"):
        for full, least in ((False, 40), (True, 200)):
            names = [str(case) for case in run.cases(device, full=full)]
            assert len(names) == len(set(names)) > least
            runs = [str(config) for config in bench_model.runs(device, full=full)]
            assert len(runs) == len(set(runs)) > least / 5


# --- Files ----------------------------------------------------------------------------


def test_results_are_written_whole_and_read_back(tmp_path):
    file = tmp_path / "folder" / "ops_cpu.json"
    rows = [{"op": "a", "provider": "x", "batch": 1}, {"op": "b", "provider": "x", "batch": 2}]
    content = {"environment": {"torch": "x"}, "ceilings": CEILINGS, "rows": rows}
    machine.save(file, content)
    assert machine.read(file) == content
    assert not list(file.parent.glob("*.part"))
    file.write_text(file.read_text()[:-20])
    assert machine.read(file) is None
    assert machine.read(tmp_path / "missing.json") is None


def test_a_run_goes_on_where_it_stopped(tmp_path, capsys):
    words = ["ops", "DPE|attention", "--tiny", "--seconds", "0", "--out", str(tmp_path)]
    file = tmp_path / f"ops_{machine.slug(DEVICE)}.json"
    assert run.main([*words, "--limit", "0"]) == run.OUT_OF_TIME
    assert "out of time: 4 of 4 ops are not measured" in capsys.readouterr().out
    assert run.main(["ops", "DPE", *words[2:], "--no-report"]) == 0
    first = machine.read(file)["rows"]
    assert run.main([*words, "--resume"]) == 0
    assert "2 of 4 ops are measured already" in capsys.readouterr().out
    rows = machine.read(file)["rows"]
    assert rows[: len(first)] == first
    assert {row["op"] for row in rows} == {"DPE + LayerNorm", "attention"}
    assert (tmp_path / f"report_{machine.slug(DEVICE)}.md").is_file()


def test_results_of_another_commit_or_provider_are_not_taken_for_these(tmp_path, capsys):
    words = ["ops", "attention", "N=4", "--tiny", "--seconds", "0", "--out", str(tmp_path)]
    file = tmp_path / f"ops_{machine.slug(DEVICE)}.json"
    run.main([*words, "--only", "naive"])
    run.main([*words, "--resume"])
    rows = machine.read(file)["rows"]
    assert {row["provider"] for row in rows} >= {"naive", "uniformer"}
    assert len({(row["provider"], row["direction"]) for row in rows}) == len(rows)
    content = machine.read(file)
    machine.save(file, {**content, "environment": {**content["environment"], "commit": "older"}})
    run.main([*words, "--resume"])
    assert "is of another commit: it is measured anew" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [
    "", "[]", '{"rows": []}', '{"rows": null, "environment": null, "ceilings": {}}',
    '{"rows": 3, "environment": {}, "ceilings": {}}',
    '{"rows": [{}], "environment": {}, "ceilings": {}}',
])  # fmt: skip
def test_damaged_results_are_none(damaged, tmp_path):
    (tmp_path / "a.json").write_text(damaged)
    assert machine.read(tmp_path / "a.json") is None


def test_words_that_nothing_has_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["ops", "convolution", "--tiny"])
    assert "no name has convolution; there are" in capsys.readouterr().err


@pytest.mark.skipif(machine.git("rev-parse", "HEAD") is None, reason="this is no git checkout")
def test_two_revisions_are_compared(tmp_path, capfd):
    run.main(["ops", "DPE", "--tiny", "--seconds", "0", "--base", "HEAD"])
    printed = capfd.readouterr().out
    assert "DPE + LayerNorm C=64 2x4x4" in printed
    assert "x  " in printed
    with pytest.raises(SystemExit, match="'nowhere' is no revision"):
        run.main(["ops", "--base", "nowhere"])


# --- The GPU run ----------------------------------------------------------------------


def test_the_gpu_run_is_rehearsed(tmp_path, capsys):
    """Every step, on tiny shapes; a second call has nothing left to do but the report."""
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    state = json.loads((tmp_path / "gpu" / "state.json").read_text())
    steps = ["tests", "tune", "attention", "operators", "networks", "memcheck", "racecheck"]
    assert {name: row["status"] for name, row in state.items()} == dict.fromkeys(
        [*steps, "layers", "report"], "done"
    )
    slug = machine.slug(DEVICE)
    came = {p.name for p in tmp_path.iterdir()} - {"gpu", "results"}
    assert came >= {f"ops_{slug}.json", f"models_{slug}.json", "table.txt", "logs_and_plots.tar.gz"}
    assert len(came) <= 8
    assert "the best rival" in (tmp_path / "table.txt").read_text()
    capsys.readouterr()
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done already") == 8


def test_steps_that_hang_fail_or_are_missing_are_told_apart(tmp_path, monkeypatch, capsys):
    python = [sys.executable, "-c"]
    made = [
        gpu.Step("hangs", [*python, "import time; print('busy'); time.sleep(60)"], 6),
        gpu.Step("fails", [*python, "print('fine so far'); raise SystemExit('alas')"], 9),
        gpu.Step("missing", ["no-such-program"], 9),
        gpu.Step("works", [*python, "print('fine')"], 9),
    ]
    monkeypatch.setattr(gpu, "steps", lambda dry, results: made)
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    state = json.loads((tmp_path / "gpu" / "state.json").read_text())
    assert [(r["status"], r["note"]) for r in state.values()] == [
        ("cut off", "busy"),
        ("failed", "alas"),
        ("not run", "there is no no-such-program"),
        ("done", "fine"),
    ]
    assert "cut off" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_without_a_gpu_it_says_how_to_rehearse(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--dry-run rehearses every step" in capsys.readouterr().err


def test_it_needs_nothing_of_video_training_or_plots():
    """A machine with a GPU may have torch and little else."""
    absent = ["av", "decord", "jsonargparse", "kornia", "accelerate", "matplotlib", "sklearn"]
    program = f"""
import sys
for name in {absent}:
    sys.modules[name] = None
from benchmarks import gpu, run, sanitized, tune
import tests.conftest, tests.test_gpu, tests.test_model, tests.test_dwconv3d, tests.test_layers
print("fine")
"""
    environment = {
        "PYTHONPATH": f"{machine.ROOT}:{machine.ROOT / 'kernels'}",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize("path", ["auto", "triton"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_network_on_another_convolution_calls_nothing_else(mode, path):
    """Two in each of the two local blocks, one in each global one."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return dwconv3d_ref(*args, **kwargs)

    cfg = UniFormerConfig(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), head_dim=8, num_classes=2)
    model = getattr(UniFormer(cfg), mode)()
    operators = sys.modules[dwconv3d_ref.__module__]
    with (
        patch.object(operators, "_fwd", None), patch.object(operators, "_stats", None),
        backend(path),
    ):  # fmt: skip
        bench_model._on(counted, model)(torch.randn(2, 3, 2, 32, 32))
    assert len(calls) == 2 * 2 + 2

"""Measured launches: found by GPU and shape, used, harmless if malformed, written by the tuner."""

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import tune, tune_attention, tuning
from uniformer_kernels import _runtime, dwconv3d, dwconv3d_native
from uniformer_kernels.dwconv3d import dwconv3d_ref

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0)
KEY = ("fwd", (5, 5, 5), torch.bfloat16, 64, (8, 56, 56))
ROW = {"backend": "cuda", "NH": 2, "NW": 14, "BLOCK_P": 4, "BLOCK_C": 32, "warps": 8, "ms": 0.5}
TABLES = {"sm_90": {"environment": {}, "dwconv3d": {"fwd 5x5x5 bf16 64 8x56x56": ROW}}}


@pytest.fixture
def on_file(tmp_path, monkeypatch):
    """Writes a table as if for the GPU of this test, an H100; nothing is cached meanwhile."""
    monkeypatch.setattr(_runtime, "TUNED", tmp_path / "tuned.json")
    monkeypatch.setattr(_runtime, "_announced", set())
    monkeypatch.setattr(_runtime, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def write(text):
        _runtime.TUNED.write_text(text)
        _runtime._tuned_on.cache_clear()

    yield write
    _runtime._tuned_on.cache_clear()


# --- The file -------------------------------------------------------------------------


def test_a_row_is_found_by_gpu_and_shape(on_file, monkeypatch):
    on_file(json.dumps(TABLES))
    assert _runtime.tuned("dwconv3d", KEY, DEVICE) == ROW
    assert _runtime.tuned("dwconv3d", ("bwd_weight", *KEY[1:]), DEVICE) is None
    assert _runtime.tuned("dwconv3d", (*KEY[:-1], (8, 28, 28)), DEVICE) is None
    assert _runtime.tuned("attention", KEY, DEVICE) is None
    assert _runtime.tuned("dwconv3d", KEY, torch.device("cpu")) is None
    x, weight = torch.empty(2, 8, 56, 56, 64, dtype=torch.bfloat16), torch.empty(64, 1, 5, 5, 5)
    key = ("fwd", weight.shape[2:], x.dtype, x.shape[4], x.shape[1:4])  # as the operator asks
    assert _runtime.tuned("dwconv3d", key, DEVICE) == ROW
    for patch in (
        (torch.cuda, "get_device_capability", lambda device: (8, 0)),
        (_runtime, "interpreting", lambda: True),
        (torch.version, "hip", "7.1"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            _runtime._tuned_on.cache_clear()
            assert _runtime.tuned("dwconv3d", KEY, DEVICE) is None


def test_the_lookup_is_cheap(on_file):
    on_file(json.dumps(TABLES))
    _runtime.tuned("dwconv3d", KEY, DEVICE)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            _runtime.tuned("dwconv3d", KEY, DEVICE)
        times.append((time.perf_counter() - start) / 100)
    assert min(times) < 5e-6


@pytest.mark.parametrize("text", [
    "", "[]", "{", '{"sm_90": []}', '{"sm_90": {"dwconv3d": 3}}',
    '{"sm_90": {"dwconv3d": {"a": 3}}}',
    '{"sm_90": {"dwconv3d": {"a": {}}}}',  # no backend
    '{"sm_90": {"dwconv3d": {"a": {"backend": "auto"}}}}',
    '{"sm_90": {"dwconv3d": {"a": {"backend": "triton", "NH": 0}}}}',
    '{"sm_90": {"dwconv3d": {"a": {"backend": "triton", "warps": "4"}}}}',
    '{"sm_90": {"dwconv3d": {"a": {"backend": "triton", "BLOCK_C": 48}}}}',
])  # fmt: skip
def test_a_malformed_file_is_as_none_and_announced_once(text, on_file, caplog):
    on_file(text)
    for device in (DEVICE, torch.device("cuda", 1)):
        assert _runtime.tuned("dwconv3d", KEY, device) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "launched untuned" in record.message
    assert "tuned.json is not as benchmarks/tune.py writes it" in record.message


def test_a_missing_file_is_as_none(on_file, caplog):
    _runtime._tuned_on.cache_clear()
    assert _runtime.tuned("dwconv3d", KEY, DEVICE) is None
    assert "No such file" in caplog.text


def test_the_file_of_the_package_is_well_formed():
    for arch in json.loads(_runtime.TUNED.read_text()):
        for (op, key), row in _runtime._read_tuned(arch).items():
            direction, kernel, dtype, C, shape = key
            assert op == "dwconv3d"
            assert direction in ("fwd", "bwd_weight", "bwd", "norm")
            assert dtype in _runtime.DTYPES.values()
            assert (len(kernel), len(shape), type(C)) == (3, 3, int)
            assert row["ms"] <= min(row["rival_ms"].values())


# --- Launches -------------------------------------------------------------------------


@pytest.fixture
def op():
    return pytest.importorskip("uniformer_kernels.dwconv3d_triton")


@pytest.fixture
def bwd():
    return pytest.importorskip("uniformer_kernels.dwconv3d_bwd_triton")


def test_without_a_row_launches_are_the_defaults(op):
    shape, kernel = (2, 8, 14, 14, 64), (3, 3, 3)
    default = op.fwd_config(shape, 64, kernel)
    assert default == op.fwd_config(shape, 64, kernel, {})
    sizes = {n: default.arguments[n] for n in tune.SIZES} | {"warps": default.warps}
    assert sizes == {"NH": 4, "NW": 7, "BLOCK_P": 4, "BLOCK_C": 64, "warps": 4}
    assert default == op.fwd_config(shape, 64, kernel, sizes)
    assert default != op.fwd_config(shape, 64, kernel, ROW)


def test_sizes_are_no_larger_than_the_shape(op, bwd):
    row = {"NH": 7, "NW": 14, "BLOCK_P": 2, "BLOCK_C": 128, "warps": 8}
    for config in (
        op.fwd_config((1, 2, 3, 5, 20), 20, (3, 3, 3), row),
        bwd.tiles_config((1, 2, 3, 5, 20), 20, 20, (3, 3, 3), 2, row),
        bwd.bwd_config((1, 2, 3, 5, 20), 20, 20, (3, 3, 3), 2, row),
    ):
        got = {"NH": 3} | {n: config.arguments[n] for n in tune.SIZES if n in config.arguments}
        assert got == {"NH": 3, "NW": 5, "BLOCK_P": 2, "BLOCK_C": 32}
        assert config.arguments["EVEN_W"]
        assert config.warps == 8


# Runs as wide as a row, and with a rest, as the rows have; the interpreter takes seconds.
@pytest.mark.parametrize(("NH", "NW"), [(1, 14), (2, 8)])
def test_measured_launches_compute_the_same(op, NH, NW, device, monkeypatch):
    row = {"backend": "triton", "NH": NH, "NW": NW, "BLOCK_P": 2, "BLOCK_C": 8, "warps": 2}
    x = torch.randn(1, 1, 3, 14, 12, device=device)
    weight, bias = torch.randn(12, 1, 1, 3, 3, device=device), torch.randn(12, device=device)
    asked = []

    def run(found):
        def tuned(name, key, at):
            asked.append(key)
            return found

        monkeypatch.setattr(_runtime, "tuned", tuned)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with _runtime.backend("triton"):
            y = dwconv3d(*leaves, residual=True)
            return [y.detach(), *torch.autograd.grad(y, leaves, torch.cos(y.detach()))]

    want = run(None)
    for g, w in zip(run(row), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-4)
    shape = ((1, 3, 3), torch.float32, 12, (1, 3, 14))
    assert asked == 2 * [("fwd", *shape), ("bwd", *shape)]
    launched = [op.fwd(x, weight, bias, True, tuned=tuned) for tuned in (row, {}, None)]
    torch.testing.assert_close(launched[0], launched[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(launched[0], launched[2])  # `row` is what is on file


# --- Backends -------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch):
    """Which kernels ran, as if "auto" were Triton."""
    names = []

    class Kernels:
        """In place of both the Triton and the CUDA kernels."""

        def __init__(self, name):
            self.name = name

        def fwd(self, x, weight, bias, residual, mirror=False):
            names.append(f"{self.name} {'dx' if mirror else 'fwd'}")
            weight = weight.flip(2, 3, 4) if mirror else weight
            return dwconv3d_ref(x, weight, bias, residual=residual)

        def bwd_weight(self, dy, x, weight):
            names.append(f"{self.name} bwd_weight")
            return torch.zeros(weight[0].numel() + 1, len(weight))

        def bwd(self, dy, x, weight, residual):
            names.append(f"{self.name} bwd")
            return dy, torch.zeros(weight[0].numel() + 1, len(weight))

        def in_one_pass(self, kernel, W):
            return kernel == (3, 3, 3)

    module = sys.modules[dwconv3d.__module__]
    monkeypatch.setattr(_runtime, "_announced", set())
    monkeypatch.setattr(_runtime, "_current", "auto")
    monkeypatch.setattr(_runtime, "serving", lambda op, device: "triton")
    monkeypatch.setattr(module, "_triton", lambda: Kernels("triton"))
    monkeypatch.setattr(module, "_triton_bwd", lambda: Kernels("triton"))
    monkeypatch.setattr(dwconv3d_native, "fwd_cuda", Kernels("cuda").fwd)
    monkeypatch.setattr(dwconv3d_native, "bwd_weight_cuda", Kernels("cuda").bwd_weight)
    return names


def step(k=3):
    x, weight = torch.randn(1, 2, 4, 14, 16), torch.randn(16, 1, k, k, k)
    dwconv3d(x.requires_grad_(), weight.requires_grad_()).sum().backward()


def say(monkeypatch, **backends):
    """A table by direction, and that C++ can run."""
    rows = {name: ROW | {"backend": backend} for name, backend in backends.items()}
    monkeypatch.setattr(_runtime, "tuned", lambda op, key, device: rows.get(key[0]))
    monkeypatch.setattr(_runtime, "why_not", lambda name: None)


@pytest.mark.parametrize(("k", "table", "kernels"), [
    (5, {}, ["triton fwd", "triton dx", "triton bwd_weight"]),
    (5, {"fwd": "cuda"}, ["cuda fwd", "cuda dx", "triton bwd_weight"]),
    (5, {"fwd": "triton", "bwd_weight": "cuda"}, ["triton fwd", "triton dx", "cuda bwd_weight"]),
    (3, {}, ["triton fwd", "triton bwd"]),
    (3, {"fwd": "cuda"}, ["cuda fwd", "cuda dx", "triton bwd_weight"]),
    (3, {"fwd": "cuda", "bwd": "triton"}, ["cuda fwd", "triton bwd"]),
    (3, {"bwd": "apart"}, ["triton fwd", "triton dx", "triton bwd_weight"]),
    (3, {"fwd": "cuda", "bwd_weight": "cuda"}, ["cuda fwd", "cuda dx", "cuda bwd_weight"]),
], ids=str)  # fmt: skip
def test_auto_takes_the_backend_of_the_table(k, table, kernels, ran, monkeypatch, caplog):
    say(monkeypatch, **table)
    step(k)
    assert ran == kernels
    assert not caplog.records


def test_auto_takes_triton_where_the_library_cannot_run(ran, monkeypatch, caplog):
    say(monkeypatch, fwd="cuda", bwd_weight="cuda")
    step(k=7)  # for which there is none
    monkeypatch.setattr(_runtime, "why_not", lambda name: f"no {name} here")
    step()
    assert ran == [
        "triton fwd", "triton dx", "triton bwd_weight", "triton fwd", "triton bwd"
    ]  # fmt: skip
    assert ["no cuda here" in r.message for r in caplog.records] == [False, True]  # once each


def test_a_backend_that_was_asked_for_stays(ran, monkeypatch):
    say(monkeypatch, fwd="cuda", bwd_weight="cuda", bwd="apart")
    monkeypatch.setattr(_runtime, "_current", "triton")
    step()
    assert ran == ["triton fwd", "triton bwd"]


# --- The tuner ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What a dry run wrote into a file with a table of another GPU, and said."""
    pytest.importorskip("triton")
    into = tmp_path_factory.mktemp("tune") / "a.json"
    into.write_text(json.dumps(TABLES))
    environment = {k: v for k, v in os.environ.items() if GPU or k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tune", "--dry-run", "--into", str(into)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return into, done.stdout


def test_a_dry_run_writes_a_valid_table(dry, monkeypatch):
    into, said = dry
    assert [p.name for p in into.parent.iterdir()] == [into.name]  # nothing half-written
    tables = json.loads(into.read_text())
    assert tables["sm_90"] == TABLES["sm_90"] or GPU
    arch = tuning.environment(1)[0]
    assert tables[arch]["environment"]["torch"] == torch.__version__
    monkeypatch.setattr(_runtime, "TUNED", into)
    rows = _runtime._read_tuned(arch)
    keys = {
        ("dwconv3d", (direction, (3, 3, 3), dtype, 8, (1, 1, 7)))
        for direction in ("fwd", "bwd_weight", "bwd", "norm")
        for dtype in (torch.bfloat16, torch.float16)
    }
    assert keys <= set(rows)
    for key in keys:
        assert rows[key]["ms"] > 0
        assert rows[key]["rival_ms"]["default"] >= rows[key]["ms"]
        sizes = [name for name in tune.SIZES if name != "NH" or key[1][0] == "fwd"]
        assert all(type(rows[key][name]) is int for name in (*sizes, "warps"))
        assert ("apart" in (rows[key]["backend"], *rows[key]["rival_ms"])) == (
            key[1][0] in ("bwd", "norm")
        )
    assert "0 not tried" in said
    assert ("4 skipped" in said and "there is no CUDA device" in said) or GPU


CASE = tune.Case("fwd", 3, "fp16", (1, 1, 2, 7, 8))


@pytest.mark.parametrize("wrong", ["off", "nan", "raises"])
def test_a_candidate_that_is_wrong_or_fails_is_skipped(wrong, op, monkeypatch):
    rows = tune.rows_of(CASE)[:3]
    right = tune.launch

    def launch(case, row, tensors):
        if row == rows[1] and wrong == "raises":
            raise RuntimeError("out of resources")
        (y,) = right(case, row, tensors)
        if row == rows[1]:
            y.view(-1)[-1] += 1 if wrong == "off" else float("nan")
        return (y,)

    monkeypatch.setattr(tune, "launch", launch)
    monkeypatch.setattr(tune, "time_ms", lambda run: 1.0)
    times, failed = tune.measure(CASE, rows, time.monotonic() + 60)
    assert [row for _, row in times] == [rows[0], rows[2]]
    ((case, row, why),) = failed
    assert (case, row) == (CASE, rows[1])
    assert ("out of resources" if wrong == "raises" else "wrong by") in why


def test_what_a_candidate_leaves_out_is_seen(op, monkeypatch):
    """Though the memory it is given may hold the right result, of the launch before."""
    right, unwritten = tune.launch, []

    def launch(case, row, tensors):
        unwritten.append(float(torch.empty(1)))
        return right(case, row, tensors)

    monkeypatch.setattr(tune, "launch", launch)
    torch.use_deterministic_algorithms(False)  # which the other tests have on
    times, _ = tune.measure(CASE, tune.rows_of(CASE)[:2], time.monotonic() + 60)
    assert len(times) == 2
    assert [math.isnan(x) for x in unwritten[::2]] == [True, True]  # when they were compared
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_the_default_nothing_is_right(op, monkeypatch):
    def launch(case, row, tensors):
        raise RuntimeError("no")

    monkeypatch.setattr(tune, "launch", launch)
    times, failed = tune.measure(CASE, tune.rows_of(CASE), time.monotonic() + 60)
    assert (times, len(failed)) == ([], 1)


def test_the_best_of_both_backends_is_kept():
    rows = [ROW | {"backend": "triton", "NH": n} for n in (4, 2, 1)]
    times = [(3.0, rows[0]), (2.0, rows[1]), (2.5, rows[2])]
    best = tune.result(times)
    assert (best["backend"], best["NH"], best["ms"]) == ("triton", 2, 2.0)
    assert best["rival_ms"] == {"default": 3.0}
    best = tune.result([*times, (1.0, {"backend": "cuda"})])
    assert (best["backend"], best["NH"], best["ms"]) == ("cuda", 2, 1.0)  # and Triton's best launch
    assert best["rival_ms"] == {"default": 3.0, "triton": 2.0}
    best = tune.result([*times, (2.2, {"backend": "cuda"})])
    assert best["rival_ms"] == {"default": 3.0, "cuda": 2.2}
    best = tune.result(times, apart=1.5)
    assert (best["backend"], best["ms"]) == ("apart", 1.5)
    assert best["rival_ms"] == {"default": 3.0, "triton": 2.0}


def test_one_pass_is_compared_with_its_parts():
    case = CASE._replace(direction="bwd")
    parts = {case._replace(direction=d): {"ms": ms} for d, ms in (("fwd", 1.0), ("bwd_weight", 2))}
    assert tune.in_parts(case, parts) == 3.0
    assert tune.in_parts(case, {CASE: {"ms": 1.0}}) is None
    assert tune.in_parts(CASE, parts) is None


def test_candidates_differ_and_are_few(op):
    cases = tune.list_cases(dry_run=False)
    assert [case.dtype for case in cases] == 18 * ["bf16"] + 18 * ["fp16"]
    assert cases[0].key == "fwd 5x5x5 bf16 64 8x56x56"
    for case in cases:
        rows = tune.rows_of(case)
        assert 6 <= len(rows) <= 17
        assert all(row not in rows[:i] for i, row in enumerate(rows))
        *_, H, W, _ = case.shape
        last = {"norm": "apart", "bwd": "triton"}.get(case.direction, "cuda")
        assert rows[-1]["backend"] == last
        for row in rows[:-1]:
            # A lane of every thread, and no more sums than a thread has registers.
            lanes = row["BLOCK_P"] * row["BLOCK_C"] / 32 / row["warps"]
            assert lanes >= 1
            rows_of_x = row.get("NH", 1)
            assert rows_of_x * row["NW"] * lanes <= 128
            assert (rows_of_x <= H, row["NW"] <= W) == (True, True)


def test_time_that_is_up_is_said(op, tmp_path, capsys, monkeypatch):
    into = tmp_path / "a.json"
    monkeypatch.setattr(tune, "compile_all", lambda rows, deadline: (dict(rows), []))
    tune.main(["--dry-run", "--into", str(into), "--seconds", "0"])
    said = capsys.readouterr().out
    tried = sum(len(tune.rows_of(c, dry_run=True)) for c in tune.list_cases(dry_run=True))
    assert f"0 launches timed, 0 skipped, {tried} not tried" in said
    assert "without a result: fwd 3x3x3 bf16 8 1x1x7; bwd_weight" in said
    assert not into.exists()


def test_mistakes_are_found_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr(tune, "compile_all", None)
    with pytest.raises(ValueError, match="holds no tables"):
        tune.main(["--dry-run", "--into", str(tmp_path / "a.json")])
    with contextlib.suppress(SystemExit):
        tune.main(["--dry-run"])
    assert "say --into FILE" in capsys.readouterr().err
    if not GPU:
        with contextlib.suppress(SystemExit):
            tune.main([])
        assert "needs a CUDA device" in capsys.readouterr().err


def test_attention_is_tuned_beside_pytorchs(tmp_path, monkeypatch):
    into = tmp_path / "tuned.json"
    tune_attention.main(["--dry-run", "--into", str(into)])
    table = json.loads(into.read_text())[tuning.environment(1)[0]]["attention"]
    assert set(table) == {"fwd fp16 8 28", "step fp16 8 28"}
    for row in table.values():
        assert row["backend"] in ("triton", "sdpa")
        assert row["ms"] <= min(row["rival_ms"].values())
    monkeypatch.setattr(_runtime, "TUNED", into)
    read = _runtime._read_tuned(tuning.environment(1)[0])
    assert read["attention", ("fwd", torch.float16, 8, 28)] == table["fwd fp16 8 28"]

"""The report of benchmark results: ratios, floors, failures, what changed, pictures."""

import json
import math
import sys

import pytest

from benchmarks import report
from benchmarks.compare import changes, group, ratio
from benchmarks.report import main, write_report

RIVALS = ("PyTorch NCTHW", "PyTorch channels_last_3d")
MACHINE = {
    "environment": {"processor": "AMD EPYC", "threads": 2, "gpu": None, "torch": "2.13.0"},
    "ceilings": {"copy_GBps": 14.0, "fp32_TFLOPs": 0.15, "fp16_TFLOPs": 0.004, "bf16_TFLOPs": 0.3},
}


def timed(ms: float) -> dict:
    return {"p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.2 * ms, "rounds": 20}


def op(provider: str, ms: float | None) -> dict:
    """A row of the depthwise convolution; failed where it has no time."""
    row = {
        "op": "dwconv3d", "case": "5x5x5 C=64 8x56x56", "stage": 1, "batch": 1, "dtype": "fp32",
        "direction": "forward", "provider": provider, "bytes": 12_845_056, "flops": 401_408_000,
        "unit": "fma", "floor_ms": 3.0,
    }  # fmt: skip
    return row | ({"failed": "RuntimeError: no kernel\n for |this|"} if ms is None else timed(ms))


def model(provider: str, ms: float, **other) -> dict:
    row = {
        "model": "uniformer_small", "frames": 16, "size": 224, "batch": 1, "dtype": "fp32",
        "mode": "inference", "provider": provider, "gmacs": 41.8, "floor_ms": None,
        "clips_per_s": 1e3 / ms, "peak_MiB": None, "saved_MiB": None, "joules_per_clip": None,
    }  # fmt: skip
    return row | timed(ms) | other


@pytest.fixture
def ops() -> dict:
    rows = []
    for direction, ours in (("forward", 4.0), ("backward", 8.0)):
        for provider, ms in (("uniformer", ours), (RIVALS[0], None), (RIVALS[1], 6.0)):
            rows.append(op(provider, ms) | {"direction": direction})
    return MACHINE | {"rows": rows}


@pytest.fixture
def models() -> dict:
    rows = []
    for provider, slower in (("uniformer", 1.0), (RIVALS[0], 2.5)):
        for frames in (8, 16):
            rows.append(model(provider, 60 * frames * slower, frames=frames))
        for batch in (1, 2, 4):
            memory = {"saved_MiB": 700.0 * batch * slower, "mode": "training"}
            rows.append(model(provider, 2100 * slower, batch=batch, **memory))
    return MACHINE | {"rows": rows}


def written(folder, ops, models, old=None) -> str:
    before = {"ops": old, "models": None}
    return write_report(ops, models, folder, "cpu", before).read_text()


def row_of(text: str, *words: str) -> list[str]:
    """The cells of the one table row that has all of these words."""
    (line,) = [x for x in text.splitlines() if x[:1] == "|" and all(word in x for word in words)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_of_the_fastest_rival(ops):
    forward, backward = group(ops).values()
    assert ratio(forward) == 1.5  # 6 ms over 4, whatever the one that failed would take
    assert ratio(backward) == 0.75
    assert ratio(forward | {"torch.compile of uniformer": op("", 1.0)}) == 1.5  # no rival
    assert ratio({"uniformer": op("uniformer", 1.0)}) is None
    assert ratio({"uniformer": op("uniformer", None), RIVALS[0]: op(RIVALS[0], 1.0)}) is None


def test_a_table_shows_times_floor_and_ratio(tmp_path, ops):
    text = written(tmp_path, ops, None)
    faster, slower = row_of(text, "C=64", "forward"), row_of(text, "C=64", "backward")
    assert faster[:5] == ["5x5x5 C=64 8x56x56", "1", "fp32", "forward", "4 <small>3.6-4.8</small>"]
    assert faster[-3:] == ["3", "75 %", "**1.50**"]
    assert slower[-3:] == ["3", "38 %", "0.75"]
    assert "- processor: AMD EPYC" in text
    assert "- copy: 14 GB/s" in text
    assert "- bf16: 0.3 TFLOP/s" in text


def test_failed_rows_say_why(tmp_path, ops):
    text = written(tmp_path, ops, None)
    assert "failed" in row_of(text, "C=64", "forward")
    (line,) = [x for x in text.splitlines() if x.startswith(f"- {RIVALS[0]} failed")]
    assert "`RuntimeError: no kernel for |this|`" in line
    assert "5x5x5 C=64 8x56x56 B=1 fp32 forward; " in line
    assert line.endswith("fp32 backward")


def test_the_summary_has_geometric_mean_worst_and_what_was_compared(tmp_path, ops):
    for channels, ours in ((128, 1.5), (320, None)):
        rows = [op("uniformer", ours), op(RIVALS[0], 9.0)]
        ops["rows"] += [row | {"case": f"5x5x5 C={channels} 8x28x28"} for row in rows]
    summary = row_of(written(tmp_path, ops, None), "dwconv3d", "worst")
    assert summary[1] == "**3.00** <small>worst 1.50, 2 of 3 cases</small>"  # of 1.5 and 6
    assert summary[2] == "0.75 <small>worst 0.75</small>"


def test_models_have_a_row_for_each_provider(tmp_path, models):
    text = written(tmp_path, None, models)
    section = text[text.index("## uniformer_small, training, 16 x 224 x 224") :]
    ours = row_of(section, "| 4 |", "uniformer")
    assert ours[2:4] == ["uniformer", "0.476"]
    assert ours[-5:] == ["-", "-", "2800", "-", "**2.50**"]
    assert row_of(section, "| 4 |", RIVALS[0])[-1] == ""
    assert "41.8 GMACs a clip" in section


def test_a_runtime_that_is_missing_stays_in_the_table(tmp_path, models):
    row = model("OpenVINO", 1.0, failed="openvino is not installed")
    for measured in (*timed(1.0), "clips_per_s"):
        del row[measured]
    models["rows"].append(row)
    text = written(tmp_path, None, models)
    assert row_of(text, "OpenVINO")[2:5] == ["OpenVINO", "-", "failed"]
    assert "- OpenVINO failed: `openvino is not installed` in uniformer_small 16 x 224" in text


def test_changes_are_listed_beyond_the_noise(tmp_path, ops):
    old = json.loads(json.dumps(ops))
    old["environment"]["torch"] = "2.12.0"
    old["rows"][0] |= timed(2.0)
    old["rows"][2] |= timed(99.0)  # a rival's time is not ours
    old["rows"][3] |= timed(7.9)
    text = written(tmp_path, ops, None, old)
    part = text[text.index("## Against") :]
    assert "2 of our rows are in both, 1 changed by more than 10 %" in part
    assert "  - dwconv3d 5x5x5 C=64 8x56x56 B=1 fp32 forward: 2.00" in part
    assert "**another torch**: 2.12.0 then, 2.13.0 now" in part
    assert "another processor" not in part
    assert "models: nothing to compare" in part
    ops["rows"][0] = op("uniformer", None)
    assert list(changes(ops, old).values()) == [math.inf, pytest.approx(8 / 7.9)]
    assert "forward: fails now" in written(tmp_path, ops, None, old)
    assert "these are the committed results" in written(tmp_path, ops, None, ops)


def test_every_picture_is_drawn(tmp_path, ops, models):
    pytest.importorskip("matplotlib")
    old = json.loads(json.dumps(ops))
    old["rows"][0] |= timed(2.0)
    text = written(tmp_path / "new" / "folder", ops, models, old)
    for name in ("roofline", "throughput", "memory", "latency", "regression"):
        content = (tmp_path / "new" / "folder" / f"{name}_cpu.png").read_bytes()
        assert content[:4] == b"\x89PNG"
        assert len(content) > 10_000
        assert f"({name}_cpu.png)" in text


def test_pictures_without_data_are_left_out(tmp_path, ops):
    pytest.importorskip("matplotlib")
    text = written(tmp_path, ops, None)
    assert {path.name for path in tmp_path.iterdir()} == {"report_cpu.md", "roofline_cpu.png"}
    assert text.count(".png") == 1
    failed = ops | {"rows": [op("uniformer", None)]}
    assert ".png" not in written(tmp_path, failed, MACHINE | {"rows": []}, ops)


def test_without_matplotlib_the_tables_are_written(tmp_path, ops, models, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    text = written(tmp_path, ops, models)
    assert "No pictures: matplotlib is not installed" in text
    assert "**1.50**" in text
    assert not list(tmp_path.glob("*.png"))


def test_the_command_line(tmp_path, ops, monkeypatch, capsys):
    old = json.loads(json.dumps(ops))
    old["rows"][0] |= timed(2.0)
    committed = {"HEAD:benchmarks/results/ops_cpu.json": json.dumps(old)}
    monkeypatch.setattr(report, "git", lambda command, path: committed.get(path))
    (tmp_path / "ops_cpu.json").write_text(json.dumps(ops))
    main([str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report_cpu.md")
    assert "1 changed by more than 10 %" in (tmp_path / "report_cpu.md").read_text()


def test_missing_results_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--device", "h100"])
    said = capsys.readouterr().err
    assert f"neither ops_h100.json nor models_h100.json with results is in {tmp_path}" in said

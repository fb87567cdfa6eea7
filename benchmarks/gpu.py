"""Turn ten minutes of a GPU into evidence, with one command.

    make gpu                              # or, without make:
    python -m benchmarks.gpu --out DIR    # copies the results to DIR as well
    python -m benchmarks.gpu --dry-run    # every step on tiny shapes, on any machine

Steps run in the order of their worth, each under its own time limit, nine minutes in all: the
tests, the tuner, the operators beside their rivals, the networks, compute-sanitizer, the other
layers, the report. A step that was done on this commit and this GPU is skipped and one that was cut
off goes on where it stopped, so that the command can simply be given again.

A plain checkout will do, with torch, triton, einops, safetensors, numpy, tqdm and pytest: nothing
of video is needed, and matplotlib and compute-sanitizer are used where they are.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.compare import group, ratio
from benchmarks.machine import OURS, RESULTS, ROOT
from benchmarks.run import OUT_OF_TIME

__all__ = ["main"]

LIMIT = 540  # seconds, for all steps
TESTS = (
    "test_attention",
    "test_patch_embed",
    "test_global_block",
    "test_pointwise",
    "test_ffn",
    "test_local_block",
    "test_dwconv3d",
    "test_dwconv3d_transforms",
    "test_dwconv3d_bwd_triton",
    "test_dwconv3d_norm",
    "test_gpu",
    "test_depthwise",
    "test_layers",
    "test_model",
)
SPARE = 12  # seconds before its limit at which a benchmark starts nothing more


@dataclass(frozen=True)
class Step:
    """A command and how long it may take, in seconds."""

    name: str
    command: list[str]
    limit: int


def steps(dry: bool, results: Path) -> list[Step]:
    """What is run, the most valuable evidence first."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    if importlib.util.find_spec("xdist") and not dry:  # tests wait for the compiler, mostly
        pytest += ["-n", str(min(os.cpu_count() or 1, 8))]
    tests = [f"tests/{name}.py" for name in TESTS]
    run = [*python, "benchmarks.run"]
    kept = ["--resume", "--no-report", "--out", str(results)]
    tune = [*python, "benchmarks.tune"]
    tune_attention = [*python, "benchmarks.tune_attention", "--seconds", "40"]
    if dry:
        kept += ["--tiny", "--seconds", "0.01"]
        tests = ["tests/test_dwconv3d.py", "-k", "only_wanted or cannot_run"]
        into = ["--dry-run", "--into", str(results / "tuned.json")]
        tune, tune_attention = [*tune, *into], [*tune_attention, *into]

    def timed(limit: int) -> list[str]:
        return ["--limit", str(limit - SPARE)]

    found = [
        Step("tests", [*pytest, *tests], 120),
        Step("tune", [*tune, "--seconds", "60"], 75),
        Step("attention", tune_attention, 50),
        Step("operators", [*run, "ops", "dwconv3d|attention", *kept, *timed(85)], 85),
        Step(
            "networks", [*run, "models", *kept, *([] if dry else ["--compiled"]), *timed(125)], 125
        ),
        Step("layers", [*run, "ops", *kept, *timed(45)], 45),
    ]
    for tool in ("memcheck", "racecheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        program = [*python, "benchmarks.sanitized"]
        found.insert(-1, Step(tool, program if dry else [*sanitizer, *program], 45))
    report = [*python, "benchmarks.report", str(results)]
    return [*found, Step("report", [*report, "--device", machine.slug(_device())], 25)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of the file. Returns the number of steps that failed."""
    parser = argparse.ArgumentParser(description="Tests, tuning and benchmarks on a GPU.")
    out = os.environ.get("OUT")
    parser.add_argument(
        "--out", type=Path, default=Path(out) if out else None,
        help="a folder to copy the results to (the variable OUT sets it too)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--again", action="store_true", help="repeat what is done already")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run rehearses every step without one")
    if args.dry_run and args.out is None:
        parser.error("--dry-run needs --out DIR: its figures are no results")
    results = args.out / "results" if args.dry_run else RESULTS
    logs = (args.out if args.dry_run else ROOT / "runs") / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    state = _read_state(logs / "state.json")
    here = {"commit": machine.git("rev-parse", "HEAD"), "machine": _machine(), "dry": args.dry_run}
    deadline = time.monotonic() + LIMIT
    for step in steps(args.dry_run, results):
        before = state.get(step.name, {})
        done = before.get("status") == "done" and all(before.get(k) == v for k, v in here.items())
        if done and not args.again and step.name != "report":
            print(f"{step.name}: done already, in {before['seconds']} s", flush=True)
            continue
        limit = min(step.limit, deadline - time.monotonic())
        print(f"{step.name}: {' '.join(step.command)}", flush=True)
        state[step.name] = _run(step, limit, logs) | here
        (logs / "state.json").write_text(json.dumps(state, indent=1))
    table = _table(state, results)
    (logs / "table.txt").write_text(table)
    if args.out is not None:
        _copy(results, logs, args.out)
    print(f"\n{table}")
    return sum(row["status"] == "failed" for row in state.values())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _read_state(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _run(step: Step, limit: float, logs: Path) -> dict[str, Any]:
    """Run a step in a process group of its own, never longer than `limit`; a log has its output."""
    if limit < 5:
        return {"status": "not run", "seconds": 0, "note": "no time was left"}
    if shutil.which(step.command[0]) is None:
        return {"status": "not run", "seconds": 0, "note": f"there is no {step.command[0]}"}
    paths = [str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    log = logs / f"{step.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            status = {0: "done", OUT_OF_TIME: "cut off"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            status = "cut off"
        finally:  # after Ctrl-C as well: the next run would be timed beside it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip()[:100] if lines else ""
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "note": last}


def _table(state: dict[str, Any], results: Path) -> str:
    """How each step went, and the figures that matter most."""
    lines = [f"{'step':<11}{'':<9}{'s':>7}  last line"]
    for name, row in state.items():
        lines.append(f"{name:<11}{row['status']:<9}{row['seconds']:>7}  {row['note']}")
    slug = machine.slug(_device())
    ops = machine.read(results / f"ops_{slug}.json")
    models = machine.read(results / f"models_{slug}.json")
    lines.append("")
    for results_of in (ops, models):
        lines += [_figures(str(case), rows) for case, rows in group(results_of).items()]
    return "\n".join(lines) + "\n"


def _figures(name: str, rows: dict[str, dict]) -> str:
    ours = rows.get(OURS, {})
    if "p50_ms" not in ours:
        return f"{name:<60}  {ours.get('failed', 'not measured')}"
    better = ratio(rows)
    beside = f"{better:6.2f}x the best rival" if better else " " * 23
    floor = f"{ours['floor_ms'] / ours['p50_ms']:6.1%} of floor"
    return f"{name:<60}{ours['p50_ms']:>10.3f} ms {beside}  {floor}"


def _copy(results: Path, logs: Path, out: Path) -> None:
    """Few files, for where only a few come back: tables and JSON as they are, the rest packed."""
    out.mkdir(parents=True, exist_ok=True)
    slug = machine.slug(_device())
    tuned = results / "tuned.json"  # of a rehearsal
    if not tuned.is_file():
        tuned = ROOT / "kernels" / "uniformer_kernels" / "tuned.json"
    single = [results / f"ops_{slug}.json", results / f"models_{slug}.json", tuned,
              results / f"report_{slug}.md", logs / "table.txt"]  # fmt: skip
    for file in single:
        if file.is_file() and file.parent != out:
            shutil.copy(file, out)
    with tarfile.open(out / "logs_and_plots.tar.gz", "w:gz") as tar:
        for file in [*logs.glob("*"), *results.glob(f"*_{slug}.png")]:
            tar.add(file, file.name)


if __name__ == "__main__":
    sys.exit(main())

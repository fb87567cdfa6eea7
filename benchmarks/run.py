"""Run the benchmarks and write results and report.

    python -m benchmarks.run                     # everything, in benchmarks/results
    python -m benchmarks.run ops attention bf16  # operators and layers whose name has such a word
    python -m benchmarks.run models training
    python -m benchmarks.run --base HEAD~3       # ours now beside ours then

Results are written after every case. `--resume` keeps what the same commit, on the same machine,
has measured already, and goes on from there.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import (
    bench_attention,
    bench_blocks,
    bench_dwconv3d,
    bench_layers,
    bench_model,
    harness,
    machine,
)
from benchmarks.harness import Case
from benchmarks.machine import OURS, RESULTS, ROOT
from benchmarks.report import report_on

__all__ = ["cases", "main"]

OPS = (bench_dwconv3d, bench_attention)
ALL = (*OPS, bench_blocks, bench_layers)


class Tier(NamedTuple):
    """Files, batches and dtypes of cases, and a word that their names must have."""

    files: tuple[Any, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    word: str = ""


# In the order of what a short lease should measure first. In fp16 on a CPU each case takes the
# rivals half a minute.
TIERS = {
    "cpu": (
        Tier(OPS, (1,), ("fp32", "bf16")),
        Tier((bench_dwconv3d,), (1,), ("fp16",), "C=128"),
        Tier(ALL[2:], (1,), ("fp32", "bf16")),
    ),
    "cuda": (
        Tier(OPS, (32, 8), ("bf16",)),
        Tier(ALL[2:], (32,), ("bf16",)),
        Tier(ALL, (1,), ("bf16",)),
        Tier(OPS, (8,), ("fp16", "fp32")),
        Tier(ALL[2:], (8,), ("bf16", "fp16", "fp32")),
    ),
}
TINY = Tier(ALL, (2,), ("fp32",))
FULL = Tier(ALL, (1, 8, 32), ("bf16", "fp16", "fp32"))
SAME = ("processor", "gpu", "torch", "triton", "commit", "threads")  # for results to be resumed


def cases(device: str, tiny: bool = False, full: bool = False) -> Iterator[Case]:
    """All cases of operators, layers and blocks, the most telling first."""
    seen = set()
    tiers = (TINY,) if tiny else (*TIERS[device], FULL) if full else TIERS[device]
    for tier in tiers:
        for file in tier.files:
            for case in file.cases(device, tier.batches, tier.dtypes, tiny):
                if str(case) not in seen and tier.word in str(case):
                    seen.add(str(case))
                    yield case


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description="Time this library beside its rivals.")
    parser.add_argument("what", nargs="?", choices=["all", "ops", "models"], default="all")
    parser.add_argument("words", nargs="*", help="only what has one of these in its name")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=0.4, help="a direction of a case, about")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds; nothing starts later")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the networks too")
    parser.add_argument("--resume", action="store_true", help="keep what is measured already")
    parser.add_argument("--full", action="store_true", help="every batch, dtype, clip; hours")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--only", help="the one provider to run")
    parser.add_argument("--base", help="a git revision to compare ours with")
    parser.add_argument("--no-report", action="store_true")
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if args.base:
        compare(args)
        return
    args.deadline = time.monotonic() + args.limit
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True  # its best, for every rival
    if args.what != "models":
        _ops(args)
    if args.what != "ops":
        _models(args)
    if not args.no_report:
        print(f"report: {report_on(args.out, machine.slug(args.device))}")


# --- The two halves -------------------------------------------------------------------


def _ops(args: argparse.Namespace) -> None:
    chosen = harness.chosen(cases(args.device, args.tiny, args.full), args.words)

    def rows(case: Case, ceilings: dict[str, float]) -> list[dict[str, Any]]:
        return harness.measure(case, args.device, ceilings, seconds=args.seconds, only=args.only)

    def key(case: Case) -> tuple:
        return case.op, case.case, case.batch, case.dtype

    _all(args, "ops", chosen, rows, key, ("op", "case", "batch", "dtype"))


def _models(args: argparse.Namespace) -> None:
    chosen = bench_model.chosen(args.device, args.words, args.tiny, args.full)

    def rows(run: bench_model.Run, ceilings: dict[str, float]) -> list[dict[str, Any]]:
        # A training step and a network of 16 frames take seconds on a CPU.
        seconds = args.seconds * (8 if args.device == "cpu" else 2)
        first = run == chosen[0]
        compiled = args.compiled and (args.device == "cuda" or first)
        return bench_model.measure(
            run, args.device, ceilings, seconds=seconds, compiled=compiled, only=args.only
        )

    names = ("model", "frames", "size", "batch", "dtype", "mode")
    _all(args, "models", chosen, rows, lambda r: tuple(getattr(r, n) for n in names), names)


def _all(
    args: argparse.Namespace,
    name: str,
    chosen: list,
    rows: Callable[[Any, dict[str, float]], list[dict[str, Any]]],
    key: Callable[[Any], tuple],
    names: tuple[str, ...],
) -> None:
    """Measure what is chosen, with a bar and what is left, and write after each."""
    file = args.out / f"{name}_{machine.slug(args.device)}.json"
    environment = machine.environment(args.device)
    before = machine.read(file) if args.resume else None
    if before and any(before["environment"].get(k) != environment.get(k) for k in SAME):
        before = None
    content = before or {
        "environment": environment, "ceilings": machine.ceilings(args.device), "rows": []
    }  # fmt: skip
    done = {tuple(row[n] for n in names) for row in content["rows"]}
    todo = [c for c in chosen if key(c) not in done]
    bar = tqdm(todo, desc=name, unit="case", disable=None)
    for i, case in enumerate(bar):
        if time.monotonic() > args.deadline:
            tqdm.write(f"out of time: {len(todo) - i} of {len(todo)} {name} are not measured")
            break
        bar.set_postfix_str(str(case))
        content["rows"] += rows(case, content["ceilings"])
        machine.save(file, content)


# --- Two revisions --------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """Ours as it is beside ours at `--base`, by these benchmarks, in processes by turns."""
    revision = machine.git("rev-parse", "--short", args.base)
    if revision is None:
        sys.exit(f"{args.base!r} is no revision of this repository")
    packed = subprocess.run(
        ["git", "archive", revision, "uniformer", "kernels", "csrc"],
        cwd=ROOT, capture_output=True,
    )  # fmt: skip
    if packed.returncode:
        sys.exit(f"{revision} has no library to compare with: {packed.stderr.decode().strip()}")
    words = [args.what, *args.words, "--device", args.device, "--seconds", str(args.seconds)]
    words += ["--only", OURS, "--no-report"] + ["--tiny"] * args.tiny
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as tar:
            tar.extractall(base, filter="data")
        roots = {revision: base, "now": ROOT}
        times: dict[str, dict[tuple, float]] = {name: {} for name in roots}
        for turn in range(2):
            for name, root in roots.items():
                print(f"{name}, turn {turn + 1} of 2", flush=True)
                into = Path(folder, f"{name}{turn}")
                paths = [str(root), str(root / "kernels"), str(ROOT)]
                environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
                # -P: otherwise the library is taken from the working directory.
                command = [sys.executable, "-P", "-m", "benchmarks.run", *words, "--out", str(into)]
                if subprocess.run(command, env=environment, cwd=ROOT).returncode:
                    sys.exit(f"the benchmarks failed on {name}: see above")
                for key, ms in _ours(into):
                    times[name][key] = min(ms, times[name].get(key, ms))
    print(f"\nmilliseconds, the better median of two turns: {revision} -> now")
    for key, now in times["now"].items():
        then = times[revision].get(key)
        if then:
            print(f"{then / now:6.2f}x  {then:10.3f} -> {now:10.3f}  {' '.join(map(str, key))}")


def _ours(folder: Path) -> Iterator[tuple[tuple, float]]:
    for file in sorted(folder.glob("*.json")):
        for row in (machine.read(file) or {"rows": []})["rows"]:
            if "p50_ms" in row:
                names = (
                    "op",
                    "case",
                    "model",
                    "frames",
                    "size",
                    "batch",
                    "dtype",
                    "direction",
                    "mode",
                )
                yield tuple(row[n] for n in names if n in row), row["p50_ms"]


if __name__ == "__main__":
    main()

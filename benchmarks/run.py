"""Run the benchmarks and write results and report.

    python -m benchmarks.run                     # everything, into benchmarks/results
    python -m benchmarks.run ops attention bf16  # what has both words in its name, into runs/bench
    python -m benchmarks.run models "training|inference"   # or either
    python -m benchmarks.run --base HEAD~3       # ours now beside ours then

Results are written after every case. `--resume` keeps what the same commit, on the same machine,
has measured already, and goes on from there. Exits with 3 where time ran out before the end.
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
from benchmarks.compare import Case as Measured
from benchmarks.compare import group
from benchmarks.harness import Case, is_chosen
from benchmarks.machine import OURS, RESULTS, ROOT, RUNTIMES
from benchmarks.report import report_on
from uniformer.configs import PRESETS

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
SAME = (  # to be resumed
    "processor", "gpu", "torch", "triton", *RUNTIMES, "commit", "dirty", "threads",
)  # fmt: skip
OUT_OF_TIME = 3  # exit status


def cases(device: str, tiny: bool = False, full: bool = False) -> Iterator[Case]:
    """All cases of operators, layers and blocks, the most telling first."""
    seen = set()
    tiers = (TINY,) if tiny else (*TIERS[device], FULL) if full else TIERS[device]
    for tier in tiers:
        for file in tier.files:
            for case in file.cases(tier.batches, tier.dtypes, tiny):
                if str(case) not in seen and tier.word in str(case):
                    seen.add(str(case))
                    yield case


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the top of the file. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Time this library beside its rivals.")
    parser.add_argument("what", nargs="?", choices=["all", "ops", "models"], default="all")
    parser.add_argument("words", nargs="*", help="only what has all of these in its name; a|b: or")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="the GPU where there is one")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=0.4, help="a direction of a case, about")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds; nothing starts later")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the networks too")
    parser.add_argument("--resume", action="store_true", help="keep what is measured already")
    parser.add_argument("--full", action="store_true", help="every batch, dtype, clip; hours")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the program")
    parser.add_argument("--only", help="the one provider to run")
    parser.add_argument("--base", help="a git revision to compare ours with")
    parser.add_argument("--no-report", action="store_true", help="results alone")
    args = parser.parse_args(arguments)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if not args.seconds >= 0:
        parser.error(f"--seconds must be 0 or more, got {args.seconds}")
    if args.out is None:  # a part of it does not replace the whole
        whole = args.what == "all" and not (args.words or args.only or args.tiny)
        args.out = RESULTS if whole else ROOT / "runs" / "bench"
    args.cases = [c for c in cases(args.device, args.tiny, args.full) if is_chosen(c, args.words)]
    every = bench_model.runs(args.device, args.tiny, args.full)
    args.runs = [r for r in every if is_chosen(r, args.words)]
    if not (args.cases if args.what == "ops" else args.runs if args.what == "models" else 1):
        names = sorted({c.op for c in cases(args.device)} | set(PRESETS))
        parser.error(f"no name has {' and '.join(args.words)}; there are {', '.join(names)}")
    if args.base:
        compare(args)
        return 0
    args.deadline = time.monotonic() + args.limit
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True  # its best, for every rival
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        whole = args.what == "models" or _ops(args)
        whole = (args.what == "ops" or _models(args)) and whole
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what is measured is in {args.out}, --resume goes on from there")
    if not args.no_report:
        try:
            print(f"report: {report_on(args.out, machine.slug(args.device))}")
        except FileNotFoundError as error:
            print(error)
    return 0 if whole else OUT_OF_TIME


# --- The two halves -------------------------------------------------------------------


def _ops(args: argparse.Namespace) -> bool:
    def rows(case: Case, ceilings: dict[str, float]) -> list[dict[str, Any]]:
        return harness.measure(case, args.device, ceilings, seconds=args.seconds, only=args.only)

    def key(case: Case) -> tuple:
        return case.op, case.case, case.batch, case.dtype

    return _all(args, "ops", args.cases, rows, key, ("op", "case", "batch", "dtype"))


def _models(args: argparse.Namespace) -> bool:
    first = next(bench_model.runs(args.device, args.tiny))

    def rows(run: bench_model.Run, ceilings: dict[str, float]) -> list[dict[str, Any]]:
        # A training step and a network of 16 frames take seconds on a CPU.
        seconds = args.seconds * (8 if args.device == "cpu" else 2)
        compiled = args.compiled and (args.device == "cuda" or run == first)
        return bench_model.measure(
            run, args.device, ceilings, seconds=seconds, compiled=compiled, only=args.only
        )

    names = ("model", "frames", "size", "batch", "dtype", "mode")
    return _all(
        args, "models", args.runs, rows, lambda r: tuple(getattr(r, n) for n in names), names
    )


def _all(
    args: argparse.Namespace,
    name: str,
    chosen: list,
    rows: Callable[[Any, dict[str, float]], list[dict[str, Any]]],
    key: Callable[[Any], tuple],
    names: tuple[str, ...],
) -> bool:
    """Measure what is chosen, with a bar and what is left, and write after each.

    Returns whether all of it is measured.
    """
    file, start = args.out / f"{name}_{machine.slug(args.device)}.json", time.monotonic()
    environment = machine.environment(args.device)
    before = machine.read(file) if args.resume else None
    other = [k for k in SAME if before and before["environment"].get(k) != environment.get(k)]
    if before and other:
        print(f"{file} is of another {' and '.join(other)}: it is measured anew")
        before = None
    content = before or {
        "environment": environment, "ceilings": machine.ceilings(args.device), "rows": []
    }  # fmt: skip
    spent = content["environment"].get("seconds", 0)
    wanted = args.only or OURS
    done = {tuple(r[n] for n in names) for r in content["rows"] if r["provider"] == wanted}
    todo = [c for c in chosen if key(c) not in done]
    if before:
        print(f"{len(chosen) - len(todo)} of {len(chosen)} {name} are measured already")
    bar = tqdm(todo, desc=name, unit="case", disable=None)
    for i, case in enumerate(bar):
        if time.monotonic() > args.deadline:
            tqdm.write(f"out of time: {len(todo) - i} of {len(todo)} {name} are not measured")
            return False
        if bar.disable:  # no terminal
            print(f"{i + 1} of {len(todo)}: {case}", flush=True)
        bar.set_postfix_str(str(case))
        now = rows(case, content["ceilings"])
        again = {(key(case), row["provider"]) for row in now}
        content["rows"] = [
            r for r in content["rows"] if (tuple(r[n] for n in names), r["provider"]) not in again
        ] + now
        content["environment"]["seconds"] = round(spent + time.monotonic() - start)
        machine.save(file, content)
    return True


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
        times: dict[str, dict[Measured, float]] = {name: {} for name in roots}
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
                for case, ms in _ours(into):
                    times[name][case] = min(ms, times[name].get(case, ms))
    print(f"\nmilliseconds, the better median of two turns: {revision} -> now")
    print("a shared machine gives 0.7x to 1.4x for the same code: repeat before believing")
    for case, now in times["now"].items():
        then = times[revision].get(case)
        if then:
            print(f"{then / now:6.2f}x  {then:10.3f} -> {now:10.3f}  {case}")


def _ours(folder: Path) -> Iterator[tuple[Measured, float]]:
    for file in folder.glob("*.json"):
        for case, rows in group(machine.read(file)).items():
            if "p50_ms" in rows.get(OURS, {}):
                yield case, rows[OURS]["p50_ms"]


if __name__ == "__main__":
    sys.exit(main())
